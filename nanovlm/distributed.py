"""Several processes as one: launch, wrapping, and the collectives the training loop needs. The model does not know that this file exists.

One process is the case of one rank: there is nobody to wait for, add up with or share a model with, so train.py needs no second path.
"""

import atexit
import contextlib
import functools
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from . import UserError

ROOM = 0.8  # of a device's memory may be spoken for by an estimate; the rest is for what fragments, and for libraries


def pick_device(name):
    """ "auto" takes CUDA, then Apple's MPS, then the CPU; under torchrun a rank takes the card of its number on its machine."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (
        number and not (kind == "cuda" and number.isdecimal())
    ):
        raise UserError(
            f"--device={name} is none of auto, cpu, cuda, cuda:1 (or another card's number) and mps"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}, but PyTorch {torch.__version__} sees no Apple GPU here")
    if kind != "cuda":
        return torch.device(kind)
    number, cards = int(number or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= cards:
        raise UserError(
            f"--device={name} wants CUDA card {number}, but PyTorch {torch.__version__} sees {cards} here"
        )
    return torch.device("cuda", number)


def make_current(device):
    """Streams, recordings and NCCL work on the current card, whichever holds the tensors. From here on a card's memory is touched."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def start(device):
    """(rank, world): under torchrun its processes meet here; without it, (0, 1). What lies on a CPU travels by gloo, also where cards are: so ranks
    can agree that settings are wrong before a card's memory is touched, and NCCL takes its share only when a first tensor on a card travels."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def leave():
    """Part from the other ranks. gloo's threads need the interpreter once more to let go of the last collective's tensors, and abort the process
    if it is gone by then (pytorch/pytorch#190489): sleeping lends it to them."""
    dist.destroy_process_group()
    time.sleep(0.1)


# ---- how a model lies over the ranks ----


def choose(asked, needed, device):
    """(how, why) for --parallel=auto, ddp or fsdp; needed: bytes that a rank takes where it holds everything, as estimate_memory tells."""
    if not dist.is_initialized():
        if asked != "auto":
            raise UserError(
                f"--parallel={asked} is for several processes: start them with torchrun"
            )
        return "none", "one process"
    if asked != "auto":
        return asked, "as asked"
    has, most = min(gather(memory_of(device))), max(gather(needed))
    sizes = f"a rank takes about {most / 2**30:.2f} GiB whole, and has {has / 2**30:.2f} GiB"
    return (
        ("ddp", sizes)
        if most <= ROOM * has
        else ("fsdp", f"{sizes}, of which {ROOM:.0%} may be spoken for")
    )


def memory_of(device):
    """Bytes that a rank may use: its card's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return (
        os.sysconf("SC_PAGE_SIZE")
        * os.sysconf("SC_PHYS_PAGES")
        // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


def blocks(model, which="all"):
    """The blocks that --recompute=none, decoder or all names."""
    return [
        *(model.vision.layers if which == "all" else ()),
        *(model.decoder.layers if which != "none" else ()),
    ]


def recompute(some):
    """Have blocks keep only what enters them, and compute the rest again when the backward pass comes by (Chen et al. 2016): about a third more
    work. There is no randomness in them to repeat."""
    for block in some:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_blocks(some):
    """Have torch.compile join what blocks compute into fewer passes over memory. Sizes are symbols from the start (dynamic): another number of
    tiles, rows or tokens is no reason to compile again."""
    for block in some:
        block.compile(dynamic=True)


def graphs():
    """How many pieces torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_compiler(device):
    """Raise UserError unless torch.compile works here: it wants a C++ compiler for a CPU, triton for a card."""
    try:
        torch.compile(lambda x: x + 1, dynamic=True)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"--compile=true: torch.compile does not work here: {str(error).splitlines()[0]}"
        ) from None


def units(model):
    """What FSDP gathers at once: a block, and from the start of a pass to its end what is left (embeddings, head, norms, projector)."""
    return [*blocks(model), model]


