"""Attention: every query looks at the keys it may see and takes the average of their values, weighted by likeness.

    weights = softmax(query · key / sqrt(K))        over the keys that this query may see
    out     = weights · values

A query may see a key if all of these hold (positions count from the start of the row):

    causal      the key is not later than the query
    window      the key is less than `window` positions before it (Mistral 7B v0.1: 4096)
    documents   both carry the same document number: samples packed into one row never see each other, and padding sees nothing of a sample
"""
import torch
import torch.nn.functional as F


def visible(T, S, *, causal=True, window=None, documents_BS=None, device=None):
    """Who may see whom: bool of (B or 1, T, S), True where query t (the last T of S positions) may see key s."""
    query_T1 = torch.arange(S - T, S, device=device)[:, None]
    key_1S = torch.arange(S, device=device)[None, :]
    mask_1TS = torch.ones(1, T, S, dtype=torch.bool, device=device)
    if causal:
        mask_1TS = mask_1TS & (key_1S <= query_T1)
    if window is not None:
        mask_1TS = mask_1TS & ((query_T1 - key_1S).abs() < window)
    if documents_BS is None:
        return mask_1TS
    return mask_1TS & (documents_BS[:, S - T :, None] == documents_BS[:, None, :])


def attention(q_BTHK, k_BSGK, v_BSGK, *, causal=True, window=None, documents_BS=None):
    """softmax(q·k / sqrt(K))·v with the queries as the last T of the S positions; H query heads share G key/value heads.

    documents_BS: int, one number a sample, whose tokens stand side by side; None if every row is one sample. Returns out_BTHK. Source: Vaswani
    et al. 2017; grouped queries: Ainslie et al. 2023. A query sees at least itself, so no row of the softmax is empty.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if documents_BS is not None and T == S and q_BTHK.device.type == "cpu":
        return by_document(q_BTHK, k_BSGK, v_BSGK, causal, window, documents_BS)
    if T == 1 and documents_BS is None and window is None:
        causal = False  # the newest token sees everything before it: no mask to build
    full = not causal or T == S
    mask = None
    if window is not None or documents_BS is not None or not full:
        mask = visible(T, S, causal=causal, window=window, documents_BS=documents_BS, device=q_BTHK.device)[:, None]  # for all heads
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


@torch.compiler.disable  # how many documents there are is known when they are there
def by_document(q_BTHK, k_BTGK, v_BTGK, causal, window, documents_BT):
    """`attention` to one document after another: of pairs in different ones nothing is computed, where a mask would only hide them. A card
    would wait for the lengths in every layer."""
    edge_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    edge_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = edge_BT.flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], documents_BT.numel()], strict=True)]
    parts = zip(*(x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q_BTHK, k_BTGK, v_BTGK)), strict=True)
    seen = [attention(q_1tHK, k_1tGK, v_1tGK, causal=causal, window=window if window is not None and window < q_1tHK.shape[1] else None)
            for q_1tHK, k_1tGK, v_1tGK in parts]
    return torch.cat(seen, dim=1).view(q_BTHK.shape)
