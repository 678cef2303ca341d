"""RMSNorm: scale every vector to a root mean square of one, then stretch each of its numbers by a learnt weight.

    y = x / sqrt(mean(x²) + eps) · weight

LayerNorm without the mean and the bias (Zhang & Sennrich 2019): a decoder needs its vectors at one length, not centred.

On a card a norm is nothing but traffic: ten operations a number, where the card could do hundreds in the time that the number takes to come from
memory. The formula reads and writes all vectors once for each of its steps, most of them in float32. The kernels below fetch a vector once, do
everything in registers, the addition before the norm as well, and write each result once: forward x and y in, x + y and its norm out; backward
three vectors in and one out.
"""
import math

import torch
from torch import Tensor

from . import kernels
from .kernels import tl, triton

WIDEST = 16384  # a vector lies whole in the registers of one program; over 8,192 only bfloat16 and float16 fit without spilling
TABLE = {  # compute capability: bytes of a vector that a thread holds, forward and backward; backward, threads of a multiprocessor, stages of loads
    (8, 0): (32, 32, 768, 1),
    (9, 0): (32, 32, 768, 1),
    (10, 0): (32, 32, 768, 1),
}


def rmsnorm(x, weight, eps):
    """x: (..., D), weight: (D,). The statistics are float32 (float64 for float64) whatever the dtype of x, as in Llama's reference."""
    if kernels.run(x, refusal, x):
        return torch.ops.nanovlm.rmsnorm(x, None, weight, eps, out_dtype(x, weight))[1]
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rmsnorm(x, y, weight, eps):
    """(x + y, rmsnorm(x + y)): what a block found out joins the stream of vectors, of which the next layer reads the norm."""
    if kernels.run(x, refusal, x, y):
        return torch.ops.nanovlm.rmsnorm(x, y, weight, eps, out_dtype(x, weight))[:2]
    x = x + y
    return x, rmsnorm(x, weight, eps)


def refusal(x, y=None):
    if y is not None and x.shape != y.shape:
        return "an addition of shapes that differ before an RMSNorm"
    return f"an RMSNorm wider than {WIDEST}" if x.shape[-1] > WIDEST else ""


def out_dtype(x, weight):
    """What x · weight is of; under autocast what the products that read it would cast it to, each for itself."""
    return kernels.autocast_dtype(x) or torch.promote_types(x.dtype, weight.dtype)


# The same in Triton. A kernel is written for one program, a block of threads that works on N vectors at once. D is their width rounded up to a
# power of two, as blocks must be; the mask keeps what lies beyond the width from being read or written. In a name, capitals are sizes of blocks.


