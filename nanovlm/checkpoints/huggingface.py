"""Pretrained models: the vision encoder or the decoder of a Hugging Face folder.

    config.json                its numbers; a field that would change the result, and that this
                               project does not compute, raises a UserError that names it
    *.safetensors              its weights, in one file or in shards with an index; else
                               pytorch_model.bin, of which only tensors are unpickled
    preprocessor_config.json   the image config of a vision encoder
    tokenizer.*, tekken.json   the tokenizer of a decoder; its chat template is identified by the
                               text that it writes, never by the folder's name

A family of models is a row in VISION_FAMILIES or DECODER_FAMILIES; a table of its names of tensors;
and the defaults of its config.json. llava.py uses the same tables for export. files.py
compares names, shapes and dtypes with the expected ones.
"""

import functools
import json
import math
import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from .. import UserError
from ..data import chat_template
from ..data.image_processing import check_image_config
from ..data.jinja_template import identify_template
from ..data.tokenizer import SPECIAL_TOKEN, Tokenizer
from ..files import (
    find_pretrained,
    list_weight_files,
    match_finite_tensors,
    read_json,
    read_text,
    read_weights,
    refuse_odd_values,
    size_error,
    weights_source,
)
from ..models.decoder import Decoder
from ..models.vision_encoder import VisionEncoder
from .checkpoint import Checkpoint, build_model, check_arguments, check_vocab_size

# ---- names of tensors ----
# ours: published. * is a layer's number. A module's name stands for its weight and its bias.
CLIP = {
    "class_token": "embeddings.class_embedding",
    "patches": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "layers.*.attention_norm": "encoder.layers.*.layer_norm1",
    "layers.*.mlp_norm": "encoder.layers.*.layer_norm2",
    "layers.*.q_proj": "encoder.layers.*.self_attn.q_proj",
    "layers.*.k_proj": "encoder.layers.*.self_attn.k_proj",
    "layers.*.v_proj": "encoder.layers.*.self_attn.v_proj",
    "layers.*.o_proj": "encoder.layers.*.self_attn.out_proj",
    "layers.*.up_proj": "encoder.layers.*.mlp.fc1",
    "layers.*.down_proj": "encoder.layers.*.mlp.fc2",
}
DINOV2 = {
    "class_token": "embeddings.cls_token",
    "patches": "embeddings.patch_embeddings.projection",
    "positions": "embeddings.position_embeddings",
    "post_norm": "layernorm",
    "layers.*.attention_norm": "encoder.layer.*.norm1",
    "layers.*.mlp_norm": "encoder.layer.*.norm2",
    "layers.*.q_proj": "encoder.layer.*.attention.attention.query",
    "layers.*.k_proj": "encoder.layer.*.attention.attention.key",
    "layers.*.v_proj": "encoder.layer.*.attention.attention.value",
    "layers.*.o_proj": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_scale": "encoder.layer.*.layer_scale1.lambda1",
    "layers.*.mlp_scale": "encoder.layer.*.layer_scale2.lambda1",
    "layers.*.up_proj": "encoder.layer.*.mlp.fc1",
    "layers.*.down_proj": "encoder.layer.*.mlp.fc2",
}
LLAMA = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.q_proj": "model.layers.*.self_attn.q_proj",
    "layers.*.k_proj": "model.layers.*.self_attn.k_proj",
    "layers.*.v_proj": "model.layers.*.self_attn.v_proj",
    "layers.*.o_proj": "model.layers.*.self_attn.o_proj",
    "layers.*.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.k_norm": "model.layers.*.self_attn.k_norm",
    "layers.*.gate_proj": "model.layers.*.mlp.gate_proj",
    "layers.*.up_proj": "model.layers.*.mlp.up_proj",
    "layers.*.down_proj": "model.layers.*.mlp.down_proj",
}
# The prefixes of those names in a larger model, in transformers 4 and 5: (pattern, replacement).
VISION_PREFIXES = [(r"^(model\.)?(vision_tower\.)?(vision_model\.|dinov2\.)?", "")]
DECODER_PREFIXES = [
    (r"^(model\.)?(language_model|text_model)\.(model\.)?(?!lm_head)", "model."),
    (r"^language_model\.(?=lm_head)", ""),
]
# Tensors that a folder may hold and a part does not use: other parts, heads for other tasks, and
# tables that are computed.
VISION_IGNORED = (
    r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$|head\.|classifier\.|"
    r"embeddings\.(position_ids|mask_token)$|"
    r"multi_modal_projector\.|connector\.|language_model\.|lm_head\.|image_newline$"
)
DECODER_IGNORED = (
    r".*rotary_emb\.inv_freq$|(model\.)?image_newline$|"
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector|connector)\."
)


