"""The attention kernels give the numbers of the formula: they run in Triton's interpreter, in
float32 and float16, and are compared with the formula in float64.

As in test_kernels.py, buffers lie between margins of NaN, and gaps inside them are NaN, so that a
read or a write outside shows.
"""

import os
import random
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import test_kernels
import torch
import triton
import triton.language as tl
from conftest import ROOT, make_vlm
from test_kernels import DTYPES, Fences, close, dispatch_choice, make_block
from torch.utils.checkpoint import checkpoint

from nanovlm.kernels import attention as attention_file
from nanovlm.kernels import attention_tiles, decode_attention, dispatch
from nanovlm.kernels.attention import document_bounds
from nanovlm.kernels.attention_tiles import tile_bounds
from nanovlm.models.attention import attention, attention_mask
from nanovlm.models.decoder import KVCache, rope_cos_sin

# triton 3.6's interpreter
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)
SIZES = (64, 72, 80, 96, 128, 256, 8)


@pytest.fixture(autouse=True)
def wide_margins():
    with mock.patch.object(test_kernels, "MARGIN", 1 << 17):  # numbers: more than a block
        yield


def formula(q_BTHK, k_BSGK, v_BSGK, **rules):
    """The definition of attention, for all pairs of queries and keys."""
    (T, H, K), (S, G) = q_BTHK.shape[1:], k_BSGK.shape[1:3]
    k_BSHK, v_BSHK = (x.repeat_interleave(H // G, dim=2) for x in (k_BSGK, v_BSGK))
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / K**0.5
    weight_BHTS = score_BHTS.masked_fill(
        ~attention_mask(T, S, **rules)[:, None], -torch.inf
    ).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weight_BHTS, v_BSHK)


def documents(kind, B, S, draw):
    """Document numbers of a kind of sequences."""
    if kind == "none":
        return None
    if kind == "single":  # of one token each
        return torch.arange(S).expand(B, -1).int()
    if kind == "left":  # padded on the left, as in generation: padding is document 0
        return torch.stack([(torch.arange(S) >= draw.randrange(S)).int() for _ in range(B)])
    starts_BS = torch.tensor([[draw.random() < 0.08 for _ in range(S)] for _ in range(B)])
    documents_BS = starts_BS.cumsum(1)
    for documents_S in documents_BS:  # packed sequences end in padding, document -1
        documents_S[S - draw.randrange(S) // 2 :] = -1
    return documents_BS.int() if draw.random() < 0.5 else documents_BS


def cases(count, seed=0):
    """Random cases. Head sizes and kinds of documents take turns; lengths are one, even, prime, and
    some more than several blocks."""
    draw = random.Random(seed)
    for number in range(count):
        S = draw.choice([1, 2, 17, 31, 32, 37, 67])
        T, (H, G) = (
            draw.choice([S, S, draw.randint(1, S)]),
            draw.choice([(1, 1), (2, 2), (4, 2), (3, 1)]),
        )
        B, K = draw.choice([1, 1, 2]), SIZES[number % len(SIZES)]
        dtype = torch.float16 if K == 256 else DTYPES[number % 2]
        yield SimpleNamespace(
            B=B,
            T=T,
            S=S,
            H=H,
            G=G,
            K=K,
            dtype=dtype,
            seed=number,
            orders=[draw.sample(range(3), 3) for _ in range(4)],
            gaps=[draw.choice([0, 0, 3]) for _ in range(4)],
            rules=dict(
                causal=draw.random() < 0.75,
                window=draw.choice([None, None, None, 1, 2, 19, 40, 1000]),
                documents_BS=documents(
                    ["none", "packed", "single", "left"][number % 4], B, S, draw
                ),
            ),
        )


def name_of(case):
    return f"{case.seed}-T{case.T}-S{case.S}-H{case.H}-G{case.G}-K{case.K}"


def fenced_bounds(fences):
    return lambda documents_BS: tuple(fences.put(x) for x in document_bounds(documents_BS))


def check(case):
    """Compare each result of forward and backward, in fenced buffers, with float64."""
    g = torch.Generator().manual_seed(case.seed)
    shapes = [(case.B, case.T, case.H, case.K), *[(case.B, case.S, case.G, case.K)] * 2]
    plain = [torch.randn(shape, generator=g).to(case.dtype) for shape in [*shapes, shapes[0]]]
    wide = [x.double().requires_grad_() for x in plain[:3]]
    truth = formula(*wide, **case.rules)
    truths = [truth, *torch.autograd.grad(truth, wide, plain[3].double())]

    fences, fenced = Fences(), []
    for i, (x, order, gap) in enumerate(zip(plain, case.orders, case.gaps, strict=True)):
        if (case.seed + i) % 2:  # the heads of a token side by side, as the kernels read them
            fenced.append(fences.put(x.flatten(2), None, gap).unflatten(2, x.shape[2:]))
        else:
            fenced.append(fences.put(x, order, gap))
    *inputs, grad = fenced
    inputs = [x.requires_grad_() for x in inputs]
    with (
        fences.around_outputs(),
        dispatch_choice("triton"),
        mock.patch.object(attention_file, "document_bounds", fenced_bounds(fences)),
    ):
        out = attention(*inputs, **case.rules)
        ours = [out, *torch.autograd.grad(out, inputs, grad)]
    for own, true in zip(ours, truths, strict=True):
        assert own.shape == true.shape and own.dtype == case.dtype and close(own, true, case.dtype)
    assert fences.intact()


@pytest.mark.parametrize("case", list(cases(42)), ids=name_of)
def test_attention_is_the_formula(case):
    check(case)


@pytest.mark.parametrize(
    "causal, T, S",
    [
        (False, 5, 31),
        (False, 5, 32),
        (False, 5, 33),
        (True, 7, 21),
        (True, 7, 22),
        (True, 7, 23),
        (True, 63, 63),
    ],
)
def test_the_loop_without_a_mask_ends_where_it_should(causal, T, S):
    """One key less than whole blocks, whole blocks, and one key more."""
    check(
        SimpleNamespace(
            B=1,
            T=T,
            S=S,
            H=2,
            G=1,
            K=16,
            dtype=torch.float32,
            seed=S,
            orders=[None] * 4,
            gaps=[0] * 4,
            rules=dict(causal=causal),
        )
    )


@pytest.mark.parametrize(
    "capability, dtype, K",
    [((8, 0), torch.float16, 128), ((9, 0), torch.float16, 72), ((8, 0), torch.float32, 64)],
)
def test_with_the_blocks_of_a_gpu_and_an_image_of_577_tokens(capability, dtype, K):
    case = SimpleNamespace(
        B=1,
        T=577,
        S=577,
        H=1,
        G=1,
        K=K,
        dtype=dtype,
        seed=5,
        orders=[None] * 4,
        gaps=[0] * 4,
        rules=dict(causal=K == 128),
    )
    with mock.patch.object(dispatch, "capability", lambda device: capability):
        check(case)


def test_keys_to_which_no_query_attends_have_no_gradient():
    """The window of the first of 3 queries begins at key 63."""
    rules = dict(causal=True, window=2)
    case = dict(B=1, T=3, S=67, H=2, G=1, K=16, dtype=torch.float32, seed=0, rules=rules)
    check(SimpleNamespace(**case, orders=[None] * 4, gaps=[0] * 4))
    q, k, v = inputs(B=1, T=3, S=67)
    with dispatch_choice("triton"):
        _, *grads = torch.autograd.grad(attention(q, k, v, **rules).sum(), (q, k, v))
    assert all(grad[:, :63].abs().sum() == 0 and grad[:, 63:].all() for grad in grads)


def test_blocks_outside_the_mask_are_not_read():
    """NaN in the keys of other documents, or before the window, would show in every weight."""
    documents_BS = (torch.arange(160)[None] // 80).int()
    q, k, v = torch.randn(1, 80, 1, 64), torch.randn(1, 160, 1, 64), torch.randn(1, 160, 1, 64)
    k[:, :32], v[:, :32] = torch.nan, torch.nan
    with dispatch_choice("triton"):
        assert torch.isfinite(attention(q, k, v, window=20)).all()
        assert torch.allclose(
            attention(q, k, v, documents_BS=documents_BS),
            formula(q, k[:, 80:], v[:, 80:]),
            atol=1e-5,
        )


def test_the_largest_scores_stay_finite():
    q, k, v = (
        torch.full((1, 37, 1, 64), 300.0),
        torch.randn(1, 37, 1, 64).sign() * 300,
        torch.randn(1, 37, 1, 64),
    )
    with dispatch_choice("triton"):
        assert close(attention(q, k, v), formula(q.double(), k.double(), v.double()), torch.float32)
        assert close(
            attention(q, -k, v, causal=False),
            formula(q.double(), -k.double(), v.double(), causal=False),
            torch.float32,
        )


def test_gradients_repeat_themselves_to_the_bit_and_sum_all_heads_that_share_a_key():
    q, k, v = (torch.randn(1, 37, heads, 64, requires_grad=True) for heads in (6, 2, 2))
    grad = torch.randn(1, 37, 6, 64)
    with dispatch_choice("triton"):
        one, two = (torch.autograd.grad(attention(q, k, v), (q, k, v), grad) for _ in range(2))
        single = torch.autograd.grad(
            attention(q[:, :, 3:4], k[:, :, 1:], v[:, :, 1:]), (k, v), grad[:, :, 3:4]
        )
        others = torch.autograd.grad(
            attention(q[:, :, 4:], k[:, :, 1:], v[:, :, 1:]), (k, v), grad[:, :, 4:]
        )
    assert all(map(torch.equal, one, two))
    assert all(
        torch.allclose(all_[:, :, 1], (a + b)[:, :, 1], atol=1e-5)
        for all_, a, b in zip(one[1:], single, others, strict=True)
    )


# ---- tiles ----


@triton.jit
def store_bounds(out, first, last, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    start = tl.program_id(0) * BLOCK_M
    _, _, bounds = tile_bounds(start, first, last, 0, S, None, BLOCK_M, BLOCK_N, True, False)
    for i in tl.static_range(4):
        tl.store(out + tl.program_id(0) * 4 + i, bounds[i])


def test_the_map_of_tiles_in_the_docstring_is_that_of_the_kernels():
    S, block_m, block_n = 16, 4, 2
    first_BS, last_BS = document_bounds((torch.arange(S) >= 5).int()[None])
    bounds = torch.zeros(S // block_m, 4, dtype=torch.int32)
    store_bounds[(S // block_m,)](bounds, first_BS, last_BS, S, block_m, block_n)
    for row, (begin, full_begin, full_end, end) in enumerate(bounds.tolist()):
        last = full_end + -(-(end - full_end) // block_n) * block_n  # whole tiles
        kinds = ["m" if begin <= s < last else "." for s in range(S)]
        kinds[full_begin:full_end] = "F" * (full_end - full_begin)
        line = f"queries {row * block_m:2} - {row * block_m + block_m - 1:2}   {''.join(kinds)}"
        assert line in attention_tiles.__doc__


def test_the_tracer_prints_every_tile_of_a_small_example():
    done = script("tests/kernels/trace.py", "--documents=3,5")
    assert done.returncode == 0, done.stderr
    tiles = re.findall(r"queries (\d) to \d, keys (\d) and \d, (\w+)", done.stdout)
    assert tiles == [
        ("4", "3", "full"),
        ("4", "5", "masked"),
        ("4", "7", "masked"),
        ("0", "0", "masked"),
        ("0", "2", "masked"),
    ]
    assert float(done.stdout.split()[-1]) < 1e-6
    assert (
        "--documents=3,4: 7 tokens, not 8"
        in script("tests/kernels/trace.py", "--documents=3,4").stderr
    )


# ---- one new token ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, S, H, G, K, window, kind",
    [
        (1, 1, 2, 1, 64, None, "none"),
        (3, 301, 6, 2, 80, None, "left"),
        (2, 1301, 4, 1, 128, None, "left"),
        (2, 1301, 4, 1, 72, 29, "none"),
        (1, 773, 34, 2, 96, 700, "packed"),
        (2, 517, 3, 3, 128, 301, "left"),
        (2, 67, 5, 1, 8, None, "single"),
    ],
)
def test_decode_is_the_formula_of_the_last_token(B, S, H, G, K, window, kind, dtype):
    g, draw = torch.Generator().manual_seed(S), random.Random(S)
    plain = [
        torch.randn(B, tokens, heads, K, generator=g).to(dtype)
        for tokens, heads in ((1, H), (S + 9, G), (S + 9, G))
    ]
    rules = dict(window=window, documents_BS=documents(kind, B, S, draw))
    truth = formula(plain[0].double(), *(x[:, :S].double() for x in plain[1:]), **rules)
    fences = Fences()
    q, k, v = [
        fences.put(x, order, gap)
        for x, order, gap in zip(plain, ([2, 0, 1], [0, 2, 1], [0, 1, 2]), (3, 0, 5), strict=True)
    ]
    k[:, S:], v[:, S:] = torch.nan, torch.nan  # the end of a cache is not filled yet
    with fences.around_outputs(), dispatch_choice("triton"), torch.no_grad():
        out = attention(q, k[:, :S], v[:, :S], **rules)
        assert out.dtype == dtype and close(out, truth, dtype)
        filled = (
            None
            if rules["documents_BS"] is None
            else torch.nn.functional.pad(rules["documents_BS"], (0, 9), value=7)
        )
        again = torch.ops.nanovlm.decode_attention(
            q, k, v, filled, torch.tensor([S], dtype=torch.int32), window
        )
        assert close(again, truth, dtype)
    assert fences.intact()


def test_a_cache_is_split_into_enough_parts_to_keep_a_gpu_busy():
    cpu = torch.device("cpu")
    with (
        mock.patch.object(dispatch, "capability", lambda device: (9, 0)),
        mock.patch.object(dispatch, "num_sms", lambda device: 132),
    ):
        # 264 programs in all
        assert decode_attention.num_splits(1, 32768, 8, cpu) == 33
        assert decode_attention.num_splits(64, 32768, 8, cpu) == 1
        assert decode_attention.num_splits(1, 300, 8, cpu) == 2
        assert decode_attention.num_splits(1, 1, 1, cpu) == 1


# ---- inside PyTorch ----


def inputs(B=2, T=37, S=37, H=4, G=2, K=8, grad=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [
        torch.randn(B, tokens, heads, K, generator=g).to(dtype).requires_grad_(grad)
        for tokens, heads in ((T, H), (S, G), (S, G))
    ]


def packed(B, S):
    return torch.arange(B * S).view(B, S) // 15


def test_the_attention_operators_pass_opcheck():
    q, k, v = inputs(T=3, S=5)
    ends = document_bounds(packed(2, 5) // 2)
    torch.library.opcheck(torch.ops.nanovlm.attention, (q, k, v, *ends, True, 2))
    out, lse = torch.ops.nanovlm.attention(q, k, v, *ends, True, None)
    plain = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.nanovlm.attention_backward, (*plain, None, None, False, None))
    torch.library.opcheck(
        torch.ops.nanovlm.decode_attention,
        (*inputs(T=1, S=5, grad=False), packed(2, 5), None, None),
    )


def test_compiled_it_is_one_graph_whatever_the_lengths():
    def attend(q, k, v, documents_BS):
        return attention(q, k, v, documents_BS=documents_BS) + attention(
            q, k, v, causal=False, window=9
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch_choice("triton"):
        for S in (19, 37):
            tensors = inputs(B=1, T=S, S=S)
            one, two = (
                (out, *torch.autograd.grad(out.square().sum(), tensors))
                for out in (f(*tensors, packed(1, S)) for f in (attend, compiled))
            )
            assert all(map(torch.equal, one, two))


def test_activation_checkpointing_gives_the_same_attention_gradients():
    tensors = inputs()
    attend = lambda *x: attention(*x, documents_BS=packed(2, 37))  # noqa: E731
    with dispatch_choice("triton"):
        plain = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
        again = torch.autograd.grad(
            checkpoint(attend, *tensors, use_reentrant=False).square().sum(), tensors
        )
    assert all(map(torch.equal, plain, again))


def test_under_autocast_it_computes_in_autocasts_dtype():
    q, k, v = inputs()
    with dispatch_choice("triton"), torch.autocast("cpu", dtype=torch.float16):
        out = attention(q, k.half(), v)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    truth = formula(q.double(), k.double(), v.double())
    assert out.dtype == torch.float16 and close(out, truth, torch.float16)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_a_gradient_that_is_an_expanded_number_works():
    q, k, v = inputs()
    with dispatch_choice("triton"):
        # the gradient of sum() is a view of a single number
        ours = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    assert all(
        close(a, b, torch.float32)
        for a, b in zip(ours, torch.autograd.grad(formula(q, k, v).sum(), (q, k, v)), strict=True)
    )


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((1, 3, 2, 264), torch.float32, "heads of more than 128 numbers in torch.float32"),
        ((1, 3, 2, 8), torch.float16, "queries, keys and values of several dtypes"),
    ],
)
def test_what_the_kernels_do_not_support_runs_the_formula_after_one_warning(shape, dtype, message):
    q, k = torch.randn(shape), torch.randn(shape)
    with (
        dispatch_choice("triton"),
        mock.patch.object(dispatch, "warned", set()),
        pytest.warns(UserWarning, match=message),
    ):
        if dtype == torch.float32:
            assert torch.equal(attention(q, k, k), attention(q, k, k))
        else:
            with pytest.raises(RuntimeError, match="dtype"):  # PyTorch's own raises, too
                attention(q, k.to(dtype), k)


def test_heads_that_need_more_shared_memory_than_the_gpu_has_run_the_formula_after_one_warning():
    q, k, v = inputs()
    own = {(0, 0): {(8, 4): (107_520, *[(16, 16, 4, 1)] * 3)}}
    message = (
        "attention with heads of 8 numbers in torch.float32 needs 107,520 bytes of shared memory, "
        "and NVIDIA A10 (8.6) has 101,376; the formula in PyTorch runs instead"
    )
    formula_of = attention(q, k, v)
    with (
        dispatch_choice("triton"),
        mock.patch.object(attention_file, "TABLE", own),
        mock.patch.object(dispatch, "shared_memory", lambda _: ("NVIDIA A10 (8.6)", 101_376)),
        mock.patch.object(dispatch, "warned", set()),
    ):
        with pytest.warns(UserWarning, match=re.escape(message)):
            assert torch.equal(attention(q, k, v), formula_of)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(attention(q, k, v), formula_of)


def test_documents_are_measured_once_for_all_layers():
    decoder, calls = make_vlm().decoder, []
    x_BTD, positions_BT = torch.randn(2, 7, 24), torch.arange(7).expand(2, -1)
    documents_BT = (positions_BT >= 3).int()
    found = attention_file.document_bounds
    counted = lambda documents_BS: calls.append(documents_BS.shape) or found(documents_BS)  # noqa: E731
    with torch.no_grad(), dispatch_choice("triton"):
        alone = decoder(x_BTD[:, 3:], positions_BT[:, 3:])
        with (
            mock.patch.dict(dispatch.KERNELS, document_bounds=(counted, lambda *_: "")),
            mock.patch.object(attention_file, "document_bounds", counted),
        ):
            packed_BTD = decoder(x_BTD, positions_BT, documents_BT)
            assert calls == [(2, 7)]
            cache = KVCache(decoder, 2, 8)
            decoder(x_BTD, positions_BT, documents_BT, cache)
            decoder(x_BTD[:, :1], positions_BT[:, :1] + 7, documents_BT[:, [*range(7), 6]], cache)
    assert calls == [(2, 7)] * 2  # a new token needs none
    assert len(decoder.layers) == 3 and torch.allclose(packed_BTD[:, 3:], alone, atol=1e-5)


def test_the_formula_passes_gradcheck_in_float64():
    q, k, v = (x.detach().double().requires_grad_() for x in inputs(T=5, S=7, K=3))
    for rules in ({}, {"causal": False}, {"window": 3}, {"documents_BS": packed(2, 7) // 3}):
        assert torch.autograd.gradcheck(lambda *x, rules=rules: attention(*x, **rules), (q, k, v))


def test_a_packed_sample_gives_what_it_gives_alone():
    block = make_block()
    with dispatch_choice("triton"), torch.no_grad():
        x_BTD = torch.randn(1, 31, 24)
        angles = rope_cos_sin(torch.cat([torch.arange(12), torch.arange(19)])[None], 8, 10000.0)
        packed_BTD = block(x_BTD, angles, (torch.arange(31)[None] >= 12).int(), None, 0)
        alone_BTD = block(x_BTD[:, 12:], tuple(x[:, 12:] for x in angles), None, None, 0)
    assert torch.allclose(packed_BTD[:, 12:], alone_BTD, atol=1e-5)


# ---- for GPUs that are not here ----


def script(*command):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_the_bench_checks_what_it_will_time():
    done = script("tests/bench/gpu.py", "--dry=true", "--only=attention")
    assert done.returncode == 0 and done.stdout.count("as in float64") == 8, done.stderr
