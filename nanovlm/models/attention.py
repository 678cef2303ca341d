"""Attention: every query takes an average of values, weighted by how well their keys match it.

    weights = softmax(query · key / sqrt(K))        over the keys that the query may attend to
    out     = weights · values

A query may attend to a key if all of these hold (positions count from the start of a sequence):

    causal      the key is not later than the query
    window      the key is less than `window` positions away (Mistral 7B v0.1: 4096)
    documents   both have the same document id: samples packed into one sequence never see each
                other, and padding has an id of its own

Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023. On a GPU, kernels/ computes the
same (attention_forward.py, attention_backward.py, and decode_attention.py for a single query).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import dispatch


class Attention(nn.Module):
    """Calls `attention`. It has no parameters; it is a module for forward hooks, which get the very
    queries and keys, after RoPE. causal, window: see the top of this file."""

    def __init__(self, *, causal=True, window=None):
        super().__init__()
        self.causal, self.window = causal, window

    def forward(self, q_BTHK, k_BSGK, v_BSGK, documents_BS=None, cache_length=None, bounds=None):
        rules = self.causal, self.window, documents_BS, cache_length, bounds
        return attention(q_BTHK, k_BSGK, v_BSGK, *rules)


def attention(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    causal=True,
    window=None,
    documents_BS=None,
    cache_length=None,
    bounds=None,
):
    """Returns out_BTHK. The queries are the last T of S positions; H query heads share G key heads.

    documents_BS: a document id (int) for each position; tokens of a document are contiguous. None:
    every sequence is one document. cache_length: how many of the S positions are filled, an int32
    tensor of one number, for T = 1 only; the query is the last of them. None: all are filled.
    bounds: of the documents, for kernels; Decoder computes them once for all layers.
    A query attends at least to itself, so no row of the softmax is empty.
    """
    if kernel := dispatch.kernel("attention", q_BTHK, k_BSGK, v_BSGK):
        return kernel(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS, cache_length, bounds)
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if documents_BS is not None and T == S and q_BTHK.device.type == "cpu":
        return varlen_attention(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS)
    # One query after all its keys needs no mask, and for T = S PyTorch has is_causal.
    options, mask = (window, documents_BS, cache_length), None
    if (causal and 1 < T < S) or any(x is not None for x in options):
        mask = attention_mask(T, S, causal, window, documents_BS, q_BTHK.device, cache_length)
        mask = mask[:, None]  # for all heads
    # scaled_dot_product_attention computes the formula at the top.
    if T == 1:
        # The h query heads that share a key head are passed as h queries of that head. One query
        # for each head takes a CPU up to 7 times as long (in bfloat16).
        q_BGhK = q_BTHK.reshape(len(q_BTHK), k_BSGK.shape[2], -1, q_BTHK.shape[3])
        out_BGhK = F.scaled_dot_product_attention(
            q_BGhK, k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2), attn_mask=mask
        )
        return out_BGhK.reshape(q_BTHK.shape)
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def attention_mask(
    T, S, causal=True, window=None, documents_BS=None, device=None, cache_length=None
):
    """Returns a bool mask (B or 1, T, S): True where query t may attend to key s. The queries are
    the last T of S positions, or of the first `cache_length` positions."""
    end = S if cache_length is None else cache_length
    query_T1 = torch.arange(-T, 0, device=device)[:, None] + end
    key_1S = torch.arange(S, device=device)[None, :]
    mask_1TS = torch.ones(1, T, S, dtype=torch.bool, device=device)
    if causal:
        mask_1TS = mask_1TS & (key_1S <= query_T1)
    if window is not None:
        mask_1TS = mask_1TS & ((query_T1 - key_1S).abs() < window)
    if documents_BS is None:
        return mask_1TS
    index = slice(S - T, S) if cache_length is None else query_T1.flatten()
    query_document_BT = documents_BS[:, index]
    return mask_1TS & (query_document_BT[:, :, None] == documents_BS[:, None, :])


@torch._disable_dynamo  # the number of documents is known only at run time
def varlen_attention(q_BTHK, k_BTGK, v_BTGK, causal, window, documents_BT):
    """Returns `attention`, computed for one document after another: nothing is computed for pairs
    that a mask would hide. On a GPU, reading the lengths would make Python wait in every layer."""
    is_start_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = is_start_BT.flatten().nonzero().flatten().tolist()
    ends = [*starts[1:], documents_BT.numel()]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    q, k, v = (x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = []
    for q_1tHK, k_1tGK, v_1tGK in zip(q, k, v, strict=True):
        fits = window is None or window >= q_1tHK.shape[1]  # then no mask is needed
        own_window = None if fits else window
        out.append(attention(q_1tHK, k_1tGK, v_1tGK, causal, own_window))
    return torch.cat(out, dim=1).view(q_BTHK.shape)
