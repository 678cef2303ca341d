"""Any collection of pictures and conversations as a stream of records, and any record as a Sample.

What a source is shows in its first bytes, what a record is in its fields; names count for the members of a tar alone.

    source           its records
    JSON list,       objects; `image` or `images` are paths into --images (a folder or a zip), or beside the source
    JSON lines
    WebDataset tar   the members that share a key (a name up to its first dot): pictures, and a json (an object or LLaVA's list of turns) or a txt
    parquet          rows; `image` or `images` are bytes, {"bytes", "path"} or paths

A record without an id is named by where it stands. One that cannot be used is dirt, told of by a UserError with a reason, and never stops the others.
"""

import glob
import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .. import UserError, cli
from ..data.dataset import check_sample_name
from ..data.image_refs import ImageBytes, TarMember, open_zip, find_image_ref, load_image_bytes, one_line, printable
from . import records
from .records import UNKNOWN_KIND

IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "gif",
    "tif",
    "tiff",
    "ppm",
)  # how such members of a tar end
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_TEXT = 1 << 26  # of a tar's json or txt
MAX_DEPTH = 32  # lists and objects in one another


class RawRecord(NamedTuple):
    """A record as it stands in its source; small enough to be handed to another process."""

    where: str  # for messages
    record: dict | None
    images: list  # refs to those that the source brings along; empty where the record names files
    error: tuple | None  # (reason, text) where it could not be read
    name: str  # its id if it states none: the key in a tar, else the file's name and the record's number
    folder: str | None = (
        None  # in which the files lie that it names; None in a tar or parquet, which may name none outside --images
    )
    position: float = 0.0  # how far it is in all sources, from 0 to 1


class Sample(NamedTuple):
    """A record as a conversation, everything but the insides of its pictures checked."""

    name: str  # its id
    where: str  # for messages
    turns: list  # [(role, text)]
    images: list  # refs, one for each <image>


# ---- sources ----


def read_records(paths, images=""):
    """Raws of all sources in their order, one after another; each of `paths` is a file, a folder of .tar and .parquet, or a pattern such as a-*.tar.

    Raises UserError, before the first Raw, for what is no source or begins with a record of no known kind; while reading, for one that is damaged
    in such a way that nobody can tell what is lost.
    """
    if images and not os.path.isdir(images):
        open_zip(images, os.getpid())
    sources = {file: open_source(file) for file in find_source_files(paths)}
    for raws in sources.values():
        check_first_record(raws)
    return chain_sources(sources)


def chain_sources(sources):
    sizes = [os.path.getsize(file) for file in sources]
    before, total = 0, sum(sizes)
    for size, raws in zip(sizes, sources.values(), strict=True):
        for raw in raws():
            yield raw._replace(position=(before + raw.position * size) / total)
        before += size


def source_stamps(paths, images=""):
    """{file: [bytes, time of its last change in ns]} of the sources, and of `images` if it is a zip."""
    named = [*find_source_files(paths), *([images] if os.path.isfile(images) else [])]
    return {file: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in named}


def find_source_files(paths):
    found = []
    for path in paths:
        new = (
            [str(file) for file in Path(path).glob("*") if file.suffix in (".tar", ".parquet")]
            if os.path.isdir(path)
            else [path]
        )
        new = sorted(filter(os.path.isfile, new if os.path.lexists(path) else glob.glob(path)))
        if not new:
            raise UserError(
                f"{path} holds neither .tar nor .parquet files"
                if os.path.isdir(path)
                else f"no such file: {path}"
            )
        found += new
    if not found:
        raise UserError("no source is named")
    if twice := [file for file, times in Counter(found).items() if times > 1]:
        raise UserError(f"{twice[0]} is named twice among the sources")
    return found


def open_source(file):
    """A function that reads the file's Raws from its beginning."""
    try:
        with open(file, "rb") as beginning:
            head = beginning.read(4096)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    packing = next((name for magic, name in COMPRESSION_MAGIC.items() if head.startswith(magic)), None)
    if packing:
        raise UserError(
            f"{file} is packed by {packing}, in which nothing can be found without unpacking all before it: unpack it first"
        )
    if head[:4] == b"PAR1":
        return partial(read_parquet_records, file)
    if head[257:262] == b"ustar":
        return partial(read_tar_records, file)
    match head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
        case b"{":
            return partial(read_json_lines, file)
        case b"[":
            return partial(read_json_list, file, parse_json_list(file))
    raise UserError(
        f"{file} is neither JSON nor an unpacked tar nor parquet: it begins with {head[:40]!r}"
        if head
        else f"{file} is empty"
    )


def check_first_record(raws):
    """Raise UserError, quoting the first record that could be read, unless its kind is known."""
    begin = list(itertools.islice(raws(), 10))
    if not begin:
        raise UserError(f"{raws.args[0]} holds no samples")
    first = next((raw for raw in begin if not raw.error or raw.error[0] == UNKNOWN_KIND), begin[0])
    if first.error:
        raise UserError(first.error[1], first.error[0])
    records.require_kind(first.record, first.where)


