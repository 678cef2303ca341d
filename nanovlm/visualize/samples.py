"""A prepared sample as the model gets it, and a summary of a whole dataset."""

import datetime
import itertools

import numpy as np

from .. import IMAGE_TOKEN_ID, UserError
from ..cli import CONTROL_CHARACTERS
from ..data.dataset import IMAGE_COUNT, LENGTH
from ..data.packing import epoch_samples, group_samples, members_of_groups, pack_sequences

GAP = 4  # pixels between tiles


def sample_as_text(samples, i, tokenizer):
    """Returns sample i as text: its tokens, with `|` between them.

    Each line holds tokens with a loss ("label") or tokens without ("no loss"). An image is one
    entry, with the number of its tokens.
    """
    ids, loss_mask, images = samples.stored_sample(i)
    lines = [
        f"{samples.names[i]}: {samples.table[i, LENGTH]} tokens, {loss_mask.sum()} of them labels, "
        f"images: {len(images)}"
    ]
    next_images = enumerate(images, 1)
    for has_loss, tokens in itertools.groupby(
        zip(loss_mask, ids, strict=True), lambda pair: pair[0]
    ):
        parts = []
        for _, token_id in tokens:
            if token_id == IMAGE_TOKEN_ID:
                number, image = next(next_images)
                tiles = f"{len(image.tiles)} tile{'s' * (len(image.tiles) > 1)}"
                parts.append(f"<image {number}: {tiles}, {len(image.feature_index)} tokens>")
            else:
                parts.append(token_as_text(int(token_id), tokenizer))
        lines.append(f"{'label' if has_loss else 'no loss':>8}  {'|'.join(parts)}")
    return "\n".join(lines).translate(CONTROL_CHARACTERS)


def token_as_text(token_id, tokenizer):
    text = tokenizer.bytes_of.get(token_id, b"?").decode(errors="backslashreplace")
    return repr(text)[1:-1]


def summarize_dataset(samples, weights, seq_len, tokens_per_s):
    """Returns the contents of a dataset, and the number of sequences of seq_len tokens in an epoch.

    If tokens_per_s is not 0, the text ends with the time of an epoch.
    """
    training = samples.split(validation=False)
    for number, folder in enumerate(samples.folders):
        if not (samples.dataset_of[training] == number).any():
            raise UserError(
                f"{folder}: all {(samples.dataset_of == number).sum():,} samples are held out for "
                "validation, none is left to train on: add samples"
            )
    groups, group_lengths = group_samples(samples, training, seq_len)
    numbers = epoch_samples(samples.dataset_of[groups[:, 0]], weights, seed=0, epoch=0)
    epoch = members_of_groups(groups[numbers])
    lengths, all_lengths = samples.table[epoch, LENGTH], samples.table[:, LENGTH]
    image_counts = samples.table[:, IMAGE_COUNT]
    tiles = sum(len(shard["tiles"]) for shard in samples.shards)
    labels = sum(int(shard["loss_mask"].sum()) for shard in samples.shards)
    text_tokens = sum(len(shard["ids"]) for shard in samples.shards)
    longest = all_lengths.argmax()
    low, median, high = np.percentile(lengths, (5, 50, 95))
    lines = [
        f"{samples}: {len(samples.table):,} samples, {len(samples.table) - len(training):,} of "
        "them held out for validation",
        f"images: {image_counts.sum():,} in {tiles:,} tiles; {(image_counts == 0).sum():,} samples "
        "have none",
        f"tokens of a sample: 5% {low:,.0f}, 50% {median:,.0f}, 95% {high:,.0f}, the longest "
        f"{all_lengths[longest]:,} ({samples.names[longest]})",
        f"labels: {labels:,} tokens, {labels / all_lengths.sum():.1%} of all, "
        f"{labels / text_tokens:.1%} of the text",
    ]
    too_long = int((all_lengths > seq_len).sum())
    if too_long > 0:
        lines.append(
            f"{too_long:,} samples do not fit into sequences of {seq_len:,} tokens: train with a "
            "larger --seq_len, or prepare with this one"
        )
        return "\n".join(lines)
    sequences = sum(1 for _ in pack_sequences(group_lengths[numbers], seq_len))
    lines.append(
        f"an epoch: {len(epoch):,} samples, {lengths.sum():,} tokens in {sequences:,} sequences of "
        f"{seq_len:,}, {lengths.sum() / sequences / seq_len:.1%} full"
    )
    if tokens_per_s:
        seconds = round(lengths.sum() / tokens_per_s)
        lines.append(f"at {tokens_per_s:,.0f} tokens/s: {datetime.timedelta(seconds=seconds)}")
    return "\n".join(lines)
