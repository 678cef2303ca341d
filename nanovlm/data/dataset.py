"""Prepared datasets on disk: token ids, loss mask and tiles, ready for training.

A prepared dataset is a folder: header.json, the tokenizer's own files, skipped.jsonl, and a folder
per shard with little-endian files, which are memory-mapped:

    00000/tiles      uint8    (tiles, C, Y, X)    images, resized and cut, not yet normalized
    00000/images     int64    (images, 4)         first tile, number of tiles, width and height in
                                                  pixels before cutting; several may show the same
                                                  tiles
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

import functools
import hashlib
import json
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from ..files import fsync_path, read_json
from . import image_processing

DATASET_VERSION = 4  # in versions 2 and 3 each image has tiles of its own
READABLE_DATASET_VERSIONS = (2, 3, 4)
# names of a shard's files in version 2 (for the keys of its header.json see files.OLD_NAMES)
VERSION_2_FILES = {"pictures": "images", "trained": "loss_mask"}
# LENGTH: tokens of the sample, with the tokens of its images
COLUMNS = FIRST_ID, ID_COUNT, FIRST_IMAGE, IMAGE_COUNT, LENGTH, IS_VALIDATION = range(6)
FILE_DTYPES = {
    "tiles": "u1",
    "images": "<i8",
    "ids": "<i4",
    "loss_mask": "u1",
    "samples": "<i8",
    "names": "u1",
}


def make_fingerprint(owner):
    """Returns what a dataset must share with the model that is trained on it.

    owner: any object with a tokenizer, a chat_template and an image_config.
    """
    return {
        "tokenizer": owner.tokenizer.fingerprint,
        "chat_template": owner.chat_template,
        "image_config": owner.image_config,
    }


def is_validation(name):
    """Returns whether a sample is for validation: one of 64, by a hash of its id."""
    return hashlib.sha256(name.encode()).digest()[7] < 256 // 64  # any byte is as good


def check_sample_name(name):
    """Raises UserError if an id cannot be written as one line of UTF-8."""
    # A lone surrogate, which UTF-8 has not, becomes "?".
    if name.splitlines() != [name.encode(errors="replace").decode()]:
        raise UserError(f"the id {name!r} is not one line of text", "id is not one line of text")


def tiles_key(tiles_NCYX):
    """Returns where tiles lie in memory: two images with the same key show the same tiles."""
    return tiles_NCYX.ctypes.data, len(tiles_NCYX)


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


def write_shard(folder, image_config, samples, receipt={}):
    """Write samples, (name, ids, loss_mask, [ProcessedImage]) each, as a shard into a new folder.

    folder: a Path. It is written under a temporary name, flushed, then renamed, so a shard is
    complete or missing.
    Returns `files`: {kind: [rows, crc32]}. receipt.json holds them and the items of the dict
    `receipt`, which is read after the last sample.
    """
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    tmp.mkdir(parents=True)
    try:
        files = write_shard_files(tmp, image_config, samples)
        (tmp / "receipt.json").write_text(json.dumps(receipt | {"files": files}))
        for path in tmp.iterdir():
            fsync_path(path)
        os.rename(tmp, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return files


def write_shard_files(folder, image_config, samples):
    """Write the files of a shard; returns {kind: [rows, crc32]}.

    Tiles that the sample before shows, too, are written once.
    """
    tile_count, checksum = 0, 0
    written = {}  # tiles_key of the last sample's tiles -> (first tile, the tiles)
    rows = {kind: [] for kind in FILE_DTYPES if kind != "tiles"}
    with open(folder / "tiles", "wb") as file:  # too many bytes to keep until the end
        for name, ids, loss_mask, images in samples:
            counts = check_sample(name, ids, loss_mask, images, image_config)
            length = len(expand_image_tokens(ids, counts))
            spans = [len(rows["ids"]), len(ids), len(rows["images"]), len(images)]
            rows["samples"].append([*spans, length, is_validation(name)])
            keys = [tiles_key(image.tiles) for image in images]
            written = {key: written[key] for key in keys if key in written}
            for key, (tiles_NCYX, _, size) in zip(keys, images, strict=True):
                if key not in written:
                    content = tiles_NCYX.tobytes()
                    file.write(content)
                    checksum = zlib.crc32(content, checksum)
                    # Kept, so that no other tiles get their address in memory.
                    written[key] = tile_count, tiles_NCYX
                    tile_count += len(tiles_NCYX)
                rows["images"].append([written[key][0], len(tiles_NCYX), *size])
            rows["ids"].extend(ids)  # list += array would add numbers
            rows["loss_mask"].extend(loss_mask)
            rows["names"] += f"{name}\n".encode()
    files = {"tiles": [tile_count, checksum]}
    for kind, values in rows.items():
        array = np.array(values, FILE_DTYPES[kind])
        (folder / kind).write_bytes(array)
        files[kind] = [len(array), zlib.crc32(array.data)]
    return files


def check_sample(name, ids, loss_mask, images, image_config):
    """Returns the number of tokens of each image of a sample.

    Raises UserError if the sample could not be read back.
    """
    check_sample_name(name)
    if len(ids) != len(loss_mask):
        raise UserError(f"{name}: {len(ids)} ids but a loss mask of {len(loss_mask)}")
    expected = f"uint8 {[3, image_config['tile'], image_config['tile']]}"
    counts = []
    for tiles_NCYX, _, size in images:
        found = f"{tiles_NCYX.dtype} {list(tiles_NCYX.shape[1:])}"
        if found != expected:
            raise UserError(f"{name}: tiles are {found}, the dataset's {expected}")
        index = image_processing.image_feature_index(size, image_config, len(tiles_NCYX))
        counts.append(len(index))
    return counts


def write_header(folder, fingerprint, shards):
    """Write header.json, which makes a folder of shards a dataset.

    shards: `files` of each shard, which write_shard returns.
    """
    tmp = Path(folder) / "header.tmp"
    header = {"version": DATASET_VERSION, "fingerprint": fingerprint, "shards": shards}
    tmp.write_text(json.dumps(header, indent=1))
    fsync_path(tmp)
    os.rename(tmp, tmp.with_suffix(".json"))


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
    """Returns (fingerprint, shards) of a dataset; shards: {kind: (path, rows, crc32)} each.

    Raises UserError if its header.json is missing, broken or of a version that is not in
    READABLE_DATASET_VERSIONS.
    """
    path = folder / "header.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a prepared dataset, it has no header.json: "
            "see `python prepare.py data --help`"
        )
    shards = []
    try:
        header = read_json(path, "version", "fingerprint", "shards")
        if header["version"] not in READABLE_DATASET_VERSIONS:
            raise UserError(
                f"version is {header['version']}, this nanovlm reads {READABLE_DATASET_VERSIONS}"
            )
        image_processing.check_image_config(header["fingerprint"]["image_config"])
        for number, files in enumerate(header["shards"]):
            shard = {}
            for name, (rows, checksum) in files.items():
                kind = VERSION_2_FILES.get(name, name)
                shard[kind] = folder / f"{number:05d}" / name, int(rows), checksum
            if shard.keys() != FILE_DTYPES.keys():
                raise UserError(f"a shard has {[*shard]}, it must have {[*FILE_DTYPES]}")
            shards.append(shard)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): prepare it again"
        ) from None
    if not any(shard["samples"][1] for shard in shards):
        raise UserError(f"{folder} holds no samples")
    return header["fingerprint"], shards


def map_file(path, dtype, rows, shape):
    """Returns a memory-mapped file as an array (rows, *shape).

    Raises UserError if it has another size.
    """
    expected = rows * math.prod(shape) * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, its header has {expected}: cut short or altered; "
            "prepare it again"
        )
    # numpy.memmap keeps its file open, and a process may have 1,024; torch closes it once mapped.
    mapped = torch.from_file(str(path), size=expected, dtype=torch.uint8).numpy()
    return mapped.view(dtype).reshape(rows, *shape)


def map_shard(files, tile, count_tokens):
    """Returns {kind: array} of a shard's memory-mapped files; `names` is a list of texts.

    files: of read_header; tile: width and height of a tile in pixels; count_tokens: of
    is_consistent. Raises UserError if a file has another size, or if is_consistent says no.
    """
    shapes = {"tiles": (3, tile, tile), "images": (4,), "samples": (len(COLUMNS),)}
    shard = {}
    for kind, (path, rows, _) in files.items():
        shard[kind] = map_file(path, FILE_DTYPES[kind], rows, shapes.get(kind, ()))
    shard["names"] = shard["names"].tobytes().decode(errors="replace").split("\n")[:-1]
    if not is_consistent(shard, count_tokens):
        folder = files["samples"][0].parent
        raise UserError(
            f"{folder} has samples without a name or out of order, some that lie outside its "
            "files, or another number of tokens or images: altered; `python prepare.py check "
            f"--data={folder.parent}` names the file; prepare it again"
        )
    return shard


def is_consistent(shard, count_tokens):
    """Returns whether the tables of a shard are as write_shard_files writes them.

    count_tokens: a function from (tiles, width, height) of an image to its number of tokens.

    Samples, images and tiles follow one another and fill their files (an image may repeat an
    earlier one), each sample has a name, and its length is that of its ids with the tokens of its
    images.
    """
    table, images, ids = shard["samples"], shard["images"], shard["ids"]
    _, rows, number = np.unique(images[:, 0], return_index=True, return_inverse=True)
    distinct = images[rows]
    if (np.diff(rows) < 0).any() or (distinct[number] != images).any():
        return False
    for first, count, size in (
        (table[:, FIRST_ID], table[:, ID_COUNT], len(ids)),
        (table[:, FIRST_IMAGE], table[:, IMAGE_COUNT], len(images)),
        (distinct[:, 0], distinct[:, 1], len(shard["tiles"])),
    ):
        is_within = (count >= 0) & (count <= size) & (first == np.cumsum(count) - count)
        if not is_within.all() or count.sum() != size:
            return False
    try:
        counts = np.array([count_tokens(*row) for row in images[:, 1:].tolist()], np.int64)
    except (ValueError, ArithmeticError):  # no image of that size has so many tiles
        return False
    positions = np.flatnonzero(ids == IMAGE_TOKEN_ID)
    if len(shard["names"]) != len(table) or len(positions) != len(images):
        return False
    sample_of = np.searchsorted(table[:, FIRST_ID], positions, side="right") - 1
    added = np.bincount(sample_of, counts - 1, minlength=len(table))
    return (table[:, ID_COUNT] + added == table[:, LENGTH]).all()


def shares_image(table, images):
    """Returns for each sample of a shard whether its first image is that of the sample before."""
    has_image = table[:, IMAGE_COUNT] > 0
    first_tiles = np.full(len(table) + 1, -1)
    first_tiles[1:][has_image] = images[table[has_image, FIRST_IMAGE], 0]
    return has_image & (first_tiles[1:] == first_tiles[:-1])


class PreparedDataset:
    """The samples of one or several prepared datasets, one after another; memory-mapped.

    table: (samples, COLUMNS); names: the id of each sample in its source; dataset_of: the number of
    the dataset of each sample; shares_image: whether its first image is that of the sample before.
    """

    def __init__(self, *folders):
        self.folders = [Path(folder) for folder in folders]
        self.shards, self.names, tables, set_numbers, shares = [], [], [], [], []

        @functools.cache  # many images have the same size
        def count_tokens(tiles, *size):
            return len(image_processing.image_feature_index(size, self.image_config, tiles))

        for number, folder in enumerate(self.folders):
            fingerprint, shards = read_header(folder)
            if number == 0:
                self.fingerprint, self.image_config = fingerprint, fingerprint["image_config"]
            if wrong := list_differences(fingerprint, self.fingerprint, "its"):
                raise UserError(
                    f"{folder} and {self.folders[0]} were prepared for different models: "
                    + "; ".join(wrong)
                )
            for files in shards:
                shard = map_shard(files, self.image_config["tile"], count_tokens)
                tables.append(shard.pop("samples"))
                shares.append(shares_image(tables[-1], shard["images"]))
                self.names += shard.pop("names")
                self.shards.append(shard)
                set_numbers.append(number)
        sizes = list(map(len, tables))
        self.table, self.shares_image = np.concatenate(tables), np.concatenate(shares)
        self.shard_of = np.repeat(np.arange(len(tables)), sizes)
        self.dataset_of = np.repeat(set_numbers, sizes)

    def __str__(self):
        return ", ".join(map(str, self.folders))

    def check_fingerprint(self, fingerprint):
        """Raises UserError if the datasets were prepared for another tokenizer, chat template or
        image config; it names the part that differs."""
        if wrong := list_differences(self.fingerprint, fingerprint, "its"):
            raise UserError(f"{self} was prepared for another model: {'; '.join(wrong)}")

    def check_ids(self, vocab_size):
        """Raises UserError if an id is not in a vocabulary of this size."""
        for ids in (shard["ids"] for shard in self.shards):
            if len(ids) and not IMAGE_TOKEN_ID <= ids.min() <= ids.max() < vocab_size:
                raise UserError(
                    f"{self} holds ids from {ids.min()} to {ids.max()}, but the vocabulary has "
                    f"{vocab_size}: see `python prepare.py check --data="
                    f"{','.join(map(str, self.folders))}`"
                )

    def stored_sample(self, i):
        """Returns (ids, loss_mask, images) of sample i as written: one image token per image."""
        shard = self.shards[self.shard_of[i]]
        first_id, id_count, first_image, image_count, *_ = self.table[i].tolist()
        span = slice(first_id, first_id + id_count)
        image_rows, images = shard["images"][first_image : first_image + image_count], []
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
        labels_T = np.where(loss_mask_T, ids_T, IGNORE_INDEX)
        return ids_T, np.append(labels_T[1:], IGNORE_INDEX), images

    def split(self, validation):
        """Returns the numbers of the samples for validation, or of those for training."""
        return np.flatnonzero(self.table[:, IS_VALIDATION] == validation)


def write_subset(samples, members, folder):
    """Write some samples, by their numbers, as a dataset of its own, with the tokenizer's files."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt at the same step
    subset = ((samples.names[i], *samples.stored_sample(i)) for i in members)
    files = write_shard(folder / "00000", samples.image_config, subset)
    for path in samples.folders[0].iterdir():
        if path.is_file() and path.name not in ("header.json", "plan.json", "skipped.jsonl"):
            shutil.copy(path, folder)
    write_header(folder, samples.fingerprint, [files])


def verify_checksums(folder):
    """Returns a sentence for each file of a dataset whose bytes differ from those written."""
    errors = []
    for files in read_header(Path(folder))[1]:
        for path, _, expected in files.values():
            checksum = zlib.crc32(map_file(path, "u1", path.stat().st_size, ()))
            if checksum != expected:
                errors.append(
                    f"{path}: its bytes have the checksum {checksum}, its header has {expected}"
                )
    return errors
