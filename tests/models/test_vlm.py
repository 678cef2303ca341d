"""The model: packing, causality, generation, loss and attention, each against its definition."""

import inspect

import pytest
import torch
from conftest import DECODER, TOKENS, VISION, make_batch, make_samples, make_vlm

from nanovlm import IMAGE_TOKEN_ID, UserError
from nanovlm.inference.generate import generate, sample_next_token
from nanovlm.models import cross_entropy
from nanovlm.models.attention import attention
from nanovlm.models.cross_entropy import CHUNK, linear_cross_entropy
from nanovlm.models.decoder import Decoder, KVCache
from nanovlm.models.projector import Projector, pixel_shuffle
from nanovlm.models.vision_encoder import VisionEncoder
from nanovlm.models.vlm import VLM


def hidden(model, batch):
    return model.decoder(
        model.embed(batch["ids_BT"], batch["tiles_NCYX"]),
        batch["positions_BT"],
        batch["documents_BT"],
    )


def gradients(model, batches):
    """The gradients of the summed loss over all batches, and that loss."""
    model.zero_grad()
    loss = sum(model(**batch) for batch in batches)
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def same_gradients(a, b):
    (loss_a, grads_a), (loss_b, grads_b) = a, b
    assert loss_a == pytest.approx(loss_b, rel=1e-5) and grads_a.keys() == grads_b.keys()
    for name, grad in grads_a.items():
        torch.testing.assert_close(grad, grads_b[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "decoder", [{}, {"qkv_bias": True, "qk_norm": True, "rope_layers": [1, 0, 1]}]
)
def test_packed_sequences_give_the_loss_and_gradients_of_the_samples_alone(decoder):
    """Also where a layer has no RoPE: then only the mask tells samples apart."""
    vlm = make_vlm(decoder=decoder)
    a, b, c, d = make_samples()
    same_gradients(
        gradients(vlm, [make_batch([[a, b], [c, d]])]),
        gradients(vlm, [make_batch([[s]]) for s in (a, b, c, d)]),
    )


def test_a_new_decoder_has_biases_of_zero_and_norms_of_one():
    decoder = Decoder(**DECODER, qkv_bias=True, qk_norm=True)
    vectors = {name: p for name, p in decoder.named_parameters() if p.dim() == 1}
    assert len(vectors) == 3 * (3 + 2 + 2) + 1
    for name, p in vectors.items():
        assert (p == ("norm" in name)).all(), name


def test_accumulated_micro_batches_give_the_gradients_of_one_batch(vlm):
    samples = make_samples()
    same_gradients(
        gradients(vlm, [make_batch([[s] for s in samples])]),
        gradients(vlm, [make_batch([[s]]) for s in samples]),
    )


def test_a_token_sees_neither_the_future_nor_its_neighbour_sample_nor_padding(vlm):
    a, b, _, _ = make_samples()
    batch = make_batch([[a, b], [b]])
    with torch.no_grad():
        before = hidden(vlm, batch)
        start = len(a[0])
        batch["ids_BT"][0, start + 3] = (
            batch["ids_BT"][0, start + 3] + 1
        ) % 41  # a word of b, in the first row
        after = hidden(vlm, batch)
        assert torch.equal(before[0, : start + 3], after[0, : start + 3]), (
            "the past or the neighbour changed"
        )
        assert (before[0, start + 3 :] - after[0, start + 3 :]).abs().amin(-1).gt(0).any(), (
            "the future must change"
        )
        batch["ids_BT"][1, len(b[0]) :] = 7  # padding
        assert torch.equal(after[1, : len(b[0])], hidden(vlm, batch)[1, : len(b[0])])


def test_a_changed_pixel_changes_what_follows_it_and_nothing_before(vlm):
    ids_T, targets_T, tiles = make_samples()[0]
    sample = (
        torch.cat([torch.tensor([3, 5]), ids_T]),
        torch.cat([torch.tensor([-1, -1]), targets_T]),
        tiles,
    )
    other = (*sample[:2], tiles.clone())
    other[2][0, 1, 5, 7] ^= 128
    with torch.no_grad():
        before, after = hidden(vlm, make_batch([[sample]])), hidden(vlm, make_batch([[other]]))
    assert (
        torch.equal(before[0, :2], after[0, :2]) and (before[0, 2:] != after[0, 2:]).any(-1).all()
    )


def test_generation_with_a_kv_cache_equals_a_full_forward_pass_for_each_token(vlm):
    ids_T, _, tiles = make_samples()[2]
    prompt, answer = ids_T.tolist(), []
    for _ in range(9):
        batch = make_batch(
            [[(torch.tensor(prompt + answer), torch.full((len(prompt + answer),), -1), tiles)]]
        )
        with torch.no_grad():
            answer.append(int(vlm.decoder.lm_head(hidden(vlm, batch)[0, -1]).argmax()))
    assert [i for (i,) in generate(vlm, [prompt], tiles, stop=set(), max_tokens=9)] == answer
    assert len(set(answer)) > 2


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.9, "seed": 4}, {"temperature": 1.5, "top_k": 5, "top_p": 0.9}]
)
@pytest.mark.parametrize("window", [None, 6])
def test_a_prompt_gets_the_same_answer_in_a_batch_and_alone(how, window):
    vlm = make_vlm(decoder={"sliding_window": window})
    samples = make_samples()
    prompts, tiles = [ids.tolist() for ids, _, _ in samples], [t for _, _, t in samples]
    together = list(
        zip(*generate(vlm, prompts, torch.cat(tiles), stop={7}, max_tokens=12, **how), strict=True)
    )
    for row, prompt, own in zip(together, prompts, tiles, strict=True):
        alone = [i for (i,) in generate(vlm, [prompt], own, stop={7}, max_tokens=12, **how)]
        assert [i for i in row if i is not None] == alone


