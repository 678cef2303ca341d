"""References to images that are not opened yet, and how their bytes are read.

An image lies in a file of its own, in a zip or in a tar, or its bytes came with its record.
"""

import base64
import errno
import functools
import io
import os
import stat
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

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
    """An image whose bytes, or data: URI, came with its record."""

    name: str
    content: bytes


def embedded_image(value, name):
    """Returns the image that a value of a record contains, as ImageBytes; None if it has none.

    value: bytes, {"bytes": bytes} or a data: URI. name: of the image, for messages.
    """
    match value:
        case bytes(content) | {"bytes": bytes(content)}:
            return ImageBytes(name, content)
        case str(uri) if uri[:5].lower() == "data:":
            return ImageBytes(name, uri.encode(errors="replace"))
    return None


def decode_data_uri(uri):
    """Returns the bytes that a data: URI (RFC 2397) holds. Raises ValueError for broken base64."""
    header, _, content = uri.partition(b",")
    content = unquote_to_bytes(content)
    if header.lower().endswith(b";base64"):
        content = base64.b64decode(b"".join(content.split()), validate=True)
    return content


def one_line(error):
    """Returns the text of an error as one line, or the name of its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text):
    """Returns a text, or its Python literal in ASCII if it cannot be printed."""
    return text if text.isprintable() else ascii(text)


def find_image_ref(path, folder, images, where, allow_outside=False):
    """Returns the reference to an image that a record names by `path`.

    The path is relative to `images` (--images: a folder or a zip). Without `images` it is relative
    to `folder`, the folder of the record. The image must lie inside, wherever `..`, an absolute
    path or links lead, unless allow_outside is true.
    Raises UserError, which begins with `where`, if it lies outside or does not exist.
    """
    if "://" in path:
        raise UserError(
            f"{where}: {path!r:.200} is a URL: images are not downloaded; name a file, or give a "
            "data: URI",
            "image on the network",
        )
    root = images or folder
    if root is None:
        raise UserError(
            f"{where}: it names {path!r:.200} but brings no image: give its folder by --images",
            "image missing",
        )
    ref, exists, is_inside = locate_image(path, root)
    if not is_inside and not allow_outside:
        raise UserError(
            f"{where}: the path {path!r:.200} climbs out of {root}: if you trust the source, give "
            "--allow_outside_images=true",
            "path climbs out",
        )
    if exists:
        return ref
    hint = ""
    # macOS writes accents as NFD, Windows a backslash between folders.
    forms = [unicodedata.normalize(form, path) for form in ("NFC", "NFD")]
    for other in (*forms, path.replace("\\", "/")):
        if other != path and locate_image(other, root)[1:] == (True, True):
            hint = f", but {other!a:.200} exists: name it so (/ for \\, accents as NFC or NFD)"
    raise UserError(f"{where}: no such image: {os.path.join(*ref)!r:.300}{hint}", "image missing")


def locate_image(path, root):
    """Returns (reference, whether it exists, whether it lies in root: a folder or a zip)."""
    # normpath makes "link/../a" an "a" in the folder, not one beside the target of the link
    full_root = os.path.abspath(root)
    full_path = os.path.normpath(os.path.join(full_root, path))
    is_inside = Path(full_path).is_relative_to(full_root)
    inside = os.path.relpath(full_path, full_root)
    if is_inside and root and not os.path.isdir(root):
        info = open_zip(root, os.getpid()).NameToInfo.get(inside)
        exists = info is not None and not stat.S_ISLNK(info.external_attr >> 16)
        return ZipMember(root, inside), exists, True
    ref = ImageFile(os.path.join(root, inside) if is_inside else full_path)
    exists = os.path.isfile(ref.path)
    if exists:
        is_link = os.path.islink(full_path)
        real = os.path.realpath(full_path) if is_link else real_folder(os.path.dirname(full_path))
        is_inside = Path(real).is_relative_to(real_folder(full_root))
    return ref, exists, is_inside


@functools.lru_cache(1024)  # a thousand images in one folder follow its links once
def real_folder(path):
    return os.path.realpath(path)


@functools.lru_cache(4)
def open_zip(path, process):
    """Returns an open zip. Each process (an id) has its own, because a file has one position.

    Raises UserError if it is not a zip.
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
    name = ref.name if isinstance(ref, ImageBytes) else printable(os.path.join(*ref[:2]))
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
    if isinstance(ref, ImageBytes):
        is_uri = ref.content[:5].lower() == b"data:"
        content = decode_data_uri(ref.content) if is_uri else ref.content
        return io.BytesIO(content), len(content)
    if isinstance(ref, ZipMember):
        archive = open_zip(ref.archive, os.getpid())
        return archive.open(ref.name), archive.getinfo(ref.name).file_size
    file = open_file(ref[0])
    if isinstance(ref, ImageFile):
        return file, os.fstat(file.fileno()).st_size
    file.seek(ref.offset)
    return file, ref.size
