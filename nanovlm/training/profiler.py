"""--profile: a trace of three training steps, and a table of the operations that take longest."""

import contextlib
from functools import partial
from pathlib import Path

import torch

from ..distributed import get_rank

SKIPPED_STEPS, TRACED_STEPS = 2, 3


def profile_steps(is_on, model, out):
    """Returns a context for the training loop: a torch.profiler.profile, or None unless it is on.

    Call step() on the profile after each step. In the trace, the forward passes of the vision
    encoder, the projector and the decoder have the names of these parts.
    """
    if not is_on:
        return contextlib.nullcontext()
    for name, part in model.named_children():
        part.forward = torch.profiler.record_function(name)(part.forward)
    schedule = torch.profiler.schedule(wait=SKIPPED_STEPS, warmup=1, active=TRACED_STEPS, repeat=1)
    return torch.profiler.profile(
        schedule=schedule, on_trace_ready=partial(write_trace, path=Path(out) / "trace.json.gz")
    )


def write_trace(profile, path):
    """Write the trace, and print the operations that take longest, with communication."""
    if get_rank() > 0:
        return
    profile.export_chrome_trace(str(path))
    time = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(profile.key_averages().table(sort_by=time, row_limit=20))
    print(f"{path}: {TRACED_STEPS} steps, for chrome://tracing or ui.perfetto.dev", flush=True)
