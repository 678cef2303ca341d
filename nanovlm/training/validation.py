"""Validation: the loss on held-out samples with their images and with grey ones; two answers."""

import itertools

import numpy as np
import torch

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..data.dataset import LENGTH
from ..data.packing import collate, collate_images, pack_sequences
from ..distributed import all_reduce_sum, is_sharded, unsharded
from ..inference.generate import generate


def pack_validation_set(samples, seq_len, limit=64):
    """Pack the first held-out samples into sequences; returns the sample indices of each."""
    members = samples.split(validation=True)[:limit]
    return [
        members[positions] for positions in pack_sequences(samples.table[members, LENGTH], seq_len)
    ]


def validate(checkpoint, samples, sequences, rank, world, autocast):
    """Returns `validation_losses` over the sequences of all ranks, and prints two answers.

    Each rank calls the model equally often, with blank sequences at the end: under FSDP a forward
    pass needs all ranks. The model stays in training mode, in which a sequence without images runs
    the vision encoder on a blank tile.
    """
    own = [*sequences[rank::world]]
    own += [[]] * (-(-len(sequences) // world) - len(own))
    losses = validation_losses(checkpoint.model, samples, own, autocast)
    if rank == 0 or is_sharded(checkpoint.model):
        print_answers(checkpoint, samples, sequences, autocast, is_printed=rank == 0)
    return losses


@torch.no_grad()
def validation_losses(model, samples, sequences, autocast):
    """{"val_loss": mean over labelled tokens, "blank_image_loss": the same with all images grey}.

    The mean is over this rank's and all other ranks' sequences; {} if there is no labelled token.
    If the two losses are equal, the model does not use its images.
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


def print_answers(checkpoint, samples, sequences, autocast, is_printed=True, count=2):
    """Answer the first question of the first samples, and print the answer and the reference."""
    members = sorted(i for members in sequences for i in members)
    for i in members[:count]:
        print_answer(checkpoint, samples, i, autocast, is_printed)


def print_answer(checkpoint, samples, i, autocast, is_printed):
    """is_printed: False on a rank that only takes part in the forward passes."""
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
    if is_printed:
        answer = checkpoint.tokenizer.decode(ids)
        reference = checkpoint.tokenizer.decode(ids_T[start:end].tolist())
        print(f"  {samples.names[i]}: answer {answer!r}, reference {reference!r}", flush=True)
