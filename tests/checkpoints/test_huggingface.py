"""Published folders, with all names that tensors and fields have had, become parts of a model. What
is broken, unknown or missing is named."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_parity import CHATML, DECODER, PREPROCESSOR, clip, dinov2, publish, shake, siglip

import prepare
from nanovlm import UserError
from nanovlm.checkpoints import huggingface
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.data import chat_template, image_processing, jinja_template, tokenizer
from nanovlm.files import (
    download_pretrained,
    list_weight_files,
    match_tensors,
    read_json,
    read_weights,
)


def llama(**other):
    sizes = DECODER | {"num_hidden_layers": 2}
    return shake(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | other)), 4)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A CLIP and a Llama as transformers writes them, for tests that only read."""
    folder = tmp_path_factory.mktemp("published")
    return publish(clip(), folder / "clip"), publish(llama(), folder / "llama")


@pytest.fixture
def vision_folder(published, tmp_path):
    return copy(published[0], tmp_path / "vision")


@pytest.fixture
def decoder_folder(published, tmp_path):
    return copy(published[1], tmp_path / "decoder")


def copy(source, folder):
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(path, **fields):
    """Set fields of a JSON file; a field set to `...` is removed."""
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def rename(folder, change):
    """Save a folder's tensors under other names; None drops one."""
    tensors = {
        change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


# ---- names of files and tensors ----
def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_old_bin(folder):
    torch.save(
        load_file(folder / "model.safetensors"),
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    (folder / "model.safetensors").unlink()


def as_shards(folder, suffix=".safetensors"):
    tensors, stem = (
        load_file(folder / "model.safetensors"),
        "model" if suffix == ".safetensors" else "pytorch_model",
    )
    shards = {name: f"{stem}-0000{n % 3 + 1}-of-00003{suffix}" for n, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensors[name] for name in tensors if shards[name] == shard}
        save_file(part, folder / shard) if suffix == ".safetensors" else torch.save(
            part, folder / shard
        )
    (folder / f"{stem}{suffix}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": shards})
    )
    (folder / "model.safetensors").unlink()


def as_bin_shards(folder):
    as_shards(folder, ".bin")


def beside_mistrals_own_format(folder):
    (folder / "consolidated.safetensors").write_bytes(b"not safetensors")


def with_tables_of_older_versions(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors
        | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)},
        folder / "model.safetensors",
    )


def in_a_llava_of_transformers_4(folder):
    rename(folder, lambda name: f"language_model.{name}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava", "text_config": config, "vision_config": {}})
    )


def in_a_llava_of_transformers_5(folder):
    rename(
        folder,
        lambda name: (
            name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        ),
    )
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.vision_tower.pre_layrnorm.weight": torch.ones(3)},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize(
    "rewrite",
    [
        as_bin,
        as_old_bin,
        as_shards,
        as_bin_shards,
        beside_mistrals_own_format,
        with_tables_of_older_versions,
        in_a_llava_of_transformers_4,
        in_a_llava_of_transformers_5,
    ],
)
def test_every_form_of_a_decoder_folder_is_the_same_decoder(rewrite, decoder_folder, published):
    rewrite(decoder_folder)
    same(
        huggingface.read_decoder(decoder_folder).model.decoder,
        huggingface.read_decoder(published[1]).model.decoder,
    )


@pytest.mark.parametrize(
    "prefix",
    [
        "vision_model.",
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "vision_tower.",
    ],
)
def test_every_prefix_of_a_vision_encoder_is_the_same_vision_encoder(
    prefix, vision_folder, published
):
    rename(vision_folder, lambda name: prefix + name)
    tensors = load_file(vision_folder / "model.safetensors")
    # other tensors of a whole CLIP of transformers 4
    beside = {
        name: torch.ones(3)
        for name in (
            "text_model.final_layer_norm.weight",
            "logit_scale",
            "visual_projection.weight",
        )
    }
    save_file(
        tensors | beside | {f"{prefix}embeddings.position_ids": torch.arange(17)},
        vision_folder / "model.safetensors",
    )
    same(
        huggingface.read_vision_encoder(vision_folder).model.vision,
        huggingface.read_vision_encoder(published[0]).model.vision,
    )


def test_the_vision_encoder_of_a_whole_clip_and_of_a_whole_siglip(tmp_path):
    sizes = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=31,
        max_position_embeddings=8,
    )
    ends = dict(bos_token_id=1, eos_token_id=2)
    for config, model, make in [
        (hf.CLIPConfig, hf.CLIPModel, clip),
        (hf.SiglipConfig, hf.SiglipModel, siglip),
    ]:
        alone = publish(make(), tmp_path / f"{make.__name__}-alone")
        whole = model(config(vision_config=make().config.to_dict(), text_config=sizes | ends))
        inner = getattr(whole.vision_model, "vision_model", whole.vision_model)
        inner.load_state_dict(make().state_dict())
        same(
            huggingface.read_vision_encoder(publish(whole, tmp_path / make.__name__)).model.vision,
            huggingface.read_vision_encoder(alone).model.vision,
        )


