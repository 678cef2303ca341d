"""RMSNorm's operators for PyTorch: launches, shapes and derivative. rmsnorm_kernels.py has the
kernels; read it first."""

import math

import torch
import triton
from torch import Tensor

from . import dispatch
from .rmsnorm_kernels import rmsnorm_bwd_kernel, rmsnorm_fwd_kernel

MAX_WIDTH = {(8, 0): 16384, (12, 0): 8192}  # by compute capability: wider vectors spill registers
TABLE = {  # compute capability: bytes of a vector for each thread, forward and backward;
    # of the backward kernel: threads for each multiprocessor, num_stages
    (8, 0): (32, 32, 768, 1),
    (9, 0): (32, 32, 768, 1),
    (10, 0): (32, 32, 768, 1),
}


def unsupported(x, y=None):
    if y is not None and x.shape != y.shape:
        return "an addition of shapes that differ before an RMSNorm"
    widest = dispatch.config(MAX_WIDTH, x.device)
    return f"an RMSNorm wider than {widest}" if x.shape[-1] > widest else ""


@dispatch.register("rmsnorm", unsupported)
def rmsnorm(x, y, weight, eps):
    """Returns (x + y, its norm), or (an empty tensor, the norm of x) if y is None. Under autocast
    the norm has the dtype to which the linear layers that read it would cast it."""
    dtype = dispatch.autocast_dtype(x) or torch.promote_types(x.dtype, weight.dtype)
    return rmsnorm_forward(x, y, weight, eps, dtype)[:2]


def as_three_dims(x):
    """Returns x as (B, T, D) with contiguous vectors, a view of nearly every x, and the strides of
    B and T."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.dim() == 1:
        x = x[None]
    x_BTD = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return x_BTD, *x_BTD.stride()[:2]


def block_sizes(x, size):
    """Returns the blocks of a program in which each thread (32 a warp) holds `size` bytes of a
    vector. A program of narrow vectors takes several."""
    D, per_thread = triton.next_power_of_2(x.shape[-1]), size // x.element_size()
    N = max(1, 4 * 32 * per_thread // D)
    num_warps = min(32, max(1, N * D // (32 * per_thread)))
    return {"BLOCK_N": N, "BLOCK_D": D, "num_warps": num_warps}


def new_norm(x, y, weight, eps, dtype):
    if y is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=dtype), scale


@dispatch.operator("rmsnorm", new_norm)
def rmsnorm_forward(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (x + y, empty if y is None; the norm, of `dtype`; the scale of each vector)."""
    total, normed, scale = new_norm(x, y, weight, eps, dtype)
    x_BTD, *x_strides = as_three_dims(x)
    y_BTD, *y_strides = as_three_dims(x if y is None else y)
    blocks, n_rows = block_sizes(x, dispatch.config(TABLE, x.device)[0]), scale.numel()
    if n_rows:
        with torch.cuda.device_of(x):
            rmsnorm_fwd_kernel[(triton.cdiv(n_rows, blocks["BLOCK_N"]),)](
                x_BTD,
                y_BTD,
                weight.contiguous(),
                x_BTD if y is None else total,
                normed,
                scale,
                n_rows,
                x_BTD.shape[1],
                *x_strides,
                *y_strides,
                x.shape[-1],
                eps,
                ADD=y is not None,
                **blocks,
            )
    return total, normed, scale


def new_norm_gradients(grad, grad_sum, x, weight, scale, train):
    return x.new_empty(x.shape), torch.empty_like(weight) if train else weight.new_empty(0)


@dispatch.operator("rmsnorm_backward", new_norm_gradients)
def rmsnorm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, train: bool
) -> tuple[Tensor, Tensor]:
    """Returns (gradient of x, gradient of the weight; empty if it does not train)."""
    x_grad, grad_weight = new_norm_gradients(grad, grad_sum, x, weight, scale, train)
    _, size, threads, num_stages = dispatch.config(TABLE, x.device)
    blocks, n_rows = block_sizes(x, size), scale.numel()
    resident = dispatch.num_sms(x.device) * max(1, threads // (32 * blocks["num_warps"]))
    n_programs = min(triton.cdiv(n_rows, blocks["BLOCK_N"]), resident)
    partial = x.new_empty((n_programs, x.shape[-1]) if train else 0, dtype=torch.float32)
    grad_BTD, *grad_strides = as_three_dims(grad)
    sum_BTD, *sum_strides = as_three_dims(x if grad_sum is None else grad_sum)
    x_BTD, *x_strides = as_three_dims(x)
    if n_rows:
        with torch.cuda.device_of(x):
            rmsnorm_bwd_kernel[(n_programs,)](
                grad_BTD,
                sum_BTD,
                x_BTD,
                weight.contiguous(),
                scale,
                x_grad,
                partial,
                n_rows,
                x_BTD.shape[1],
                *grad_strides,
                *sum_strides,
                *x_strides,
                x.shape[-1],
                ADD=grad_sum is not None,
                WEIGHT=train,
                NUM_STAGES=num_stages,
                **blocks,
            )
    return x_grad, partial.sum(0).to(weight.dtype) if train else grad_weight


def setup_context(ctx, inputs, output):
    x, y, weight, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if y is None else output[0], weight, output[2])
    ctx.dtypes = x.dtype, None if y is None else y.dtype


def backward(ctx, grad_sum, grad, _):
    x, weight, scale = ctx.saved_tensors
    train, grad_sum = ctx.needs_input_grad[2], grad_sum if ctx.dtypes[1] else None
    if grad is None:  # only the sum was used
        x_grad, grad_weight = grad_sum, None
    else:
        x_grad, grad_weight = rmsnorm_backward(grad, grad_sum, x, weight, scale, train)
    grads = [x_grad.to(dtype) if dtype else None for dtype in ctx.dtypes]
    return *grads, grad_weight if train else None, None, None


dispatch.register_derivative("rmsnorm", setup_context, backward)
