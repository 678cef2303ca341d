"""Several processes as one: launch, wrapping, and the two collectives the training loop needs. The model does not know that this file exists.

One process is the case of one rank: every function here then does nothing, so that train.py has no second path for it.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import Mistake


def pick_device(name):
    """"auto" takes CUDA, then Apple's MPS, then the CPU; a rank takes the card of its number on its machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Mistake(f"--device={name}, but PyTorch {torch.__version__} sees no CUDA card here")
    if name == "mps" and not torch.backends.mps.is_available():
        raise Mistake(f"--device={name}, but PyTorch {torch.__version__} sees no Apple GPU here")
    try:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    except RuntimeError:
        raise Mistake(f"--device={name} is no device that PyTorch knows: auto, cpu, cuda, cuda:1 or mps") from None


def start(device):
    """(rank, world): under torchrun its processes meet here (NCCL on cards, gloo on CPUs); without it, (0, 1)."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model):
    """A module whose gradients are averaged over ranks; calling it is calling the model."""
    if not dist.is_initialized():
        return model
    card = [torch.cuda.current_device()] if torch.cuda.is_available() and next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=card)


def no_sync(wrapped, last):
    """Gradients travel once a step, with the last micro-batch."""
    return contextlib.nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()


def total(numbers, device):
    """A list of numbers summed over all ranks, as floats (float64: exact up to 2^53 tokens; MPS knows float32 only)."""
    if not dist.is_initialized():
        return [float(x) for x in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def barrier():
    if dist.is_initialized():
        dist.barrier()
