"""Each model in the README's list: made small by transformers, stitched, trained for two steps,
exported, and read again by transformers, which then says the same words."""

import json
import re

import pytest
import test_llava
import torch
from conftest import ROOT
from test_huggingface import KIND, PUBLISHED, SPECIAL
from test_parity import DECODER, DECODERS, PREPROCESSOR, clip, dinov2, shake, siglip

import prepare
from nanovlm import IGNORE_INDEX, UserError
from nanovlm.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from nanovlm.data import chat_template, image_processing, packing, tokenizer

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


def names_in_the_readme(setting):
    """The models that the README lists for a setting; what it says in brackets aside."""
    text = (ROOT / "nanovlm/checkpoints/README.md").read_text()
    row = re.search(rf"^\| `{setting}` \| (.*) \|$", text, re.MULTILINE)[1]
    return re.sub(r" \([^)]*\)", "", row).split(", ")


def test_the_readme_lists_the_models_that_are_tested_here():
    assert names_in_the_readme("--vision") == list(VISIONS)
    assert names_in_the_readme("--decoder") == list(DECODER_KINDS)


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


def train_two_steps(checkpoint, path):
    """Every parameter trains, on one image and a short answer."""
    words, model = checkpoint.tokenizer, checkpoint.model.train()
    image = image_processing.load_image(path, checkpoint.image_config)
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
    model.eval()


PAIRS = [("CLIP", name) for name in DECODER_KINDS] + [(name, "Qwen2.5") for name in VISIONS][1:]


@pytest.mark.parametrize("vision, decoder", PAIRS)
def test_a_model_of_the_list_is_trained_and_handed_back(vision, decoder, tmp_path):
    VISIONS[vision]().save_pretrained(tmp_path / "vision")
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    template = publish_decoder(tmp_path / "decoder", decoder)
    parts = {part: str(tmp_path / part) for part in ("vision", "decoder")}
    layer = None if vision == "DINOv2" else -2
    prepare.stitch(**parts, out=str(tmp_path / "stitched"), vision_feature_layer=layer)
    checkpoint = load_checkpoint(tmp_path / "stitched")
    assert checkpoint.chat_template == template
    test_llava.noise_image((40, 31)).save(tmp_path / "a.png")
    train_two_steps(checkpoint, tmp_path / "a.png")
    save_checkpoint(checkpoint, tmp_path / "trained")
    if vision == "DINOv2":
        with pytest.raises(UserError, match="a LLaVA folder cannot express a vision encoder that"):
            test_llava.exported(tmp_path / "trained", tmp_path / "out")
        return
    out = test_llava.exported(tmp_path / "trained", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["model_type"] == DECODERS[DECODER_KINDS[decoder][0]][1].model_type
    turns = test_llava.CONVERSATIONS["more"]
    test_llava.assert_the_same(tmp_path / "trained", out, turns, [tmp_path / "a.png"])
