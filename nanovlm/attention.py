"""Attention: every query looks at the keys it may see and takes the average of their values, weighted by likeness.

    weights = softmax(query · key / sqrt(K))        over the keys that this query may see
    out     = weights · values

A query may see a key if all of these hold (positions count from the start of the row):

    causal      the key is not later than the query
    window      the key is less than `window` positions before it (Mistral 7B v0.1: 4096)
    documents   both carry the same document number: samples packed into one row never see each other, and padding sees nothing of a sample
"""
import math

import torch
import torch.nn.functional as F

from . import kernels
from .decode import decode, with_strides
from .kernels import tl, triton

LARGEST = {2: 256, 4: 128}  # numbers of a head that the kernels take, by a number's bytes: more do not fit the registers


def visible(T, S, *, causal=True, window=None, documents_BS=None, device=None, filled=None):
    """Who may see whom: bool of (B or 1, T, S), True where query t (the last T of S positions, or of the `filled` ones) may see key s."""
    query_T1 = torch.arange(-T, 0, device=device)[:, None] + (S if filled is None else filled)
    key_1S = torch.arange(S, device=device)[None, :]
    mask_1TS = torch.ones(1, T, S, dtype=torch.bool, device=device)
    if causal:
        mask_1TS = mask_1TS & (key_1S <= query_T1)
    if window is not None:
        mask_1TS = mask_1TS & ((query_T1 - key_1S).abs() < window)
    if documents_BS is None:
        return mask_1TS
    own_BT = documents_BS[:, S - T :] if filled is None else documents_BS[:, query_T1.flatten()]
    return mask_1TS & (own_BT[:, :, None] == documents_BS[:, None, :])


def attention(q_BTHK, k_BSGK, v_BSGK, *, causal=True, window=None, documents_BS=None, filled=None):
    """softmax(q·k / sqrt(K))·v with the queries as the last T of the S positions; H query heads share G key/value heads.

    documents_BS: int, one number a sample, whose tokens stand side by side; None if every row is one sample. Returns out_BTHK. Source: Vaswani
    et al. 2017; grouped queries: Ainslie et al. 2023. A query sees at least itself, so no row of the softmax is empty.
    filled: where T is 1, an int32 tensor of one number: so many of the S positions are filled, and the query is the last of these; None: all.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if kernels.run(q_BTHK, refusal, q_BTHK, k_BSGK, v_BSGK):
        return by_kernels(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS, filled)
    if documents_BS is not None and T == S and q_BTHK.device.type == "cpu":
        return by_document(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS)
    if T == 1 and documents_BS is None and window is None and filled is None:
        causal = False  # the newest token sees everything before it: no mask to build
    full = not causal or T == S
    mask = None
    if window is not None or documents_BS is not None or not full:
        mask = visible(T, S, causal=causal, window=window, documents_BS=documents_BS, device=q_BTHK.device, filled=filled)[:, None]  # for all heads
    if T == 1:  # heads that share their keys ask as if they were several queries: one at a time, a CPU takes up to 7 times as long (in bfloat16)
        q_BGhK = q_BTHK.reshape(len(q_BTHK), k_BSGK.shape[2], -1, q_BTHK.shape[3])
        seen_BGhK = F.scaled_dot_product_attention(q_BGhK, k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2), attn_mask=mask)
        return seen_BGhK.reshape(q_BTHK.shape)
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def begins(documents_BS):
    """Where a document's first token stands: bool of (B, S)."""
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return begins_BS


@torch.compiler.disable  # how many documents there are is known when they are there
def by_document(q_BTHK, k_BTGK, v_BTGK, causal, window, documents_BT):
    """`attention` to one document after another: of pairs in different ones nothing is computed, where a mask would only hide them. A card
    would wait for the lengths in every layer."""
    starts = begins(documents_BT).flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], documents_BT.numel()], strict=True)]
    parts = zip(*(x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q_BTHK, k_BTGK, v_BTGK)), strict=True)
    seen = [attention(q_1tHK, k_1tGK, v_1tGK, causal=causal, window=window if window is not None and window < q_1tHK.shape[1] else None)
            for q_1tHK, k_1tGK, v_1tGK in parts]
    return torch.cat(seen, dim=1).view(q_BTHK.shape)


