"""Distributed training: process group, DDP and FSDP2, and the collectives of the training loop.

The model does not know this file. Without torchrun there is one rank: the collectives return what
they are given and the model is not wrapped, so train.py needs no second path. In this order:

    devices and the process group
    transformer blocks: activation checkpointing, torch.compile
    DDP or FSDP2: the choice, wrapping a model, gradients
    tensors that may be sharded
    collectives
"""

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from . import UserError
from .kernels import dispatch

# ---- devices and the process group ----


def pick_device(name):
    """Returns the torch.device of --device. "auto" takes CUDA, then Apple's MPS, then the CPU.

    Under torchrun, "auto" and "cuda" take the GPU with the local rank's number. Raises UserError if
    there is no such device.
    """
    gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto" and not gpus:
        name = "mps" if has_mps else "cpu"
    if name == "cpu" or (name == "mps" and has_mps):
        return torch.device(name)
    if name == "mps":
        raise UserError(f"--device=mps, but PyTorch {torch.__version__} finds no Apple GPU here")
    kind, _, number = name.partition(":")
    number = number or os.environ.get("LOCAL_RANK", "0")
    if kind not in ("auto", "cuda") or not number.isdecimal():
        raise UserError(
            f"--device={name} is not one of auto, cpu, cuda, cuda:1 (or another GPU's number), mps"
        )
    if int(number) >= gpus:
        raise UserError(
            f"--device={name} needs GPU {number}, "
            f"but PyTorch {torch.__version__} finds {gpus} GPUs here"
        )
    return torch.device("cuda", int(number))


def activate_device(device):
    """Make a GPU the current one, for streams, CUDA graphs and NCCL, and import its kernels.

    No GPU memory is used before this call.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dispatch.enable(device)


def init_distributed(device):
    """Start the process group under torchrun. Returns (rank, world size).

    Without torchrun it starts nothing and returns (0, 1).

    CPU tensors use gloo, even if the model is on GPUs. So the ranks can agree that a setting is
    wrong before they use any GPU memory. NCCL starts with the first collective of a GPU tensor.
    Raises UserError if the ranks cannot connect.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # PR_SET_PDEATHSIG, 1: a worker gets SIGTERM if torchrun is killed and cannot send it.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except RuntimeError as error:
            raise UserError(
                f"the ranks cannot connect: {str(error).splitlines()[0]}; on several machines, set "
                "GLOO_SOCKET_IFNAME to the name of the network interface between them"
            ) from None
        atexit.register(destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def destroy_process_group():
    """Leave the process group.

    gloo's threads need the interpreter once more to free the last collective's tensors, and abort
    the process if it has ended by then (pytorch/pytorch#190489). The sleep gives them that time.
    """
    dist.destroy_process_group()
    time.sleep(0.1)


# ---- transformer blocks: activation checkpointing, torch.compile ----


def transformer_blocks(model, which="all"):
    """Returns the blocks of both parts (all), of the decoder, or none."""
    return [
        *(model.vision.layers if which == "all" else ()),
        *(model.decoder.layers if which != "none" else ()),
    ]


def checkpoint_activations(blocks):
    """Activation checkpointing (Chen et al. 2016): blocks keep only their inputs.

    The backward pass computes the rest again, which costs about a third more. Blocks have no
    dropout, so there is no random state to preserve.
    """
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_blocks(blocks):
    """Compile blocks with torch.compile.

    Shapes are dynamic from the start: another number of tiles, sequences or tokens does not
    compile again.
    """
    for block in blocks:
        block.compile(dynamic=True)


def check_compiler(device):
    """Raises UserError unless torch.compile works here.

    It needs a C++ compiler for a CPU, triton for a GPU.
    """
    try:
        torch.compile(lambda x: x + 1, dynamic=True)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"--compile=true: torch.compile does not work here: {str(error).splitlines()[0]}"
        ) from None


# ---- DDP or FSDP2 ----

# An estimate may use this share of a device's memory; the rest is for fragmentation and libraries.
MEMORY_SHARE = 0.8


def choose_parallelism(parallel, needed, device):
    """Returns (method, reason) for --parallel=auto, ddp or fsdp.

    needed: bytes of a rank that holds the whole model (estimate_memory). Raises UserError if a
    method needs several processes and there is one.
    """
    if not dist.is_initialized():
        if parallel != "auto":
            raise UserError(
                f"--parallel={parallel} is for several processes: start them with torchrun"
            )
        return "none", "one process"
    if parallel != "auto":
        return parallel, "as requested"
    available = min(all_gather_object(available_memory(device)))
    needed = max(all_gather_object(needed))
    sizes = (
        f"the whole model takes about {needed / 2**30:.2f} GiB on each rank, "
        f"which has {available / 2**30:.2f} GiB"
    )
    if needed <= MEMORY_SHARE * available:
        return "ddp", sizes
    return "fsdp", f"{sizes}; at most {MEMORY_SHARE:.0%} of it may be used"


