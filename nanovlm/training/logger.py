"""What a run prints and writes while it trains: lines on the terminal, in log.jsonl and, if asked, for tensorboard."""

import contextlib
import datetime
import json
import time
from pathlib import Path

from .. import distributed
from ..files import claim, read_log, write_text


class Log:
    """Progress lines on the terminal, in out/log.jsonl and, if asked, for tensorboard. They go on where a resumed run does; rank 0 alone writes.
    As long as a log is open, no other process runs in its folder."""

    def __init__(self, out, start, steps, rank, tensorboard=False):
        self.path, self.start, self.steps, self.rank, self.tensorboard = (
            Path(out) / "log.jsonl",
            start,
            steps,
            rank,
            tensorboard,
        )
        self.waited, self.tokens, self.operations, self.began = 0.0, 0, 0, time.time()
        self.told, self.totals, self.best, self.board = (
            self.began,
            {"samples": 0, "tokens": 0, "hours": 0.0},
            None,
            None,
        )
        self.claim = contextlib.ExitStack()

    @distributed.raise_on_all_ranks()
    def __enter__(self):
        if self.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.claim.enter_context(claim(self.path.parent))
            self.go_on()
        return self

    def __exit__(self, *_):
        self.claim.close()

    def go_on(self):
        if self.tensorboard:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # a second of imports, and a package that not everybody has

            self.board = SummaryWriter(self.path.parent, purge_step=self.start + 1)
        before = [
            line
            for line in (read_log(self.path) if self.path.exists() else [])
            if line["step"] <= self.start
        ]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in before))
        for line in before:
            self.totals |= {name: line[name] for name in self.totals if name in line}
            self.note_best(line)

    def wait(self, future):
        asked = time.time()
        result = future.result()
        self.waited += time.time() - asked
        return result

    def did(self, step, operations):
        """Count a step over all ranks, as train.gradients tells of it, and this rank's operations in it."""
        self.tokens, self.operations = self.tokens + step.tokens, self.operations + operations
        self.totals["samples"] += int(step.samples)
        self.totals["tokens"] += int(step.tokens)

    def note_best(self, line):
        if "validation" in line and (
            self.best is None or line["validation"] < self.best["validation"]
        ):
            self.best = {"validation": line["validation"], "step": line["step"]}

    @distributed.raise_on_all_ranks()  # rank 0 alone writes; where it cannot (a full disk), the others must hear of it
    def line(self, step, looks, **numbers):
        """One line of numbers; looks: what `validate` returned at this step, {} if it did not look."""
        now = time.time()
        took, left = now - self.told, (now - self.began) / (step - self.start) * (self.steps - step)
        self.totals["hours"] += took / 3600
        speed = {
            "tokens_per_s": self.tokens / took,
            "tflops": self.operations / took / 1e12,
        }  # the second of a card, to be held beside its peak
        numbers = {
            "step": step,
            **numbers,
            **looks,
            **speed,
            "waited": self.waited / took,
            "left": left,
            **self.totals,
        }
        self.told, self.waited, self.tokens, self.operations = now, 0.0, 0, 0
        self.note_best(numbers)
        if self.rank:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")
        for name in numbers if self.board else ():
            self.board.add_scalar(name, numbers[name], step)
        seen = "".join(f" | {name} {value:.4f}" for name, value in looks.items())
        print(
            f"step {step:5d}/{self.steps} | loss {numbers['loss']:.4f}{seen} | rate {numbers['rate']:.1e} | norm {numbers['norm']:.2f} | "
            f"{numbers['tokens_per_s']:,.0f} tokens/s, {numbers['tflops']:,.2f} TFLOP/s, {numbers['trained']:.0%} trained, "
            f"{numbers['waited']:.0%} waiting | {datetime.timedelta(seconds=round(left))} left",
            flush=True,
        )
        if seconds := {
            name.removeprefix("seconds of "): value
            for name, value in numbers.items()
            if name.startswith("seconds of ")
        }:
            print(
                f"    seconds a step: {', '.join(f'{phase} {value:.3f}' for phase, value in seconds.items())}",
                flush=True,
            )

    def end(self, step, name):
        """What a run came to, over all its stops and starts."""
        if self.board:
            self.board.close()
        if self.rank:
            return
        spent = datetime.timedelta(seconds=round(time.time() - self.began))
        compiled = (
            f", torch.compile made {graphs} graphs" if (graphs := distributed.count_compiled_graphs()) else ""
        )
        best = f"{self.best['validation']:.4f} at step {self.best['step']}" if self.best else "none"
        print(
            f"{name}: step {step} of {self.steps} after {spent}, in {self.path.parent}\n{self.totals['samples']:,} samples, "
            f"{self.totals['tokens']:,} tokens, {self.totals['hours']:.2f} hours, best validation {best}{compiled}",
            flush=True,
        )