def test_top_k_and_top_p_keep_the_likeliest_and_draw_as_likely_as_they_are():
    logits_BV = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    g = [torch.Generator().manual_seed(0)]
    draws = [sample_next_token(logits_BV, 1.0, 0, 1.0, g)[0] for _ in range(4000)]
    for i, p in enumerate([0.1, 0.5, 0.15, 0.25]):
        assert draws.count(i) / 4000 == pytest.approx(p, abs=0.03)
    assert {sample_next_token(logits_BV, 1.0, 2, 1.0, g)[0] for _ in range(200)} == {1, 3}
    assert {sample_next_token(logits_BV, 1.0, 0, 0.8, g)[0] for _ in range(200)} == {
        1,
        3,
        2,
    }  # .5 + .25 < .8 <= .5 + .25 + .15
    assert {sample_next_token(logits_BV, 1.0, 0, 0.4, g)[0] for _ in range(50)} == {1}
    assert sample_next_token(logits_BV, 0.0, 0, 1.0, g) == [1]


def test_loss_equals_cross_entropy_in_float64_value_and_gradients():
    N = CHUNK + 77  # more than a chunk, and no multiple of it
    hidden_ND = torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
    head_VD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(11, (N,))
    ours = torch.autograd.grad(
        linear_cross_entropy(hidden_ND, head_VD, targets_N) * 0.3, (hidden_ND, head_VD)
    )
    plain = torch.nn.functional.cross_entropy(hidden_ND @ head_VD.T, targets_N, reduction="sum")
    theirs = torch.autograd.grad(plain * 0.3, (hidden_ND, head_VD))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert linear_cross_entropy(hidden_ND, head_VD, targets_N).item() == pytest.approx(plain.item())
    small = (hidden_ND[:6].detach().requires_grad_(), head_VD)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets_N[:6]), small)


def test_logits_exist_for_one_chunk_of_labelled_tokens_at_a_time(monkeypatch):
    widest, chunked_loss = 0, cross_entropy.chunked_loss

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 313:
                widest = max(widest, len(out))
            return out

    def watched_loss(*arguments):
        with Watch():  # inside of the operator
            return chunked_loss(*arguments)

    monkeypatch.setattr(cross_entropy, "chunked_loss", watched_loss)
    hidden_ND = torch.randn(3 * CHUNK, 8, requires_grad=True)
    head_VD = torch.randn(313, 8, requires_grad=True)
    linear_cross_entropy(hidden_ND, head_VD, torch.randint(313, (3 * CHUNK,))).backward()
    assert 0 < widest <= CHUNK


