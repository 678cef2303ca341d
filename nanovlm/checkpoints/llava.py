"""A whole model as a LLaVA folder, the layout that transformers, vLLM and llama.cpp share: LLaVA-1.5 (Liu et al. 2023) and LLaVA-NeXT.

    config.json                vision_config and text_config as of an eye and a brain alone, and how they are joined
    model.safetensors          vision_tower.*, multi_modal_projector.*, language_model.*; LLaVA-NeXT's image_newline
    preprocessor_config.json   the picture policy        processor_config.json   how many tokens stand for a picture
    tokenizer files            as they came (but see save_tokenizer); tokenizer_config.json adds <image> where they do not have it
    chat_template.jinja        the template              generation_config.json  what begins and ends a text

What the layout cannot say is refused, by the setting to train with instead.
"""

import json
import re

import torch

from .. import UserError
from .. import files as disk
from ..data import chat_template, image_processing
from ..files import read_json
from ..models.vlm import VLM
from . import huggingface
from .huggingface import check_fields, published_name

LLAVA = {
    "projector.up_proj": "multi_modal_projector.linear_1",
    "projector.down_proj": "multi_modal_projector.linear_2",
    "projector.newline": "image_newline",
}
LLAVA_TYPES = ("llava", "llava_next")
SHARD_BYTES = 5_000_000_000  # transformers' own


# ---- reading ----
def read_llava(name, dtype=None, template=None, tensors=True):
    """A published LLaVA-1.5 or LLaVA-NeXT folder, or owner/name, as the fields of a Checkpoint; dtype: of all parameters, None for their own;
    template: where the folder's own is not known; tensors: False for all but the model."""
    folder = disk.find_pretrained(name)
    where = folder / "config.json"
    config = read_json(where)
    if config.get("model_type") not in LLAVA_TYPES:
        raise UserError(
            f"{where}: a model of type {config.get('model_type')} is no LLaVA ({', '.join(LLAVA_TYPES)}); "
            "an eye and a brain are joined by prepare.py stitch"
        )
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"{where}: vision_feature_layer {layer} is not known here, only one layer")
    eye = huggingface.read_vision_encoder(name, vision_feature_layer=layer, tensors=tensors)
    brain = huggingface.read_decoder(
        name, template=template, default_template=default_template(config), tensors=tensors
    )
    config.setdefault("vision_feature_select_strategy", "default")
    strategy = "default" if eye.shapes["vision"].get("class_token") else "full"
    check_fields(
        config,
        dict(
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            use_image_newline_parameter=True,
            quantization_config=None,
            tie_word_embeddings=brain.shapes["decoder"]["tied"],
            vision_feature_select_strategy=strategy,
        ),
        where,
    )
    anyres, pinpoints = (
        config["model_type"] == "llava_next",
        config.get("image_grid_pinpoints") or huggingface.PINPOINTS,
    )
    if (eye.image_config["fit"] == "anyres") != anyres or (
        anyres and eye.image_config["pinpoints"] != pinpoints
    ):
        raise UserError(
            f"{folder}: image_grid_pinpoints are {eye.image_config.get('pinpoints')} for its preprocessor, "
            f"{pinpoints if anyres else None} in config.json"
        )
    image_processing.check_image_config(eye.image_config)
    shapes = {**eye.shapes, **brain.shapes}
    told = dict(
        model=None,
        tokenizer=brain.tokenizer,
        shapes=shapes,
        policy=eye.image_config,
        template=brain.chat_template,
        card={},
        spare=eye.unused_vision_tensors,
    )
    if not tensors:
        return told
    model, spelling = join_parts(eye, brain, shapes, anyres, folder)
    if dtype is not None:
        model.to(dtype)
    return told | dict(
        model=model, card={"llava": brain.history["folder"] | {"vision_names": spelling}}
    )


def default_template(config):
    """The template of published LLaVA folders that state none; None where that is not known."""
    return {"mistral": "mistral-v1", "llama": "llava"}.get(
        config.get("text_config", {}).get("model_type", "llama")
    )


