"""The order in which training reads samples, and the rows that it packs them into.

A step's rows are a function of (seed, step): not of the number of ranks or micro-batches, nor of anything that happened before. So a run resumes
anywhere, on any number of machines, with nothing to remember but the step.
"""

import itertools
import math
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import torch

from .. import IGNORE_INDEX, UserError
from . import image_processing
from .dataset import LENGTH

PACKING_WINDOW = (
    1024  # samples: enough to fill their rows to the brim, few enough to leave the order random
)


def parse_dataset_weights(text):
    """The folders and weights of "a:0.7,b:0.3" (shares of the samples that are read), or of "a,b", whose weights are None: each sample once."""
    folders, weights = [], []
    for part in text.split(","):
        folder, colon, weight = part.strip().rpartition(":")
        if not colon or Path(part.strip()).exists():
            folder, weight = part.strip(), None
        folders.append(folder)
        weights.append(weight)
    if "" in folders or len(set(map(Path, folders))) < len(folders):
        raise UserError(
            f"--data={text} names {'nothing between two commas' if '' in folders else 'a set twice'}"
        )
    if set(weights) == {None}:
        return folders, None
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise UserError(
            f"--data={text}: either each set has a weight, a number after a colon, or none has"
        ) from None
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"--data={text}: weights must be above 0")
    return folders, [number / sum(numbers) for number in numbers]


