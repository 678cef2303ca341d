"""The exercises fail as they stand, pass with the core's own functions, and notice usual mistakes."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from nanovlm.checkpoints.lora import LoRALinear, merged_weights
from nanovlm.data import chat_template
from nanovlm.inference import generate
from nanovlm.models.attention import attention, attention_mask
from nanovlm.models.decoder import apply_rope, rope_cos_sin
from nanovlm.models.projector import pixel_shuffle
from nanovlm.models.vlm import VLM

FOLDER = ROOT / "tests/exercises"


# ---- the core's answers ----
def rope(x_BTHK, positions_BT, theta):
    return apply_rope(x_BTHK, rope_cos_sin(positions_BT, x_BTHK.shape[-1], theta))


def document_mask(documents_BT):
    T = documents_BT.shape[1]
    return attention_mask(T, T, documents_BS=documents_BT)


def embed(ids_BT, features, embed_tokens):
    parts = SimpleNamespace(
        decoder=SimpleNamespace(embed_tokens=embed_tokens), encode_images=lambda tiles: features
    )
    return VLM.embed(parts, ids_BT, ["a tile"])


def render_conversation(turns, tokenizer):
    return chat_template.render_conversation(turns, tokenizer, "chatml")


def generate_ids(decoder, prompt, max_tokens, top_p, seed):
    model = SimpleNamespace(
        decoder=decoder, training=False, embed=lambda ids_BT, *images: decoder.embed_tokens(ids_BT)
    )
    options = dict(stop=(), max_tokens=max_tokens, temperature=1.0, top_p=top_p, seed=seed)
    steps = generate.generate(model, [prompt], torch.empty(0), **options)
    return [next_id for (next_id,) in steps]


def lora_linear(x_BTD, weight, A, B, alpha):
    base = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
    base.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    layer = LoRALinear(base, rank=len(A), alpha=alpha)
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    return torch.func.functional_call(layer, tensors, x_BTD)


def merge(weight, A, B, alpha):
    tensors = {"q.weight": weight, "q.lora_A.weight": A, "q.lora_B.weight": B}
    return merged_weights(tensors, alpha / len(A))["q.weight"]


# ---- usual mistakes ----
def rope_of_neighbors(x_BTHK, positions_BT, theta):
    """Pairs (2i, 2i + 1), as in the paper and not as in Hugging Face's weights."""
    K = x_BTHK.shape[-1]
    order = torch.arange(K).view(K // 2, 2).T.flatten()
    turned = rope(x_BTHK[..., order], positions_BT, theta)
    return turned[..., order.argsort()]


def attention_without_a_mask(q_BTHK, k_BTGK, v_BTGK):
    return attention(q_BTHK, k_BTGK, v_BTGK, causal=False)


def attention_with_interleaved_heads(q_BTHK, k_BTGK, v_BTGK):
    copies = q_BTHK.shape[2] // k_BTGK.shape[2]
    return attention(q_BTHK, k_BTGK.repeat(1, 1, copies, 1), v_BTGK.repeat(1, 1, copies, 1))


def mask_without_causality(documents_BT):
    return documents_BT[:, :, None] == documents_BT[:, None, :]


def shuffle_with_the_width_first(features_NPD, factor):
    N, P, D = features_NPD.shape
    blocks = pixel_shuffle(features_NPD, factor).unflatten(-1, (factor**2, D))
    return blocks.transpose(-1, -2).flatten(-2)


def embed_without_counting(ids_BT, features, embed_tokens):
    x_BTD = embed_tokens(ids_BT.clamp(min=0))
    places = (ids_BT == -1).nonzero()
    for (b, t), feature in zip(places.tolist(), features, strict=False):
        x_BTD[b, t] = feature
    return x_BTD


def loss_without_the_end(turns, tokenizer):
    ids, loss_mask = render_conversation(turns, tokenizer)
    end = tokenizer.special["<|im_end|>"]
    return ids, [has_loss and i != end for i, has_loss in zip(ids, loss_mask, strict=True)]


def greedy(decoder, prompt, max_tokens, top_p, seed):
    return generate_ids(decoder, prompt, max_tokens, 1e-6, seed)


def sampling_without_a_nucleus(decoder, prompt, max_tokens, top_p, seed):
    return generate_ids(decoder, prompt, max_tokens, 1.0 if top_p > 0.5 else top_p, seed)


def lora_without_its_scale(x_BTD, weight, A, B, alpha):
    return x_BTD @ weight.detach().T + x_BTD @ A.T @ B.T


def lora_that_trains_the_base(x_BTD, weight, A, B, alpha):
    return x_BTD @ weight.T + alpha / len(A) * (x_BTD @ A.T @ B.T)


EXERCISES = {  # file: (function, the core's answer, usual mistakes)
    "01_rope": ("apply_rope", rope, [rope_of_neighbors]),
    "02_grouped_query_attention": (
        "attention",
        attention,
        [attention_without_a_mask, attention_with_interleaved_heads],
    ),
    "03_document_mask": ("document_mask", document_mask, [mask_without_causality]),
    "04_pixel_shuffle": ("pixel_shuffle", pixel_shuffle, [shuffle_with_the_width_first]),
    "05_image_features": ("embed", embed, [embed_without_counting]),
    "06_loss_mask": ("render_conversation", render_conversation, [loss_without_the_end]),
    "07_sampling": ("generate", generate_ids, [greedy, sampling_without_a_nucleus]),
    "08_lora": ("lora_linear", lora_linear, [lora_without_its_scale, lora_that_trains_the_base]),
}


def failures(exercise, solution=None):
    """Runs the tests of an exercise, with a function put in. Returns the lines of those that fail."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("exercise", FOLDER / f"{exercise}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    name = EXERCISES[exercise][0]
    assert callable(getattr(module, name))
    if solution:
        setattr(module, name, solution)
        module.merge = merge  # the second function of 08_lora
    lines = []
    for test in [value for key, value in vars(module).items() if key.startswith("test_")]:
        try:
            test()
        except pytest.fail.Exception as error:
            lines.append(str(error))
    return lines


def test_every_exercise_is_listed():
    assert sorted(path.stem for path in FOLDER.glob("[0-9]*.py")) == sorted(EXERCISES)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_fails_in_one_line_until_it_is_solved(exercise):
    lines = failures(exercise)
    assert lines and all("\n" not in line for line in lines)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_core_solves_an_exercise(exercise):
    assert failures(exercise, EXERCISES[exercise][1]) == []


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_notices_usual_mistakes(exercise):
    for mistake in EXERCISES[exercise][2]:
        assert failures(exercise, mistake), mistake.__name__
