"""Import and export of a whole model as a LLaVA folder.

It is the layout of LLaVA-1.5 (Liu et al. 2023) and LLaVA-NeXT in transformers, vLLM and llama.cpp:

    config.json                vision_config, text_config, and how the two are joined
    model.safetensors          vision_tower.*, multi_modal_projector.*, language_model.*; LLaVA-NeXT
                               also has image_newline
    preprocessor_config.json   the image config
    processor_config.json      what determines how many tokens an image takes
    tokenizer files            unchanged, except for a post-processor (json_files);
                               tokenizer_config.json adds <image> if they lack it
    chat_template.jinja        the chat template
    generation_config.json     which tokens begin and end a text

export_checkpoint raises UserError for what the layout cannot express, and says how to stitch
instead.
"""

import inspect
import json
import re

import torch

from .. import UserError, files
from ..data import chat_template, image_processing
from ..data.tokenizer import SPECIAL_TOKEN
from ..models.decoder import Decoder
from . import huggingface
from .checkpoint import atomic_folder, saved_parameters
from .huggingface import check_fields, published_name

PROJECTOR = {  # names of tensors, ours: published, as in huggingface.py
    "linear_1": "multi_modal_projector.linear_1",
    "linear_2": "multi_modal_projector.linear_2",
    "newline": "image_newline",
}
LLAVA_TYPES = ("llava", "llava_next")


# ---- reading ----
def read_llava(name, template=None, tensors=True):
    """Returns the Checkpoint of a LLaVA-1.5 or LLaVA-NeXT folder, or owner/name.

    template: of chat_template.TEMPLATES, if the folder's own is unknown. tensors: False for a
    Checkpoint without its model. Parameters keep their dtypes in the files.
    """
    folder = files.find_pretrained(name)
    path = folder / "config.json"
    config = files.read_json(path)
    if config.get("model_type") not in LLAVA_TYPES:
        raise UserError(
            f"{path}: a model of type {config.get('model_type')} is not read here as a whole, as "
            f"{', '.join(LLAVA_TYPES)} (LLaVA-1.5 and 1.6), idefics3, smolvlm and nanoVLM "
            "are; prepare.py stitch joins a vision encoder and a language model by a new projector"
        )
    layer = config.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise UserError(f"{path}: vision_feature_layer {layer} is not known here, only one layer")
    vision = huggingface.read_vision_encoder(name, vision_feature_layer=layer, tensors=tensors)
    decoder = huggingface.read_decoder(name, template=template, tensors=tensors)
    check_joint_config(config, vision, decoder, path)
    found, names = huggingface.read_whole_model(
        name, vision, decoder, PROJECTOR, "multi_modal_projector|image_newline"
    )
    if tensors:
        is_nested = any(name.startswith("vision_tower.vision_model.") for name in names)
        prefix = "vision_tower." + "vision_model." * is_nested
        found.history["llava"] = decoder.history["folder"] | {"vision_names": prefix}
    return found


def check_joint_config(config, vision, decoder, path):
    """Raises UserError if the config joins the two parts in a way that is not computed here."""
    config.setdefault("vision_feature_select_strategy", "default")
    required = dict(
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        use_image_newline_parameter=True,
        tie_word_embeddings=decoder.shapes["decoder"]["tied"],
        vision_feature_select_strategy=select_strategy(vision.shapes["vision"]),
    )
    check_fields(config, required, path)
    own, pinpoints = vision.image_config.get("pinpoints"), None
    if config["model_type"] == "llava_next":
        pinpoints = config.get("image_grid_pinpoints", "not given")
    if own != pinpoints:
        raise UserError(
            f"{path.parent}: image_grid_pinpoints are {own} for its preprocessor, {pinpoints} in "
            "config.json"
        )


def select_strategy(vision):
    """Returns vision_feature_select_strategy: "default" leaves out the class token."""
    return "default" if vision.get("class_token") else "full"


# ---- writing ----
def export_checkpoint(checkpoint, folder):
    """Write a checkpoint as a LLaVA folder, completely or not at all.

    Raises UserError if the layout cannot express it.
    """
    check_exportable(checkpoint, "a LLaVA", llava_rules(checkpoint))
    tensors = llava_tensors(checkpoint)
    image_id = add_image_token(checkpoint, tensors)
    jinja = template_to_jinja(checkpoint.chat_template, checkpoint.tokenizer)
    write_folder(checkpoint, folder, json_files(checkpoint, image_id), jinja, tensors)


