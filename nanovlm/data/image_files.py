"""Opening pictures that nobody vouches for: any file's bytes become an RGB picture, or a UserError that names it, with a reason to be counted by."""

import contextlib
import io
import os
import re
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .. import UserError

IMAGE_FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # what people have; Pillow knows 40 more, some of which start other programs
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a bomb of a few kB unpacks to more
MAX_SIDE = 20_000  # the square that it is padded to is 1.2 GB
MAX_ASPECT = 200


def read_image(source, name=None, needed=None):
    """A picture, a path or its bytes, as RGB, and its (width, height): turned as EXIF says, transparency over white, 16 bits scaled to 8, the first
    frame if it moves.

    name: of bytes, for messages. needed: a function of (width, height) that says what size the picture will be resized to: a JPEG may then come
    smaller than the (width, height) that is returned. Raises UserError, naming the picture, for what is no picture of FORMATS, is cut short, has more
    than MAX_PIXELS, a side of more than MAX_SIDE or one MAX_ASPECT times the other, or holds grey that is neither 8 nor 16 bits.
    """

    def file():
        return io.BytesIO(source) if memory else source

    memory = isinstance(source, bytes)
    length = len(source) if memory else None
    with (
        image_errors(name or ("the picture" if memory else source), length),
        warnings.catch_warnings(action="ignore"),
        Image.open(file(), formats=IMAGE_FORMATS) as picture,
    ):
        check_image_size(*picture.size)
        size = draft_jpeg(picture, needed) if needed and picture.format in ("JPEG", "MPO") else None
        codings = [
            part.args for part in picture.tile
        ]  # how the file keeps a pixel, which loading forgets
        picture.load()
        if "transparency" in picture.info:
            convert_transparent_color(file(), picture, codings)
        ImageOps.exif_transpose(picture, in_place=True)
        return convert_to_rgb(picture), size or picture.size


@contextlib.contextmanager
def image_errors(name, length=None):
    """Whatever opening a picture raises, as a UserError that names it, with its reason; length: of a picture in memory."""
    try:
        yield
    except UserError as mistake:
        raise UserError(f"{name} {mistake}", mistake.reason) from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder, not a picture", "no picture") from None
    except Image.UnidentifiedImageError:
        empty = (os.path.getsize(name) if length is None else length) == 0
        what = (
            "is empty (0 bytes)"
            if empty
            else f"is no picture that can be read here ({', '.join(IMAGE_FORMATS)})"
        )
        raise UserError(f"{name} {what}", "no picture") from None
    except (
        Image.DecompressionBombError
    ) as error:  # Pillow counts before we can; its message says how many
        pixels = int(re.search(r"\((\d+) pixels\)", str(error))[1])
        raise UserError(f"{name} {too_many_pixels(pixels)}", "picture too large") from None
    except FileNotFoundError as error:
        raise UserError(f"{name}: {error.strerror}", "picture missing") from None
    except Exception as error:  # on broken bytes Pillow raises nearly every kind of error
        if isinstance(error, OSError) and error.strerror:  # the system's word, not Pillow's
            raise UserError(f"{name}: {error.strerror}", "picture unreadable") from None
        raise UserError(
            f"{name} is broken or cut short: {' '.join(str(error).split()) or type(error).__name__}",
            "picture cut short",
        ) from None


def draft_jpeg(picture, needed):
    """Have a JPEG's DCT decoded to a half, a quarter or an eighth, if that is at least twice as large as `needed` says of its (width, height);
    returns these, upright."""
    turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    size = picture.size[::-1] if turned else picture.size
    enough = tuple(2 * edge for edge in needed(size))
    picture.draft(None, enough[::-1] if turned else enough)
    return size


def too_many_pixels(pixels):
    return f"has {pixels:,} pixels, more than the {MAX_PIXELS:,} that are allowed"


def check_image_size(width, height):
    if width * height > MAX_PIXELS:
        raise UserError(too_many_pixels(width * height), "picture too large")
    if max(width, height) > MAX_SIDE:
        raise UserError(
            f"is {width} x {height} pixels, more than the {MAX_SIDE:,} that a side may have",
            "picture too large",
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"is {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other",
            "picture too long and thin",
        )


def convert_transparent_color(file, picture, codings):
    """A PNG names its transparent colour in the file's own depth; Pillow compares it with the 8 bits that it decodes to. In place."""
    if "L;2" in codings or "L;4" in codings:
        picture.info["transparency"] *= 85 if "L;2" in codings else 17  # 255 / 3, 255 / 15
    if "RGB;16B" in codings:
        with Image.open(file, formats=["PNG"]) as lower:
            lower.tile = [
                part._replace(args="RGB;16L") for part in lower.tile
            ]  # the bytes swapped: the lower 8 bits of each number
            values_YXC = np.asarray(picture).astype(np.uint16) << 8 | np.asarray(lower)
        picture.putalpha(Image.fromarray((values_YXC != picture.info.pop("transparency")).any(-1)))


def convert_to_rgb(picture):
    """A loaded picture of any mode as RGB; UserError for grey values that are neither 8 nor 16 bits."""
    if picture.mode == "F":
        raise UserError(
            "holds float pixels, which have no agreed white", "picture of strange pixels"
        )
    if picture.mode.startswith("I"):
        return convert_16_bit_gray(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def convert_16_bit_gray(picture):
    """The upper 8 of 16 bits, as Pillow takes them from 16-bit colour; its own conversion of grey would clip at 255."""
    values_YX = np.asarray(picture).astype(np.int64)
    if values_YX.min() < 0 or values_YX.max() > 65535:
        raise UserError(
            f"holds grey from {values_YX.min()} to {values_YX.max()}, neither 8 nor 16 bits",
            "picture of strange pixels",
        )
    grey_YX = values_YX >> 8
    grey_YX[values_YX == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey_YX.astype(np.uint8)).convert("RGB")
