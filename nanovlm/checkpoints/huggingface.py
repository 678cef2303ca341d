"""Public models, as their owners publish them: an eye or a brain out of a Hugging Face folder.

    config.json                its numbers; a field that would change the result and that we do not compute is refused by its name
    *.safetensors              its weights, in one file or in shards that an index lists; else pytorch_model.bin, read as plain tensors only
    preprocessor_config.json   how an eye wants its pictures
    tokenizer.*, tekken.json   how a brain cuts its text; its chat template is recognised by what it writes, never by the folder's name

Names are translated by one table, which export reads too; disk.py holds files and tensors to what is wanted.
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

# ---- names: ours to theirs; * is the number of a layer. A name of a module stands for its weight and bias ----
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
# What stands in front of those names where the part belongs to something larger, in the spellings of transformers 4 and 5.
VISION_PREFIXES = [(r"^(model\.)?(vision_tower\.)?(vision_model\.|dinov2\.)?", "")]
DECODER_PREFIXES = [
    (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
    (r"^language_model\.(?=lm_head)", ""),
]
# What a folder may hold that a part does not read: the other parts, heads for other tasks, tables that are computed.
VISION_IGNORED = (
    r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$|head\.|classifier\.|embeddings\.(position_ids|mask_token)$|"
    r"multi_modal_projector\.|language_model\.|lm_head\.|image_newline$"
)
DECODER_IGNORED = r".*rotary_emb\.inv_freq$|(model\.)?(vision_tower|vision_model|multi_modal_projector)\.|(model\.)?image_newline$"


def published_name(name, table):
    """Their name of our parameter: "layers.3.q_proj.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    key, number = re.sub(r"\.\d+\.", ".*.", name), re.search(r"\.(\d+)\.", name)
    module, _, kind = key.rpartition(".")
    found = table[key] if key in table else f"{table[module]}.{kind}"
    return found.replace("*", number[1]) if number else found


# ---- config.json: what transformers assumes where a folder is silent, and the fields that must say what we compute ----
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
VISION_TYPES, DECODER_TYPES = (
    ("clip_vision_model", "siglip_vision_model", "dinov2"),
    ("llama", "mistral", "ministral"),
)
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
MAX_LAYERS = 1024  # each is built, without its numbers, before they are missed
IMAGE_REQUIRED = dict(do_resize=True, do_rescale=True, do_normalize=True, do_image_splitting=False)
PINPOINTS = [
    [336, 672],
    [672, 336],
    [672, 672],
    [1008, 336],
    [336, 1008],
]  # where a LLaVA-NeXT says none
ACTIVATION = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_FIELDS = {  # what each kind of stretching needs, and what it may leave out
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


def check_fields(config, must, where):
    """Raise UserError where a field says something else than what is computed here; null says nothing."""
    for field, value in must.items():
        if config.get(field) not in (None, value):
            raise UserError(
                f"{where}: {field} {config[field]} is not known here{'' if value is None else f', only {value}'}"
            )


def model_config(config, inner, kinds, where):
    """The part of a config that describes an eye or a brain, with what transformers would assume filled in."""
    check_fields(config, dict(auto_map=None, quantization_config=None), where)
    if config.get("model_type") not in kinds and isinstance(config.get(inner), dict):
        outer = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(
            config.get("model_type")
        )
        if config.get("model_type") in ("llava", "llava_next"):
            outer = "clip_vision_model" if inner == "vision_config" else "llama"
        given = {"model_type": outer} | config[inner]
        if older := config.get(
            f"{inner}_dict"
        ):  # CLIP's first spelling, which transformers puts above the second
            given |= DEFAULTS.get(given["model_type"], {}) | older
        config = given
    kind = config.get("model_type")
    if kind not in kinds:
        raise UserError(
            f"{where}: a model of type {kind} is not known here, only {', '.join(kinds)}"
        )
    config = {**DEFAULTS[kind], **config}
    for field, usual in DEFAULTS[kind].items():
        if (
            isinstance(usual, int)
            and usual > 1
            and field != "sliding_window"
            and (type(config[field]) is not int or config[field] < 1)
        ):
            raise UserError(f"{where}: {field} {config[field]!r} is no whole number from 1 on")
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers {config['num_hidden_layers']} is more than the {MAX_LAYERS} that are allowed"
        )
    return config


