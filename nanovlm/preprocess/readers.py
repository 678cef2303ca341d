"""Any collection of images and conversations becomes a stream of records, and a record a Sample.

The first bytes of a source show its format, and the fields of a record its kind (records.py). Names
matter only for the members of a tar.

    source           its records
    JSON list,       objects; `image` or `images` are paths into --images (a folder or a zip), or
    JSON lines       beside the source, or data: URIs
    WebDataset tar   the members that share a key (a name up to its first dot): images, and a json
                     (an object or LLaVA's list of turns) or a txt
    parquet          rows; `image` or `images` are bytes, {"bytes", "path"}, paths or data: URIs

A record without an id is named by its place. A record that cannot be used has an error with a
reason, and never stops the others.
"""

import glob
import itertools
import json
import os
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .. import UserError, cli
from ..data.dataset import check_sample_name
from ..data.image_refs import (
    ImageBytes,
    TarMember,
    embedded_image,
    find_image_ref,
    load_image_bytes,
    one_line,
    open_zip,
    printable,
)
from ..data.turns import check_turns, read_turns
from . import records

# names of a tar's members that are images
IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
UNREADABLE_SUFFIXES = ("avif", "heic", "heif", "jp2", "jxl", "svg")
MAX_TEXT = 1 << 26  # bytes of a tar's json or txt
MAX_DEPTH = 32  # of lists and objects inside one another
UNKNOWN_KIND = "no known kind of record"


class RawRecord(NamedTuple):
    """A record as its source has it; small enough to be sent to another process."""

    where: str  # for messages
    name: str  # its id if it has none: the key in a tar, else the file's name and its number
    record: dict | None  # None if it cannot be read
    images: list  # refs to images that the source contains; empty if the record names files
    error: UserError | None = None  # why it cannot be used
    # in which the files that it names lie; None in a tar or parquet, which may only use --images
    folder: str | None = None


class Sample(NamedTuple):
    """A record as a conversation; all but the content of its images is checked."""

    name: str  # its id
    where: str  # for messages
    turns: list  # [(role, text)]
    images: list  # refs, one per <image>
    counted: list  # what the end of `prepare.py data` counts: "an unused `url`"


# ---- sources ----


def read_records(paths, images=""):
    """Returns an iterator over the RawRecords of all sources, in order.

    Each of `paths` is a file, a folder of .tar and .parquet files, or a pattern such as a-*.tar.
    Raises UserError at once if one is not a source or begins with records that cannot be used, and
    while reading if it is damaged so that the number of lost records is unknown.
    """
    if images and not os.path.isdir(images):
        open_zip(images, os.getpid())
    sources = {file: open_source(file) for file in find_source_files(paths)}
    for file, raws in sources.items():
        beginning = list(itertools.islice(raws(), 10))
        if not beginning:
            raise UserError(f"{file} holds no samples")
        if all(raw.error for raw in beginning):
            raise beginning[0].error
    return itertools.chain.from_iterable(raws() for raws in sources.values())


def source_stamps(paths, images=""):
    """Returns [file, bytes, mtime in ns] of each source, and of a zip of images."""
    stamps = []
    for file in (*find_source_files(paths), images):
        if os.path.isfile(file):
            stamps.append([file, os.stat(file).st_size, os.stat(file).st_mtime_ns])
    return stamps


def find_source_files(paths):
    """Returns the files that the paths of read_records name. Raises UserError if one names none."""
    found = []
    for path in paths:
        new = [path] if os.path.isfile(path) else glob.glob(path)
        if os.path.isdir(path):
            new = [
                str(file) for file in Path(path).iterdir() if file.suffix in (".tar", ".parquet")
            ]
        new = sorted(filter(os.path.isfile, new))
        if not new:
            raise UserError(f"{path} is neither a file nor a folder of .tar or .parquet files")
        found += new
    return found


def open_source(file):
    """Returns a function that reads the RawRecords of a file from its beginning."""
    with open(file, "rb") as beginning:
        head = beginning.read(4096)
    if head[:4] == b"PAR1":
        return partial(read_parquet_records, file)
    if head[257:262] == b"ustar":
        return partial(read_tar_records, file)
    match head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
        case b"{":
            if next(json_lines(file))[1].strip(b"\xef\xbb\xbf \t\r\n") == b"{":
                raise UserError(
                    f"{file} is one JSON object over several lines: give a list of records, or one "
                    "record a line"
                )
            return partial(read_json_records, file, "line", partial(json_lines, file))
        case b"[":
            try:
                values = parse_json(Path(file).read_bytes())
            except ValueError as error:
                raise UserError(f"{file} is not JSON: {error}") from None
            return partial(read_json_records, file, "sample", partial(enumerate, values, 1))
    raise UserError(
        f"{file} is neither JSON nor an uncompressed tar nor parquet: it begins with {head[:40]!r}"
    )


