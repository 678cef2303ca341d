"""Any collection of images and conversations becomes a stream of records, and a record a Sample.

The first bytes of a source show its format, and the fields of a record its kind (records.py). Names
matter only for the members of a tar.

    source           its records
    JSON list,       objects; `image` or `images` are paths into --images (a folder or a zip), or
    JSON lines       beside the source
    WebDataset tar   the members that share a key (a name up to its first dot): images, and a json
                     (an object or LLaVA's list of turns) or a txt
    parquet          rows; `image` or `images` are bytes, {"bytes", "path"} or paths

A record without an id is named by its place. A record that cannot be used has an error with a
reason, and never stops the others.
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
from ..data.image_refs import (
    ImageBytes,
    TarMember,
    find_image_ref,
    load_image_bytes,
    one_line,
    open_zip,
    printable,
)
from . import records
from .records import UNKNOWN_KIND

# names of a tar's members that are images
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
MAX_TEXT = 1 << 26  # bytes of a tar's json or txt
MAX_DEPTH = 32  # of lists and objects inside one another


class RawRecord(NamedTuple):
    """A record as its source has it; small enough to be sent to another process."""

    where: str  # for messages
    record: dict | None
    images: list  # refs to images that the source contains; empty if the record names files
    error: tuple | None  # (reason, text) if it cannot be read
    name: str  # its id if it has none: the key in a tar, else the file's name and its number
    # in which the files that it names lie; None in a tar or parquet, which may only use --images
    folder: str | None = None
    position: float = 0.0  # in all sources, from 0 to 1


class Sample(NamedTuple):
    """A record as a conversation; all but the content of its images is checked."""

    name: str  # its id
    where: str  # for messages
    turns: list  # [(role, text)]
    images: list  # refs, one per <image>


# ---- sources ----


def read_records(paths, images=""):
    """Returns an iterator over the RawRecords of all sources, in order.

    Each of `paths` is a file, a folder of .tar and .parquet files, or a pattern such as a-*.tar.
    Raises UserError at once for what is no source or begins with a record of unknown kind, and
    while reading if a source is damaged so that the number of lost records is unknown.
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
    """Returns {file: [bytes, mtime in ns]} of the sources and of a zip of images."""
    named = [*find_source_files(paths), *([images] if os.path.isfile(images) else [])]
    return {file: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in named}


def find_source_files(paths):
    found = []
    for path in paths:
        new = [path] if os.path.lexists(path) else glob.glob(path)
        if os.path.isdir(path):
            members = Path(path).glob("*")
            new = [str(file) for file in members if file.suffix in (".tar", ".parquet")]
        new = sorted(filter(os.path.isfile, new))
        if not new:
            if os.path.isdir(path):
                raise UserError(f"{path} holds neither .tar nor .parquet files")
            raise UserError(f"no such file: {path}")
        found += new
    if not found:
        raise UserError("no source is named")
    if twice := [file for file, times in Counter(found).items() if times > 1]:
        raise UserError(f"{twice[0]} is named twice among the sources")
    return found


