"""Which tiles of the scores an attention kernel computes, and how it loads and stores vectors.

The scores of all queries and keys form a matrix. A program owns BLOCK_M of its rows and walks over
the columns, BLOCK_N at a time. (The kernel for dk and dv owns columns and walks over the rows.) By
causal, window and documents, a query attends to an unbroken range of positions, lo to hi, and the
range of a later query begins and ends no earlier. So the keys from the last query's lo to the first
query's hi are attended to by the whole block. Here are 16 tokens in tiles of 4 queries and 2 keys,
causal; the first 5 tokens are one document, the rest another:

                     keys 0    5    10   15
        queries  0 -  3   mmmm............      m  masked: a mask hides some of the pairs
        queries  4 -  7   mmmmmmmm........      F  full: no mask is computed
        queries  8 - 11   .....FFFFmmmm...      .  skipped: nothing is loaded
        queries 12 - 15   .....FFFFFFFFmmm

The full tiles have a loop of their own, without the instructions of a mask; the masked tiles on
both sides share another. Positions count from the first key. Queries are the last seqlen_q of the
seqlen_k positions.
"""

import torch
import triton
import triton.language as tl

from . import dispatch


@dispatch.register("document_bounds")
def document_bounds(documents_BS):
    """Returns the first and the last position of the document that each position is part of."""
    S = documents_BS.shape[1]
    s_S = torch.arange(S, device=documents_BS.device, dtype=torch.int32)
    is_first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    is_last_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_last_BS[:, :-1] = is_first_BS[:, 1:]
    first_BS = torch.where(is_first_BS, s_S, 0).cummax(1).values
    last_BS = torch.where(is_last_BS, s_S, S - 1).flip(1).cummin(1).values.flip(1)
    return first_BS, last_BS


def with_adjacent_heads(*tensors):
    """Returns the tensors, copied if between the numbers of a token there are gaps, and the strides
    of their first two dimensions in one list."""
    tensors = [x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous() for x in tensors]
    return tensors, [stride for x in tensors for stride in x.stride()[:2]]


@triton.jit
def attention_range(
    position, first, last, begin, end, window, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr
):
    """The positions, lo and hi included, that queries at `position` attend to; with OF_KEYS: that
    attend to keys at `position`. There are positions from `begin` to before `end`."""
    lo, hi = position * 0 + begin, position * 0 + end - 1
    if first is not None:
        lo, hi = tl.maximum(lo, tl.load(first + position)), tl.load(last + position)
    if window is not None:
        lo, hi = tl.maximum(lo, position - window + 1), tl.minimum(hi, position + window - 1)
    if CAUSAL and OF_KEYS:
        lo = tl.maximum(lo, position)
    if CAUSAL and not OF_KEYS:
        hi = tl.minimum(hi, position)
    return lo, hi


@triton.jit
def tile_bounds(
    start,
    first,
    last,
    begin,
    end,
    window,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """Returns lo and hi of BLOCK tokens from position `start`, and of all their tiles, STEP wide,
    the bounds (begin, full_begin, full_end, end)."""
    position = tl.minimum(start + tl.arange(0, BLOCK), end - 1)
    lo, hi = attention_range(position, first, last, begin, end, window, CAUSAL, OF_KEYS)
    lo_of_first, hi_of_first = attention_range(
        start, first, last, begin, end, window, CAUSAL, OF_KEYS
    )
    position = tl.minimum(start + BLOCK, end) - 1
    lo_of_last, hi_of_last = attention_range(
        position, first, last, begin, end, window, CAUSAL, OF_KEYS
    )
    full_begin = lo_of_first + tl.cdiv(tl.maximum(lo_of_last - lo_of_first, 0), STEP) * STEP
    full_end = full_begin + tl.maximum(hi_of_first + 1 - full_begin, 0) // STEP * STEP
    return lo, hi, (lo_of_first, full_begin, full_end, hi_of_last + 1)


@triton.jit
def tile_loop(bounds, MASKED: tl.constexpr):
    """Returns (begin, end, gap_begin, gap) of the loop over the full or over the masked tiles. The
    masked ones have a gap where the full ones are."""
    begin, full_begin, full_end, end = bounds
    if MASKED:
        return begin, end - (full_end - full_begin), full_begin, full_end - full_begin
    return full_begin, full_end, full_end, 0


@triton.jit
def load(
    ptr,
    start,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """BLOCK vectors from position `start`; 0 past HEAD_DIM and, if MASKED, from position `end`."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_DMODEL)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + row * stride + column
    if MASKED:
        return tl.load(ptrs, mask=(start + row < end) & (column < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_DMODEL:
        return tl.load(ptrs, mask=column < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store(
    ptr,
    start,
    end,
    stride,
    value,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_DMODEL)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + row * stride + column
    mask = (start + row < end) & (column < HEAD_DIM)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)
