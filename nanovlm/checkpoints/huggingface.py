"""Pretrained models: the vision encoder or the decoder of a Hugging Face folder.

    config.json                its numbers; a field that would change the result, and that this
                               project does not compute, raises a UserError that names it
    *.safetensors              its weights, in one file or in shards with an index; else
                               pytorch_model.bin, of which only tensors are unpickled
    preprocessor_config.json   the image config of a vision encoder
    tokenizer.*, tekken.json   the tokenizer of a decoder; its chat template is identified by the
                               text that it writes, never by the folder's name

One table a family translates the names of tensors, for import and export. files.py compares names,
shapes and dtypes with the expected ones.
"""

import math
import re
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import UserError
from ..data import chat_template
from ..data.tokenizer import Tokenizer
from ..files import (
    find_pretrained,
    list_weight_files,
    match_finite_tensors,
    read_json,
    read_weights,
    weights_source,
)
from ..models.decoder import Decoder
from ..models.vision_encoder import VisionEncoder

# ---- names of tensors ----
# ours: published. * is a layer's number. A module's name stands for its weight and bias.
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
    "layers.*.gate_proj": "model.layers.*.mlp.gate_proj",
    "layers.*.up_proj": "model.layers.*.mlp.up_proj",
    "layers.*.down_proj": "model.layers.*.mlp.down_proj",
}
# The prefixes of those names in a larger model, in transformers 4 and 5: (pattern, replacement).
VISION_PREFIXES = [(r"^(model\.)?(vision_tower\.)?(vision_model\.|dinov2\.)?", "")]
DECODER_PREFIXES = [
    (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
    (r"^language_model\.(?=lm_head)", ""),
]
# Tensors that a folder may hold and a part does not use: other parts, heads for other tasks, and
# tables that are computed.
VISION_IGNORED = (
    r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$|head\.|classifier\.|"
    r"embeddings\.(position_ids|mask_token)$|"
    r"multi_modal_projector\.|language_model\.|lm_head\.|image_newline$"
)
DECODER_IGNORED = (
    r".*rotary_emb\.inv_freq$|(model\.)?(vision_tower|vision_model|multi_modal_projector)\.|"
    r"(model\.)?image_newline$"
)


def published_name(name, table):
    """Returns the published name of our parameter.

    "layers.3.q_proj.weight" -> "model.layers.3.self_attn.q_proj.weight"
    """
    key, number = re.sub(r"\.\d+\.", ".*.", name), re.search(r"\.(\d+)\.", name)
    module, _, kind = key.rpartition(".")
    published = table[key] if key in table else f"{table[module]}.{kind}"
    return published.replace("*", number[1]) if number else published


# ---- config.json ----
# The defaults of transformers, and fields that must have the value that this project computes.
DEFAULTS = {
    "clip_vision_model": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    "siglip_vision_model": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
    "dinov2": dict(
        hidden_size=768,
        mlp_ratio=4,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    ),
    "llama": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    ),
    "mistral": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=None,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
}
DEFAULTS["ministral"] = DEFAULTS["mistral"]
VISION_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2")
DECODER_TYPES = ("llama", "mistral", "ministral")
VISION_REQUIRED = dict(
    num_channels=3,
    qkv_bias=True,
    use_swiglu_ffn=False,
    num_register_tokens=0,
    apply_layernorm=True,
    head_dim=None,
)
DECODER_REQUIRED = dict(
    hidden_act="silu",
    hidden_activation="silu",
    attention_bias=False,
    mlp_bias=False,
    qkv_bias=False,
    use_qkv_bias=False,
    use_bias=False,
    use_qk_norm=False,
    qk_norm=False,
    qk_layernorm=False,
    attention_multiplier=None,
    embedding_multiplier=1.0,
    residual_multiplier=1.0,
    logits_scaling=1.0,
    logit_scale=1.0,
    final_logit_softcapping=None,
    attn_logit_softcapping=None,
    query_pre_attn_scalar=None,
    clip_qkv=None,
    partial_rotary_factor=1.0,
    rope_interleaved=False,
    no_rope_layers=None,
    attention_chunk_size=None,
    attn_temperature_tuning=False,
    num_local_experts=None,
    use_parallel_residual=False,
    add_cross_attention=False,
)
MAX_LAYERS = 1024  # a model is built on the meta device before weights are found to be missing
IMAGE_REQUIRED = dict(do_resize=True, do_rescale=True, do_normalize=True, do_image_splitting=False)
# the default of LLaVA-NeXT
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ACTIVATION = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
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