@triton.jit
def vectors(ptr, row_N, T, stride_b, stride_t, column_1D, inside_ND):
    """Vectors number row_N of a (B, T, D) tensor, in float32. Their places are 64-bit numbers, as a tensor may hold over 2³¹."""
    start_N = (row_N // T).to(tl.int64) * stride_b + (row_N % T).to(tl.int64) * stride_t
    return tl.load(ptr + start_N[:, None] + column_1D, mask=inside_ND, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, rows, T, stride_xb, stride_xt, stride_yb, stride_yt, width, eps,
                   ADD: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    row_N, column_1D = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, D)[None, :]
    inside_ND = (row_N < rows)[:, None] & (column_1D < width)
    out_ND = row_N.to(tl.int64)[:, None] * width + column_1D
    x_ND = vectors(x_ptr, row_N, T, stride_xb, stride_xt, column_1D, inside_ND)
    if ADD:
        y_ND = vectors(y_ptr, row_N, T, stride_yb, stride_yt, column_1D, inside_ND)
        x_ND = (x_ND + y_ND).to(sum_ptr.dtype.element_ty)  # the norm is of the sum as it is stored
        tl.store(sum_ptr + out_ND, x_ND, mask=inside_ND)
        x_ND = x_ND.to(tl.float32)
    scale_N = tl.rsqrt(tl.sum(x_ND * x_ND, axis=1) / width + eps)
    tl.store(scale_ptr + row_N, scale_N, mask=row_N < rows)
    normed_ND = (x_ND * scale_N[:, None]).to(sum_ptr.dtype.element_ty).to(tl.float32)  # rounded where the formula rounds
    weight_1D = tl.load(weight_ptr + column_1D, mask=column_1D < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_ND, normed_ND * weight_1D, mask=inside_ND)


@triton.jit
def backward_kernel(grad_ptr, rest_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr, rows, T, stride_gb, stride_gt, stride_rb, stride_rt,
                    stride_xb, stride_xt, width, REST: tl.constexpr, WEIGHT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    """With normed = x · scale, and pull = grad · weight, the gradient that arrives at it,

        grad_x = scale · (pull - normed · mean(pull · normed)) + rest        rest: the gradient of the sum, which comes past the norm
        grad_weight = sum over all vectors of grad · normed

    There are as many programs as the card runs at once. Each takes its turn among the vectors and adds up a part of grad_weight of its own, in
    registers; the parts are summed afterwards in a fixed order, so that a run repeats itself to the bit (atomic additions come in any order).
    """
    column_1D, sum_ND = tl.arange(0, D)[None, :], tl.zeros((N, D), tl.float32)
    # what can be computed anew costs less than a register that holds it: hence no hoisting out of the loop (licm), and the weight from the cache
    for first in tl.range(tl.program_id(0) * N, rows, tl.num_programs(0) * N, num_stages=STAGES, disable_licm=True):
        row_N = first + tl.arange(0, N)
        inside_ND = (row_N < rows)[:, None] & (column_1D < width)
        grad_ND = vectors(grad_ptr, row_N, T, stride_gb, stride_gt, column_1D, inside_ND)
        x_ND = vectors(x_ptr, row_N, T, stride_xb, stride_xt, column_1D, inside_ND)
        scale_N1 = tl.load(scale_ptr + row_N, mask=row_N < rows, other=0.0)[:, None]
        normed_ND = x_ND * scale_N1
        if WEIGHT:
            sum_ND += grad_ND * normed_ND.to(x_ptr.dtype.element_ty).to(tl.float32)
        weight_1D = tl.load(weight_ptr + column_1D, mask=column_1D < width, other=0.0).to(tl.float32)
        pull_ND = grad_ND * weight_1D
        mean_N1 = (tl.sum(pull_ND * normed_ND, axis=1) / width)[:, None]
        grad_x_ND = (pull_ND - normed_ND * mean_N1) * scale_N1
        if REST:
            grad_x_ND += vectors(rest_ptr, row_N, T, stride_rb, stride_rt, column_1D, inside_ND)
        tl.store(grad_x_ptr + row_N.to(tl.int64)[:, None] * width + column_1D, grad_x_ND, mask=inside_ND)
    if WEIGHT:
        tl.store(partial_ptr + tl.program_id(0) * width + column_1D, tl.sum(sum_ND, axis=0)[None, :], mask=column_1D < width)


# What PyTorch is told of them: an operator, the shapes of its results, its derivative.


def sides(x):
    """x as (B, T, D) with the numbers of a vector side by side, which is a view of nearly every x, and the two strides that a kernel steps by."""
    x_BTD = x if x.stride(-1) == 1 else x.contiguous()
    x_BTD = x_BTD.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) if x.dim() > 1 else x_BTD[None, None]
    return x_BTD, *x_BTD.stride()[:2]


def tile(x, size):
    """The blocks of a program whose threads, 32 to a warp, hold so many bytes each; narrow vectors come several at once."""
    D, numbers = triton.next_power_of_2(x.shape[-1]), size // x.element_size()
    N = max(1, 4 * 32 * numbers // D)
    return {"N": N, "D": D, "num_warps": min(32, max(1, N * D // (32 * numbers)))}


@torch.library.custom_op("nanovlm::rmsnorm", mutates_args=())
def forward(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(x + y, or nothing without y; the norm, of `dtype`; what each vector was scaled by, for the backward pass)"""
    total, normed, scale = forward_shapes(x, y, weight, eps, dtype)
    (x_BTD, *x_strides), (y_BTD, *y_strides) = sides(x), sides(x if y is None else y)
    blocks = tile(x, kernels.pick(TABLE, x.device)[0])
    if rows := scale.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(rows, blocks["N"]),)](
                x_BTD, y_BTD, weight.contiguous(), x_BTD if y is None else total, normed, scale, rows, x_BTD.shape[1], *x_strides, *y_strides,
                x.shape[-1], eps, ADD=y is not None, **blocks)
    return total, normed, scale


@forward.register_fake
def forward_shapes(x, y, weight, eps, dtype):
    total = x.new_empty(0) if y is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nanovlm::rmsnorm_backward", mutates_args=())
def backward(grad: Tensor, rest: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of the weight, or nothing if it does not train)"""
    grad_input, grad_weight = backward_shapes(grad, rest, x, weight, scale, trains)
    _, size, threads, stages = kernels.pick(TABLE, x.device)
    blocks, rows = tile(x, size), scale.numel()
    programs = min(triton.cdiv(rows, blocks["N"]), kernels.multiprocessors(x.device) * max(1, threads // (32 * blocks["num_warps"])))
    partial = x.new_empty((programs, x.shape[-1]) if trains else 0, dtype=torch.float32)
    (grad_BTD, *grad_strides), (rest_BTD, *rest_strides), (x_BTD, *x_strides) = sides(grad), sides(x if rest is None else rest), sides(x)
    if rows:
        with torch.cuda.device_of(x):
            backward_kernel[(programs,)](
                grad_BTD, rest_BTD, x_BTD, weight.contiguous(), scale, grad_input, partial, rows, x_BTD.shape[1], *grad_strides, *rest_strides,
                *x_strides, x.shape[-1], REST=rest is not None, WEIGHT=trains, STAGES=stages, **blocks)
    return grad_input, partial.sum(0).to(weight.dtype) if trains else grad_weight


@backward.register_fake
def backward_shapes(grad, rest, x, weight, scale, trains):
    return x.new_empty(x.shape), torch.empty_like(weight) if trains else weight.new_empty(0)


def setup_context(ctx, inputs, output):
    x, y, weight, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if y is None else output[0], weight, output[2])
    ctx.dtypes = x.dtype, None if y is None else y.dtype


def differentiate(ctx, rest, grad, _):
    x, weight, scale = ctx.saved_tensors
    trains, rest = ctx.needs_input_grad[2], rest if ctx.dtypes[1] else None
    if grad is None:  # only the sum was used
        grad_input, grad_weight = rest, None
    else:
        grad_input, grad_weight = torch.ops.nanovlm.rmsnorm_backward(grad, rest, x, weight, scale, trains)
    grads = [grad_input.to(dtype) if dtype else None for dtype in ctx.dtypes]
    return *grads, grad_weight if trains else None, None, None


torch.library.register_autograd("nanovlm::rmsnorm", differentiate, setup_context=setup_context)
