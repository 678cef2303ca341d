"""Grow eyes on a language model:

    python train.py                                              the demonstration: everything from nothing, in minutes on two CPU cores
    python train.py --stage=sft --data=data/mine --out=out/mine  fine-tune what `pretrain` left, on your own data
    torchrun --nproc_per_node=8 train.py --stage=sft             the same on eight cards
"""
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import prepare
import sample
from nanovlm import IMAGE, UNTRAINED, Mistake, cli, evaluate, images, parallel, weights
from nanovlm.data import Loader, Samples, collate, pack

# What a stage sets where no setting overrides it. brain and eye are the demonstration's; pretrain and sft are the recipe of
# Megatron-LM/examples/multimodal (pretrain_mistral_clip.sh, sft_mistral_clip.sh): rates, floors, steps, batch, decay and clipping.
STAGES = {
    "brain": dict(freeze="vision,projector", model="out/newborn", data="data/text", lr=3e-3, floor=1e-4, steps=700, batch=16, row=256, decay=0.1, clip=1.0),
    "eye": dict(freeze="decoder", model="out/brain", data="data/captions", lr=2e-3, floor=1e-4, steps=900, batch=16, row=256, decay=0.1, clip=1.0),
    "pretrain": dict(freeze="vision,decoder", model="out/stitched", data="data/captions",
                     lr=1.5e-4, floor=1e-5, steps=20000, batch=256, row=1024, decay=0.01, clip=1.0),
    "sft": dict(freeze="vision", model="out/pretrain", data="data/chats", lr=1e-6, floor=1e-7, steps=20000, batch=128, row=2048, decay=0.1, clip=0.5),
}
PARTS = ("vision", "projector", "decoder")


def schedule(step, *, steps, warmup, floor):
    """The rate at a step as a share of the peak: up in a line for `warmup` steps, then half a cosine down to `floor` (Loshchilov & Hutter 2016)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, rates, decay, betas):
    """AdamW over what trains: a group for each part and kind, decay on matrices only (vectors are norms and biases: pulling them to 0 is no prior)."""
    groups = []
    for part in PARTS:
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        for matrices in (True, False):
            members = [p for p in trained if (p.dim() >= 2) == matrices]
            if members:
                groups.append({"params": members, "peak": rates[part], "weight_decay": decay if matrices else 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def print_plan(model, rates, micro, row):
    """What trains at which rate, and how much memory it will take."""
    print(f"{'part':10} {'parameters':>13} {'trained':>13} {'rate':>9}")
    for part in PARTS:
        sizes = [(p.numel(), p.requires_grad) for p in getattr(model, part).parameters()]
        trained = sum(n for n, on in sizes if on)
        print(f"{part:10} {sum(n for n, _ in sizes):13,} {trained:13,} {f'{rates[part]:.1e}' if trained else 'frozen':>9}")
    size = {on: sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad is on) for on in (True, False)}
    block, width = model.decoder.layers[0], model.decoder.embed.weight.shape[1]
    # Saved for backward by a decoder layer, in numbers a token: two norms in and out, q, k, v, their mix, out, gate, up, their product, down.
    a_token = 8 * width + 2 * (block.heads + block.kv_heads) * block.head_size + 4 * block.up.weight.shape[0]
    activations = micro * row * len(model.decoder.layers) * a_token * model.decoder.embed.weight.element_size()
    gb = [size[True] + size[False], size[True], 2 * size[True], activations]
    print("memory, about: " + " + ".join(f"{x / 2**30:.2f} GB {what}" for x, what in zip(gb, ["weights", "gradients", "optimizer", "activations"], strict=True)))


@torch.no_grad()
def validate(model, samples, row, micro, rank, world, device, limit=64):
    """(loss a trained token, the same with every picture grey) over the held-out part; the second tells whether it looks at all."""
    members = samples.split(validation=True)[:limit]
    rows = [members[r] for r in pack(samples.table[members, 4], row)][rank::world]
    sums = [0.0, 0.0, 0.0]
    for start in range(0, len(rows), micro):
        batch = {k: v.to(device) for k, v in collate(samples, rows[start : start + micro])[0].items()}
        sums[0] += model(**batch).item()
        sums[1] += model(**{**batch, "tiles_NCYX": torch.full_like(batch["tiles_NCYX"], 128)}).item()
        sums[2] += (batch["targets_BT"] != UNTRAINED).sum().item()
    loss, blank, count = parallel.total(sums, device)
    return (loss / count, blank / count) if count else (float("nan"), float("nan"))


def show_answers(checkpoint, samples, count=2):
    """The first question of the first held-out samples, the model's answer and the right one."""
    for i in samples.split(validation=True)[:count]:
        ids_T, targets_T, tiles_NCYX = samples.read(i)
        first = int((targets_T != UNTRAINED).argmax()) + 1
        last = first + int((targets_T[first - 1 :] == UNTRAINED).argmax()) - 1
        stop = int(ids_T[last])
        seen = int((ids_T[:first] == IMAGE).sum()) // samples.header["tokens_per_tile"]
        tiles_NCYX = torch.from_numpy(tiles_NCYX[:seen].copy())
        said = [x for (x,) in checkpoint.model.generate([ids_T[:first].tolist()], tiles_NCYX, stop={stop}, max_tokens=64) if x != stop]
        decode = checkpoint.tokenizer.decode
        print(f"  {samples.names[i]}: it says {decode(said)!r}, right is {decode(ids_T[first:last].tolist())!r}")


