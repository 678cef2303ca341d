"""Grow eyes on a language model:

python train.py                                              the demonstration: everything from nothing, in minutes on two CPU cores
python train.py --stage=sft --data=data/mine --out=out/mine  fine-tune what `pretrain` left, on your own data
torchrun --nproc_per_node=8 train.py --stage=sft             the same on eight cards
"""

import itertools
import math
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovlm import IGNORE_INDEX, UserError, cli, files, kernels
from nanovlm import distributed as ranks
from nanovlm.checkpoints.checkpoint import (
    build_model,
    describe_checkpoint,
    finish_loading,
    list_checkpoints,
    load_checkpoint,
)
from nanovlm.data import dataset
from nanovlm.data.dataset import LENGTH, PreparedDataset
from nanovlm.data.packing import PackedDataLoader, parse_dataset_weights
from nanovlm.demo import run as demonstration
from nanovlm.evals import benchmarks, runner
from nanovlm.training import flops
from nanovlm.training import resume as saves
from nanovlm.training.logger import Log
from nanovlm.training.memory import estimate_memory, print_estimate, print_plan
from nanovlm.training.profiler import Clock
from nanovlm.training.recipes import DRY, FREE, PARTS, STAGES, resolve
from nanovlm.training.signals import Stopper
from nanovlm.training.validation import pack_validation_set, validate


def schedule(step, *, steps, warmup, floor):
    """The rate at a step as a share of the peak: up in a line for `warmup` steps, then half a cosine down to `floor` (Loshchilov & Hutter 2016)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer, step, run):
    """Every group at its rate for a step; returns the share of the peak that it is."""
    share = schedule(
        step,
        steps=run.steps,
        warmup=max(1, round(run.warmup * run.steps)),
        floor=run.floor / run.lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return share


def make_optimizer(model, rates, decay, betas):
    """AdamW over what trains: a group for each part and kind, decay on matrices only (vectors are norms and biases: 0 is no prior of theirs)."""
    groups = []
    for part, rate in rates.items():
        for matrices in (True, False):
            members = [p for p in getattr(model, part).parameters() if (p.dim() >= 2) == matrices]
            if members:
                groups.append(
                    {"params": members, "peak": rate, "weight_decay": decay if matrices else 0.0}
                )
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def to_go_on_from(run):
    """The checkpoint that a resumed run goes on from; None for a fresh run."""
    if run.resume:
        if not (found := list_checkpoints(run.out)):
            raise UserError(
                f"--resume=true, but {run.out} holds no checkpoint of a run to go on from"
            )
        return found[-1]
    if Path(run.model).resolve().is_relative_to(Path(run.out).resolve()):
        raise UserError(
            f"--model={run.model} lies in --out={run.out}: name another --out, or go on with --resume=true"
        )


def to_train(folder, run):
    """A checkpoint whose card says what it is to become, and whose frozen parts hold still. Its numbers stay in their file until it is known which
    rank needs which."""
    checkpoint = load_checkpoint(folder, dtype=None, late=True)
    checkpoint.history[run.stage] = f"{run.steps} steps from {run.model} on {run.data}"
    hold_still(checkpoint.model.train(), run.rates)
    kernels.choice = run.kernels
    return checkpoint


def hold_still(model, rates):
    """Only the parts that have a rate get gradients."""
    for part in PARTS:
        getattr(model, part).requires_grad_(part in rates)


def make_room(run):
    """Move an earlier run that a fresh one would write over aside; it is not lost."""
    out = Path(run.out)
    if run.resume or not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "log.jsonl").is_file():
        raise UserError(
            f"--out={out} is there already, and is no run that could be moved aside: name another"
        )
    number = next(n for n in itertools.count(1) if not Path(f"{out}.{n}").exists())
    with files.lock_path(out):
        os.rename(out, f"{out}.{number}")
    print(f"{out} holds an earlier run: moved to {out}.{number}")


def identity(run, samples):
    """What must stay the same for a run to go on to the same numbers; data by what it holds, since it may have moved."""
    content = f"{len(samples.table):,} samples of {samples.table[:, LENGTH].sum():,} tokens ({sha256(samples.table.tobytes()).hexdigest()[:8]})"
    blend = "" if run.weights is None else f" blended by {run.weights}"
    return {
        name: value for name, value in vars(run).items() if name not in (*FREE, "rates", "weights")
    } | {"data": content + blend}


def to_train_on(run, checkpoint, found):
    """The samples, prepared for this very model; what must stay the same for a run to go on; the step to begin with."""
    folders, run.weights = parse_dataset_weights(run.data)
    samples = PreparedDataset(*folders)
    samples.check_fingerprint(checkpoint.fingerprint())
    must_agree = identity(run, samples)
    return samples, must_agree, step_of(found, must_agree) if found else 0


def step_of(found, must_agree):
    """The step of a run's checkpoint; a setting that would change the run is refused."""
    was = files.read_json(found / "training.json", "step")
    wrong = [
        f"--{name} was {was.get(name)}, now {value}"
        for name, value in must_agree.items()
        if was.get(name) != value
    ]
    if wrong:
        raise UserError(f"{found} cannot go on as another run: {'; '.join(wrong)}")
    return was["step"]


