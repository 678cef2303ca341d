"""Prepared samples on disk, and the order in which training reads them.

A set is a folder: header.json and, for each shard, six little-endian files that numpy maps into memory:

    00000.tiles      uint8    (tiles, C, Y, X)        pictures, cut and resized, not yet normalised
    00000.pictures   int64    (pictures, 2)           first tile, number of tiles
    00000.ids        int32    (tokens,)               token ids, IMAGE (-1) once a picture
    00000.trained    uint8    (tokens,)               1 where the token is the assistant's
    00000.samples    int64    (samples, 6)            COLUMNS below
    00000.names      utf-8    a line a sample         the id in the source, for messages

header.json: version, fingerprint (of tokenizer, template, picture policy), tokens_per_tile, the tile's shape, and the rows of each shard's files.
"""
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from . import IMAGE, UNTRAINED, Mistake

VERSION = 1
COLUMNS = FIRST_ID, IDS, FIRST_PICTURE, PICTURES, LENGTH, HELD_OUT = range(6)  # LENGTH counts tokens with every picture expanded
KINDS = {"tiles": np.uint8, "pictures": np.int64, "ids": np.int32, "trained": np.uint8, "samples": np.int64}
SHARD_BYTES = 1 << 30


def held_out(name, share=1 / 64):
    """Whether a sample is for validation: a fixed hash of its id, so that it is the same in every set and every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") < share * 2**64


def expand(ids, counts):
    """Each IMAGE repeated as often as its picture has tokens (`counts`, in order); ids: (tokens,) array -> int64 array."""
    repeats = np.ones(len(ids), np.int64)
    repeats[np.asarray(ids) == IMAGE] = counts
    return np.repeat(np.asarray(ids, np.int64), repeats)


class Writer:
    """Appends samples to shards in `out`.tmp; closing it writes the header and gives the folder its name: a set is whole or not there."""

    def __init__(self, out, *, fingerprint, tokens_per_tile, tile):
        self.out, self.tmp = Path(out), Path(f"{out}.tmp")
        if self.out.exists():
            raise Mistake(f"{out} is there already: remove it or name another --out")
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        self.header = {"version": VERSION, "fingerprint": fingerprint, "tokens_per_tile": tokens_per_tile, "tile": [3, tile, tile], "shards": []}
        self.files = {}

    def _open(self):
        prefix = self.tmp / f"{len(self.header['shards']):05d}"
        self.files = {kind: open(f"{prefix}.{kind}", "wb") for kind in [*KINDS, "names"]}
        self.rows = dict.fromkeys(KINDS, 0)
        self.header["shards"].append(self.rows)

    def _put(self, kind, array):
        array = np.ascontiguousarray(array, np.dtype(KINDS[kind]).newbyteorder("<"))
        self.files[kind].write(array.data)
        self.rows[kind] += len(array)

    def add(self, name, ids, trained, pictures):
        """One sample; pictures: a list of tiles_NCYX, one entry for each IMAGE among the ids."""
        if not self.files or self.rows["tiles"] * np.prod(self.header["tile"]) > SHARD_BYTES:
            self._close()
            self._open()
        length = len(ids) - len(pictures) + self.header["tokens_per_tile"] * sum(map(len, pictures))
        row = [self.rows["ids"], len(ids), self.rows["pictures"], len(pictures), length, held_out(name)]
        for tiles_NCYX in pictures:
            self._put("pictures", [[self.rows["tiles"], len(tiles_NCYX)]])
            self._put("tiles", tiles_NCYX)
        self._put("ids", ids)
        self._put("trained", trained)
        self._put("samples", [row])
        self.files["names"].write((name.replace("\n", " ") + "\n").encode())

    def _close(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def close(self):
        self._close()
        (self.tmp / "header.json").write_text(json.dumps(self.header, indent=1))
        os.rename(self.tmp, self.out)


class Samples:
    """The samples of one set, read from memory maps."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "header.json").is_file():
            raise Mistake(f"{folder} is no prepared data: it has no header.json (see `python prepare.py data --help`)")
        self.folder, self.header = folder, json.loads((folder / "header.json").read_text())
        if self.header["version"] != VERSION:
            raise Mistake(f"{folder}: written in format {self.header['version']}, this reads {VERSION}: prepare it again")
        self.shards = [self._map(i, rows) for i, rows in enumerate(self.header["shards"])]
        if not self.shards:
            raise Mistake(f"{folder} holds no samples")
        self.table = np.concatenate([shard["samples"] for shard in self.shards])
        self.shard_of = np.repeat(np.arange(len(self.shards)), [len(shard["samples"]) for shard in self.shards])
        self.names = [line for i in range(len(self.shards)) for line in (folder / f"{i:05d}.names").read_text().splitlines()]

    def _map(self, number, rows):
        shapes = {"tiles": self.header["tile"], "pictures": [2], "samples": [len(COLUMNS)]}
        maps = {}
        for kind, dtype in KINDS.items():
            path, shape = self.folder / f"{number:05d}.{kind}", (rows[kind], *shapes.get(kind, []))
            want, got = int(np.prod(shape)) * np.dtype(dtype).itemsize, path.stat().st_size if path.exists() else 0
            if want != got:
                raise Mistake(f"{path} has {got} bytes, its header says {want}: cut short or altered; prepare it again")
            maps[kind] = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", shape=shape) if want else np.zeros(shape, dtype)
        return maps

    def check_fingerprint(self, fingerprint):
        """Raise Mistake unless the set was prepared with this tokenizer, template and picture policy; says which part differs."""
        theirs = self.header["fingerprint"]
        for part in fingerprint:
            if theirs.get(part) != fingerprint[part]:
                raise Mistake(f"{self.folder} was prepared for another model: its {part} is {theirs.get(part)}, the model's {fingerprint[part]}")

    def read(self, i):
        """Sample i: expanded ids (T,), targets (T,) and its tiles_NCYX."""
        shard, row = self.shards[self.shard_of[i]], self.table[i]
        span = slice(row[FIRST_ID], row[FIRST_ID] + row[IDS])
        pictures = shard["pictures"][row[FIRST_PICTURE] : row[FIRST_PICTURE] + row[PICTURES]]
        counts = pictures[:, 1] * self.header["tokens_per_tile"]
        ids_T, trained = expand(shard["ids"][span], counts), shard["trained"][span]
        repeats = np.ones(len(trained), np.int64)
        repeats[shard["ids"][span] == IMAGE] = counts
        trained_T = np.repeat(trained, repeats)
        targets_T = np.full_like(ids_T, UNTRAINED)
        targets_T[:-1] = np.where(trained_T[1:], ids_T[1:], UNTRAINED)
        tiles_NCYX = np.concatenate([shard["tiles"][first : first + n] for first, n in pictures]) if len(pictures) else shard["tiles"][:0]
        return ids_T, targets_T, tiles_NCYX

    def split(self, validation):
        """The numbers of the samples for validation, or of the others."""
        return np.flatnonzero(self.table[:, HELD_OUT] == int(validation))