def write_folder(checkpoint, folder, contents, jinja, tensors):
    """Write a published folder. contents: {file name: content} of its JSON files."""
    with atomic_folder(folder) as tmp:
        checkpoint.tokenizer.save(tmp)
        for name, content in contents.items():
            (tmp / name).write_text(json.dumps(content, indent=2) + "\n")
        (tmp / "chat_template.jinja").write_text(jinja)
        files.write_tensors(tensors, tmp / "model.safetensors")


def check_exportable(checkpoint, layout, rules):
    """Raises UserError, which says how to stitch instead, if a layout lacks something.

    rules: of this layout, each (whether it is so, what a folder lacks and how to stitch instead).
    """
    template = checkpoint.chat_template
    rules = [
        *rules,
        (
            "tekken.json" in checkpoint.tokenizer.files,
            "a tekken.json: stitch with a --decoder folder whose only tokenizer is tokenizer.json",
        ),
        (
            chat_template.TEMPLATES[template]["caption_only"],
            f"the template {template}, which has no questions: stitch with the --template of the "
            "decoder's own chats",
        ),
    ]
    problems = [problem for is_so, problem in rules if is_so]
    if problems:
        raise UserError(f"{layout} folder cannot express {'; nor '.join(problems)}")


def llava_rules(checkpoint):
    """Returns the rules of check_exportable for a LLaVA folder."""
    vision, template = checkpoint.shapes["vision"], checkpoint.chat_template
    shuffle, post_norm = checkpoint.shapes["shuffle"], vision.get("post_norm", True)
    return [
        (
            shuffle != 1,
            f"pixel shuffle by {shuffle}: stitch without --shuffle (or, for Idefics3's layout, a "
            "SigLIP with --longest_edge and --projector=linear)",
        ),
        (
            checkpoint.image_config["fit"] in ("tiles", "grid"),
            "several tiles of an image: stitch without --tiles",
        ),
        (
            not checkpoint.shapes.get("projector_mlp", True),
            "a projector of one layer: stitch without --projector=linear",
        ),
        (
            vision_type(vision) is None,
            "a vision encoder that is neither CLIP nor SigLIP: stitch with --vision of one of "
            "these",
        ),
        (
            post_norm,
            "a norm after the last layer of the vision encoder: stitch a CLIP or SigLIP folder "
            "with --vision_feature_layer=-2, the last layer but one",
        ),
        (
            not (post_norm or checkpoint.unused_vision_tensors),
            "a vision encoder without the layers after its feature layer: stitch again",
        ),
        (
            not chat_template.TEMPLATES[template]["image_space"],
            f"the template {template}, which has no line break after an image: stitch with another "
            "--template",
        ),
    ]


def vision_type(vision):
    """Returns "clip_vision_model", "siglip_vision_model", or None for another vision encoder.

    vision: the arguments of VisionEncoder, by which the two differ.
    """
    names = ("class_token", "pre_norm", "patch_bias", "layer_scale")
    options = {name: vision[name] for name in names if name in vision}
    for model_type in ("clip_vision_model", "siglip_vision_model"):
        if options == huggingface.VISION_FAMILIES[model_type][1]:
            return model_type
    return None


def llava_tensors(checkpoint):
    """Returns {published name: tensor}. As in transformers, a tied lm_head is not written."""
    source = checkpoint.history.get("llava", {})
    prefix = source.get("vision_names", "vision_tower.vision_model.")
    parts = {
        "vision": (prefix, huggingface.CLIP),
        "projector": ("", PROJECTOR),
        "decoder": ("language_model.", huggingface.LLAMA),
    }
    tensors = published_tensors(checkpoint.model, parts)
    for name, tensor in checkpoint.unused_vision_tensors.items():
        tensors[prefix + name] = tensor
    return tensors


def published_tensors(model, parts):
    """Returns {published name: tensor}; parts: {part: (what stands before a name, the table)}."""
    tensors = {}
    for name, tensor in saved_parameters(model).items():
        part, _, rest = name.partition(".")
        before, table = parts[part]
        tensors[before + published_name(rest, table)] = tensor
    return tensors


