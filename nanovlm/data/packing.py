"""The order in which training reads samples, and the sequences into which it packs them.

Given the data, its weights, seq_len and the global batch size, the sequences of a step are a
function of (seed, step). They depend neither on the number of ranks or micro-batches nor on earlier
steps. So a run resumes at any step on any number of machines, and the step is all that it has to
remember.
"""

import itertools
import math
from bisect import bisect_left, insort

import numpy as np
import torch

from .. import IGNORE_INDEX, UserError
from . import image_processing
from .dataset import LENGTH, tiles_key

# samples packed at a time: more fill the sequences better, fewer keep the order more random
PACKING_WINDOW = 1024
# arguments of VLM.forward, and the value of each in padding
PADDING = {"ids_BT": 0, "targets_BT": IGNORE_INDEX, "positions_BT": 0, "documents_BT": -1}


def epoch_samples(dataset_of, weights, seed, epoch):
    """Returns the numbers of an epoch's samples, sorted.

    dataset_of: the dataset of each sample. Without weights each sample comes once. With weights
    there are equally many samples, drawn by the weights of their datasets: a dataset is read in one
    permutation after another, and each epoch continues where the last one ended. If a dataset of
    3 samples has 2 places in each epoch, the epochs read a b, c B, A C: two permutations.
    """
    if weights is None:
        return np.arange(len(dataset_of))
    parts = []
    for number, weight in enumerate(weights):
        members = np.flatnonzero(dataset_of == number)
        first, last = (math.floor(weight * len(dataset_of) * e) for e in (epoch, epoch + 1))
        for cycle in range(first // len(members), -(-last // len(members))):
            order = np.random.default_rng([seed, number, cycle]).permutation(members)
            start = cycle * len(members)
            parts.append(order[max(first - start, 0) : last - start])
    return np.sort(np.concatenate(parts))


def group_samples(samples, members, seq_len):
    """Returns (groups, lengths) of samples: (first, end) of each group, and its tokens; arrays.

    Adjacent samples of one image (`prepare.py data --split_turns=true`) are a group, as many as fit
    into a sequence, so that the vision encoder sees their image once. Others are alone.
    """
    groups, lengths = [], []
    for i, length in zip(members.tolist(), samples.table[members, LENGTH].tolist(), strict=True):
        if samples.shares_image[i] and lengths and lengths[-1] + length <= seq_len:
            groups[-1][1] = i + 1
            lengths[-1] += length
        else:
            groups.append([i, i + 1])
            lengths.append(length)
    return np.array(groups, np.int64).reshape(-1, 2), np.array(lengths, np.int64)


def members_of_groups(groups):
    """Returns the numbers of the samples of some groups (first, end): an array."""
    return np.concatenate([np.arange(*group) for group in groups])


def pack_sequences(lengths, seq_len, window=PACKING_WINDOW):
    """Yields sequences of at most seq_len tokens, each a list of indices of samples in `lengths`.

    Best fit decreasing (Johnson 1973): of each `window` of samples take the longest first, and put
    it into the fullest sequence that still has room. Then sort the sequences by their first sample,
    so that a shuffled order stays shuffled.
    """
    lengths = np.asarray(lengths)
    for start in range(0, len(lengths), window):
        window_lengths = lengths[start : start + window]
        sequences = []  # (room in tokens, number, members), the fullest first
        for i in np.argsort(-window_lengths, kind="stable").tolist():
            length = int(window_lengths[i])
            # `sequences` is sorted by room: the first with room for it is the fullest of these.
            position = bisect_left(sequences, (length,))
            if position < len(sequences):
                room, number, members = sequences.pop(position)
            else:
                room, number, members = seq_len, len(sequences), []
            insort(sequences, (room - length, number, [*members, start + i]))
        yield from sorted(sorted(members) for _, _, members in sequences)


def epoch_sequences(epoch, lengths, seq_len, seed, dataset_of, weights):
    """Yields the packed sequences of an epoch, each the indices of its samples in `lengths`.

    Each epoch has an order of its own.
    """
    samples = epoch_samples(dataset_of, weights, seed, epoch)
    order = samples[np.random.default_rng([seed, epoch]).permutation(len(samples))]
    for members in pack_sequences(lengths[order], seq_len):
        yield order[members]


def packed_sequences(*packing):
    """Yields the sequences of one epoch after another without end; packing: of epoch_sequences.

    A sequence is a function of (seed, its number) alone.
    """
    for epoch in itertools.count():
        yield from epoch_sequences(epoch, *packing)


def collate_images(images, image_config, pin_memory=False):
    """Returns a list of ProcessedImages, which may be empty, as arguments of VLM.forward.

    tiles_NCYX: all their tiles, uint8; those of an image that comes several times are there once.
    image_feature_index: their feature_index, counted over all tiles. pin_memory: in memory that a
    GPU copies from while it computes.
    """
    distinct = {tiles_key(image.tiles): image.tiles for image in images}
    count, tile = sum(map(len, distinct.values())), image_config["tile"]
    tokens = image_processing.tokens_per_tile(image_config)
    tiles_NCYX = torch.empty(count, 3, tile, tile, dtype=torch.uint8, pin_memory=pin_memory)
    starts, start = {}, 0
    for key, tiles_nCYX in distinct.items():
        tiles_NCYX.numpy()[start : start + len(tiles_nCYX)] = tiles_nCYX
        starts[key] = start
        start += len(tiles_nCYX)
    indices = [np.empty(0, np.int64)]
    for tiles_nCYX, index, _ in images:
        offset = starts[tiles_key(tiles_nCYX)] * tokens
        indices.append(np.where(index < 0, index, index + offset))  # < 0: IMAGE_NEWLINE
    index = torch.from_numpy(np.concatenate(indices))
    return {"tiles_NCYX": tiles_NCYX, "image_feature_index": index}


def collate(samples, sequences, pin_memory=False):
    """Returns (the arguments of VLM.forward as a dict of tensors, the numbers of the samples).

    sequences: a list of sample numbers each. Packed samples never attend to each other: each is a
    document with a number in documents_BT, and its positions start at 0. Padding is document -1 and
    has no labels. T is the longest sequence, at least one token: a rank with no samples gets an
    empty sequence, because it takes part in the collectives of the others.
    """
    lengths = [samples.table[members, LENGTH].sum() for members in sequences]
    shape, batch = (len(sequences), max(1, *lengths)), {}
    for name, padding in PADDING.items():
        batch[name] = torch.full(shape, padding, pin_memory=pin_memory)
    numbers, images = [], []
    for b, members in enumerate(sequences):
        start = 0
        for document, i in enumerate(members):
            ids_t, targets_t, sample_images = samples.read(i)
            span = slice(start, start + len(ids_t))
            values = (ids_t, targets_t, np.arange(len(ids_t)), document)  # as in PADDING
            for tensor_BT, value_t in zip(batch.values(), values, strict=True):
                tensor_BT.numpy()[b, span] = value_t
            start = span.stop
            numbers.append(int(i))
            images += sample_images
    batch |= collate_images(images, samples.image_config, pin_memory)
    return batch, numbers


class PackedDataLoader:
    """An iterator over steps: the micro-batches of one rank, its share of each step's sequences.

    global_batch_size: sequences of a step over all ranks; micro_batch_size: sequences of a
    micro-batch; start_step: the first step; weights: each dataset's share of the samples, or None.
    All ranks get equally many micro-batches, because under FSDP each call of the model is
    collective. The last one may be one empty sequence.
    """

    def __init__(
        self,
        samples,
        *,
        seq_len,
        global_batch_size,
        micro_batch_size,
        seed,
        weights=None,
        rank=0,
        world_size=1,
        start_step=0,
        pin_memory=False,
    ):
        self.samples, self.pin_memory = samples, pin_memory
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        training = samples.split(validation=False)
        dataset_of = samples.dataset_of[training]
        for number, folder in enumerate(samples.folders):
            if not (dataset_of == number).any():
                raise UserError(f"{folder} holds no training samples")
        # Validation samples count too: they are packed into sequences of the same length.
        longest = samples.table[:, LENGTH].argmax()
        if samples.table[longest, LENGTH] > seq_len:
            folder = samples.folders[samples.dataset_of[longest]]
            raise UserError(
                f"{folder}: sample {samples.names[longest]} takes "
                f"{samples.table[longest, LENGTH]} tokens, more than --seq_len={seq_len}"
            )
        groups, lengths = group_samples(samples, training, seq_len)
        self.packing = lengths, seq_len, seed, samples.dataset_of[groups[:, 0]], weights
        sequences = (
            members_of_groups(groups[numbers]) for numbers in packed_sequences(*self.packing)
        )
        self.sequences = itertools.islice(sequences, start_step * global_batch_size, None)

    def count_steps(self, epochs):
        """Returns the number of steps that read so many epochs, which may be a fraction.

        If the sequences of these epochs do not fill the last step, the next epoch's first ones do.
        """
        sequences = 0
        for epoch in range(math.ceil(epochs)):
            share = min(1, epochs - epoch)
            sequences += share * sum(1 for _ in epoch_sequences(epoch, *self.packing))
        return math.ceil(sequences / self.global_batch_size)

    def __iter__(self):
        return self

    def __next__(self):
        """Returns the micro-batches of the next step, each as `collate` returns it."""
        step = list(itertools.islice(self.sequences, self.global_batch_size))
        sequences = step[self.rank :: self.world_size]
        per_rank = -(-self.global_batch_size // self.world_size)
        batches = []
        for i in range(0, per_rank, self.micro_batch_size):
            micro_batch = sequences[i : i + self.micro_batch_size] or [[]]
            batches.append(collate(self.samples, micro_batch, self.pin_memory))
        return batches