def vision_shapes(config, tile, vision_feature_layer, where):
    """The arguments of VisionEncoder for an eye of its own tile size unless `tile` says another, and its own layer unless `read` does."""
    kind, layers, patch = config["model_type"], config["num_hidden_layers"], config["patch_size"]
    check_fields(config, VISION_REQUIRED, where)
    if config["hidden_act"] not in ACTIVATION:
        raise UserError(
            f"{where}: hidden_act {config['hidden_act']} is not known here, only {', '.join(ACTIVATION)}"
        )
    if not isinstance(patch, int) or tile < patch:
        raise UserError(
            f"{where}: a tile of {tile} pixels and patches of {patch} do not go together"
        )
    if vision_feature_layer is not None and not -layers <= vision_feature_layer <= layers or vision_feature_layer == 0:
        raise UserError(f"--vision_feature_layer={vision_feature_layer} is not among the {layers} layers of {where}")
    own = {
        "clip_vision_model": dict(class_token=True, pre_norm=True, patch_bias=False),
        "siglip_vision_model": {},
        "dinov2": dict(class_token=True, layer_scale=True),
    }[kind]
    clip = (
        kind == "clip_vision_model"
    )  # LLaVA's choice for CLIP; the others are read at their normed end
    return dict(
        tile=tile,
        patch=patch,
        width=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        intermediate_size=config.get("intermediate_size") or int(config["hidden_size"] * config["mlp_ratio"]),
        activation=ACTIVATION[config["hidden_act"]],
        eps=config["layer_norm_eps"],
        vision_feature_layer=vision_feature_layer or (-2 if clip else -1),
        post_norm=not clip and vision_feature_layer is None,
        **own,
    )