def available_memory(device):
    """Returns the bytes that a rank may use: its GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fsdp_units(model):
    """Returns the modules that FSDP gathers one by one: each block, then the rest as one unit.

    The rest (embeddings, head, norms, projector) stays gathered for a whole pass.
    """
    return [*transformer_blocks(model), model]


def wrap_model(model, parallel, device, dtype, hsdp_shard_size=0, cpu_offload=False):
    """Put the model on a device under DDP, FSDP2 or neither. Returns (wrapped, autocast).

    Calling `wrapped` calls the model and averages gradients over the ranks; `autocast` is the
    context to call it in. parallel: none, ddp or fsdp. Parameters come from a file (mmap) or from
    the meta device, and get the dtypes of `resting_dtypes` on `device`; matrix products are in
    `dtype`.

    FSDP shards one unit after another, so that no rank ever holds more than one whole unit.
    hsdp_shard_size: ranks that share one copy of the model (HSDP); 0 means all ranks.
    cpu_offload: parameters, gradients and optimizer state stay in host memory.
    """
    activate_device(device)
    dtypes = resting_dtypes(model, dtype)  # a parameter leaves it, or FSDP could not free it
    if parallel != "fsdp":
        for p in model.parameters():
            materialize(p, device, dtypes.pop(p))
        wrapped = model.to(device)
        if parallel == "ddp":
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return wrapped, torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    world = dist.get_world_size()
    shape, names = (world,), ("shard",)
    if hsdp_shard_size:
        shape, names = (world // hsdp_shard_size, hsdp_shard_size), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    mixed_precision = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's angles stay float32
    )
    offload_policy = OffloadPolicy()
    if cpu_offload:
        offload_policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for unit in fsdp_units(model):
        for p in [p for p in unit.parameters() if not isinstance(p, DTensor)]:
            materialize(p, device, dtypes.pop(p))
        fully_shard(unit, mesh=mesh, mp_policy=mixed_precision, offload_policy=offload_policy)
    return model, contextlib.nullcontext()


def resting_dtypes(model, dtype):
    """Returns {parameter: the dtype in which it rests in memory} if products are in `dtype`.

    What trains is float32. A frozen weight of a linear layer keeps the dtype of its file if
    products are in bfloat16: the product is the same, as autocast would round the weight. If they
    are in float32, it becomes float32. Frozen embeddings, norms, biases and convolutions are
    float32, too: sums are in float32, and they are small.
    """
    dtypes = dict.fromkeys(model.parameters(), torch.float32)
    if dtype == torch.bfloat16:
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
                dtypes[layer.weight] = layer.weight.dtype
        dtypes[model.decoder.embed_tokens.weight] = torch.float32  # lm_head's, too, if it is tied
    return dtypes


def materialize(p, device, dtype):
    """Give a parameter its own memory on a device, so that nothing writes into its file.

    A parameter on the meta device becomes NaN: `load_deferred_weights` refuses a NaN that stays.
    """
    values = torch.full(p.shape, torch.nan, dtype=dtype, device=device)
    if not p.is_meta:
        values.copy_(p.detach())
    torch.utils.swap_tensors(p, torch.nn.Parameter(values, p.requires_grad))


def sync_gradients_if(is_last, wrapped):
    """Average gradients over the ranks only with the last micro-batch of a step."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(is_last)
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def clip_grad_norm(model, parts, max_norm):
    """Clip the norm of the gradient. Returns {"grad_norm": …, "grad_norm_PART": …} before that.

    parts: the names of the trained parts. The norms are over all ranks and their shards.
    """
    norms = {}
    for part in parts:
        gradients = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
        part_norm = torch.nn.utils.get_total_norm(gradients)
        norms[f"grad_norm_{part}"] = full_tensor(part_norm).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return {"grad_norm": full_tensor(norm).item(), **norms}


def is_sharded(model):
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def unsharded(model):
    """Gather the weights of a sharded model for other uses than a forward pass, such as generate.

    All ranks must make the same calls inside. Compiled blocks run eagerly inside: with a growing
    KV cache, each length would be compiled anew.
    """
    with torch.compiler.set_stance("force_eager"):
        if is_sharded(model):
            model.unshard()
        yield
        if is_sharded(model):
            model.reshard()


# ---- tensors that may be sharded ----


def full_tensor(tensor):
    """Returns the full tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor):
    """Returns this rank's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor):
    """Returns (rows that this rank holds, index of the first of them, is_first).

    is_first: this is the first rank that holds these rows (other replicas hold them, too).
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0, get_rank() == 0
    mesh = tensor.device_mesh
    *replica, index = mesh.get_coordinate()
    start = min(index * -(-len(tensor) // mesh.size(mesh.ndim - 1)), len(tensor))
    return tensor.to_local(), start, not any(replica)


def gather_to_rank_0(tensors):
    """Returns {name: full tensor} on rank 0's CPU, gathered one by one; {} on the other ranks."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor.detach())
        if get_rank() == 0:
            gathered[name] = tensor.cpu()
    return gathered


@torch.no_grad()
def copy_into(tensor, source):
    """Copy a full tensor, which every rank has, into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        sharded = distribute_tensor(
            source.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        tensor, source = local_tensor(tensor), local_tensor(sharded)
    tensor.copy_(source)


# ---- collectives ----


def all_reduce_sum(numbers, device):
    """Returns the sum of each number over all ranks, as floats (float64: exact up to 2^53)."""
    if not dist.is_initialized():
        return [float(x) for x in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def all_gather_object(value):
    """Returns the values of all ranks in their order; a value is anything that pickle accepts."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function, *arguments):
    """Call a function on rank 0 while the others wait; its OSError is raised on all ranks."""
    error = None
    if get_rank() == 0:
        try:
            function(*arguments)
        except OSError as caught:
            error = caught
    if error := all_gather_object(error)[0]:
        raise error


@contextlib.contextmanager
def raise_on_all_ranks():
    """An exception on one rank ends all ranks, so that none waits for a rank that has ended.

    The first rank that failed raises its exception; the others exit without a message.
    """
    error = None
    try:
        yield
    except Exception as caught:  # of any kind: it is raised again once all ranks know of it
        error = caught
    failed = all_gather_object(error is not None)
    if error and not any(failed[: get_rank()]):
        raise error
    if any(failed):
        sys.exit(1)