def add_image_token(checkpoint, tensors):
    """Returns the id of <image>: the tokenizer's own, else the first free one.

    If the embedding has no row for a free id, a copy of the start token's row is added, so that
    <image> is never generated before it.
    """
    special, image_id = checkpoint.tokenizer.special, checkpoint.tokenizer.vocab_size
    if "<image>" in special:
        return special["<image>"]
    names = chat_template.special_token_names(checkpoint.chat_template)
    start = next(special[name] for name in names if name in special)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors and len(tensors[name]) <= image_id:
            tensors[name] = torch.cat([tensors[name], tensors[name][start : start + 1]])
    return image_id


# ---- the content of each file ----
def json_files(checkpoint, image_id):
    """Returns {file name: content} of the configs; image_id: the id of <image>."""
    image_config, tokenizer = checkpoint.image_config, checkpoint.tokenizer
    special = tokenizer.special
    is_anyres = image_config["fit"] == "anyres"
    processor = "LlavaNextProcessor" if is_anyres else "LlavaProcessor"
    strategy = select_strategy(checkpoint.shapes["vision"])
    form = chat_template.TEMPLATES[checkpoint.chat_template]
    end = chat_template.end_token_id(tokenizer, checkpoint.chat_template)
    ends = {"bos_token_id": special.get(form["start"]), "eos_token_id": end}
    pad = "<pad>" if "<pad>" in special else form["end"]
    decoder = text_config(checkpoint) | ends
    decoder["vocab_size"] = max(decoder["vocab_size"], image_id + 1)  # add_image_token adds a row
    files = {
        "config.json": {
            "architectures": [processor.replace("Processor", "ForConditionalGeneration")],
            "model_type": "llava_next" if is_anyres else "llava",
            "dtype": str(checkpoint.model.decoder.embed_tokens.weight.dtype).removeprefix("torch."),
            "image_token_index": image_id,
            "image_seq_length": image_processing.tokens_per_tile(image_config),
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": checkpoint.shapes["vision"]["vision_feature_layer"],
            "vision_feature_select_strategy": strategy,
            "tie_word_embeddings": decoder["tie_word_embeddings"],
            "vision_config": vision_config(checkpoint),
            "text_config": decoder,
        },
        "preprocessor_config.json": preprocessor_config(image_config)
        | {"processor_class": processor},
        "processor_config.json": {
            "processor_class": processor,
            "image_token": "<image>",
            "patch_size": image_config["patch"],
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(strategy == "default"),  # the class token
        },
        "generation_config.json": {**ends, "pad_token_id": special[pad]},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer"
            if "tokenizer.model" in tokenizer.files
            else "PreTrainedTokenizerFast",
            "bos_token": form["start"] or None,
            "legacy": tokenizer.prefix_space != "first",  # of a tokenizer.model
            "add_bos_token": False,  # for llama.cpp's converter: the template writes it
            "eos_token": form["end"],
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "processor_class": processor,
        },
    }
    if is_anyres:
        for name in ("config.json", "preprocessor_config.json"):
            files[name]["image_grid_pinpoints"] = image_config["pinpoints"]
    if "<image>" not in special:
        files["generation_config.json"]["suppress_tokens"] = [image_id]
        token = {"content": "<image>", **SPECIAL_TOKEN}
        files["tokenizer_config.json"]["added_tokens_decoder"] = {str(image_id): token}
    source = tokenizer.files.get("tokenizer.json", b"")
    if b'"SpecialToken"' in source:
        # its post-processor puts a start token before every text, where the template has its own
        files["tokenizer.json"] = json.loads(source) | {"post_processor": None}
    return files


def vision_config(checkpoint):
    vision = checkpoint.shapes["vision"]
    published = {ours: theirs for theirs, ours in huggingface.ACTIVATION.items()}
    config = {theirs: vision[ours] for ours, theirs in huggingface.VISION_FIELDS.items()}
    config["model_type"] = vision_type(vision)
    config["image_size"] = vision["tile"]
    config["hidden_act"] = published[vision["activation"]]
    if config["model_type"] == "siglip_vision_model":
        config["vision_use_head"] = any(
            name.startswith("head.") for name in checkpoint.unused_vision_tensors
        )
    return config