def check_fields(config, required, where):
    """Raises UserError if a field differs from what this project computes. null is no value."""
    for field, value in required.items():
        if config.get(field) not in (None, value):
            only = "" if value is None else f", only {value}"
            raise UserError(f"{where}: {field} {config[field]} is not known here{only}")


def model_config(config, inner, types, where):
    """Returns the part of a config that describes a vision encoder or a decoder, with the defaults
    of transformers."""
    check_fields(config, dict(auto_map=None, quantization_config=None), where)
    if config.get("model_type") not in types and isinstance(config.get(inner), dict):
        config = inner_config(config, inner)
    model_type = config.get("model_type")
    if model_type not in types:
        raise UserError(
            f"{where}: a model of type {model_type} is not known here, only {', '.join(types)}"
        )
    config = {**DEFAULTS[model_type], **config}
    for field, default in DEFAULTS[model_type].items():
        is_size = isinstance(default, int) and default > 1 and field != "sliding_window"
        if is_size and (type(config[field]) is not int or config[field] < 1):
            raise UserError(f"{where}: {field} {config[field]!r} is no whole number from 1 on")
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers {config['num_hidden_layers']} is more than the "
            f"{MAX_LAYERS} that are allowed"
        )
    return config


def inner_config(config, inner):
    """Returns the vision_config or text_config of a larger model's config, with its model_type."""
    outer = config.get("model_type")
    model_type = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(outer)
    if outer in ("llava", "llava_next"):
        model_type = "clip_vision_model" if inner == "vision_config" else "llama"
    found = {"model_type": model_type} | config[inner]
    # CLIP's first name of the section; transformers gives it precedence over the second
    if first := config.get(f"{inner}_dict"):
        found |= DEFAULTS.get(found["model_type"], {}) | first
    return found


def vision_shapes(config, tile, vision_feature_layer, where):
    """Returns the arguments of VisionEncoder. vision_feature_layer: None for the usual one: the
    last but one of CLIP, as in LLaVA, the normed last of the others."""
    model_type, layers = config["model_type"], config["num_hidden_layers"]
    patch = config["patch_size"]
    check_fields(config, VISION_REQUIRED, where)
    if config["hidden_act"] not in ACTIVATION:
        raise UserError(
            f"{where}: hidden_act {config['hidden_act']} is not known here, only "
            f"{', '.join(ACTIVATION)}"
        )
    if not isinstance(patch, int) or tile < patch:
        raise UserError(
            f"{where}: a tile of {tile} pixels and patches of {patch} do not go together"
        )
    layer = vision_feature_layer
    if layer is not None and (layer == 0 or not -layers <= layer <= layers):
        raise UserError(
            f"--vision_feature_layer={layer} is not among the {layers} layers of {where}"
        )
    options = {
        "clip_vision_model": dict(class_token=True, pre_norm=True, patch_bias=False),
        "siglip_vision_model": {},
        "dinov2": dict(class_token=True, layer_scale=True),
    }[model_type]
    is_clip = model_type == "clip_vision_model"
    mlp_size = config.get("intermediate_size") or int(config["hidden_size"] * config["mlp_ratio"])
    return dict(
        tile=tile,
        patch=patch,
        width=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        intermediate_size=mlp_size,
        activation=ACTIVATION[config["hidden_act"]],
        eps=config["layer_norm_eps"],
        vision_feature_layer=vision_feature_layer or (-2 if is_clip else -1),
        post_norm=not is_clip and vision_feature_layer is None,
        **options,
    )