def make_record(where, name, folder, parse, *content):
    """Returns the RawRecord of a record and its images, which parse(*content) returns.

    If parse raises UserError, or the record is of unknown kind, the RawRecord has that error.
    """
    record, images, error = None, [], None
    try:
        record, images = parse(*content)
        if not records.find_kind(record):
            raise UserError(
                f"is {UNKNOWN_KIND} (of a conversation, a question with answers or choices, "
                f"a caption): {record!r:.200}",
                UNKNOWN_KIND,
            )
    except UserError as problem:
        error = UserError(f"{where} {problem}", problem.reason)
    return RawRecord(where, name, record, images, error, folder)


# ---- JSON ----


def parse_json(text):
    """Returns the value of a JSON text; raises ValueError if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def json_lines(file):
    """Yields (number, line) of each line that is not blank."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def read_json_records(file, word, values):
    """Yields the RawRecords of a JSON file; values() yields (number, JSON value or text)."""
    name, folder = Path(file).name, str(Path(file).parent)
    for number, value in values():
        where = f"{file}, {word} {number}"
        yield make_record(where, f"{name}:{number}", folder, parse_row, value, where)


def parse_value(value):
    """Returns the record that a JSON value (or its text: bytes) means. A list is a conversation."""
    try:
        if isinstance(value, bytes):
            value = parse_json(value)
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", "broken JSON") from None
    if is_nested_too_deep(value):
        raise UserError(
            f"has more than {MAX_DEPTH} lists and objects in one another", "nested too deep"
        )
    if isinstance(value, list):
        value = {"conversations": value}
    if not isinstance(value, dict):
        raise UserError(f"is not an object: {value!r:.200}", UNKNOWN_KIND)
    return value


def parse_row(value, where):
    """Returns the record that a row or a JSON value means, and its images as ImageBytes.

    If it names files, their paths are `images` of the record, and there are no ImageBytes.
    """
    record = parse_value(value)
    images, paths = [], []
    for value in records.image_values(record):
        match embedded_image(value, f"{where}, image {len(images) + 1}") or value:
            case ImageBytes() as ref:
                images.append(ref)
            case {"path": str(path)} | str(path):
                paths.append(path)
            case _:
                raise UserError(
                    f"has an image that is not a path: {value!r:.80}", "no path of an image"
                )
    if images and paths:
        raise UserError("has images as bytes and as paths: give all as one", "images of two kinds")
    rest = {name: value for name, value in record.items() if name not in ("image", "images")}
    return (rest | {"images": paths} if paths else rest), images


def is_nested_too_deep(value, left=MAX_DEPTH):
    """Returns whether lists and objects are nested deeper than `left`; pickle may fail on them."""
    if isinstance(value, dict):
        value = list(value.values())
    if left == 0 or not isinstance(value, list):
        return left == 0
    return any(is_nested_too_deep(child, left - 1) for child in value)


# ---- parquet ----


def read_parquet_records(file):
    """Yields the RawRecords of a parquet file."""
    for number, row in enumerate(read_parquet(file), 1):
        where = f"{file}, row {number}"
        yield make_record(where, f"{Path(file).name}:{number}", None, parse_row, row, where)


def read_parquet(file):
    """Yields each row as a dict; few rows are in memory at a time."""
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
                    yield row
    except Exception as error:  # Arrow and the conversion of odd columns raise many kinds of error
        raise UserError(f"{file} cannot be read beyond row {rows}: {one_line(error)}") from None


# ---- tar ----


def read_tar_records(file):
    """Yields a RawRecord for adjacent members that share a key, as webdataset groups them."""
    for key, group in itertools.groupby(tar_members(file), lambda member: tar_key(member.name)[0]):
        # read here, because damage ends the whole source, not only this record
        members = list(group)
        where = f"{file}, {printable(key)}"
        yield make_record(where, key, None, parse_members, file, members, where)


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
            # tarfile takes anything that is not a header for the end
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


