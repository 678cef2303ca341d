"""Checkpoints: a folder that holds everything needed to use a model.

    model.safetensors     all parameters, under the names of nanovlm's modules
    nanovlm.json          version, arguments of VLM, image config, chat template, history
    tokenizer.json        or tekken.json, or tokenizer.model: the tokenizer's own files, unchanged
    unused_vision_tensors.safetensors
                          only with a pretrained vision encoder: the layers after the feature layer,
                          which the model skips and other software expects (llava.py exports them)

A run writes out/NAME/step-000200 with its optimizer state (training/resume.py). Under FSDP, all but
the last step keep their weights in sharded/ instead of model.safetensors. With --lora_rank (see
lora.py) a step holds what has trained, and nanovlm.json names the base with the other weights.
"""

import contextlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from .. import UserError, distributed, files
from ..data.chat_template import TEMPLATES
from ..data.dataset import make_fingerprint
from ..data.image_processing import check_image_config
from ..data.tokenizer import Tokenizer
from ..files import fsync_path, read_json, read_tensors, size_error, write_tensors
from ..models.decoder import Decoder, rope_cos_sin
from ..models.vision_encoder import ACTIVATIONS, VisionEncoder
from ..models.vlm import VLM
from . import sharded
from .lora import LORA_PARTS, add_lora, is_trained, merged_weights

CHECKPOINT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # the keys of version 1 are in files.OLD_NAMES
CHECKPOINT_FIELDS = ("shapes", "image_config", "chat_template", "history")  # in nanovlm.json


class Checkpoint(NamedTuple):
    """A model and all that it needs, or a vision encoder or a decoder alone (huggingface.py).

    A vision encoder has no tokenizer and no chat template, a decoder has no image config: None.
    """

    model: VLM | None  # of a part: an object with .vision or .decoder. None: no weights were read
    tokenizer: Tokenizer | None
    shapes: dict  # the arguments of VLM: vision, decoder, shuffle
    image_config: dict | None  # how images become tiles (data/image_processing.py)
    chat_template: str | None  # how conversations become text (data/chat_template.py)
    history: dict  # where each part came from
    unused_vision_tensors: dict = {}  # of layers after the feature layer, by their published names
    sharded: Path | None = None  # folder of weights that load_deferred_weights has to read
    lora: dict | None = None  # rank, alpha, target, the trained parts, and what base_source returns
    dtypes: dict = {}  # {frozen parameter of a run: the dtype in which it is saved}

    def fingerprint(self):
        return make_fingerprint(self)


def build_model(shapes, image_config):
    """Returns a VLM with random weights."""
    return VLM(
        **shapes,
        mean=image_config["mean"],
        std=image_config["std"],
        newline=image_config["fit"] == "anyres",
    )


def is_plausible(name, value, default, layers):
    """Whether a value of a file can be the argument `name` of VisionEncoder or Decoder."""
    match default:
        case bool():
            return isinstance(value, bool)
        case float():  # eps, rope_theta
            most = 1 if name == "eps" else 1e12
            return type(value) in (int, float) and 0 < value <= most
        case str():
            return value in list(ACTIVATIONS)
        case int():
            return type(value) is int and 1 <= abs(value) <= layers
    if isinstance(value, list):  # sliding_window, rope_layers
        return len(value) == layers and not any(x and size_error(name, x) for x in value)
    if name == "rope_layers":
        return value is None
    return value is default is None or name == "rope_scaling" or not size_error(name, value)


