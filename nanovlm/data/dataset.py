"""Prepared datasets on disk: token ids, loss mask and tiles, ready for training.

A prepared dataset is a folder: header.json, the tokenizer's own files, skipped.jsonl, and a folder
per shard with little-endian files, which are memory-mapped:

    00000/tiles      uint8    (tiles, C, Y, X)    images, resized and cut, not yet normalized
    00000/images     int64    (images, 4)         first tile, number of tiles, width and height in
                                                  pixels before cutting
    00000/ids        int32    (tokens,)           token ids, IMAGE_TOKEN_ID (-1) once per image
    00000/loss_mask  uint8    (tokens,)           1 if the token is the assistant's
    00000/samples    int64    (samples, 6)        COLUMNS below
    00000/names      uint8    (bytes,)            UTF-8, a line per sample: its id in the source

header.json: version, fingerprint (tokenizer, chat template, image config), and for each file of
each shard [rows, crc32 of its bytes]. The shape of a tile and the number of tokens of an image
follow from the image config (image_processing.image_feature_index). Sample 7, read by numpy alone:

    shard = "data/NAME/00000"
    samples = np.fromfile(f"{shard}/samples", "<i8").reshape(-1, 6)
    first, count, image, images, length, is_validation = samples[7]
    ids = np.fromfile(f"{shard}/ids", "<i4")[first : first + count]
    loss_mask = np.fromfile(f"{shard}/loss_mask", "u1")[first : first + count]
    tile, tiles, width, height = np.fromfile(f"{shard}/images", "<i8").reshape(-1, 4)[image]
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
from ..files import OLD_NAMES, fsync_path, rename_keys
from . import image_processing

DATASET_VERSION = 3
READABLE_DATASET_VERSIONS = (2, 3)
# Version 2 has other names: for the keys of header.json those of files.OLD_NAMES, for files these.
VERSION_2_FILES = {"images": "pictures", "loss_mask": "trained"}
# LENGTH: tokens of the sample, with the tokens of its images
COLUMNS = FIRST_ID, ID_COUNT, FIRST_IMAGE, IMAGE_COUNT, LENGTH, IS_VALIDATION = range(6)
FILE_DTYPES = {
    "tiles": np.uint8,
    "images": np.int64,
    "ids": np.int32,
    "loss_mask": np.uint8,
    "samples": np.int64,
    "names": np.uint8,
}
# shape of one row of a file; that of a tile follows from the image config
ROW_SHAPES = {"images": (4,), "samples": (len(COLUMNS),)}
HEADER_KEYS = ("version", "fingerprint", "shards")


def make_fingerprint(owner):
    """Returns what a dataset must share with the model that is trained on it.

    owner: any object with a tokenizer, a chat_template and an image_config.
    """
    return {
        "tokenizer": owner.tokenizer.fingerprint,
        "chat_template": owner.chat_template,
        "image_config": owner.image_config,
    }


def is_validation(name, share=1 / 64):
    """Returns whether a sample is for validation: a fixed hash of its id, in every dataset."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") < share * 2**64


def check_sample_name(name):
    """Raises UserError if an id cannot be written as one line of UTF-8."""
    if name.splitlines() != [name] or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(f"the id {name!r} is not one line of text", "id is not one line of text")


