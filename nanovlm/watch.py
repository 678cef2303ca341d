"""What a run shows of itself: the plan before it starts, looks at held-out samples on the way, progress lines, and how it is asked to stop."""
import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from . import IMAGE, UNTRAINED, Mistake, parallel
from .data import LENGTH
from .loss import CHUNK
from .packing import collate, join, pack


def kept_for_backward(model, batch, mixed):
    """Bytes that the forward pass of a batch keeps for the backward pass, the parameters themselves aside."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mixed:
        loss = model(**batch)  # held until we have counted: what is freed could be counted twice
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in own)


def memory(model, row, micro, mixed):
    """{what: bytes} at the height of a training step over `micro` rows like `row`, a batch of one.

    One row and the same row twice are measured, for a part of what is kept (bfloat16 copies of the weights) does not grow with the rows.
    """
    one, two = (kept_for_backward(model, {name: torch.cat([x] * n) for name, x in row.items()}, mixed) for n in (1, 2))
    size = {on: sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad is on) for on in (True, False)}
    words = min(CHUNK, micro * int((row["targets_BT"] != UNTRAINED).sum()))
    logits = 2 * words * model.decoder.head.weight.shape[0] * 4  # they and their gradient, float32
    return {"weights": size[True] + size[False], "gradients": size[True], "optimizer": 2 * size[True],
            "activations": one + (micro - 1) * (two - one), "logits": logits}


def print_plan(model, rates, one_row, micro, mixed):
    """What trains at which rate (a frozen part has none), and how much memory a step of `micro` rows will take; one_row: a Loader of single rows."""
    print(f"{'part':10} {'parameters':>13} {'trained':>13} {'rate':>9}")
    for part, module in model.named_children():
        count = sum(p.numel() for p in module.parameters())
        print(f"{part:10} {count:13,} {count if part in rates else 0:13,} {f'{rates[part]:.1e}' if part in rates else 'frozen':>9}", flush=True)
    row, device = next(one_row)[0][0], model.decoder.embed.weight.device
    sizes = memory(model, {name: x.to(device) for name, x in row.items()}, micro, mixed)
    sizes["in all"] = sum(sizes.values())
    print("memory, about: " + ", ".join(f"{what} {size / 2**20:,.0f} MiB" for what, size in sizes.items()), flush=True)


def held_out_rows(samples, row, limit=64):
    """The first held-out samples, packed into rows of sample numbers."""
    members = samples.split(validation=True)[:limit]
    return [members[positions] for positions in pack(samples.table[members, LENGTH], row)]


def look(checkpoint, samples, rows, rank, world, mixed):
    """`validate` over all ranks' rows, and on the first of them two answers to read."""
    looks = validate(checkpoint.model.eval(), samples, rows[rank::world], mixed)
    if rank == 0:
        show_answers(checkpoint, samples, rows, mixed)
    checkpoint.model.train()
    return looks


@torch.no_grad()
def validate(model, samples, rows, mixed):
    """{"validation": loss a trained token, "blank": the same with every picture grey} over this and the other ranks' rows; {} if there are none.

    The second tells whether the model looks at all.
    """
    sums, device = [0.0, 0.0, 0], model.decoder.embed.weight.device
    for members in rows:
        batch = {name: x.to(device) for name, x in collate(samples, [members])[0].items()}
        grey = {**batch, "tiles_NCYX": torch.full_like(batch["tiles_NCYX"], 128)}
        with mixed:
            sums[0] += model(**batch).item()
            sums[1] += model(**grey).item()
        sums[2] += int((batch["targets_BT"] != UNTRAINED).sum())
    loss, blank, count = parallel.total(sums, device)
    return {"validation": loss / count, "blank": blank / count} if count else {}


def show_answers(checkpoint, samples, rows, mixed, count=2):
    """The first question of the first samples of `rows`, the model's answer and the right one."""
    for i in sorted(i for members in rows for i in members)[:count]:
        show_answer(checkpoint, samples, i, mixed)


def show_answer(checkpoint, samples, i, mixed):
    ids_T, targets_T, pictures = samples.read(i)
    trained_T = targets_T != UNTRAINED  # the token after each of these is the assistant's
    if not trained_T.any():
        return
    first = int(trained_T.argmax()) + 1
    last = first + int((~trained_T[first:]).argmax())
    stop, ends = int(ids_T[last]), np.cumsum([0, *(len(picture.places) for picture in pictures)])
    seen = int(np.searchsorted(ends, (ids_T[:first] == IMAGE).sum()))  # pictures before the answer
    with mixed:
        answer = checkpoint.model.generate([ids_T[:first].tolist()], **join(pictures[:seen], samples.policy), stop={stop}, max_tokens=64)
        said = [x for (x,) in answer if x != stop]
    decode = checkpoint.tokenizer.decode
    print(f"  {samples.names[i]}: it says {decode(said)!r}, right is {decode(ids_T[first:last].tolist())!r}", flush=True)


class Log:
    """Progress lines on the terminal and out/log.jsonl, which goes on where a resumed run does; rank 0 alone writes."""

    def __init__(self, out, start, steps, rank):
        self.path, self.start, self.steps, self.rank = Path(out) / "log.jsonl", start, steps, rank
        self.waited, self.tokens, self.began = 0.0, 0, time.time()
        self.told = self.began
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tmp = self.path.with_suffix(".tmp")
            tmp.write_text("".join(json.dumps(line) + "\n" for line in self.read() if line["step"] <= start))
            os.replace(tmp, self.path)

    def read(self):
        """The lines of an earlier part of the run; the last may have been torn by what killed it."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if number < len(lines):
                    raise Mistake(f"{self.path}, line {number}: not JSON") from None

    def wait(self, future):
        asked = time.time()
        result = future.result()
        self.waited += time.time() - asked
        return result

    def spent(self):
        return datetime.timedelta(seconds=round(time.time() - self.began))

    def line(self, step, looks, **numbers):
        """One line of numbers; looks: what `validate` returned at this step, {} if it did not look."""
        now = time.time()
        took, left = now - self.told, (now - self.began) / (step - self.start) * (self.steps - step)
        numbers = {"step": step, **numbers, **looks, "tokens_per_s": self.tokens / took, "waited": self.waited / took, "left": left}
        self.told, self.waited, self.tokens = now, 0.0, 0
        if self.rank:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")
        seen = "".join(f" | {name} {value:.4f}" for name, value in looks.items())
        print(f"step {step:5d}/{self.steps} | loss {numbers['loss']:.4f}{seen} | rate {numbers['rate']:.1e} | norm {numbers['norm']:.2f} | "
              f"{numbers['tokens_per_s']:,.0f} tokens/s, {numbers['trained']:.0%} trained, {numbers['waited']:.0%} waiting | "
              f"{datetime.timedelta(seconds=round(left))} left", flush=True)


class Stopper:
    """Ctrl-C and SIGTERM set `asked` to their number; the loop finishes its step and saves. A second Ctrl-C stops at once."""

    def __init__(self, rank):
        self.asked, self.rank = 0, rank

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        if self.rank == 0:
            print("\nfinishing this step, then saving", file=sys.stderr, flush=True)

    def leave(self, command):
        """End the program as a signal would, once everything is saved: 130 for Ctrl-C, 143 for SIGTERM (another rank's, if not ours)."""
        if self.rank == 0:
            print(f"stopped and saved; to go on:\n{command}", file=sys.stderr, flush=True)
        sys.exit(128 + (self.asked or signal.SIGTERM))

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
