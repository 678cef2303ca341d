"""Validation: the loss on held-out samples, with their images and with grey ones; two answers."""

import itertools

import numpy as np
import torch

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..cli import CONTROL_CHARACTERS
from ..data.dataset import LENGTH
from ..data.packing import collate, collate_images, pack_sequences
from ..distributed import all_reduce_sum, get_rank, get_world_size, is_sharded, unsharded
from ..inference.generate import generate


def pack_validation_set(samples, seq_len):
    """Pack the first 64 held-out samples into sequences. Returns the sample indices of each."""
    members = samples.split(validation=True)[:64]
    return [
        members[positions] for positions in pack_sequences(samples.table[members, LENGTH], seq_len)
    ]


def validate(checkpoint, samples, sequences, autocast):
    """Returns `validation_losses` over the sequences of all ranks, and prints two answers.

    Each rank calls the model equally often, with blank sequences at the end: under FSDP a forward
    pass needs all ranks. The model stays in training mode, in which a sequence without images runs
    the vision encoder on a blank tile.
    """
    rank, world = get_rank(), get_world_size()
    padded = [*sequences, *[[]] * (-len(sequences) % world)]
    losses = validation_losses(checkpoint.model, samples, padded[rank::world], autocast)
    if rank == 0 or is_sharded(checkpoint.model):
        for i in sorted(itertools.chain(*sequences))[:2]:
            print_answer(checkpoint, samples, i, autocast)
    return losses


@torch.no_grad()
def validation_losses(model, samples, sequences, autocast):
    """Returns {"val_loss": mean over labelled tokens, "blank_image_loss": with all images grey}.

    sequences: those of this rank; the mean is over all ranks. {} if no token has a label. If the
    two losses are equal, the model does not use its images.
    """
    loss_sum, blank_sum, labels, device = 0.0, 0.0, 0, model.mean_C11.device
    for members in sequences:
        batch = {name: x.to(device) for name, x in collate(samples, [members])[0].items()}
        blank = {**batch, "tiles_NCYX": torch.full_like(batch["tiles_NCYX"], 128)}
        with autocast:
            loss_sum += model(**batch).item()
            blank_sum += model(**blank).item()
        labels += int((batch["targets_BT"] != IGNORE_INDEX).sum())
    loss_sum, blank_sum, labels = all_reduce_sum([loss_sum, blank_sum, labels], device)
    if not labels:
        return {}
    return {"val_loss": loss_sum / labels, "blank_image_loss": blank_sum / labels}


def print_answer(checkpoint, samples, i, autocast):
    """Answer the first question of a sample, and print the answer and the reference."""
    ids_T, targets_T, images = samples.read(i)
    is_labelled_T = targets_T != IGNORE_INDEX  # the next token is part of an answer
    if not is_labelled_T.any():
        return
    start = int(is_labelled_T.argmax()) + 1
    end = start + int((~is_labelled_T[start:]).argmax())
    end_token_id = int(ids_T[end])
    image_ends = np.cumsum([0, *(len(image.feature_index) for image in images)])
    image_tokens = (ids_T[:start] == IMAGE_TOKEN_ID).sum()
    images_before = int(np.searchsorted(image_ends, image_tokens))
    # On sharded models all ranks generate equally many tokens: if one rank's logits differed in the
    # last bit, it could stop earlier, and the others would wait for it.
    stop = set() if is_sharded(checkpoint.model) else {end_token_id}
    with autocast, unsharded(checkpoint.model):
        tokens = generate(
            checkpoint.model,
            [ids_T[:start].tolist()],
            **collate_images(images[:images_before], samples.image_config),
            stop=stop,
            max_tokens=64,
        )
        ids = list(itertools.takewhile(lambda x: x != end_token_id, [x for (x,) in tokens]))
    if get_rank() == 0:
        answer = checkpoint.tokenizer.decode(ids)
        reference = checkpoint.tokenizer.decode(ids_T[start:end].tolist())
        line = f"  {samples.names[i]}: answer {answer!r}, reference {reference!r}"
        print(line.translate(CONTROL_CHARACTERS), flush=True)