def test_attention_is_the_formula_in_float64():
    B, T, S, H, G, K = 2, 5, 9, 6, 3, 4
    q, k, v = (
        torch.randn(B, T, H, K).double(),
        torch.randn(B, S, G, K).double(),
        torch.randn(B, S, G, K).double(),
    )
    documents_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [-1, -1, 0, 0, 0, 0, 0, 0, 0]])
    ours = attention(q, k, v, window=3, documents_BS=documents_BS)
    for b in range(B):
        for t in range(T):
            place = S - T + t
            keys = [
                s
                for s in range(S)
                if s <= place and place - s < 3 and documents_BS[b, s] == documents_BS[b, place]
            ]
            for h in range(H):
                weights = (k[b, keys, h // (H // G)] @ q[b, t, h] / K**0.5).softmax(0)
                torch.testing.assert_close(ours[b, t, h], weights @ v[b, keys, h // (H // G)])


def test_pixel_shuffle_puts_each_square_of_patches_into_one_token():
    features_NPD = torch.arange(36.0).reshape(
        1, 36, 1
    )  # patch number as its only feature, 6 x 6 patches
    shuffled = pixel_shuffle(features_NPD, 3)
    assert shuffled.shape == (1, 4, 9)
    assert shuffled[0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]  # the upper right square


def test_a_batch_without_images_still_gives_every_part_a_gradient_of_zero(vlm):
    loss, grads = gradients(vlm.train(), [make_batch([[make_samples()[1]]])])
    assert all(name in grads for name, _ in vlm.named_parameters())
    assert all(
        grad.abs().max() == 0 for name, grad in grads.items() if not name.startswith("decoder")
    )
    assert loss == pytest.approx(vlm.eval()(**make_batch([[make_samples()[1]]])).item(), rel=1e-6)


def test_more_or_fewer_image_tokens_than_features_name_both_counts(vlm):
    ids_T, targets_T, tiles = make_samples()[0]
    with pytest.raises(UserError, match=r"4 image tokens .* 8 image features"):
        vlm.embed(ids_T[None], torch.cat([tiles, tiles]))
    with pytest.raises(UserError, match="4 image tokens.*no image"):
        vlm.embed(ids_T[None], tiles[:0])


def test_a_cache_longer_than_the_new_tokens_continues_where_it_stopped(vlm):
    ids_BT = torch.randint(41, (2, 11))
    positions_BT = torch.arange(11).expand(2, -1)
    with torch.no_grad():
        whole = vlm.decoder(vlm.decoder.embed_tokens(ids_BT), positions_BT)
        cache = KVCache(vlm.decoder, 2, 20)
        parts = [
            vlm.decoder(vlm.decoder.embed_tokens(ids_BT[:, p]), positions_BT[:, p], cache=cache)
            for p in (slice(0, 4), slice(4, 10), slice(10, 11))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


# Another value for each argument. It may change shapes; outputs are compared where both exist.
CHANGED = {
    VisionEncoder: dict(
        tile=9,
        patch=4,
        width=40,
        layers=3,
        heads=4,
        intermediate_size=30,
        class_token=True,
        pre_norm=True,
        post_norm=False,
        patch_bias=False,
        activation="quick_gelu",
        layer_scale=True,
        eps=0.1,
        vision_feature_layer=-2,
    ),
    Decoder: dict(
        vocab_size=43,
        width=32,
        layers=2,
        heads=4,
        kv_heads=3,
        intermediate_size=40,
        head_dim=10,
        rope_theta=50.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        eps=0.1,
        sliding_window=[3, None, 4],
        tied=True,
        qkv_bias=True,
        qk_norm=True,
        rope_layers=[1, 0, 1],
    ),
    Projector: dict(vision_width=24, width=28, shuffle=1, newline=True, mlp=False),
    VLM: dict(
        vision=VISION | {"intermediate_size": 30},
        decoder=DECODER | {"intermediate_size": 40},
        shuffle=1,
        projector_mlp=False,
        mean=(0.1, 0.2, 0.3),
        std=(0.3, 0.2, 0.1),
        newline=True,
    ),
}
BASE = {
    VisionEncoder: VISION,
    Decoder: DECODER,
    Projector: dict(vision_width=20, width=24, shuffle=2),
    VLM: dict(vision=VISION, decoder=DECODER, shuffle=2),
}


def output(kind, arguments):
    torch.manual_seed(0)
    model = kind(**arguments)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((torch.linspace(-9, 9, p.numel()) + i).sin().reshape(p.shape) * 0.3)
        if kind is VisionEncoder:
            return model(
                torch.linspace(-1, 1, 3 * 144).reshape(1, 3, 12, 12)[
                    ..., : arguments["tile"], : arguments["tile"]
                ]
            )
        if kind is Decoder:
            return model.lm_head(
                model(model.embed_tokens(torch.arange(13)[None]), torch.arange(13)[None])
            )
        if kind is Projector:
            return model(torch.linspace(-1, 1, 16 * arguments["vision_width"]).reshape(1, 16, -1))
        ids_BT = torch.tensor(
            [
                [IMAGE_TOKEN_ID]
                * ((TOKENS if arguments["shuffle"] == 2 else 16) + arguments.get("newline", 0))
                + [1, 2, 3]
            ]
        )
        return model.decoder(
            model.embed(ids_BT, torch.arange(432).reshape(1, 3, 12, 12).to(torch.uint8)),
            torch.arange(ids_BT.shape[1])[None],
        )


@pytest.mark.parametrize("kind", CHANGED)
def test_every_constructor_argument_changes_the_output(kind):
    assert CHANGED[kind].keys() == inspect.signature(kind.__init__).parameters.keys() - {"self"}
    before = output(kind, BASE[kind])
    for name, value in CHANGED[kind].items():
        after = output(kind, BASE[kind] | {name: value})
        assert before.shape != after.shape or not torch.allclose(before, after), (
            f"{kind.__name__}({name}=…) changes nothing"
        )