def lay_out(run, model, row, device, rank, world):
    """Settle how the model lies over the ranks and print that, what trains, and the memory that a rank will take; returns the dtype of products.
    row: a batch of one."""
    narrow = run.dtype == "bfloat16" or (run.dtype == "auto" and device.type == "cuda")
    products = torch.bfloat16 if narrow else torch.float32
    how = dict(recompute=run.recompute, accumulates=run.micro * world < run.batch)
    sizes = estimate_memory(model, row, run.micro, device, products, **how)
    run.parallel, why = ranks.choose_parallelism(run.parallel, sum(sizes.values()), device)
    if run.parallel == "fsdp":
        sizes = estimate_memory(
            model,
            row,
            run.micro,
            device,
            products,
            how="fsdp",
            shards=run.shard or world,
            offload=run.offload,
            **how,
        )
    if run.compile:
        with ranks.raise_on_all_ranks():
            ranks.check_compiler(device)
    if rank == 0:
        print(f"parallel: {run.parallel}, {why}")
        print_plan(model, run.rates, sizes)
    return products


def read_exam(run):
    """The questions that are asked on the way; [] if there are none."""
    if not run.exam:
        cli.refuse_idle(
            train,
            vars(run),
            vars(run).keys() - {"exam_images", "exam_every", "benchmark"},
            "without --exam=FILE",
        )
        return []
    questions = benchmarks.load_questions(run.benchmark, run.exam, images=run.exam_images)
    if secret := [q["id"] for q in questions if not q["answers"]]:
        raise UserError(f"--exam={run.exam}: question {secret[0]} has no answer to be marked by")
    return questions


def look(run, done, checkpoint, samples, held_out, questions, mixed, rank, world):
    """What is seen of the model at a step, the same on all ranks: {"validation", "blank", "exam": the mean score}, {} where nobody looks."""
    last = done == run.steps
    seen = (
        validate(checkpoint, samples, held_out, rank, world, mixed)
        if last or done % run.validate_every == 0
        else {}
    )
    if questions and (last or done % run.exam_every == 0):
        marks = runner.evaluate(checkpoint, questions, rank, world, benchmark=run.benchmark, mixed=mixed)
        (seen["exam"],) = ranks.all_reduce_sum(
            [0.0 if marks is None else marks[-1].score], checkpoint.model.mean_C11.device
        )
    return seen


def spread(run, model, device, products):
    """The model over the ranks as it was settled: what is to be called in its place, and the context to call it in."""
    ranks.checkpoint_activations(ranks.transformer_blocks(model, run.recompute))
    ranks.compile_blocks(ranks.transformer_blocks(model) if run.compile else ())
    return ranks.wrap_model(model, run.parallel, device, products, run.shard, run.offload)