def rope_config(config, where):
    """(theta, scaling): the arguments of Decoder, from rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta, kind = (
        given.pop("rope_theta", config.get("rope_theta")) or 10000.0,
        given.pop("rope_type", given.get("type", "default")),
    )
    given.pop("type", None)
    check_fields(given, dict(partial_rotary_factor=1.0), where)
    given.pop("partial_rotary_factor", None)
    if kind not in ROPE_FIELDS:
        raise UserError(f"{where}: RoPE of type {kind} is not known here, only {', '.join(ROPE_FIELDS)}")
    if odd := given.keys() - ROPE_FIELDS[kind].keys():
        raise UserError(
            f"{where}: RoPE of type {kind} is not known to have {', '.join(sorted(odd))}"
        )
    if absent := [
        name for name, value in ROPE_FIELDS[kind].items() if value is ... and given.get(name) is None
    ]:
        raise UserError(f"{where}: RoPE of type {kind} needs {', '.join(absent)}")
    if kind == "default":
        return theta, None
    scaling = {
        "rope_type": kind,
        **ROPE_FIELDS[kind],
        **{name: value for name, value in given.items() if value is not None},
    }
    if kind != "linear":
        scaling["original_max_position_embeddings"] = (
            config.get("original_max_position_embeddings")
            or scaling["original_max_position_embeddings"]
            or config["max_position_embeddings"]
        )
    if kind == "yarn":
        growth, over, under = (
            0.1 * (m or 1) * math.log(max(scaling["factor"], 1)) + 1
            for m in (1, scaling["mscale"], scaling["mscale_all_dim"])
        )
        scaling["attention_factor"] = scaling["attention_factor"] or (
            over / under if scaling["mscale"] and scaling["mscale_all_dim"] else growth
        )
    return theta, scaling


def decoder_shapes(config, where):
    """The arguments of Decoder."""
    check_fields(
        config,
        DECODER_REQUIRED | (dict(sliding_window=None) if config["model_type"] == "llama" else {}),
        where,
    )
    theta, scaling = rope_config(config, where)
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    usual = ["full_attention" if window is None else "sliding_attention"] * layers
    kinds = config.get("layer_types") or usual
    mixed = (
        config["model_type"] == "ministral"
        and window is not None
        and len(kinds) == layers
        and set(kinds) <= {"full_attention", *usual}
    )
    if kinds != usual and not mixed:
        raise UserError(
            f"{where}: layer_types {kinds} do not fit {layers} layers of {config['model_type']} with a sliding_window of {window}"
        )
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    return dict(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"] or config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        head_dim=config["head_dim"] or config["hidden_size"] // config["num_attention_heads"],
        rope_theta=theta,
        rope_scaling=scaling,
        eps=config["rms_norm_eps"],
        sliding_window=windows[0] if len(set(windows)) == 1 else windows,
        tied=config["tie_word_embeddings"],
    )


def load_published_tensors(module, table, found, unread, files):
    """Put tensors into a module built on the meta device, without a copy; strict as disk.checked is."""
    own = {published_name(name, table): name for name in module.state_dict()}
    shapes = {theirname: module.get_parameter(name).shape for theirname, name in own.items()}
    module.load_state_dict(
        {own[name]: tensor for name, tensor in match_finite_tensors(shapes, found, unread, files).items()},
        assign=True,
    )
    return module.eval()


# ---- the parts ----
class Part(NamedTuple):
    """What an eye or a brain alone can fill of a Checkpoint."""

    model: SimpleNamespace | None  # .vision or .decoder; None where no weights were asked for
    shapes: dict
    history: dict
    image_config: dict | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    unused_vision_tensors: dict = {}  # tensors of an eye that are not read, by their own names: a LLaVA folder must hold them


def read_image_config(folder, tile, fit):
    """How the folder's own preprocessor treats a picture, as images.py says it; tile and fit override it."""
    path = next(
        (
            p
            for p in (folder / "preprocessor_config.json", folder / "processor_config.json")
            if p.is_file()
        ),
        None,
    )
    if path is None:
        raise UserError(
            f"{folder} holds no preprocessor_config.json: how its eye wants pictures is not known"
        )
    config = read_json(path)
    config = config.get("image_processor", config)
    check_fields(config, IMAGE_REQUIRED, path)
    resample, rescale = (
        {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3)),
        config.get("rescale_factor", 1 / 255),
    )
    if resample is None or abs(rescale * 255 - 1) > 1e-6:
        raise UserError(
            f"{path}: resample {config.get('resample')} or rescale_factor {rescale} is not known here, only 2 or 3, and 1/255"
        )
    if missing := {"image_mean", "image_std"} - config.keys():
        raise UserError(f"{path} does not say its {', '.join(sorted(missing))}")
    size, crop = (
        config.get("size"),
        config.get("crop_size") if config.get("do_center_crop") else None,
    )
    edges = [
        set(edge.values()) if isinstance(edge, dict) else {edge}
        for edge in (size, crop)
        if edge is not None
    ]
    if tile is None and (not edges or len(edges[-1]) != 1):
        raise UserError(
            f"{path}: what it makes of a picture, size {size}, crop {crop}, is not square: say --tile"
        )
    own_fit = (
        None
        if not edges or edges[0] != edges[-1]
        else "squash"
        if isinstance(size, dict) and "height" in size
        else "crop"
        if crop
        else None
    )
    pinpoints, llava = {}, str(config.get("image_processor_type")).startswith("LlavaImageProcessor")
    if (
        str(config.get("image_processor_type")).startswith("LlavaNextImageProcessor")
        or "image_grid_pinpoints" in config
    ):
        own_fit = own_fit and "anyres"  # its do_pad is of tiles to a batch
        pinpoints = {"pinpoints": config.get("image_grid_pinpoints", PINPOINTS)}
    elif llava and config.get("do_pad"):
        own_fit = own_fit and "pad"
    else:
        check_fields(config, dict(do_pad=False), path)
    if not (fit or own_fit):  # DINOv2's own enlarges to 256 and cuts 224 out of the middle
        raise UserError(
            f"{path}: its way with pictures, size {size}, crop {crop}, is not known here: say --fit, squash, pad or crop"
        )
    return {
        "tile": tile or edges[-1].pop(),
        "fit": fit or own_fit,
        "resample": resample,
        "mean": config["image_mean"],
        "std": config["image_std"],
        **({} if fit else pinpoints),
    }


def resize_position_embeddings(positions_PD, side, leading):
    """The embeddings of a square grid of places, made into side × side by the bicubic filter that transformers uses; `leading` ones stay."""
    grid_pD = positions_PD[leading:]
    old = math.isqrt(len(grid_pD))
    grid_1DYX = grid_pD.float().T.unflatten(1, (old, old))[None]
    resized = (
        F.interpolate(grid_1DYX, size=(side, side), mode="bicubic", align_corners=False)[0]
        .flatten(1)
        .T
    )
    return torch.cat([positions_PD[:leading], resized.to(positions_PD.dtype)])


