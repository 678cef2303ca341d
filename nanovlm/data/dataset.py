"""Prepared samples on disk.

A set is a folder: header.json, the tokenizer's own files, skipped.jsonl, and for each shard a folder of little-endian files, ready to be mapped:

    00000/tiles      uint8    (tiles, C, Y, X)    pictures, cut and resized, not yet normalised
    00000/pictures   int64    (pictures, 4)       first tile, number of tiles, width and height in pixels before cutting
    00000/ids        int32    (tokens,)           token ids, IMAGE (-1) once a picture
    00000/trained    uint8    (tokens,)           1 where the token is the assistant's
    00000/samples    int64    (samples, 6)        COLUMNS below
    00000/names      uint8    (bytes,)            UTF-8, a line a sample: the id in the source, for messages

header.json: version, fingerprint (of tokenizer, template, picture policy), and for each file of each shard [rows, crc32 of its bytes]. The tile's
shape and how many tokens a picture takes follow from the policy (images.places). Sample 7 by numpy alone:

    shard = "data/NAME/00000"
    first, count, picture, pictures, length, held_out = np.fromfile(f"{shard}/samples", "<i8").reshape(-1, 6)[7]
    ids = np.fromfile(f"{shard}/ids", "<i4")[first : first + count]
    trained = np.fromfile(f"{shard}/trained", "u1")[first : first + count]
    tile, tiles, width, height = np.fromfile(f"{shard}/pictures", "<i8").reshape(-1, 4)[picture]
    pixels = np.memmap(f"{shard}/tiles", "u1").reshape(-1, 3, 336, 336)[tile : tile + tiles]
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from ..files import OLD_NAMES, rename_keys
from . import image_processing

DATASET_VERSION = 3
READABLE_VERSIONS = (2, 3)  # the keys of version 2 are in files.OLD_NAMES
COLUMNS = FIRST_ID, ID_COUNT, FIRST_IMAGE, IMAGE_COUNT, LENGTH, IS_VALIDATION = range(
    6
)  # LENGTH counts tokens with every picture expanded
FILE_DTYPES = {
    "tiles": np.uint8,
    "pictures": np.int64,
    "ids": np.int32,
    "trained": np.uint8,
    "samples": np.int64,
    "names": np.uint8,
}
ROW_SHAPES = {"pictures": (4,), "samples": (len(COLUMNS),)}  # of a row; a tile's is the policy's
HEADER_KEYS = ("version", "fingerprint", "shards")


def make_fingerprint(owner):
    """What a prepared set must share with the model that reads it; owner: whatever has a tokenizer, a template and a picture policy."""
    return {
        "tokenizer": owner.tokenizer.fingerprint,
        "chat_template": owner.chat_template,
        "image_config": owner.image_config,
    }


def is_validation(name, share=1 / 64):
    """Whether a sample is for validation: a fixed hash of its id, so that it is the same in every set and every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") < share * 2**64


def check_sample_name(name):
    """Raise UserError unless an id can be written as one line of UTF-8."""
    if name.splitlines() != [name] or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(f"the id {name!r} is not one line of text", "id is not one line of text")


def token_repeats(ids, counts):
    """How often each of ids stands in a row: IMAGE as often as its picture has tokens (`counts`, in order), a word once."""
    places = np.asarray(ids) == IMAGE_TOKEN_ID
    if places.sum() != len(counts):
        raise UserError(
            f"{places.sum()} places for pictures but {len(counts)} pictures",
            "wrong number of <image>",
        )
    found = np.ones(len(ids), np.int64)
    found[places] = counts
    return found


def expand_image_tokens(ids, counts):
    """Each IMAGE repeated as often as its picture has tokens (`counts`, in order); ids: (tokens,) array -> int64 array."""
    return np.repeat(np.asarray(ids, np.int64), token_repeats(ids, counts))


