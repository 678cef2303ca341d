"""Public folders in all their spellings become parts of a model; what is broken, unknown or missing is named."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_parity import CHATML, DECODER, clip, dinov2, publish, shake, siglip

import prepare
from nanovlm import UserError
from nanovlm.checkpoints import huggingface, stitch
from nanovlm.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from nanovlm.data import chat_template, image_processing, tokenizer
from nanovlm.files import (
    download_pretrained,
    list_weight_files,
    match_tensors,
    read_json,
    read_weights,
)


def llama(**other):
    return shake(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER | {"num_hidden_layers": 2} | other)), 4)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An eye and a brain as transformers writes them, for tests that only read."""
    folder = tmp_path_factory.mktemp("published")
    return publish(clip(), folder / "clip"), publish(llama(), folder / "llama")


@pytest.fixture
def eye_folder(published, tmp_path):
    return copy(published[0], tmp_path / "eye")


@pytest.fixture
def brain_folder(published, tmp_path):
    return copy(published[1], tmp_path / "brain")


def copy(source, folder):
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(path, **fields):
    """Set fields of a JSON file; a field set to `...` goes."""
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


# ---- spellings ----
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
    (folder / "consolidated.safetensors").write_bytes(b"read me not")


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
    "spell",
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
def test_every_spelling_of_a_brain_is_the_same_brain(spell, brain_folder, published):
    spell(brain_folder)
    same(
        huggingface.read_decoder(brain_folder).model.decoder,
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
def test_every_spelling_of_an_eye_is_the_same_eye(prefix, eye_folder, published):
    rename(eye_folder, lambda name: prefix + name)
    tensors = load_file(
        eye_folder / "model.safetensors"
    )  # what stands beside the eye in a whole CLIP of transformers 4
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
        eye_folder / "model.safetensors",
    )
    same(
        huggingface.read_vision_encoder(eye_folder).model.vision,
        huggingface.read_vision_encoder(published[0]).model.vision,
    )


def test_an_eye_of_a_whole_clip_and_of_a_whole_siglip(tmp_path):
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
    assert (
        yarn["original_max_position_embeddings"] == 2048
    )  # where it is left out, the longest text of all
    assert huggingface.rope_config(base, "here") == (10000.0, None)
    assert huggingface.rope_config(base | {"rope_theta": 1e6, "rope_scaling": None}, "here") == (
        1e6,
        None,
    )


def test_clips_first_spelling_stands_above_its_second():
    """openai/clip-vit-large-patch14 has a vision_config_dict; transformers fills in what it leaves out and puts it above vision_config."""
    config = {
        "model_type": "clip",
        "vision_config": {"hidden_size": 48, "num_hidden_layers": 5, "hidden_act": "gelu"},
        "vision_config_dict": {"hidden_size": 60, "patch_size": 14},
    }
    ours, theirs = (
        huggingface.model_config(config, "vision_config", huggingface.VISION_TYPES, "here"),
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
        ("use_qk_norm", True),
        ("attention_multiplier", 0.5),
        ("logit_scale", 0.1),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "awq"}),
        ("auto_map", {"AutoModel": "x.Y"}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope"}),
        ("rope_scaling", {"rope_type": "llama3"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "original": 7}),
        ("model_type", "qwen2"),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_brain_that_computes_something_else_is_refused_by_name(field, value, brain_folder):
    edit(brain_folder / "config.json", **{"rope_parameters": ..., field: value})
    said = (
        "RoPE of type (dynamic|longrope|llama3 needs|linear is not known to have original)"
        if field == "rope_scaling"
        else field.split("_type")[0]
    )
    with pytest.raises(UserError, match=f"config.json: .*{said}"):
        huggingface.read_decoder(brain_folder)


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
def test_an_eye_that_computes_something_else_is_refused_by_name(make, field, value, tmp_path):
    edit(publish(make(), tmp_path) / "config.json", **{field: value})
    with pytest.raises(UserError, match=value if field == "model_type" else f"{field} {value}"):
        huggingface.read_vision_encoder(tmp_path)


REQUIRED = {"brain": huggingface.DECODER_REQUIRED, "eye": huggingface.VISION_REQUIRED}
READERS = {"brain": huggingface.read_decoder, "eye": huggingface.read_vision_encoder}


@pytest.mark.parametrize(
    "part, field", [(part, field) for part, fields in REQUIRED.items() for field in fields]
)
def test_each_field_that_would_change_a_result_is_refused(part, field, request):
    folder = request.getfixturevalue(f"{part}_folder")
    value = {True: False, False: True}.get(REQUIRED[part][field], 7)
    edit(folder / "config.json", **{field: value})
    with pytest.raises(UserError, match=f"config.json: {field} {value} is not known here"):
        READERS[part](folder)


# What changes no result: how transformers starts, trains, caches and labels; parts that are not read; which ids begin and end a text (the template's)
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
}  # RoPE has no table; where it is stretched from that length, it is read


