"""Several processes as one: launch, wrapping, and the collectives the training loop needs. The model does not know that this file exists.

One process is the case of one rank: every function here then does nothing, so that train.py has no second path for it.
"""
import atexit
import contextlib
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import Mistake


def pick_device(name):
    """"auto" takes CUDA, then Apple's MPS, then the CPU; under torchrun a rank takes the card of its number on its machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdecimal())):
        raise Mistake(f"--device={name} is none of auto, cpu, cuda, cuda:1 (or another card's number) and mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise Mistake(f"--device={name}, but PyTorch {torch.__version__} sees no Apple GPU here")
    if kind != "cuda":
        return torch.device(kind)
    number, cards = int(number or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= cards:
        raise Mistake(f"--device={name} wants CUDA card {number}, but PyTorch {torch.__version__} sees {cards} here")
    return torch.device("cuda", number)


def start(device):
    """(rank, world): under torchrun its processes meet here (NCCL on cards, gloo on CPUs); without it, (0, 1)."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def leave():
    """Part from the other ranks. gloo's threads need the interpreter once more to let go of the last collective's tensors, and abort the process
    if it is gone by then (pytorch/pytorch#190489): sleeping lends it to them."""
    dist.destroy_process_group()
    time.sleep(0.1)


def wrap(model):
    """A module whose gradients are averaged over ranks; calling it is calling the model."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def no_sync(wrapped, last):
    """Gradients travel once a step, with the last micro-batch."""
    return contextlib.nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()


def total(numbers, device):
    """A list of numbers summed over all ranks, as floats (float64: exact up to 2^53 tokens)."""
    if not dist.is_initialized():
        return [float(x) for x in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(thing):
    """What each rank holds, as a list in their order; anything that pickle takes."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


@contextlib.contextmanager
def together():
    """What fails here on one rank fails on all: the first that failed says why, the others leave without a word, and nobody waits for the gone."""
    trouble = None
    try:
        yield
    except Exception as error:  # of whatever kind: it is raised again as soon as all ranks know of it
        trouble = error
    failed = gather(trouble is not None)
    if trouble and not any(failed[: dist.get_rank() if dist.is_initialized() else 0]):
        raise trouble
    if any(failed):
        sys.exit(1)