def refusal(q_BTHK, k_BSGK, v_BSGK):
    """Why the kernels do not take these, empty if they do."""
    mixed = kernels.autocast_dtype(q_BTHK)
    dtype = mixed or q_BTHK.dtype
    largest = LARGEST.get(dtype.itemsize, 0)
    if q_BTHK.shape[-1] > largest:
        return f"attention with heads of more than {largest} numbers in {dtype}"
    if not (mixed or q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype):
        return "attention with queries, keys and values of several dtypes"
    return ""


def by_kernels(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS, filled):
    """`attention` by the kernels below; under autocast in its dtype, as PyTorch's own."""
    if dtype := kernels.autocast_dtype(q_BTHK):
        q_BTHK, k_BSGK, v_BSGK = (x.to(dtype) for x in (q_BTHK, k_BSGK, v_BSGK))
    if filled is not None or (causal and q_BTHK.shape[1] == 1 and not torch.is_grad_enabled()):
        return decode(q_BTHK, k_BSGK, v_BSGK, documents_BS, filled, window)
    first_BS, last_BS = (None, None) if documents_BS is None else bounds(documents_BS)
    return torch.ops.nanovlm.attention(q_BTHK, k_BSGK, v_BSGK, first_BS, last_BS, causal, window)[0]


# ---- The same in Triton. A program takes T queries of one head and walks over the keys that they may see, S at a time. What it has so far, the
# average and its weights' sum, is kept in registers and scaled down whenever a higher score turns up (Milakov & Gimelshein 2018; Dao 2023), so
# that nothing of the size T × S ever leaves the chip: q, k, v are read and out is written, no more. In these kernels capitals are sizes of
# blocks, K the size of a head rounded up to a power of two; scores are taken to base 2, the exponential that a card has an instruction for.
#
# By all three rules together a query sees an unbroken run of positions, low to high, and a later query's run begins and ends no earlier. So of
# the keys that a block of queries sees, those from the last query's low to the first one's high are seen by all of it: they need no mask, and
# have a loop of their own. Keys that nobody in the block sees are never fetched.


@triton.jit
def run_of(at, first, last, least, keys, window, CAUSAL: tl.constexpr, BY: tl.constexpr):
    """The positions, low and high included, that tokens at positions `at` see; BY: by which they are seen, `least` on."""
    low, high = at * 0 + least, at * 0 + keys - 1
    if first is not None:
        low, high = tl.maximum(low, tl.load(first + at)), tl.load(last + at)
    if window is not None:
        low, high = tl.maximum(low, at - window + 1), tl.minimum(high, at + window - 1)
    if CAUSAL and BY:
        low = tl.maximum(low, at)
    if CAUSAL and not BY:
        high = tl.minimum(high, at)
    return low, high


@triton.jit
def runs_of(start, count, past, first, last, least, keys, window, ROWS: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr, BY: tl.constexpr):
    """The runs of ROWS tokens from number `start` of `count` on, `past` positions before the first; and where to walk along them in steps:
    masked from begin to full, without a mask from full to rest, masked from rest to end."""
    low, high = run_of(past + tl.minimum(start + tl.arange(0, ROWS), count - 1), first, last, least, keys, window, CAUSAL, BY)
    begin, high_of_first = run_of(past + start, first, last, least, keys, window, CAUSAL, BY)
    low_of_last, end = run_of(past + tl.minimum(start + ROWS, count) - 1, first, last, least, keys, window, CAUSAL, BY)
    full = begin + tl.cdiv(tl.maximum(low_of_last - begin, 0), STEP) * STEP
    rest = full + tl.maximum(high_of_first + 1 - full, 0) // STEP * STEP
    return low, high, (begin, full, rest, end + 1)