@torch.no_grad()
def test_a_siglip_2_of_fixed_resolution_by_its_own_preprocessor_file(tmp_path):
    """It is a whole model with SigLIP's names; its preprocessor_config.json, here with 28 pixels,
    squashes an image. Its pixels may differ by one level of 255, its features do not differ."""
    text = dict(DECODER, max_position_embeddings=8, bos_token_id=1, eos_token_id=2)
    theirs = shake(
        hf.SiglipModel(hf.SiglipConfig(vision_config=siglip().config.to_dict(), text_config=text)),
        7,
    )
    folder = publish(theirs, tmp_path / "siglip2")
    published = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    numbers = torch.randint(256, (31, 57, 3), generator=torch.Generator().manual_seed(0))
    photo = Image.fromarray(numbers.to(torch.uint8).numpy())
    photo.save(tmp_path / "a.png")
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels_NCYX = processor(photo, return_tensors="pt")["pixel_values"]
    ours = huggingface.read_vision_encoder(folder)
    tiles = image_processing.load_image(tmp_path / "a.png", ours.image_config).tiles
    assert (torch.tensor(tiles) - (pixels_NCYX + 1) * 127.5).abs().max() < 1.01
    torch.testing.assert_close(
        ours.model.vision(pixels_NCYX), theirs.vision_model(pixels_NCYX).last_hidden_state
    )


def test_naflex_is_refused_with_what_to_take_instead(tmp_path):
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    hf.Siglip2Config(vision_config=sizes, text_config=sizes).save_pretrained(tmp_path)
    processor = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 16}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | processor | {"size": None, "max_num_patches": 256})
    )
    with pytest.raises(
        UserError,
        match="siglip2_vision_model is not known here, only .*; it needs tiles of any shape .NaFlex.: "
        "take a SigLIP 2 of a fixed resolution, such as google/siglip2-base-patch16-256$",
    ):
        huggingface.read_vision_encoder(tmp_path)


def test_rope_as_older_and_newer_folders_write_it():
    base = dict(huggingface.DEFAULTS["llama"], model_type="llama")
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert (
        huggingface.rope_config(base | old, "here")
        == huggingface.rope_config(base | new, "here")
        == (5e5, {"rope_type": "linear", "factor": 2.0})
    )
    yarn = huggingface.rope_config(
        base | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "here"
    )[1]
    # if it is left out, it is max_position_embeddings
    assert yarn["original_max_position_embeddings"] == 2048
    assert huggingface.rope_config(base, "here") == (10000.0, None)
    assert huggingface.rope_config(base | {"rope_theta": 1e6, "rope_scaling": None}, "here") == (
        1e6,
        None,
    )


def test_clips_vision_config_dict_has_precedence_over_vision_config():
    """openai/clip-vit-large-patch14 has both. transformers adds defaults to the first and lets it
    override the second."""
    config = {
        "model_type": "clip",
        "vision_config": {"hidden_size": 48, "num_hidden_layers": 5, "hidden_act": "gelu"},
        "vision_config_dict": {"hidden_size": 60, "patch_size": 14},
    }
    ours, theirs = (
        huggingface.model_config(config, "vision_config", huggingface.VISION_FAMILIES, "here"),
        hf.CLIPConfig(**config).vision_config.to_dict(),
    )
    assert {name: theirs[name] for name in huggingface.DEFAULTS["clip_vision_model"]} == {
        name: ours[name] for name in huggingface.DEFAULTS["clip_vision_model"]
    }


# ---- what is refused ----
@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 64),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "awq"}),
        ("auto_map", {"AutoModel": "x.Y"}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope"}),
        ("rope_scaling", {"rope_type": "llama3"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "original": 7}),
        ("model_type", "gpt2"),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_decoder_that_computes_something_else_is_refused_by_name(field, value, decoder_folder):
    edit(decoder_folder / "config.json", **{"rope_parameters": ..., field: value})
    message = (
        "RoPE of type (dynamic|longrope|llama3 needs|linear is not known to have original)"
        if field == "rope_scaling"
        else field.split("_type")[0]
    )
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        huggingface.read_decoder(decoder_folder)


@pytest.mark.parametrize(
    "make, field, value",
    [
        (dinov2, "use_swiglu_ffn", True),
        (clip, "hidden_act", "relu"),
        (siglip, "num_channels", 4),
        (dinov2, "model_type", "dinov2_with_registers"),
        (siglip, "model_type", "siglip2_vision_model"),
    ],
)
def test_a_vision_encoder_that_computes_something_else_is_refused_by_name(
    make, field, value, tmp_path
):
    edit(publish(make(), tmp_path) / "config.json", **{field: value})
    with pytest.raises(UserError, match=value if field == "model_type" else f"{field} {value}"):
        huggingface.read_vision_encoder(tmp_path)


@pytest.mark.parametrize(
    "model_type, needs",
    [
        ("gemma2", "scaled embeddings, norms by 1 [+] weight, .* and a GELU"),
        ("gemma3_text", "scaled embeddings"),
        ("phi3", "joint q/k/v and gate/up layers, and another RoPE"),
        ("olmo2", "norms after the sublayers, and one of q and k over all heads"),
        ("qwen3_moe", "a mixture of experts"),
        ("mixtral", "a mixture of experts"),
        ("qwen3_next", "layers that are not attention: state-space, linear or convolutional ones"),
        ("granitemoehybrid", "a mixture of experts"),
        ("falcon_h1", "layers that are not attention"),
    ],
)
def test_a_decoder_of_another_kind_is_refused_with_what_it_needs(model_type, needs, decoder_folder):
    edit(decoder_folder / "config.json", model_type=model_type)
    with pytest.raises(
        UserError,
        match=f"type {model_type} is not known here, only llama, .*, smollm3; it needs {needs}",
    ):
        huggingface.read_decoder(decoder_folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"no_rope_layers": [1, 0, 1]}, r"rope_layers \[1, 0, 1\]"),
        ({"no_rope_layers": 7}, "TypeError"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval 0 is not a whole number"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window of None"),
    ],
)
def test_odd_layers_without_rope_are_refused(fields, message, tmp_path):
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = hf.SmolLM3Config(**DECODER | {"num_hidden_layers": 4} | ids)
    folder = publish(hf.SmolLM3ForCausalLM(config), tmp_path)
    assert huggingface.read_decoder(folder).shapes["decoder"]["rope_layers"] == [1, 1, 1, 0]
    edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        huggingface.read_decoder(folder)