def token_repeats(ids, counts):
    """Returns how often each id is repeated in the model's input: an array.

    An image token is repeated once per token of its image (`counts`, in order), others are not.
    """
    is_image = np.asarray(ids) == IMAGE_TOKEN_ID
    if is_image.sum() != len(counts):
        raise UserError(
            f"{is_image.sum()} image tokens but {len(counts)} images", "wrong number of <image>"
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[is_image] = counts
    return repeats


def expand_image_tokens(ids, counts):
    """Returns ids (tokens,) with each image token repeated once per token of its image: int64.

    counts: tokens of each image, in order.
    """
    return np.repeat(np.asarray(ids, np.int64), token_repeats(ids, counts))


# ---- writing ----


def write_shard(folder, image_config, samples, receipt=dict):
    """Write samples, (name, ids, loss_mask, [ProcessedImage]) each, as a shard into a new folder.

    It is written under a temporary name, flushed, then renamed, so a shard is complete or missing.
    receipt.json holds what receipt() returns after the last sample, and `files`: {kind: [rows,
    crc32]}.
    """
    folder = Path(folder)
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    tmp.mkdir(parents=True)
    try:
        rows, checksums = write_shard_files(tmp, image_config, samples)
        files = {kind: [rows[kind], checksums[kind]] for kind in FILE_DTYPES}
        (tmp / "receipt.json").write_text(json.dumps({**receipt(), "files": files}))
        for path in tmp.iterdir():
            fsync_path(path)
        os.rename(tmp, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_shard_files(folder, image_config, samples):
    """Write the files of a shard; returns the number of rows and the checksum of each."""
    rows, checksums = dict.fromkeys(FILE_DTYPES, 0), dict.fromkeys(FILE_DTYPES, 0)
    with ExitStack() as stack:
        files = {kind: stack.enter_context(open(folder / kind, "wb")) for kind in FILE_DTYPES}

        def append(kind, array):
            array = np.ascontiguousarray(array, np.dtype(FILE_DTYPES[kind]).newbyteorder("<"))
            files[kind].write(array.data)
            rows[kind] += len(array)
            checksums[kind] = zlib.crc32(array.data, checksums[kind])

        for name, ids, loss_mask, images in samples:
            counts = check_sample(name, ids, loss_mask, images, image_config)
            length = int(token_repeats(ids, counts).sum())
            row = [rows["ids"], len(ids), rows["images"], len(images), length, is_validation(name)]
            append("samples", [row])
            for tiles_NCYX, _, size in images:
                append("images", [[rows["tiles"], len(tiles_NCYX), *size]])
                append("tiles", tiles_NCYX)
            append("ids", ids)
            append("loss_mask", loss_mask)
            append("names", np.frombuffer(f"{name}\n".encode(), np.uint8))
    return rows, checksums


def check_sample(name, ids, loss_mask, images, image_config):
    """Returns the number of tokens of each image of a sample.

    Raises UserError if the sample could not be read back.
    """
    check_sample_name(name)
    if len(ids) != len(loss_mask):
        raise UserError(f"{name}: {len(ids)} ids but a loss mask of {len(loss_mask)}")
    shape = [3, image_config["tile"], image_config["tile"]]
    for tiles_NCYX, feature_index, size in images:
        if tiles_NCYX.dtype != np.uint8 or list(tiles_NCYX.shape[1:]) != shape:
            raise UserError(
                f"{name}: tiles are {tiles_NCYX.dtype} {list(tiles_NCYX.shape[1:])}, "
                f"the dataset's uint8 {shape}"
            )
        index = image_processing.image_feature_index(size, image_config, len(tiles_NCYX))
        if len(feature_index) != len(index):
            raise UserError(
                f"{name}: an image of {size} takes {len(feature_index)} tokens, "
                f"by its image config {len(index)}"
            )
    return [len(feature_index) for _, feature_index, _ in images]


def write_header(folder, fingerprint, shards):
    """Write header.json, which makes a folder of shards a dataset.

    shards: `files` of the receipt of each shard.
    """
    path = Path(folder) / "header.json"
    tmp = path.with_suffix(".tmp")
    header = {"version": DATASET_VERSION, "fingerprint": fingerprint, "shards": shards}
    tmp.write_text(json.dumps(header, indent=1))
    fsync_path(tmp)
    os.rename(tmp, path)


# ---- reading ----


def list_differences(value, expected, name, owner="the model's"):
    """Returns a sentence, with both values, for each key in which two nested dicts differ."""
    if not isinstance(value, dict) or not isinstance(expected, dict):
        return [] if value == expected else [f"{name} is {value}, {owner} {expected}"]
    differences = []
    for key in value | expected:
        differences += list_differences(value.get(key), expected.get(key), f"{name} {key}", owner)
    return differences


def read_header(folder):
    """Returns the header.json of a dataset as a dict, with today's names.

    Raises UserError if it is missing, broken or of a version that is not in
    READABLE_DATASET_VERSIONS.
    """
    path = folder / "header.json"
    if not path.is_file():
        error = "it has no header.json" if folder.exists() else "no such folder"
        raise UserError(
            f"{folder} is no prepared dataset: {error} (see `python prepare.py data --help`)"
        )
    old_names = OLD_NAMES["header.json"] | {old: new for new, old in VERSION_2_FILES.items()}
    try:
        header = rename_keys(json.loads(path.read_bytes()), old_names)
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is broken ({type(error).__name__}: {error}): prepare it again"
        ) from None
    if version not in READABLE_DATASET_VERSIONS:
        raise UserError(
            f"{folder} has format version {version}, this nanovlm reads "
            f"{' and '.join(map(str, READABLE_DATASET_VERSIONS))}: prepare it again"
        )
    if missing := [key for key in HEADER_KEYS if key not in header]:
        raise UserError(f"{path} lacks {', '.join(missing)}: prepare it again")
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
            f"{path} does not give two numbers for each of {', '.join(FILE_DTYPES)} "
            "of each shard: prepare it again"
        )
    if not sum(files["samples"][0] for files in header["shards"]):
        raise UserError(f"{folder} holds no samples")
    return header