def text_config(checkpoint):
    """Returns the config of the decoder; its model_type is a family that has the same options.

    Raises UserError if no family has them all.
    """
    defaults = inspect.signature(Decoder).parameters
    decoder = {name: argument.default for name, argument in defaults.items()}
    decoder |= checkpoint.shapes["decoder"]
    config = {theirs: decoder[ours] for ours, theirs in huggingface.DECODER_FIELDS.items()}
    window = decoder["sliding_window"]
    windows = window if isinstance(window, list) else [window] * decoder["layers"]
    config["model_type"] = "llama" if window is None else "mistral"
    types = {"qkv_bias": "qwen2", "qk_norm": "qwen3", "rope_layers": "smollm3"}
    options = [name for name in types if decoder[name]]
    if len(options) > 1:
        raise UserError(f"no decoder of transformers has {' and '.join(options)} together")
    if options:
        config |= {"model_type": types[options[0]], "use_sliding_window": any(windows)}
    if decoder["rope_layers"]:
        # pad_token_id is 128004 by default, which must be in the vocabulary
        config |= {"no_rope_layers": decoder["rope_layers"], "pad_token_id": None}
    if isinstance(window, list) and not options:
        config["model_type"] = "ministral"
    if isinstance(window, list) or options:
        config["layer_types"] = [
            "full_attention" if w is None else "sliding_attention" for w in windows
        ]
    if any(windows):
        config["sliding_window"] = max(w or 0 for w in windows)
    sources = [checkpoint.history.get(name) for name in ("decoder", "llava", "idefics3")]
    source = next(filter(None, sources), {})
    scaling = decoder["rope_scaling"] or {"rope_type": "default"}
    return config | {
        "head_dim": decoder["head_dim"] or decoder["width"] // decoder["heads"],
        "hidden_act": "silu",
        # RoPE has no table; servers use this length to reserve memory
        "max_position_embeddings": source.get("max_position_embeddings", 32768),
        "rope_parameters": {"rope_theta": decoder["rope_theta"], **scaling},
    }


def preprocessor_config(image_config):
    tile, fit = image_config["tile"], image_config["fit"]
    square = {"height": tile, "width": tile}
    kinds = {"pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}
    config = {
        "image_processor_type": kinds.get(fit, "CLIPImageProcessor"),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if fit == "squash" else {"shortest_edge": tile},
        "resample": image_processing.RESAMPLE_FILTERS[image_config["resample"]],
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image_config["mean"],
        "image_std": image_config["std"],
    }
    if fit in kinds:
        config["do_pad"] = True
    return config


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
{{- «last_opening» if loop.index0 + 2 >= messages|length }}
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
{%- if messages[0]['role'] != 'system' %}
{%- set messages = [{'role': 'system', 'content': «default»}] + messages %}{%- endif %}
"""
BOUNDARIES = ("start_system", "system_text", "start_user", "after_user", "end_user", "user_text")


def template_to_jinja(template, tokenizer):
    """Returns a template of chat_template.TEMPLATES in Jinja.

    The content of a message is a text, or a list of parts. As in sample.py, images come first,
    each on a line of its own.
    """
    form = chat_template.TEMPLATES[template]
    parts = {"start": form["start"], "end": form["end"] + form["after_end"]}
    for role, before, after in [
        ("system", "system", "after"),
        ("user", "user", "opening"),
        ("answer", "answer", "tail"),
    ]:
        parts[before], parts[after] = form[role].split("{}")
    slots = {name: insert_spaces(part, tokenizer, form) for name, part in parts.items()}
    for name in BOUNDARIES:
        left, right = name.split("_")
        slots[name] = needs_space(parts[left], parts.get(right, ""), tokenizer, form)
    slots["opening_answer"] = answer_needs_space(parts["opening"], tokenizer, form)
    slots["no_space_before"] = " " if tokenizer.prefix_space == "missing" else "<image>"
    slots["last_opening"] = form["last_opening"]
    slots["inside"] = bool(form["system_inside"])
    slots["first"] = form["system_inside"] == "first"
    # as chat_template.conversation_segments
    trims = {"all": ("|trim", "|trim"), "answer": ("", ".rstrip(' ')")}
    trim_input, trim_answer = trims.get(form["trim"], ("", ""))
    source = JINJA_MACROS + JINJA_TURNS
    source = source.replace("|trim_input", trim_input).replace("|trim_answer", trim_answer)
    if form["default_system"]:
        source = JINJA_DEFAULT + source
        slots["default"] = form["default_system"]

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
    result = ""
    for piece in filter(None, re.split(f"({names})", text)):
        result += " " * needs_space(result, piece, tokenizer, form) + piece
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
