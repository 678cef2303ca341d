"""However fast a model generates, its tokens are those of a full forward pass for each token."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import make_samples, make_vlm

from nanovlm.inference import generate as generate_file
from nanovlm.inference import optimize as optimize_file
from nanovlm.inference.generate import CAPTURE_AFTER, generate, next_logits
from nanovlm.inference.optimize import (
    MIN_VECTORS,
    CUDAGraphStep,
    PackedLinear,
    StaticKVCache,
    optimize,
)
from nanovlm.kernels import dispatch
from nanovlm.models.attention import attention
from nanovlm.models.decoder import KVCache

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9]]
SHAPES = {
    "plain": {},
    "window": {"sliding_window": 6},
    "windows": {"sliding_window": [None, 5, 3]},
    "every head its keys": {"kv_heads": 6},
    "tied": {"tied": True},
    "biases, norms, no RoPE": {"qkv_bias": True, "qk_norm": True, "rope_layers": [1, 0, 1]},
}


def without_cache(vlm, prompt, count):
    """The likeliest next id, count times, without a cache."""
    answer = []
    for _ in range(count):
        ids_BT = torch.tensor([prompt + answer])
        with torch.no_grad():
            hidden_BTD = vlm.decoder(
                vlm.decoder.embed_tokens(ids_BT), torch.arange(ids_BT.shape[1])[None]
            )
            answer.append(int(vlm.decoder.lm_head(hidden_BTD[0, -1]).argmax()))
    return answer


def answers(vlm, prompts, count, **how):
    rows = zip(
        *generate(vlm, prompts, torch.zeros(0), stop=set(), max_tokens=count, **how), strict=True
    )
    return [list(row) for row in rows]


def decoder_products(vlm):
    """The products of an optimized decoder: of a block four (q, k, v are one; gate, up are one)."""
    joined = [f for block in vlm.decoder.layers for f in (block.qkv_proj, block.gate_up_proj)]
    packed = [m for m in vlm.decoder.modules() if isinstance(m, PackedLinear)]
    return [f.product for f in joined] + packed


@pytest.mark.parametrize(
    "form", ["as it is", "joined", "packed", "captured", "packed and captured"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_gives_the_tokens_of_full_forward_passes(form, shape, monkeypatch):
    vlm = make_vlm(decoder=SHAPES[shape])
    expected = [without_cache(vlm, prompt, 12) for prompt in PROMPTS]
    assert len({i for row in expected for i in row}) > 5
    monkeypatch.setattr(optimize_file, "MIN_WEIGHT", 0 if "packed" in form else 1 << 40)
    monkeypatch.setattr(generate_file, "CAPTURE_AFTER", 4)
    if form not in ("as it is", "captured"):
        optimize(vlm)
        packed = ["packed" in form] * (4 * len(vlm.decoder.layers) + 1)  # with lm_head
        assert [p.min_vectors == 1 for p in decoder_products(vlm)] == packed
    how = {"cuda_graph": ("cpu",)} if "captured" in form else {}
    assert answers(vlm, PROMPTS, 12, **how) == expected
    assert [answers(vlm, [prompt], 12, **how)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("how", [{}, {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "seed": 2}])
def test_logprobs_are_those_of_a_full_forward_pass_in_float64(vlm, monkeypatch, how):
    """They are of the softmax before temperature, top_k and top_p, and change no token."""
    monkeypatch.setattr(generate_file, "CAPTURE_AFTER", 4)
    logprobs, precise = [], make_vlm().double()
    found = answers(vlm, PROMPTS, 9, logprobs=logprobs, cuda_graph=("cpu",), **how)
    assert found == answers(vlm, PROMPTS, 9, **how)
    for number, (prompt, ids) in enumerate(zip(PROMPTS, found, strict=True)):
        ids_BT = torch.tensor([prompt + ids[:-1]])
        with torch.no_grad():
            hidden_BTD = precise.decoder(
                precise.decoder.embed_tokens(ids_BT), torch.arange(ids_BT.shape[1])[None]
            )
            logprobs_TV = precise.decoder.lm_head(hidden_BTD[0, len(prompt) - 1 :]).log_softmax(-1)
        expected = [(i, float(x_V[i])) for i, x_V in zip(ids, logprobs_TV, strict=True)]
        assert [step[number][0] for step in logprobs] == ids
        assert [step[number][1] for step in logprobs] == pytest.approx(
            [x for _, x in expected], abs=1e-4
        )


def test_an_optimized_model_gives_the_same_image_features(vlm, monkeypatch):
    _, _, tiles_NCYX = make_samples()[2]
    before = vlm.encode_images(tiles_NCYX)
    monkeypatch.setattr(optimize_file, "MIN_WEIGHT", 0)
    with torch.no_grad():
        torch.testing.assert_close(
            optimize(vlm).encode_images(tiles_NCYX), before, rtol=1e-4, atol=1e-5
        )
    assert not [m for m in vlm.modules() if isinstance(m, torch.nn.Linear)]
    assert len(decoder_products(vlm)) == 4 * len(vlm.decoder.layers) + 1


def test_the_decoder_runs_once_on_the_prompt_and_on_each_token_but_the_last(vlm):
    lengths = []
    vlm.decoder.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    answers(vlm, PROMPTS[:1], 5)
    assert lengths == [len(PROMPTS[0]), 1, 1, 1, 1]


def test_an_optimized_model_holds_each_weight_once_and_a_tied_one_twice(vlm, monkeypatch):
    monkeypatch.setattr(optimize_file, "MIN_WEIGHT", 0)

    def numbers(model):
        return sum(t.numel() for t in {id(t): t for t in held(model)}.values())

    def held(model):
        others = [m for m in model.modules() if isinstance(m, PackedLinear)]
        products = {*decoder_products(model), *others}
        weights = [(m.weight, m.packed, m.bias) for m in products]
        return [*model.parameters(), *(t for ts in weights for t in ts if t is not None)]

    old = [p.data for p in vlm.parameters()]
    assert numbers(optimize(vlm)) == sum(p.numel() for p in make_vlm().parameters())
    kept = {t.data_ptr() for t in old} & {t.data_ptr() for t in held(vlm) if not t.is_mkldnn}
    assert not kept, "a tensor that was read from a file keeps all of it in memory"
    tied = make_vlm(decoder={"tied": True})
    once = sum(p.numel() for p in tied.parameters())
    assert numbers(optimize(tied)) == once + tied.decoder.embed_tokens.weight.numel()


def packs(dtype):
    """Whether oneDNN packs a weight of this dtype on this CPU; float32 it packs on any."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(2, 2, dtype=dtype), 1)
    except RuntimeError:
        return dtype == torch.float32
    return True