def foretell(run, typed):
    """Print what a run would take, by its model's shapes: no weight is read, and no data."""
    cli.refuse_idle(train, typed, DRY, "in a dry run")
    told = describe_checkpoint(run.model)
    with torch.device("meta"):
        model = build_model(told.shapes, told.image_config).train()
    hold_still(model, run.rates)
    print_estimate(
        run, model, told.image_config, speed=(run.peak or 989) * 1e12 * (run.mfu or 0.4)
    )  # 989: an H100 in bfloat16, by NVIDIA's data sheet


def train(
    *,
    stage: str = "",  # brain, eye, pretrain or sft; empty: the demonstration, all of them in a row
    recipe: str = "megatron",  # whose settings pretrain and sft have where none are given: megatron or llava (LLaVA-1.5)
    model: str | None = None,  # the checkpoint to start from; none: what the stage before left
    data: str | None = None,  # a set that `prepare.py data` wrote, or several: a,b, or a:0.7,b:0.3 by their shares of the samples
    out: str | None = None,  # the run's folder; none: out/STAGE
    resume: bool = False,  # go on from the newest checkpoint in --out
    steps: int | None = None,  # optimizer steps in all
    batch: int | None = None,  # rows of a step, over all ranks and micro-batches
    micro: int = 16,  # rows a rank holds at once
    row: int | None = None,  # tokens in a row; whole samples are packed into it
    freeze: str = "",  # parts that keep still, of vision,projector,decoder, or none; empty: the stage's
    lr: float | None = None,  # peak rate of every part that trains
    vision_lr: float | None = None,  # the eye's own
    projector_lr: float | None = None,  # the projector's own
    decoder_lr: float | None = None,  # the brain's own
    floor: float | None = None,  # where the rate ends, as a rate beside --lr
    warmup: float | None = None,  # share of the steps over which the rate rises
    decay: float | None = None,  # weight decay, on matrices only
    clip: float | None = None,  # the gradient's norm is cut down to this
    beta1: float = 0.9,  # Adam's memory of gradients
    beta2: float | None = None,  # Adam's memory of their squares
    seed: int = 0,  # of the order of the samples
    save_every: int = 500,  # steps between checkpoints
    keep: int = 1,  # how many of them stay; with 2 or more, the one that validates best stays as well
    validate_every: int = 100,  # steps between looks at the held-out samples
    log_every: int = 20,  # steps between progress lines
    exam: str = "",  # a small file of questions to be asked on the way, as `sample.py --questions` has them
    exam_images: str = "",  # the folder or zip that their pictures are named from; empty: the file's own
    exam_every: int = 500,  # steps between exams; the last step ends with one, too
    benchmark: str = "exact",  # how the exam is read and marked, as `sample.py --benchmark` has it
    device: str = "auto",  # auto, cpu, cuda, cuda:1 (or another card's number) or mps
    dtype: str = "auto",  # auto, float32 or bfloat16: of the products; auto is bfloat16 on CUDA. Parameters stay float32
    parallel: str = "auto",  # of several processes: ddp, each holds the model; fsdp, each holds a part; auto, ddp where that fits
    shard: int = 0,  # under fsdp, over how many ranks a copy of the model lies (HSDP, within a node); 0: over all
    offload: bool = False,  # under fsdp, what the optimizer works on stays in the host's memory: slower, and a card holds what it gathers
    recompute: str = "none",  # blocks that keep nothing for the backward pass and compute it again: none, decoder or all
    compile: bool = False,  # join what a block computes into fewer passes by torch.compile: a minute at the start, faster steps
    kernels: str = "auto",  # auto: our Triton kernels on CUDA cards that can run them; torch: the formulas in PyTorch
    profile: bool = False,  # tell the seconds of each phase of a step, and leave a trace of three steps in the run's folder
    tensorboard: bool = False,  # write the curves for tensorboard as well, if it is installed
    dry_run: bool = False,  # print what the run would take on 1, 8 and 64 cards, and leave it at that
    mfu: float | None = None,  # of a dry run: the share of a card's peak that is reached; none: 0.4
    peak: float | None = None,  # of a dry run: a card's TFLOP/s; none: an H100's 989
):
    """Train one stage, or (without --stage) walk the whole road once.

    Exit codes: 0 finished, 1 a mistake, 130 or 143 stopped by Ctrl-C or SIGTERM and saved.
    """
    typed = dict(locals())
    if not stage:
        refuse_settings(typed)
        return demonstration.run(train)
    if dry_run:
        return foretell(resolve(typed, 1), typed)
    device = ranks.pick_device(device)
    rank, world = ranks.init_distributed(device)
    with ranks.raise_on_all_ranks():
        # ---- what to train: the checkpoint, its frozen parts ----
        run = resolve(typed, world)
        found = to_go_on_from(run)
        checkpoint = to_train(found or run.model, run)
        vlm = checkpoint.model

        # ---- what to train on, and from which step ----
        samples, must_agree, start = to_train_on(run, checkpoint, found)
        if start == run.steps:
            return (
                print(f"{stage}: {run.out} has all of its {start} steps already")
                if rank == 0
                else None
            )
        how = dict(row=run.row, seed=run.seed, weights=run.weights)
        loader = PackedDataLoader(
            samples,
            batch=run.batch,
            micro=run.micro,
            rank=rank,
            world=world,
            start=start,
            pin=device.type == "cuda",
            **how,
        )
        held_out, questions = pack_validation_set(samples, run.row), read_exam(run)
        ((one_row, _),) = next(PackedDataLoader(samples, batch=1, micro=1, **how))
        if rank == 0:
            print(
                f"{stage}: {run.steps} steps of {run.batch} rows on {world} × {device}, from {found or run.model} on {run.data}"
            )

    # ---- on what: one process, or several that each hold the model, or a part of it ----
    products = lay_out(run, vlm, one_row, device, rank, world)
    with ranks.raise_on_all_ranks():
        if rank == 0:
            make_room(run)
    wrapped, mixed = spread(run, vlm, device, products)
    finish_loading(checkpoint)
    optimizer = make_optimizer(vlm, run.rates, run.decay, (run.beta1, run.beta2))
    if found:
        saves.restore(found, vlm, optimizer)
    saved = saves.Saves(checkpoint, optimizer, run.out, must_agree, run.keep)

    # ---- the loop ----
    done, stopping, log = start, False, Log(run.out, start, run.steps, rank, run.tensorboard)
    with (
        log,
        ThreadPoolExecutor(1) as reader,
        Stopper(rank) as stopper,
        Clock(run.profile, vlm, device, run.out, rank) as clock,
    ):
        coming = reader.submit(
            next, loader
        )  # the next step's batches are read while this one's are computed
        while done < run.steps and not stopping:
            batches = log.wait(coming)
            coming = reader.submit(next, loader)
            share = set_rates(optimizer, done, run)
            step = gradients(wrapped, batches, device, mixed, stopper, clock)
            norms = ranks.clip_grad_norm(vlm, run.rates, run.clip)
            done += 1
            check_finite(done, step, norms["norm"], batches, samples, run.out)
            optimizer.step()
            optimizer.zero_grad()
            clock.step("optimizer")

            last, stopping = done == run.steps, step.stopping
            saving = last or stopping or done % run.save_every == 0
            looks = look(run, done, checkpoint, samples, held_out, questions, mixed, rank, world)
            log.did(step, flops.of_batches(vlm, run.rates, batches))
            if looks or saving or done % run.log_every == 0:
                log.line(
                    done,
                    looks,
                    loss=step.loss,
                    rate=run.lr * share,
                    trained=step.trained / step.tokens,
                    **norms,
                    **clock.read(),
                )
            if saving:
                saved.write(done, last, looks)
            clock.mark("between steps")
    log.end(done, stage)
    if done < run.steps:
        stopper.leave(how_to_go_on(typed))