def fsync_path(path):
    """Ask the disk to hold a file, or a folder's list of names, before we go on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---- writing ----


def write_shard(folder, policy, samples, receipt=dict):
    """Write samples, (name, ids, trained, [images.Picture]) each, into a folder of their own: under a temporary name, flushed, then renamed, so
    that a shard is whole or not there. Beside them goes receipt.json: receipt() once they are written, and `files`, {kind: [rows, crc32]}."""
    folder = Path(folder)
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    tmp.mkdir(parents=True)
    rows, sums = dict.fromkeys(FILE_DTYPES, 0), dict.fromkeys(FILE_DTYPES, 0)
    try:
        with ExitStack() as stack:
            files = {kind: stack.enter_context(open(tmp / kind, "wb")) for kind in FILE_DTYPES}

            def put(kind, array):
                array = np.ascontiguousarray(array, np.dtype(FILE_DTYPES[kind]).newbyteorder("<"))
                files[kind].write(array.data)
                rows[kind], sums[kind] = rows[kind] + len(array), zlib.crc32(array.data, sums[kind])

            for name, ids, trained, pictures in samples:
                counts = check_sample(name, ids, trained, pictures, policy)
                length = int(token_repeats(ids, counts).sum())
                put(
                    "samples",
                    [
                        [
                            rows["ids"],
                            len(ids),
                            rows["pictures"],
                            len(pictures),
                            length,
                            is_validation(name),
                        ]
                    ],
                )
                for tiles_NCYX, _, size in pictures:
                    put("pictures", [[rows["tiles"], len(tiles_NCYX), *size]])
                    put("tiles", tiles_NCYX)
                put("ids", ids)
                put("trained", trained)
                put("names", np.frombuffer(f"{name}\n".encode(), np.uint8))
        files = {kind: [rows[kind], sums[kind]] for kind in FILE_DTYPES}
        (tmp / "receipt.json").write_text(json.dumps({**receipt(), "files": files}))
        for path in tmp.iterdir():
            fsync_path(path)
        os.rename(tmp, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def check_sample(name, ids, trained, pictures, policy):
    """How many tokens each picture of a sample takes; UserError unless the sample could be read back."""
    check_sample_name(name)
    if len(ids) != len(trained):
        raise UserError(f"{name}: {len(ids)} ids but {len(trained)} marks of what is trained")
    tile = [3, policy["tile"], policy["tile"]]
    for tiles_NCYX, places, size in pictures:
        if tiles_NCYX.dtype != np.uint8 or list(tiles_NCYX.shape[1:]) != tile:
            raise UserError(
                f"{name}: tiles are {tiles_NCYX.dtype} {list(tiles_NCYX.shape[1:])}, the set's uint8 {tile}"
            )
        if len(places) != (want := len(image_processing.image_feature_index(size, policy, len(tiles_NCYX)))):
            raise UserError(
                f"{name}: a picture of {size} takes {len(places)} tokens, by its policy {want}"
            )
    return [len(places) for _, places, _ in pictures]


def write_header(folder, fingerprint, shards):
    """Make a folder of shards a set; shards: the `files` of each one's receipt."""
    path = Path(folder) / "header.json"
    half = path.with_suffix(".tmp")
    half.write_text(
        json.dumps({"version": DATASET_VERSION, "fingerprint": fingerprint, "shards": shards}, indent=1)
    )
    fsync_path(half)
    os.rename(half, path)


# ---- reading ----


