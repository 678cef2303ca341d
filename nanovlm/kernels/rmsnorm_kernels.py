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

import triton
import triton.language as tl


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
        if ADD:  # now, so that it arrives while the sum below is computed
            grad_sum_ND = load_vectors(
                grad_sum_ptr, row_N, T, stride_sb, stride_st, column_1D, mask_ND
            )
        scale_N1 = tl.load(scale_ptr + row_N, mask=row_N < n_rows, other=0.0)[:, None]
        normed_ND = x_ND * scale_N1
        if WEIGHT:
            grad_weight_ND += grad_ND * normed_ND.to(x_ptr.dtype.element_ty).to(tl.float32)
        weight_1D = tl.load(weight_ptr + column_1D, mask=column_1D < width, other=0.0)
        wgrad_ND = grad_ND * weight_1D.to(tl.float32)
        mean_N1 = (tl.sum(wgrad_ND * normed_ND, axis=1) / width)[:, None]
        grad_x_ND = (wgrad_ND - normed_ND * mean_N1) * scale_N1
        if ADD:
            grad_x_ND += grad_sum_ND
        start_N1 = grad_x_ptr + row_N.to(tl.int64)[:, None] * width
        tl.store(start_N1 + column_1D, grad_x_ND, mask=mask_ND)
    if WEIGHT:
        grad_weight_1D = tl.sum(grad_weight_ND, axis=0)[None, :]
        partial_1D = partial_ptr + tl.program_id(0) * width + column_1D
        tl.store(partial_1D, grad_weight_1D, mask=column_1D < width)
