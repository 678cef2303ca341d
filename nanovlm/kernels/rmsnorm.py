"""RMSNorm in Triton, fused with the residual addition before it.

    y = x / sqrt(mean(x²) + eps) · weight

A norm is bound by memory: ten operations a number, where a GPU could do hundreds in the time that
it takes to load the number. The formula in PyTorch reads and writes all vectors once for each of
its steps, most of them in float32. The kernels load a vector once, compute in registers, and store
each result once. Forward: x and y in, x + y and its norm out. Backward: three vectors in, one out.

A program works on BLOCK_N vectors at once, of BLOCK_D numbers: their width, rounded up to a power
of two as blocks must be. Masks keep it from reading or writing past the width. In a name, N is
BLOCK_N and D is BLOCK_D.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch

MAX_WIDTH = 16384  # of a vector in one program's registers; over 8,192 float32 would spill
TABLE = {  # compute capability: bytes of a vector for each thread, forward and backward;
    # of the backward kernel: threads for each multiprocessor, num_stages
    (8, 0): (32, 32, 768, 1),
    (9, 0): (32, 32, 768, 1),
    (10, 0): (32, 32, 768, 1),
}


def unsupported(x, y=None):
    if y is not None and x.shape != y.shape:
        return "an addition of shapes that differ before an RMSNorm"
    return f"an RMSNorm wider than {MAX_WIDTH}" if x.shape[-1] > MAX_WIDTH else ""


@dispatch.register("rmsnorm", unsupported)
def rmsnorm(x, y, weight, eps):
    """Returns (x + y, its norm), or (an empty tensor, the norm of x) if y is None. Under autocast
    the norm has the dtype to which the linear layers that read it would cast it."""
    dtype = dispatch.autocast_dtype(x) or torch.promote_types(x.dtype, weight.dtype)
    return torch.ops.nanovlm.rmsnorm(x, y, weight, eps, dtype)[:2]


@triton.jit
def load_vectors(ptr, row_N, T, stride_b, stride_t, column_1D, mask_ND):
    """Vectors number row_N of a (B, T, D) tensor, in float32. Offsets are 64-bit, as a tensor may
    hold over 2³¹ numbers."""
    start_N = (row_N // T).to(tl.int64) * stride_b + (row_N % T).to(tl.int64) * stride_t
    return tl.load(ptr + start_N[:, None] + column_1D, mask=mask_ND, other=0.0).to(tl.float32)


@triton.jit
def rmsnorm_fwd_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    scale_ptr,
    n_rows,
    T,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_1D = tl.arange(0, BLOCK_D)[None, :]
    mask_ND = (row_N < n_rows)[:, None] & (column_1D < width)
    offset_ND = row_N.to(tl.int64)[:, None] * width + column_1D
    x_ND = load_vectors(x_ptr, row_N, T, stride_xb, stride_xt, column_1D, mask_ND)
    if ADD:
        y_ND = load_vectors(y_ptr, row_N, T, stride_yb, stride_yt, column_1D, mask_ND)
        x_ND = (x_ND + y_ND).to(sum_ptr.dtype.element_ty)  # the norm is of the sum as stored
        tl.store(sum_ptr + offset_ND, x_ND, mask=mask_ND)
        x_ND = x_ND.to(tl.float32)
    scale_N = tl.rsqrt(tl.sum(x_ND * x_ND, axis=1) / width + eps)
    tl.store(scale_ptr + row_N, scale_N, mask=row_N < n_rows)
    # rounded where the formula rounds
    normed_ND = (x_ND * scale_N[:, None]).to(sum_ptr.dtype.element_ty).to(tl.float32)
    weight_1D = tl.load(weight_ptr + column_1D, mask=column_1D < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset_ND, normed_ND * weight_1D, mask=mask_ND)


@triton.jit
def rmsnorm_bwd_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    n_rows,
    T,
    stride_gb,
    stride_gt,
    stride_sb,
    stride_st,
    stride_xb,
    stride_xt,
    width,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """With normed = x · scale and wgrad = grad · weight, the gradient of normed,

        grad_x = scale · (wgrad - normed · mean(wgrad · normed)) + grad_sum
        grad_weight = sum over all vectors of grad · normed

    where grad_sum is the gradient of x + y that does not pass through the norm. There are as many
    programs as run at once. Each takes every n-th block of vectors and adds up its own part of
    grad_weight in registers. The parts are summed afterwards in a fixed order, so that results are
    deterministic (atomic additions come in any order).
    """
    column_1D = tl.arange(0, BLOCK_D)[None, :]
    grad_weight_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Computing a value again costs less than a register that holds it: no hoisting out of the loop
    # (licm), and the weight is loaded again, from the cache.
    for start in tl.range(
        tl.program_id(0) * BLOCK_N,
        n_rows,
        tl.num_programs(0) * BLOCK_N,
        num_stages=NUM_STAGES,
        disable_licm=True,
    ):
        row_N = start + tl.arange(0, BLOCK_N)
        mask_ND = (row_N < n_rows)[:, None] & (column_1D < width)
        grad_ND = load_vectors(grad_ptr, row_N, T, stride_gb, stride_gt, column_1D, mask_ND)
        x_ND = load_vectors(x_ptr, row_N, T, stride_xb, stride_xt, column_1D, mask_ND)
        scale_N1 = tl.load(scale_ptr + row_N, mask=row_N < n_rows, other=0.0)[:, None]
        normed_ND = x_ND * scale_N1
        if WEIGHT:
            grad_weight_ND += grad_ND * normed_ND.to(x_ptr.dtype.element_ty).to(tl.float32)
        weight_1D = tl.load(weight_ptr + column_1D, mask=column_1D < width, other=0.0)
        wgrad_ND = grad_ND * weight_1D.to(tl.float32)
        mean_N1 = (tl.sum(wgrad_ND * normed_ND, axis=1) / width)[:, None]
        grad_x_ND = (wgrad_ND - normed_ND * mean_N1) * scale_N1
        if ADD:
            grad_x_ND += load_vectors(
                grad_sum_ptr, row_N, T, stride_sb, stride_st, column_1D, mask_ND
            )
        start_N1 = grad_x_ptr + row_N.to(tl.int64)[:, None] * width
        tl.store(start_N1 + column_1D, grad_x_ND, mask=mask_ND)
    if WEIGHT:
        grad_weight_1D = tl.sum(grad_weight_ND, axis=0)[None, :]
        partial_1D = partial_ptr + tl.program_id(0) * width + column_1D
        tl.store(partial_1D, grad_weight_1D, mask=column_1D < width)


# ---- The operator: launches, shapes, derivative ----


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


@torch.library.custom_op("nanovlm::rmsnorm", mutates_args=())
def rmsnorm_forward(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (x + y, empty if y is None; the norm, of `dtype`; the scale of each vector)."""
    total, normed, scale = rmsnorm_forward_fake(x, y, weight, eps, dtype)
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


@rmsnorm_forward.register_fake
def rmsnorm_forward_fake(x, y, weight, eps, dtype):
    if y is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=dtype), scale


@torch.library.custom_op("nanovlm::rmsnorm_backward", mutates_args=())
def rmsnorm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, train: bool
) -> tuple[Tensor, Tensor]:
    """Returns (gradient of x, gradient of the weight; empty if it does not train)."""
    x_grad, grad_weight = rmsnorm_backward_fake(grad, grad_sum, x, weight, scale, train)
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


@rmsnorm_backward.register_fake
def rmsnorm_backward_fake(grad, grad_sum, x, weight, scale, train):
    return x.new_empty(x.shape), torch.empty_like(weight) if train else weight.new_empty(0)


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
        x_grad, grad_weight = torch.ops.nanovlm.rmsnorm_backward(
            grad, grad_sum, x, weight, scale, train
        )
    grads = [x_grad.to(dtype) if dtype else None for dtype in ctx.dtypes]
    return *grads, grad_weight if train else None, None, None


torch.library.register_autograd("nanovlm::rmsnorm", backward, setup_context=setup_context)