def read_vision_encoder(name, *, tile=None, fit=None, vision_feature_layer=None, shuffle=1, tensors=True, **more):
    """The eye of a CLIP, SigLIP or DINOv2 folder. tile: pixels, other than its own; fit: as images.py; read: a layer's output, un-normed;
    tensors: False for all but the model; more: what its picture policy has besides, as images.py says it."""
    folder = find_pretrained(name)
    where = folder / "config.json"
    config = model_config(read_json(where), "vision_config", VISION_TYPES, where)
    own, patch = config["image_size"] // config["patch_size"], config["patch_size"]
    policy = read_image_config(folder, tile, fit) | {"patch": patch, "shuffle": shuffle, **more}
    shapes = vision_shapes(config, policy["tile"], vision_feature_layer, where)
    side = policy["tile"] // patch
    if side % shuffle:
        raise UserError(
            f"--shuffle={shuffle} does not divide the {side} patches across a tile of {policy['tile']} pixels"
        )
    part = Part(None, {"vision": shapes, "shuffle": shuffle}, {}, image_config=policy)
    if not tensors:
        return part
    files = list_weight_files(folder)
    table, found = (
        DINOV2 if config["model_type"] == "dinov2" else CLIP,
        read_weights(files, VISION_PREFIXES),
    )
    places, leading = published_name("positions", table), int("class_token" in shapes)
    tensor, path = found.get(places, (torch.empty(0, 0), None))
    if side != own and tensor.shape[-2] == leading + own**2:
        found[places] = resize_position_embeddings(tensor.flatten(0, -2), side, leading), path
    with torch.device("meta"):
        whole, vision = VisionEncoder(**shapes | {"vision_feature_layer": -1, "post_norm": True}), VisionEncoder(**shapes)
    after = load_published_tensors(whole, table, found, VISION_IGNORED, files).state_dict()
    vision.load_state_dict({name: after.pop(name) for name in vision.state_dict()}, assign=True)
    spare = {published_name(name, table): tensor for name, tensor in after.items()} | {
        n: t for n, (t, _) in found.items() if n.startswith("head.")
    }
    return part._replace(
        model=SimpleNamespace(vision=vision.eval()), history=weights_source(name, folder, files), unused_vision_tensors=spare
    )


def read_decoder(name, *, template=None, usual=None, tensors=True):
    """The brain of a Llama or Mistral folder with its tokenizer. template: a name of chat.TEMPLATES, where the folder's own is not known;
    usual: one for a folder that states none; tensors: False for all but the model."""
    folder = find_pretrained(name)
    where = folder / "config.json"
    config = model_config(read_json(where), "text_config", DECODER_TYPES, where)
    shapes = decoder_shapes(config, where)
    tokenizer = Tokenizer.load(folder)
    jinja, tokens = read_chat_template(folder)
    template = (
        template
        or (usual if jinja is None else None)
        or chat_template.identify_template(jinja, tokens, tokenizer, folder)
    )
    chat_template.end_token_id(tokenizer, template)  # or a UserError
    check_vocab_size(tokenizer, shapes, where)
    part = Part(None, {"decoder": shapes}, {}, tokenizer=tokenizer, chat_template=template)
    if not tensors:
        return part
    files = list_weight_files(folder)
    found = read_weights(files, DECODER_PREFIXES)
    if shapes["tied"] and "model.embed_tokens.weight" in found:
        embed = found["model.embed_tokens.weight"]
        if not torch.equal(found.setdefault("lm_head.weight", embed)[0], embed[0]):
            raise UserError(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight"
            )
    with torch.device("meta"):
        decoder = Decoder(**shapes)
    load_published_tensors(decoder, LLAMA, found, DECODER_IGNORED, files)
    if shapes["tied"]:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    card = weights_source(name, folder, files)
    card["folder"]["max_position_embeddings"] = config["max_position_embeddings"]
    return part._replace(model=SimpleNamespace(decoder=decoder), history=card)


def check_vocab_size(tokenizer, shapes, where):
    """Raise UserError unless the brain has a row for every token."""
    if tokenizer.vocab_size > shapes["vocab_size"]:
        raise UserError(
            f"{where}: the vocabulary is {shapes['vocab_size']:,}, its folder's tokenizer knows {tokenizer.vocab_size:,} tokens"
        )


def read_chat_template(folder):
    """(Jinja text or None, {bos_token, eos_token}) of a folder; transformers has written it into three files over the years."""
    config = (
        read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name in ("bos_token", "eos_token")
        if (value := config.get(name)) is not None
    }
    text = config.get("chat_template")
    if (folder / "chat_template.json").is_file():
        text = read_json(folder / "chat_template.json").get("chat_template", text)
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(errors="replace")
    if isinstance(text, list):  # several, by name
        text = next(
            (
                one.get("template")
                for one in text
                if isinstance(one, dict) and one.get("name") == "default"
            ),
            None,
        )
    return text, tokens
