"""The checkpoints of a training run, and how it resumes from them, on any number of ranks.

    out/NAME/step-000200     a checkpoint (checkpoints/checkpoint.py), and in it
      training.json          the step, the settings that must stay the same, and its val_loss
      training.safetensors   the optimizer state, as "decoder.norm.weight/exp_avg"
      sharded/               under FSDP instead: weights and optimizer state, of which each rank has
                             written its own rows (checkpoints/sharded.py); only the last step has a
                             model.safetensors, too

A step's folder gets its name after it is complete and flushed to disk. Older steps are deleted
after that: there is always a complete checkpoint.
"""

import json
import math
import shutil
from pathlib import Path

import torch

from .. import UserError
from ..checkpoints import sharded
from ..checkpoints.checkpoint import (
    finish_folder,
    list_checkpoints,
    remove_unfinished,
    saved_parameters,
    start_folder,
    write_checkpoint_files,
)
from ..distributed import (
    all_gather_object,
    copy_into,
    gather_to_rank_0,
    is_sharded,
    local_tensor,
    on_rank_0,
    raise_on_all_ranks,
)
from ..files import parameter_name, read_json, read_tensors, write_tensors


def optimizer_state(model, optimizer):
    """{"decoder.norm.weight/exp_avg": tensor} of all trained parameters, sharded or whole."""
    state = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{name}/{key}"] = value
    return state


def allocate_optimizer_state(model, optimizer, names, path):
    """Allocate the optimizer state of those names.

    Raises UserError unless each trained parameter has its state, and each state its parameter.
    """
    kinds = {}
    for name in names:
        parameter, _, kind = name.rpartition("/")
        kinds.setdefault(parameter, []).append(kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if wrong := sorted(kinds.keys() ^ trained.keys()):
        has = "is trained, but has no" if wrong[0] in trained else "is frozen, but has an"
        raise UserError(f"{path}: {wrong[0]} {has} optimizer state")
    for name, p in trained.items():
        state = {kind: torch.zeros_like(p) for kind in kinds[name] if kind != "step"}
        if "step" in kinds[name]:  # AdamW's step count is a float32 scalar
            state["step"] = torch.zeros((), device=p.device)
        optimizer.state[p] = {kind: state[kind] for kind in kinds[name]}


@raise_on_all_ranks()
def load_optimizer(step, model, optimizer):
    """Load the optimizer state of a step's folder, which any number of ranks may have written."""
    shards, path = step / "sharded", step / "training.safetensors"
    if not shards.is_dir():
        return copy_optimizer_state(model, optimizer, read_optimizer_state(path), path)
    names = []
    for name in sharded.read_pieces(shards):
        if name.startswith("optimizer."):
            names.append(name.removeprefix("optimizer."))
    allocate_optimizer_state(model, optimizer, names, shards)
    state = optimizer_state(model, optimizer)
    sharded.read_shards({f"optimizer.{name}": tensor for name, tensor in state.items()}, shards)


def read_optimizer_state(path):
    """Returns the tensors of a training.safetensors, under today's names of the parameters."""
    return {parameter_name(name): tensor for name, tensor in read_tensors(path).items()}


def copy_optimizer_state(model, optimizer, tensors, path):
    allocate_optimizer_state(model, optimizer, tensors, path)
    for name, tensor in optimizer_state(model, optimizer).items():
        copy_into(tensor, tensors[name])


def sharded_state(model, optimizer):
    """Weights and optimizer state by the names that they have in sharded/."""
    weights, state = saved_parameters(model), optimizer_state(model, optimizer)
    return {
        **{f"model.{name}": tensor for name, tensor in weights.items()},
        **{f"optimizer.{name}": tensor for name, tensor in state.items()},
    }


class Saver:
    """Writes the checkpoints of one run.

    keep_checkpoints: how many of the newest to keep; from 2 on, the step with the best validation
    loss is kept as well. must_agree: the settings that must stay the same for a resume.
    """

    def __init__(self, checkpoint, optimizer, out, must_agree, keep_checkpoints):
        self.checkpoint, self.optimizer, self.out = checkpoint, optimizer, Path(out)
        self.must_agree, self.keep_checkpoints = must_agree, keep_checkpoints
        self.is_verified = False

    @raise_on_all_ranks()
    def save(self, step, is_last, metrics={}):
        """Write out/step-…; all ranks call this.

        Raises UserError, and keeps the earlier steps, if it cannot be written or a weight is NaN or
        infinite. is_last: rank 0 also writes sharded weights whole, gathered one by one. The first
        checkpoint is read back and compared.
        """
        folder = self.out / f"step-{step:06d}"
        not_finite = []
        for name, p in self.checkpoint.model.named_parameters():
            if p.requires_grad and not local_tensor(p).isfinite().all():
                not_finite.append(name)
        if names := [name for names in all_gather_object(not_finite) for name in names]:
            raise UserError(
                f"step {step}: {names[0]} is NaN or infinite, so it is not saved; "
                f"{self.newest()} is complete"
            )
        training = {"step": step, **self.must_agree}
        if "val_loss" in metrics:
            training["val_loss"] = metrics["val_loss"]
        try:
            on_rank_0(start_folder, folder)
            self.write_files(Path(f"{folder}.tmp"), training, is_last)
            on_rank_0(finish_folder, folder)
        except OSError as error:
            on_rank_0(remove_unfinished, folder)
            raise UserError(
                f"{folder} could not be saved ({error.strerror or error}); "
                f"{self.newest()} is complete"
            ) from None
        on_rank_0(self.delete_old, folder)

    def newest(self):
        folders = list_checkpoints(self.out)
        return folders[-1] if folders else "no checkpoint"

    def write_files(self, tmp, training, is_last):
        model, optimizer = self.checkpoint.model, self.optimizer
        weights, state = saved_parameters(model), optimizer_state(model, optimizer)
        if is_sharded(model):
            sharded.write_shards(sharded_state(model, optimizer), tmp / "sharded")
            weights, state = gather_to_rank_0(weights) if is_last else None, None
        on_rank_0(write_files, self.checkpoint, tmp, training, weights, state)
        if not self.is_verified:
            on_rank_0(verify_files, tmp, weights, state)
            wrong = []
            if is_sharded(model):
                wrong = wrong_shards(tmp / "sharded", sharded_state(model, optimizer))
            if names := [name for names in all_gather_object(wrong) for name in names]:
                raise OSError(f"{names[0]} has other values when read back")
        self.is_verified = True

    def delete_old(self, newest):
        folders = list_checkpoints(self.out)
        kept = {newest, *folders[-self.keep_checkpoints :]}
        if self.keep_checkpoints > 1:
            kept.add(min(folders, key=saved_val_loss))
        for folder in self.out.glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder)


