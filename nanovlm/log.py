"""What a run tells while it goes: lines on the terminal and in log.jsonl, where its seconds went, what it came to; and how it is asked to stop."""
import contextlib
import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from . import parallel
from .disk import claim, read_log, write_text


class Log:
    """Progress lines on the terminal, in out/log.jsonl and, if asked, for tensorboard. They go on where a resumed run does; rank 0 alone writes.
    As long as a log is open, no other process runs in its folder."""

    def __init__(self, out, start, steps, rank, tensorboard=False):
        self.path, self.start, self.steps, self.rank, self.tensorboard = Path(out) / "log.jsonl", start, steps, rank, tensorboard
        self.waited, self.tokens, self.operations, self.began = 0.0, 0, 0, time.time()
        self.told, self.totals, self.best, self.board = self.began, {"samples": 0, "tokens": 0, "hours": 0.0}, None, None
        self.claim = contextlib.ExitStack()

    @parallel.together()
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
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, and a package that not everybody has
            self.board = SummaryWriter(self.path.parent, purge_step=self.start + 1)
        before = [line for line in (read_log(self.path) if self.path.exists() else []) if line["step"] <= self.start]
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
        if "validation" in line and (self.best is None or line["validation"] < self.best["validation"]):
            self.best = {"validation": line["validation"], "step": line["step"]}

    @parallel.together()  # rank 0 alone writes; where it cannot (a full disk), the others must hear of it
    def line(self, step, looks, **numbers):
        """One line of numbers; looks: what `watch.look` returned at this step, {} if it did not look."""
        now = time.time()
        took, left = now - self.told, (now - self.began) / (step - self.start) * (self.steps - step)
        self.totals["hours"] += took / 3600
        speed = {"tokens_per_s": self.tokens / took, "tflops": self.operations / took / 1e12}  # the second of a card, to be held beside its peak
        numbers = {"step": step, **numbers, **looks, **speed, "waited": self.waited / took, "left": left, **self.totals}
        self.told, self.waited, self.tokens, self.operations = now, 0.0, 0, 0
        self.note_best(numbers)
        if self.rank:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")
        for name in numbers if self.board else ():
            self.board.add_scalar(name, numbers[name], step)
        seen = "".join(f" | {name} {value:.4f}" for name, value in looks.items())
        print(f"step {step:5d}/{self.steps} | loss {numbers['loss']:.4f}{seen} | rate {numbers['rate']:.1e} | norm {numbers['norm']:.2f} | "
              f"{numbers['tokens_per_s']:,.0f} tokens/s, {numbers['tflops']:,.2f} TFLOP/s, {numbers['trained']:.0%} trained, "
              f"{numbers['waited']:.0%} waiting | {datetime.timedelta(seconds=round(left))} left", flush=True)
        if seconds := {name.removeprefix("seconds of "): value for name, value in numbers.items() if name.startswith("seconds of ")}:
            print(f"    seconds a step: {', '.join(f'{phase} {value:.3f}' for phase, value in seconds.items())}", flush=True)

    def end(self, step, name):
        """What a run came to, over all its stops and starts."""
        if self.board:
            self.board.close()
        if self.rank:
            return
        spent = datetime.timedelta(seconds=round(time.time() - self.began))
        compiled = f", torch.compile made {graphs} graphs" if (graphs := parallel.graphs()) else ""
        best = f"{self.best['validation']:.4f} at step {self.best['step']}" if self.best else "none"
        print(f"{name}: step {step} of {self.steps} after {spent}, in {self.path.parent}\n{self.totals['samples']:,} samples, "
              f"{self.totals['tokens']:,} tokens, {self.totals['hours']:.2f} hours, best validation {best}{compiled}", flush=True)


class Clock:
    """Where the seconds of a step go, and a trace of a few steps, if asked (--profile); a card's work is waited for at each mark.

    data             waiting for the next batch, and bringing it to the device
    eye              vision and projector, forward and backward; under DDP also what is left to wait for gradients
    decoder          from embeddings to loss, forward and backward
    optimizer        norms, clipping, AdamW
    between steps    validation, exam, log, checkpoints

    Communication runs beside the others' work: the trace tells how many seconds of a step it was under way, and they are none of these.
    """

    PHASES = ("data", "eye", "decoder", "optimizer", "between steps")
    WAIT, TRACED = 2, 3  # steps

    def __init__(self, on, model, device, out, rank):
        self.on, self.device, self.seconds, self.steps, self.first, self.last = on, device, {}, 0, True, time.perf_counter()
        if not on:
            return
        self.out, self.rank = Path(out), rank
        model.vision.register_forward_pre_hook(lambda *_: self.mark("data"))
        model.projector.register_forward_hook(lambda *_: self.mark("eye"))
        model.decoder.register_forward_pre_hook(self.await_gradient)
        plan = torch.profiler.schedule(wait=self.WAIT, warmup=1, active=self.TRACED, repeat=1)
        self.profiler = torch.profiler.profile(schedule=plan, on_trace_ready=self.write)
        self.profiler.start()

    def await_gradient(self, decoder, arguments):
        """The decoder's part of the backward pass ends where the gradient of what it read is there."""
        if arguments[0].requires_grad:
            arguments[0].register_hook(lambda gradient: self.mark("decoder"))

    def mark(self, phase):
        """What was done since the last mark belongs to a phase."""
        if not self.on:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.last = self.seconds.get(phase, 0.0) + now - self.last, now

    def step(self, phase):
        """A step ends with this phase. The first one allocates and connects, and is not told of; nor is what tracing takes between two steps."""
        self.mark(phase)
        self.steps += 1
        if self.first:
            self.seconds, self.steps, self.first = {}, 0, False
        if self.on:
            self.profiler.step()
            self.last = time.perf_counter()

    def read(self):
        """{"seconds of eye": …}, a step's, on this rank since it was last asked."""
        found = {f"seconds of {phase}": self.seconds[phase] / max(1, self.steps) for phase in self.PHASES if phase in self.seconds}
        self.seconds, self.steps = {}, 0
        return found

    def write(self, profile):
        if self.rank:
            return
        path = self.out / "trace.json.gz"
        profile.export_chrome_trace(str(path))
        travels = [event for event in profile.key_averages() if event.key.startswith(("gloo:", "ncclDevKernel"))]
        spent = sum(event.cpu_time_total if event.key.startswith("gloo:") else event.device_time_total for event in travels) / 1e6 / self.TRACED
        print(f"{path}: {self.TRACED} steps, for chrome://tracing or ui.perfetto.dev; communication was under way {spent:.3f} s of each", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.on:
            self.profiler.stop()


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
            hurry = ", if torchrun waits for it: its --shutdown-timeout, or 30 s" if "TORCHELASTIC_RUN_ID" in os.environ else ""
            print(f"\nfinishing this step, then saving{hurry}", file=sys.stderr, flush=True)

    def leave(self, command):
        """End the program as a signal would, once everything is saved: 130 for Ctrl-C, 143 for SIGTERM (another rank's, if not ours)."""
        if self.rank == 0:
            print(f"stopped and saved; to go on:\n{command}", file=sys.stderr, flush=True)
        sys.exit(128 + (self.asked or signal.SIGTERM))

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