class Read(dict):
    """A config that remembers which of its fields were asked for."""

    def __init__(self, fields):
        super().__init__(fields)
        self.asked = set()

    def __getitem__(self, field):
        self.asked.add(field)
        return super().__getitem__(field)

    def get(self, field, other=None):
        self.asked.add(field)
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
    ],
    ids=lambda kind: kind.model_type,
)
def test_every_field_that_transformers_knows_is_read_or_changes_nothing(kind):
    config = kind(**{"sliding_window": 9} if kind is hf.MinistralConfig else {}).to_dict()
    read, is_eye = (
        Read(huggingface.DEFAULTS[kind.model_type] | config),
        kind.model_type in huggingface.VISION_TYPES,
    )
    huggingface.vision_shapes(
        read, read["image_size"], None, "here"
    ) if is_eye else huggingface.decoder_shapes(read, "here")
    own = config.keys() - hf.PretrainedConfig().to_dict().keys()
    assert len(own) > 8 and own - read.asked == own & HARMLESS


def spoil(**how):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in how.items():
            tensors[f"model.{name}.weight"] = tensor
        save_file(tensors, folder / "model.safetensors")

    return change


def put_a_tensor_in_two_shards(folder):
    as_shards(folder)
    shards = [load_file(folder / f"model-0000{n}-of-00003.safetensors") for n in (1, 2)]
    save_file(shards[0] | shards[1], folder / "model-00001-of-00003.safetensors")


def call_a_tensor_by_two_names(folder):
    """One of a brain alone, one of the same brain in a LLaVA; each is what an index may hold."""
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
    """Writes a file where a pickle of it is read freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickle_code(folder):
    torch.save({"model.norm.weight": Code(folder / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def spill_a_pickle(folder):
    """A byte in the middle of the older kind's pickle is another: whatever Python then says, it is told as a broken file."""
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
    "change, said",
    [
        (
            lambda folder: rename(folder, lambda name: None if "norm.weight" in name else name),
            "layers.0.input_layernorm.weight is missing; .*model.norm.weight is missing",
        ),
        (spoil(extra=torch.ones(3)), "model.extra.weight in model.safetensors is not used"),
        (
            spoil(norm=torch.ones(49)),
            r"model.norm.weight in model.safetensors is \[49\], the model expects \[48\]",
        ),
        (
            spoil(norm=torch.full((48,), torch.nan)),
            "model.norm.weight in model.safetensors holds a NaN or infinite value",
        ),
        (spoil(norm=torch.full((48,), -torch.inf)), "NaN or infinite"),
        (
            spoil(norm=torch.ones(48, dtype=torch.int8)),
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
        (keep_an_index_of_nothing, "index.json holds no weight_map"),
        (
            take_a_tensor_out_of_its_shard,
            "model-00001-of-00003.safetensors lacks lm_head.weight, unlike its folder's index",
        ),
        (
            call_a_tensor_by_two_names,
            "model.norm.weight is both in .*model-0000.-of-00003.safetensors and in .*other.safetensors",
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
        (spill_a_pickle, "pytorch_model.bin is broken, cut short"),
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
            "config.json: num_attention_heads 0 is no whole number from 1 on",
        ),
        (
            lambda folder: edit(folder / "config.json", hidden_size="48"),
            "config.json: hidden_size '48' is no whole number",
        ),
        (
            lambda folder: edit(folder / "config.json", tie_word_embeddings=True),
            "lm_head.weight is not embed_tokens.weight",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is no JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model of type None"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "holds neither a nanovlm checkpoint nor a config.json",
        ),
    ],
)
def test_a_broken_folder_is_told_by_file_and_tensor(change, said, brain_folder):
    change(brain_folder)
    with pytest.raises(UserError, match=said) as mistake:
        huggingface.read_decoder(brain_folder)
    assert "\n" not in str(mistake.value) and not (brain_folder / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.mlp.fc1.bias", "encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight"],
)
def test_of_an_eye_the_layers_that_are_not_read_must_be_whole_too(name, eye_folder):
    """CLIP's last layer and norm: LLaVA folders are written with them."""
    tensors = load_file(eye_folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(name))
    plain = name.removeprefix("vision_model.")
    for other, said in (
        (
            torch.full_like(tensors[name], torch.nan),
            f"{plain} in model.safetensors holds a NaN or infinite value",
        ),
        (torch.ones(5), rf"{plain} in model.safetensors is \[5\]"),
        (None, f"{plain} is missing"),
    ):
        save_file(
            {n: t for n, t in (tensors | {name: other}).items() if t is not None},
            eye_folder / "model.safetensors",
        )
        with pytest.raises(UserError, match=said):
            huggingface.read_vision_encoder(eye_folder)


