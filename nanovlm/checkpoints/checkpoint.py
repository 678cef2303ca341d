"""Checkpoints: a folder that carries everything needed to use a model.

    model.safetensors      every parameter, by the names of nanovlm's modules
    nanovlm.json           the numbers that its constructors take, the picture policy, the chat template, a card of where each part came from
    tokenizer.json         or tekken.json, or tokenizer.model: the tokenizer's own files, unchanged
    spare.safetensors      only with a public eye: its layers after the one that is read, for those who read more (llava.py writes them)

A run writes out/NAME/step-000200, with what it needs to go on (saves.py); under FSDP, all but the last of them hold their weights in parts, in
sharded/ instead of model.safetensors.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from .. import UserError, distributed, files
from ..data.dataset import fsync_path, make_fingerprint
from ..data.tokenizer import Tokenizer
from ..files import read_json, read_tensors, write_tensors
from ..models.vlm import VLM
from . import huggingface, llava, sharded

CHECKPOINT_VERSION = 1
CHECKPOINT_FIELDS = (
    "shapes",
    "policy",
    "template",
    "card",
)  # what nanovlm.json says of a Checkpoint


class Checkpoint(NamedTuple):
    model: VLM | None  # None where no weights were asked for (describe)
    tokenizer: Tokenizer
    shapes: dict  # the arguments of VLM: vision, decoder, shuffle
    image_config: dict  # how pictures become tiles (images.py)
    chat_template: str  # how conversations become text (chat.py)
    history: dict  # where each part came from
    unused_vision_tensors: dict = {}  # tensors of the eye that are not read, by their public names
    sharded: Path | None = (
        None  # the folder in which the weights still lie (load(late=True)); None once they are in the model
    )

    def fingerprint(self):
        return make_fingerprint(self)


def build_model(shapes, policy):
    """A VLM with random numbers."""
    return VLM(**shapes, mean=policy["mean"], std=policy["std"], newline=policy["fit"] == "anyres")


def list_checkpoints(out):
    """The checkpoints of a run, oldest first; what a killed writer left behind ends in .tmp and is none."""
    return sorted(
        path
        for path in Path(out).glob("step-*")
        if path.suffix != ".tmp" and (path / "nanovlm.json").is_file()
    )


def newest_checkpoint(folder):
    """The checkpoint that `folder` is, or the one with the highest step in it."""
    folder = Path(folder)
    if (folder / "nanovlm.json").is_file():
        return folder
    if not (found := list_checkpoints(folder)):
        hint = f"; to fetch it: hf download {folder}" if files.is_repo_id(folder) else ""
        raise UserError(
            f"{folder} holds no nanovlm checkpoint"
            if folder.exists()
            else f"no such model: {folder}{hint}"
        )
    return found[-1]


def saved_parameters(model):
    """Names and tensors as they are saved; a tied head is the embedding and is not saved twice."""
    state = model.state_dict()
    if model.decoder.head.weight is model.decoder.embed.weight:
        del state["decoder.head.weight"]
    return state


def is_public(folder):
    return (Path(folder) / "config.json").is_file() or files.cached_snapshot(folder) is not None


def describe_checkpoint(folder):
    """What load gives, with no model, and none of the weights read: enough to prepare data for it."""
    if is_public(folder):
        return Checkpoint(**llava.read_llava(folder, tensors=False))._replace(
            history={"folder": str(folder)}
        )
    folder = newest_checkpoint(folder)
    where = folder / "nanovlm.json"
    meta = read_json(where)
    if meta.get("version") != CHECKPOINT_VERSION:
        raise UserError(
            f"{folder}: written in format {meta.get('version')}, this reads {CHECKPOINT_VERSION}"
        )
    if missing := [name for name in CHECKPOINT_FIELDS if name not in meta]:
        raise UserError(f"{where} does not say its {', '.join(missing)}")
    tokenizer = Tokenizer.load(folder)
    huggingface.check_vocab_size(tokenizer, meta["shapes"]["decoder"], where)
    card = {
        **meta["card"],
        "folder": str(folder),
    }  # where it was read from, which is not written again
    return Checkpoint(None, tokenizer, meta["shapes"], meta["policy"], meta["template"], card)


def load_checkpoint(folder, device="cpu", dtype=torch.float32, template=None, late=False):
    """The newest Checkpoint in a folder, or a published LLaVA (llava.py), its model in eval mode on `device`; dtype: of all its parameters, None
    for as they were saved; template: for a published LLaVA whose own is not known; late: leave sharded weights where they are, the model on the meta
    device, until it is known which of them a rank needs (finish_loading)."""
    distributed.set_current_device(torch.device(device))
    if is_public(folder):
        found = llava.read_llava(folder, dtype, template)
        return Checkpoint(**found)._replace(
            model=found["model"].to(device), history=found["card"] | {"folder": str(folder)}
        )
    if template is not None:
        raise UserError(f"--template={template} is for a published LLaVA; {folder} has settled it")
    found = describe_checkpoint(folder)
    path, parts, spare = (
        Path(found.history["folder"]) / name
        for name in ("model.safetensors", "sharded", "spare.safetensors")
    )
    with torch.device("meta"):
        model = build_model(found.shapes, found.image_config)
    is_sharded = parts.is_dir() and not path.is_file()
    if late and is_sharded:
        return found._replace(
            model=model, sharded=parts, unused_vision_tensors=read_tensors(spare) if spare.is_file() else {}
        )
    shapes = {name: tensor.shape for name, tensor in saved_parameters(model).items()}
    tensors = (
        read_sharded_weights(shapes, parts) if is_sharded else files.read_weights({path: None}, [])
    )
    tensors = files.match_finite_tensors(shapes, tensors, "(?!)", [path])
    if dtype is not None:  # else they stay in the file until they are used
        tensors = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    if tied := "decoder.head.weight" not in shapes:
        tensors["decoder.head.weight"] = tensors["decoder.embed.weight"]
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.decoder.head.weight = model.decoder.embed.weight
    return found._replace(
        model=model.to(device).eval(), unused_vision_tensors=read_tensors(spare) if spare.is_file() else {}
    )


def read_sharded_weights(shapes, parts):
    """The sharded weights of a run, as disk.read_weights gives them."""
    tensors = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    fill_from_shards(tensors, parts)
    return {name: (tensor, parts) for name, tensor in tensors.items()}


def fill_from_shards(parameters, parts):
    """Fill {name: parameter} from the sharded checkpoint of a run; its weights must have the very same names."""
    saved = {
        name.removeprefix("model.")
        for name in sharded.read_pieces(parts)
        if name.startswith("model.")
    }
    if odd := sorted(saved ^ parameters.keys()):
        raise UserError(
            f"{parts}: {odd[0]} is {'saved there, but the model has none' if odd[0] in saved else 'missing'}"
        )
    sharded.read_shards({f"model.{name}": tensor for name, tensor in parameters.items()}, parts)


@distributed.raise_on_all_ranks()
def finish_loading(checkpoint):
    """Read the weights that load(late=True) left in their files, each rank its own rows, once the model lies in memory (parallel.wrap); call it
    on all ranks. Afterwards no parameter is NaN, which one is that nobody loaded."""
    if checkpoint.sharded is not None:
        fill_from_shards(saved_parameters(checkpoint.model), checkpoint.sharded)
    for name, tensor in saved_parameters(checkpoint.model).items():
        if distributed.local_tensor(tensor.detach()).isnan().any():
            raise UserError(
                f"{checkpoint.history['folder']}: {name} holds NaN, or was never loaded; nothing is trained from there"
            )


def save_checkpoint(checkpoint, folder):
    """Write a checkpoint whole or not at all: under a temporary name, flushed, then renamed. OSError (a full disk) leaves nothing half done.
    A checkpoint of the same name goes once the new one is whole."""
    with written_whole(folder) as tmp:
        write_checkpoint_files(checkpoint, tmp, saved_parameters(checkpoint.model))


def write_checkpoint_files(checkpoint, folder, tensors):
    """The files of a checkpoint; tensors: its weights by their names, None where they are written elsewhere."""
    meta = {
        "version": CHECKPOINT_VERSION,
        **{name: getattr(checkpoint, name) for name in CHECKPOINT_FIELDS},
    }
    meta["card"] = {name: origin for name, origin in checkpoint.history.items() if name != "folder"}
    if tensors is not None:
        write_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
    (folder / "nanovlm.json").write_text(json.dumps(meta, indent=1))
    checkpoint.tokenizer.save(folder)
    if checkpoint.unused_vision_tensors:
        write_tensors(
            {name: tensor.contiguous() for name, tensor in checkpoint.unused_vision_tensors.items()},
            folder / "spare.safetensors",
        )


def export_checkpoint(checkpoint, folder):
    """Write a checkpoint as a LLaVA folder (llava.py), whole or not at all."""
    with written_whole(folder) as tmp:
        llava.write_llava(checkpoint, tmp)


@contextlib.contextmanager
def written_whole(folder):
    """A folder to write into, which is flushed and gets its name when all is in it; another of that name goes then."""
    try:
        yield begin_folder(folder)
        finish_folder(folder)
    finally:
        drop_unfinished(folder)


def begin_folder(folder):
    """The temporary folder in which `folder` is written."""
    drop_unfinished(folder)
    tmp = Path(f"{folder}.tmp")
    tmp.mkdir(parents=True)
    return tmp


def finish_folder(folder):
    """Flush what was written and give it its name."""
    folder, tmp, old = Path(folder), Path(f"{folder}.tmp"), Path(f"{folder}.old.tmp")
    mode = next(tmp.glob("*.json"))
    for path in tmp.rglob("*"):
        if path.is_file():
            shutil.copymode(mode, path)  # safetensors hides its files from everyone else
        fsync_path(path)
    fsync_path(tmp)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop_unfinished(folder):
    """What is left of a `folder` that was not finished, or that another has replaced."""
    for left in (f"{folder}.tmp", f"{folder}.old.tmp"):
        shutil.rmtree(left, ignore_errors=True)