def list_differences(theirs, ours, what, whose="the model's"):
    """What differs between two values, or in which keys two nested dicts do, with both values: a list of sentences."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            said
            for key in theirs | ours
            for said in list_differences(theirs.get(key), ours.get(key), f"{what} {key}", whose)
        ]
    return [] if theirs == ours else [f"{what} is {theirs}, {whose} {ours}"]


def read_header(folder):
    """header.json of a set, as a dict; UserError unless it is there, whole and of our VERSION."""
    path = folder / "header.json"
    if not path.is_file():
        lack = "it has no header.json" if folder.exists() else "no such folder"
        raise UserError(
            f"{folder} is no prepared data: {lack} (see `python prepare.py data --help`)"
        )
    try:
        header = rename_keys(json.loads(path.read_bytes()), OLD_NAMES["header.json"])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is broken ({type(error).__name__}: {error}): prepare it again"
        ) from None
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"{folder}: written in format {version}, this reads {DATASET_VERSION}: prepare it again"
        )
    if missing := [key for key in HEADER_KEYS if key not in header]:
        raise UserError(f"{path} does not say its {', '.join(missing)}: prepare it again")
    try:
        image_processing.check_image_config(header["fingerprint"]["image_config"])
        kinds = [
            {kind: [*map(type, numbers)] for kind, numbers in files.items()}
            for files in header["shards"]
        ]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is broken ({type(error).__name__}: {error}): prepare it again"
        ) from None
    if any(kind != dict.fromkeys(FILE_DTYPES, [int, int]) for kind in kinds):
        raise UserError(
            f"{path} does not give two numbers for each of {', '.join(FILE_DTYPES)} of each shard: prepare it again"
        )
    if not sum(files["samples"][0] for files in header["shards"]):
        raise UserError(f"{folder} holds no samples")
    return header


def map_file(path, dtype, rows, shape):
    """A file as an array (rows, *shape) that is read from disk as it is used; UserError if it has another size."""
    count = rows * math.prod(shape)
    want, got = count * np.dtype(dtype).itemsize, path.stat().st_size if path.exists() else 0
    if want != got:
        raise UserError(
            f"{path} has {got} bytes, its header says {want}: cut short or altered; prepare it again"
        )
    # numpy.memmap keeps its file open, of which a process may have 1,024; torch closes it once it is mapped.
    mapped = torch.from_file(
        str(path), shared=False, size=count, dtype=torch.from_numpy(np.empty(0, dtype)).dtype
    )
    return mapped.numpy().reshape(rows, *shape)


def check_spans(path, shard):
    """Raise UserError unless what the table of a shard says of its ids and pictures, and these of their tiles, lies in their files."""
    table, pictures = shard["samples"], shard["pictures"]
    spans = [
        (table[:, FIRST_ID], table[:, ID_COUNT], len(shard["ids"])),
        (table[:, FIRST_IMAGE], table[:, IMAGE_COUNT], len(pictures)),
        (pictures[:, 0], pictures[:, 1], len(shard["tiles"])),
    ]
    if any(
        ((first < 0) | (first > size) | (count < 0) | (count > size - first)).any()
        for first, count, size in spans
    ):
        raise UserError(f"{path} has samples that lie outside its files: altered; prepare it again")


class PreparedDataset:
    """The samples of one set or of several, one after another; tiles and ids are read from memory maps.

    table: (samples, COLUMNS); names: of each, its id in the source; set_of: of each, the number of its set.
    """

    def __init__(self, *folders):
        self.folders = [Path(folder) for folder in folders]
        headers = [read_header(folder) for folder in self.folders]
        self.fingerprint = headers[0]["fingerprint"]
        for folder, header in zip(self.folders, headers, strict=True):
            if wrong := list_differences(header["fingerprint"], self.fingerprint, "its"):
                raise UserError(
                    f"{folder} and {self.folders[0]} were prepared for different models: {'; '.join(wrong)}"
                )
        self.image_config = self.fingerprint["image_config"]
        paths = [
            (folder / f"{number:05d}", files)
            for folder, header in zip(self.folders, headers, strict=True)
            for number, files in enumerate(header["shards"])
        ]
        self.shards = [self._map(path, files) for path, files in paths]
        for (path, _), shard in zip(paths, self.shards, strict=True):
            check_spans(path, shard)
        tables = [shard.pop("samples") for shard in self.shards]
        self.table, sizes = np.concatenate(tables), list(map(len, tables))
        self.shard_of = np.repeat(np.arange(len(tables)), sizes)
        owners = [i for i, header in enumerate(headers) for _ in header["shards"]]
        self.set_of = np.repeat(owners, sizes)
        self.names = [
            name
            for (path, _), shard, size in zip(paths, self.shards, sizes, strict=True)
            for name in self._names(path, shard.pop("names"), size)
        ]

    def __str__(self):
        return ", ".join(map(str, self.folders))

    def _map(self, path, files):
        shapes = {"tiles": (3, self.image_config["tile"], self.image_config["tile"]), **ROW_SHAPES}
        return {
            kind: map_file(
                path / kind, np.dtype(dtype).newbyteorder("<"), files[kind][0], shapes.get(kind, ())
            )
            for kind, dtype in FILE_DTYPES.items()
        }

    def _names(self, path, letters, want):
        lines = letters.tobytes().split(b"\n")[:-1]
        if len(lines) != want:
            raise UserError(
                f"{path}/names has {len(lines)} names, its header says {want}: altered; prepare it again"
            )
        return [line.decode(errors="replace") for line in lines]

    def check_fingerprint(self, fingerprint):
        """Raise UserError unless the sets were prepared with this tokenizer, template and picture policy; says which part differs."""
        if wrong := list_differences(self.fingerprint, fingerprint, "its"):
            raise UserError(f"{self} was prepared for another model: {'; '.join(wrong)}")

    def stored_sample(self, i):
        """Sample i as it was written: ids with IMAGE once a picture, marks of what is trained, pictures."""
        shard, row = self.shards[self.shard_of[i]], self.table[i]
        span = slice(row[FIRST_ID], row[FIRST_ID] + row[ID_COUNT])
        rows = shard["pictures"][row[FIRST_IMAGE] : row[FIRST_IMAGE] + row[IMAGE_COUNT]].tolist()
        pictures = [
            image_processing.ProcessedImage(
                shard["tiles"][first : first + n],
                image_processing.image_feature_index(size, self.image_config, n),
                tuple(size),
            )
            for first, n, *size in rows
        ]
        return shard["ids"][span], shard["trained"][span], pictures

    def read(self, i):
        """Sample i: its expanded ids (T,), targets (T,), and its pictures, images.Picture each, the tiles still in their file."""
        ids, trained, pictures = self.stored_sample(i)
        times = token_repeats(ids, [len(picture.feature_index) for picture in pictures])
        ids_T, trained_T = np.repeat(ids.astype(np.int64), times), np.repeat(trained, times)
        targets_T = np.full_like(ids_T, IGNORE_INDEX)
        targets_T[:-1] = np.where(trained_T[1:], ids_T[1:], IGNORE_INDEX)
        return ids_T, targets_T, pictures

    def split(self, validation):
        """The numbers of the samples for validation, or of the others."""
        return np.flatnonzero(self.table[:, IS_VALIDATION] == int(validation))


def write_subset(samples, members, folder):
    """Some of the samples, by their numbers, as a set of their own with the tokenizer's files of the set that they come from."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt at the same step
    write_shard(
        folder / "00000", samples.image_config, ((samples.names[i], *samples.stored_sample(i)) for i in members)
    )
    for path in samples.folders[0].iterdir():
        if path.is_file() and path.name not in ("header.json", "skipped.jsonl"):
            shutil.copy(path, folder)
    write_header(
        folder,
        samples.fingerprint,
        [json.loads((folder / "00000" / "receipt.json").read_text())["files"]],
    )


def verify_checksums(folder):
    """[a sentence for each file of a set whose bytes are not those that were written], by their checksums."""
    folder, wrong = Path(folder), []
    for number, files in enumerate(read_header(folder)["shards"]):
        for kind, (_, want) in files.items():
            path, found = folder / f"{number:05d}" / kind, 0
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    found = zlib.crc32(chunk, found)
            if found != want:
                wrong.append(f"{path}: its bytes have the checksum {found}, its header says {want}")
    return wrong