# ---- a full-size folder ----
def sparse(path, shapes):
    """A safetensors file of bfloat16 with all of its header and none of its numbers."""
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
    """Mistral-7B-Instruct-v0.3 as published, its tokenizer's files and its numbers aside: config, three shards, index."""
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
def test_a_full_size_mistral_is_planned_without_a_number_of_it(tmp_path):
    """14.5 GB in name only: names, shapes and bytes are held against the config, and nothing is allocated. A wrong one is told as soon."""
    folder = mistral_7b(tmp_path)
    paths, where = list_weight_files(folder), folder / "config.json"
    shapes = huggingface.decoder_shapes(
        huggingface.model_config(read_json(where), "text_config", huggingface.DECODER_TYPES, where),
        where,
    )
    with torch.device("meta"):
        wanted = {
            huggingface.published_name(name, huggingface.LLAMA): t.shape
            for name, t in huggingface.Decoder(**shapes).state_dict().items()
        }
    before = resident()
    plan = match_tensors(
        wanted,
        read_weights(paths, huggingface.DECODER_PREFIXES),
        huggingface.DECODER_IGNORED,
        paths,
    )
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    assert len(paths) == 3 and sum(tensor.nbytes for tensor in plan.values()) == total == sum(
        2 * shape.numel() for shape in wanted.values()
    )
    assert {name: tensor.shape for name, tensor in plan.items()} == wanted and {
        t.dtype for t in plan.values()
    } == {torch.bfloat16}
    assert (
        resident() - before < 20e6
        and sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 1e6
    )
    with torch.device("meta"):
        other = huggingface.Decoder(**shapes | {"kv_heads": 4})
    with pytest.raises(
        UserError,
        match=r"self_attn.k_proj.weight in model-0000.-of-00003.safetensors is \[1024, 4096\], the model expects \[512, 4096\];"
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
    for (
        path
    ) in folder.iterdir():  # a snapshot is links into blobs, which the cache names by their hashes
        path.rename(blob := cache / "blobs" / f"b{hash(path.name):x}")
        path.symlink_to(Path("../../blobs") / blob.name)
    return folder


def test_an_owner_and_name_is_looked_up_in_the_cache(
    published, brain_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    as_shards(brain_folder)
    folder = cached(tmp_path, "someone/brain", brain_folder)
    (folder / "README.md").write_text("---\ntags:\n- text\nlicense: apache-2.0\n---\n# A brain\n")
    part = huggingface.read_decoder("someone/brain")
    same(part.model.decoder, huggingface.read_decoder(published[1]).model.decoder)
    card, shards = part.history["folder"], sorted(folder.glob("*.safetensors"))
    assert (card["from"], card["revision"], card["licence"]) == (
        "someone/brain",
        "0123abc",
        "apache-2.0",
    )
    printed = subprocess.run(["sha256sum", *shards], capture_output=True, text=True).stdout.split()
    assert len(shards) == 3 and card["files"] == {
        path.name: sha for path, sha in zip(shards, printed[::2], strict=True)
    }


def test_what_is_nowhere_comes_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(
        UserError, match="to download it: pip install huggingface_hub && hf download some/one"
    ):
        huggingface.read_decoder("some/one")
    with pytest.raises(UserError, match="no such folder: out/some/one"):
        huggingface.read_decoder("out/some/one")


class Hub:
    """A stand-in for huggingface_hub: what would be listed, what was asked for."""

    def __init__(self, files, folder):
        self.files, self.folder = files, folder

    def list_repo_files(self, name):
        return self.files

    def snapshot_download(self, name, allow_patterns):
        if not self.folder:
            raise ConnectionError("no route\nto host")
        self.asked = sorted(allow_patterns)
        return str(self.folder)


def test_only_what_is_read_is_fetched(tmp_path):
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
    assert download_pretrained("a/b", hub) == tmp_path and hub.asked == [
        "README.md",
        "config.json",
        "model-1.safetensors",
        "tokenizer.model",
    ]
    hub.files = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    download_pretrained("a/b", hub)
    assert hub.asked == ["config.json", "pytorch_model.bin"]
    with pytest.raises(
        UserError,
        match="a/b is no local folder and was not downloaded: ConnectionError no route to host",
    ):
        download_pretrained("a/b", Hub(names, None))


# ---- pictures ----
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
def test_pictures_are_treated_as_the_folder_says(config, choices, fit, tile, resample, eye_folder):
    (eye_folder / "preprocessor_config.json").write_text(json.dumps(config))
    part = huggingface.read_vision_encoder(eye_folder, **choices)
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
    "change, said",
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
def test_pictures_that_would_come_out_otherwise_are_refused(change, said, eye_folder):
    (eye_folder / "preprocessor_config.json").write_text(json.dumps(NEW_CLIP))
    edit(eye_folder / "preprocessor_config.json", **change)
    with pytest.raises(UserError, match=said):
        huggingface.read_vision_encoder(eye_folder)


@pytest.mark.parametrize(
    "choices, said",
    [
        ({"vision_feature_layer": 0}, "--vision_feature_layer=0"),
        ({"vision_feature_layer": -4}, "--vision_feature_layer=-4 is not among the 3 layers"),
        ({"tile": 3}, "tile of 3"),
        ({"shuffle": 3}, "--shuffle=3 does not divide the 4 patches"),
    ],
)
def test_choices_that_do_not_fit_an_eye(choices, said, published):
    with pytest.raises(UserError, match=said):
        huggingface.read_vision_encoder(published[0], **choices)


# ---- chat templates, as published with the models named; of the longer ones the part that writes a conversation without tools ----
NO_SYSTEM = "{% if m['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
LOOP = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in loop_messages %}"
)
PUBLISHED = {
    "chatml": CHATML,
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral-v1": "{{ bos_token }}{% for m in messages %}"
    + NO_SYSTEM
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
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
    "mistral-v7": "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '[INST]' + m['content'] + '[/INST]' }}"
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
def test_a_template_is_known_by_what_it_writes(name, tmp_path):
    special = SPECIAL[KIND.get(name, "plain")]
    ends = {"llama3": ("<|begin_of_text|>", "<|eot_id|>"), "chatml": (None, "<|im_end|>")}.get(
        KIND.get(name), ("<s>", {"content": "</s>"})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": ends[0], "eos_token": ends[1], "chat_template": PUBLISHED[name]})
    )
    words = tokenizer.train_tokenizer(["hello goodbye"], 258, special)
    mine = SentencePiece(words.special) if name in SENTENCEPIECE else words
    assert (
        chat_template.identify_template(*huggingface.read_chat_template(tmp_path), mine, tmp_path)
        == name.split(",")[0]
    )


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "mistral, tekken", "mistral-v7"])
def test_our_ids_are_those_of_apply_chat_template(name, tmp_path):
    special = SPECIAL[KIND[name]]
    words = tokenizer.train_tokenizer(["hello goodbye be kind"], 265, special)
    words.save(tmp_path)
    theirs = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        chat_template=PUBLISHED[name],
        bos_token=special[0],
        eos_token={"mistral": "</s>"}.get(KIND[name], special[-1]),
    )
    turns = [("user", "Hello, you?\n  Two"), ("assistant", "Yes: <3"), ("user", "Goodbye")]
    for conversation in (turns, turns[:1], [("system", "Be kind."), turns[0]]):
        messages = [{"role": role, "content": said} for role, said in conversation]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert (
            chat_template.render_conversation(conversation, words, name.split(",")[0])[0]
            == expected
        )