REQUIRED = {"decoder": huggingface.DECODER_REQUIRED, "vision": huggingface.VISION_REQUIRED}
READERS = {"decoder": huggingface.read_decoder, "vision": huggingface.read_vision_encoder}


@pytest.mark.parametrize(
    "part, field", [(part, field) for part, fields in REQUIRED.items() for field in fields]
)
def test_each_field_that_would_change_a_result_is_refused(part, field, request):
    folder = request.getfixturevalue(f"{part}_folder")
    value = {True: False, False: True}.get(REQUIRED[part][field], 7)
    edit(folder / "config.json", **{field: value})
    with pytest.raises(UserError, match=f"config.json: {field} {value} is not known here"):
        READERS[part](folder)


# Fields that change no result: how transformers initializes, trains, caches and labels; parts that
# are not read; which ids begin and end a text, which the template knows. RoPE has no table of
# max_position_embeddings rows; RoPE that is scaled from that length reads it.
HARMLESS = {
    "attention_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "drop_path_rate",
    "initializer_range",
    "initializer_factor",
    "layerscale_value",
    "use_mask_token",
    "use_cache",
    "pretraining_tp",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "projection_dim",
    "vision_use_head",
    "out_features",
    "out_indices",
    "stage_names",
    "reshape_hidden_states",
    "max_position_embeddings",
}


class Read(dict):
    """A config that records which of its fields are read."""

    def __init__(self, fields):
        super().__init__(fields)
        self.fields_read = set()

    def __getitem__(self, field):
        self.fields_read.add(field)
        return super().__getitem__(field)

    def get(self, field, other=None):
        self.fields_read.add(field)
        return super().get(field, other)


@pytest.mark.parametrize(
    "kind",
    [
        hf.CLIPVisionConfig,
        hf.SiglipVisionConfig,
        hf.Dinov2Config,
        hf.LlamaConfig,
        hf.MistralConfig,
        hf.MinistralConfig,
        hf.Qwen2Config,
        hf.Qwen3Config,
        hf.SmolLM3Config,
    ],
    ids=lambda kind: kind.model_type,
)
def test_every_field_that_transformers_knows_is_read_or_changes_nothing(kind):
    config = kind(**{"sliding_window": 9} if kind is hf.MinistralConfig else {}).to_dict()
    read = Read(huggingface.DEFAULTS[kind.model_type] | config)
    if kind.model_type in huggingface.VISION_FAMILIES:
        huggingface.vision_shapes(read, read["image_size"], None, "here")
    else:
        huggingface.decoder_shapes(read, "here")
    own = config.keys() - hf.PretrainedConfig().to_dict().keys()
    assert len(own) > 8 and own - read.fields_read == own & HARMLESS


def set_tensors(**changes):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            tensors[f"model.{name}.weight"] = tensor
        save_file(tensors, folder / "model.safetensors")

    return change


def put_a_tensor_in_two_shards(folder):
    as_shards(folder)
    shards = [load_file(folder / f"model-0000{n}-of-00003.safetensors") for n in (1, 2)]
    save_file(shards[0] | shards[1], folder / "model-00001-of-00003.safetensors")


def call_a_tensor_by_two_names(folder):
    """One name of a decoder alone, one of the same decoder in a LLaVA; an index may hold either."""
    as_shards(folder)
    save_file({"language_model.model.norm.weight": torch.ones(48)}, folder / "other.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["language_model.model.norm.weight"] = "other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def take_a_tensor_out_of_its_shard(folder):
    as_shards(folder)
    path = folder / "model-00001-of-00003.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path)


def keep_an_index_of_nothing(folder):
    as_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": null}}')


def name_a_shard(name):
    def change(folder):
        (folder.parent / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()
        )
        file = name.format(folder=folder.parent)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": file}})
        )
        (folder / "model.safetensors").unlink()

    return change


