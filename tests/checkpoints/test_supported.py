"""Each model in the README's list: made small by transformers (nanoVLM: by its formulas), stitched
unless it is whole, trained for two steps, exported, and read again by transformers, which then says
the same words."""

import json
import re

import pytest
import test_hf_nanovlm
import test_idefics3
import test_llava
import torch
from conftest import ROOT
from test_huggingface import KIND, PUBLISHED, SPECIAL
from test_parity import DECODER, DECODERS, PREPROCESSOR, clip, dinov2, shake, siglip

import prepare
from nanovlm import IGNORE_INDEX, UserError
from nanovlm.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from nanovlm.data import chat_template, image_processing, packing, tokenizer

SIZE = (40, 31)  # of the image
VISIONS = {"CLIP": clip, "SigLIP": siglip, "SigLIP 2": siglip, "DINOv2": dinov2}
# name in the README: (a decoder of test_parity, a published chat template of test_huggingface)
DECODER_KINDS = {
    "Llama": ("llama 3", "llama3"),
    "SmolLM2": ("smollm2", "smollm2"),
    "Mistral": ("mistral 0.1", "mistral, tekken"),
    "Ministral": ("ministral", "mistral-v7"),
    "Qwen2": ("qwen2 with windows from a layer on", "qwen2"),
    "Qwen2.5": ("qwen2.5", "qwen2.5"),
    "Qwen3": ("qwen3", "qwen3"),
    "SmolLM3": ("smollm3", "smollm3"),
}
WHOLE_MODELS = {  # name in the README: (its own tests, one of their KINDS)
    "LLaVA-1.5": (test_llava, "1.5"),
    "LLaVA-NeXT": (test_llava, "1.6 mistral"),
    "Idefics3": (test_idefics3, "Idefics3"),
    "SmolVLM": (test_idefics3, "SmolVLM-256M"),
    "SmolVLM2": (test_idefics3, "SmolVLM2"),
    "nanoVLM-450M": (test_hf_nanovlm, "450M"),
    "nanoVLM-460M-8k": (test_hf_nanovlm, "460M-8k"),
}


def names_in_the_readme(setting):
    """The models that the README lists for a setting; what it says in brackets aside."""
    text = (ROOT / "nanovlm/checkpoints/README.md").read_text()
    row = re.search(rf"^\| `{setting}` \| (.*) \|$", text, re.MULTILINE)[1]
    return re.sub(r" \([^)]*\)", "", row).split(", ")


def test_the_readme_lists_the_models_that_are_tested_here():
    assert names_in_the_readme("--vision") == list(VISIONS)
    assert names_in_the_readme("--decoder") == list(DECODER_KINDS)
    assert names_in_the_readme("--model") == list(WHOLE_MODELS)


def publish_decoder(folder, name):
    """Write a small decoder with its published chat template and a tokenizer that knows it."""
    kind, template = DECODER_KINDS[name]
    special = SPECIAL[KIND[template]]
    words = tokenizer.train_tokenizer(["a cat, a catalogue. Is it kind?"] * 2, 270, special)
    model, config, own = DECODERS[kind]
    sizes = DECODER | {"vocab_size": words.vocab_size + 3} | own
    shake(model(config(**sizes)), 4).save_pretrained(folder)
    words.save(folder)
    ends = {"eos_token": "</s>" if "</s>" in special else special[-1]}
    ends |= {"bos_token": special[0]} if special[0] in ("<s>", "<|begin_of_text|>") else {}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(ends | {"chat_template": PUBLISHED[template]})
    )
    return template.split(",")[0]


def train_two_steps(checkpoint, tmp_path):
    """Every parameter trains, on one image and a short answer. Returns the saved Checkpoint."""
    words, model = checkpoint.tokenizer, checkpoint.model.train()
    test_llava.noise_image(SIZE).save(tmp_path / "a.png")
    image = image_processing.load_image(tmp_path / "a.png", checkpoint.image_config)
    turns = [("user", "<image>\nIs it a cat?")]
    prompt = chat_template.encode_prompt(checkpoint, turns, [image])
    end = chat_template.end_token_id(words, checkpoint.chat_template)
    ids_BT = torch.tensor([[*prompt, *words.encode("It is kind."), end]])
    targets_BT = ids_BT.roll(-1, dims=1)
    targets_BT[:, : len(prompt) - 1] = targets_BT[:, -1] = IGNORE_INDEX
    positions_BT = torch.arange(ids_BT.shape[1])[None]
    tiles = packing.collate_images([image], checkpoint.image_config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(ids_BT, targets_BT, positions_BT, torch.zeros_like(ids_BT), **tiles)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    save_checkpoint(checkpoint, tmp_path / "trained")
    return load_checkpoint(tmp_path / "trained")


PAIRS = [("CLIP", name) for name in DECODER_KINDS] + [(name, "Qwen2.5") for name in VISIONS][1:]


def stitch(vision, decoder, tmp_path, **choices):
    """Returns the Checkpoint of two models of the list."""
    VISIONS[vision]().save_pretrained(tmp_path / "vision")
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    template = publish_decoder(tmp_path / "decoder", decoder)
    parts = {part: str(tmp_path / part) for part in ("vision", "decoder")}
    prepare.stitch(**parts, out=str(tmp_path / "stitched"), **choices)
    checkpoint = load_checkpoint(tmp_path / "stitched")
    assert checkpoint.chat_template == template
    return checkpoint


@pytest.mark.parametrize("vision, decoder", PAIRS)
def test_a_model_of_the_list_is_trained_and_handed_back(vision, decoder, tmp_path):
    layer = None if vision == "DINOv2" else -2
    checkpoint = stitch(vision, decoder, tmp_path, vision_feature_layer=layer)
    trained = train_two_steps(checkpoint, tmp_path)
    if vision == "DINOv2":
        with pytest.raises(UserError, match="a LLaVA folder cannot express a vision encoder that"):
            test_llava.exported(tmp_path / "trained", tmp_path / "out")
        return
    out = test_llava.exported(tmp_path / "trained", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["model_type"] == DECODERS[DECODER_KINDS[decoder][0]][1].model_type
    turns = test_llava.CONVERSATIONS["more"]
    test_llava.assert_the_same(trained, out, turns, [SIZE], tmp_path)


@pytest.mark.parametrize("decoder", ["Ministral", "Qwen2.5", "Qwen3", "SmolLM3"])
def test_a_model_with_pixel_shuffle_and_tiles_is_handed_on_as_idefics3(decoder, tmp_path):
    choices = dict(shuffle=2, longest_edge=84, projector="linear")
    trained = train_two_steps(stitch("SigLIP 2", decoder, tmp_path, **choices), tmp_path)
    out = test_llava.exported(tmp_path / "trained", tmp_path / "out")
    test_idefics3.assert_the_same(trained, out, [("user", "<image>\nA cat?")], [SIZE], tmp_path)


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_a_whole_model_of_the_list_is_trained_and_handed_back(name, tmp_path):
    layout, kind = WHOLE_MODELS[name]
    folder = layout.publish(tmp_path / "published", **layout.KINDS[kind])
    trained = train_two_steps(load_checkpoint(folder), tmp_path)
    out = test_llava.exported(tmp_path / "trained", tmp_path / "out")
    question = "Is it?" if layout is test_hf_nanovlm else test_llava.CONVERSATIONS["more"]
    layout.assert_the_same(trained, out, question, [SIZE], tmp_path)