def resolve(stage, given):
    """A stage's presets with the settings that were given laid over them."""
    if stage not in STAGES:
        raise Mistake(f"--stage={stage} is not known: {', '.join(STAGES)}")
    chosen = {**STAGES[stage], **{name: value for name, value in given.items() if value is not None}}
    frozen = [part for part in chosen["freeze"].split(",") if part not in ("", "none")]
    wrong = [part for part in frozen if part not in PARTS]
    if wrong or len(set(frozen)) == len(PARTS):
        raise Mistake(f"--freeze={chosen['freeze']}: {f'{wrong[0]} is none of' if wrong else 'nothing is left to train of'} {', '.join(PARTS)}")
    return chosen | {"freeze": frozen}


def open_run(out, resume, rank):
    """The folder of the newest checkpoint to go on from, or None for a fresh run; an earlier run in the way is moved aside, not lost."""
    out = Path(out)
    if resume:
        return weights.newest(out)
    if out.exists() and rank == 0:
        number = next(n for n in range(1, 1000) if not Path(f"{out}.{n}").exists())
        os.rename(out, f"{out}.{number}")
        print(f"{out} holds an earlier run: moved to {out}.{number}")
    parallel.barrier()
    return None


def train(*,
    stage: str = "",                  # brain, eye, pretrain or sft; empty: the demonstration, all of them in a row
    model: str | None = None,         # the checkpoint to start from; none: what the stage before left
    data: str | None = None,          # a set that `prepare.py data` wrote
    out: str | None = None,           # the run's folder; none: out/STAGE
    resume: bool = False,             # go on from the newest checkpoint in --out
    steps: int | None = None,         # optimizer steps in all
    batch: int | None = None,         # rows of a step, over all ranks and micro-batches
    micro: int = 8,                   # rows a rank holds at once
    row: int | None = None,           # tokens in a row; whole samples are packed into it
    freeze: str = "",                 # parts that keep still, of vision,projector,decoder, or none; empty: the stage's
    lr: float | None = None,          # peak rate of every part that trains
    vision_lr: float | None = None,   # the eye's own
    projector_lr: float | None = None,  # the projector's own
    decoder_lr: float | None = None,  # the brain's own
    floor: float | None = None,       # where the rate ends, as a rate beside --lr
    warmup: float = 0.01,             # share of the steps over which the rate rises
    decay: float | None = None,       # weight decay, on matrices only
    clip: float | None = None,        # the gradient's norm is cut down to this
    beta1: float = 0.9,               # Adam's memory of gradients
    beta2: float = 0.95,              # Adam's memory of their squares
    seed: int = 0,                    # of the order of the samples
    save_every: int = 500,            # steps between checkpoints
    validate_every: int = 100,        # steps between looks at the held-out samples
    log_every: int = 20,              # steps between progress lines
    device: str = "auto",             # auto, cpu, cuda or mps
    dtype: str = "auto",              # auto, float32 or bfloat16: of the products; auto is bfloat16 on CUDA. Parameters stay float32
):
    """Train one stage, or (without --stage) walk the whole road once."""
    if not stage:
        return demonstration()
    began = time.time()
    given = dict(model=model, data=data, steps=steps, batch=batch, row=row, freeze=freeze or None, lr=lr, floor=floor, decay=decay, clip=clip)
    chosen, out = resolve(stage, given), out or f"out/{stage}"
    device = parallel.pick_device(device)
    rank, world = parallel.start(device)
    micro = min(micro, -(-chosen["batch"] // world))

    # ---- what to train: the checkpoint, its frozen parts, the rates ----
    found = open_run(out, resume, rank)
    checkpoint = weights.load(found or chosen["model"], device)
    vlm = checkpoint.model.train()
    rates = {part: own or chosen["lr"] for part, own in zip(PARTS, (vision_lr, projector_lr, decoder_lr), strict=True)}
    for part in PARTS:
        getattr(vlm, part).requires_grad_(part not in chosen["freeze"])
    optimizer = make_optimizer(vlm, rates, chosen["decay"], (beta1, beta2))
    trained = [p for p in vlm.parameters() if p.requires_grad]

    # ---- what to train on ----
    samples = Samples(chosen["data"])
    samples.check_fingerprint(checkpoint.fingerprint())
    must_agree = {"stage": stage, "data": str(Path(chosen["data"]).resolve()), "batch": chosen["batch"], "row": chosen["row"], "seed": seed,
                  "steps": chosen["steps"], "freeze": chosen["freeze"]}
    start = go_on(found, vlm, optimizer, must_agree) if found else 0
    if start >= chosen["steps"]:
        return print(f"{stage}: {out} has all of its {start} steps already")
    loader = Loader(samples, row=chosen["row"], batch=chosen["batch"], micro=micro, seed=seed, rank=rank, world=world, start=start)
    warmup = max(1, round(warmup * chosen["steps"]))
    if rank == 0:
        print_plan(vlm, rates, micro, chosen["row"])
        print(f"{stage}: {chosen['steps']} steps of {chosen['batch']} rows on {world} × {device}, from {found or chosen['model']} on {chosen['data']}")

    # ---- the loop ----
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda"))
    wrapped, log = parallel.wrap(vlm), Log(out, start, rank, began)
    with ThreadPoolExecutor(1) as reader, Stopper() as stopper:
        coming = reader.submit(next, loader)
        for step in range(start, chosen["steps"]):
            batches = log.wait(coming)
            coming = reader.submit(next, loader)
            share = schedule(step, steps=chosen["steps"], warmup=warmup, floor=chosen["floor"] / chosen["lr"])
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            loss, count, length, stopping = gradients(wrapped, batches, device, mixed, stopper.asked)
            norm = torch.nn.utils.clip_grad_norm_(trained, chosen["clip"]).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                names = ", ".join(name for _, members in batches for name in members)
                raise Mistake(f"step {step + 1}: loss {loss}, gradient norm {norm}; the last checkpoint stands. This rank's samples: {names}")
            optimizer.step()
            optimizer.zero_grad()

            done, ends = step + 1, step + 1 == chosen["steps"] or stopping
            log.count(length)
            if done % validate_every == 0 or ends:
                log.looks(*validate(vlm, samples, chosen["row"], micro, rank, world, device))
                if rank == 0:
                    show_answers(checkpoint, samples)
            if done % log_every == 0 or ends:
                log.line(done, chosen["steps"], loss=loss, rate=chosen["lr"] * share, norm=norm, trained=count / length)
            if rank == 0 and (done % save_every == 0 or ends):
                weights.save_step(checkpoint, out, done, {"step": done, **must_agree}, weights.optimizer_tensors(vlm, optimizer))
            if ends:
                break
    parallel.barrier()
    if rank == 0:
        print(f"{stage}: {log.spent()} for {done - start} steps, in {out}", flush=True)
    if stopping and done < chosen["steps"]:
        raise Mistake(f"stopped after step {done} of {chosen['steps']} and saved; to go on: {' '.join(sys.argv)} --resume=true")
    parallel.stop()


def gradients(wrapped, batches, device, mixed, stopping):
    """One step's gradients: the loss summed over trained tokens, divided by their number over all ranks and micro-batches, never a mean of means.

    Returns that loss, the trained tokens, all tokens, and whether any rank was asked to stop.
    """
    trained = sum(int((batch["targets_BT"] != UNTRAINED).sum()) for batch, _ in batches)
    length = sum(int((batch["documents_BT"] >= 0).sum()) for batch, _ in batches)
    count, length, world, stopping = parallel.total([trained, length, 1, stopping], device)
    loss = 0.0
    for i, (batch, _) in enumerate(batches):
        with parallel.no_sync(wrapped, last=i == len(batches) - 1):
            with mixed:
                part = wrapped(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
            (part * world / count).backward()  # the wrapper takes the mean over ranks
        loss += part.item()
    return parallel.total([loss], device)[0] / count, count, length, stopping > 0


class Stopper:
    """Ctrl-C and SIGTERM set `asked`; the loop finishes its step and saves. A second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """Progress lines on the terminal and out/log.jsonl, which goes on where a resumed run does."""

    def __init__(self, out, start, rank, began):
        self.path, self.rank, self.start, self.began = Path(out) / "log.jsonl", rank, start, began
        self.seen, self.waited, self.tokens, self.told = {}, 0.0, 0, time.time()
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if start and self.path.exists() else []
            self.path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))

    def wait(self, future):
        asked = time.time()
        result = future.result()
        self.waited += time.time() - asked
        return result

    def count(self, tokens):
        self.tokens += tokens

    def looks(self, validation, blank):
        self.seen = {"validation": validation, "blank": blank}

    def spent(self):
        return f"{time.time() - self.began:.0f} s"

    def line(self, step, steps, **numbers):
        now = time.time()
        took, left = now - self.told, (now - self.began) / (step - self.start) * (steps - step)
        numbers = {"step": step, **numbers, **self.seen, "tokens_per_s": self.tokens / took, "waited": self.waited / took, "left": left}
        self.told, self.waited, self.tokens = now, 0.0, 0
        if self.rank:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")
        looks = "".join(f" | {name} {value:.3f}" for name, value in self.seen.items())
        print(f"step {step:5d}/{steps} | loss {numbers['loss']:.4f}{looks} | rate {numbers['rate']:.1e} | norm {numbers['norm']:.2f} | "
              f"{numbers['tokens_per_s']:,.0f} tokens/s, {numbers['trained']:.0%} trained, {numbers['waited']:.0%} waiting | {left:.0f} s left", flush=True)


def go_on(folder, vlm, optimizer, must_agree):
    """Fill the optimizer from a run's checkpoint and return its step; a setting that would change the run is refused."""
    was = weights.read_json(folder / "training.json")
    wrong = [f"{name} was {was.get(name)}, now {value}" for name, value in must_agree.items() if was.get(name) != value]
    if wrong:
        raise Mistake(f"{folder} cannot be resumed as another run: {'; '.join(wrong)}")
    weights.put_optimizer(vlm, optimizer, weights.read_tensors(folder / "training.safetensors"), folder)
    return was["step"]


def exam(model, questions, images_from, blank=False):
    """Mark a model's answers: [(kind, questions, share exactly right)], the last over all."""
    checkpoint = weights.load(model, parallel.pick_device("auto"))
    asked = [(q["question"], [images.load_tiles(Path(images_from) / path, checkpoint.policy) for path in q["image"]]) for q in questions]
    answers = sample.answer_all(checkpoint, asked, blank=blank, max_tokens=64)
    return evaluate.table(questions, [evaluate.exact(a, q["answers"]) for a, q in zip(answers, questions, strict=True)])


def demonstration():
    """The whole road from nothing: every step below is one that you can type yourself, and each is skipped if an earlier run has finished it."""
    began = time.time()

    def once(made, why, do, **settings):
        done = Path(made).exists()
        print(f"\n== {why}{' (done before)' if done else ''}", flush=True)
        return None if done else do(**settings)

    def stage(name, why, **settings):
        print(f"\n== {why}", flush=True)
        train(stage=name, resume=any(Path(f"out/{name}").glob("step-*")), **settings)

    once("data/fridge/exam.jsonl", "Draw fridges, and write down what is in them.", prepare.fridge)
    once("out/newborn", "Learn a tokenizer from those words. The newborn's eye and brain are random.",
         prepare.new, source=["data/fridge/text.json"])
    for name in ("text", "captions", "chats"):
        once(f"data/{name}", f"Cut and tokenise {name} once, so that training only reads.",
             prepare.data, source=f"data/fridge/{name}.json", images="data/fridge/images", out=f"data/{name}")
    stage("brain", "A brain learns to talk about fridges that it is told of. It is blind.")
    stage("eye", "An eye learns to see what that brain can read: the brain stands still, only the eye and a projector train.")
    once("out/stitched", "Now the real road. Stitch the two as if we had found them, with a projector that knows nothing.",
         prepare.stitch, vision="out/eye", decoder="out/brain")
    questions = evaluate.read_questions("data/fridge/exam.jsonl")
    readings = [q for q in questions if q["kind"] == "reading"]
    before = exam("out/stitched", readings, "data/fridge/images")[-1][2]
    stage("pretrain", "Align: only the projector trains, until the brain can read the eye.", steps=200, batch=16, row=256, lr=2e-3, floor=1e-4)
    after = exam("out/pretrain", readings, "data/fridge/images")[-1][2]
    print(f"fridges read without a mistake: {before:.1%} before, {after:.1%} after")
    stage("sft", "Fine-tune: projector and brain learn to answer all kinds of questions.", steps=600, batch=16, row=512, lr=1e-3, floor=5e-5)

    print(f"\n== The exam: {len(readings)} fridges that it has never seen.", flush=True)
    marks, blank = (exam("out/sft", questions, "data/fridge/images", blank=grey) for grey in (False, True))
    for (kind, count, share), (_, _, guessed) in zip(marks, blank, strict=True):
        print(f"{kind:10} {count:5} questions   {share:6.1%} right   {guessed:6.1%} with a blank picture")
    scores = {"scenes": len(readings), "before pretrain": before, "after pretrain": after, "sft": marks, "blank": blank}
    Path("out/exam.json").write_text(json.dumps(scores))
    shutil.copy("data/fridge/fridge.jpg", "fridge.jpg")
    print(f"\nThe whole road took {time.time() - began:.0f} s. Now ask it: python sample.py --image fridge.jpg")


if __name__ == "__main__":
    cli.run(train)
