"""Attention of one new token to the KV cache, in Triton (flash-decoding, Dao et al. 2023).

    out = softmax(q · kᵀ / sqrt(K)) · v        for a single query of each sequence

It is bound by memory: every key and value is read once for a few multiplications. One program for
each sequence and head would leave most of the GPU idle, and cannot load as fast as memory delivers.
So the cache is split. A program takes one split and the queries of all heads that share its keys,
so that each key is loaded once for all of them. A second kernel combines the splits: each is a
softmax of its own, and its weight is the sum of its exponentials, 2^lse:

    out = Σ 2^lse · out_of_split / Σ 2^lse

In a name, H is BLOCK_H (the query heads that share a key head). The rest is as in
attention_forward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .attention_tiles import load, with_adjacent_heads
from .cross_entropy import LOG2E

TABLE = {  # compute capability: bytes of a tile of keys, programs for each multiprocessor,
    # num_warps, num_stages. A tile of values is as large, and of each num_stages are in flight
    (0, 0): (4096, 3, 4, 1),
    (8, 0): (16384, 2, 4, 3),
    (9, 0): (16384, 2, 4, 3),
    (10, 0): (16384, 2, 4, 3),
    (12, 0): (16384, 2, 4, 3),
}
MIN_SPLIT = 256  # keys


@triton.jit
def decode_split_kernel(
    q,
    k,
    v,
    out,
    lse,
    documents,
    cache_length,
    seqlen_k,
    n_heads,
    group_size,
    window,
    softmax_scale,
    stride_qb,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    stride_db,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DOC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    """The query heads that share a key head attend to one split of the cache."""
    n_kv_heads, n_splits = n_heads // group_size, tl.num_programs(1)
    batch = (tl.program_id(0) // n_kv_heads).to(tl.int64)
    kv_head, split = tl.program_id(0) % n_kv_heads, tl.program_id(1)
    first, end = 0, seqlen_k
    if cache_length is not None:
        end = tl.load(cache_length)
    if window is not None:
        first = tl.maximum(end - window, 0)
    length = tl.cdiv(tl.cdiv(end - first, n_splits), BLOCK_N) * BLOCK_N
    lo, hi = first + split * length, tl.minimum(first + (split + 1) * length, end)
    h_H1, k_1K = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_DMODEL)[None, :]
    s_S = tl.arange(0, BLOCK_N)
    q += batch * stride_qb + (kv_head * group_size + h_H1) * HEAD_DIM
    q_HK = tl.load(q + k_1K, mask=(h_H1 < group_size) & (k_1K < HEAD_DIM), other=0.0)
    k += batch * stride_kb + kv_head * HEAD_DIM
    v += batch * stride_vb + kv_head * HEAD_DIM
    if documents is not None:
        # Keys before the token's own document are not loaded: of the split, its last `count` are.
        documents, count, n_N = documents + batch * stride_db, 0, tl.arange(0, BLOCK_DOC)
        own = tl.load(documents + end - 1)
        for n in range(lo, hi, BLOCK_DOC):
            inside_N = n + n_N < hi
            document_N = tl.load(documents + n + n_N, mask=inside_N, other=0)
            count += tl.sum((inside_N & (document_N == own)).to(tl.int32), axis=0)
        lo = hi - count

    acc_HK, l_H = tl.zeros((BLOCK_H, BLOCK_DMODEL), tl.float32), tl.zeros((BLOCK_H,), tl.float32)
    m_H = tl.full((BLOCK_H,), -1e30, tl.float32)
    for s in range(lo, hi, BLOCK_N):
        k_SK = load(k, s, hi, stride_kt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, True)
        v_SK = load(v, s, hi, stride_vt, HEAD_DIM, BLOCK_N, BLOCK_DMODEL, True)
        qk_HS = tl.dot(q_HK, tl.trans(k_SK), input_precision="tf32x3")
        qk_HS = tl.where((s + s_S < hi)[None, :], qk_HS * (softmax_scale * LOG2E), float("-inf"))
        new_m_H = tl.maximum(m_H, tl.max(qk_HS, axis=1))
        p_HS, alpha_H = tl.exp2(qk_HS - new_m_H[:, None]), tl.exp2(m_H - new_m_H)
        acc_HK = tl.dot(
            p_HS.to(v_SK.dtype), v_SK, acc_HK * alpha_H[:, None], input_precision="tf32x3"
        )
        l_H, m_H = l_H * alpha_H + tl.sum(p_HS, axis=1), new_m_H

    own_H1 = (batch * n_heads + kv_head * group_size + h_H1) * n_splits + split
    l_H = tl.maximum(l_H, 1e-30)  # an empty split has no weight
    mask_HK = (h_H1 < group_size) & (k_1K < HEAD_DIM)
    tl.store(out + own_H1 * HEAD_DIM + k_1K, acc_HK / l_H[:, None], mask=mask_HK)
    tl.store(lse + own_H1, (m_H + tl.log2(l_H))[:, None], mask=h_H1 < group_size)


@triton.jit
def decode_combine_kernel(
    split_out,
    lse,
    out,
    n_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
):
    """One head of one sequence: the mean over the splits, weighted by 2^lse. N is BLOCK_SPLITS."""
    own, n_N = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_SPLITS)
    k_1K = tl.arange(0, BLOCK_DMODEL)[None, :]
    lse_N = tl.load(lse + own * n_splits + n_N, mask=n_N < n_splits, other=float("-inf"))
    weight_N = tl.exp2(lse_N - tl.max(lse_N, axis=0))
    offset_NK = (own * n_splits + n_N[:, None]) * HEAD_DIM + k_1K
    mask_NK = (n_N < n_splits)[:, None] & (k_1K < HEAD_DIM)
    split_NK = tl.load(split_out + offset_NK, mask=mask_NK, other=0.0)
    out_1K = (tl.sum(split_NK * weight_N[:, None], axis=0) / tl.sum(weight_N, axis=0))[None, :]
    tl.store(out + own * HEAD_DIM + k_1K, out_1K.to(out.dtype.element_ty), mask=k_1K < HEAD_DIM)


def num_splits(B, S, G, device):
    """Returns into how many parts a cache is split: enough to keep the whole GPU loading."""
    n_programs = dispatch.num_sms(device) * dispatch.config(TABLE, device)[1]
    return max(1, min(triton.cdiv(n_programs, B * G), triton.cdiv(S, MIN_SPLIT), 128))


def new_decode_out(q_B1HK, *_):
    return q_B1HK.new_empty(q_B1HK.shape)


@dispatch.operator("decode_attention", new_decode_out)
def decode_attention(
    q_B1HK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    documents_BS: Tensor | None,
    cache_length: Tensor | None,
    window: int | None,
) -> Tensor:
    """Returns the attention of the newest token, without a gradient.

    cache_length: int32, one number on the GPU: how many of the S positions are filled, so that the
    query is the last of these. None: all are. As it is read on the GPU, a step whose shapes stay
    the same can be captured in a CUDA graph and replayed while the cache fills up.
    """
    out_B1HK = new_decode_out(q_B1HK)
    (B, _, H, head_dim), (S, G) = q_B1HK.shape, k_BSGK.shape[1:3]
    stride_db = None
    if documents_BS is not None:
        documents_BS = documents_BS if documents_BS.stride(1) == 1 else documents_BS.contiguous()
        stride_db = documents_BS.stride(0)
    tensors, (stride_qb, _, *strides) = with_adjacent_heads(q_B1HK, k_BSGK, v_BSGK)
    tile, _, num_warps, num_stages = dispatch.config(TABLE, q_B1HK.device)
    block_dmodel = max(16, triton.next_power_of_2(head_dim))
    n_splits = num_splits(B, S, G, q_B1HK.device)
    blocks = dict(HEAD_DIM=head_dim, BLOCK_DMODEL=block_dmodel, num_warps=num_warps)
    split_out = q_B1HK.new_empty((B, H, n_splits, head_dim), dtype=torch.float32)
    lse = q_B1HK.new_empty((B, H, n_splits), dtype=torch.float32)
    with torch.cuda.device_of(q_B1HK):
        decode_split_kernel[(B * G, n_splits)](
            *tensors,
            split_out,
            lse,
            documents_BS,
            cache_length,
            S,
            H,
            H // G,
            window,
            head_dim**-0.5,
            stride_qb,
            *strides,
            stride_db,
            BLOCK_H=max(16, triton.next_power_of_2(H // G)),
            BLOCK_DOC=1024,
            BLOCK_N=max(16, tile // (block_dmodel * q_B1HK.element_size())),
            num_stages=num_stages,
            **blocks,
        )
        decode_combine_kernel[(B * H,)](
            split_out,
            lse,
            out_B1HK,
            n_splits,
            BLOCK_SPLITS=triton.next_power_of_2(n_splits),
            **blocks,
        )
    return out_B1HK