def saved_val_loss(folder):
    return read_json(folder / "training.json").get("val_loss", math.inf)


def write_files(checkpoint, tmp, training, weights, state):
    write_checkpoint_files(checkpoint, tmp, weights)
    if state is not None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_tensors(tensors, tmp / "training.safetensors")
    (tmp / "training.json").write_text(json.dumps(training, indent=1))


def verify_files(tmp, weights, state):
    """Read back what `write_files` wrote; raises OSError if a tensor differs."""
    for file, tensors in (("model.safetensors", weights), ("training.safetensors", state)):
        written = read_tensors(tmp / file) if tensors is not None else {}
        for name, tensor in (tensors or {}).items():
            if not bitwise_equal(written[name], tensor.detach().cpu()):
                raise OSError(f"{name} has other values when read back")


def bitwise_equal(a, b):
    """Equal to the bit, also if NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


def wrong_shards(folder, state):
    """The names of this rank's tensors that differ from what is read back.

    It reads one GiB at a time, since memory may not hold all tensors twice.
    """
    wrong, part, size = [], {}, 0
    for number, (name, tensor) in enumerate(state.items(), 1):
        part[name] = tensor.detach()
        size += local_tensor(part[name]).nbytes
        if size > 2**30 or number == len(state):
            wrong += wrong_tensors(part, folder)
            part, size = {}, 0
    return wrong


def wrong_tensors(state, folder):
    written = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    try:
        sharded.read_shards(written, folder)
    except UserError:  # the caller tells the other ranks
        return list(state)
    return [
        name
        for name, tensor in state.items()
        if not bitwise_equal(local_tensor(tensor), local_tensor(written[name]))
    ]