def open_source(file):
    """Returns a function that reads the RawRecords of a file from its beginning."""
    try:
        with open(file, "rb") as beginning:
            head = beginning.read(4096)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    for magic, compression in COMPRESSION_MAGIC.items():
        if head.startswith(magic):
            raise UserError(
                f"{file} is packed by {compression}, in which nothing can be found without "
                "unpacking all before it: unpack it first"
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
    if not head:
        raise UserError(f"{file} is empty")
    raise UserError(
        f"{file} is neither JSON nor an unpacked tar nor parquet: it begins with {head[:40]!r}"
    )


def check_first_record(raws):
    """Raises UserError, which quotes the first readable record, if its kind is unknown."""
    head = list(itertools.islice(raws(), 10))
    if not head:
        raise UserError(f"{raws.args[0]} holds no samples")
    readable = [raw for raw in head if not raw.error or raw.error[0] == UNKNOWN_KIND]
    first = (readable or head)[0]
    if first.error:
        raise UserError(first.error[1], first.error[0])
    records.require_kind(first.record, first.where)


def parse_json(text):
    """Returns the value of a JSON text; raises ValueError if it is none."""
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
    """Returns the RawRecord of a JSON value; its error is set if that cannot be a record."""
    if is_nested_too_deep(record):
        return make_error_record(
            where,
            name,
            "nested too deep",
            f"{where} has more than {MAX_DEPTH} lists and objects in one another",
        )
    if not isinstance(record, dict):
        text = f"{where} is no object: {record!r:.200}"
        return make_error_record(where, name, UNKNOWN_KIND, text)
    return RawRecord(where, record, list(images), None, name, folder)


def make_error_record(where, name, reason, text):
    """Returns the RawRecord of a record that cannot be read."""
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
    """Yields the RawRecords of a parquet file."""
    for number, (row, position) in enumerate(read_parquet(file), 1):
        where = f"{file}, row {number}"
        column = next((name for name in ("images", "image") if row.get(name)), None)
        values = row.pop(column, None) or []
        parts = []
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, dict):
                value = {"bytes" if isinstance(value, bytes) else "path": value}
            parts.append(value)
        images = [
            ImageBytes(f"{where}, image {i}", part["bytes"])
            for i, part in enumerate(parts, 1)
            if isinstance(part.get("bytes"), bytes)
        ]
        if len(images) < len(parts):
            row["images"], images = [part.get("path") for part in parts], []
        raw = make_record(where, row, f"{Path(file).name}:{number}", images)
        yield raw._replace(position=position)


def read_parquet(file):
    """Yields (row, position) of each row: a dict, and its place in the file from 0 to 1.

    Few rows are in memory at a time.
    """
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
    except Exception as error:  # Arrow and the conversion of odd columns raise many kinds of error
        raise UserError(f"{file} cannot be read beyond row {rows}: {one_line(error)}") from None


# ---- tar ----


def read_tar_records(file):
    """Yields a RawRecord for adjacent members that share a key, as webdataset groups them."""
    size = os.path.getsize(file)
    for key, group in itertools.groupby(tar_members(file), lambda member: tar_key(member.name)[0]):
        members = list(group)
        yield make_tar_record(file, key, members)._replace(position=members[-1].offset / size)


def tar_members(file):
    """Yields the headers of all members but folders and hidden files; contents are not read."""
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # the next member would be one before it
                    raise tarfile.ReadError(f"the size of {member.name!a} is {member.size}")
                tar.members.clear()  # otherwise it grows with the tar
                if not member.isdir() and not os.path.basename(member.name).startswith("."):
                    yield member
            tar.fileobj.seek(tar.offset)
            # tarfile takes anything that is no header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(
                    f"neither a member nor the end stands at byte {tar.offset:,}"
                )
    except Exception as error:  # on broken bytes tarfile raises nearly every kind of error
        raise UserError(f"{file} is damaged or cut short: {one_line(error)}") from None