@triton.jit
def steps_in(cuts, STEP: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return (cuts[1] - cuts[0]) // STEP + tl.cdiv(tl.maximum(cuts[3] - cuts[2], 0), STEP)
    return (cuts[2] - cuts[1]) // STEP


@triton.jit
def step_at(i, cuts, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Where step i begins: the masked steps at both ends are one loop, the others another."""
    if MASKED:
        return cuts[0] + i * STEP + tl.where(cuts[0] + i * STEP < cuts[1], 0, cuts[2] - cuts[1])
    return cuts[1] + i * STEP


@triton.jit
def load(x, start, end, stride, size: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):
    """ROWS vectors from number `start` on; 0 in place of what lies past the size of a head or, if MASKED, past number `end`."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, K)[None, :]
    place = x + tl.cast(start, tl.int64) * stride + row * stride + column
    if MASKED:
        return tl.load(place, mask=(start + row < end) & (column < size), other=0.0)
    elif size < K:
        return tl.load(place, mask=column < size, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store(x, start, end, stride, value, size: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, K)[None, :]
    place = x + tl.cast(start, tl.int64) * stride + row * stride + column
    tl.store(place, value.to(x.dtype.element_ty), mask=(start + row < end) & (column < size))


@triton.jit
def look(out_TK, total_T, peak_T, q_TK, k, v, k_token, v_token, low_T, high_T, cuts, keys, scale,
         size: tl.constexpr, S: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):
    """The queries look at the keys from begin to end: out = Σ 2^(score - peak) · value, total = Σ 2^(score - peak)."""
    for i in range(steps_in(cuts, S, MASKED)):
        s = step_at(i, cuts, S, MASKED)
        k_SK = load(k, s, keys, k_token, size, S, K, MASKED)
        score_TS = tl.dot(q_TK, tl.trans(k_SK), input_precision="tf32x3")
        if MASKED:
            s_1S = s + tl.arange(0, S)[None, :]
            score_TS = tl.where((s_1S >= low_T[:, None]) & (s_1S <= high_T[:, None]), score_TS, float("-inf"))
        higher_T = tl.maximum(peak_T, tl.max(score_TS, axis=1) * scale)
        weight_TS, shrink_T = tl.exp2(score_TS * scale - higher_T[:, None]), tl.exp2(peak_T - higher_T)
        v_SK = load(v, s, keys, v_token, size, S, K, MASKED)
        out_TK = tl.dot(weight_TS.to(v_SK.dtype), v_SK, out_TK * shrink_T[:, None], input_precision="tf32x3")
        total_T, peak_T = total_T * shrink_T + tl.sum(weight_TS, axis=1), higher_T
    return out_TK, total_T, peak_T


@triton.jit
def forward_kernel(q, k, v, out, lse, first, last, queries, keys, heads, group, window, scale,
                   q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
                   size: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * T  # causal queries see the more the later they are: the longest work first
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    q, q_token = q + (row * q_row + head * q_head) * UNIT, q_token * UNIT
    k, k_token = k + (row * k_row + head // group * k_head) * UNIT, k_token * UNIT
    v, v_token = v + (row * v_row + head // group * v_head) * UNIT, v_token * UNIT
    if first is not None:
        first, last = first + row * keys, last + row * keys
    low_T, high_T, cuts = runs_of(start, queries, keys - queries, first, last, 0, keys, window, T, S, CAUSAL, False)

    q_TK = load(q, start, queries, q_token, size, T, K, True)
    out_TK, total_T, peak_T = tl.zeros((T, K), tl.float32), tl.zeros((T,), tl.float32), tl.full((T,), -1e30, tl.float32)  # -inf - -inf is no number
    for masked in tl.static_range(2):
        out_TK, total_T, peak_T = look(out_TK, total_T, peak_T, q_TK, k, v, k_token, v_token, low_T, high_T, cuts, keys, scale,
                                       size, S, K, masked)
    store(out + (row * queries * heads + head) * size, start, queries, heads * size, out_TK / total_T[:, None], size, T, K)
    t_T = start + tl.arange(0, T)
    tl.store(lse + (row * heads + head) * queries + t_T, peak_T + tl.log2(total_T), mask=t_T < queries)


# ---- Backward. With pull = grad_out · value, the change that a weight would make,
#
#     grad_value = Σ over queries of weight · grad_out         grad_score = weight · (pull - Σ over keys of weight · pull)
#     grad_query = Σ over keys of grad_score · key / √K        grad_key   = Σ over queries of grad_score · query / √K
#
# where Σ weight · pull is out · grad_out, which needs no walk. The weights are computed anew from lse, log2 Σ 2^score: to read them back would take
# longer. One kernel takes a block of queries and walks over keys, the other takes a block of keys and walks over queries: that is 7 products for 5,
# but every sum has one owner and one order, so that a run can be repeated to the bit.


@triton.jit
def gather_q(grad_q_TK, q_TK, grad_TK, lse_T, delta_T, k, v, k_token, v_token, low_T, high_T, cuts, keys, scale,
             size: tl.constexpr, S: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):
    for i in range(steps_in(cuts, S, MASKED)):
        s = step_at(i, cuts, S, MASKED)
        k_SK = load(k, s, keys, k_token, size, S, K, MASKED)
        v_SK = load(v, s, keys, v_token, size, S, K, MASKED)
        weight_TS = tl.exp2(tl.dot(q_TK, tl.trans(k_SK), input_precision="tf32x3") * scale - lse_T[:, None])
        if MASKED:
            s_1S = s + tl.arange(0, S)[None, :]
            weight_TS = tl.where((s_1S >= low_T[:, None]) & (s_1S <= high_T[:, None]), weight_TS, 0.0)
        pull_TS = tl.dot(grad_TK, tl.trans(v_SK), input_precision="tf32x3")
        grad_score_TS = (weight_TS * (pull_TS - delta_T[:, None])).to(k_SK.dtype)
        grad_q_TK = tl.dot(grad_score_TS, k_SK, grad_q_TK, input_precision="tf32x3")
    return grad_q_TK


@triton.jit
def backward_q_kernel(grad, q, k, v, out, lse, delta, grad_q, first, last, queries, keys, heads, group, window, scale, pace,
                      grad_row, grad_token, grad_head, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
                      size: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    """The gradient of T queries; and delta, out · grad_out, for the other kernel."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * T
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    own = (row * queries * heads + head) * size
    if first is not None:
        first, last = first + row * keys, last + row * keys
    low_T, high_T, cuts = runs_of(start, queries, keys - queries, first, last, 0, keys, window, T, S, CAUSAL, False)
    k, k_token = k + (row * k_row + head // group * k_head) * UNIT, k_token * UNIT
    v, v_token = v + (row * v_row + head // group * v_head) * UNIT, v_token * UNIT

    grad_TK = load(grad + (row * grad_row + head * grad_head) * UNIT, start, queries, grad_token * UNIT, size, T, K, True)
    out_TK = load(out + own, start, queries, heads * size, size, T, K, True)
    t_T, line = start + tl.arange(0, T), (row * heads + head) * queries
    delta_T = tl.sum(out_TK.to(tl.float32) * grad_TK.to(tl.float32), axis=1)
    tl.store(delta + line + t_T, delta_T, mask=t_T < queries)
    lse_T = tl.load(lse + line + t_T, mask=t_T < queries, other=float("inf"))
    q_TK = load(q + (row * q_row + head * q_head) * UNIT, start, queries, q_token * UNIT, size, T, K, True)
    grad_q_TK = tl.zeros((T, K), tl.float32)
    for masked in tl.static_range(2):
        grad_q_TK = gather_q(grad_q_TK, q_TK, grad_TK, lse_T, delta_T, k, v, k_token, v_token, low_T, high_T, cuts, keys, scale,
                             size, S, K, masked)
    store(grad_q + own, start, queries, heads * size, grad_q_TK * pace, size, T, K)


@triton.jit
def gather_kv(grad_k_SK, grad_v_SK, k_SK, v_SK, q, grad, lse, delta, q_token, q_head, grad_token, grad_head, low_S, high_S, cuts, group, queries,
              past, scale, size: tl.constexpr, T: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):
    steps = steps_in(cuts, T, MASKED)
    for i in range(group * steps):
        head, t = i // steps, step_at(i % steps, cuts, T, MASKED)
        t_T = t - past + tl.arange(0, T)
        q_TK = load(q + head * q_head, t - past, queries, q_token, size, T, K, MASKED)
        grad_TK = load(grad + head * grad_head, t - past, queries, grad_token, size, T, K, MASKED)
        lse_T = tl.load(lse + head * queries + t_T, mask=t_T < queries, other=float("inf"))
        weight_ST = tl.exp2(tl.dot(k_SK, tl.trans(q_TK), input_precision="tf32x3") * scale - lse_T[None, :])
        if MASKED:
            t_1T = t + tl.arange(0, T)[None, :]
            weight_ST = tl.where((t_1T >= low_S[:, None]) & (t_1T <= high_S[:, None]), weight_ST, 0.0)
        grad_v_SK = tl.dot(weight_ST.to(grad_TK.dtype), grad_TK, grad_v_SK, input_precision="tf32x3")
        pull_ST = tl.dot(v_SK, tl.trans(grad_TK), input_precision="tf32x3")
        delta_T = tl.load(delta + head * queries + t_T, mask=t_T < queries, other=0.0)
        grad_score_ST = (weight_ST * (pull_ST - delta_T[None, :])).to(q_TK.dtype)
        grad_k_SK = tl.dot(grad_score_ST, q_TK, grad_k_SK, input_precision="tf32x3")
    return grad_k_SK, grad_v_SK


@triton.jit
def backward_kv_kernel(grad, q, k, v, lse, delta, grad_k, grad_v, first, last, queries, keys, heads, group, window, scale, pace,
                       grad_row, grad_token, grad_head, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
                       size: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    """The gradients of S keys and values, from the queries of all heads that share them."""
    start, past, shared = tl.program_id(1) * S, keys - queries, heads // group
    row, head = (tl.program_id(0) // shared).to(tl.int64), tl.program_id(0) % shared
    if first is not None:
        first, last = first + row * keys, last + row * keys
    low_S, high_S, cuts = runs_of(start, keys, 0, first, last, past, keys, window, S, T, CAUSAL, True)
    k_SK = load(k + (row * k_row + head * k_head) * UNIT, start, keys, k_token * UNIT, size, S, K, True)
    v_SK = load(v + (row * v_row + head * v_head) * UNIT, start, keys, v_token * UNIT, size, S, K, True)
    grad_k_SK, grad_v_SK = tl.zeros((S, K), tl.float32), tl.zeros((S, K), tl.float32)
    q, q_token, q_head = q + (row * q_row + head * group * q_head) * UNIT, q_token * UNIT, q_head * UNIT
    grad, grad_token, grad_head = grad + (row * grad_row + head * group * grad_head) * UNIT, grad_token * UNIT, grad_head * UNIT
    lse, delta = lse + (row * heads + head * group) * queries, delta + (row * heads + head * group) * queries
    for masked in tl.static_range(2):
        grad_k_SK, grad_v_SK = gather_kv(grad_k_SK, grad_v_SK, k_SK, v_SK, q, grad, lse, delta, q_token, q_head, grad_token, grad_head, low_S, high_S,
                                         cuts, group, queries, past, scale, size, T, K, masked)
    own = (row * keys * shared + head) * size
    store(grad_k + own, start, keys, shared * size, grad_k_SK * pace, size, S, K)
    store(grad_v + own, start, keys, shared * size, grad_v_SK, size, S, K)


# ---- What PyTorch knows of them: an operator, its shapes, its derivative.

LOG2E = math.log2(math.e)
FLOAT32 = {(64, 4): ((32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)), (128, 4): ((16, 32, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1))}
TABLE = {  # compute capability: {(K, bytes of a number): (T, S, warps, stages of loads) forward, of the gradients of k and v, of the gradient of q}
    (0, 0): {(256, 4): ((32, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1))},  # the interpreter: small, so that short rows have several blocks
    (8, 0): {(64, 2): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
             (128, 2): ((128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
             (256, 2): ((64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)), **FLOAT32},
    (9, 0): {(64, 2): ((128, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 3)),
             (128, 2): ((128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2)),
             (256, 2): ((64, 64, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)), **FLOAT32},  # 64 keys would spill 8 bytes
    (10, 0): {(64, 2): ((128, 64, 8, 3), (64, 128, 8, 3), (128, 64, 4, 2)),
              (128, 2): ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
              (256, 2): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)), **FLOAT32},  # triton 3.6 spills with 8 warps where these have 4
}


def bounds(documents_BS):
    """The first and the last position of the document that each position is part of."""
    S = documents_BS.shape[1]
    s_S = torch.arange(S, device=documents_BS.device, dtype=torch.int32)
    begins_BS, ends_BS = begins(documents_BS), torch.ones_like(documents_BS, dtype=torch.bool)
    ends_BS[:, :-1] = begins_BS[:, 1:]
    first_BS = torch.where(begins_BS, s_S, 0).cummax(1).values
    last_BS = torch.where(ends_BS, s_S, S - 1).flip(1).cummin(1).values.flip(1)
    return first_BS, last_BS


def blocks(x_BTHK):
    """Of the operators on such tensors: the forward pass's block, that of the gradients of k and v, that of q's; and K, a power of two."""
    wide, rows = max(16, triton.next_power_of_2(x_BTHK.shape[-1])), kernels.pick(TABLE, x_BTHK.device)
    return *rows[min(row for row in rows if row[0] >= wide and row[1] >= x_BTHK.element_size())], wide


@torch.library.custom_op("nanovlm::attention", mutates_args=())
def forward(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, first_BS: torch.Tensor | None, last_BS: torch.Tensor | None,
            causal: bool, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_BTHK, lse_BHT: log2 of the sum of each query's weights before they are normed, which the backward pass starts from)"""
    out_BTHK, lse_BHT = forward_shapes(q_BTHK, k_BSGK, v_BSGK, first_BS, last_BS, causal, window)
    B, T, H, size = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    tensors, strides, unit = with_strides(q_BTHK, k_BSGK, v_BSGK)
    (t, s, warps, stages), _, _, wide = blocks(q_BTHK)
    if out_BTHK.numel():
        with torch.cuda.device_of(q_BTHK):
            forward_kernel[(B * H, triton.cdiv(T, t))](
                *tensors, out_BTHK, lse_BHT, first_BS, last_BS, T, S, H, H // G, window, LOG2E / size**0.5, *strides, size=size,
                CAUSAL=causal, UNIT=unit, T=t, S=s, K=wide, num_warps=warps, num_stages=stages)
    return out_BTHK, lse_BHT


@forward.register_fake
def forward_shapes(q_BTHK, k_BSGK, v_BSGK, first_BS, last_BS, causal, window):
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(q_BTHK.shape), q_BTHK.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("nanovlm::attention_backward", mutates_args=())
def backward(grad_BTHK: torch.Tensor, q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, out_BTHK: torch.Tensor, lse_BHT: torch.Tensor,
             first_BS: torch.Tensor | None, last_BS: torch.Tensor | None, causal: bool, window: int | None) -> tuple[
                 torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    grads = backward_shapes(grad_BTHK, q_BTHK, k_BSGK, v_BSGK, out_BTHK, lse_BHT, first_BS, last_BS, causal, window)
    B, T, H, size = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    (grad_BTHK, q_BTHK, k_BSGK, v_BSGK), strides, unit = with_strides(grad_BTHK, q_BTHK, k_BSGK, v_BSGK)
    delta_BHT = torch.empty_like(lse_BHT)
    numbers = first_BS, last_BS, T, S, H, H // G, window, LOG2E / size**0.5, 1 / size**0.5, *strides
    _, kv, (t, s, warps, stages), wide = blocks(q_BTHK)
    with torch.cuda.device_of(q_BTHK):
        if q_BTHK.numel():
            backward_q_kernel[(B * H, triton.cdiv(T, t))](
                grad_BTHK, q_BTHK, k_BSGK, v_BSGK, out_BTHK, lse_BHT, delta_BHT, grads[0], *numbers, size=size, CAUSAL=causal, UNIT=unit, T=t, S=s,
                K=wide, num_warps=warps, num_stages=stages)
        t, s, warps, stages = kv
        if k_BSGK.numel():
            backward_kv_kernel[(B * G, triton.cdiv(S, s))](
                grad_BTHK, q_BTHK, k_BSGK, v_BSGK, lse_BHT, delta_BHT, grads[1], grads[2], *numbers, size=size, CAUSAL=causal, UNIT=unit, T=t, S=s,
                K=wide, num_warps=warps, num_stages=stages)
    return grads


@backward.register_fake
def backward_shapes(grad_BTHK, q_BTHK, k_BSGK, v_BSGK, out_BTHK, lse_BHT, first_BS, last_BS, causal, window):
    return tuple(x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGK))


def setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def differentiate(ctx, grad_BTHK, _):
    if grad_BTHK is None:
        return (None,) * 7
    grads = torch.ops.nanovlm.attention_backward(grad_BTHK, *ctx.saved_tensors, ctx.causal, ctx.window)
    return *grads, None, None, None, None


torch.library.register_autograd("nanovlm::attention", differentiate, setup_context=setup_context)