def lose_a_shard(folder):
    as_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_a_shard(folder):
    as_shards(folder)
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


class Code:
    """Writes a file if its pickle is loaded without weights_only."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickle_code(folder):
    torch.save({"model.norm.weight": Code(folder / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def corrupt_a_pickle(folder):
    """A byte inside the pickle differs: whatever Python raises, the file is reported as broken."""
    as_old_bin(folder)
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[data.index(b"model.norm.weight") - 4] ^= 255  # the length of that name
    (folder / "pytorch_model.bin").write_bytes(data)


def cut_a_bin(folder):
    as_bin(folder)
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-1000])


def keep_a_list(folder):
    torch.save([torch.ones(3)], folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def keep_no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: rename(folder, lambda name: None if "norm.weight" in name else name),
            "layers.0.input_layernorm.weight is missing; .*model.norm.weight is missing",
        ),
        (set_tensors(extra=torch.ones(3)), "model.extra.weight in model.safetensors is not used"),
        (
            set_tensors(norm=torch.ones(49)),
            r"model.norm.weight in model.safetensors is \[49\], the model expects \[48\]",
        ),
        (
            set_tensors(norm=torch.full((48,), torch.nan)),
            "model.norm.weight in model.safetensors holds a NaN or infinite value",
        ),
        (set_tensors(norm=torch.full((48,), -torch.inf)), "NaN or infinite"),
        (
            set_tensors(norm=torch.ones(48, dtype=torch.int8)),
            "model.norm.weight in model.safetensors has dtype torch.int8",
        ),
        (
            name_a_shard("../model.safetensors"),
            "index.json names ../model.safetensors for lm_head.weight, which is not in the folder",
        ),
        (
            name_a_shard("{folder}/model.safetensors"),
            "index.json names /.*/model.safetensors for lm_head.weight, which is not in the folder",
        ),
        (name_a_shard(".."), "index.json names .. for lm_head.weight, which is not in the folder"),
        (keep_an_index_of_nothing, "index.json names None for lm_head.weight, which is not in"),
        (
            take_a_tensor_out_of_its_shard,
            "model-00001-of-00003.safetensors lacks lm_head.weight, unlike its folder's index",
        ),
        (
            call_a_tensor_by_two_names,
            "model.norm.weight is both in .*model-0000.-of-00003.safetensors and in "
            ".*other.safetensors",
        ),
        (
            put_a_tensor_in_two_shards,
            "model-00001-of-00003.safetensors holds .*, unlike its folder's index",
        ),
        (lose_a_shard, "names model-00002-of-00003.safetensors for .*, which is not in the folder"),
        (cut_a_shard, "model-00003-of-00003.safetensors is broken, cut short"),
        (pickle_code, "pytorch_model.bin is broken, .* or holds more than tensors"),
        (keep_a_list, "pytorch_model.bin is broken, .*: not a dict of tensors"),
        (cut_a_bin, r"pytorch_model.bin is broken, cut short \([\d,]+ bytes\)"),
        (corrupt_a_pickle, "pytorch_model.bin is broken, cut short"),
        (keep_no_weights, "holds neither model.safetensors nor pytorch_model.bin"),
        (
            lambda folder: edit(folder / "config.json", num_hidden_layers=1),
            "model.layers.1.input_layernorm.weight in .* is not used",
        ),
        (
            lambda folder: edit(folder / "config.json", vocab_size=100),
            "the vocabulary is 100, its folder's tokenizer knows 262 tokens",
        ),
        (
            lambda folder: edit(folder / "config.json", num_attention_heads=0),
            "config.json: num_attention_heads 0 is not a whole number from 1 on",
        ),
        (
            lambda folder: edit(folder / "config.json", hidden_size="48"),
            "config.json: hidden_size '48' is not a whole number",
        ),
        (
            lambda folder: edit(folder / "config.json", tie_word_embeddings=True),
            "lm_head.weight is not embed_tokens.weight",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "config.json is not a JSON object",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), "model of type None"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "holds neither a nanovlm checkpoint nor a config.json",
        ),
    ],
)
def test_a_broken_folder_is_refused_by_file_and_tensor(change, message, decoder_folder):
    change(decoder_folder)
    with pytest.raises(UserError, match=message) as error:
        huggingface.read_decoder(decoder_folder)
    assert "\n" not in str(error.value) and not (decoder_folder / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.mlp.fc1.bias", "encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight"],
)
def test_layers_after_the_feature_layer_are_checked_too(name, vision_folder):
    """CLIP's last layer and norm: a LLaVA folder is exported with them."""
    tensors = load_file(vision_folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(name))
    plain = name.removeprefix("vision_model.")
    for other, message in (
        (
            torch.full_like(tensors[name], torch.nan),
            f"{plain} in model.safetensors holds a NaN or infinite value",
        ),
        (torch.ones(5), rf"{plain} in model.safetensors is \[5\]"),
        (None, f"{plain} is missing"),
    ):
        save_file(
            {n: t for n, t in (tensors | {name: other}).items() if t is not None},
            vision_folder / "model.safetensors",
        )
        with pytest.raises(UserError, match=message):
            huggingface.read_vision_encoder(vision_folder)


