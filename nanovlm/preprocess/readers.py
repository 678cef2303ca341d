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
from ..data.image_refs import Bytes, Span, archive, find, load, one_line, printable
from . import records
from .records import UNKNOWN_KIND

PICTURES = (
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
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_TEXT = 1 << 26  # of a tar's json or txt
MAX_DEPTH = 32  # lists and objects in one another


class Raw(NamedTuple):
    """A record as it stands in its source; small enough to be handed to another process."""

    where: str  # for messages
    record: dict | None
    pictures: list  # refs to those that the source brings along; empty where the record names files
    fault: tuple | None  # (reason, text) where it could not be read
    name: str  # its id if it states none: the key in a tar, else the file's name and the record's number
    folder: str | None = (
        None  # in which the files lie that it names; None in a tar or parquet, which may name none outside --images
    )
    at: float = 0.0  # how far it is in all sources, from 0 to 1


class Sample(NamedTuple):
    """A record as a conversation, everything but the insides of its pictures checked."""

    name: str  # its id
    where: str  # for messages
    turns: list  # [(role, text)]
    pictures: list  # refs, one for each <image>


# ---- sources ----


def read(paths, images=""):
    """Raws of all sources in their order, one after another; each of `paths` is a file, a folder of .tar and .parquet, or a pattern such as a-*.tar.

    Raises UserError, before the first Raw, for what is no source or begins with a record of no known kind; while reading, for one that is damaged
    in such a way that nobody can tell what is lost.
    """
    if images and not os.path.isdir(images):
        archive(images, os.getpid())
    sources = {file: opened(file) for file in find_files(paths)}
    for raws in sources.values():
        check_first(raws)
    return one_after_another(sources)


def one_after_another(sources):
    sizes = [os.path.getsize(file) for file in sources]
    before, total = 0, sum(sizes)
    for size, raws in zip(sizes, sources.values(), strict=True):
        for raw in raws():
            yield raw._replace(at=(before + raw.at * size) / total)
        before += size


def stamps(paths, images=""):
    """{file: [bytes, time of its last change in ns]} of the sources, and of `images` if it is a zip."""
    named = [*find_files(paths), *([images] if os.path.isfile(images) else [])]
    return {file: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in named}


def find_files(paths):
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


def opened(file):
    """A function that reads the file's Raws from its beginning."""
    try:
        with open(file, "rb") as beginning:
            head = beginning.read(4096)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    packing = next((name for magic, name in PACKED.items() if head.startswith(magic)), None)
    if packing:
        raise UserError(
            f"{file} is packed by {packing}, in which nothing can be found without unpacking all before it: unpack it first"
        )
    if head[:4] == b"PAR1":
        return partial(parquet_rows, file)
    if head[257:262] == b"ustar":
        return partial(tar_groups, file)
    match head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
        case b"{":
            return partial(json_lines, file)
        case b"[":
            return partial(json_list, file, parse_list(file))
    raise UserError(
        f"{file} is neither JSON nor an unpacked tar nor parquet: it begins with {head[:40]!r}"
        if head
        else f"{file} is empty"
    )


def check_first(raws):
    """Raise UserError, quoting the first record that could be read, unless its kind is known."""
    begin = list(itertools.islice(raws(), 10))
    if not begin:
        raise UserError(f"{raws.args[0]} holds no samples")
    first = next((raw for raw in begin if not raw.fault or raw.fault[0] == UNKNOWN_KIND), begin[0])
    if first.fault:
        raise UserError(first.fault[1], first.fault[0])
    records.require_kind(first.record, first.where)


def parse(text):
    """What a JSON text says; ValueError if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_list(file):
    try:
        return parse(Path(file).read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def made(where, record, name, pictures=(), folder=None):
    """A Raw of what was read, if that is an object that can be handled."""
    if deep(record):
        return fault(
            where,
            name,
            "nested too deep",
            f"{where} has more than {MAX_DEPTH} lists and objects in one another",
        )
    if not isinstance(record, dict):
        return fault(where, name, UNKNOWN_KIND, f"{where} is no object: {record!r:.200}")
    return Raw(where, record, list(pictures), None, name, folder)


def fault(where, name, reason, text):
    return Raw(where, None, [], (reason, text), name)


def deep(value, left=MAX_DEPTH):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left == 0 or any(deep(child, left - 1) for child in inside)


def json_list(file, objects):
    for number, record in enumerate(objects, 1):
        raw = made(
            f"{file}, sample {number}",
            record,
            f"{Path(file).name}:{number}",
            folder=str(Path(file).parent),
        )
        yield raw._replace(at=number / len(objects))


def json_lines(file):
    passed, size = 0, os.path.getsize(file)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            passed += len(line)
            if line.strip():
                raw = parsed(
                    line,
                    f"{file}, line {number}",
                    f"{Path(file).name}:{number}",
                    folder=str(Path(file).parent),
                )
                yield raw._replace(at=passed / size)


def parsed(text, where, name, **more):
    try:
        record = parse(text)
        return made(
            where, {"conversations": record} if isinstance(record, list) else record, name, **more
        )
    except ValueError as error:
        return fault(where, name, "broken JSON", f"{where} is not JSON: {error}")


# ---- parquet ----


def parquet_rows(file):
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
            Bytes(f"{where}, picture {i}", part["bytes"])
            for i, part in enumerate(parts, 1)
            if isinstance(part.get("bytes"), bytes)
        ]
        if len(pictures) < len(parts):
            row["images"], pictures = [part.get("path") for part in parts], []
        yield made(where, row, f"{Path(file).name}:{number}", pictures)._replace(at=at)


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


def tar_groups(file):
    """Members side by side under one key as a Raw, as webdataset groups them."""
    size = os.path.getsize(file)
    for key, group in itertools.groupby(tar_members(file), lambda member: key_of(member.name)[0]):
        members = list(group)
        yield tar_group(file, key, members)._replace(at=members[-1].offset / size)


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


def key_of(name):
    """("shards/000012", "jpg") of "./shards/000012.left.jpg"."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.rpartition(".")[2].lower()


def is_odd(name):
    return name.startswith("/") or ".." in name.split("/") or not name.isprintable()


def tar_group(file, key, members):
    where = f"{file}, {printable(key)}"
    if odd := next((name for name in (member.name for member in members) if is_odd(name)), None):
        return fault(
            where,
            key,
            "odd name of a tar member",
            f"{where}: the member {odd!a} would lie outside, or cannot be written",
        )
    if odd := next((member for member in members if not member.isreg() or member.issparse()), None):
        return fault(
            where,
            key,
            "a tar member is no plain file",
            f"{where}: the member {odd.name!a} is a link, a device or full of holes",
        )
    spans = [
        (key_of(member.name)[1], Span(file, member.name, member.offset_data, member.size))
        for member in members
    ]
    pictures = [span for suffix, span in spans if suffix in PICTURES]
    texts = {suffix: span for suffix, span in spans if suffix in ("json", "txt")}
    if len(texts) != sum(suffix in ("json", "txt") for suffix, _ in spans):
        return fault(
            where,
            key,
            "two texts under one key",
            f"{where} has two members of one kind: {', '.join(suffix for suffix, _ in spans)}",
        )
    return tar_text(where, key, texts, pictures)


def tar_text(where, key, texts, pictures):
    """The record that a json or a txt among the members is; a json that is none (notes about the picture) gives way to the txt beside it."""
    if not texts:
        return fault(where, key, UNKNOWN_KIND, f"{where} has neither a json nor a txt among its members")
    if large := next((span for span in texts.values() if span.size > MAX_TEXT), None):
        return fault(
            where,
            key,
            "text too large",
            f"{where}: {large.name!a} has {large.size:,} bytes, more than the {MAX_TEXT:,} of a text",
        )
    if "json" in texts:
        told = parsed(load(texts["json"])[0], where, key, pictures=pictures)
        if told.fault or "txt" not in texts or records.find_kind(told.record):
            return told
    try:
        return made(where, {"caption": load(texts["txt"])[0].decode()}, key, pictures)
    except UnicodeDecodeError as error:
        return fault(
            where,
            key,
            "not text in UTF-8",
            f"{where}: {texts['txt'].name!a} is not text in UTF-8: {error}",
        )


# ---- samples ----


def sample(raw, images=""):
    """A Raw as a Sample; raises UserError. images: as in `read`."""
    name, where, turns, paths = conversation(raw)
    return Sample(
        name,
        where,
        turns,
        raw.pictures or [find(path, raw.folder, images, where) for path in paths],
    )


def conversation(raw):
    """(name, where, turns) of the Sample that a Raw is, and the paths of pictures that it names, wherever these are; raises UserError."""
    if raw.fault:
        raise UserError(raw.fault[1], raw.fault[0])
    name, where = named(raw)
    paths = [] if raw.pictures else records.image_paths(raw.record, where)
    return name, where, records.record_turns(raw.record, name, len(raw.pictures or paths), where), paths


def named(raw):
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


def id_of(raw):
    """The id under which a record is listed, whether it can be used or not."""
    own = records.stated_id(raw.record or {})
    return printable(str(own)) if isinstance(own, str | int | float) else printable(raw.name)


def identity(raw):
    """A digest of a sample's id and of all that it says and shows, by which one that comes twice is known; in a tar, pictures count by their sizes.

    LLaVA's own mix gives one id to all conversations about one picture: those differ.
    """
    record = raw.record or {}
    shown = [
        hashlib.sha256(ref.content).hexdigest() if isinstance(ref, Bytes) else ref.size
        for ref in raw.pictures
    ]
    place = [
        raw.name if records.stated_id(record) is None else None,
        raw.folder if records.first_field(record, "image", "images") else None,
    ]
    return hashlib.sha256(
        json.dumps([*place, raw.fault, record, shown], sort_keys=True, default=repr).encode()
    ).digest()


def read_texts(paths):
    """What anybody says in any conversation of some sources. What cannot be read of them is left out and counted; `data` tells of each."""
    read, wrong = 0, []
    for raw in read(paths):
        try:
            yield from (text for _, text in conversation(raw)[2])
            read += 1
        except UserError as mistake:
            wrong.append(str(mistake))
    if not read:
        raise UserError(f"there is nothing to learn a tokenizer from: {wrong[0]}")
    if wrong:
        cli.status(
            f"learnt without {len(wrong):,} of {read + len(wrong):,} records, which cannot be read: {wrong[0]}"
        )