def rope_config(config, where):
    """Returns (rope_theta, rope_scaling) of Decoder, from rope_parameters (transformers 5) or
    rope_theta and rope_scaling (transformers 4)."""
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = fields.pop("rope_theta", config.get("rope_theta")) or 10000.0
    rope_type = fields.pop("rope_type", fields.get("type", "default"))
    fields.pop("type", None)
    check_fields(fields, dict(partial_rotary_factor=1.0), where)
    fields.pop("partial_rotary_factor", None)
    if rope_type not in ROPE_FIELDS:
        raise UserError(
            f"{where}: RoPE of type {rope_type} is not known here, only {', '.join(ROPE_FIELDS)}"
        )
    defaults = ROPE_FIELDS[rope_type]
    if unknown := fields.keys() - defaults.keys():
        raise UserError(
            f"{where}: RoPE of type {rope_type} is not known to have {', '.join(sorted(unknown))}"
        )
    fields = {name: value for name, value in fields.items() if value is not None}
    if missing := [n for n, value in defaults.items() if value is ... and n not in fields]:
        raise UserError(f"{where}: RoPE of type {rope_type} needs {', '.join(missing)}")
    if rope_type == "default":
        return theta, None
    scaling = {"rope_type": rope_type, **defaults, **fields}
    if rope_type != "linear":
        scaling["original_max_position_embeddings"] = (
            config.get("original_max_position_embeddings")
            or scaling["original_max_position_embeddings"]
            or config["max_position_embeddings"]
        )
    if rope_type == "yarn" and not scaling["attention_factor"]:
        scaling["attention_factor"] = yarn_attention_factor(scaling)
    return theta, scaling


def yarn_attention_factor(scaling):
    """Returns the factor of q · k that transformers computes for YaRN (Peng et al. 2023)."""
    mscale, mscale_all_dim = scaling["mscale"], scaling["mscale_all_dim"]

    def attention_scale(m):
        return 0.1 * m * math.log(max(scaling["factor"], 1)) + 1

    if mscale and mscale_all_dim:
        return attention_scale(mscale) / attention_scale(mscale_all_dim)
    return attention_scale(1)


def decoder_shapes(config, where):
    """Returns the arguments of Decoder."""
    required = DECODER_REQUIRED
    if config["model_type"] == "llama":
        required = required | dict(sliding_window=None)
    check_fields(config, required, where)
    theta, scaling = rope_config(config, where)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    windows = layer_windows(config, where)
    return dict(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=config["num_key_value_heads"] or heads,
        intermediate_size=config["intermediate_size"],
        head_dim=config["head_dim"] or config["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        eps=config["rms_norm_eps"],
        sliding_window=windows[0] if len(set(windows)) == 1 else windows,
        tied=config["tie_word_embeddings"],
    )


def layer_windows(config, where):
    """Returns the sliding window of each layer, None for full attention. Only Ministral mixes."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    usual = "full_attention" if window is None else "sliding_attention"
    types = config.get("layer_types") or [usual] * layers
    can_mix = config["model_type"] == "ministral" and window is not None
    is_mixed = can_mix and len(types) == layers and set(types) <= {"full_attention", usual}
    if types != [usual] * layers and not is_mixed:
        raise UserError(
            f"{where}: layer_types {types} do not fit {layers} layers of {config['model_type']} "
            f"with a sliding_window of {window}"
        )
    return [window if layer == "sliding_attention" else None for layer in types]


def load_published_tensors(module, table, found, ignored, files):
    """Put tensors into a module that was built on the meta device, without a copy.

    As strict as files.match_finite_tensors.
    """
    our_name = {published_name(name, table): name for name in module.state_dict()}
    shapes = {theirs: module.get_parameter(ours).shape for theirs, ours in our_name.items()}
    matched = match_finite_tensors(shapes, found, ignored, files)
    state = {our_name[name]: tensor for name, tensor in matched.items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


# ---- the parts ----
class Part(NamedTuple):
    """The fields of a Checkpoint that a vision encoder or a decoder alone determines."""

    model: SimpleNamespace | None  # .vision or .decoder; None if tensors=False
    shapes: dict
    history: dict
    image_config: dict | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    unused_vision_tensors: dict = {}  # of layers after the feature layer, by their published names


def read_image_config(folder, tile, fit):
    """Returns the image config that the folder's own preprocessor implies; tile and fit override
    it."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            break
    else:
        raise UserError(
            f"{folder} holds no preprocessor_config.json, so its image config is not known"
        )
    config = read_json(path)
    config = config.get("image_processor", config)
    check_fields(config, IMAGE_REQUIRED, path)
    resample = {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3))
    rescale = config.get("rescale_factor", 1 / 255)
    if resample is None or abs(rescale * 255 - 1) > 1e-6:
        raise UserError(
            f"{path}: resample {config.get('resample')} or rescale_factor {rescale} is not known "
            "here, only 2 or 3, and 1/255"
        )
    if missing := {"image_mean", "image_std"} - config.keys():
        raise UserError(f"{path} holds no {', '.join(sorted(missing))}")
    size = config.get("size")
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    edges = []
    for edge in (size, crop):
        if edge is not None:
            edges.append(set(edge.values()) if isinstance(edge, dict) else {edge})
    if tile is None and (not edges or len(edges[-1]) != 1):
        raise UserError(
            f"{path}: its images, size {size}, crop {crop}, are not square: choose --tile"
        )
    own_fit = preprocessor_fit(config, edges, path)
    if not (fit or own_fit):  # DINOv2's resizes to 256 and crops 224 from the center
        raise UserError(
            f"{path}: its resizing, size {size}, crop {crop}, is not known here: choose --fit, "
            "squash, pad or crop"
        )
    image_config = {
        "tile": tile or edges[-1].pop(),
        "fit": fit or own_fit,
        "resample": resample,
        "mean": config["image_mean"],
        "std": config["image_std"],
    }
    if is_llava_next(config) and not fit:
        image_config["pinpoints"] = config.get("image_grid_pinpoints", PINPOINTS)
    return image_config


