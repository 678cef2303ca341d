"""The checkpoints of a training run, and how it resumes from them, on any number of ranks.

    out/NAME/step-000200     a checkpoint (checkpoints/checkpoint.py), and in it
      training.json          the step, the settings that must stay the same, and its val_loss; if
                             --patience has deleted later steps, the last_step of the run, too
      training.safetensors   the optimizer state, as "decoder.norm.weight/exp_avg"
      sharded/               instead, under FSDP without LoRA: weights and optimizer state, each
                             rank's own rows (checkpoints/sharded.py). The last step has a
                             model.safetensors, too, and with --patience the best one

A step's folder gets its name after it is complete and flushed to disk. Only then older steps are
deleted, so there is always a complete checkpoint.
"""

import itertools
import json
import math
import os
import shutil
from hashlib import sha256
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
from ..data.dataset import LENGTH
from ..distributed import (
    all_gather_object,
    copy_into,
    gather_to_rank_0,
    is_sharded,
    local_tensor,
    on_rank_0,
    raise_on_all_ranks,
)
from ..files import lock_path, parameter_name, read_json, read_tensors, write_tensors, write_text
from .recipes import FREE_ON_RESUME, read_saved_settings

# ---- which checkpoint to resume from, and whether it may ----


def find_resume_checkpoint(run):
    """Returns the checkpoint from which a run resumes; None for a new run."""
    if run.resume:
        if not (folders := list_checkpoints(run.out)):
            raise UserError(f"--resume=true, but {run.out} holds no checkpoint of a run")
        return folders[-1]
    if Path(run.model).resolve().is_relative_to(Path(run.out).resolve()):
        raise UserError(
            f"--model={run.model} is inside --out={run.out}: "
            "choose another --out, or continue that run with --resume=true"
        )


def resume_step(folder, must_agree):
    """Returns (step of a checkpoint, last step of its run if --patience deleted later ones).

    Without such, the two are equal. Raises UserError if a setting differs from its own.
    """
    was = read_saved_settings(folder / "training.json")
    wrong = []
    for name, value in must_agree.items():
        if was.get(name) != value:
            wrong.append(f"--{name} was {was.get(name)}, now {value}")
    if wrong:
        raise UserError(f"{folder} cannot resume with other settings: {'; '.join(wrong)}")
    return was["step"], was.get("last_step", was["step"])


def settings_to_keep(run, samples):
    """Returns the settings that must stay the same if the run resumes.

    The data is named by its content, since its folder may move.
    """
    checksum = sha256(samples.table.tobytes()).hexdigest()[:8]
    tokens = samples.table[:, LENGTH].sum()
    content = f"{len(samples.table):,} samples of {tokens:,} tokens ({checksum})"
    blend = "" if run.weights is None else f" blended by {run.weights}"
    skipped = (*FREE_ON_RESUME, "peak_lrs", "weights", "lora")
    settings = {name: value for name, value in vars(run).items() if name not in skipped}
    return settings | {"data": content + blend}


def move_old_run_aside(run):
    """Rename the folder of an earlier run that a new run would overwrite."""
    out = Path(run.out)
    if run.resume or not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "log.jsonl").is_file():
        raise UserError(f"--out={out} exists already and is not a run: choose another folder")
    number = next(n for n in itertools.count(1) if not Path(f"{out}.{n}").exists())
    with lock_path(out):
        os.rename(out, f"{out}.{number}")
    print(f"{out} holds an earlier run: moved to {out}.{number}")


# ---- the optimizer's state ----


def optimizer_state(model, optimizer):
    """Returns {"decoder.norm.weight/exp_avg": tensor} of all trained parameters, full or sharded.

    It is empty before the first step.
    """
    state = {}
    for name, p in model.named_parameters():
        for kind, tensor in optimizer.state.get(p, {}).items():
            state[f"{name}/{kind}"] = tensor
    return state


