"""Attention's operators for PyTorch: they launch the kernels, with a derivative.

Read the kernels first: attention_tiles.py, attention_forward.py, attention_backward_dq.py,
attention_backward_dkdv.py.
"""

import torch
import triton
from torch import Tensor

from . import dispatch
from .attention_backward_dkdv import attention_bwd_dkdv_kernel
from .attention_backward_dq import attention_bwd_dq_kernel
from .attention_forward import attention_fwd_kernel
from .attention_tiles import document_bounds, with_adjacent_heads
from .decode_attention import decode_attention

MAX_HEAD_DIM = {2: 256, 4: 128}  # by bytes of a number: larger heads do not fit the registers
FLOAT32 = {
    (64, 4): (49_152, (32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    (128, 4): (65_536, (16, 32, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
}
SMALL = {  # for chips on which a program may have 101,376 bytes of shared memory
    (64, 2): (49_152, (128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    (128, 2): (74_240, (128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
    (256, 2): (69_632, (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    **FLOAT32,
}
TABLE = {  # compute capability: {(head size at most, bytes of a number): (bytes of shared memory at
    # most, then BLOCK_M, BLOCK_N, num_warps, num_stages of the forward kernel, of the kernel for dk
    # and dv, of the kernel for dq)}
    (0, 0): {  # the interpreter: small, so that short sequences have several blocks
        (256, 4): (0, (32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))
    },
    (8, 0): {
        (64, 2): (49_152, (128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        (128, 2): (107_520, (128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
        (256, 2): (102_400, (64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
        **FLOAT32,
    },
    (8, 6): SMALL,
    (9, 0): {
        (64, 2): (82_944, (128, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 3)),
        (128, 2): (131_072, (128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2)),
        (256, 2): (131_072, (64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
        **FLOAT32,
    },
    (10, 0): {  # triton 3.6 spills with 8 warps where these have 4
        (64, 2): (100_352, (128, 64, 8, 3), (64, 128, 8, 3), (128, 64, 4, 2)),
        (128, 2): (165_888, (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        (256, 2): (164_896, (64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
        **FLOAT32,
    },
    (12, 0): SMALL,
}


def launch_config(x_BTHK, dtype=None):
    """Returns a row of the table: the first for heads and numbers of this size or larger."""
    K, itemsize = x_BTHK.shape[-1], (dtype or x_BTHK.dtype).itemsize
    table = dispatch.config(TABLE, x_BTHK.device)
    return table[min(key for key in table if key[0] >= K and key[1] >= itemsize)]


def unsupported(q_BTHK, k_BSGK, v_BSGK):
    autocast = dispatch.autocast_dtype(q_BTHK)
    dtype, head_dim = autocast or q_BTHK.dtype, q_BTHK.shape[-1]
    max_head_dim = MAX_HEAD_DIM.get(dtype.itemsize, 0)
    if head_dim > max_head_dim:
        return f"attention with heads of more than {max_head_dim} numbers in {dtype}"
    if not (autocast or q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype):
        return "attention with queries, keys and values of several dtypes"
    needed = launch_config(q_BTHK, dtype)[0]
    chip, limit = dispatch.shared_memory(q_BTHK.device)
    if needed > limit:
        return (
            f"attention with heads of {head_dim} numbers in {dtype} needs {needed:,} bytes of "
            f"shared memory, and {chip} has {limit:,}"
        )
    return ""


@dispatch.register("attention", unsupported)
def attention(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS, cache_length, bounds):
    """Returns out_BTHK, as models/attention.py does; under autocast in its dtype, as PyTorch."""
    if dtype := dispatch.autocast_dtype(q_BTHK):
        q_BTHK, k_BSGK, v_BSGK = (x.to(dtype) for x in (q_BTHK, k_BSGK, v_BSGK))
    newest_only = causal and q_BTHK.shape[1] == 1 and not torch.is_grad_enabled()
    if cache_length is not None or newest_only:
        return decode_attention(q_BTHK, k_BSGK, v_BSGK, documents_BS, cache_length, window)
    if documents_BS is None:
        bounds = None, None
    elif bounds is None:
        bounds = document_bounds(documents_BS)
    return attention_forward(q_BTHK, k_BSGK, v_BSGK, *bounds, causal, window)[0]


def launch(kernel, config, q_BTHK, k_BSGK, v_BSGK, others, first_BS, last_BS, causal, window):
    """others: contiguous tensors, for the kernel's parameters between v and first."""
    (B, T, H, head_dim), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    tensors, strides = with_adjacent_heads(q_BTHK, k_BSGK, v_BSGK)
    bounds = [x if x is None else x.contiguous() for x in (first_BS, last_BS)]
    block_m, block_n, num_warps, num_stages = config
    grid = (B * H, triton.cdiv(T, block_m))
    if kernel is attention_bwd_dkdv_kernel:
        grid = (B * G, triton.cdiv(S, block_n))
    with torch.cuda.device_of(q_BTHK):
        kernel[grid](
            *tensors,
            *others,
            *bounds,
            T,
            S,
            H,
            H // G,
            window,
            head_dim**-0.5,
            *strides,
            HEAD_DIM=head_dim,
            CAUSAL=causal,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_DMODEL=max(16, triton.next_power_of_2(head_dim)),
            num_warps=num_warps,
            num_stages=num_stages,
        )


def new_out(q_BTHK, *_):
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(q_BTHK.shape), q_BTHK.new_empty((B, H, T), dtype=torch.float32)


@dispatch.operator("attention", new_out)
def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    first_BS: Tensor | None,
    last_BS: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns (out_BTHK, lse_BHT). lse: log2 of the sum of each query's unnormalized weights, from
    which the backward pass computes the weights again. first_BS, last_BS: see document_bounds."""
    new = new_out(q_BTHK)
    config = launch_config(q_BTHK)[1]
    if q_BTHK.numel():
        rules = first_BS, last_BS, causal, window
        launch(attention_fwd_kernel, config, q_BTHK, k_BSGK, v_BSGK, new, *rules)
    return new


def new_gradients(grad_BTHK, q_BTHK, k_BSGK, v_BSGK, *_):
    return tuple(x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGK))


@dispatch.operator("attention_backward", new_gradients)
def attention_backward(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
    first_BS: Tensor | None,
    last_BS: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    tensors, rules = (q_BTHK, k_BSGK, v_BSGK), (first_BS, last_BS, causal, window)
    dq, dk, dv = new_gradients(grad_BTHK, *tensors)
    _, _, dkdv_config, dq_config = launch_config(q_BTHK)
    do, out, lse = (x.contiguous() for x in (grad_BTHK, out_BTHK, lse_BHT))
    delta = torch.empty_like(lse)
    if q_BTHK.numel():
        launch(attention_bwd_dq_kernel, dq_config, *tensors, (do, out, lse, delta, dq), *rules)
    if k_BSGK.numel():
        launch(attention_bwd_dkdv_kernel, dkdv_config, *tensors, (do, lse, delta, dk, dv), *rules)
    return dq, dk, dv


def setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def backward(ctx, grad_BTHK, _):
    if grad_BTHK is None:
        return (None,) * 7
    grads = attention_backward(grad_BTHK, *ctx.saved_tensors, ctx.causal, ctx.window)
    return *grads, None, None, None, None


dispatch.register_derivative("attention", setup_context, backward)