def is_llava_next(config):
    """Whether a preprocessor cuts images into tiles by the AnyRes method of LLaVA-NeXT."""
    processor = str(config.get("image_processor_type"))
    return processor.startswith("LlavaNextImageProcessor") or "image_grid_pinpoints" in config


def preprocessor_fit(config, edges, path):
    """Returns how a preprocessor makes an image square: "anyres", "pad", "squash" or "crop".

    edges: the lengths of its size and of its crop. None if it crops from a larger size.
    """
    size, fit = config.get("size"), None
    if edges and edges[0] == edges[-1]:
        if isinstance(size, dict) and "height" in size:
            fit = "squash"
        elif config.get("do_center_crop") and config.get("crop_size"):
            fit = "crop"
    processor = str(config.get("image_processor_type"))
    if is_llava_next(config):
        return fit and "anyres"  # its do_pad pads the tiles of a batch
    if processor.startswith("LlavaImageProcessor") and config.get("do_pad"):
        return fit and "pad"
    check_fields(config, dict(do_pad=False), path)
    return fit


def resize_position_embeddings(positions_PD, side, leading):
    """Resize a square grid of position embeddings to side × side, with the bicubic filter that
    transformers uses. The first `leading` ones, of the class token, stay."""
    grid_pD = positions_PD[leading:]
    old = math.isqrt(len(grid_pD))
    grid_1DYX = grid_pD.float().T.unflatten(1, (old, old))[None]
    resized = F.interpolate(grid_1DYX, size=(side, side), mode="bicubic", align_corners=False)
    resized = resized[0].flatten(1).T  # (side², D)
    return torch.cat([positions_PD[:leading], resized.to(positions_PD.dtype)])