def check_arguments(module, values, where, names={}):
    """Raises UserError unless a dict of a file holds plausible arguments of a module.

    module: VisionEncoder or Decoder. names: what the file at `where` calls them.
    """
    with files.refuse_odd_values(where):
        parameters = inspect.signature(module).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        for name, value in (defaults | {"layers": None} | values).items():
            if not is_plausible(name, value, defaults[name], values["layers"]):
                raise ValueError(f"{names.get(name, name)} {value!r:.80}")
        width, heads = values["width"], values["heads"]
        if width % heads and not values.get("head_dim"):
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        if module is Decoder:
            check_heads(values, values.get("head_dim") or width // heads)


def check_heads(values, head_dim):
    """Raises ValueError if the heads of a decoder cannot share keys, or its RoPE is not finite."""
    heads, kv_heads, scaling = values["heads"], values["kv_heads"], values.get("rope_scaling")
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {heads} heads")
    position_11 = torch.ones(1, 1, device="cpu")
    cos, _ = rope_cos_sin(position_11, head_dim, values.get("rope_theta", 1e4), scaling)
    if head_dim % 2 or not cos.isfinite().all():
        raise ValueError(f"RoPE of {head_dim} numbers with {scaling}")


def check_checkpoint_info(meta, path):
    """Raises UserError unless the fields of a nanovlm.json are plausible and fit each other."""
    shapes, image_config, template = (meta[name] for name in CHECKPOINT_FIELDS[:3])
    check_image_config(image_config, path)
    check_arguments(VisionEncoder, shapes["vision"], path)
    check_arguments(Decoder, shapes["decoder"], path)
    if not isinstance(shapes.get("projector_mlp", True), bool):
        raise UserError(f"{path}: projector_mlp {shapes['projector_mlp']!r:.80} is not a bool")
    vision = shapes["vision"]
    sizes = {"tile": vision["tile"], "patch": vision["patch"], "shuffle": shapes["shuffle"]}
    if sizes != {name: image_config[name] for name in sizes}:
        raise UserError(f"{path}: the image config differs from the shapes, {sizes}")
    if template not in TEMPLATES:
        names = ", ".join(TEMPLATES)
        raise UserError(f"{path}: chat_template {template!r:.80} is not one of {names}")
    if lora := meta.get("lora"):
        parts, texts = {"vision", "projector", "decoder"}, [lora["base"]["from"]]
        texts += lora["base"]["files"].values()
        if (
            size_error("rank", lora["rank"])
            or not 0 < lora["alpha"] < 1e9
            or not parts >= {*LORA_PARTS[lora["target"]], *lora["trained"]}
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError(f"lora {lora!r:.200}")


def list_checkpoints(out):
    """Returns the checkpoints of a run, oldest first, without unfinished ones (.tmp)."""
    steps = sorted(Path(out).glob("step-*"))
    return [step for step in steps if step.suffix != ".tmp" and (step / "nanovlm.json").is_file()]


def latest_checkpoint(folder):
    """Returns `folder` if it is a checkpoint, else the one with the highest step in it."""
    folder = Path(folder)
    if (folder / "nanovlm.json").is_file():
        return folder
    if found := list_checkpoints(folder):
        return found[-1]
    if folder.exists():
        raise UserError(f"{folder} holds no nanovlm checkpoint")
    hint = f"; to download it: hf download {folder}" if files.is_repo_id(folder) else ""
    raise UserError(f"no such model: {folder}{hint}")


def saved_parameters(model):
    """Returns {name: tensor} of what is saved. A tied lm_head is the embedding: saved once."""
    state = model.state_dict()
    if model.decoder.lm_head.weight is model.decoder.embed_tokens.weight:
        del state["decoder.lm_head.weight"]
    return state


def is_huggingface(folder):
    """Whether this is a Hugging Face folder, or owner/name in the local cache."""
    return (Path(folder) / "config.json").is_file() or files.cached_snapshot(folder) is not None


def read_published(folder, template=None, tensors=True):
    """Returns the Checkpoint of a published model, read by the file that knows its layout."""
    from . import hf_nanovlm, idefics3, llava  # which import this file

    config = read_json(files.find_pretrained(folder) / "config.json")
    if config.get("model_type") in idefics3.IDEFICS3_TYPES:
        return idefics3.read_idefics3(folder, template, tensors)
    if "vit_hidden_dim" in config:
        return hf_nanovlm.read_hf_nanovlm(folder, template, tensors)
    return llava.read_llava(folder, template, tensors)


def check_vocab_size(tokenizer, shapes, where):
    """Raises UserError if the tokenizer has more tokens than the decoder has embeddings."""
    if tokenizer.vocab_size > shapes["vocab_size"]:
        extra = min(i for i in tokenizer.bytes_of if i >= shapes["vocab_size"])
        token = tokenizer.bytes_of[extra].decode(errors="replace")
        raise UserError(
            f"{where}: the vocabulary is {shapes['vocab_size']:,}, its folder's tokenizer knows "
            f"{tokenizer.vocab_size:,} tokens: {token!r} ({extra}) has no embedding; remove it "
            "from the tokenizer's files, or save the model with more embeddings "
            "(resize_token_embeddings in transformers)"
        )


def load_checkpoint_info(folder):
    """Returns a Checkpoint without its model; no weights are read. Preparing data needs no more."""
    if is_huggingface(folder):
        return read_published(folder, tensors=False)
    folder = latest_checkpoint(folder)
    path = folder / "nanovlm.json"
    meta = read_json(path, *CHECKPOINT_FIELDS)
    if meta.get("version") not in READABLE_VERSIONS:
        raise UserError(
            f"{folder} has format version {meta.get('version')}, this nanovlm reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: use the nanovlm that wrote it"
        )
    with files.refuse_odd_values(path):
        check_checkpoint_info(meta, path)
        meta["history"]["folder"] = str(folder)  # it is not saved again
    tokenizer = Tokenizer.load(folder)
    check_vocab_size(tokenizer, meta["shapes"]["decoder"], path)
    fields = {name: meta[name] for name in CHECKPOINT_FIELDS}
    return Checkpoint(None, tokenizer, **fields, lora=meta.get("lora"))


def build_on_meta(info, lora=None):
    """Returns the model of a Checkpoint on the meta device; lora: see add_lora."""
    with torch.device("meta"):
        model = build_model(info.shapes, info.image_config)
        if lora:
            add_lora(model, **lora)
    return model


def build_like_files(info):
    """Returns the model of a Checkpoint on the meta device, in the dtypes of its weight files.

    Of a published model it is the widest of them. Without files, and of shards, it is float32.
    """
    model, paths = build_on_meta(info), weight_files(info.history["folder"])
    paths = {path: names for path, names in paths.items() if path.parent.name != "sharded"}
    found = files.read_weights(paths, files.OLD_PARAMETER_NAMES)
    dtypes = {name: tensor.dtype for name, (tensor, _) in found.items()}
    widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize, default=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, widest))
    return model