def wrap(model, how, device, dtype, shard=0, offload=False):
    """(wrapped, mixed): a module whose gradients are averaged over ranks, calling it being calling the model, and the context to call it in.

    how: none, ddp or fsdp. Parameters come from their file (mmap) or from nowhere (meta), and become float32 on `device`, where the optimizer
    works; products are of `dtype`. fsdp: a unit after another is cut over the ranks, so that no rank ever holds more than one whole; shard: over
    so many ranks, and held in as many copies as there are such groups (HSDP: within a node is fast), 0: over all; offload: parameters, gradients
    and the optimizer's work are the host's, and a card holds what it gathers.
    """
    make_current(device)
    if how != "fsdp":
        for p in model.parameters():
            settle(p, device)
        model.to(device)
        wrapped = (
            DistributedDataParallel(model, gradient_as_bucket_view=True) if how == "ddp" else model
        )
        return wrapped, torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    world, narrow = dist.get_world_size(), dtype if dtype != torch.float32 else None
    shape, names = (
        ((world // shard, shard), ("replicate", "shard")) if shard else ((world,), ("shard",))
    )
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # RoPE's angles stay float32
    rest = {"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")} if offload else {}
    for unit in units(model):
        for p in [p for p in unit.parameters() if not isinstance(p, DTensor)]:
            settle(p, device)
        fully_shard(unit, mesh=mesh, mp_policy=policy, **rest)
    return model, contextlib.nullcontext()


def settle(p, device):
    """Give a parameter float32 memory of its own on a device, so that nobody writes into its file. From the meta device it comes as NaN: what is
    never loaded then cannot be taken for a weight (weights.finish_loading)."""
    fresh = torch.full(p.shape, torch.nan, dtype=torch.float32, device=device)
    if not p.is_meta:
        fresh.copy_(p.detach())
    torch.utils.swap_tensors(p, torch.nn.Parameter(fresh, p.requires_grad))


def no_sync(wrapped, last):
    """Gradients travel once a step, with the last micro-batch."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    return (
        wrapped.no_sync()
        if isinstance(wrapped, DistributedDataParallel) and not last
        else contextlib.nullcontext()
    )


def clip(model, parts, most):
    """Cut the gradient of the parts that train down to the norm `most`; returns {"norm": its own before that, "norm of vision": …, each part's},
    over all ranks and what each of them holds."""
    found = {
        part: [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
        for part in parts
    }
    each = {
        f"norm of {part}": whole(torch.nn.utils.get_total_norm(gradients)).item()
        for part, gradients in found.items()
    }
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], most)
    return {"norm": whole(norm).item(), **each}


def is_sharded(model):
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def gathered(model):
    """Hold what a sharded model gathers at the start of a pass, to use it by other ways than a call: all ranks must do the same within. Blocks
    that are compiled for training run as they are written: of a cache that grows, each length would be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        if is_sharded(model):
            model.unshard()
        yield
        if is_sharded(model):
            model.reshard()


def whole(tensor):
    """A tensor of which each rank may hold a part, on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor):
    """The part of it that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor):
    """(the rows of a tensor that this rank holds, the number of the first of them, whether this rank is the first that holds them)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, rank() == 0
    mesh, (*copies, shard) = tensor.device_mesh, tensor.placements
    if shard != Shard(0) or not all(placement.is_replicate() for placement in copies):
        raise ValueError(f"only rows are sharded here, not {tensor.placements}")
    *group, place = mesh.get_coordinate()
    first = min(place * -(-len(tensor) // mesh.size(mesh.ndim - 1)), len(tensor))
    return tensor.to_local(), first, not any(group)


def on_first(tensors):
    """{name: tensor} whole in the memory of rank 0, gathered one after another; None on the others."""
    found = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if rank() == 0:
            found[name] = tensor.cpu()
    return found if rank() == 0 else None


@torch.no_grad()
def fill(tensor, source):
    """Copy a whole tensor, which every rank has at hand, into one of which each rank may hold a part."""
    if isinstance(tensor, DTensor):
        cut = distribute_tensor(
            source.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        tensor, source = mine(tensor), mine(cut)
    tensor.copy_(source)


# ---- collectives ----


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


def first(do, *arguments):
    """What rank 0 alone does, the others waiting; a full disk, or another OSError, is raised on all of them."""
    trouble = None
    if rank() == 0:
        try:
            do(*arguments)
        except OSError as error:
            trouble = error
    if trouble := gather(trouble)[0]:
        raise trouble


@contextlib.contextmanager
def together():
    """What fails here on one rank fails on all: the first that failed says why, the others leave without a word, and nobody waits for the gone."""
    trouble = None
    try:
        yield
    except (
        Exception
    ) as error:  # of whatever kind: it is raised again as soon as all ranks know of it
        trouble = error
    failed = gather(trouble is not None)
    if trouble and not any(failed[: rank()]):
        raise trouble
    if any(failed):
        sys.exit(1)