@pytest.mark.parametrize(
    "dtype, error",
    [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float64, 1e-15)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, MIN_VECTORS + 3])
@pytest.mark.parametrize("large", [0, 1 << 40])
@pytest.mark.parametrize("cpu", ["this one", "one without the instructions"])
def test_a_packed_linear_layer_is_its_layers_side_by_side(
    dtype, error, bias, rows, large, cpu, monkeypatch
):
    monkeypatch.setattr(optimize_file, "MIN_WEIGHT", large)
    if cpu == "one without the instructions":
        monkeypatch.setitem(optimize_file.ONEDNN_DTYPES, dtype, lambda: False)
    packed = cpu == "this one" and packs(dtype)
    layers = [torch.nn.Linear(37, out, bias=bias).to(dtype) for out in (23, 11, 5)]
    x = torch.randn(rows, 37).to(dtype)
    with torch.no_grad():
        product = PackedLinear(*layers)
        assert (product.packed is not None) == packed
        assert (product.weight is product.packed) == (packed and large == 0)
        assert product.min_vectors == (0 if not packed else 1 if large == 0 else MIN_VECTORS)
        expected = torch.cat([layer.double()(x.double()) for layer in layers], dim=-1)
        plain = mock.Mock(wraps=torch.nn.functional.linear)
        monkeypatch.setattr(optimize_file.F, "linear", plain)
        found = product(x)
    assert plain.called == (not packed or rows < product.min_vectors)
    if plain.called:
        in_float32 = dtype.itemsize == 2 and not packed and rows > 1
        assert plain.call_args[0][0].dtype == (torch.float32 if in_float32 else dtype)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_with_a_static_cache_gives_the_logits_of_one_with_a_growing_cache(
    choice, window, padded, monkeypatch
):
    """By the formulas, and by the kernels that a GPU would capture."""
    vlm = make_vlm(decoder={"sliding_window": window})
    ids_BT, positions_BS = torch.randint(41, (2, 7)), torch.arange(16).expand(2, -1)
    documents_BS = torch.tensor([[0] * 3 + [1] * 13, [1] * 16]) if padded else None
    caches = [KVCache(vlm.decoder, 2, 16) for _ in range(2)]
    for k_BSGK, v_BSGK in caches[1].layers:
        k_BSGK.fill_(float("nan")), v_BSGK.fill_(float("nan"))  # what memory may hold

    def grow(cache, x_BtD):
        return next_logits(vlm.decoder, cache, x_BtD, positions_BS, documents_BS)

    with torch.no_grad():
        x_BTD = vlm.decoder.embed_tokens(ids_BT)
        prefills = [grow(cache, x_BTD) for cache in caches]
        torch.testing.assert_close(*prefills, rtol=0, atol=0)
        fixed = CUDAGraphStep(vlm.decoder, caches[1], positions_BS, documents_BS)
        monkeypatch.setattr(dispatch, "choice", choice)
        for _ in range(9):  # to the last place
            ids_B = torch.randint(41, (2,))
            found = fixed(ids_B)
            with monkeypatch.context() as switch:
                switch.setattr(dispatch, "choice", "torch")
                expected = grow(caches[0], vlm.decoder.embed_tokens(ids_B[:, None]))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fixed.cache.cache_length.item() == 17 and fixed.graph is None


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("documents_S", [None, [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("end", [1, 6, 11])
def test_attention_up_to_cache_length_is_attention_to_a_cache_of_that_length(
    window, documents_S, end
):
    q, k, v = torch.randn(2, 1, 6, 8), torch.randn(2, 11, 3, 8), torch.randn(2, 11, 3, 8)
    documents_BS = None if documents_S is None else torch.tensor([documents_S, [1] * 11])
    seen = None if documents_BS is None else documents_BS[:, :end]
    found = attention(
        q,
        k,
        v,
        window=window,
        documents_BS=documents_BS,
        cache_length=torch.tensor([end], dtype=torch.int32),
    )
    torch.testing.assert_close(
        found, attention(q, k[:, :end], v[:, :end], window=window, documents_BS=seen)
    )


def test_a_short_answer_is_not_captured(vlm, monkeypatch):
    made = []
    monkeypatch.setattr(
        optimize_file,
        "StaticKVCache",
        lambda cache: made.append(cache.length) or StaticKVCache(cache),
    )
    answers(vlm, PROMPTS[:1], CAPTURE_AFTER, cuda_graph=("cpu",))
    answers(vlm, PROMPTS[:1], 2 * CAPTURE_AFTER)  # a device without capture
    answers(vlm.train(), PROMPTS[:1], 2 * CAPTURE_AFTER, cuda_graph=("cpu",))  # training
    vlm.eval()
    with monkeypatch.context() as switch:
        switch.setattr(dispatch, "choice", "torch")
        answers(vlm, PROMPTS[:1], 2 * CAPTURE_AFTER, cuda_graph=("cpu",))
    assert made == []
    answers(vlm, PROMPTS[:1], CAPTURE_AFTER + 2, cuda_graph=("cpu",))
    assert made == [len(PROMPTS[0]) + CAPTURE_AFTER]


def test_an_optimized_model_keeps_its_captured_step_for_the_next_answers(monkeypatch):
    """Of as many sequences and the same capacity of the KV cache, which is rounded up."""
    vlm, made = optimize(make_vlm()), []

    def make_step(*inputs):
        made.append(len(inputs[2]))
        return CUDAGraphStep(*inputs)

    monkeypatch.setattr(generate_file, "CUDAGraphStep", make_step)
    one, two, count = PROMPTS[:1], PROMPTS[:2], CAPTURE_AFTER + 5
    for prompts in (one, [PROMPTS[0][:-1]], two, two[::-1], one):
        expected = answers(vlm, prompts, count, cuda_graph=())
        assert answers(vlm, prompts, count, cuda_graph=("cpu",)) == expected
    assert made == [1, 2, 1]
    # Two answers at the same time: only one of them can have it.
    how = dict(stop=set(), max_tokens=count, cuda_graph=("cpu",))
    at_once = zip(*(generate(vlm, one, torch.zeros(0), **how) for _ in range(2)), strict=True)
    assert all(
        first == second == [i] for (first, second), i in zip(at_once, expected[0], strict=True)
    )
    assert made == [1, 2, 1, 1]


def test_a_capture_that_fails_leaves_decoding_without_a_graph(vlm, monkeypatch):
    """With stand-ins for what torch.cuda has on a GPU."""

    class Capture(contextlib.nullcontext):
        def __init__(self, graph, stream, capture_error_mode):
            super().__init__()
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

    stream, devices = SimpleNamespace(wait_stream=lambda other: None), []
    stand_ins = dict(
        current_stream=lambda: stream,
        Stream=lambda: stream,
        stream=contextlib.nullcontext,
        CUDAGraph=object,
        graph=Capture,
        device=lambda device: contextlib.nullcontext(devices.append(device)),
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    positions_BS, caches = torch.arange(9).expand(2, -1), [KVCache(vlm.decoder, 2, 9) for _ in "ab"]
    x_BTD = vlm.decoder.embed_tokens(torch.arange(10).view(2, 5))
    x_B1D, ids_B = vlm.decoder.embed_tokens(torch.tensor([[3], [5]])), torch.tensor([3, 5])
    with torch.no_grad():
        for cache in caches:
            next_logits(vlm.decoder, cache, x_BTD, positions_BS, None)
        step = CUDAGraphStep(vlm.decoder, caches[0], positions_BS, None)
        with pytest.warns(UserWarning, match="Without a CUDA graph, decoding is slower: operation"):
            step.capture()  # as on a GPU
        expected = next_logits(vlm.decoder, caches[1], x_B1D, positions_BS, None)
        torch.testing.assert_close(step(ids_B), expected)
    assert step.graph is None and devices == [ids_B.device]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 6])
def test_on_a_gpu_a_captured_step_gives_the_tokens_of_an_uncaptured_one(window):
    vlm = optimize(make_vlm(decoder={"sliding_window": window}).cuda())
    count = 2 * CAPTURE_AFTER
    assert answers(vlm, PROMPTS, count, cuda_graph=("cuda",)) == answers(
        vlm, PROMPTS, count, cuda_graph=()
    )