def weight_files(name):
    """Returns {path: the names of its tensors, or None} of a published model or a checkpoint."""
    if is_huggingface(name):
        return files.list_weight_files(files.find_pretrained(name))
    folder = latest_checkpoint(name)
    found = [*folder.glob("model.safetensors")] or sorted(folder.glob("sharded/rank-*.safetensors"))
    return dict.fromkeys(found)


def base_source(name):
    """Returns {"from": name, "files": {file: sha256}, …} of a model as the base of LoRA.

    Raises UserError if it holds LoRA itself.
    """
    if load_checkpoint_info(name).lora:
        raise UserError(
            f"{name} holds LoRA, which cannot be the base of another: merge it first, "
            f"python prepare.py merge_lora --model={name} --out=DIR"
        )
    paths = weight_files(name)
    return files.weights_source(name, next(iter(paths)).parent, paths)["folder"]


def read_base(info):
    """Returns the Checkpoint of the base of a run with LoRA, in the dtypes of its files.

    Raises UserError if it is not there, or is not what it was.
    """
    folder, source = info.history["folder"], info.lora["base"]
    name, was = source["from"], source["files"]
    if not (Path(name).exists() or is_huggingface(name)):
        raise UserError(
            f"{folder} is LoRA of the model {name}, which is not there: put it back, or write its "
            f"new place into {folder}/nanovlm.json"
        )
    now = base_source(name)["files"]
    if now != was:
        file = next(file for file in was | now if was.get(file) != now.get(file))
        raise UserError(
            f"{folder} is LoRA of the model {name}, which has changed: the sha256 of {file} was "
            f"{was.get(file)!s:.12}, now it is {now.get(file)!s:.12}; put the old one back"
        )
    return load_checkpoint(name, dtype=None)


def load_checkpoint(
    folder, device="cpu", dtype=torch.float32, template=None, defer_weights=False, merge=True
):
    """Returns the latest Checkpoint in a folder, or a published VLM; its model is in eval mode.

    dtype: of all parameters, None for their dtypes in the file.
    template: of a published VLM whose own template is unknown.
    defer_weights: leave sharded weights in their files and the model on the meta device;
        load_deferred_weights reads them once it is known which rank needs which.
    merge: fold LoRA into the weights; False to train it further.
    """
    distributed.activate_device(torch.device(device))
    if is_huggingface(folder):
        found = read_published(folder, template)
        return found._replace(model=found.model.to(device, dtype))
    if template is not None:
        raise UserError(f"--template={template}: {folder} is a checkpoint and has its own template")
    found = load_checkpoint_info(folder)
    folder = Path(found.history["folder"])
    model, lora, base_weights = build_on_meta(found, found.lora), found.lora, {}
    found = found._replace(model=model, unused_vision_tensors=read_unused_vision_tensors(folder))
    path, shards = folder / "model.safetensors", folder / "sharded"
    shapes = {name: tensor.shape for name, tensor in saved_parameters(model).items()}
    if lora:
        shapes = {n: shape for n, shape in shapes.items() if is_trained(n, lora["trained"], lora)}
        base = read_base(found)
        base_weights = saved_parameters(base.model)
        found = found._replace(unused_vision_tensors=base.unused_vision_tensors)
    if path.is_file() or not shards.is_dir():
        tensors = files.read_weights({path: None}, files.OLD_PARAMETER_NAMES)
    else:
        # Parameters on the meta device: names and shapes are compared, and no memory is taken.
        copy_from_shards(saved_parameters(model), shards)
        dtypes = sharded.read_dtypes(shards)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[f"model.{name}"])
        if defer_weights:
            return found._replace(sharded=shards)
        rows = {}
        for name, tensor in saved_parameters(model).items():
            rows[name] = torch.full_like(tensor, torch.nan, device="cpu")
        copy_from_shards(rows, shards)
        tensors = {name: (tensor, shards) for name, tensor in rows.items()}
    tensors = base_weights | files.match_finite_tensors(shapes, tensors, "(?!)", [path])
    if dtype is not None:
        tensors = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    if lora and merge:
        tensors = merged_weights(tensors, lora["alpha"] / lora["rank"])
        model, found = build_on_meta(found), found._replace(lora=None)
    # a tied lm_head is not saved
    tensors.setdefault("decoder.lm_head.weight", tensors["decoder.embed_tokens.weight"])
    model.load_state_dict(tensors, assign=True)
    if found.shapes["decoder"].get("tied"):
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    return found._replace(model=model.to(device).eval())