def published_name(name, table):
    """Returns the published name of our parameter.

    "layers.3.q_proj.weight" -> "model.layers.3.self_attn.q_proj.weight"
    """
    number = "".join(re.findall(r"\d+", name))  # of the layer; empty if it is in none
    key = name.replace(f".{number}.", ".*.")
    module, _, kind = key.rpartition(".")
    published = table[key] if key in table else f"{table[module]}.{kind}"
    return published.replace("*", number)


# ---- families ----
# model_type: its names of tensors, and the arguments of VisionEncoder that config.json leaves out
VISION_FAMILIES = {
    "clip_vision_model": (CLIP, dict(class_token=True, pre_norm=True, patch_bias=False)),
    "siglip_vision_model": (CLIP, {}),
    "idefics3_vision": (CLIP, {}),  # a SigLIP, also SmolVLM's
    "dinov2": (DINOV2, dict(class_token=True, layer_scale=True)),
}
# model_type: the arguments of Decoder that config.json leaves out; names of tensors are LLAMA's
DECODER_FAMILIES = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": dict(qkv_bias=True),  # and Qwen2.5
    "qwen3": dict(qk_norm=True),
    "smollm3": {},  # rope_layers is in config.json
}
# a pattern of model types that are refused: what one of them needs
NOT_COMPUTED = {
    "siglip2": "tiles of any shape (NaFlex): take a SigLIP 2 of a fixed resolution, such as "
    "google/siglip2-base-patch16-256",
    "moe|mixtral|deepseek|gpt_oss|llama4|dbrx|minimax": "a mixture of experts",
    "mamba|jamba|bamba|zamba|lfm|qwen3_next|qwen3_5|hybrid|recurrent|falcon_h1|nemotron_h|rwkv": (
        "layers that are not attention: state-space, linear or convolutional ones"
    ),
    "gemma": "scaled embeddings, norms by 1 + weight, also after each sublayer, and a GELU",
    "phi": "joint q/k/v and gate/up layers, and another RoPE",
    "olmo": "norms after the sublayers, and one of q and k over all heads",
}
# arguments of VisionEncoder and of Decoder: their fields in config.json
VISION_FIELDS = {
    "patch": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "eps": "layer_norm_eps",
}
DECODER_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
# What transformers assumes for a field that config.json leaves out.
VIT_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224)
LLAMA_7B = dict(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    head_dim=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
DEFAULTS = {
    "clip_vision_model": dict(
        VIT_BASE,
        intermediate_size=3072,
        patch_size=32,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    "siglip_vision_model": dict(
        VIT_BASE,
        intermediate_size=3072,
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
    "dinov2": dict(VIT_BASE, mlp_ratio=4, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6),
    "llama": dict(
        LLAMA_7B, intermediate_size=11008, num_key_value_heads=None, max_position_embeddings=2048
    ),
    "mistral": dict(
        LLAMA_7B,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
    "smollm3": dict(
        LLAMA_7B,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_theta=2e6,
        use_sliding_window=False,
        no_rope_layers=None,
        no_rope_layer_interval=4,
    ),
    "qwen2": dict(
        LLAMA_7B,
        vocab_size=151936,
        intermediate_size=22016,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
    ),
}
DEFAULTS["idefics3_vision"] = DEFAULTS["siglip_vision_model"] | dict(
    hidden_size=1152, num_attention_heads=16, patch_size=32
)
DEFAULTS["ministral"] = DEFAULTS["mistral"]
DEFAULTS["qwen3"] = DEFAULTS["qwen2"] | dict(head_dim=128)
# Fields that must have the value that this project computes, if config.json has them.
VISION_REQUIRED = dict(num_channels=3, qkv_bias=True, use_swiglu_ffn=False, apply_layernorm=True)
DECODER_REQUIRED = dict(
    hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0
)
IMAGE_REQUIRED = dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True)
ACTIVATION = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
MAX_LONGEST_EDGE = 4096  # Idefics3's processor makes larger images smaller again
ROPE_FIELDS = {  # of each rope_type, with their defaults; ... is a required field
    "default": {},
    "linear": dict(factor=...),
    "llama3": dict(
        factor=..., low_freq_factor=..., high_freq_factor=..., original_max_position_embeddings=None
    ),
    "yarn": dict(
        factor=...,
        beta_fast=32,
        beta_slow=1,
        truncate=True,
        attention_factor=None,
        mscale=None,
        mscale_all_dim=None,
        original_max_position_embeddings=None,
    ),
}


# ---- config.json ----
def check_fields(config, required, where):
    """Raises UserError if a field differs from what this project computes. null is not a value."""
    for field, value in required.items():
        if config.get(field) not in (None, value):
            only = "" if value is None else f", only {value}"
            raise UserError(f"{where}: {field} {config[field]} is not known here{only}")


def model_config(config, inner, types, where):
    """Returns the fields of a vision encoder or a decoder, with the defaults of transformers.

    config: of the folder; in the config of a larger model, `inner` is vision_config or text_config.
    types: model types that are known. Raises UserError for any other, and for a wrong size.
    """
    check_fields(config, dict(auto_map=None, quantization_config=None), where)
    if config.get("model_type") not in types and isinstance(config.get(inner), dict):
        config = inner_config(config, inner)
    model_type = config.get("model_type")
    if model_type not in types:
        needs = [what for kind, what in NOT_COMPUTED.items() if re.search(kind, str(model_type))]
        needs = f"; it needs {needs[0]}" if needs else ""
        raise UserError(
            f"{where}: a model of type {model_type} is not known here, only {', '.join(types)}"
            f"{needs}"
        )
    config = DEFAULTS[model_type] | config
    for field, default in DEFAULTS[model_type].items():
        is_size = type(default) is int and "window" not in field
        if is_size and (error := size_error(field, config[field])):
            raise UserError(f"{where}: {error}")
    return config


def inner_config(config, inner):
    """Returns the vision_config or text_config of a larger model's config, with its model_type."""
    outer = config.get("model_type")
    model_type = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(outer)
    if outer in ("llava", "llava_next", "idefics3", "smolvlm"):
        model_type = "clip_vision_model" if inner == "vision_config" else "llama"
    found = {"model_type": model_type} | config[inner]
    if outer in ("idefics3", "smolvlm") and inner == "vision_config":
        found["model_type"] = "idefics3_vision"  # whatever the section says, as in transformers
    # CLIP's first name of the section; transformers gives it precedence over the second
    if first := config.get(f"{inner}_dict"):
        found |= DEFAULTS.get(found["model_type"], {}) | first
    return found


def vision_shapes(config, tile, vision_feature_layer, where):
    """Returns the arguments of VisionEncoder.

    vision_feature_layer: None for the usual one: CLIP's last but one, as in LLaVA, and the last,
    with the final norm, of the others.
    """
    check_fields(config, VISION_REQUIRED, where)
    if config["hidden_act"] not in ACTIVATION:
        raise UserError(
            f"{where}: hidden_act {config['hidden_act']} is not known here, only "
            f"{', '.join(ACTIVATION)}"
        )
    shapes = {ours: config.get(theirs) for ours, theirs in VISION_FIELDS.items()}
    layers, layer = shapes["layers"], vision_feature_layer
    if layer is not None and (layer == 0 or not -layers <= layer <= layers):
        raise UserError(
            f"--vision_feature_layer={layer} is not among the {layers} layers of {where}"
        )
    if "mlp_ratio" in config:
        shapes["intermediate_size"] = int(shapes["width"] * config["mlp_ratio"])
    is_clip = config["model_type"] == "clip_vision_model"
    return shapes | dict(
        tile=tile,
        activation=ACTIVATION[config["hidden_act"]],
        vision_feature_layer=layer or (-2 if is_clip else -1),
        post_norm=layer is None and not is_clip,
        **VISION_FAMILIES[config["model_type"]][1],
    )


def rope_config(config, where):
    """Returns (rope_theta, rope_scaling) of Decoder, from rope_parameters (transformers 5) or
    rope_theta and rope_scaling (transformers 4)."""
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fields = {name: value for name, value in fields.items() if value is not None}
    check_fields(fields, dict(partial_rotary_factor=1.0), where)
    theta = fields.get("rope_theta") or config.get("rope_theta") or 10000.0
    rope_type = fields.get("rope_type", fields.get("type", "default"))
    if rope_type not in ROPE_FIELDS:
        raise UserError(
            f"{where}: RoPE of type {rope_type} is not known here, only {', '.join(ROPE_FIELDS)}"
        )
    defaults = ROPE_FIELDS[rope_type]
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := fields.keys() - defaults.keys() - common:
        raise UserError(
            f"{where}: RoPE of type {rope_type} is not known to have {', '.join(sorted(unknown))}"
        )
    scaling = {name: fields.get(name, default) for name, default in defaults.items()}
    if missing := [name for name, value in scaling.items() if value is ...]:
        raise UserError(f"{where}: RoPE of type {rope_type} needs {', '.join(missing)}")
    if not scaling:
        return theta, None
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = (
            config.get("original_max_position_embeddings")
            or scaling["original_max_position_embeddings"]
            or config["max_position_embeddings"]
        )
    if rope_type == "yarn" and not scaling["attention_factor"]:
        # what transformers multiplies q · k by for YaRN (Peng et al. 2023)
        up, down = scaling["mscale"], scaling["mscale_all_dim"]
        if not (up and down):
            up, down = 1, 0
        log_factor = math.log(max(scaling["factor"], 1))
        scaling["attention_factor"] = (0.1 * up * log_factor + 1) / (0.1 * down * log_factor + 1)
    return theta, {"rope_type": rope_type, **scaling}


def decoder_shapes(config, where):
    """Returns the arguments of Decoder."""
    check_fields(config, DECODER_REQUIRED, where)
    if config["model_type"] == "llama":
        check_fields(config, dict(sliding_window=None), where)
    shapes = {ours: config[theirs] for ours, theirs in DECODER_FIELDS.items()}
    shapes["kv_heads"] = shapes["kv_heads"] or shapes["heads"]
    shapes["head_dim"] = shapes["head_dim"] or shapes["width"] // shapes["heads"]
    shapes["rope_theta"], shapes["rope_scaling"] = rope_config(config, where)
    shapes |= DECODER_FAMILIES[config["model_type"]]
    if config["model_type"] == "smollm3":
        interval = config["no_rope_layer_interval"]  # every fourth layer is without
        usual = [int((i + 1) % interval != 0) for i in range(shapes["layers"])]
        shapes["rope_layers"] = (config["no_rope_layers"] or usual)[: shapes["layers"]]
    windows = layer_windows(config, shapes.get("rope_layers"), where)
    shapes["sliding_window"] = windows[0] if len(set(windows)) == 1 else windows
    return shapes


def layer_windows(config, rope_layers, where):
    """Returns the sliding window of each layer, None for full attention.

    rope_layers: as Decoder takes it.
    """
    model_type, layers = config["model_type"], config["num_hidden_layers"]
    window = config.get("sliding_window")
    if "use_sliding_window" in DEFAULTS[model_type] and not config["use_sliding_window"]:
        window = None
    sliding = range(layers)
    if model_type in ("qwen2", "qwen3"):
        sliding = range(config["max_window_layers"], layers)
    elif rope_layers:
        sliding = [i for i, rope in enumerate(rope_layers) if not rope]
    usual = ["full_attention"] * layers
    if window is not None:
        usual = ["sliding_attention" if i in sliding else "full_attention" for i in range(layers)]
    types = config.get("layer_types") or usual
    known = {"full_attention", "sliding_attention"} if window is not None else {"full_attention"}
    is_fixed = model_type in ("llama", "mistral")
    if len(types) != layers or not set(types) <= known or (is_fixed and types != usual):
        raise UserError(
            f"{where}: layer_types {types} do not fit {layers} layers of {model_type} "
            f"with a sliding_window of {window}"
        )
    return [window if layer == "sliding_attention" else None for layer in types]


# ---- preprocessor_config.json ----
def read_image_config(folder, tile, fit):
    """Returns the image config that the folder's own preprocessor implies.

    tile, fit: override its own if they are not None.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file() and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"  # of transformers 5
    config = read_json(path)
    config = config.get("image_processor", config)
    check_fields(config, IMAGE_REQUIRED, path)
    resample = config.get("resample", 3)
    if resample not in RESAMPLE:
        raise UserError(f"{path}: resample {resample} is not known here, only 1, 2 or 3")
    for name in ("image_mean", "image_std"):
        if name not in config:
            raise UserError(f"{path} holds no {name}")
    size = config.get("max_image_size", config.get("size"))  # the first is of Idefics3's tiles
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    edges, own_fit = edge_lengths(crop or size), preprocessor_fit(config, size, crop, path)
    # DINOv2's resizes to 256 and crops 224 from the center
    is_known = fit or (own_fit and edge_lengths(size) == edges)
    if not is_known or (tile is None and [size_error("tile", edge) for edge in edges] != [None]):
        raise UserError(
            f"{path}: its resizing, size {size}, crop {crop}, is not known here: choose --fit "
            "(squash, pad or crop); if it is not square, choose --tile, too"
        )
    image_config = {
        "tile": tile or edges.pop(),
        "fit": fit or own_fit,
        "resample": RESAMPLE[resample],
        "mean": config["image_mean"],
        "std": config["image_std"],
    }
    if image_config["fit"] == "anyres":
        image_config["pinpoints"] = config.get("image_grid_pinpoints")
    if own_fit == "split" and not fit:
        check_fields(config, {"do_image_splitting": True}, path)
        image_config |= {"longest_edge": config["size"]["longest_edge"], "tile_texts": "idefics3"}
    return image_config


def edge_lengths(size):
    """Returns the different lengths in pixels of a preprocessor's size: {336} of a square."""
    if size is None:
        return set()
    return set(size.values()) if isinstance(size, dict) else {size}


def preprocessor_fit(config, size, crop, path):
    """Returns how a preprocessor makes an image square: "anyres", "split", "pad", "squash" or
    "crop"; None if that is not known here."""
    if "max_image_size" in config:
        return "split"  # its do_pad pads the tiles of a batch
    fit = "crop" if crop else None
    if isinstance(size, dict) and "height" in size:
        fit = "squash"
    processor = str(config.get("image_processor_type"))
    if processor.startswith("LlavaNextImageProcessor") or "image_grid_pinpoints" in config:
        return fit and "anyres"  # its do_pad pads the tiles of a batch
    if processor.startswith("LlavaImageProcessor") and config.get("do_pad"):
        return fit and "pad"
    check_fields(config, dict(do_pad=False), path)
    return fit


# ---- the parts ----
def load_published_tensors(module, table, found, ignored, files):
    """Put tensors into a module that was built on the meta device, without a copy.

    table: the module's names of tensors. found: what read_weights found in `files`; ignored: a
    pattern of names that may be unused. As strict as files.match_finite_tensors.
    """
    state = module.state_dict()
    names = {name: published_name(name, table) for name in state}
    shapes = {names[name]: tensor.shape for name, tensor in state.items()}
    matched = match_finite_tensors(shapes, found, ignored, files)
    # Some folders keep norms in float32, the rest in bfloat16. The widest dtype changes no number.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in matched.values()))
    state = {name: matched[names[name]].to(dtype) for name in state}
    module.load_state_dict(state, assign=True)
    return module.eval()


def resize_position_embeddings(positions_PD, side, leading):
    """Resize a square grid of position embeddings to side × side, with the bicubic filter that
    transformers uses. The first `leading` ones, of the class token, stay."""
    grid_pD = positions_PD[leading:]
    old = math.isqrt(len(grid_pD))
    grid_1DYX = grid_pD.float().T.unflatten(1, (old, old))[None]
    resized = F.interpolate(grid_1DYX, size=side, mode="bicubic")[0].flatten(1).T  # (side², D)
    return torch.cat([positions_PD[:leading], resized.to(positions_PD.dtype)])


def read_vision_encoder(
    name, *, tile=None, fit=None, vision_feature_layer=None, shuffle=1, tensors=True, **more
):
    """Returns the vision encoder of a CLIP, SigLIP, SigLIP 2 or DINOv2 folder as a Checkpoint.

    tile: pixels, None for its own. fit, more: of the image config (data/image_processing.py).
    vision_feature_layer: the layer whose output is used, without the final norm; None for the
    usual one. tensors: False for a Checkpoint without its model.
    """
    folder = find_pretrained(name)
    path = folder / "config.json"
    with refuse_odd_values(path):
        config = model_config(read_json(path), "vision_config", VISION_FAMILIES, path)
    with refuse_odd_values(folder / "preprocessor_config.json"):
        image_config = read_image_config(folder, tile, fit)
    with refuse_odd_values(path):
        shapes = vision_shapes(config, image_config["tile"], vision_feature_layer, path)
    image_config |= {"patch": config["patch_size"], "shuffle": shuffle, **more}
    side, own_side = (edge // shapes["patch"] for edge in (shapes["tile"], config["image_size"]))
    if side < 1 or side % shuffle:
        raise UserError(
            f"--shuffle={shuffle} does not divide the {side} patches across a tile of "
            f"{shapes['tile']} pixels"
        )
    check_image_config(image_config, f"{folder}: image config")
    if (edge := image_config.get("longest_edge", 0)) > MAX_LONGEST_EDGE:
        raise UserError(f"{folder}: longest_edge {edge} is more than {MAX_LONGEST_EDGE}")
    check_arguments(VisionEncoder, shapes, path, VISION_FIELDS)
    vlm_shapes = {"vision": shapes, "decoder": None, "shuffle": shuffle}
    part = Checkpoint(None, None, vlm_shapes, image_config, None, {})
    if not tensors:
        return part
    files = list_weight_files(folder)
    table = VISION_FAMILIES[config["model_type"]][0]
    found = read_weights(files, VISION_PREFIXES)
    positions, leading = published_name("positions", table), int("class_token" in shapes)
    tensor, source = found.get(positions, (torch.empty(0), None))
    if side != own_side and tensor.shape[-2:] == (leading + own_side**2, shapes["width"]):
        resized = resize_position_embeddings(tensor.flatten(0, -2), side, leading)
        found[positions] = resized, source
    with torch.device("meta"):
        all_layers = VisionEncoder(**shapes | {"vision_feature_layer": -1, "post_norm": True})
        vision = VisionEncoder(**shapes)
    unused = load_published_tensors(all_layers, table, found, VISION_IGNORED, files).state_dict()
    vision.load_state_dict({name: unused.pop(name) for name in vision.state_dict()}, assign=True)
    unused = {published_name(name, table): tensor for name, tensor in unused.items()}
    unused |= {name: pair[0] for name, pair in found.items() if name.startswith("head.")}
    return part._replace(
        model=SimpleNamespace(vision=vision.eval()),
        history=weights_source(name, folder, files),
        unused_vision_tensors=unused,
    )


def read_decoder(name, *, template=None, tensors=True):
    """Returns the decoder of a folder of DECODER_FAMILIES, with its tokenizer, as a Checkpoint.

    template: a name of chat_template.TEMPLATES, if the folder's own is unknown. tensors: False for
    a Checkpoint without its model.
    """
    folder = find_pretrained(name)
    path = folder / "config.json"
    with refuse_odd_values(path):
        config = model_config(read_json(path), "text_config", DECODER_FAMILIES, path)
        shapes = decoder_shapes(config, path)
    check_arguments(Decoder, shapes, path, DECODER_FIELDS)
    tokenizer = Tokenizer.load(folder)
    if template is None:
        template = identify_template(*read_chat_template(folder), tokenizer, folder)
    chat_template.end_token_id(tokenizer, template)  # raises UserError if there is none
    check_vocab_size(tokenizer, shapes, path)
    part = Checkpoint(None, tokenizer, {"decoder": shapes}, None, template, {})
    if not tensors:
        return part
    files = list_weight_files(folder)
    found = read_weights(files, DECODER_PREFIXES)
    if shapes["tied"] and "model.embed_tokens.weight" in found:
        embedding = found["model.embed_tokens.weight"]
        if not torch.equal(found.setdefault("lm_head.weight", embedding)[0], embedding[0]):
            raise UserError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is not "
                "embed_tokens.weight"
            )
    with torch.device("meta"):
        decoder = Decoder(**shapes)
    load_published_tensors(decoder, LLAMA, found, DECODER_IGNORED, files)
    if shapes["tied"]:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    history = weights_source(name, folder, files)
    history["folder"]["max_position_embeddings"] = config["max_position_embeddings"]
    return part._replace(model=SimpleNamespace(decoder=decoder), history=history)


def add_special_tokens(tokenizer, names):
    """Returns a tokenizer with these special tokens: those that it lacks get the next ids."""
    new = [name for name in names if name not in tokenizer.special]
    if not new:
        return tokenizer
    if "tokenizer.json" not in tokenizer.files:
        raise UserError(
            f"{new[0]} cannot be added to a {next(iter(tokenizer.files))}, only to a tokenizer.json"
        )
    spec = json.loads(tokenizer.files["tokenizer.json"])
    for number, name in enumerate(new, tokenizer.vocab_size):
        spec["added_tokens"].append({"id": number, "content": name, **SPECIAL_TOKEN})
    return Tokenizer({"tokenizer.json": json.dumps(spec).encode()})


def read_chat_template(folder):
    """Returns (Jinja text or None, {bos_token, eos_token}) of a folder.

    transformers has stored the template in three different files over the years.
    """
    config, tokens = {}, {}
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if path.is_file():
            config |= read_json(path)
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None:
            tokens[name] = value
    text, path = config.get("chat_template"), folder / "chat_template.jinja"
    if path.is_file():
        text = read_text(path)
    if not isinstance(text, list):
        return text, tokens
    for item in text:  # several templates with names
        if isinstance(item, dict) and item.get("name") == "default":
            return item.get("template"), tokens
    return None, tokens


def read_whole_model(name, vision, decoder, projector, before):
    """Returns (Checkpoint, names of tensors) of the two parts of a folder and its projector.

    projector: its names of tensors; before: a pattern of what these begin with. No name is read if
    the parts have no models.
    """
    weights = {}
    with torch.device("meta"):
        found = combine_parts(vision, decoder, {"folder": str(name)})
    if found.model:
        paths = list_weight_files(find_pretrained(name))
        weights = read_weights(paths, [(r"^model\.", "")])
        ignored = f"(?!{before})"
        load_published_tensors(found.model.projector, projector, weights, ignored, paths)
    return found, weights.keys()


def combine_parts(vision, decoder, history):
    """Returns the Checkpoint of a vision encoder and a decoder, with a new projector.

    vision, decoder: a Checkpoint each, whole or a part. Tokenizer and chat template are the
    decoder's; no weight of the two changes. Its model is None if theirs are.
    """
    shapes, model = vision.shapes | {"decoder": decoder.shapes["decoder"]}, None
    if vision.model is not None:
        # a second decoder may not fit into memory: build one without layers, and replace it
        small = shapes["decoder"] | {"layers": 0, "vocab_size": 1}
        model = build_model(shapes | {"decoder": small}, vision.image_config).eval()
        model.vision, model.decoder = vision.model.vision, decoder.model.decoder
    return vision._replace(
        model=model,
        tokenizer=decoder.tokenizer,
        shapes=shapes,
        chat_template=decoder.chat_template,
        history=history,
    )
