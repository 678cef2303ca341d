"""The attention part of gpu.py: checks against float64, timings, and the search for blocks.

`run` has the device, the dtype of random inputs, and gpu.py's assert_close, measure, row, fastest,
fit and shared_memory.
"""

import inspect
import itertools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovlm import UserError
from nanovlm.kernels import attention as operators
from nanovlm.kernels import decode_attention, dispatch
from nanovlm.models.attention import attention, attention_mask

HEADS = dict(H=32, G=8, K=128)  # Mistral 7B
TOKENS = 16384  # in all sequences


def tensors(run, B, T, S, *, H, G, K):
    return [run.random(B, tokens, heads, K) for tokens, heads in ((T, H), (S, G), (S, G))]


def packed(B, S, count, device):
    """Document numbers of sequences of `count` samples of different lengths; padding is -1."""
    starts = torch.rand(B, S, device=device).argsort(1)[:, : count - 1]
    documents_BS = (
        torch.zeros(B, S, dtype=torch.int32, device=device)
        .scatter_(1, starts, 1)
        .cumsum(1, dtype=torch.int32)
    )
    documents_BS[:, S - S // 50 :] = -1
    return documents_BS


# ---- correct first ----


def check(run):
    sizes = (72,) if run.dry else (64, 72, 80, 96, 128, 256)
    for K, (B, T, S) in itertools.product(
        sizes, [(1, 17, 37)] if run.dry else [(2, 577, 577), (1, 333, 1031), (3, 130, 130)]
    ):
        given = tensors(run, B, T, S, H=4, G=2, K=K)
        documents_BS = packed(B, S, 5, run.device)
        for rules in (
            {},
            {"causal": False},
            {"window": 29},
            {"documents_BS": documents_BS},
            {"documents_BS": documents_BS, "window": 99},
        ):
            names = (
                ", ".join(
                    name if torch.is_tensor(rule) else f"{name} {rule}"
                    for name, rule in rules.items()
                )
                or "causal"
            )
            run.assert_close(
                f"attention {B} × {T} of {S}, heads of {K}, {names}",
                lambda *x, rules=rules: attention(*x, **rules),
                given,
            )
    for K, S in itertools.product(sizes, (37,) if run.dry else (1, 301, 8193)):
        check_decode(
            run,
            tensors(run, 3, 1, S, H=8, G=2, K=K),
            (torch.arange(S, device=run.device) >= S // 3).int().expand(3, -1),
        )


@torch.no_grad()
def check_decode(run, given, documents_BS):
    S, K = documents_BS.shape[1], given[0].shape[3]
    for what, rules in (
        ("", {}),
        (", documents", {"documents_BS": documents_BS}),
        (", window", {"window": 100}),
    ):
        run.assert_close(
            f"decode over {S}, heads of {K}{what}",
            lambda *x, rules=rules: attention(*x, **rules),
            given,
        )


# ---- then time ----


def heads_first(tensors):
    return [x.transpose(1, 2) for x in tensors]


def cudnn(q_BTHK, k_BSGK, v_BSGK):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(
            *heads_first((q_BTHK, k_BSGK, v_BSGK)), is_causal=True, enable_gqa=True
        ).transpose(1, 2)


def flex(rule, B, T, device):
    """Compiled FlexAttention with the block mask of a rule (sequence, head, query, key) -> bool."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # it stops compiling a function after a number of shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(rule, B, None, T, T, device=device)
    return lambda *x: compiled(*heads_first(x), block_mask=mask, enable_gqa=True).transpose(1, 2)


def varlen(documents_BT):
    from torch.nn.attention.varlen import varlen_attn

    flat = (
        documents_BT
        + torch.arange(len(documents_BT), device=documents_BT.device)[:, None]
        * (documents_BT.max() + 2)
    ).flatten()
    lengths = flat.unique_consecutive(return_counts=True)[1]
    ends, most = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())

    # torch 2.11 has no such parameter, and always shares heads.
    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    shared = {"enable_gqa": True} if has_gqa else {}
    return lambda *x: varlen_attn(
        *(t.flatten(0, 1) for t in x), ends, ends, most, most, window_size=(-1, 0), **shared
    )


def attended_pairs(T, device, **rules):
    """Returns the number of (query, key) pairs of a sequence in the mask: the useful work."""
    return int(attention_mask(T, T, device=device, **rules).sum())


def both_ways(run, what, functions, given, seconds, aims):
    """Yields two lines of the table: forward and backward.

    seconds: of forward at the speed of the GPU, or at another given speed.
    """
    with torch.no_grad():
        took = run.measure(
            {name: lambda i, f=f: f(*given[i % len(given)]) for name, f in functions.items()},
            run.rounds,
        )
    more = {name: bound for name, bound in seconds.items() if name != "gpu"}
    missing = {name: why for name, why in took.items() if isinstance(why, str)}
    yield run.row(f"attention forward, {what}", took | more, seconds["gpu"], aims[0])

    leaves = [[x.clone().requires_grad_() for x in tensors] for tensors in given]
    graphs = {name: {} for name in functions if name not in missing}
    grads = [torch.randn_like(tensors[0]) for tensors in given]

    def backward(name):
        def call(i):
            i %= len(given)
            if i not in graphs[name]:  # in the rounds that warm up
                graphs[name][i] = functions[name](*leaves[i])
            out = graphs[name][i]
            return torch.autograd.grad(out, leaves[i], grads[i].view(out.shape), retain_graph=True)

        return call

    took = run.measure({name: backward(name) for name in graphs}, run.rounds)
    yield run.row(  # backward has 5 products, forward 2
        f"attention backward, {what}",
        took | missing | {name: 2.5 * bound for name, bound in more.items()},
        2.5 * seconds["gpu"],
        aims[1],
    )


def time_attention(run):
    own = {}
    for T in (1024, 4096, 16384):
        B = TOKENS // T
        given = [tensors(run, B, T, T, **HEADS) for _ in range(3)]
        work = 4 * HEADS["H"] * HEADS["K"] * B * T * (T + 1) / 2
        functions = {
            "ours": attention,
            "cuDNN": cudnn,
            "FlexAttention": flex(lambda b, h, q, k: q >= k, None, T, run.device),
        }
        rows = list(
            both_ways(
                run,
                f"causal, {B} × {T:,}",
                functions,
                given,
                {"gpu": work / run.rates["matmul"]},
                ("0.80 × cuDNN, 1.5 × FlexAttention", "0.65 × cuDNN, 1.4 × FlexAttention"),
            )
        )
        own[T] = work / rows[0]["seconds"]
        yield from rows

    T = TOKENS
    documents_BT, window = packed(1, T, 24, run.device), 2048
    given = [tensors(run, 1, T, T, **HEADS) for _ in range(3)]
    one = documents_BT[0]
    for what, rules, rule, more in [
        (
            "24 documents in 16,384",
            dict(documents_BS=documents_BT),
            lambda b, h, q, k: (q >= k) & (one[q] == one[k]),
            {"varlen_attn": varlen},
        ),
        (
            "window of 2,048, 16,384",
            dict(window=window),
            lambda b, h, q, k: (q >= k) & (q - k < window),
            {},
        ),
    ]:
        functions = {
            "ours": lambda *x, rules=rules: attention(*x, **rules),
            "FlexAttention": flex(rule, 1, T, run.device),
        }
        functions |= {name: make(documents_BT) for name, make in more.items()}
        work = 4 * HEADS["H"] * HEADS["K"] * attended_pairs(T, run.device, **rules)
        seconds = {"gpu": work / run.rates["matmul"], "own causal rate": work / own[T]}
        aim = "0.85 × own causal rate, 1.3 × FlexAttention, 1.2 × varlen_attn"
        yield from both_ways(run, what, functions, given, seconds, (aim, aim))
    yield from time_decode_attention(run)


@torch.no_grad()
def time_decode_attention(run):
    for B, S in ((1, 65536), (8, 16384), (64, 4096)):
        given = [tensors(run, B, 1, S, **HEADS) for _ in range(3)]
        size = 2 * B * S * HEADS["G"] * HEADS["K"] * 2
        plain = lambda q, k, v: F.scaled_dot_product_attention(
            *heads_first((q, k, v)), enable_gqa=True
        )  # noqa: E731
        runs = {
            name: lambda i, f=f, given=given: f(*given[i % 3])
            for name, f in (("ours", attention), ("SDPA", plain))
        }
        yield run.row(
            f"decode attention, {B} × {S:,}, {size >> 20} MiB",
            run.measure(runs, run.rounds),
            size / run.rates["read"],
            "0.80 of the read rate",
        )


# ---- the tables of blocks ----


def blocks_to_try(K, place):
    """Yields (T, S, warps, stages): blocks of queries and of keys.

    A program keeps a block of queries and walks over keys; for the gradients of k and v it keeps
    keys and walks over queries.
    """
    for own, other, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if max(own, other) * K <= 2**14:
            yield (other, own, warps, stages) if place == 2 else (own, other, warps, stages)


def tune(run):
    """Write the fastest blocks of each kernel for this GPU into the table; T is 4,096."""
    capability, path = dispatch.capability(run.device), Path(operators.__file__)
    table = dispatch.config(operators.TABLE, run.device)
    if f"{capability}: {{" not in path.read_text():
        raise UserError(f"{path.name} has no rows of its own for {capability}: copy SMALL's first")
    for K in (128, 64, 256):
        given, few = (tensors(run, B, T, T, H=32, G=8, K=K) for B, T in ((4, 4096), (1, 1040)))
        rest = None, None, True, None
        out_BTHK, lse_BHT = operators.attention_forward(*given, *rest)
        grad_BTHK = torch.randn_like(out_BTHK)
        backward = lambda i, x=(grad_BTHK, *given, out_BTHK, lse_BHT, *rest): (
            operators.attention_backward(*x)
        )  # noqa: E731
        for place, call in enumerate(
            (lambda i, x=(*given, *rest): operators.attention_forward(*x), backward, backward),
            start=1,
        ):
            row = table[K, 2] = (0, *table[K, 2][1:])  # 0 bytes: any row may run
            rows = [(*row[:place], block, *row[place + 1 :]) for block in blocks_to_try(K, place)]
            table[K, 2] = run.fastest(
                f"attention, heads of {K}, place {place}",
                table,
                (K, 2),
                rows,
                call,
                (attention, few),
            )
        shared = max(
            run.shared_memory(lambda i, x=given: attention(*x)), run.shared_memory(backward)
        )
        table[K, 2] = (shared, *table[K, 2][1:])
        pattern = rf"({re.escape(str(capability))}: {{.*?{re.escape(str((K, 2)))}: )\([^\n]*\)"
        path.write_text(
            re.sub(pattern, rf"\g<1>{table[K, 2]}", path.read_text(), count=1, flags=re.DOTALL)
        )


@torch.no_grad()
def tune_decode(run):
    given = tensors(run, 8, 1, 16384, **HEADS)
    run.fit(
        decode_attention,
        lambda i: attention(*given),
        itertools.product((32, 64, 128), (1, 2, 3, 4), (2, 4, 8), (2, 3, 4)),
        run,
        (attention, given),
    )
