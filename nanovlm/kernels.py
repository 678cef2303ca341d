"""Which form of a computation runs: its formula in PyTorch, or the same in Triton kernels.

Kernels run on a CUDA card of compute capability 8.0 (A100) or later; the formula everywhere else, and wherever a kernel does not take a shape.
A file with kernels holds both, and asks `run` which it is to be.
"""
import warnings

import torch


class Absent:
    """Stands for triton where there is none, so that a file with kernels can still be imported: what it is asked for, or called with, is itself."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


try:
    import triton
    import triton.language as tl
except ImportError:  # made for Linux only
    triton = tl = Absent()

choice = "auto"  # or torch: the formula everywhere; triton: kernels on the CPU too, in Triton's interpreter (TRITON_INTERPRET=1), for tests
OLDEST = (8, 0)  # the first card that multiplies matrices of bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
told = set()  # reasons why a card runs a formula, each warned of once


def capability(device):
    """(major, minor) of a CUDA device; (0, 0) of any other, so that a table by capability begins with it."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@torch.compiler.assume_constant_result  # torch.compile calls it while it traces, instead of breaking the graph at a warning
def tell(reason):
    if reason not in told:
        told.add(reason)
        warnings.warn(f"kernels: {reason}; the formula in PyTorch runs instead", stacklevel=3)
    return False


def run(tensor, refusal=None, *given):
    """Whether the kernels take this call on `tensor`.

    refusal(*given): why a kernel does not take this shape, in words that name it; empty if it does. Asked only where kernels could run. Where a
    card could run them and does not, it is said once for every reason.
    """
    if choice == "torch" or (choice == "auto" and tensor.device.type != "cuda"):
        return False
    if isinstance(triton, Absent):
        return tell("triton is not installed")
    if tensor.is_cuda and capability(tensor.device) < OLDEST:
        return tell(f"this card is of compute capability {'.'.join(map(str, capability(tensor.device)))}, older than {'.'.join(map(str, OLDEST))}")
    if tensor.dtype not in DTYPES:
        return tell(f"{tensor.dtype} is none of {', '.join(map(str, DTYPES))}")
    return tell(refused) if refusal and (refused := refusal(*given)) else True


def autocast_dtype(tensor):
    """What autocast would cast it to for a product; None where there is no autocast. Asked outside of operators: a compiled one no longer sees it."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def pick(table, device):
    """A kernel's numbers for this device, from {oldest compute capability that they are for: numbers}."""
    return table[max(oldest for oldest in table if oldest <= max(capability(device), min(table)))]


def multiprocessors(device):
    """How many programs a card runs at once, each on a multiprocessor of its own; the interpreter runs one, but two show what must be summed."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
