"""Import and export of a whole model as a LLaVA folder.

It is the layout of LLaVA-1.5 (Liu et al. 2023) and LLaVA-NeXT in transformers, vLLM and llama.cpp:

    config.json                vision_config, text_config, and how the two are joined
    model.safetensors          vision_tower.*, multi_modal_projector.*, language_model.*; LLaVA-NeXT
                               also has image_newline
    preprocessor_config.json   the image config
    processor_config.json      what determines how many tokens an image takes
    tokenizer files            unchanged, except as save_tokenizer says; tokenizer_config.json adds
                               <image> if they lack it
    chat_template.jinja        the chat template
    generation_config.json     which tokens begin and end a text

export raises UserError for what the layout cannot express, and says how to stitch instead.
"""

import json
import re

import torch

from .. import UserError, files
from ..data import chat_template, image_processing
from ..files import read_json
from ..models.vlm import VLM
from . import huggingface
from .huggingface import check_fields, published_name

LLAVA = {  # names of tensors, ours: published, as in huggingface.py
    "projector.up_proj": "multi_modal_projector.linear_1",
    "projector.down_proj": "multi_modal_projector.linear_2",
    "projector.newline": "image_newline",
}
LLAVA_TYPES = ("llava", "llava_next")
MAX_SHARD_BYTES = 5_000_000_000  # the default of transformers


# ---- reading ----
def read_llava(name, dtype=None, template=None, tensors=True):
    """Returns the fields of a Checkpoint from a LLaVA-1.5 or LLaVA-NeXT folder, or owner/name.

    dtype: of all parameters, None for their dtypes in the files. template: if the folder's own is
    unknown. tensors: False for a Checkpoint without its model.
    """
    folder = files.find_pretrained(name)
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") not in LLAVA_TYPES:
        raise UserError(
            f"{path}: a model of type {config.get('model_type')} is no LLaVA "
            f"({', '.join(LLAVA_TYPES)}); prepare.py stitch joins a vision encoder and a decoder"
        )
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"{path}: vision_feature_layer {layer} is not known here, only one layer")
    vision = huggingface.read_vision_encoder(name, vision_feature_layer=layer, tensors=tensors)
    decoder = huggingface.read_decoder(
        name, template=template, default_template=default_template(config), tensors=tensors
    )
    check_joint_config(config, vision, decoder, path)
    image_config, shapes = vision.image_config, {**vision.shapes, **decoder.shapes}
    image_processing.check_image_config(image_config)
    fields = dict(
        model=None,
        tokenizer=decoder.tokenizer,
        shapes=shapes,
        image_config=image_config,
        chat_template=decoder.chat_template,
        history={},
        unused_vision_tensors=vision.unused_vision_tensors,
    )
    if not tensors:
        return fields
    model, vision_prefix = build_llava(vision, decoder, shapes, folder)
    if dtype is not None:
        model.to(dtype)
    source = decoder.history["folder"] | {"vision_names": vision_prefix}
    return fields | dict(model=model, history={"llava": source})


def check_joint_config(config, vision, decoder, path):
    """Raises UserError if the config joins the two parts in a way that is not computed here."""
    config.setdefault("vision_feature_select_strategy", "default")
    has_class_token = vision.shapes["vision"].get("class_token")
    required = dict(
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        use_image_newline_parameter=True,
        quantization_config=None,
        tie_word_embeddings=decoder.shapes["decoder"]["tied"],
        vision_feature_select_strategy="default" if has_class_token else "full",
    )
    check_fields(config, required, path)
    is_anyres = config["model_type"] == "llava_next"
    pinpoints = config.get("image_grid_pinpoints") or huggingface.PINPOINTS
    own = vision.image_config.get("pinpoints")
    if (vision.image_config["fit"] == "anyres") != is_anyres or (is_anyres and own != pinpoints):
        raise UserError(
            f"{path.parent}: image_grid_pinpoints are {own} for its preprocessor, "
            f"{pinpoints if is_anyres else None} in config.json"
        )


def default_template(config):
    """Returns the template of published LLaVA folders that state none; None if it is not known."""
    model_type = config.get("text_config", {}).get("model_type", "llama")
    return {"mistral": "mistral-v1", "llama": "llava"}.get(model_type)


