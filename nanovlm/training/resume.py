"""What a training run leaves to go on from: on any number of ranks, and however the model lies over them.

    out/NAME/step-000200     a checkpoint (weights.py), and in it
      training.json          the step, what must stay the same to go on, and the validation loss if it was looked at
      training.safetensors   the optimizer's state by the names of the parameters, "decoder.norm.weight/exp_avg"
      sharded/               under FSDP instead: the weights and that state, of which each rank wrote its own rows (sharded.py);
                             model.safetensors comes with the last step alone

A step gets its name once it is whole and flushed, and only then older ones go: whatever happens, there is a good one.
"""

import json
import math
import shutil
from pathlib import Path

import torch

from .. import UserError, distributed
from ..checkpoints import sharded
from ..checkpoints.checkpoint import (
    begin_folder,
    drop_unfinished,
    finish_folder,
    list_checkpoints,
    saved_parameters,
    write_checkpoint_files,
)
from ..files import read_json, read_tensors, write_tensors


def moments(model, optimizer):
    """The optimizer's state, {"decoder.norm.weight/exp_avg": tensor}, of which each rank may hold a part."""
    return {
        f"{name}/{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def make_moments(model, optimizer, names, where):
    """Room for a state of those names; every trained parameter must find its own, and every state its parameter."""
    found = {}
    for name in names:
        parameter, _, kind = name.rpartition("/")
        found.setdefault(parameter, []).append(kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if wrong := sorted(found.keys() ^ trained.keys()):
        raise UserError(
            f"{where}: {wrong[0]} {'is trained, but has no' if wrong[0] in trained else 'is frozen, but has a'} state of the optimizer"
        )
    for name, p in trained.items():  # AdamW counts its steps in float32 where the parameter is
        optimizer.state[p] = {
            kind: torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p)
            for kind in found[name]
        }


@distributed.raise_on_all_ranks()
def restore(step, model, optimizer):
    """Fill the optimizer from a step of any run of this model."""
    parts, where = step / "sharded", step / "training.safetensors"
    if not parts.is_dir():
        return put_optimizer(model, optimizer, read_tensors(where), where)
    names = [
        name.removeprefix("optimizer.")
        for name in sharded.read_pieces(parts)
        if name.startswith("optimizer.")
    ]
    make_moments(model, optimizer, names, parts)
    sharded.read_shards(
        {f"optimizer.{name}": tensor for name, tensor in moments(model, optimizer).items()}, parts
    )


def put_optimizer(model, optimizer, tensors, where):
    make_moments(model, optimizer, tensors, where)
    for name, tensor in moments(model, optimizer).items():
        distributed.copy_into(tensor, tensors[name])


def everything(model, optimizer):
    """Weights and the optimizer's state, as they lie in sharded/."""
    return {
        **{f"model.{name}": tensor for name, tensor in saved_parameters(model).items()},
        **{f"optimizer.{name}": tensor for name, tensor in moments(model, optimizer).items()},
    }


class Saves:
    """The steps of one run. keep: how many of the newest stay; where that is more than one, the step with the best validation loss does too."""

    def __init__(self, checkpoint, optimizer, out, must_agree, keep):
        self.checkpoint, self.optimizer, self.out, self.must_agree, self.keep = (
            checkpoint,
            optimizer,
            Path(out),
            must_agree,
            keep,
        )
        self.compared = False

    @distributed.raise_on_all_ranks()
    def write(self, step, last, looks={}):
        """Write out/step-…, on all ranks together; those before it stay, with a UserError that says so, if it cannot be written or holds what is no
        number. last: weights that lie in parts are gathered, a tensor after another, into the memory of rank 0. The first time, all is read back
        and compared."""
        folder = self.out / f"step-{step:06d}"
        odd = [
            name
            for name, p in self.checkpoint.model.named_parameters()
            if p.requires_grad and not distributed.local_tensor(p).isfinite().all()
        ]
        if wrong := [
            name for names in distributed.all_gather_object(odd) for name in names
        ]:  # of whichever rank
            raise UserError(
                f"step {step}: {wrong[0]} holds what is no number, so it is not saved; {self.newest()} is whole"
            )
        training = {"step": step, **self.must_agree} | {
            name: looks[name] for name in ("validation",) if name in looks
        }
        try:
            distributed.on_rank_0(begin_folder, folder)
            self.fill(Path(f"{folder}.tmp"), training, last)
            distributed.on_rank_0(finish_folder, folder)
        except OSError as error:
            distributed.on_rank_0(drop_unfinished, folder)
            raise UserError(
                f"{folder} could not be saved ({error.strerror or error}); {self.newest()} is whole"
            ) from None
        distributed.on_rank_0(self.prune, folder)

    def newest(self):
        kept = list_checkpoints(self.out)
        return kept[-1] if kept else "no checkpoint"

    def fill(self, tmp, training, last):
        model, optimizer = self.checkpoint.model, self.optimizer
        tensors, state = saved_parameters(model), moments(model, optimizer)
        is_sharded = distributed.is_sharded(model)
        if is_sharded:
            sharded.write_shards(everything(model, optimizer), tmp / "sharded")
            tensors, state = distributed.gather_to_rank_0(tensors) if last else None, None
        distributed.on_rank_0(write, self.checkpoint, tmp, training, tensors, state)
        if not self.compared:
            distributed.on_rank_0(compare, tmp, tensors, state)
            odd = differ(tmp / "sharded", everything(model, optimizer)) if is_sharded else []
            trouble = [name for names in distributed.all_gather_object(odd) for name in names]
            if trouble:
                raise OSError(f"{trouble[0]} was read back as other numbers")
        self.compared = True

    def prune(self, newest):
        kept = list_checkpoints(self.out)
        stay = {newest, *kept[-self.keep :]}
        if self.keep > 1:
            stay.add(
                min(
                    kept,
                    key=lambda step: read_json(step / "training.json").get("validation", math.inf),
                )
            )
        for old in self.out.glob("step-*"):
            if old not in stay:
                shutil.rmtree(old)


def write(checkpoint, tmp, training, tensors, state):
    write_checkpoint_files(checkpoint, tmp, tensors)
    if state is not None:
        write_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
            tmp / "training.safetensors",
        )
    (tmp / "training.json").write_text(json.dumps(training, indent=1))


def compare(tmp, tensors, state):
    """Read back what `write` wrote; OSError where it is not what was meant."""
    for file, meant in (("model.safetensors", tensors), ("training.safetensors", state)):
        found = read_tensors(tmp / file) if meant is not None else {}
        for name, tensor in (meant or {}).items():
            if not same(found[name], tensor.detach().cpu()):
                raise OSError(f"{name} was read back as other numbers")


def same(a, b):
    """To the bit, NaN or not."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
    )


def differ(parts, state):
    """The names of what this rank reads back as other numbers than it holds; a GiB at a time, as there may be no room for two of all."""
    wrong, some, size = [], {}, 0
    for number, (name, tensor) in enumerate(state.items(), 1):
        some[name] = tensor.detach()
        size += distributed.local_tensor(some[name]).nbytes
        if size > 2**30 or number == len(state):
            wrong += differ_among(some, parts)
            some, size = {}, 0
    return wrong


def differ_among(state, parts):
    again = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    try:
        sharded.read_shards(again, parts)
    except UserError:  # the other ranks wait to hear of it
        return list(state)
    return [
        name
        for name, tensor in state.items()
        if not same(distributed.local_tensor(tensor), distributed.local_tensor(again[name]))
    ]