def shard_file(folder, kind, version):
    """Returns the path of a file of a shard, which has another name in version 2."""
    return folder / (VERSION_2_FILES.get(kind, kind) if version == 2 else kind)


def map_file(path, dtype, rows, shape):
    """Returns a memory-mapped file as an array (rows, *shape).

    Raises UserError if it has another size.
    """
    count = rows * math.prod(shape)
    expected = count * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, its header has {expected}: cut short or altered; "
            "prepare it again"
        )
    # numpy.memmap keeps its file open, and a process may have 1,024; torch closes it once mapped.
    torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    mapped = torch.from_file(str(path), shared=False, size=count, dtype=torch_dtype)
    return mapped.numpy().reshape(rows, *shape)


def check_spans(path, shard):
    """Raises UserError if samples or images of a shard point outside its files."""
    table, images = shard["samples"], shard["images"]
    spans = [
        (table[:, FIRST_ID], table[:, ID_COUNT], len(shard["ids"])),
        (table[:, FIRST_IMAGE], table[:, IMAGE_COUNT], len(images)),
        (images[:, 0], images[:, 1], len(shard["tiles"])),
    ]
    for first, count, size in spans:
        if ((first < 0) | (first > size) | (count < 0) | (count > size - first)).any():
            raise UserError(
                f"{path} has samples that lie outside its files: altered; prepare it again"
            )


def read_names(path, letters, count):
    """Returns the ids of a shard's samples; letters: the bytes of its file of names."""
    lines = letters.tobytes().split(b"\n")[:-1]
    if len(lines) != count:
        raise UserError(
            f"{path}/names has {len(lines)} names, its header has {count}: altered; "
            "prepare it again"
        )
    return [line.decode(errors="replace") for line in lines]


