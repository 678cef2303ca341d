"""Validation while training: the loss on held-out samples, with their images and without, and a few answers to read."""

import itertools

import numpy as np
import torch

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, distributed
from ..data.dataset import LENGTH
from ..data.packing import collate, join, pack


def pack_validation_set(samples, row, limit=64):
    """The first held-out samples, packed into rows of sample numbers."""
    members = samples.split(validation=True)[:limit]
    return [members[positions] for positions in pack(samples.table[members, LENGTH], row)]


def validate(checkpoint, samples, rows, rank, world, mixed):
    """`validation_losses` over all ranks' rows, and two answers to read. All ranks call the model as often, on blank rows if there are no more:
    weights that lie in parts are gathered by all or by none. The model stays in training mode, where a row without pictures looks at a blank one."""
    mine = rows[rank::world]
    looks = validation_losses(
        checkpoint.model, samples, [*mine, *[[]] * (-(-len(rows) // world) - len(mine))], mixed
    )
    if rank == 0 or distributed.is_sharded(checkpoint.model):
        show_answers(checkpoint, samples, rows, mixed, aloud=rank == 0)
    return looks


@torch.no_grad()
def validation_losses(model, samples, rows, mixed):
    """{"validation": loss a trained token, "blank": the same with every picture grey} over this and the other ranks' rows; {} if there are none.

    The second tells whether the model looks at all.
    """
    sums, device = [0.0, 0.0, 0], model.mean_C11.device
    for members in rows:
        batch = {name: x.to(device) for name, x in collate(samples, [members])[0].items()}
        grey = {**batch, "tiles_NCYX": torch.full_like(batch["tiles_NCYX"], 128)}
        with mixed:
            sums[0] += model(**batch).item()
            sums[1] += model(**grey).item()
        sums[2] += int((batch["targets_BT"] != IGNORE_INDEX).sum())
    loss, blank, count = distributed.all_reduce_sum(sums, device)
    return {"validation": loss / count, "blank": blank / count} if count else {}


def show_answers(checkpoint, samples, rows, mixed, aloud=True, count=2):
    """The first question of the first samples of `rows`, the model's answer and the right one."""
    for i in sorted(i for members in rows for i in members)[:count]:
        show_answer(checkpoint, samples, i, mixed, aloud)


def show_answer(checkpoint, samples, i, mixed, aloud):
    ids_T, targets_T, pictures = samples.read(i)
    trained_T = targets_T != IGNORE_INDEX  # the token after each of these is the assistant's
    if not trained_T.any():
        return
    first = int(trained_T.argmax()) + 1
    last = first + int((~trained_T[first:]).argmax())
    end, ends = int(ids_T[last]), np.cumsum([0, *(len(picture.places) for picture in pictures)])
    seen = int(
        np.searchsorted(ends, (ids_T[:first] == IMAGE_TOKEN_ID).sum())
    )  # pictures before the answer
    model = checkpoint.model
    stop = (
        set() if distributed.is_sharded(model) else {end}
    )  # ranks that differed in a last bit would wait for one another
    with mixed, distributed.unsharded(model):
        answer = model.generate(
            [ids_T[:first].tolist()],
            **join(pictures[:seen], samples.image_config),
            stop=stop,
            max_tokens=64,
        )
        said = list(itertools.takewhile(lambda x: x != end, [x for (x,) in answer]))
    decode = checkpoint.tokenizer.decode
    if aloud:
        print(
            f"  {samples.names[i]}: it says {decode(said)!r}, right is {decode(ids_T[first:last].tolist())!r}",
            flush=True,
        )