def read_vision_encoder(
    name, *, tile=None, fit=None, vision_feature_layer=None, shuffle=1, tensors=True, **more
):
    """Returns the vision encoder of a CLIP, SigLIP or DINOv2 folder as a Part.

    tile: pixels, None for its own. fit, more: of the image config (data/image_processing.py).
    vision_feature_layer: the layer whose output is used, without the final norm; None for the
    usual one. tensors: False for a Part without its model.
    """
    folder = find_pretrained(name)
    path = folder / "config.json"
    config = model_config(read_json(path), "vision_config", VISION_TYPES, path)
    patch = config["patch_size"]
    image_config = read_image_config(folder, tile, fit)
    image_config |= {"patch": patch, "shuffle": shuffle, **more}
    shapes = vision_shapes(config, image_config["tile"], vision_feature_layer, path)
    side, own_side = image_config["tile"] // patch, config["image_size"] // patch
    if side % shuffle:
        raise UserError(
            f"--shuffle={shuffle} does not divide the {side} patches across a tile of "
            f"{image_config['tile']} pixels"
        )
    part = Part(None, {"vision": shapes, "shuffle": shuffle}, {}, image_config=image_config)
    if not tensors:
        return part
    files = list_weight_files(folder)
    table = DINOV2 if config["model_type"] == "dinov2" else CLIP
    found = read_weights(files, VISION_PREFIXES)
    positions, leading = published_name("positions", table), int("class_token" in shapes)
    tensor, source = found.get(positions, (torch.empty(0, 0), None))
    if side != own_side and tensor.shape[-2] == leading + own_side**2:
        resized = resize_position_embeddings(tensor.flatten(0, -2), side, leading)
        found[positions] = resized, source
    with torch.device("meta"):
        all_layers = VisionEncoder(**shapes | {"vision_feature_layer": -1, "post_norm": True})
        vision = VisionEncoder(**shapes)
    load_published_tensors(all_layers, table, found, VISION_IGNORED, files)
    unused = all_layers.state_dict()
    used = {name: unused.pop(name) for name in vision.state_dict()}
    vision.load_state_dict(used, assign=True)
    unused = {published_name(name, table): tensor for name, tensor in unused.items()}
    unused |= {name: pair[0] for name, pair in found.items() if name.startswith("head.")}
    return part._replace(
        model=SimpleNamespace(vision=vision.eval()),
        history=weights_source(name, folder, files),
        unused_vision_tensors=unused,
    )


def read_decoder(name, *, template=None, default_template=None, tensors=True):
    """Returns the decoder of a Llama or Mistral folder, with its tokenizer, as a Part.

    template: a name of chat_template.TEMPLATES, if the folder's own is unknown. default_template:
    one for a folder without a template. tensors: False for a Part without its model.
    """
    folder = find_pretrained(name)
    path = folder / "config.json"
    config = model_config(read_json(path), "text_config", DECODER_TYPES, path)
    shapes = decoder_shapes(config, path)
    tokenizer = Tokenizer.load(folder)
    jinja, tokens = read_chat_template(folder)
    if jinja is None:
        template = template or default_template
    template = template or chat_template.identify_template(jinja, tokens, tokenizer, folder)
    chat_template.end_token_id(tokenizer, template)  # raises UserError if there is none
    check_vocab_size(tokenizer, shapes, path)
    part = Part(None, {"decoder": shapes}, {}, tokenizer=tokenizer, chat_template=template)
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


def check_vocab_size(tokenizer, shapes, where):
    """Raises UserError if the tokenizer has more tokens than the decoder has embeddings."""
    if tokenizer.vocab_size > shapes["vocab_size"]:
        raise UserError(
            f"{where}: the vocabulary is {shapes['vocab_size']:,}, its folder's tokenizer knows "
            f"{tokenizer.vocab_size:,} tokens"
        )


def read_chat_template(folder):
    """Returns (Jinja text or None, {bos_token, eos_token}) of a folder.

    transformers has stored the template in three different files over the years.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    tokens = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        if value is not None:
            tokens[name] = value.get("content") if isinstance(value, dict) else value
    text = config.get("chat_template")
    if (folder / "chat_template.json").is_file():
        text = read_json(folder / "chat_template.json").get("chat_template", text)
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(errors="replace")
    if isinstance(text, list):  # several templates with names
        named, text = [item for item in text if isinstance(item, dict)], None
        for item in named:
            if item.get("name") == "default":
                return item.get("template"), tokens
    return text, tokens
