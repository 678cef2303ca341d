"""Validation: the loss on held-out samples, with their images and with grey ones; two answers."""

import itertools

import numpy as np
import torch

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..cli import CONTROL_CHARACTERS
from ..data.packing import collate, collate_images, group_samples, members_of_groups, pack_sequences
from ..distributed import all_reduce_sum, get_rank, get_world_size, is_sharded, unsharded
from ..inference.generate import generate

MAX_QUESTION = 300  # characters of a prompt that are printed; it ends with the question


def pack_validation_set(samples, seq_len):
    """Pack the first 64 held-out groups of samples (packing.group_samples; most are one sample)
    into sequences. Returns the sample indices of each."""
    groups, lengths = group_samples(samples, samples.split(validation=True), seq_len)
    sequences = pack_sequences(lengths[:64], seq_len)
    return [members_of_groups(groups[numbers]) for numbers in sequences]


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
    two losses are equal, the model does not use its images. If a sample has several answers, there
    is a "first_turn_loss" of the first ones. Where it is far above val_loss, the model answers from
    the turns before.
    """
    device = model.mean_C11.device

    def batches():
        for members in sequences:
            yield {name: x.to(device) for name, x in collate(samples, [members])[0].items()}

    loss_sum, blank_sum, labels, first_sum, first_labels = 0.0, 0.0, 0, 0.0, 0
    for batch in batches():
        blank = {**batch, "tiles_NCYX": torch.full_like(batch["tiles_NCYX"], 128)}
        with autocast:
            loss_sum += model(**batch).item()
            blank_sum += model(**blank).item()
        labels += int((batch["targets_BT"] != IGNORE_INDEX).sum())
        first_labels += int((first_turn_targets(batch) != IGNORE_INDEX).sum())
    sums = all_reduce_sum([loss_sum, blank_sum, labels, first_labels], device)
    loss_sum, blank_sum, labels, first_labels = sums
    if not labels:
        return {}
    losses = {"val_loss": loss_sum / labels, "blank_image_loss": blank_sum / labels}
    if first_labels < labels:  # on all ranks or on none, because each call may be collective
        for batch in batches():
            with autocast:
                first_sum += model(**{**batch, "targets_BT": first_turn_targets(batch)}).item()
        losses["first_turn_loss"] = all_reduce_sum([first_sum], device)[0] / first_labels
    return losses


def first_turn_targets(batch):
    """Returns targets_BT with IGNORE_INDEX in all answers of a sample but its first."""
    targets_BT = batch["targets_BT"]
    is_labelled_BT = targets_BT != IGNORE_INDEX
    # The last token of a sequence, which roll moves to the front, has no label.
    begins_BT = is_labelled_BT & ~is_labelled_BT.roll(1, dims=1)
    answers_BT = begins_BT.cumsum(1)  # so far in the sequence
    # A sample begins at position 0: there, the answers of the samples before it are counted.
    is_first_BT = batch["positions_BT"] == 0
    before_BT = torch.where(is_first_BT, answers_BT - begins_BT.long(), 0).cummax(1).values
    return torch.where(answers_BT - before_BT > 1, IGNORE_INDEX, targets_BT)


def print_answer(checkpoint, samples, i, autocast):
    """Answer the first question of a sample; print it, the expected answer and the answer."""
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
        tokenizer = checkpoint.tokenizer
        special = {IMAGE_TOKEN_ID, *tokenizer.special.values()}
        question = [token_id for token_id in ids_T[:start].tolist() if token_id not in special]
        texts = {
            "question": tokenizer.decode(question).strip()[-MAX_QUESTION:],
            "expected": tokenizer.decode(ids_T[start:end].tolist()),
            "answer": tokenizer.decode(ids),
        }
        lines = [f"    {name:8}  {text!r}" for name, text in texts.items()]
        text = "\n".join([f"  {samples.names[i]}", *lines])
        print(text.translate(CONTROL_CHARACTERS), flush=True)