def gradients(wrapped, batches, device, mixed, stopper, clock):
    """One step's gradients: the loss summed over trained tokens, divided by their number over all ranks and micro-batches, never a mean of means.

    Returns loss, the step's a trained token; of all ranks its `trained` tokens, all its `tokens` and `samples`, and `stopping`, whether any was
    asked to stop before the end; and `sums`, the summed loss of each of this rank's micro-batches.
    """
    counts = [
        sum(int(tally) for tally in tallies)
        for tallies in zip(
            *(
                (
                    (batch["targets_BT"] != IGNORE_INDEX).sum(),
                    (batch["documents_BT"] >= 0).sum(),
                    len(members),
                )
                for batch, members in batches
            ),
            strict=True,
        )
    ]
    trained, tokens, samples, world = ranks.all_reduce_sum([*counts, 1], device)
    sums = []
    for number, (batch, _) in enumerate(batches, 1):
        with ranks.no_sync(wrapped, last=number == len(batches)):
            with mixed:
                loss = wrapped(
                    **{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                )
            clock.mark("decoder")
            (
                loss * (world / trained if trained else math.nan)
            ).backward()  # the wrapper takes the mean over ranks
            clock.mark("eye")
        sums.append(loss.detach())
    sums = torch.stack(sums).tolist()
    loss, asked = ranks.all_reduce_sum([sum(sums), stopper.asked > 0], device)
    return SimpleNamespace(
        loss=loss / trained if trained else math.nan,
        sums=sums,
        trained=trained,
        tokens=tokens,
        samples=samples,
        stopping=asked > 0,
    )


def check_finite(done, step, norm, batches, samples, out):
    """Raise UserError, before the weights change, unless loss and gradient are numbers; it names the samples of the micro-batches to blame, and
    leaves them in a set of their own."""
    if math.isfinite(step.loss) and math.isfinite(norm):
        return
    mine = [i for _, members in batches for i in members]
    blamed = [
        i
        for x, (_, members) in zip(step.sums, batches, strict=True)
        if not math.isfinite(x)
        for i in members
    ]
    everyone = ranks.all_gather_object((blamed, mine))
    members = [i for some, _ in everyone for i in some] or [i for _, some in everyone for i in some]
    kept = Path(out) / f"not-finite-{done:06d}"
    with ranks.raise_on_all_ranks():
        ranks.on_rank_0(dataset.write_subset, samples, members, kept)
        raise UserError(
            f"step {done}: loss {step.loss}, gradient norm {norm}; what is saved is untouched. Samples: "
            f"{', '.join(samples.names[i] for i in members[:50])}{f' and {len(members) - 50} more' if len(members) > 50 else ''}. "
            f"Look at one: python prepare.py show --data={kept} --sample={shlex.quote(samples.names[members[0]])}"
        )


def refuse_settings(typed):
    """The demonstration sets everything itself, and is one process."""
    if given := ", ".join(
        f"--{name}={cli.show(value)}" for name, value in cli.changed(train, typed).items()
    ):
        raise UserError(
            f"{given}: without a --stage ({', '.join(STAGES)}) the demonstration sets everything itself"
        )
    if "RANK" in os.environ:
        raise UserError(
            f"torchrun wants a --stage ({', '.join(STAGES)}): the demonstration is one process"
        )


def how_to_go_on(typed):
    """The command that continues this run; the demonstration finds its own way."""
    if len(sys.argv) == 1:
        return "python train.py"
    launch = (
        f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
        if "LOCAL_WORLD_SIZE" in os.environ
        else "python"
    )
    again = cli.changed(train, typed) | {"resume": True}
    return shlex.join(
        [
            *launch.split(),
            sys.argv[0],
            *(f"--{name}={cli.show(value)}" for name, value in again.items()),
        ]
    )


if __name__ == "__main__":
    cli.run(train)