# ---- a full-size folder ----
def sparse(path, shapes):
    """Write a safetensors file of bfloat16: its header, and no numbers (a sparse file)."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [end, end := end + 2 * math.prod(shape)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def mistral_7b(folder):
    """Mistral-7B-Instruct-v0.3 as published, without its tokenizer and its numbers: config, three
    shards, index."""
    config = hf.MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        sliding_window=None,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in hf.MistralForCausalLM(config).state_dict().items()
        }
    shards, size = [{}], 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > 5e9:  # as transformers fills them
            shards, size = [*shards, {}], 0
        shards[-1][name], size = shape, size + 2 * shape.numel()
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        sparse(folder / name, shard)
    index = {
        "metadata": {"total_size": 14_496_047_104},
        "weight_map": {key: n for n, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")
def test_a_full_size_mistral_is_matched_without_reading_its_numbers(tmp_path):
    """Names, shapes and bytes of 14.5 GB are compared with the config, and no memory is allocated,
    also if a shape is wrong."""
    folder = mistral_7b(tmp_path)
    paths, where = list_weight_files(folder), folder / "config.json"
    shapes = huggingface.decoder_shapes(
        huggingface.model_config(
            read_json(where), "text_config", huggingface.DECODER_FAMILIES, where
        ),
        where,
    )
    with torch.device("meta"):
        wanted = {
            huggingface.published_name(name, huggingface.LLAMA): t.shape
            for name, t in huggingface.Decoder(**shapes).state_dict().items()
        }
    before = resident()
    matched = match_tensors(
        wanted,
        read_weights(paths, huggingface.DECODER_PREFIXES),
        huggingface.DECODER_IGNORED,
        paths,
    )
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    assert len(paths) == 3 and sum(tensor.nbytes for tensor in matched.values()) == total == sum(
        2 * shape.numel() for shape in wanted.values()
    )
    assert {name: tensor.shape for name, tensor in matched.items()} == wanted and {
        t.dtype for t in matched.values()
    } == {torch.bfloat16}
    assert (
        resident() - before < 20e6
        and sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 1e6
    )
    with torch.device("meta"):
        other = huggingface.Decoder(**shapes | {"kv_heads": 4})
    with pytest.raises(
        UserError,
        match=r"self_attn.k_proj.weight in model-0000.-of-00003.safetensors is \[1024, 4096\], "
        r"the model expects \[512, 4096\];"
        ".* and 54 more",
    ):
        huggingface.load_published_tensors(
            other,
            huggingface.LLAMA,
            read_weights(paths, huggingface.DECODER_PREFIXES),
            huggingface.DECODER_IGNORED,
            paths,
        )
    assert resident() - before < 20e6


# ---- where folders lie ----
def cached(home, name, source, commit="0123abc"):
    """A snapshot in the Hugging Face cache, as huggingface_hub lays it out."""
    cache = home / "hub" / f"models--{name.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    folder = copy(source, cache / "snapshots" / commit)
    (cache / "blobs").mkdir()
    for path in folder.iterdir():  # a snapshot is links into blobs, named by their hashes
        path.rename(blob := cache / "blobs" / f"b{hash(path.name):x}")
        path.symlink_to(Path("../../blobs") / blob.name)
    return folder


def test_owner_and_name_are_found_in_the_cache(published, decoder_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    as_shards(decoder_folder)
    folder = cached(tmp_path, "someone/decoder", decoder_folder)
    (folder / "README.md").write_text("---\ntags:\n- text\nlicense: apache-2.0\n---\n# A decoder\n")
    part = huggingface.read_decoder("someone/decoder")
    same(part.model.decoder, huggingface.read_decoder(published[1]).model.decoder)
    source, shards = part.history["folder"], sorted(folder.glob("*.safetensors"))
    assert (source["from"], source["revision"], source["license"]) == (
        "someone/decoder",
        "0123abc",
        "apache-2.0",
    )
    printed = subprocess.run(["sha256sum", *shards], capture_output=True, text=True).stdout.split()
    assert len(shards) == 3 and source["files"] == {
        path.name: sha for path, sha in zip(shards, printed[::2], strict=True)
    }


def test_a_model_that_is_nowhere_comes_with_the_command_that_downloads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(
        UserError, match="to download it: pip install huggingface_hub && hf download some/one"
    ):
        huggingface.read_decoder("some/one")
    with pytest.raises(UserError, match="no such folder: out/some/one"):
        huggingface.read_decoder("out/some/one")


class Hub:
    """A stand-in for huggingface_hub: it lists `files` and records what is downloaded."""

    def __init__(self, files, folder):
        self.files, self.folder = files, folder

    def list_repo_files(self, name):
        return self.files

    def snapshot_download(self, name, allow_patterns):
        if not self.folder:
            raise ConnectionError("no route\nto host")
        self.downloaded = sorted(allow_patterns)
        return str(self.folder)


def test_only_what_is_read_is_downloaded(tmp_path):
    names = [
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "model-1.safetensors",
        "original/params.json",
        "pytorch_model.bin",
        "tokenizer.model",
    ]
    hub = Hub(names, tmp_path)
    assert download_pretrained("a/b", hub) == tmp_path and hub.downloaded == [
        "README.md",
        "config.json",
        "model-1.safetensors",
        "tokenizer.model",
    ]
    hub.files = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    download_pretrained("a/b", hub)
    assert hub.downloaded == ["config.json", "pytorch_model.bin"]
    with pytest.raises(
        UserError,
        match="a/b is not a local folder and was not downloaded: ConnectionError no route to host",
    ):
        download_pretrained("a/b", Hub(names, None))


# ---- image configs ----
OLD_CLIP = {
    "crop_size": 28,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
    "size": 28,
}
NEW_CLIP = OLD_CLIP | {
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 28},
    "rescale_factor": 1 / 255,
}
SIGLIP2 = {
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_rescale": True,
    "do_convert_rgb": None,
}
BIT = NEW_CLIP | {"size": {"shortest_edge": 32}}  # DINOv2's enlarges to 256 and cuts 224


@pytest.mark.parametrize(
    "config, choices, fit, tile, resample",
    [
        (OLD_CLIP, {}, "crop", 28, "bicubic"),
        (NEW_CLIP, {}, "crop", 28, "bicubic"),
        (SIGLIP2, {}, "squash", 28, "bilinear"),
        (NEW_CLIP, {"fit": "pad"}, "pad", 28, "bicubic"),
        (SIGLIP2, {"tile": 42}, "squash", 42, "bilinear"),
        (BIT, {"fit": "crop"}, "crop", 28, "bicubic"),
    ],
)
def test_the_image_config_is_that_of_the_folders_preprocessor(
    config, choices, fit, tile, resample, vision_folder
):
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(config))
    part = huggingface.read_vision_encoder(vision_folder, **choices)
    assert part.image_config == {
        "tile": tile,
        "patch": 7,
        "shuffle": 1,
        "fit": fit,
        "resample": resample,
        "mean": config["image_mean"],
        "std": config["image_std"],
    }
    assert len(part.model.vision.positions) == 1 + image_processing.tokens_per_tile(
        part.image_config
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do_normalize": False}, "do_normalize False"),
        ({"resample": 0}, "resample 0"),
        ({"rescale_factor": 1 / 127}, "rescale_factor 0.007"),
        ({"image_mean": ...}, "holds no image_mean"),
        ({"size": {"shortest_edge": 32}}, "choose --fit"),
        ({"do_center_crop": False}, "choose --fit"),
        ({"crop_size": {"height": 28, "width": 35}}, "choose --tile"),
    ],
)
def test_a_preprocessor_with_other_pixels_is_refused(change, message, vision_folder):
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(NEW_CLIP))
    edit(vision_folder / "preprocessor_config.json", **change)
    with pytest.raises(UserError, match=message):
        huggingface.read_vision_encoder(vision_folder)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"vision_feature_layer": 0}, "--vision_feature_layer=0"),
        ({"vision_feature_layer": -4}, "--vision_feature_layer=-4 is not among the 3 layers"),
        ({"tile": 3}, "tile of 3"),
        ({"shuffle": 3}, "--shuffle=3 does not divide the 4 patches"),
    ],
)
def test_options_that_do_not_fit_a_vision_encoder(choices, message, published):
    with pytest.raises(UserError, match=message):
        huggingface.read_vision_encoder(published[0], **choices)


# ---- chat templates, as published with the models named; of the longer ones, the part that writes
# a conversation without tools ----
NO_SYSTEM = (
    "{% if m['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
)
LOOP = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in "
    "loop_messages %}"
)
# The published ones without their tools.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if loop.index0 > ns.last_query and loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
SMOLLM3 = """{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{% set instructions = messages[0].content.rstrip() %}{% endif %}
{{- '## Metadata\\n\\nKnowledge Cutoff Date: June 2025\\n' }}
{%- set today = strftime_now('%d %B %Y') %}
{{- 'Today Date: ' ~ today ~ '\\nReasoning Mode: ' + mode + '\\n\\n## Custom Instructions\\n\\n' }}
{%- if instructions %}
    {{- instructions + '\\n\\n' }}
{%- else %}
    {{- 'You are a helpful AI assistant named SmolLM, trained by Hugging Face.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' }}
        {{- '<think>\\n\\n</think>\\n' if mode == '/no_think' }}
        {{- message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if mode == '/no_think' else '') }}
{%- endif %}"""
PUBLISHED = {
    "chatml": CHATML,
    "qwen2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
    "%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2.5": "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + "
    "messages[0]['content'] + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are Qwen, "
    "created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' "
    "and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- endif %}",
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
    "%}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content "
    "= '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
    "%}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' "
    "+ message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}"
    "\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + "
    "eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor "
    "%}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% "
    "set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% "
    "for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
    "system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if "
    "message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral-v1": "{{ bos_token }}{% for m in messages %}"
    + NO_SYSTEM
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor "
    "%}",
    "mistral-v1, newer": LOOP
    + "{%- if message['role'] == 'user' %}{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}",
    "mistral, v3": LOOP
    + "{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}",
    "mistral, tekken": LOOP
    + "{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST]' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- message['content'] + eos_token}}{%- endif %}{%- endfor %}",
    "mistral-v7": "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- "
    "'[INST]' + m['content'] + '[/INST]' }}"
    "{%- elif m['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}",
}
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    "plain": ["<s>", "</s>"],
}
KIND = {
    "chatml": "chatml",
    "smollm2": "chatml",
    "qwen2": "chatml",
    "qwen2.5": "chatml",
    "qwen3": "chatml",
    "smollm3": "chatml",
    "llama3": "llama3",
    "mistral, v3": "mistral",
    "mistral, tekken": "mistral",
    "mistral-v7": "mistral",
}
SENTENCEPIECE = ("zephyr", "llama2", "mistral-v1", "mistral-v1, newer", "mistral, v3")


class SentencePiece:
    """As much of a SentencePiece tokenizer as tells it from others: a space before every text."""

    bytes_of = {7: b" a"}

    def __init__(self, special):
        self.special = special

    def encode(self, text):
        return [7]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_template_is_identified_by_the_text_that_it_writes(name, tmp_path):
    special = SPECIAL[KIND.get(name, "plain")]
    ends = {"llama3": ("<|begin_of_text|>", "<|eot_id|>"), "chatml": (None, "<|im_end|>")}.get(
        KIND.get(name), ("<s>", {"content": "</s>"})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": ends[0], "eos_token": ends[1], "chat_template": PUBLISHED[name]})
    )
    own = tokenizer.train_tokenizer(["hello goodbye"], 258, special)
    if name in SENTENCEPIECE:
        own = SentencePiece(own.special)
    assert (
        jinja_template.identify_template(*huggingface.read_chat_template(tmp_path), own, tmp_path)
        == name.split(",")[0]
    )


BYTE_LEVEL = [name for name in KIND if name != "mistral, v3"]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_our_ids_are_those_of_apply_chat_template(name, tmp_path):
    """Of prompts, and of whole conversations. A model that can think is not asked to. The date in
    SmolLM3's is the day of its release, not today's."""
    special = SPECIAL[KIND[name]]
    own = tokenizer.train_tokenizer(["hello goodbye be kind"], 265, special)
    own.save(tmp_path)
    theirs = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        chat_template=PUBLISHED[name].replace("strftime_now('%d %B %Y')", "'08 July 2025'"),
        bos_token=special[0],
        eos_token={"mistral": "</s>"}.get(KIND[name], special[-1]),
    )
    turns = [("user", "Hello, you?\n  Two"), ("assistant", "Yes: <3"), ("user", "Goodbye")]
    system = ("system", "Be kind.")
    for conversation in (turns, turns[:1], [system, turns[0]], turns[:2], [*turns, turns[1]]):
        messages = [{"role": role, "content": text} for role, text in conversation]
        expected = theirs.apply_chat_template(
            messages,
            add_generation_prompt=conversation[-1][0] == "user",
            tokenize=True,
            return_dict=False,
            enable_thinking=False,
        )
        assert (
            chat_template.render_conversation(conversation, own, name.split(",")[0])[0] == expected
        )


def test_vicuna_as_fastchat_writes_it():
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")]
    written = jinja_template.render_text(turns, "vicuna")
    assert written == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Hello "
        "ASSISTANT:Hi</s>USER: Bye ASSISTANT:"
    )  # the space of " Hi" is the tokenizer's


@pytest.mark.parametrize(
    "place", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja", "list"]
)
def test_a_template_is_found_where_transformers_has_put_it(place, decoder_folder):
    edit(decoder_folder / "tokenizer_config.json", chat_template=...)
    if place == "chat_template.jinja":
        (decoder_folder / place).write_text(CHATML)
    else:
        value = (
            [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
            if place == "list"
            else CHATML
        )
        path = decoder_folder / ("tokenizer_config.json" if place == "list" else place)
        path.write_text(json.dumps({"chat_template": value, "eos_token": "<|im_end|>"}))
    assert huggingface.read_decoder(decoder_folder).chat_template == "chatml"


@pytest.mark.parametrize(
    "template, message",
    [
        (..., "has no chat template; name it by --template of .prepare.py stitch. .*: mistral, "),
        ("{{ messages[0]['content'] }}", "its chat template writes 'Hello', as none of ours does"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails"),  # the sandbox refuses it
        ("{{ today }}{{ raise_exception('no') }}", "chat template fails"),
        (
            CHATML.replace("m['content']", "m['content'] | upper"),
            "writes '<|im_start|>user\\\\nHELLO",
        ),
    ],
)
def test_an_unknown_template_must_be_named(template, message, decoder_folder):
    edit(decoder_folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UserError, match=message):
        huggingface.read_decoder(decoder_folder)
    assert huggingface.read_decoder(decoder_folder, template="smollm2").chat_template == "smollm2"
    with pytest.raises(
        UserError, match="llama3 writes <.begin_of_text.>, which is not a special token"
    ):
        huggingface.read_decoder(decoder_folder, template="llama3")


# ---- stitching ----
@torch.no_grad()
def test_a_stitched_model_has_the_features_and_logits_of_its_parts(tmp_path):
    """Compared with transformers: a vision encoder in float16 with larger images, and a decoder in
    bfloat16 with tied embeddings; each keeps its dtype."""
    vision, decoder = siglip().half(), llama(tie_word_embeddings=True).bfloat16()
    public = {
        "vision": str(publish(vision, tmp_path / "vision")),
        "decoder": str(publish(decoder, tmp_path / "decoder")),
    }
    prepare.stitch(**public, out=str(tmp_path / "out"), tile=56, shuffle=2)
    made = load_checkpoint(tmp_path / "out", dtype=None)
    assert {
        part: next(getattr(made.model, part).parameters()).dtype
        for part in ("vision", "projector", "decoder")
    } == {"vision": torch.float16, "projector": torch.float32, "decoder": torch.bfloat16}
    assert made.history["vision"]["from"] == str(tmp_path / "vision") and set(
        made.history["decoder"]["files"]
    ) == {"model.safetensors"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        tmp_path / "decoder/tokenizer.json"
    ).read_bytes()
    names = [name for name in vision.state_dict() if not name.startswith("head.")]
    assert (
        len(load_file(tmp_path / "out/model.safetensors"))
        == len(names) + 4 + len(decoder.state_dict()) - 1  # a tied lm_head is not saved
    )

    ids_BT = torch.tensor([[5, 7, 250, 3]])
    ours = made.model.decoder
    logits_BTV = ours.lm_head(ours(made.model.embed(ids_BT, torch.zeros(0)), torch.arange(4)[None]))
    torch.testing.assert_close(logits_BTV, decoder(ids_BT).logits, rtol=0.02, atol=0.02)
    loaded = load_checkpoint(tmp_path / "out")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    tiles_NCYX = torch.randint(256, (1, 3, 56, 56), dtype=torch.uint8)
    pixels = (tiles_NCYX / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.3, 0.2, 0.1]
    ).view(3, 1, 1)
    features = vision.float()(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(
        loaded.model.encode_images(tiles_NCYX),
        loaded.model.projector(features),
        rtol=1e-3,  # positions are rounded to float16
        atol=1e-3,
    )


@pytest.mark.parametrize("wide", ["norm", "embed_tokens|lm_head"])
def test_a_part_in_two_dtypes_is_stitched_in_the_wider_one_with_a_slash_after_out(
    wide, published, decoder_folder, tmp_path
):
    path = decoder_folder / "model.safetensors"
    tensors = {
        name: tensor.float() if re.search(wide, name) else tensor.bfloat16()
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    out = f"{tmp_path / 'out'}/"
    prepare.stitch(
        vision=str(published[0]), decoder=str(decoder_folder), out=out, template="chatml"
    )
    decoder = load_checkpoint(out, dtype=None).model.decoder
    theirs = hf.LlamaForCausalLM.from_pretrained(decoder_folder, dtype=torch.float32)
    ids_BT = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        hidden_BTD = decoder(decoder.embed_tokens(ids_BT), torch.arange(5)[None])
        torch.testing.assert_close(
            decoder.lm_head(hidden_BTD), theirs(ids_BT).logits, atol=1e-5, rtol=1e-5
        )
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]


def test_a_nanovlm_vision_encoder_with_a_published_decoder(published, tmp_path):
    public, out = [str(folder) for folder in published], str(tmp_path / "first")
    prepare.stitch(vision=public[0], decoder=public[1], out=out)
    prepare.stitch(vision=out, decoder=public[1], out=str(tmp_path / "second"))
    first, second = load_checkpoint(out), load_checkpoint(tmp_path / "second")
    same(second.model, first.model)
    assert first.shapes == second.shapes and first.image_config == second.image_config
    with pytest.raises(UserError, match="--tile: only for a Hugging Face folder; .*first is"):
        prepare.stitch(vision=out, decoder=public[1], tile=42)


PEAK = """
import re, sys
sys.path.insert(0, {root!r})
import prepare
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
prepare.stitch(vision="vision", decoder="small", out="first")  # torch's own memory
before = peak()
prepare.stitch(vision="vision", decoder="large", out="second")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_decoder_is_in_memory_once(tmp_path):
    """135 MB of float32: stitching needs that and a little. (ru_maxrss would count the parent's
    memory too, because it survives fork and exec.)"""
    with torch.device("meta"):
        decoder = huggingface.Decoder(
            vocab_size=264, width=512, layers=8, heads=8, kv_heads=8, intermediate_size=2048
        )
    tensors = {
        huggingface.published_name(n, huggingface.LLAMA): torch.zeros(t.shape).uniform_(-0.1, 0.1)
        for n, t in decoder.state_dict().items()
    }
    large = copy(publish(llama(), tmp_path / "small"), tmp_path / "large")
    publish(clip(), tmp_path / "vision")
    save_file(tensors, large / "model.safetensors")
    edit(
        large / "config.json",
        vocab_size=264,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=2048,
    )
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(root=str(ROOT))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    size = (large / "model.safetensors").stat().st_size
    assert done.returncode == 0, done.stderr
    assert size > 130e6 and 0.9 * size < int(done.stdout) < 1.3 * size