def parse_json(text):
    """What a JSON text says; ValueError if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_json_list(file):
    try:
        return parse_json(Path(file).read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def make_record(where, record, name, images=(), folder=None):
    """A Raw of what was read, if that is an object that can be handled."""
    if is_nested_too_deep(record):
        return make_error_record(
            where,
            name,
            "nested too deep",
            f"{where} has more than {MAX_DEPTH} lists and objects in one another",
        )
    if not isinstance(record, dict):
        return make_error_record(where, name, UNKNOWN_KIND, f"{where} is no object: {record!r:.200}")
    return RawRecord(where, record, list(images), None, name, folder)


def make_error_record(where, name, reason, text):
    return RawRecord(where, None, [], (reason, text), name)


def is_nested_too_deep(value, left=MAX_DEPTH):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left == 0 or any(is_nested_too_deep(child, left - 1) for child in inside)


def read_json_list(file, objects):
    for number, record in enumerate(objects, 1):
        raw = make_record(
            f"{file}, sample {number}",
            record,
            f"{Path(file).name}:{number}",
            folder=str(Path(file).parent),
        )
        yield raw._replace(position=number / len(objects))


def read_json_lines(file):
    passed, size = 0, os.path.getsize(file)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            passed += len(line)
            if line.strip():
                raw = parse_record(
                    line,
                    f"{file}, line {number}",
                    f"{Path(file).name}:{number}",
                    folder=str(Path(file).parent),
                )
                yield raw._replace(position=passed / size)


def parse_record(text, where, name, **more):
    try:
        record = parse_json(text)
        return make_record(
            where, {"conversations": record} if isinstance(record, list) else record, name, **more
        )
    except ValueError as error:
        return make_error_record(where, name, "broken JSON", f"{where} is not JSON: {error}")


# ---- parquet ----


def read_parquet_records(file):
    for number, (row, at) in enumerate(read_parquet(file), 1):
        where, column = (
            f"{file}, row {number}",
            next((name for name in ("images", "image") if row.get(name)), None),
        )
        values = row.pop(column, None) or []
        parts = [
            value
            if isinstance(value, dict)
            else {"bytes" if isinstance(value, bytes) else "path": value}
            for value in (values if isinstance(values, list) else [values])
        ]
        pictures = [
            ImageBytes(f"{where}, picture {i}", part["bytes"])
            for i, part in enumerate(parts, 1)
            if isinstance(part.get("bytes"), bytes)
        ]
        if len(pictures) < len(parts):
            row["images"], pictures = [part.get("path") for part in parts], []
        yield make_record(where, row, f"{Path(file).name}:{number}", pictures)._replace(position=at)


def read_parquet(file):
    """Its rows as dicts, of which few are in memory at a time, and how far in the file each is."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{file} is a parquet file, which pyarrow reads: pip install pyarrow"
        ) from None
    rows = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=16, use_threads=False):
                for row in batch.to_pylist():
                    rows += 1
                    yield row, rows / table.metadata.num_rows
    except (
        Exception
    ) as error:  # Arrow has its own kinds of error, and the conversion of odd columns raises others
        raise UserError(f"{file} cannot be read beyond row {rows}: {one_line(error)}") from None


# ---- tar ----


def read_tar_records(file):
    """Members side by side under one key as a Raw, as webdataset groups them."""
    size = os.path.getsize(file)
    for key, group in itertools.groupby(tar_members(file), lambda member: tar_key(member.name)[0]):
        members = list(group)
        yield make_tar_record(file, key, members)._replace(position=members[-1].offset / size)


def tar_members(file):
    """Headers of all but folders and hidden files; their contents are passed over."""
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # the next member would be one before it
                    raise tarfile.ReadError(f"the size of {member.name!a} is {member.size}")
                tar.members.clear()  # which would else hold all
                if not member.isdir() and not os.path.basename(member.name).startswith("."):
                    yield member
            tar.fileobj.seek(tar.offset)
            if (
                tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE
            ):  # tarfile takes whatever is no header for the end
                raise tarfile.ReadError(
                    f"neither a member nor the end stands at byte {tar.offset:,}"
                )
    except Exception as error:  # on broken bytes tarfile raises nearly every kind of error
        raise UserError(f"{file} is damaged or cut short: {one_line(error)}") from None


