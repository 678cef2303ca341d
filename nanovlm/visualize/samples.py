"""A prepared sample as the model will get it, and a whole set in a few lines."""

import datetime
import itertools

import numpy as np
from PIL import Image

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from ..data import image_processing
from ..data.dataset import IMAGE_COUNT, LENGTH
from ..data.packing import epoch_samples, pack_sequences

GAP = 4  # pixels between tiles


def sample_as_text(samples, i, tokenizer):
    """Sample i token by token, `|` between them, a picture as the number of its tokens; a line begins where training begins or ends."""
    ids_T, targets_T, pictures = samples.read(i)
    trained_T = np.concatenate(
        [[False], targets_T[:-1] != IGNORE_INDEX]
    )  # a target stands one place before its token
    counts = iter(
        [
            (number, len(picture.tiles), len(picture.places))
            for number, picture in enumerate(pictures, 1)
        ]
    )
    lines = [
        f"{samples.names[i]}: {len(ids_T)} tokens, {trained_T.sum()} of them trained, pictures: {len(pictures)}"
    ]
    for trained, run in itertools.groupby(range(len(ids_T)), lambda t: bool(trained_T[t])):
        said, left = [], 0  # left: of a picture's tokens, those not yet passed
        for t in run:
            if ids_T[t] != IMAGE_TOKEN_ID:
                said.append(
                    repr(
                        tokenizer.bytes_of.get(int(ids_T[t]), b"?").decode(
                            errors="backslashreplace"
                        )
                    )[1:-1]
                )
            elif left == 0:
                number, tiles, left = next(counts)
                said.append(f"<picture {number}: {tiles} tile{'s' * (tiles > 1)}, {left} tokens>")
            left -= ids_T[t] == IMAGE_TOKEN_ID
        lines.append(f"{'trained' if trained else 'given':>8}  {'|'.join(said)}")
    return "\n".join(lines)


def tile_mosaic(tiles_NCYX, across=6):
    """Tiles side by side, in rows of `across`, as one picture."""
    count, _, height, width = tiles_NCYX.shape
    across, down = min(across, count), -(-count // across)
    sheet = Image.new("RGB", (across * (width + GAP) - GAP, down * (height + GAP) - GAP), "white")
    for n, tile_CYX in enumerate(tiles_NCYX):
        place = n % across * (width + GAP), n // across * (height + GAP)
        sheet.paste(image_processing.tile_to_image(tile_CYX), place)
    return sheet


def describe_dataset(samples, weights, row, rate):
    """What a set holds and what training will make of it: rows of `row` tokens; at `rate` tokens a second, if that is not 0."""
    training = samples.split(validation=False)
    for number, folder in enumerate(samples.folders):
        if not (samples.set_of[training] == number).any():
            raise UserError(
                f"{folder}: all of its {(samples.set_of == number).sum():,} samples are held out, none is left to train on"
            )
    drawn = training[epoch_samples(samples.set_of[training], weights, seed=0, epoch=0)]
    lengths, tiles = (
        samples.table[drawn, LENGTH],
        sum(len(shard["tiles"]) for shard in samples.shards),
    )
    trained, ids = (
        sum(
            int(shard[kind].sum()) if kind == "trained" else len(shard[kind])
            for shard in samples.shards
        )
        for kind in ("trained", "ids")
    )
    longest = samples.table[:, LENGTH].argmax()
    spread = ", ".join(
        f"{share}% {length:,.0f}"
        for share, length in zip((5, 50, 95), np.percentile(lengths, (5, 50, 95)), strict=True)
    )
    lines = [
        f"{samples}: {len(samples.table):,} samples, {len(samples.table) - len(training):,} of them held out",
        f"pictures: {samples.table[:, IMAGE_COUNT].sum():,} in {tiles:,} tiles; {(samples.table[:, IMAGE_COUNT] == 0).sum():,} samples have none",
        f"tokens of a sample: {spread}, the longest {samples.table[longest, LENGTH]:,} ({samples.names[longest]})",
        f"trained: {trained:,} tokens, {trained / samples.table[:, LENGTH].sum():.1%} of all, {trained / ids:.1%} of the words",
    ]
    if (short := int((samples.table[:, LENGTH] > row).sum())) > 0:
        return "\n".join(
            [
                *lines,
                f"{short:,} samples do not fit into rows of {row:,} tokens: train with a longer --row, or prepare with this one",
            ]
        )
    rows = sum(1 for _ in pack_sequences(lengths, row))
    lines.append(
        f"an epoch: {len(drawn):,} samples, {lengths.sum():,} tokens in {rows:,} rows of {row:,}, {lengths.sum() / rows / row:.1%} full"
    )
    if rate:
        lines.append(
            f"at {rate:,.0f} tokens a second: {datetime.timedelta(seconds=round(lengths.sum() / rate))}"
        )
    return "\n".join(lines)