def build_llava(vision, decoder, shapes, folder):
    """Returns (VLM of the two parts and the folder's projector, prefix of its vision tensors)."""
    paths = files.list_weight_files(folder)
    found = files.read_weights(paths, [(r"^model\.", "")])
    small = shapes["decoder"] | {"layers": 0, "vocab_size": 1}  # replaced below
    with torch.device("meta"):
        model = VLM(
            vision=shapes["vision"],
            decoder=small,
            shuffle=1,
            mean=vision.image_config["mean"],
            std=vision.image_config["std"],
            newline=vision.image_config["fit"] == "anyres",
        )
        model.vision = model.decoder = torch.nn.Identity()
    ignored = r"(?!multi_modal_projector|image_newline)"
    huggingface.load_published_tensors(model, LLAVA, found, ignored, paths)
    model.vision, model.decoder = vision.model.vision, decoder.model.decoder
    is_nested = any(name.startswith("vision_tower.vision_model.") for name in found)
    return model.eval(), "vision_tower.vision_model." if is_nested else "vision_tower."


# ---- writing ----
def write_llava(checkpoint, folder):
    """Write a checkpoint into an empty folder. Raises UserError if the layout cannot express it."""
    check_exportable(checkpoint)
    image_id = checkpoint.tokenizer.special.get("<image>")
    image_id, tensors = add_image_token(image_id, checkpoint, llava_tensors(checkpoint))
    vocab_size = tensors["language_model.model.embed_tokens.weight"].shape[0]
    contents = {
        "config.json": llava_config(checkpoint, image_id, vocab_size),
        "preprocessor_config.json": preprocessor_config(checkpoint.image_config),
        "processor_config.json": processor_config(checkpoint),
        "generation_config.json": generation_config(checkpoint, image_id),
        "tokenizer_config.json": tokenizer_config(checkpoint, image_id),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    jinja = jinja_template(checkpoint.chat_template, checkpoint.tokenizer)
    (folder / "chat_template.jinja").write_text(jinja)
    save_tokenizer(checkpoint, folder)
    write_safetensors(tensors, folder)


def check_exportable(checkpoint):
    """Raises UserError, which says how to stitch instead, if the layout lacks something."""
    vision, problems = checkpoint.shapes["vision"], []
    if checkpoint.shapes["shuffle"] != 1:
        problems.append(
            f"pixel shuffle by {checkpoint.shapes['shuffle']}: stitch without --shuffle"
        )
    if checkpoint.image_config["fit"] == "tiles":
        problems.append("InternVL's tiles: stitch without --tiles")
    if vision_type(vision) is None:
        problems.append(
            "a vision encoder that is neither CLIP nor SigLIP: stitch with --vision of one of these"
        )
    if vision.get("post_norm", True):
        problems.append(
            "a norm after the last layer of the vision encoder: stitch a CLIP or SigLIP folder "
            "with --vision_feature_layer=-2, the last layer but one"
        )
    elif not checkpoint.unused_vision_tensors:
        problems.append("a vision encoder without the layers after its feature layer: stitch again")
    if "tekken.json" in checkpoint.tokenizer.files:
        problems.append(
            "a tekken.json: stitch with a --decoder folder whose only tokenizer is tokenizer.json"
        )
    if chat_template.TEMPLATES[checkpoint.chat_template].get("mute"):
        problems.append(
            f"the template {checkpoint.chat_template}, which has no questions: stitch with the "
            "--template of the decoder's own chats"
        )
    if problems:
        raise UserError(f"a LLaVA folder cannot express {'; nor '.join(problems)}")


def vision_type(vision):
    """Returns "clip_vision_model", "siglip_vision_model", or None for another vision encoder.

    vision: the arguments of VisionEncoder, by which the two differ.
    """
    clip_options = (
        vision.get("class_token", False),
        vision.get("pre_norm", False),
        not vision.get("patch_bias", True),
    )
    if vision.get("layer_scale") or len(set(clip_options)) != 1:
        return None
    return "clip_vision_model" if clip_options[0] else "siglip_vision_model"


def llava_tensors(checkpoint):
    """Returns {published name: tensor}. As in transformers, a tied lm_head is not written."""
    source = checkpoint.history.get("llava", {})
    prefix = source.get("vision_names", "vision_tower.vision_model.")
    tensors, decoder = {}, checkpoint.model.decoder
    for name, tensor in checkpoint.model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vision":
            tensors[prefix + published_name(rest, huggingface.CLIP)] = tensor
        elif part != "decoder":
            tensors[published_name(name, LLAVA)] = tensor
        elif rest != "lm_head.weight" or decoder.lm_head.weight is not decoder.embed_tokens.weight:
            tensors[f"language_model.{published_name(rest, huggingface.LLAMA)}"] = tensor
    for name, tensor in checkpoint.unused_vision_tensors.items():
        tensors[prefix + name] = tensor
    return tensors


def add_image_token(image_id, checkpoint, tensors):
    """Returns (id of <image>, tensors).

    If the tokenizer has no <image>, it gets the first free id. If the embedding has no row for
    that id, a copy of the start token's row is added, so <image> is never generated before it.
    """
    if image_id is not None:
        return image_id, tensors
    image_id, start = checkpoint.tokenizer.vocab_size, bos_token_id(checkpoint)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors and len(tensors[name]) <= image_id:
            tensors = tensors | {name: torch.cat([tensors[name], tensors[name][start : start + 1]])}
    return image_id, tensors


def bos_token_id(checkpoint):
    """Returns the id of the special token that a conversation begins with."""
    special = checkpoint.tokenizer.special
    names = chat_template.special_token_names(checkpoint.chat_template)
    return next(special[name] for name in names if name in special)


def write_safetensors(tensors, folder):
    """Write one model.safetensors, or several of at most MAX_SHARD_BYTES with an index."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        return files.write_tensors(shards[0], folder / "model.safetensors")
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.write_tensors(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---- the content of each file ----
def llava_config(checkpoint, image_id, vocab_size):
    image_config, shapes = checkpoint.image_config, checkpoint.shapes
    is_anyres = image_config["fit"] == "anyres"
    is_clip = vision_type(shapes["vision"]) == "clip_vision_model"
    architecture = (
        "LlavaNextForConditionalGeneration" if is_anyres else "LlavaForConditionalGeneration"
    )
    grid = {"image_grid_pinpoints": image_config["pinpoints"]} if is_anyres else {}
    dtype = checkpoint.model.decoder.embed_tokens.weight.dtype
    return {
        "architectures": [architecture],
        "model_type": "llava_next" if is_anyres else "llava",
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": image_id,
        "image_seq_length": image_processing.tokens_per_tile(image_config),
        **grid,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": shapes["vision"]["vision_feature_layer"],
        "vision_feature_select_strategy": "default" if is_clip else "full",
        "tie_word_embeddings": shapes["decoder"].get("tied", False),
        "vision_config": vision_config(checkpoint),
        "text_config": text_config(checkpoint, vocab_size),
    }


def vision_config(checkpoint):
    vision = checkpoint.shapes["vision"]
    published = {ours: theirs for theirs, ours in huggingface.ACTIVATION.items()}
    head = {}
    if vision_type(vision) == "siglip_vision_model":
        has_head = any(name.startswith("head.") for name in checkpoint.unused_vision_tensors)
        head = {"vision_use_head": has_head}
    return {
        "model_type": vision_type(vision),
        "hidden_size": vision["width"],
        "intermediate_size": vision["intermediate_size"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["heads"],
        "image_size": vision["tile"],
        "patch_size": vision["patch"],
        "hidden_act": published[vision.get("activation", "gelu_tanh")],
        "layer_norm_eps": vision.get("eps", 1e-6),
        **head,
    }


def text_config(checkpoint, vocab_size):
    decoder = checkpoint.shapes["decoder"]
    window, layers = decoder.get("sliding_window"), decoder["layers"]
    if isinstance(window, list):
        model_type = "ministral"
        types = ["full_attention" if w is None else "sliding_attention" for w in window]
        windows = {"sliding_window": max(w or 0 for w in window), "layer_types": types}
    else:
        model_type = "llama" if window is None else "mistral"
        windows = {} if window is None else {"sliding_window": window}
    source = checkpoint.history.get("decoder", checkpoint.history.get("llava", {}))
    # RoPE has no table; servers use this length to reserve memory
    max_length = source.get("max_position_embeddings", 32768)
    start = chat_template.TEMPLATES[checkpoint.chat_template]["start"]
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": decoder["width"],
        "intermediate_size": decoder["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": decoder["heads"],
        "num_key_value_heads": decoder["kv_heads"],
        "head_dim": decoder.get("head_dim") or decoder["width"] // decoder["heads"],
        "hidden_act": "silu",
        "rms_norm_eps": decoder.get("eps", 1e-5),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": decoder.get("tied", False),
        **windows,
        "rope_parameters": {
            "rope_theta": decoder.get("rope_theta", 10000.0),
            **(decoder.get("rope_scaling") or {"rope_type": "default"}),
        },
        "bos_token_id": checkpoint.tokenizer.special.get(start),
        "eos_token_id": chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template),
    }


def preprocessor_config(image_config):
    tile, fit = image_config["tile"], image_config["fit"]
    kind = {"pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}.get(
        fit, "CLIPImageProcessor"
    )
    size = {"height": tile, "width": tile} if fit == "squash" else {"shortest_edge": tile}
    extra = {
        "pad": {"do_pad": True},
        "anyres": {"image_grid_pinpoints": image_config.get("pinpoints"), "do_pad": True},
    }.get(fit, {})
    return {
        "image_processor_type": kind,
        "processor_class": "LlavaNextProcessor" if fit == "anyres" else "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": {"bilinear": 2, "bicubic": 3}[image_config["resample"]],
        "do_center_crop": True,
        "crop_size": {"height": tile, "width": tile},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image_config["mean"],
        "image_std": image_config["std"],
        **extra,
    }


def processor_config(checkpoint):
    is_clip = vision_type(checkpoint.shapes["vision"]) == "clip_vision_model"
    is_anyres = checkpoint.image_config["fit"] == "anyres"
    return {
        "processor_class": "LlavaNextProcessor" if is_anyres else "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": checkpoint.image_config["patch"],
        "vision_feature_select_strategy": "default" if is_clip else "full",
        "num_additional_image_tokens": int(is_clip),
    }


def generation_config(checkpoint, image_id):
    special, template = checkpoint.tokenizer.special, checkpoint.chat_template
    end = chat_template.end_token_id(checkpoint.tokenizer, template)
    suppressed = {} if "<image>" in special else {"suppress_tokens": [image_id]}
    return {
        "bos_token_id": special.get(chat_template.TEMPLATES[template]["start"]),
        "eos_token_id": end,
        "pad_token_id": special.get("<pad>", end),
        **suppressed,
    }


def tokenizer_config(checkpoint, image_id):
    """add_bos_token is False (for llama.cpp's converter): the template writes the start token."""
    form, tokenizer = chat_template.TEMPLATES[checkpoint.chat_template], checkpoint.tokenizer
    flags = {
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
    added = {}
    if "<image>" not in tokenizer.special:
        added = {"added_tokens_decoder": {str(image_id): {"content": "<image>", **flags}}}
    is_sentencepiece = "tokenizer.model" in tokenizer.files
    return {
        "tokenizer_class": "LlamaTokenizer" if is_sentencepiece else "PreTrainedTokenizerFast",
        "bos_token": form["start"] or None,
        "add_bos_token": False,
        "eos_token": form["end"],
        "pad_token": "<pad>" if "<pad>" in tokenizer.special else form["end"],
        "clean_up_tokenization_spaces": False,
        "processor_class": processor_config(checkpoint)["processor_class"],
        **added,
    }


def save_tokenizer(checkpoint, folder):
    """Write the tokenizer's files unchanged, except for a tokenizer.json that puts a start token
    before every text: that post-processor is dropped unless the template begins with the token."""
    checkpoint.tokenizer.save(folder)
    source = checkpoint.tokenizer.files.get("tokenizer.json", b"")
    start = chat_template.TEMPLATES[checkpoint.chat_template]["start"]
    if b'"SpecialToken"' in source and not start:
        content = json.loads(source) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))


JINJA_MACROS = """\
{%- macro content_text(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
{%- endif %}{% endmacro %}
{%- macro prepend_space(text, gap) %}
{{- ' ' if gap and text and not text.startswith(«no_space_before») }}{{ text }}{% endmacro %}
{%- set state = namespace(last=0, system='', gap=«start_user») %}
{%- for message in messages if message['role'] == 'user' %}
{%- set state.last = loop.index0 %}{%- endfor %}
"""
JINJA_TURNS = """\
{{- «start» }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- set system = state.system if «first» or state.last == 0 else '' %}
{%- set text = (system + content_text(message['content']))|trim_input %}
{{- prepend_space(«user» + prepend_space(text, «user_text») + «opening», state.gap) }}
{%- set state.system = '' if system else state.system %}
{%- set state.last = state.last - 1 %}
{%- elif message['role'] == 'assistant' %}
{%- set text = «answer» + content_text(message['content'])|trim_answer + «tail» %}
{{- prepend_space(text, «opening_answer») + «end» }}
{%- set state.gap = «end_user» %}
{%- elif «inside» %}
{%- set state.system = «system» + content_text(message['content']) + «after» %}
{%- else %}
{%- set text = content_text(message['content'])|trim_input %}
{{- prepend_space(«system» + prepend_space(text, «system_text») + «after», «start_system») }}
{%- set state.gap = «after_user» %}
{%- endif %}
{%- endfor %}
"""
JINJA_DEFAULT = """\
{%- if messages[0]['role'] != 'system' %}{{- «default» }}
{%- set state.gap = «after_user» %}{%- endif %}
"""
BOUNDARIES = [
    ("start", "system"),
    ("system", "text"),
    ("start", "user"),
    ("after", "user"),
    ("end", "user"),
    ("user", "text"),
]


def jinja_template(template, tokenizer):
    """Returns a template of chat_template.TEMPLATES in Jinja.

    The content of a message is a text, or a list of parts. As in sample.py, images come first,
    each on a line of its own.
    """
    form = chat_template.TEMPLATES[template]
    system, after = form.get("system", "{}").split("{}")
    user, opening = form.get("user", "{}").split("{}")
    answer, tail = form.get("answer", "{}").split("{}")
    start, end, inside = form["start"], form["end"] + form["after"], form.get("inside")
    parts = dict(
        start=start,
        system=system,
        after=after,
        user=user,
        opening=opening,
        answer=answer,
        tail=tail,
        end=end,
    )
    slots = {name: insert_spaces(part, tokenizer, form) for name, part in parts.items()}
    for left, right in BOUNDARIES:
        slots[f"{left}_{right}"] = needs_space(parts[left], parts.get(right, ""), tokenizer, form)
    slots |= dict(
        opening_answer=answer_needs_space(opening, tokenizer, form),
        no_space_before=" " if tokenizer.prefix_space == "missing" else "<image>",
        inside=bool(inside),
        first=inside == "first",
    )
    # as chat_template.trim_text
    trims = {"all": ("|trim", "|trim"), "answer": ("", ".rstrip(' ')")}
    trim_input, trim_answer = trims.get(form.get("trim"), ("", ""))
    turns = JINJA_TURNS.replace("|trim_input", trim_input).replace("|trim_answer", trim_answer)
    source = JINJA_MACROS + turns
    if "default" in form:
        loop = "{%- for message in messages %}\n"
        source = source.replace(loop, JINJA_DEFAULT + loop)
        default = insert_spaces(start + system + form["default"] + after, tokenizer, form)
        slots["default"] = default.removeprefix(start)

    def fill_slot(match):
        return json.dumps(slots[match[1]], ensure_ascii=False)

    return re.sub("«(\\w+)»", fill_slot, source)


def needs_space(left, right, tokenizer, form):
    """Whether a space belongs between `left`, written by a template, and the text `right`.

    It is SentencePiece's space after a special token, which some tokenizers leave to the template
    (chat_template.prepend_space).
    """
    endings = [name for name in tokenizer.special if left.endswith(name)]
    if not endings or right.startswith(tuple(tokenizer.special)):
        return False
    last_id = tokenizer.special[max(endings, key=len)]
    return chat_template.prepend_space([last_id], False, tokenizer, form) is True


def insert_spaces(text, tokenizer, form):
    """Returns a text of a template with a space wherever needs_space says so."""
    names = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    pieces = [piece for piece in re.split(f"({names})", text) if piece]
    result = ""
    for left, right in zip(["", *pieces], pieces, strict=False):
        result += " " * needs_space(left, right, tokenizer, form) + right
    return result


def answer_needs_space(opening, tokenizer, form):
    """Whether a space belongs before an answer.

    transformers tokenizes an answer together with the text before it, unless a special token
    stands between. A tokenizer that puts a space before every text puts none there.
    """
    # None: any token except the end token, with which no opening ends
    space = chat_template.prepend_space([None], True, tokenizer, form)
    if space is not None:
        return space
    ends_special = opening.endswith(tuple(tokenizer.special))
    return tokenizer.prefix_space in ("always", "missing") and not ends_special