def test_vicuna_as_fastchat_writes_it():
    written = chat_template.render_text(
        [("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
        SentencePiece({"<s>": 1, "</s>": 2}),
        "vicuna",
    )
    assert written == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: Hello ASSISTANT:Hi</s>USER: Bye ASSISTANT:"
    )  # the space of " Hi" is the tokenizer's


@pytest.mark.parametrize(
    "place", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja", "list"]
)
def test_a_template_is_found_where_transformers_has_put_it(place, brain_folder):
    edit(brain_folder / "tokenizer_config.json", chat_template=...)
    if place == "chat_template.jinja":
        (brain_folder / place).write_text(CHATML)
    else:
        value = (
            [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
            if place == "list"
            else CHATML
        )
        path = brain_folder / ("tokenizer_config.json" if place == "list" else place)
        path.write_text(json.dumps({"chat_template": value, "eos_token": "<|im_end|>"}))
    assert huggingface.read_decoder(brain_folder).chat_template == "chatml"


@pytest.mark.parametrize(
    "template, said",
    [
        (..., "has no chat template; name it by --template of .prepare.py stitch. .*: mistral, "),
        ("{{ messages[0]['content'] }}", "its chat template writes 'Hello', as none of ours does"),
        ("{{ ''.__class__.__mro__ }}", "writes None"),  # the sandbox refuses it
        ("{{ today }}{{ raise_exception('no') }}", "writes None"),
        (
            CHATML.replace("m['content']", "m['content'] | upper"),
            "writes '<|im_start|>user\\\\nHELLO",
        ),
    ],
)
def test_an_unknown_template_must_be_said(template, said, brain_folder):
    edit(brain_folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UserError, match=said):
        huggingface.read_decoder(brain_folder)
    assert huggingface.read_decoder(brain_folder, template="smollm2").chat_template == "smollm2"
    with pytest.raises(
        UserError, match="llama3 writes <.begin_of_text.>, which is no special token"
    ):
        huggingface.read_decoder(brain_folder, template="llama3")


# ---- the door ----
@torch.no_grad()
def test_stitched_it_sees_and_says_what_its_parts_do_alone(tmp_path, capsys):
    """Held against transformers: an eye in float16 with larger pictures, a brain in bfloat16 with tied embeddings, each kept as it was."""
    eye, brain = siglip().half(), llama(tie_word_embeddings=True).bfloat16()
    public = {
        "vision": str(publish(eye, tmp_path / "eye")),
        "decoder": str(publish(brain, tmp_path / "brain")),
    }
    prepare.stitch(**public, out=str(tmp_path / "out"), tile=56, shuffle=2)
    assert "the largest difference is 0" in capsys.readouterr().err
    made = load_checkpoint(tmp_path / "out", dtype=None)
    assert {
        part: next(getattr(made.model, part).parameters()).dtype
        for part in ("vision", "projector", "decoder")
    } == {"vision": torch.float16, "projector": torch.float32, "decoder": torch.bfloat16}
    assert made.history["vision"]["from"] == str(tmp_path / "eye") and set(
        made.history["decoder"]["files"]
    ) == {"model.safetensors"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        tmp_path / "brain/tokenizer.json"
    ).read_bytes()
    names = [name for name in eye.state_dict() if not name.startswith("head.")]
    assert (
        len(load_file(tmp_path / "out/model.safetensors"))
        == len(names) + 4 + len(brain.state_dict()) - 1
    )  # a tied head is saved once

    ids_BT = torch.tensor([[5, 7, 250, 3]])
    ours = made.model.decoder
    logits_BTV = ours.lm_head(ours(made.model.embed(ids_BT, torch.zeros(0)), torch.arange(4)[None]))
    torch.testing.assert_close(logits_BTV, brain(ids_BT).logits, rtol=0.02, atol=0.02)
    loaded = load_checkpoint(tmp_path / "out")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    tiles_NCYX = torch.randint(256, (1, 3, 56, 56), dtype=torch.uint8)
    pixels = (tiles_NCYX / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.3, 0.2, 0.1]
    ).view(3, 1, 1)
    features = eye.float()(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(
        loaded.model.encode_images(tiles_NCYX),
        loaded.model.projector(features),
        rtol=1e-3,
        atol=1e-3,
    )  # positions rounded to float16


def test_an_eye_of_ours_and_a_brain_of_theirs(published, tmp_path):
    public, out = [str(folder) for folder in published], str(tmp_path / "first")
    prepare.stitch(vision=public[0], decoder=public[1], out=out)
    prepare.stitch(vision=out, decoder=public[1], out=str(tmp_path / "second"))
    first, second = load_checkpoint(out), load_checkpoint(tmp_path / "second")
    same(second.model, first.model)
    assert first.shapes == second.shapes and first.image_config == second.image_config
    with pytest.raises(UserError, match="--tile=42 is for a Hugging Face folder"):
        prepare.stitch(vision=out, decoder=public[1], tile=42)


PEAK = """
import re, sys
sys.path.insert(0, {root!r})
import prepare
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
prepare.stitch(vision="eye", decoder="small", out="first")  # what torch itself takes the first time
before = peak()
prepare.stitch(vision="eye", decoder="large", out="second")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_brain_is_in_memory_once(tmp_path):
    """135 MB of float32: stitching needs that and a little. (ru_maxrss would count the parent's memory too: it outlives fork and exec.)"""
    with torch.device("meta"):
        decoder = huggingface.Decoder(
            vocab_size=264, width=512, layers=8, heads=8, kv_heads=8, intermediate_size=2048
        )
    tensors = {
        huggingface.published_name(n, huggingface.LLAMA): torch.zeros(t.shape).uniform_(-0.1, 0.1)
        for n, t in decoder.state_dict().items()
    }
    large = copy(publish(llama(), tmp_path / "small"), tmp_path / "large")
    publish(clip(), tmp_path / "eye")
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


def test_a_stitch_that_changed_a_number_is_found_out(published, tmp_path):
    eye, brain = (
        huggingface.read_vision_encoder(published[0]),
        huggingface.read_decoder(published[1]),
    )
    alone = stitch.outputs_of_parts(eye, brain)
    save_checkpoint(stitch.stitch_parts(eye, brain, 0), tmp_path / "out")
    assert stitch.verify_stitch(tmp_path / "out", alone) < 1e-4
    for name, what in [
        ("vision.layers.1.mlp_norm.bias", "the features of the vision encoder"),
        ("decoder.layers.1.q_proj.weight", "the logits of the decoder"),
    ]:
        tensors = load_file(tmp_path / "out/model.safetensors")
        save_file(tensors | {name: tensors[name] * 1.1}, tmp_path / "out/model.safetensors")
        with pytest.raises(UserError, match=f"{what} differ by"):
            stitch.verify_stitch(tmp_path / "out", alone)
        save_file(tensors, tmp_path / "out/model.safetensors")
