"""References to images that are not opened yet, and how their bytes are read.

An image lies in a file of its own, in a zip or in a tar, or its bytes came with its record.
"""

import errno
import functools
import os
import stat
import zipfile
from pathlib import Path
from typing import NamedTuple

from .. import UserError

MAX_IMAGE_BYTES = 1 << 30  # of the file of an image


class ImageFile(NamedTuple):
    """An image in a file of its own."""

    path: str


class ZipMember(NamedTuple):
    """An image in a zip."""

    archive: str
    name: str


class TarMember(NamedTuple):
    """An image in a tar: `size` bytes from `offset` on."""

    file: str
    name: str
    offset: int
    size: int


class ImageBytes(NamedTuple):
    """An image whose bytes came with its record."""

    name: str
    content: bytes


def one_line(error):
    """Returns the text of an error as one line, or the name of its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text):
    """Returns a text, or its Python literal in ASCII if it cannot be printed."""
    return text if text.isprintable() else ascii(text)


def find_image_ref(path, folder, images, where):
    """Returns the reference to an image that a record names by `path`.

    The path is relative to `images` (--images: a folder or a zip). Without `images` it is relative
    to `folder`, the folder of the record. It may also be an absolute path into that folder. Links
    in the folder are followed: its owner made them, not the record.
    Raises UserError, which begins with `where`, if the path leads outside or no such image exists.
    """
    root = images or folder
    if root is None:
        raise UserError(
            f"{where}: it names {path!r} but brings no image: give its folder by --images",
            "image missing",
        )
    # normpath makes "link/../a" an "a" in the folder, not one beside the target of the link
    full_root = os.path.abspath(root)
    full_path = os.path.normpath(os.path.join(full_root, path))
    if not Path(full_path).is_relative_to(full_root):
        raise UserError(f"{where}: the path {path!r} climbs out of {root}", "path climbs out")
    inside = os.path.relpath(full_path, full_root)
    if images and not os.path.isdir(images):
        ref = ZipMember(images, inside)
        info = open_zip(images, os.getpid()).NameToInfo.get(inside)
        exists = info is not None and not stat.S_ISLNK(info.external_attr >> 16)
    else:
        ref = ImageFile(os.path.join(root, inside))
        exists = os.path.isfile(ref.path)
    if not exists:
        raise UserError(f"{where}: no such image: {os.path.join(*ref)!r}", "image missing")
    return ref


@functools.lru_cache(4)
def open_zip(path, process):
    """Returns an open zip. Each process (an id) has its own, because a file has one position.

    Raises UserError if it is no zip.
    """
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # on broken bytes zipfile raises nearly every kind of error
        raise UserError(
            f"--images={path} is neither a folder nor a zip: {one_line(error)}"
        ) from None


def open_file(path):
    """Returns an open file. Raises OSError if it is a pipe or a device, which may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def load_image_bytes(ref):
    """Returns (bytes, name for messages) of an image.

    Raises UserError if it cannot be read or is larger than MAX_IMAGE_BYTES.
    """
    if isinstance(ref, ImageBytes):
        return ref.content, ref.name
    name = printable(os.path.join(*ref[:2]))
    try:
        file, size = open_image_ref(ref)
        with file:
            if size > MAX_IMAGE_BYTES:
                raise ValueError(
                    f"{size:,} bytes are more than the {MAX_IMAGE_BYTES:,} of an image"
                )
            content = file.read(size)
        if len(content) < size:
            raise EOFError(f"it ends after {len(content):,} of {size:,} bytes")
    except Exception as error:  # on broken bytes zipfile raises nearly every kind of error
        raise UserError(
            f"{name} cannot be read: {one_line(error)}", "image cannot be read"
        ) from None
    return content, name


def open_image_ref(ref):
    """Returns (file, size): an open file, positioned at the image, and the image's bytes."""
    if isinstance(ref, ZipMember):
        archive = open_zip(ref.archive, os.getpid())
        return archive.open(ref.name), archive.getinfo(ref.name).file_size
    file = open_file(ref[0])
    if isinstance(ref, ImageFile):
        return file, os.fstat(file.fileno()).st_size
    file.seek(ref.offset)
    return file, ref.size
