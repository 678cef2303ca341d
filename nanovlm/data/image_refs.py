"""Where a picture lies, and how its bytes are fetched: a file, a member of a zip, a span of a tar, or bytes that came along."""

import functools
import os
import stat
import zipfile
from pathlib import Path
from typing import NamedTuple

from .. import UserError

MAX_IMAGE_BYTES = 1 << 30  # of a picture's file


class ImageFile(NamedTuple):
    """A picture in a file of its own."""

    path: str


class ZipMember(NamedTuple):
    """A picture in a zip."""

    archive: str
    name: str


class TarMember(NamedTuple):
    """A picture in a tar, by the bytes that it takes there."""

    file: str
    name: str
    offset: int
    size: int


class ImageBytes(NamedTuple):
    """A picture that came with its record."""

    name: str
    content: bytes


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def printable(text):
    return text if text.isprintable() else ascii(text)


def find_image_ref(path, folder, images, where):
    """A ref to the picture that a record names: one in `images`, else in the record's own folder, of which a JSON file may give the whole path.
    Links are followed: they are the doing of whoever laid out the folder, not of a record."""
    zipped = images and not os.path.isdir(images)
    if not (images or folder is not None):
        raise UserError(
            f"{where}: it names {path!r} but brings no picture along, and no --images says where that is",
            "picture missing",
        )
    named, path = (
        path,
        path and os.path.normpath(path),
    )  # "link/../a" is what it says, not what lies beside where the link leads
    root = os.path.abspath(images or folder or ".")
    outside = os.path.isabs(path) and (
        zipped or folder is None or not Path(path).is_relative_to(root)
    )
    if outside or path.split("/")[0] == "..":
        raise UserError(
            f"{where}: the path {named!r} climbs out of {images or folder or '.'}",
            "path climbs out",
        )
    if not zipped:
        ref = ImageFile(os.path.join(images or folder, path))
        there = os.path.isfile(ref.path)
    else:
        ref = ZipMember(images, path)
        info = open_zip(images, os.getpid()).NameToInfo.get(ref.name)
        there = (
            info is not None and not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
        )
    if not there:
        raise UserError(f"{where}: no such picture: {os.path.join(*ref)!r}", "picture missing")
    return ref


@functools.lru_cache(4)
def open_zip(path, process):
    """An opened zip. Each process opens its own: one that is inherited shares its place in the file."""
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"--images={path} is no folder") from None
    except Exception as error:  # on broken bytes zipfile raises nearly every kind of error
        raise UserError(
            f"--images={path} is neither a folder nor a zip: {one_line(error)}"
        ) from None


def load_image_bytes(ref):
    """(bytes, name for messages) of a picture; raises UserError if it is not there any more, cannot be unpacked or is too large to be one."""
    if isinstance(ref, ImageBytes):
        return ref.content, ref.name
    name = printable(os.path.join(*ref[:2]))
    try:
        file, size = open_image_ref(ref)
        with file:
            if size > MAX_IMAGE_BYTES:
                raise UserError(
                    f"{name} has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of a picture",
                    "picture too large",
                )
            content = file.read(size)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}", "picture missing") from None
    except Exception as error:  # on broken bytes zipfile raises nearly every kind of error
        raise UserError(
            f"{name} cannot be unpacked: {one_line(error)}", "picture cannot be unpacked"
        ) from None
    if len(content) < size:
        raise UserError(
            f"{name} ends after {len(content):,} of {size:,} bytes", "picture cut short"
        )
    return content, name


def open_image_ref(ref):
    """A file that stands where a picture begins, and how many bytes that has."""
    match ref:
        case ImageFile(path):
            file = open(path, "rb")
            return file, os.fstat(file.fileno()).st_size
        case TarMember(path, _, offset, size):
            file = open(path, "rb")
            file.seek(offset)
            return file, size
        case ZipMember(path, name):
            pack = open_zip(path, os.getpid())
            return pack.open(name), pack.getinfo(name).file_size