def join_parts(eye, brain, shapes, anyres, folder):
    """The VLM of two parts and what a folder holds between them, and how the folder begins the names of its eye."""
    paths = disk.list_weight_files(folder)
    found = disk.read_weights(paths, [(r"^model\.", "")])
    small = shapes["decoder"] | {"layers": 0, "vocab_size": 1}
    with torch.device("meta"):
        model = VLM(
            vision=shapes["vision"],
            decoder=small,
            shuffle=1,
            mean=eye.image_config["mean"],
            std=eye.image_config["std"],
            newline=anyres,
        )
        model.vision = model.decoder = torch.nn.Identity()
    huggingface.load_published_tensors(model, LLAVA, found, r"(?!multi_modal_projector|image_newline)", paths)
    model.vision, model.decoder = eye.model.vision, brain.model.decoder
    inner = any(name.startswith("vision_tower.vision_model.") for name in found)
    return model.eval(), f"vision_tower.{'vision_model.' * inner}"


# ---- writing ----
def write_llava(checkpoint, folder):
    """Write a checkpoint into an empty folder. Raises UserError where the layout cannot say what the model does."""
    check_exportable(checkpoint)
    image_id, tensors = add_image_token(
        checkpoint.tokenizer.special.get("<image>"), checkpoint, llava_tensors(checkpoint)
    )
    vocabulary = tensors["language_model.model.embed_tokens.weight"].shape[0]
    files = {
        "config.json": llava_config(checkpoint, image_id, vocabulary),
        "preprocessor_config.json": preprocessor_config(checkpoint.image_config),
        "processor_config.json": processor_config(checkpoint),
        "generation_config.json": generation_config(checkpoint, image_id),
        "tokenizer_config.json": tokenizer_config(checkpoint, image_id),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(jinja_template(checkpoint.chat_template, checkpoint.tokenizer))
    save_tokenizer(checkpoint, folder)
    write_safetensors(tensors, folder)


def check_exportable(checkpoint):
    """Raise UserError, naming the settings to train with, unless the layout can say all that a checkpoint does."""
    vision, wrong = checkpoint.shapes["vision"], []
    if checkpoint.shapes["shuffle"] != 1:
        wrong.append(
            f"pixel shuffle by {checkpoint.shapes['shuffle']}: stitch a public eye without --shuffle"
        )
    if checkpoint.image_config["fit"] == "tiles":
        wrong.append("InternVL's tiles: stitch without --tiles")
    if vision_type(vision) is None:
        wrong.append(
            "an eye that is neither CLIP's nor SigLIP's: stitch with --vision of one of these"
        )
    if vision.get("post_norm", True):
        wrong.append(
            "an eye whose last layer is normed: stitch a public CLIP or SigLIP folder with --vision_feature_layer=-2, the last layer but one"
        )
    elif not checkpoint.unused_vision_tensors:
        wrong.append("an eye without the layers after the one that is read: stitch it again")
    if "tekken.json" in checkpoint.tokenizer.files:
        wrong.append(
            "a tekken.json: stitch with a --decoder folder whose only tokenizer is tokenizer.json"
        )
    if chat_template.TEMPLATES[checkpoint.chat_template].get("mute"):
        wrong.append(
            f"the template {checkpoint.chat_template}, which asks nothing: stitch with the --template that the brain chats by"
        )
    if wrong:
        raise UserError(f"a LLaVA folder cannot say {'; nor '.join(wrong)}")


def vision_type(vision):
    """ "clip_vision_model", "siglip_vision_model", or None for another: by what tells them apart in the arguments of Vision."""
    given = (
        vision.get("class_token", False),
        vision.get("pre_norm", False),
        not vision.get("patch_bias", True),
    )
    if vision.get("layer_scale") or len(set(given)) != 1:
        return None
    return "clip_vision_model" if given[0] else "siglip_vision_model"


def llava_tensors(checkpoint):
    """{name: tensor} as the layout names them; a tied head is not written twice, as transformers writes it."""
    prefix = checkpoint.history.get("llava", {}).get("vision_names", "vision_tower.vision_model.")
    tensors, decoder = {}, checkpoint.model.decoder
    for name, tensor in checkpoint.model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vision":
            tensors[prefix + published_name(rest, huggingface.CLIP)] = tensor
        elif part != "decoder":
            tensors[published_name(name, LLAVA)] = tensor
        elif rest != "lm_head.weight" or decoder.lm_head.weight is not decoder.embed_tokens.weight:
            tensors[f"language_model.{published_name(rest, huggingface.LLAMA)}"] = tensor
    tensors |= {prefix + name: tensor for name, tensor in checkpoint.unused_vision_tensors.items()}
    return tensors


def add_image_token(image_id, checkpoint, tensors):
    """(id of <image>, tensors). If the tokenizer has none, it gets the first free id, and where the vocabulary ends before that a row of its own:
    a copy of the row of the token that starts a text, so that it is never said before that one."""
    if image_id is not None:
        return image_id, tensors
    image_id, start = checkpoint.tokenizer.vocab_size, bos_token_id(checkpoint)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors and len(tensors[name]) <= image_id:
            tensors = tensors | {name: torch.cat([tensors[name], tensors[name][start : start + 1]])}
    return image_id, tensors


def bos_token_id(checkpoint):
    """The special token that a conversation begins with."""
    special, names = checkpoint.tokenizer.special, chat_template.special_token_names(checkpoint.chat_template)
    return next(special[name] for name in names if name in special)


def write_safetensors(tensors, folder):
    """One model.safetensors, or several of at most SHARD_BYTES and their index."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        disk.write_tensors(
            {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()},
            folder / name,
        )
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---- what each file says ----
def llava_config(checkpoint, image_id, vocabulary):
    anyres, clip = (
        checkpoint.image_config["fit"] == "anyres",
        vision_type(checkpoint.shapes["vision"]) == "clip_vision_model",
    )
    grid = {"image_grid_pinpoints": checkpoint.image_config["pinpoints"]} if anyres else {}
    return {
        "architectures": [
            "LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"
        ],
        "model_type": "llava_next" if anyres else "llava",
        "dtype": str(checkpoint.model.decoder.embed_tokens.weight.dtype).removeprefix("torch."),
        "image_token_index": image_id,
        "image_seq_length": image_processing.tokens_per_tile(checkpoint.image_config),
        **grid,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": checkpoint.shapes["vision"]["vision_feature_layer"],
        "vision_feature_select_strategy": "default" if clip else "full",
        "tie_word_embeddings": checkpoint.shapes["decoder"].get("tied", False),
        "vision_config": vision_config(checkpoint),
        "text_config": text_config(checkpoint, vocabulary),
    }


def vision_config(checkpoint):
    vision = checkpoint.shapes["vision"]
    activation = {ours: published for published, ours in huggingface.ACTIVATION.items()}[
        vision.get("activation", "gelu_tanh")
    ]
    head = (
        {}
        if vision_type(vision) == "clip_vision_model"
        else {"vision_use_head": any(name.startswith("head.") for name in checkpoint.unused_vision_tensors)}
    )
    return {
        "model_type": vision_type(vision),
        "hidden_size": vision["width"],
        "intermediate_size": vision["intermediate_size"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["heads"],
        "image_size": vision["tile"],
        "patch_size": vision["patch"],
        "hidden_act": activation,
        "layer_norm_eps": vision.get("eps", 1e-6),
        **head,
    }


def text_config(checkpoint, vocabulary):
    brain = checkpoint.shapes["decoder"]
    window, layers = brain.get("sliding_window"), brain["layers"]
    kind = "ministral" if isinstance(window, list) else "llama" if window is None else "mistral"
    windows = (
        {}
        if kind == "llama"
        else {"sliding_window": max(w or 0 for w in window) if kind == "ministral" else window}
    )
    if kind == "ministral":
        windows["layer_types"] = [
            "full_attention" if w is None else "sliding_attention" for w in window
        ]
    origin = checkpoint.history.get("decoder", checkpoint.history.get("llava", {}))
    longest = origin.get(
        "max_position_embeddings", 32768
    )  # RoPE has no table: it only tells servers how much to reserve
    start = chat_template.TEMPLATES[checkpoint.chat_template]["start"]
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": brain["width"],
        "intermediate_size": brain["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": brain["heads"],
        "num_key_value_heads": brain["kv_heads"],
        "head_dim": brain.get("head_dim") or brain["width"] // brain["heads"],
        "hidden_act": "silu",
        "rms_norm_eps": brain.get("eps", 1e-5),
        "max_position_embeddings": longest,
        "tie_word_embeddings": brain.get("tied", False),
        **windows,
        "rope_parameters": {
            "rope_theta": brain.get("rope_theta", 10000.0),
            **(brain.get("rope_scaling") or {"rope_type": "default"}),
        },
        "bos_token_id": checkpoint.tokenizer.special.get(start),
        "eos_token_id": chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template),
    }


def preprocessor_config(policy):
    tile, fit = policy["tile"], policy["fit"]
    kind = {"pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}.get(
        fit, "CLIPImageProcessor"
    )
    size = {"height": tile, "width": tile} if fit == "squash" else {"shortest_edge": tile}
    extra = {
        "pad": {"do_pad": True},
        "anyres": {"image_grid_pinpoints": policy.get("pinpoints"), "do_pad": True},
    }.get(fit, {})
    return {
        "image_processor_type": kind,
        "processor_class": "LlavaNextProcessor" if fit == "anyres" else "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": {"bilinear": 2, "bicubic": 3}[policy["resample"]],
        "do_center_crop": True,
        "crop_size": {"height": tile, "width": tile},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": policy["mean"],
        "image_std": policy["std"],
        **extra,
    }


def processor_config(checkpoint):
    clip = vision_type(checkpoint.shapes["vision"]) == "clip_vision_model"
    return {
        "processor_class": "LlavaNextProcessor"
        if checkpoint.image_config["fit"] == "anyres"
        else "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": checkpoint.image_config["patch"],
        "vision_feature_select_strategy": "default" if clip else "full",
        "num_additional_image_tokens": int(clip),
    }


def generation_config(checkpoint, image_id):
    special, end = (
        checkpoint.tokenizer.special,
        chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template),
    )
    unsaid = {} if "<image>" in special else {"suppress_tokens": [image_id]}
    return {
        "bos_token_id": special.get(chat_template.TEMPLATES[checkpoint.chat_template]["start"]),
        "eos_token_id": end,
        "pad_token_id": special.get("<pad>", end),
        **unsaid,
    }


def tokenizer_config(checkpoint, image_id):
    """add_bos_token: what llama.cpp's converter asks whether a start token goes before a prompt; the template writes it."""
    form, special = chat_template.TEMPLATES[checkpoint.chat_template], checkpoint.tokenizer.special
    flags = {
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
    added = (
        {}
        if "<image>" in special
        else {"added_tokens_decoder": {str(image_id): {"content": "<image>", **flags}}}
    )
    return {
        "tokenizer_class": "LlamaTokenizer"
        if "tokenizer.model" in checkpoint.tokenizer.files
        else "PreTrainedTokenizerFast",
        "bos_token": form["start"] or None,
        "add_bos_token": False,
        "eos_token": form["end"],
        "pad_token": "<pad>" if "<pad>" in special else form["end"],
        "clean_up_tokenization_spaces": False,
        "processor_class": processor_config(checkpoint)["processor_class"],
        **added,
    }


def save_tokenizer(checkpoint, folder):
    """Its files as they came, but for a tokenizer.json that puts a start token before every text: transformers' processor would have it before a
    prompt, unless the template begins with it."""
    checkpoint.tokenizer.save(folder)
    source = checkpoint.tokenizer.files.get("tokenizer.json", b"")
    if b'"SpecialToken"' in source and not chat_template.TEMPLATES[checkpoint.chat_template]["start"]:
        (folder / "tokenizer.json").write_text(
            json.dumps(json.loads(source) | {"post_processor": None}, ensure_ascii=False)
        )


JINJA_MACROS = """\
{%- macro said(content) %}{% if content is string %}{{ content }}{% else %}
{%- for part in content if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}
{%- macro spaced(text, gap) %}{{ ' ' if gap and text and not text.startswith(«bare») }}{{ text }}{% endmacro %}
{%- set state = namespace(last=0, system='', gap=«start_user») %}
{%- for message in messages if message['role'] == 'user' %}{%- set state.last = loop.index0 %}{%- endfor %}
"""
JINJA_TURNS = """\
{{- «start» }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- set system = state.system if «first» or state.last == 0 else '' %}
{{- spaced(«user» + spaced((system + said(message['content']))|heard, «user_said») + «opening», state.gap) }}
{%- set state.system = '' if system else state.system %}
{%- set state.last = state.last - 1 %}
{%- elif message['role'] == 'assistant' %}{{- spaced(«answer» + said(message['content'])|told + «tail», «opening_answer») + «end» }}
{%- set state.gap = «end_user» %}
{%- elif «inside» %}{%- set state.system = «system» + said(message['content']) + «after» %}
{%- else %}{{- spaced(«system» + spaced(said(message['content'])|heard, «system_said») + «after», «start_system») }}
{%- set state.gap = «after_user» %}
{%- endif %}
{%- endfor %}
"""
JINJA_DEFAULT = "{%- if messages[0]['role'] != 'system' %}{{- «default» }}{%- set state.gap = «after_user» %}{%- endif %}\n"
BOUNDARIES = [
    ("start", "system"),
    ("system", "said"),
    ("start", "user"),
    ("after", "user"),
    ("end", "user"),
    ("user", "said"),
]


def jinja_template(template, tokenizer):
    """A template of chat.py in Jinja. What a message says is a text, or parts of which the pictures come first, each on a line, as sample.py asks."""
    form = chat_template.TEMPLATES[template]
    (system, after), (user, opening), (answer, tail) = (
        form.get(part, "{}").split("{}") for part in ("system", "user", "answer")
    )
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
    slots |= {
        f"{left}_{right}": needs_space(parts[left], parts.get(right, ""), tokenizer, form)
        for left, right in BOUNDARIES
    }
    slots |= dict(
        opening_answer=answer_needs_space(opening, tokenizer, form),
        bare=" " if tokenizer.prefix_space == "missing" else "<image>",
        inside=bool(inside),
        first=inside == "first",
    )
    heard, told = {"all": ("|trim", "|trim"), "answer": ("", ".rstrip(' ')")}.get(
        form.get("trim"), ("", "")
    )  # as chat.trimmed
    source = JINJA_MACROS + JINJA_TURNS.replace("|heard", heard).replace("|told", told)
    if "default" in form:
        source = source.replace(
            "{%- for message in messages %}\n", JINJA_DEFAULT + "{%- for message in messages %}\n"
        )
        slots["default"] = insert_spaces(
            start + system + form["default"] + after, tokenizer, form
        ).removeprefix(start)
    return re.sub("«(\\w+)»", lambda slot: json.dumps(slots[slot[1]], ensure_ascii=False), source)


def needs_space(left, right, tokenizer, form):
    """Whether a space stands between `left`, which a template writes, and the text `right`: after a special token, SentencePiece's, which some
    tokenizers leave to the template (chat.space_before)."""
    name = max((name for name in tokenizer.special if left.endswith(name)), key=len, default=None)
    if name is None or right.startswith(tuple(tokenizer.special)):
        return False
    return chat_template.prepend_space([tokenizer.special[name]], False, tokenizer, form) is True


def insert_spaces(text, tokenizer, form):
    """What a template writes, with a space in every gap."""
    names = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    pieces = [piece for piece in re.split(f"({names})", text) if piece]
    return "".join(
        " " * needs_space(left, right, tokenizer, form) + right
        for left, right in zip(["", *pieces], pieces, strict=False)
    )


def answer_needs_space(opening, tokenizer, form):
    """The same before an answer, which transformers reads in one text with the words before it, if no special token comes between: a tokenizer that
    puts a space before every text puts none there."""
    space = chat_template.prepend_space(
        [None], True, tokenizer, form
    )  # None: any token but the end token, with which no opening ends
    return (
        tokenizer.prefix_space in ("always", "missing") and not opening.endswith(tuple(tokenizer.special))
        if space is None
        else space
    )