def tar_key(name):
    """Returns ("shards/000012", "jpg") for "./shards/000012.left.jpg"."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.rpartition(".")[2].lower()


def is_unsafe_name(name):
    return name.startswith("/") or ".." in name.split("/") or not name.isprintable()


def make_tar_record(file, key, members):
    """Returns the RawRecord of the members that share a key."""
    where = f"{file}, {printable(key)}"
    error = partial(make_error_record, where, key)
    for member in members:
        if is_unsafe_name(member.name):
            return error(
                "unsafe name of a tar member",
                f"{where}: the member {member.name!a} would lie outside, or cannot be printed",
            )
    for member in members:
        if not member.isreg() or member.issparse():
            return error(
                "a tar member is no plain file",
                f"{where}: the member {member.name!a} is a link, a device or a sparse file",
            )
    images, texts, suffixes = [], {}, []
    for member in members:
        suffix = tar_key(member.name)[1]
        ref = TarMember(file, member.name, member.offset_data, member.size)
        suffixes.append(suffix)
        if suffix in IMAGE_SUFFIXES:
            images.append(ref)
        if suffix in ("json", "txt"):
            texts[suffix] = ref
    if len(texts) != sum(suffix in ("json", "txt") for suffix in suffixes):
        return error(
            "two texts under one key", f"{where} has two members of one kind: {', '.join(suffixes)}"
        )
    return parse_tar_text(where, key, texts, images)


def parse_tar_text(where, key, texts, images):
    """Returns the RawRecord of a json or a txt in a tar; texts: {suffix: ref}.

    If the json is of unknown kind (metadata of the image), the txt beside it is the record.
    """
    error = partial(make_error_record, where, key)
    if not texts:
        return error(UNKNOWN_KIND, f"{where} has neither a json nor a txt among its members")
    for ref in texts.values():
        if ref.size > MAX_TEXT:
            return error(
                "text too large",
                f"{where}: {ref.name!a} has {ref.size:,} bytes, "
                f"more than the {MAX_TEXT:,} of a text",
            )
    if "json" in texts:
        raw = parse_record(load_image_bytes(texts["json"])[0], where, key, images=images)
        if raw.error or "txt" not in texts or records.find_kind(raw.record):
            return raw
    try:
        caption = load_image_bytes(texts["txt"])[0].decode()
    except UnicodeDecodeError as problem:
        return error(
            "not text in UTF-8", f"{where}: {texts['txt'].name!a} is not text in UTF-8: {problem}"
        )
    return make_record(where, {"caption": caption}, key, images)


# ---- samples ----


def make_sample(raw, images=""):
    """Returns a RawRecord as a Sample; images: as in read_records. Raises UserError."""
    name, where, turns, paths = parse_conversation(raw)
    refs = raw.images or [find_image_ref(path, raw.folder, images, where) for path in paths]
    return Sample(name, where, turns, refs)


def parse_conversation(raw):
    """Returns (name, where, turns) of the Sample of a RawRecord, and the image paths that it names.

    The images may be missing. Raises UserError.
    """
    if raw.error:
        raise UserError(raw.error[1], raw.error[0])
    name, where = sample_name(raw)
    paths = [] if raw.images else records.image_paths(raw.record, where)
    turns = records.record_turns(raw.record, name, len(raw.images or paths), where)
    return name, where, turns, paths


def sample_name(raw):
    """Returns (id, where) of a record; where is for messages. Raises UserError if the id is bad."""
    stated = records.stated_id(raw.record)
    if isinstance(stated, bool) or not isinstance(stated, str | int | float | None):
        raise UserError(
            f"{raw.where}: its id is neither a text nor a number: {stated!r:.80}",
            "id is not one line of text",
        )
    name = raw.name if stated is None else str(stated)
    try:
        check_sample_name(name)
    except UserError as error:
        raise UserError(f"{raw.where}: {error}", "id is not one line of text") from None
    return name, raw.where if stated is None else f"{raw.where} ({name})"


def record_id(raw):
    """Returns the id under which a record is listed, even if it cannot be used."""
    stated = records.stated_id(raw.record or {})
    return printable(str(stated) if isinstance(stated, str | int | float) else raw.name)


def record_digest(raw):
    """Returns a digest of a record's id, texts and images, by which a duplicate is found.

    Images in a tar count by their sizes. LLaVA's own mix gives one id to all conversations about
    one image; their texts differ.
    """
    record = raw.record or {}
    images = [
        hashlib.sha256(ref.content).hexdigest() if isinstance(ref, ImageBytes) else ref.size
        for ref in raw.images
    ]
    place = [
        raw.name if records.stated_id(record) is None else None,
        raw.folder if records.first_field(record, "image", "images") else None,
    ]
    content = json.dumps([*place, raw.error, record, images], sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).digest()


def read_texts(paths):
    """Yields the text of each turn of some sources, to train a tokenizer.

    Records that cannot be read are left out and counted; `prepare.py data` names each of them.
    """
    count, errors = 0, []
    for raw in read_records(paths):
        try:
            yield from (text for _, text in parse_conversation(raw)[2])
            count += 1
        except UserError as error:
            errors.append(str(error))
    if not count:
        raise UserError(f"there is no text to train a tokenizer on: {errors[0]}")
    if errors:
        cli.print_status(
            f"trained without {len(errors):,} of {count + len(errors):,} records, "
            f"which cannot be read: {errors[0]}"
        )