def read_unused_vision_tensors(folder):
    """Returns {published name: tensor}; empty if the checkpoint has none."""
    for name in ("unused_vision_tensors.safetensors", "spare.safetensors"):  # the second: version 1
        if (folder / name).is_file():
            return read_tensors(folder / name)
    return {}


def copy_from_shards(parameters, shards):
    """Copy the sharded weights of a run into {name: parameter}. The names must be the same."""
    names = [name for name in sharded.read_pieces(shards) if name.startswith("model.")]
    saved = {name.removeprefix("model.") for name in names}
    if wrong := sorted(saved ^ parameters.keys()):
        verb = "is saved, but the model has none" if wrong[0] in saved else "is missing"
        raise UserError(f"{shards}: {wrong[0]} {verb}")
    sharded.read_shards({f"model.{name}": tensor for name, tensor in parameters.items()}, shards)


@distributed.raise_on_all_ranks()
def load_deferred_weights(checkpoint):
    """Read the weights that load_checkpoint(defer_weights=True) left in their files.

    Call it on all ranks after distributed.wrap_model; each rank reads its own rows. Raises
    UserError if a parameter is NaN: a parameter that was never loaded is NaN too.
    """
    parameters = saved_parameters(checkpoint.model)
    if checkpoint.sharded is not None:
        copy_from_shards(parameters, checkpoint.sharded)
    for name, tensor in parameters.items():
        if distributed.local_tensor(tensor.detach()).isnan().any():
            raise UserError(
                f"{checkpoint.history['folder']}: {name} holds NaN, or was never loaded; "
                "start from another checkpoint"
            )


def save_checkpoint(checkpoint, folder):
    """Write a checkpoint completely or not at all; it replaces one of the same name.

    Raises OSError, for instance if the disk is full, and leaves no part of it.
    """
    with atomic_folder(folder) as tmp:
        write_checkpoint_files(checkpoint, tmp, saved_parameters(checkpoint.model))


def write_checkpoint_files(checkpoint, folder, tensors):
    """Write the files of a checkpoint; tensors: its weights, None if they are sharded."""
    meta = {"version": CHECKPOINT_VERSION}
    for name in CHECKPOINT_FIELDS:
        meta[name] = getattr(checkpoint, name)
    meta["history"] = {key: value for key, value in meta["history"].items() if key != "folder"}
    if checkpoint.lora:
        meta["lora"] = checkpoint.lora
    if tensors is not None:
        write_tensors(tensors, folder / "model.safetensors")
    (folder / "nanovlm.json").write_text(json.dumps(meta, indent=1))
    checkpoint.tokenizer.save(folder)
    unused = checkpoint.unused_vision_tensors
    if unused and not checkpoint.lora:  # else the base has them
        write_tensors(unused, folder / "unused_vision_tensors.safetensors")


@contextlib.contextmanager
def atomic_folder(folder):
    """Yields a temporary folder, which replaces `folder` at the end if nothing was raised.

    Raises UserError if another process is writing `folder`.
    """
    folder = Path(folder)  # without a slash at its end
    tmp = Path(f"{folder}.tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    with files.lock_path(tmp), files.name_file(tmp):
        try:
            yield start_folder(folder)
            finish_folder(folder)
        finally:
            remove_unfinished(folder)


def start_folder(folder):
    """Returns an empty temporary folder for `folder`. One that is there is emptied, and keeps its
    lock."""
    tmp = Path(f"{folder}.tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    for path in tmp.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    restore_older(folder)
    return tmp


def finish_folder(folder):
    """Flush the temporary folder of `folder` to disk and rename it."""
    folder, tmp, old = Path(folder), Path(f"{folder}.tmp"), Path(f"{folder}.old.tmp")
    mode = next(tmp.glob("*.json"))
    for path in tmp.rglob("*"):
        if path.is_file():
            shutil.copymode(mode, path)  # safetensors makes files that only their owner can read
        fsync_path(path)
    fsync_path(tmp)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder):
    """Remove what start_folder and finish_folder leave if they are interrupted."""
    shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
    restore_older(folder)


def restore_older(folder):
    """Give an older folder its name back if finish_folder was interrupted between its two renames.

    If it was interrupted after them, the older folder is removed.
    """
    old = f"{folder}.old.tmp"
    if os.path.exists(old) and not os.path.exists(folder):
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
