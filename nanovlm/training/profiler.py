"""The time of each phase of a training step, and a trace (--profile)."""

import time
from pathlib import Path

import torch


class StepTimer:
    """With --profile: the seconds of each phase of a step, and a trace of three steps.

    data             waiting for the next batch, and copying it to the device
    vision           vision encoder and projector, forward and backward; under DDP also the wait
                     for the last gradients
    decoder          from embeddings to loss, forward and backward
    optimizer        gradient norm, clipping, AdamW
    between_steps    validation, evaluation, log, checkpoints

    The GPU is synchronized at the end of each phase. Communication overlaps with the
    phases; the trace shows its seconds.
    """

    PHASES = ("data", "vision", "decoder", "optimizer", "between_steps")
    SKIPPED_STEPS, TRACED_STEPS = 2, 3

    def __init__(self, profile, model, device, out, rank):
        self.profile, self.device = profile, device
        self.seconds, self.steps, self.is_first_step = {}, 0, True
        self.phase_start = time.perf_counter()
        if not profile:
            return
        self.out, self.rank = Path(out), rank
        model.vision.register_forward_pre_hook(lambda *_: self.end_phase("data"))
        model.projector.register_forward_hook(lambda *_: self.end_phase("vision"))
        model.decoder.register_forward_pre_hook(self.hook_input_gradient)
        schedule = torch.profiler.schedule(
            wait=self.SKIPPED_STEPS, warmup=1, active=self.TRACED_STEPS, repeat=1
        )
        self.profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self.write_trace)
        self.profiler.start()

    def hook_input_gradient(self, decoder, arguments):
        """The decoder's backward pass ends when the gradient of its input is ready."""
        if arguments[0].requires_grad:
            arguments[0].register_hook(lambda gradient: self.end_phase("decoder"))

    def end_phase(self, phase):
        """Count the time since the last phase ended for this phase."""
        if not self.profile:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.phase_start
        self.phase_start = now

    def end_step(self, phase):
        """End the last phase of a step.

        The first step is not counted: it allocates memory and opens connections. The time that the
        profiler takes between two steps is not counted, either.
        """
        self.end_phase(phase)
        self.steps += 1
        if self.is_first_step:
            self.seconds, self.steps, self.is_first_step = {}, 0, False
        if self.profile:
            self.profiler.step()
            self.phase_start = time.perf_counter()

    def pop_seconds(self):
        """{"seconds_vision": …}: the seconds of a step on this rank since the last call."""
        means = {}
        for phase in self.PHASES:
            if phase in self.seconds:
                means[f"seconds_{phase}"] = self.seconds[phase] / max(1, self.steps)
        self.seconds, self.steps = {}, 0
        return means

    def write_trace(self, profile):
        """Write trace.json.gz, and print the seconds of communication in a step."""
        if self.rank:
            return
        path = self.out / "trace.json.gz"
        profile.export_chrome_trace(str(path))
        microseconds = 0
        for event in profile.key_averages():
            if event.key.startswith("gloo:"):
                microseconds += event.cpu_time_total
            elif event.key.startswith("ncclDevKernel"):
                microseconds += event.device_time_total
        print(
            f"{path}: {self.TRACED_STEPS} steps, for chrome://tracing or ui.perfetto.dev; "
            f"communication takes {microseconds / 1e6 / self.TRACED_STEPS:.3f} s of each step",
            flush=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.profile:
            self.profiler.stop()
