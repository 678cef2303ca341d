"""Opening untrusted images: the bytes of any file become an RGB image or a UserError.

The error names the image and has a reason, by which the skipped images of a dataset are counted.
"""

import contextlib
import io
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .. import UserError
from .image_refs import MAX_IMAGE_BYTES, one_line, open_file

# Pillow knows 40 more formats, some of which start other programs.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a decompression bomb of a few kB unpacks to more
MAX_SIDE = 20_000  # padded to a square, this is 1.2 GB
MAX_ASPECT = 200
PNG_NOTES = b"tEXt zTXt iTXt iCCP eXIf tIME pHYs gAMA cHRM".split()


def read_image(source, name=None, required_size=None):
    """Returns (image, size): an image (a path, or the bytes of a file) as RGB, and (width, height).

    It is turned as EXIF says. Transparency becomes white, 16 bits become 8, and an animation
    becomes its first frame. The transparent color of a PNG counts if the PNG has 8 bits. EXIF that
    cannot be read, and broken or long notes of a PNG (text, color profile) are left out.
    name: of bytes, for messages. required_size: a function from (width, height) to the size that
    the image will be resized to. If it is given, a JPEG may be decoded smaller than the returned
    size.

    Raises UserError, which names the image, if the file is not an image of IMAGE_FORMATS, is cut
    short, has more than MAX_PIXELS, has a side of more than MAX_SIDE or one MAX_ASPECT times the
    other, or holds gray values that have neither 8 nor 16 bits.
    """
    in_memory = isinstance(source, bytes)

    def load(image):
        can_draft = required_size and image.format in ("JPEG", "MPO")
        size = draft_jpeg(image, required_size) if can_draft else None
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF
            ImageOps.exif_transpose(image, in_place=True)
        return convert_to_rgb(image), size or image.size

    with (
        image_errors(name or ("the image" if in_memory else source)),
        warnings.catch_warnings(action="ignore"),
    ):
        if not in_memory:
            with open_file(source) as file:
                source = file.read(MAX_IMAGE_BYTES)
        return open_image(source, load)


def open_image(content, read):
    """Returns read(image) of an image whose file has these bytes.

    Notes do not matter: if it fails for a PNG, it is tried again without them.
    """
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            check_image_size(*image.size)
            return read(image)
    except Exception:
        rest = drop_notes(content)
        if rest == content:
            raise
    return open_image(rest, read)


def drop_notes(content):
    """Returns the bytes of a PNG without its notes, of which only intact EXIF stays; of another
    file, all of them.

    Pillow reads no image with a note that has a wrong checksum or takes more than 1 MB.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, start = [content[:8]], 8
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        chunk = content[start:end]  # its length, its kind, its content and their checksum
        is_intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if chunk[4:8] not in PNG_NOTES or (chunk[4:8] == b"eXIf" and is_intact):
            parts.append(chunk)
        start = end
    return b"".join(parts)


@contextlib.contextmanager
def image_errors(name):
    """Turns each error of opening an image into a UserError that names it, with a reason."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} {error}", error.reason) from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{name} is not an image that can be read here ({', '.join(IMAGE_FORMATS)})", "no image"
        ) from None
    except Exception as error:  # on broken bytes Pillow raises nearly every kind of error
        if isinstance(error, OSError) and error.strerror:  # from the system, not from Pillow
            raise UserError(f"{name}: {error.strerror}", "image cannot be read") from None
        raise UserError(
            f"{name} is broken or cut short, or too large: {one_line(error)}", "image broken"
        ) from None


def draft_jpeg(image, required_size):
    """Returns the upright (width, height) of a JPEG, and sets it to be decoded smaller.

    It is decoded at a half, a quarter or an eighth if that is at least twice the required size.
    """
    is_rotated = False
    with contextlib.suppress(Exception):  # broken EXIF
        is_rotated = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    size = image.size[::-1] if is_rotated else image.size
    min_size = tuple(2 * edge for edge in required_size(size))
    image.draft(None, min_size[::-1] if is_rotated else min_size)
    return size


def check_image_size(width, height):
    """Raises UserError if an image has too many pixels, a side too long, or an extreme shape."""
    is_large = width * height > MAX_PIXELS or max(width, height) > MAX_SIDE
    if is_large or not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        raise UserError(
            f"is {width} x {height} pixels: an image may have {MAX_PIXELS:,} pixels, {MAX_SIDE:,} "
            f"along a side, and a side at most {MAX_ASPECT} times the other",
            "image too large or too thin",
        )


def convert_to_rgb(image):
    """Returns a loaded image of any mode as RGB.

    Raises UserError if its gray values have neither 8 nor 16 bits.
    """
    if image.mode[0] in "FI":
        values_YX = np.asarray(image)
        low, high = values_YX.min(), values_YX.max()
        if image.mode == "F" or low < 0 or high > 65535:
            raise UserError(
                f"holds gray from {low} to {high}, neither 8 nor 16 bits: {values_YX.dtype}",
                "unsupported pixel format",
            )
        # the upper 8 of 16 bits, as Pillow does for color; gray values it would clip at 255
        image = Image.fromarray((values_YX >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