def tar_key(name):
    """("shards/000012", "jpg") of "./shards/000012.left.jpg"."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.rpartition(".")[2].lower()


def is_unsafe_name(name):
    return name.startswith("/") or ".." in name.split("/") or not name.isprintable()


def make_tar_record(file, key, members):
    where = f"{file}, {printable(key)}"
    if odd := next((name for name in (member.name for member in members) if is_unsafe_name(name)), None):
        return make_error_record(
            where,
            key,
            "odd name of a tar member",
            f"{where}: the member {odd!a} would lie outside, or cannot be written",
        )
    if odd := next((member for member in members if not member.isreg() or member.issparse()), None):
        return make_error_record(
            where,
            key,
            "a tar member is no plain file",
            f"{where}: the member {odd.name!a} is a link, a device or full of holes",
        )
    spans = [
        (tar_key(member.name)[1], TarMember(file, member.name, member.offset_data, member.size))
        for member in members
    ]
    pictures = [span for suffix, span in spans if suffix in IMAGE_SUFFIXES]
    texts = {suffix: span for suffix, span in spans if suffix in ("json", "txt")}
    if len(texts) != sum(suffix in ("json", "txt") for suffix, _ in spans):
        return make_error_record(
            where,
            key,
            "two texts under one key",
            f"{where} has two members of one kind: {', '.join(suffix for suffix, _ in spans)}",
        )
    return parse_tar_text(where, key, texts, pictures)


def parse_tar_text(where, key, texts, pictures):
    """The record that a json or a txt among the members is; a json that is none (notes about the picture) gives way to the txt beside it."""
    if not texts:
        return make_error_record(where, key, UNKNOWN_KIND, f"{where} has neither a json nor a txt among its members")
    if large := next((span for span in texts.values() if span.size > MAX_TEXT), None):
        return make_error_record(
            where,
            key,
            "text too large",
            f"{where}: {large.name!a} has {large.size:,} bytes, more than the {MAX_TEXT:,} of a text",
        )
    if "json" in texts:
        told = parse_record(load_image_bytes(texts["json"])[0], where, key, images=pictures)
        if told.error or "txt" not in texts or records.find_kind(told.record):
            return told
    try:
        return make_record(where, {"caption": load_image_bytes(texts["txt"])[0].decode()}, key, pictures)
    except UnicodeDecodeError as error:
        return make_error_record(
            where,
            key,
            "not text in UTF-8",
            f"{where}: {texts['txt'].name!a} is not text in UTF-8: {error}",
        )


# ---- samples ----


def make_sample(raw, images=""):
    """A Raw as a Sample; raises UserError. images: as in `read`."""
    name, where, turns, paths = parse_conversation(raw)
    return Sample(
        name,
        where,
        turns,
        raw.images or [find_image_ref(path, raw.folder, images, where) for path in paths],
    )


def parse_conversation(raw):
    """(name, where, turns) of the Sample that a Raw is, and the paths of pictures that it names, wherever these are; raises UserError."""
    if raw.error:
        raise UserError(raw.error[1], raw.error[0])
    name, where = sample_name(raw)
    paths = [] if raw.images else records.image_paths(raw.record, where)
    return name, where, records.record_turns(raw.record, name, len(raw.images or paths), where), paths


def sample_name(raw):
    """A sample's id, and where it is, for messages."""
    own = records.stated_id(raw.record)
    if isinstance(own, bool) or not isinstance(own, str | int | float | None):
        raise UserError(
            f"{raw.where}: its id is neither a text nor a number: {own!r:.80}",
            "id is not one line of text",
        )
    name = raw.name if own is None else str(own)
    try:
        check_sample_name(name)
    except UserError as mistake:
        raise UserError(f"{raw.where}: {mistake}", "id is not one line of text") from None
    return name, raw.where if own is None else f"{raw.where} ({name})"


def record_id(raw):
    """The id under which a record is listed, whether it can be used or not."""
    own = records.stated_id(raw.record or {})
    return printable(str(own)) if isinstance(own, str | int | float) else printable(raw.name)


def record_digest(raw):
    """A digest of a sample's id and of all that it says and shows, by which one that comes twice is known; in a tar, pictures count by their sizes.

    LLaVA's own mix gives one id to all conversations about one picture: those differ.
    """
    record = raw.record or {}
    shown = [
        hashlib.sha256(ref.content).hexdigest() if isinstance(ref, ImageBytes) else ref.size
        for ref in raw.images
    ]
    place = [
        raw.name if records.stated_id(record) is None else None,
        raw.folder if records.first_field(record, "image", "images") else None,
    ]
    return hashlib.sha256(
        json.dumps([*place, raw.error, record, shown], sort_keys=True, default=repr).encode()
    ).digest()


def read_texts(paths):
    """What anybody says in any conversation of some sources. What cannot be read of them is left out and counted; `data` tells of each."""
    read, wrong = 0, []
    for raw in read(paths):
        try:
            yield from (text for _, text in parse_conversation(raw)[2])
            read += 1
        except UserError as mistake:
            wrong.append(str(mistake))
    if not read:
        raise UserError(f"there is nothing to learn a tokenizer from: {wrong[0]}")
    if wrong:
        cli.print_status(
            f"learnt without {len(wrong):,} of {read + len(wrong):,} records, which cannot be read: {wrong[0]}"
        )
