"""Which form of a computation runs: its formula in PyTorch, or a Triton kernel.

Kernels run on CUDA GPUs of compute capability 8.0 (A100) or later. The formula runs everywhere
else, and wherever a kernel does not support a shape or dtype. A function of models/ asks `kernel`:

    if kernel := dispatch.kernel("rmsnorm", x):
        return kernel(x, None, weight, eps)[1]

This file does not import triton; `enable` imports the kernels before a model is called on a GPU.
"""

import importlib.util
import math
import warnings

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it is made for Linux only
LIBRARY = torch.library.Library("nanovlm", "FRAGMENT")
KERNELS = {}  # name: (function, unsupported); a kernel's module adds itself when it is imported
MIN_CAPABILITY = (8, 0)  # the first with matrix products in bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
choice = "auto"  # --kernels. torch: formulas only; triton: kernels on the CPU as well, for tests
imported = False  # whether `import_kernels` has run
warned = set()  # reasons why a GPU runs a formula


def register(name, unsupported=lambda *tensors: ""):
    """Decorates the function that `kernel(name, …)` returns. unsupported(*tensors): why the kernel
    does not support these, in words that name it; empty if it does."""

    def add(function):
        KERNELS[name] = function, unsupported
        return function

    return add


def enable(device):
    """Imports the kernels if they are to run on this device, so that no call has to."""
    if choice == "triton" or (choice == "auto" and device.type == "cuda"):
        import_kernels()


def import_kernels():
    """Returns whether triton is installed; if so, every kernel is in KERNELS afterwards.

    With TRITON_INTERPRET=1 in the environment, kernels run on the CPU in Triton's interpreter.
    """
    global imported
    if HAS_TRITON and not imported:
        from . import attention, cross_entropy, rmsnorm  # noqa: F401

        imported = True
    return HAS_TRITON


def warn_once(reason):
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"kernels: {reason}; the formula in PyTorch runs instead", stacklevel=3)


# torch.compile calls these while tracing, instead of breaking the graph. The attribute is what
# torch.compiler.assume_constant_result sets; that also imports torch._dynamo, and thereby triton.
import_kernels._dynamo_marked_constant = warn_once._dynamo_marked_constant = True


def kernel(name, tensor, *tensors):
    """Returns the function that computes `name` on these tensors with kernels, or None if the
    formula is to run. Warns once for each reason why a GPU runs a formula."""
    if choice == "torch" or (choice == "auto" and tensor.device.type != "cuda"):
        return None
    if not import_kernels():
        return warn_once("triton is not installed")
    if tensor.is_cuda and capability(tensor.device) < MIN_CAPABILITY:
        own, oldest = (".".join(map(str, c)) for c in (capability(tensor.device), MIN_CAPABILITY))
        return warn_once(f"this GPU is of compute capability {own}, older than {oldest}")
    if tensor.dtype not in DTYPES:
        return warn_once(f"{tensor.dtype} is not one of {', '.join(map(str, DTYPES))}")
    function, unsupported = KERNELS[name]
    reason = unsupported(tensor, *tensors)
    return warn_once(reason) if reason else function


# ---- Operators of PyTorch ----
# torch.library.custom_op does the same, with more Python around each call: 74 µs instead of 34 with
# gradients, on the CPU where this was written.


def operator(name, fake):
    """Decorates a function of tensors and makes it torch.ops.nanovlm.`name`, which torch.compile
    does not look into. fake: of the same parameters; returns empty tensors like the results."""

    def define(function):
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"nanovlm::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.nanovlm, name).default

    return define


def register_derivative(name, setup_context, backward):
    """Both functions: see torch.autograd.Function."""

    def forward(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.nanovlm, name)(*inputs)

    methods = dict(forward=forward, setup_context=setup_context, backward=backward)
    methods = {key: staticmethod(method) for key, method in methods.items()}
    function = type(name, (torch.autograd.Function,), methods)
    LIBRARY.impl(name, lambda *inputs: function.apply(*inputs), "Autograd")


# ---- What kernels ask of a device ----


def shared_memory(device):
    """(name and compute capability of a chip, bytes of shared memory that a program may have)."""
    if device.type != "cuda":
        return device.type, math.inf
    properties = torch.cuda.get_device_properties(device)
    chip = f"{properties.name} ({properties.major}.{properties.minor})"
    return chip, properties.shared_memory_per_block_optin


def capability(device):
    """(major, minor) of a CUDA device; (0, 0) of any other, the first key of a config table."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def autocast_dtype(tensor):
    """The dtype to which autocast would cast a tensor for a matrix product; None without autocast.
    Call it outside of custom operators: a compiled one does not see autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def config(table, device):
    """Returns a kernel's launch configuration for this device, from {oldest compute capability that
    it is for: configuration}."""
    own = max(capability(device), min(table))
    return table[max(key for key in table if key <= own)]


def num_sms(device):
    """The number of streaming multiprocessors. The interpreter has one; 2 tests the reductions."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


shared_memory._dynamo_marked_constant = True
