"""Attention of one new token to a long cache: while a model speaks, this is asked in every layer for every token.

    out = softmax(query · keys / sqrt(K)) · values          for a single query of each row

It is all fetching: every key and value is read once for a few multiplications. One program a row and head would leave most of a card idle, and
no single one can draw from memory as fast as memory gives. So the cache is cut into parts, a program takes the queries of all heads that share
their keys (each key is fetched once for all of them) to one part, and a second kernel merges what the parts found: each is a softmax of its own,
and counts as much as the sum of its weights, 2^lse,

    out = Σ 2^lse · out_of_part / Σ 2^lse
"""
import math

import torch

from . import kernels
from .kernels import tl, triton

TABLE = {  # compute capability: (keys of 2 bytes a number in a block, programs a multiprocessor, warps, stages of loads)
    (0, 0): (16, 3, 4, 1),
    (8, 0): (64, 2, 4, 3),
    (9, 0): (64, 2, 4, 3),
    (10, 0): (64, 2, 4, 3),
}
SHORTEST = 256  # keys that are worth a part of their own


@triton.jit
def part_kernel(q, k, v, out, lse, documents, filled, keys, heads, group, window, scale,
                q_row, q_head, k_row, k_token, k_head, v_row, v_token, v_head, documents_row,
                size: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr, N: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    """The H heads that share a head of keys look at one part of the cache."""
    shared, parts = heads // group, tl.num_programs(1)
    row, head, part = (tl.program_id(0) // shared).to(tl.int64), tl.program_id(0) % shared, tl.program_id(1)
    first, end = 0, keys
    if filled is not None:
        end = tl.load(filled)
    if window is not None:
        first = tl.maximum(end - window, 0)
    length = tl.cdiv(tl.cdiv(end - first, parts), S) * S
    begin, stop = first + part * length, tl.minimum(first + (part + 1) * length, end)
    h_H1, k_1K, s_S = tl.arange(0, H)[:, None], tl.arange(0, K)[None, :], tl.arange(0, S)
    q_HK = tl.load(q + (row * q_row + (head * group + h_H1) * q_head) * UNIT + k_1K, mask=(h_H1 < group) & (k_1K < size), other=0.0)
    k, k_token = k + (row * k_row + head * k_head) * UNIT, k_token * UNIT
    v, v_token = v + (row * v_row + head * v_head) * UNIT, v_token * UNIT
    if documents is not None:  # what stands before the token's own document is not fetched; of the part, its last `seen` keys are
        documents, seen, n_N = documents + row * documents_row, 0, tl.arange(0, N)
        own = tl.load(documents + end - 1)
        for n in range(begin, stop, N):
            seen += tl.sum(((n + n_N < stop) & (tl.load(documents + n + n_N, mask=n + n_N < stop, other=0) == own)).to(tl.int32), axis=0)
        begin = stop - seen

    out_HK, total_H, peak_H = tl.zeros((H, K), tl.float32), tl.zeros((H,), tl.float32), tl.full((H,), -1e30, tl.float32)
    for s in range(begin, stop, S):
        seen_S = s + s_S < stop
        inside_SK = seen_S[:, None] & (k_1K < size)
        k_SK = tl.load(k + tl.cast(s, tl.int64) * k_token + s_S[:, None] * k_token + k_1K, mask=inside_SK, other=0.0)
        v_SK = tl.load(v + tl.cast(s, tl.int64) * v_token + s_S[:, None] * v_token + k_1K, mask=inside_SK, other=0.0)
        score_HS = tl.where(seen_S[None, :], tl.dot(q_HK, tl.trans(k_SK), input_precision="tf32x3") * scale, float("-inf"))
        higher_H = tl.maximum(peak_H, tl.max(score_HS, axis=1))
        weight_HS, shrink_H = tl.exp2(score_HS - higher_H[:, None]), tl.exp2(peak_H - higher_H)
        out_HK = tl.dot(weight_HS.to(v_SK.dtype), v_SK, out_HK * shrink_H[:, None], input_precision="tf32x3")
        total_H, peak_H = total_H * shrink_H + tl.sum(weight_HS, axis=1), higher_H

    own_H1, total_H = (row * heads + head * group + h_H1) * parts + part, tl.maximum(total_H, 1e-30)  # a part in which nothing is seen counts nothing
    tl.store(out + own_H1 * size + k_1K, out_HK / total_H[:, None], mask=(h_H1 < group) & (k_1K < size))
    tl.store(lse + own_H1, (peak_H + tl.log2(total_H))[:, None], mask=h_H1 < group)


@triton.jit
def merge_kernel(part, lse, out, parts, size: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """One head of one row: the mean of what N parts (a power of two) found, weighted by 2^lse."""
    own, n_N, k_1K = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, K)[None, :]
    lse_N = tl.load(lse + own * parts + n_N, mask=n_N < parts, other=float("-inf"))
    weight_N = tl.exp2(lse_N - tl.max(lse_N, axis=0))
    part_NK = tl.load(part + (own * parts + n_N[:, None]) * size + k_1K, mask=(n_N < parts)[:, None] & (k_1K < size), other=0.0)
    out_1K = (tl.sum(part_NK * weight_N[:, None], axis=0) / tl.sum(weight_N, axis=0))[None, :]
    tl.store(out + own * size + k_1K, out_1K.to(out.dtype.element_ty), mask=k_1K < size)


def with_strides(*tensors):
    """The tensors, each vector's numbers side by side; the strides of their other dimensions in one list, in units; and the unit: where all are
    multiples of 16 bytes it is these, so that the compiler knows that it may fetch as many at once (72 is no multiple of 16, which it would see)."""
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    strides, wide = [stride for x in tensors for stride in x.stride()[:3]], 16 // tensors[0].element_size()
    unit = 1 if any(stride % wide for stride in strides) else wide
    return tensors, [stride // unit for stride in strides], unit


def cut(B, S, G, device):
    """Into how many parts a cache is cut: enough to keep all of the card fetching."""
    programs = kernels.multiprocessors(device) * kernels.pick(TABLE, device)[1]
    return max(1, min(triton.cdiv(programs, B * G), triton.cdiv(S, SHORTEST), 128))


@torch.library.custom_op("nanovlm::decode", mutates_args=())
def decode(q_B1HK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, documents_BS: torch.Tensor | None, filled: torch.Tensor | None,
           window: int | None) -> torch.Tensor:
    """What the token in the last place sees; it has no gradient.

    filled: int32, one number on the card: how many of the S places are, so that the query is the last of these; None: all are. So a step of which the
    shapes stay the same can be recorded once, as a CUDA graph, and be played again while the cache fills up.
    """
    out_B1HK = decode_shapes(q_B1HK, k_BSGK, v_BSGK, documents_BS, filled, window)
    (B, _, H, size), (S, G) = q_B1HK.shape, k_BSGK.shape[1:3]
    (q_B1HK, k_BSGK, v_BSGK), (q_row, _, *strides), unit = with_strides(q_B1HK, k_BSGK, v_BSGK)
    documents_BS = documents_BS if documents_BS is None or documents_BS.stride(-1) == 1 else documents_BS.contiguous()
    block, _, warps, stages = kernels.pick(TABLE, q_B1HK.device)
    parts, wide = cut(B, S, G, q_B1HK.device), max(16, triton.next_power_of_2(size))
    part, lse = q_B1HK.new_empty((B, H, parts, size), dtype=torch.float32), q_B1HK.new_empty((B, H, parts), dtype=torch.float32)
    with torch.cuda.device_of(q_B1HK):
        part_kernel[(B * G, parts)](
            q_B1HK, k_BSGK, v_BSGK, part, lse, documents_BS, filled, S, H, H // G, window, math.log2(math.e) / size**0.5, q_row, *strides,
            None if documents_BS is None else documents_BS.stride(0), size=size, UNIT=unit, H=max(16, triton.next_power_of_2(H // G)), N=1024,
            S=max(16, block * 2 // q_B1HK.element_size()), K=wide, num_warps=warps, num_stages=stages)
        merge_kernel[(B * H,)](part, lse, out_B1HK, parts, size=size, N=triton.next_power_of_2(parts), K=wide, num_warps=warps)
    return out_B1HK


@decode.register_fake
def decode_shapes(q_B1HK, k_BSGK, v_BSGK, documents_BS, filled, window):
    return q_B1HK.new_empty(q_B1HK.shape)