def pack(lengths, row, window=64):
    """Positions in `lengths`, in order, put into rows of at most `row` tokens: the fullest of `window` open rows that has room takes the next."""
    open_rows, room = [], np.zeros(0, np.int64)
    for i, length in enumerate(lengths):
        fits = np.flatnonzero(room >= length)
        if len(fits):
            best = fits[room[fits].argmin()]
            open_rows[best].append(i)
            room[best] -= length
            continue
        if len(open_rows) == window:
            fullest = room.argmin()
            yield open_rows.pop(fullest)
            room = np.delete(room, fullest)
        open_rows.append([i])
        room = np.append(room, row - length)
    yield from open_rows


def rows_forever(lengths, row, seed):
    """Packed rows without end, an epoch after another, each in an order of its own: a function of (seed, number of the row) and nothing else."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for members in pack(lengths[order], row):
            yield order[members]


def collate(samples, rows):
    """Rows of sample numbers -> the arguments of VLM.forward as a dict of tensors, with `names` beside them.

    Each sample is a document: positions restart at 0 and documents_BT counts up. Padding is document -1, trains nothing, and is no longer than
    the longest row needs.
    """
    read = [[samples.read(i) for i in members] for members in rows]
    T = max(sum(len(ids) for ids, _, _ in row) for row in read)
    ids_BT, positions_BT = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
    targets_BT, documents_BT = np.full((len(rows), T), UNTRAINED, np.int64), np.full((len(rows), T), -1, np.int32)
    for b, row in enumerate(read):
        start = 0
        for document, (ids_t, targets_t, _) in enumerate(row):
            span = slice(start, start + len(ids_t))
            ids_BT[b, span], targets_BT[b, span] = ids_t, targets_t
            positions_BT[b, span], documents_BT[b, span] = np.arange(len(ids_t)), document
            start = span.stop
    tiles_NCYX = np.concatenate([tiles for row in read for _, _, tiles in row])
    arrays = {"ids_BT": ids_BT, "targets_BT": targets_BT, "positions_BT": positions_BT, "documents_BT": documents_BT, "tiles_NCYX": tiles_NCYX}
    return {name: torch.from_numpy(a) for name, a in arrays.items()}, [samples.names[i] for members in rows for i in members]


class Loader:
    """Step after step, the micro-batches of one rank: a function of (seed, step), whatever the number of ranks and micro-batches.

    batch: rows of a step over all ranks; micro: rows of a micro-batch; start: the step to begin with.
    """

    def __init__(self, samples, *, row, batch, micro, seed, rank=0, world=1, start=0):
        self.samples, self.micro, self.rank, self.world = samples, micro, rank, world
        training = samples.split(validation=False)
        lengths = samples.table[training, LENGTH]
        if not len(training):
            raise Mistake(f"{samples.folder} holds no training samples")
        longest = samples.table[:, LENGTH].argmax()  # held-out samples too: validation packs them into the same rows
        if samples.table[longest, LENGTH] > row:
            raise Mistake(f"{samples.folder}: sample {samples.names[longest]} takes {samples.table[longest, LENGTH]} tokens, a row holds --row={row}")
        self.rows = (training[members] for members in rows_forever(lengths, row, seed))
        self.rows = itertools.islice(self.rows, start * batch, None)
        self.batch = batch

    def __next__(self):
        rows = list(itertools.islice(self.rows, self.batch))[self.rank :: self.world]
        return [collate(self.samples, rows[i : i + self.micro]) for i in range(0, len(rows), self.micro)]
