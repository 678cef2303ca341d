"""References to images that are not opened yet, and how their bytes are read.

An image lies in a file of its own, in a zip or in a tar, or its bytes came with its record.
"""

import functools
import os
import stat
import zipfile
from pathlib import Path
from typing import NamedTuple

from .. import UserError

MAX_IMAGE_BYTES = 1 << 30  # of an image's file


class ImageFile(NamedTuple):
    """An image in a file of its own."""

    path: str


class ZipMember(NamedTuple):
    """An image in a zip."""

    archive: str
    name: str


class TarMember(NamedTuple):
    """An image in a tar, by its place in bytes."""

    file: str
    name: str
    offset: int
    size: int


class ImageBytes(NamedTuple):
    """An image whose bytes came with its record."""

    name: str
    content: bytes


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def printable(text):
    return text if text.isprintable() else ascii(text)


def find_image_ref(path, folder, images, where):
    """Returns the reference to an image that a record names by `path`.

    The path is relative to `images` (--images: a folder or a zip), or to the record's own folder if
    there is none; a JSON file may also give an absolute path into that folder. Links are followed:
    they are made by whoever made the folder, not by a record.
    Raises UserError, which begins with `where`, if the path leads outside or no such image exists.
    """
    is_zip = images and not os.path.isdir(images)
    if not (images or folder is not None):
        raise UserError(
            f"{where}: it names {path!r} but brings no image: give its folder by --images",
            "image missing",
        )
    # "link/../a" is taken as "a", not as what lies beside the target of the link
    stated, path = path, path and os.path.normpath(path)
    root = os.path.abspath(images or folder or ".")
    is_outside = os.path.isabs(path) and (
        is_zip or folder is None or not Path(path).is_relative_to(root)
    )
    if is_outside or path.split("/")[0] == "..":
        raise UserError(
            f"{where}: the path {stated!r} climbs out of {images or folder or '.'}",
            "path climbs out",
        )
    if not is_zip:
        ref = ImageFile(os.path.join(images or folder, path))
        exists = os.path.isfile(ref.path)
    else:
        ref = ZipMember(images, path)
        info = open_zip(images, os.getpid()).NameToInfo.get(ref.name)
        exists = info is not None and not info.is_dir()
        exists = exists and not stat.S_ISLNK(info.external_attr >> 16)
    if not exists:
        raise UserError(f"{where}: no such image: {os.path.join(*ref)!r}", "image missing")
    return ref


@functools.lru_cache(4)
def open_zip(path, process):
    """Returns an open zip. Each process (an id) has its own: a shared one has one file position."""
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"--images={path}: no such folder or zip") from None
    except Exception as error:  # on broken bytes zipfile raises nearly every kind of error
        raise UserError(
            f"--images={path} is neither a folder nor a zip: {one_line(error)}"
        ) from None


def load_image_bytes(ref):
    """Returns (bytes, name for messages) of an image.

    Raises UserError if it is missing by now, cannot be unpacked or is larger than MAX_IMAGE_BYTES.
    """
    if isinstance(ref, ImageBytes):
        return ref.content, ref.name
    name = printable(os.path.join(*ref[:2]))
    try:
        file, size = open_image_ref(ref)
        with file:
            if size > MAX_IMAGE_BYTES:
                raise UserError(
                    f"{name} has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of an image",
                    "image too large",
                )
            content = file.read(size)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}", "image missing") from None
    except Exception as error:  # on broken bytes zipfile raises nearly every kind of error
        raise UserError(
            f"{name} cannot be unpacked: {one_line(error)}", "image cannot be unpacked"
        ) from None
    if len(content) < size:
        raise UserError(f"{name} ends after {len(content):,} of {size:,} bytes", "image cut short")
    return content, name


def open_image_ref(ref):
    """Returns (file, size): an open file, positioned at the image, and the image's bytes."""
    match ref:
        case ImageFile(path):
            file = open(path, "rb")
            return file, os.fstat(file.fileno()).st_size
        case TarMember(path, _, offset, size):
            file = open(path, "rb")
            file.seek(offset)
            return file, size
        case ZipMember(path, name):
            archive = open_zip(path, os.getpid())
            return archive.open(name), archive.getinfo(name).file_size
