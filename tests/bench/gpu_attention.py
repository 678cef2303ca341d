"""Attention's part of gpu.py: what holds its kernels to float64, what times them, what finds their blocks.

`run` carries the card, what dtype to draw random inputs in, and gpu.py's own hold, measure and row.
"""
import itertools
import re
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovlm import Mistake, attention, decode, kernels

HEADS = dict(H=32, G=8, K=128)  # Mistral 7B
TOKENS = 16384  # in all rows together


def tensors(run, B, T, S, *, H, G, K):
    return [run.random(B, tokens, heads, K) for tokens, heads in ((T, H), (S, G), (S, G))]


def packed(B, S, count, device):
    """Document numbers of rows that hold `count` samples each, of lengths that differ, and padding, -1."""
    starts = torch.rand(B, S, device=device).argsort(1)[:, : count - 1]
    documents_BS = torch.zeros(B, S, dtype=torch.int32, device=device).scatter_(1, starts, 1).cumsum(1, dtype=torch.int32)
    documents_BS[:, S - S // 50 :] = -1
    return documents_BS


# ---- correct first ----

def check(run):
    sizes = (72,) if run.dry else (64, 72, 80, 96, 128, 256)
    for K, (B, T, S) in itertools.product(sizes, [(1, 17, 37)] if run.dry else [(2, 577, 577), (1, 333, 1031), (3, 130, 130)]):
        given = tensors(run, B, T, S, H=4, G=2, K=K)
        documents_BS = packed(B, S, 5, run.device)
        for rules in ({}, {"causal": False}, {"window": 29}, {"documents_BS": documents_BS}, {"documents_BS": documents_BS, "window": 99}):
            names = ", ".join(name if torch.is_tensor(rule) else f"{name} {rule}" for name, rule in rules.items()) or "causal"
            run.hold(f"attention {B} × {T} of {S}, heads of {K}, {names}", lambda *x, rules=rules: attention.attention(*x, **rules), given)
    for K, S in itertools.product(sizes, (37,) if run.dry else (1, 301, 8193)):
        check_decode(run, tensors(run, 3, 1, S, H=8, G=2, K=K), (torch.arange(S, device=run.device) >= S // 3).int().expand(3, -1))


@torch.no_grad()
def check_decode(run, given, documents_BS):
    for rules in ({}, {"documents_BS": documents_BS}, {"window": 100}):
        found = []
        for choice, dtype in (("triton", run.dtype), ("torch", torch.float64)):
            with mock.patch.object(kernels, "choice", choice):
                found.append(attention.attention(*(x.to(dtype) for x in given), **rules).double())
        error = ((found[0] - found[1]).norm() / found[1].norm()).item()
        if not error < 1e-2:
            raise Mistake(f"decode over {documents_BS.shape[1]} keys, {list(rules)}: off by {error:.1e}, more than 1e-02")
    print(f"decode over {documents_BS.shape[1]}, heads of {given[0].shape[3]}: as in float64", flush=True)


# ---- then time ----

def able(contestants):
    """({name: call} of those that run, {name: why not} of the others); a baseline may refuse a shape, ours may not."""
    runs, not_run = {}, {}
    for name, call in contestants.items():
        try:
            call(0)
            runs[name] = call
        except (ImportError, RuntimeError, ValueError, TypeError) as e:
            if name == "ours":
                raise
            not_run[name] = f"does not run: {type(e).__name__}"
    return runs, not_run


def heads_first(tensors):
    return [x.transpose(1, 2) for x in tensors]


def cudnn(q_BTHK, k_BSGK, v_BSGK):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*heads_first((q_BTHK, k_BSGK, v_BSGK)), is_causal=True, enable_gqa=True).transpose(1, 2)


def flex(rule, B, T, device):
    """FlexAttention, compiled, of a rule (row, head, query, key) -> bool, whose mask of blocks is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    compiled = torch.compile(flex_attention)
    mask = create_block_mask(rule, B, None, T, T, device=device)
    return lambda *x: compiled(*heads_first(x), block_mask=mask, enable_gqa=True).transpose(1, 2)


def varlen(documents_BT):
    from torch.nn.attention.varlen import varlen_attn
    flat = (documents_BT + torch.arange(len(documents_BT), device=documents_BT.device)[:, None] * (documents_BT.max() + 2)).flatten()
    lengths = flat.unique_consecutive(return_counts=True)[1]
    ends, most = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())

    def call(q_BTHK, k_BSGK, v_BSGK):  # it shares no heads
        q, k, v = (x.flatten(0, 1) for x in (q_BTHK, *(x.repeat_interleave(HEADS["H"] // HEADS["G"], 2) for x in (k_BSGK, v_BSGK))))
        return varlen_attn(q, k, v, ends, ends, most, most, is_causal=True)

    return call


def pairs_seen(T, device, **rules):
    """How many (query, key) pairs of a row count: what is useful of the work."""
    return int(attention.visible(T, T, device=device, **rules).sum())


def both_ways(run, what, functions, given, seconds, aims):
    """Two rows of the table: forward, and backward through what forward left; seconds: how long forward takes at the card's or a given rate."""
    runs, missing = able({name: lambda i, f=f: f(*given[i % len(given)]) for name, f in functions.items()})
    with torch.no_grad():
        took = run.measure(runs, run.rounds)
    more = {name: bound for name, bound in seconds.items() if name != "card"}
    yield run.row(f"attention forward, {what}", took | missing | more, seconds["card"], aims[0])

    leaves = [[x.clone().requires_grad_() for x in tensors] for tensors in given]
    graphs = {name: [functions[name](*tensors) for tensors in leaves] for name in runs}
    grads = [torch.randn_like(tensors[0]) for tensors in given]

    def pull(name):
        def call(i):
            i %= len(given)
            out = graphs[name][i]
            return torch.autograd.grad(out, leaves[i], grads[i].view(out.shape), retain_graph=True)
        return call

    runs, failed = able({name: pull(name) for name in graphs})
    took = run.measure(runs, run.rounds)  # 5 products for forward's 2
    yield run.row(f"attention backward, {what}", took | missing | failed | {name: 2.5 * bound for name, bound in more.items()},
                  2.5 * seconds["card"], aims[1])


def time_attention(run):
    own = {}
    for T in (1024, 4096, 16384):
        B = TOKENS // T
        given = [tensors(run, B, T, T, **HEADS) for _ in range(3)]
        work = 4 * HEADS["H"] * HEADS["K"] * B * T * (T + 1) / 2
        functions = {"ours": attention.attention, "cuDNN": cudnn, "FlexAttention": flex(lambda b, h, q, k: q >= k, None, T, run.device)}
        rows = list(both_ways(run, f"causal, {B} × {T:,}", functions, given, {"card": work / run.rates["matmul"]},
                              ("0.80 × cuDNN, 1.5 × FlexAttention", "0.65 × cuDNN, 1.4 × FlexAttention")))
        own[T] = work / rows[0]["seconds"]
        yield from rows

    T = TOKENS
    documents_BT, window = packed(1, T, 24, run.device), 2048
    given = [tensors(run, 1, T, T, **HEADS) for _ in range(3)]
    one = documents_BT[0]
    for what, rules, rule, more in [
            ("24 documents in 16,384", dict(documents_BS=documents_BT), lambda b, h, q, k: (q >= k) & (one[q] == one[k]), {"varlen_attn": varlen}),
            ("window of 2,048, 16,384", dict(window=window), lambda b, h, q, k: (q >= k) & (q - k < window), {})]:
        functions = {"ours": lambda *x, rules=rules: attention.attention(*x, **rules), "FlexAttention": flex(rule, 1, T, run.device)}
        functions |= {name: make(documents_BT) for name, make in more.items()}
        work = 4 * HEADS["H"] * HEADS["K"] * pairs_seen(T, run.device, **rules)
        seconds = {"card": work / run.rates["matmul"], "own causal rate": work / own[T]}
        aim = "0.85 × own causal rate, 1.3 × FlexAttention, 1.2 × varlen_attn"
        yield from both_ways(run, what, functions, given, seconds, (aim, aim))
    yield from time_decode_attention(run)


@torch.no_grad()
def time_decode_attention(run):
    for B, S in ((1, 65536), (8, 16384), (64, 4096)):
        given = [tensors(run, B, 1, S, **HEADS) for _ in range(3)]
        size = 2 * B * S * HEADS["G"] * HEADS["K"] * 2
        plain = lambda q, k, v: F.scaled_dot_product_attention(*heads_first((q, k, v)), enable_gqa=True)  # noqa: E731
        runs, missing = able({name: lambda i, f=f, given=given: f(*given[i % 3]) for name, f in (("ours", attention.attention), ("SDPA", plain))})
        yield run.row(f"decode attention, {B} × {S:,}, {size >> 20} MiB", run.measure(runs, run.rounds) | missing, size / run.rates["read"],
                      "0.80 of the read rate")


# ---- the tables of blocks ----

def blocks_to_try():
    every = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    return [(t, s, warps, stages) for t, s, warps, stages in every if t * s >= 1024]


def tune(run):
    """The fastest of each kernel's blocks for this card, on rows of 4,096, written into the tables."""
    capability = kernels.capability(run.device)
    table = attention.TABLE[capability]
    for K in (64, 128, 256):
        row = table[K, 2]
        given = [x.requires_grad_() for x in tensors(run, 4, 4096, 4096, H=32, G=8, K=K)]
        out_BTHK, lse_BHT = attention.forward(*given, None, None, True, None)
        grad_BTHK = torch.randn_like(out_BTHK)
        calls = [lambda i, given=given: attention.forward(*given, None, None, True, None)]
        calls += [lambda i, rest=(grad_BTHK, *given, out_BTHK, lse_BHT): attention.backward(*rest, None, None, True, None)] * 2
        best = list(row)
        for place, call in enumerate(calls):
            best[place] = fastest(run, table, (K, 2), best, place, call)
        print(f"attention, heads of {K}: {row} -> {tuple(best)}", flush=True)
        rewrite(attention, rf"({re.escape(str(capability))}: {{.*?{re.escape(str((K, 2)))}: )\(\(.*?\)\)", str(tuple(best)))
    q, k, v = tensors(run, 8, 1, 16384, **HEADS)
    with torch.no_grad():
        line = fastest_line(run, decode.TABLE, capability, lambda i: attention.attention(q, k, v),
                            itertools.product((32, 64, 128), (1, 2, 3, 4), (2, 4, 8), (2, 3, 4)))
    print(f"decode: {decode.TABLE[capability]} -> {line}", flush=True)
    rewrite(decode, rf"({re.escape(str(capability))}: )\(.*?\)", str(line))


def fastest_line(run, table, key, call, candidates):
    times = {}
    for line in candidates:
        with mock.patch.dict(table, {key: line}):
            try:
                times[line] = run.measure({"it": call}, 5)["it"]
            except triton.runtime.errors.OutOfResources:
                continue
    return min(times, key=times.get)


def fastest(run, table, key, row, place, call):
    rows = [tuple(line if i == place else block for i, block in enumerate(row)) for line in blocks_to_try()]
    return fastest_line(run, table, key, call, rows)[place]


def rewrite(module, pattern, line):
    path = Path(module.__file__)
    path.write_text(re.sub(pattern, lambda match: match[1] + line, path.read_text(), count=1, flags=re.DOTALL))