def allocate_optimizer_state(model, optimizer, saved_names, path):
    """Allocate the state of AdamW for the trained parameters; returns it as optimizer_state does.

    saved_names: those of the state in the checkpoint at `path`. Raises UserError if they differ.
    """
    optimizer.state.clear()
    for p in model.parameters():
        if p.requires_grad:
            step = torch.zeros((), device=p.device)
            moments = {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": step, **moments}
    state = optimizer_state(model, optimizer)
    if wrong := sorted(state.keys() ^ set(saved_names)):
        parameter = wrong[0].rpartition("/")[0]
        has = "is trained, but has no" if wrong[0] in state else "is frozen, but has an"
        raise UserError(f"{path}: {parameter} {has} optimizer state")
    return state


@raise_on_all_ranks()
def load_optimizer(step, model, optimizer):
    """Load the optimizer state of a step's folder, which any number of ranks may have written."""
    shards, path = step / "sharded", step / "training.safetensors"
    if not shards.is_dir():
        tensors = {parameter_name(name): tensor for name, tensor in read_tensors(path).items()}
        return copy_optimizer_state(model, optimizer, tensors, path)
    names = []
    for name in sharded.read_pieces(shards):
        if name.startswith("optimizer."):
            names.append(name.removeprefix("optimizer."))
    state = allocate_optimizer_state(model, optimizer, names, shards)
    sharded.read_shards({f"optimizer.{name}": tensor for name, tensor in state.items()}, shards)


def copy_optimizer_state(model, optimizer, tensors, path):
    """Copy the state in {name: full tensor}, which was read from `path`."""
    for name, tensor in allocate_optimizer_state(model, optimizer, tensors, path).items():
        copy_into(tensor, tensors[name])


class Saver:
    """Writes the checkpoints of one run.

    must_agree: the settings that must stay the same if the run resumes. keep_checkpoints: the
    number of newest checkpoints to keep; from 2 on, or with keep_best, the one with the lowest
    val_loss stays, too.
    """

    def __init__(self, checkpoint, optimizer, out, must_agree, keep_checkpoints, keep_best=False):
        self.checkpoint, self.optimizer, self.out = checkpoint, optimizer, Path(out)
        self.must_agree, self.keep_checkpoints = must_agree, keep_checkpoints
        self.keep_best = keep_best or keep_checkpoints > 1

    @raise_on_all_ranks()
    def save(self, step, as_one_file, metrics={}):
        """Write out/step-…; all ranks call this.

        as_one_file: rank 0 also writes sharded weights as one file, gathered one by one. metrics:
        those of this step. Raises UserError, and keeps the earlier steps, if a weight is NaN or
        infinite or a file cannot be written.
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
            self.write_files(Path(f"{folder}.tmp"), training, as_one_file)
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

    def write_files(self, tmp, training, as_one_file):
        model = self.checkpoint.model
        weights, state = saved_parameters(model), optimizer_state(model, self.optimizer)
        if self.checkpoint.lora:  # what trains is small: one file without shards
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            weights = gather_to_rank_0({name: weights[name] for name in names})
            state = gather_to_rank_0(state)
        else:
            for name, dtype in self.checkpoint.dtypes.items():
                weights[name] = weights[name].to(dtype)
        if is_sharded(model) and not self.checkpoint.lora:
            tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
            tensors |= {f"optimizer.{name}": tensor for name, tensor in state.items()}
            sharded.write_shards(tensors, tmp / "sharded")
            weights, state = gather_to_rank_0(weights) if as_one_file else None, None
        on_rank_0(write_checkpoint_files, self.checkpoint, tmp, weights)
        if state is not None:
            on_rank_0(write_tensors, state, tmp / "training.safetensors")
        on_rank_0((tmp / "training.json").write_text, json.dumps(training, indent=1))

    def delete_old(self, newest):
        folders = list_checkpoints(self.out)
        kept = {newest, *folders[-self.keep_checkpoints :]}
        if self.keep_best:
            kept.add(min(folders, key=saved_val_loss))
        for folder in self.out.glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def delete_after_best(self, last_step):
        """Delete the checkpoints after the one with the lowest val_loss, and note last_step in it.

        So a run with --patience ends with its best checkpoint, from which it is not resumed.
        """
        folders = list_checkpoints(self.out)
        best = min(folders, key=saved_val_loss)
        path = best / "training.json"
        training = read_json(path) | {"last_step": last_step}
        write_text(path, json.dumps(training, indent=1))
        for folder in folders[folders.index(best) + 1 :]:
            shutil.rmtree(folder)
        print(f"--patience leaves the checkpoint with the lowest val_loss: {best}")


def saved_val_loss(folder):
    return read_json(folder / "training.json").get("val_loss", math.inf)
