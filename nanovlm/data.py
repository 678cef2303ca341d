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
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import torch

from . import IMAGE, UNTRAINED, Mistake

VERSION = 1
COLUMNS = FIRST_ID, IDS, FIRST_PICTURE, PICTURES, LENGTH, HELD_OUT = range(6)  # LENGTH counts tokens with every picture expanded
KINDS = {"tiles": np.uint8, "pictures": np.int64, "ids": np.int32, "trained": np.uint8, "samples": np.int64}
HEADER = ("version", "fingerprint", "tokens_per_tile", "tile", "shards")
SHARD_BYTES = 1 << 34  # of tiles; each shard keeps four files open, and a process may have 1,024


def held_out(name, share=1 / 64):
    """Whether a sample is for validation: a fixed hash of its id, so that it is the same in every set and every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") < share * 2**64


def check_name(name):
    """Raise Mistake unless an id can be written as one line of UTF-8."""
    if name.splitlines() != [name] or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise Mistake(f"the id {name!r} is not one line of text")


def repeats(ids, counts):
    """How often each of ids stands in a row: IMAGE as often as its picture has tokens (`counts`, in order), a word once."""
    images = np.asarray(ids) == IMAGE
    if images.sum() != len(counts):
        raise Mistake(f"{images.sum()} places for pictures but {len(counts)} pictures")
    found = np.ones(len(ids), np.int64)
    found[images] = counts
    return found


def expand(ids, counts):
    """Each IMAGE repeated as often as its picture has tokens (`counts`, in order); ids: (tokens,) array -> int64 array."""
    return np.repeat(np.asarray(ids, np.int64), repeats(ids, counts))


def sync(path):
    """Ask the disk to hold a folder's list of names before we go on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