class PreparedDataset:
    """The samples of one or several prepared datasets, one after another; memory-mapped.

    table: (samples, COLUMNS); names: the id of each sample in its source; set_of: the number of the
    dataset of each sample.
    """

    def __init__(self, *folders):
        self.folders = [Path(folder) for folder in folders]
        headers = [read_header(folder) for folder in self.folders]
        self.fingerprint = headers[0]["fingerprint"]
        self.image_config = self.fingerprint["image_config"]
        self.shards, self.names, tables, set_numbers = [], [], [], []
        for folder, header in zip(self.folders, headers, strict=True):
            if wrong := list_differences(header["fingerprint"], self.fingerprint, "its"):
                raise UserError(
                    f"{folder} and {self.folders[0]} were prepared for different models: "
                    + "; ".join(wrong)
                )
        for number, (folder, header) in enumerate(zip(self.folders, headers, strict=True)):
            for shard_number, files in enumerate(header["shards"]):
                path = folder / f"{shard_number:05d}"
                shard = self._map_shard(path, files, header["version"])
                check_spans(path, shard)
                table = shard.pop("samples")
                self.names += read_names(path, shard.pop("names"), len(table))
                self.shards.append(shard)
                tables.append(table)
                set_numbers.append(number)
        sizes = list(map(len, tables))
        self.table = np.concatenate(tables)
        self.shard_of = np.repeat(np.arange(len(tables)), sizes)
        self.set_of = np.repeat(set_numbers, sizes)

    def __str__(self):
        return ", ".join(map(str, self.folders))

    def _map_shard(self, path, files, version):
        shapes = {"tiles": (3, self.image_config["tile"], self.image_config["tile"]), **ROW_SHAPES}
        shard = {}
        for kind, dtype in FILE_DTYPES.items():
            dtype = np.dtype(dtype).newbyteorder("<")
            file = shard_file(path, kind, version)
            shard[kind] = map_file(file, dtype, files[kind][0], shapes.get(kind, ()))
        return shard

    def check_fingerprint(self, fingerprint):
        """Raises UserError if the datasets were prepared for another tokenizer, chat template or
        image config; it names the part that differs."""
        if wrong := list_differences(self.fingerprint, fingerprint, "its"):
            raise UserError(f"{self} was prepared for another model: {'; '.join(wrong)}")

    def stored_sample(self, i):
        """Returns (ids, loss_mask, images) of sample i as written: one image token per image."""
        shard, row = self.shards[self.shard_of[i]], self.table[i]
        span = slice(row[FIRST_ID], row[FIRST_ID] + row[ID_COUNT])
        image_rows = shard["images"][row[FIRST_IMAGE] : row[FIRST_IMAGE] + row[IMAGE_COUNT]]
        images = []
        for first, count, *size in image_rows.tolist():
            index = image_processing.image_feature_index(size, self.image_config, count)
            tiles_NCYX = shard["tiles"][first : first + count]
            images.append(image_processing.ProcessedImage(tiles_NCYX, index, tuple(size)))
        return shard["ids"][span], shard["loss_mask"][span], images

    def read(self, i):
        """Returns (ids_T, targets_T, images) of sample i, with a ProcessedImage per image.

        Its image tokens are repeated once per token of the image. targets_T are the labels: the
        next token's id if the loss mask is 1 there, else IGNORE_INDEX. The tiles are still on disk.
        """
        ids, loss_mask, images = self.stored_sample(i)
        repeats = token_repeats(ids, [len(image.feature_index) for image in images])
        ids_T, loss_mask_T = np.repeat(ids.astype(np.int64), repeats), np.repeat(loss_mask, repeats)
        targets_T = np.full_like(ids_T, IGNORE_INDEX)
        targets_T[:-1] = np.where(loss_mask_T[1:], ids_T[1:], IGNORE_INDEX)
        return ids_T, targets_T, images

    def split(self, validation):
        """Returns the numbers of the samples for validation, or of those for training."""
        return np.flatnonzero(self.table[:, IS_VALIDATION] == int(validation))


def write_subset(samples, members, folder):
    """Write some samples, by their numbers, as a dataset of its own, with the tokenizer's files."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt at the same step
    subset = ((samples.names[i], *samples.stored_sample(i)) for i in members)
    write_shard(folder / "00000", samples.image_config, subset)
    for path in samples.folders[0].iterdir():
        if path.is_file() and path.name not in ("header.json", "skipped.jsonl"):
            shutil.copy(path, folder)
    receipt = json.loads((folder / "00000" / "receipt.json").read_text())
    write_header(folder, samples.fingerprint, [receipt["files"]])


def verify_checksums(folder):
    """Returns a sentence for each file of a dataset whose bytes differ from those written."""
    folder, errors = Path(folder), []
    header = read_header(folder)
    for number, files in enumerate(header["shards"]):
        for kind, (_, expected) in files.items():
            path, checksum = shard_file(folder / f"{number:05d}", kind, header["version"]), 0
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    checksum = zlib.crc32(chunk, checksum)
            if checksum != expected:
                errors.append(
                    f"{path}: its bytes have the checksum {checksum}, its header has {expected}"
                )
    return errors
