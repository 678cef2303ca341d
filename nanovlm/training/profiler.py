"""Where the seconds of a training step go (--profile)."""

import time
from pathlib import Path

import torch


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
        self.on, self.device, self.seconds, self.steps, self.first, self.last = (
            on,
            device,
            {},
            0,
            True,
            time.perf_counter(),
        )
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
        found = {
            f"seconds of {phase}": self.seconds[phase] / max(1, self.steps)
            for phase in self.PHASES
            if phase in self.seconds
        }
        self.seconds, self.steps = {}, 0
        return found

    def write(self, profile):
        if self.rank:
            return
        path = self.out / "trace.json.gz"
        profile.export_chrome_trace(str(path))
        travels = [
            event
            for event in profile.key_averages()
            if event.key.startswith(("gloo:", "ncclDevKernel"))
        ]
        spent = (
            sum(
                event.cpu_time_total if event.key.startswith("gloo:") else event.device_time_total
                for event in travels
            )
            / 1e6
            / self.TRACED
        )
        print(
            f"{path}: {self.TRACED} steps, for chrome://tracing or ui.perfetto.dev; communication was under way {spent:.3f} s of each",
            flush=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.on:
            self.profiler.stop()