class Writer:
    """Appends samples to shards in `out`.tmp; closing it writes the header and gives the folder its name: a set is whole or not there.

    In a `with` block it closes at the end, and an error leaves nothing behind. A full disk is an OSError that names the set.
    """

    def __init__(self, out, *, fingerprint, tokens_per_tile, tile):
        self.out = Path(out)
        self.tmp = self.out.with_name(f"{self.out.name}.tmp")
        if self.out.exists():
            raise Mistake(f"{out} is there already: remove it or name another --out")
        shutil.rmtree(self.tmp, ignore_errors=True)  # what a killed writer left
        self.tmp.mkdir(parents=True)
        self.header = {"version": VERSION, "fingerprint": fingerprint, "tokens_per_tile": tokens_per_tile, "tile": [3, tile, tile], "shards": []}
        self.files = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.close()
        finally:
            for file in self.files.values():
                with contextlib.suppress(OSError):  # a full disk has no room for what is still in its buffer
                    file.close()
            shutil.rmtree(self.tmp, ignore_errors=True)

    @contextlib.contextmanager
    def _naming(self):
        try:
            yield
        except OSError as error:
            error.filename = str(self.out)
            raise

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
        """One sample; name: a line of text; pictures: a list of tiles_NCYX (uint8), one for each IMAGE among the ids."""
        check_name(name)
        if len(ids) != len(trained):
            raise Mistake(f"{name}: {len(ids)} ids but {len(trained)} marks of what is trained")
        for tiles_NCYX in pictures:
            if tiles_NCYX.dtype != np.uint8 or list(tiles_NCYX.shape[1:]) != self.header["tile"]:
                raise Mistake(f"{name}: tiles are {tiles_NCYX.dtype} {list(tiles_NCYX.shape[1:])}, the set's uint8 {self.header['tile']}")
        length = int(repeats(ids, [len(tiles_NCYX) * self.header["tokens_per_tile"] for tiles_NCYX in pictures]).sum())
        with self._naming():
            if not self.files or self.rows["tiles"] * math.prod(self.header["tile"]) >= SHARD_BYTES:
                self._finish()
                self._open()
            row = [self.rows["ids"], len(ids), self.rows["pictures"], len(pictures), length, held_out(name)]
            for tiles_NCYX in pictures:
                self._put("pictures", [[self.rows["tiles"], len(tiles_NCYX)]])
                self._put("tiles", tiles_NCYX)
            self._put("ids", ids)
            self._put("trained", trained)
            self._put("samples", [row])
            self.files["names"].write(f"{name}\n".encode())

    def _finish(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def close(self):
        with self._naming():
            self._finish()
            self.files = {"header": open(self.tmp / "header.json", "wb")}
            self.files["header"].write(json.dumps(self.header, indent=1).encode())
            self._finish()
            sync(self.tmp)
            os.rename(self.tmp, self.out)
            sync(self.out.parent)


def differences(theirs, ours, what):
    """What differs between two values, or in which keys two nested dicts do, with both values: a list of sentences."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [said for key in theirs | ours for said in differences(theirs.get(key), ours.get(key), f"{what} {key}")]
    return [] if theirs == ours else [f"{what} is {theirs}, the model's {ours}"]


def read_header(folder):
    """header.json of a set, as a dict; Mistake unless it is there, whole and of our VERSION."""
    path = folder / "header.json"
    if not path.is_file():
        lack = "it has no header.json" if folder.exists() else "no such folder"
        raise Mistake(f"{folder} is no prepared data: {lack} (see `python prepare.py data --help`)")
    try:
        header = json.loads(path.read_bytes())
        version = header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{path} is broken ({type(error).__name__}: {error}): prepare it again") from None
    if version != VERSION:
        raise Mistake(f"{folder}: written in format {version}, this reads {VERSION}: prepare it again")
    if missing := [key for key in HEADER if key not in header]:
        raise Mistake(f"{path} does not say its {', '.join(missing)}: prepare it again")
    if not header["shards"]:
        raise Mistake(f"{folder} holds no samples")
    return header


class Samples:
    """The samples of one set, read from memory maps."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.shards = [self._map(number, rows) for number, rows in enumerate(self.header["shards"])]
        tables = [shard.pop("samples") for shard in self.shards]
        self.table = np.concatenate(tables)
        self.shard_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self.names = [name for number, table in enumerate(tables) for name in self._names(number, len(table))]

    def _map(self, number, rows):
        shapes = {"tiles": self.header["tile"], "pictures": [2], "samples": [len(COLUMNS)]}
        maps = {}
        for kind, dtype in KINDS.items():
            path, shape = self.folder / f"{number:05d}.{kind}", (rows[kind], *shapes.get(kind, []))
            want, got = math.prod(shape) * np.dtype(dtype).itemsize, path.stat().st_size if path.exists() else 0
            if want != got:
                raise Mistake(f"{path} has {got} bytes, its header says {want}: cut short or altered; prepare it again")
            maps[kind] = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", shape=shape) if want else np.zeros(shape, dtype)
        return maps

    def _names(self, number, want):
        path = self.folder / f"{number:05d}.names"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if len(lines) != want:
            raise Mistake(f"{path} has {len(lines)} names, its header says {want}: cut short or altered; prepare it again")
        return [line.decode(errors="replace") for line in lines]

    def check_fingerprint(self, fingerprint):
        """Raise Mistake unless the set was prepared with this tokenizer, template and picture policy; says which part differs."""
        if wrong := differences(self.header["fingerprint"], fingerprint, "its"):
            raise Mistake(f"{self.folder} was prepared for another model: {'; '.join(wrong)}")

    def read(self, i):
        """Sample i: expanded ids (T,), targets (T,) and its tiles_NCYX."""
        shard, row = self.shards[self.shard_of[i]], self.table[i]
        span = slice(row[FIRST_ID], row[FIRST_ID] + row[IDS])
        pictures = shard["pictures"][row[FIRST_PICTURE] : row[FIRST_PICTURE] + row[PICTURES]]
        times = repeats(shard["ids"][span], pictures[:, 1] * self.header["tokens_per_tile"])
        ids_T, trained_T = np.repeat(shard["ids"][span].astype(np.int64), times), np.repeat(shard["trained"][span], times)
        targets_T = np.full_like(ids_T, UNTRAINED)
        targets_T[:-1] = np.where(trained_T[1:], ids_T[1:], UNTRAINED)
        tiles_NCYX = np.concatenate([shard["tiles"][first : first + n] for first, n in pictures]) if len(pictures) else shard["tiles"][:0]
        return ids_T, targets_T, tiles_NCYX

    def split(self, validation):
        """The numbers of the samples for validation, or of the others."""
        return np.flatnonzero(self.table[:, HELD_OUT] == int(validation))


def pack(lengths, row, window=64):
    """Positions in `lengths`, in order, put into rows of at most `row` tokens: the fullest of `window` open rows that has room takes the next."""
    open_rows, numbers = [], itertools.count()  # (room, number, members), kept in order: the fullest first
    for i, length in enumerate(np.asarray(lengths).tolist()):
        at = bisect_left(open_rows, (length,))
        if at < len(open_rows):
            room, number, members = open_rows.pop(at)
            insort(open_rows, (room - length, number, [*members, i]))
            continue
        if len(open_rows) == window:
            yield open_rows.pop(0)[2]
        insort(open_rows, (row - length, next(numbers), [i]))
    yield from (members for _, _, members in sorted(open_rows, key=lambda opened: opened[1]))


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