def epoch_samples(set_of, weights, seed, epoch):
    """The samples of an epoch, in order of their numbers: every one once; or by the weights of their sets, as many as there are in all.

    A set is walked through in permutations, one after another, and each epoch takes up where the one before left off.
    """
    if weights is None:
        return np.arange(len(set_of))
    drawn = []
    for number, weight in enumerate(weights):
        members = np.flatnonzero(set_of == number)
        first, last = (math.floor(weight * len(set_of) * e) for e in (epoch, epoch + 1))
        for walk in range(first // len(members), -(-last // len(members))):
            order = np.random.default_rng([seed, number, walk]).permutation(members)
            before = walk * len(members)
            drawn.append(order[max(first - before, 0) : last - before])
    return np.sort(np.concatenate(drawn))


def pack_sequences(lengths, row, window=PACKING_WINDOW):
    """Positions in `lengths` put into rows of at most `row` tokens: of each `window` of them the longest first, into the fullest row that has room
    (best fit decreasing, Johnson 1973). Rows come in the order of their first members, so that a shuffled order stays one."""
    lengths = np.asarray(lengths)
    for start in range(0, len(lengths), window):
        span = lengths[start : start + window]
        rows = []  # (room, number, members), the fullest first
        for i in np.argsort(-span, kind="stable").tolist():
            length, at = int(span[i]), bisect_left(rows, (int(span[i]),))
            room, number, members = rows.pop(at) if at < len(rows) else (row, len(rows), [])
            insort(rows, (room - length, number, [*members, start + i]))
        yield from sorted(sorted(members) for _, _, members in rows)


def packed_sequences(lengths, row, seed, set_of=None, weights=None):
    """Packed rows without end, an epoch after another, each in an order of its own: a function of (seed, number of the row) and nothing else."""
    set_of = np.zeros(len(lengths), int) if set_of is None else set_of
    for epoch in itertools.count():
        drawn = epoch_samples(set_of, weights, seed, epoch)
        order = drawn[np.random.default_rng([seed, epoch]).permutation(len(drawn))]
        for members in pack_sequences(lengths[order], row):
            yield order[members]


def collate_images(pictures, policy, pin=False):
    """Pictures, or none, as the model takes them: all their tiles as one uint8 tensor (N, C, Y, X), and which of all their tokens are read; pin:
    in memory that a GPU can fetch from by itself."""
    count, tile, tokens = (
        sum(len(picture.tiles) for picture in pictures),
        policy["tile"],
        image_processing.tokens_per_tile(policy),
    )
    tiles_NCYX = torch.empty(count, 3, tile, tile, dtype=torch.uint8, pin_memory=pin)
    read, before = [np.empty(0, np.int64)], 0
    for tiles_nCYX, places, _ in pictures:
        tiles_NCYX.numpy()[before : before + len(tiles_nCYX)] = tiles_nCYX
        read.append(
            np.where(
                places == image_processing.IMAGE_NEWLINE,
                image_processing.IMAGE_NEWLINE,
                places + before * tokens,
            )
        )
        before += len(tiles_nCYX)
    return {"tiles_NCYX": tiles_NCYX, "image_feature_index": torch.from_numpy(np.concatenate(read))}


def collate(samples, rows, pin=False):
    """Rows of sample numbers -> the arguments of VLM.forward as a dict of tensors, with the numbers beside them.

    Each sample is a document: positions restart at 0 and documents_BT counts up. Padding is document -1, trains nothing, and is no longer than
    the longest row needs: one token, where a row has no members, as a rank is given that has to wait for others' rows.
    """
    read = [[samples.read(i) for i in members] for members in rows]
    T = max(1, *(sum(len(ids) for ids, _, _ in row) for row in read))
    ids_BT, positions_BT = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
    targets_BT, documents_BT = (
        np.full((len(rows), T), IGNORE_INDEX, np.int64),
        np.full((len(rows), T), -1, np.int32),
    )
    for b, row in enumerate(read):
        start = 0
        for document, (ids_t, targets_t, _) in enumerate(row):
            span = slice(start, start + len(ids_t))
            ids_BT[b, span], targets_BT[b, span] = ids_t, targets_t
            positions_BT[b, span], documents_BT[b, span] = np.arange(len(ids_t)), document
            start = span.stop
    arrays = {
        "ids_BT": ids_BT,
        "targets_BT": targets_BT,
        "positions_BT": positions_BT,
        "documents_BT": documents_BT,
    }
    batch = {
        name: torch.from_numpy(a).pin_memory() if pin else torch.from_numpy(a)
        for name, a in arrays.items()
    }
    pictures = collate_images(
        [picture for row in read for _, _, pictures in row for picture in pictures],
        samples.image_config,
        pin,
    )
    return batch | pictures, [int(i) for members in rows for i in members]


class PackedDataLoader:
    """Step after step, the micro-batches of one rank: a function of (seed, step), whatever the number of ranks and micro-batches.

    Every rank gets as many micro-batches, for each is a call of the model that under FSDP all take part in; the last may be one blank row.
    batch: rows of a step over all ranks; micro: rows of a micro-batch; start: the step to begin with; weights: of the sets, as read_blend says.
    """

    def __init__(
        self, samples, *, seq_len, global_batch_size, micro_batch_size, seed, weights=None, rank=0, world_size=1, start_step=0, pin=False
    ):
        self.samples, self.micro, self.rank, self.world, self.pin = samples, micro_batch_size, rank, world_size, pin
        training = samples.split(validation=False)
        lengths, set_of = samples.table[training, LENGTH], samples.set_of[training]
        for number, folder in enumerate(samples.folders):
            if not (set_of == number).any():
                raise UserError(f"{folder} holds no training samples")
        longest = samples.table[
            :, LENGTH
        ].argmax()  # held-out samples too: validation packs them into the same rows
        if samples.table[longest, LENGTH] > seq_len:
            folder = samples.folders[samples.set_of[longest]]
            raise UserError(
                f"{folder}: sample {samples.names[longest]} takes {samples.table[longest, LENGTH]} tokens, a row holds --row={seq_len}"
            )
        self.rows = (
            training[members] for members in packed_sequences(lengths, seq_len, seed, set_of, weights)
        )
        self.rows = itertools.islice(self.rows, start_step * global_batch_size, None)
        self.batch = global_batch_size

    def __next__(self):
        rows = list(itertools.islice(self.rows, self.batch))[self.rank :: self.world]
        most = -(-self.batch // self.world)  # rows of a rank
        return [
            collate(self.samples, rows[i : i + self.micro] or [[]], self.pin)
            for i in range(0, most, self.micro)
        ]