def parse_members(file, members, where):
    """Returns the record and the images of a tar's members that share a key.

    If the json is of unknown kind (metadata of the image), the txt beside it is the record.
    """
    images, texts = [], {}
    stems = {member.name.removeprefix("./").rpartition(".")[0] for member in members}
    # a.left.jpg, a.right.jpg and a.txt, or a.1.jpg and a.1.txt; but not a.1.jpg and a.2.txt
    if len(stems) > 1 and tar_key(members[0].name)[0] not in stems:
        raise UserError(
            f"has members {sorted(stems)!a:.80}, which share only the name up to its first dot: "
            "one must have just this name, or none have a dot in it (write v1_0_a for v1.0_a)",
            "names that share a key by chance",
        )
    for member in members:
        name = member.name
        is_outside = name.startswith("/") or ".." in name.split("/")
        if is_outside or not name.isprintable() or not member.isreg() or member.issparse():
            raise UserError(
                f"has a member {name!a}, which is not a plain file, would lie outside, or cannot "
                "be printed",
                "unsafe member of a tar",
            )
        suffix = tar_key(name)[1]
        ref = TarMember(file, name, member.offset_data, member.size)
        if suffix in IMAGE_SUFFIXES:
            images.append(ref)
        elif suffix in UNREADABLE_SUFFIXES:
            raise UserError(
                f"has an image {name!a} of a format that is not read here: convert it to JPEG or "
                "PNG",
                "no image",
            )
        elif suffix in ("json", "txt"):
            if suffix in texts or ref.size > MAX_TEXT:
                raise UserError(
                    f"has a member {name!a} of {ref.size:,} bytes: it may have one {suffix} "
                    f"of at most {MAX_TEXT:,} bytes",
                    "two texts or a text too large",
                )
            texts[suffix] = load_image_bytes(ref)[0]
    if images and not texts:
        raise UserError(
            f"is {UNKNOWN_KIND}: has an image, but no json or txt beside it; the members of a "
            "record must follow one another, as tar --sort=name writes them",
            UNKNOWN_KIND,
        )
    record = {}
    if "json" in texts:
        text = texts["json"]
        record, images = (parse_value(text), images) if images else parse_row(text, where)
    if "txt" in texts and not records.find_kind(record):
        try:
            # A byte-order mark is not text.
            record = {"caption": texts["txt"].decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise UserError(
                f"has a txt that is not text in UTF-8: {error}", "not text in UTF-8"
            ) from None
    return record, images


# ---- samples ----


def make_sample(raw, images="", allow_outside=False):
    """Returns a RawRecord as a Sample. Raises UserError.

    images: as in read_records. allow_outside: as in find_image_ref.
    """
    name, turns, paths = parse_conversation(raw)
    refs = raw.images or [
        find_image_ref(path, raw.folder, images, raw.where, allow_outside) for path in paths
    ]
    counted = [f"an unused `{field}`" for field in records.find_kind(raw.record)[2]]
    match raw.record:
        case {"conversations": [{"value": str()}, *_]} if len(refs) == 1:  # LLaVA's format
            questions = [text for role, text in turns if role != "assistant"]
            if any(re.search(r"\S\s*<image>", text) for text in questions):
                counted.append("<image> moved to the front of its turn, as LLaVA does")
            turns = [
                (role, text if role == "assistant" else records.image_first(text))
                for role, text in turns
            ]
    return Sample(name, raw.where, turns, refs, counted)


def parse_conversation(raw):
    """Returns (id, turns) of a RawRecord, and the paths of the images that it names.

    The images may be missing. Raises UserError.
    """
    if raw.error:
        raise raw.error
    try:
        name = records.as_text(record_id(raw), "id")
        check_sample_name(name)
        paths = [] if raw.images else raw.record.get("images", [])
        image_count = len(raw.images or paths)
        messages = records.record_messages(raw.record, name, image_count)
    except UserError as error:
        raise UserError(f"{raw.where}: {error}", error.reason) from None
    turns = read_turns({"conversations": messages}, raw.where)
    check_turns(turns, image_count, raw.where)
    return name, turns, paths


def record_id(raw):
    """Returns the id that a record states (of any type), else that of its place."""
    stated = records.first_field(raw.record or {}, "id", "question_id")
    return raw.name if stated is None else stated


def read_texts(paths):
    """Yields the text of each turn of some sources, to train a tokenizer.

    Records that cannot be read are left out and counted; `prepare.py data` names each of them.
    """
    count, errors = 0, []
    for raw in read_records(paths):
        try:
            yield from (text for _, text in parse_conversation(raw)[1])
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
