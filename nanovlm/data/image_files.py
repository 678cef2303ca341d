"""Opening untrusted images: the bytes of any file become an RGB image or a UserError.

The error names the image and has a reason, by which the skipped images of a dataset are counted.
"""

import contextlib
import io
import os
import re
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .. import UserError

# Pillow knows 40 more formats, some of which start other programs.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a decompression bomb of a few kB unpacks to more
MAX_SIDE = 20_000  # padded to a square, this is 1.2 GB
MAX_ASPECT = 200


def read_image(source, name=None, required_size=None):
    """Returns (image, size): an image (a path, or the bytes of a file) as RGB, and (width, height).

    It is turned as EXIF says. Transparency becomes white, 16 bits become 8, and an animation
    becomes its first frame.
    name: of bytes, for messages. required_size: a function from (width, height) to the size that
    the image will be resized to. If it is given, a JPEG may be decoded smaller than the returned
    size.

    Raises UserError, which names the image, if the file is no image of IMAGE_FORMATS, is cut short,
    has more than MAX_PIXELS, has a side of more than MAX_SIDE or one MAX_ASPECT times the other, or
    holds gray values that have neither 8 nor 16 bits.
    """

    def file():
        return io.BytesIO(source) if in_memory else source

    in_memory = isinstance(source, bytes)
    length = len(source) if in_memory else None
    with (
        image_errors(name or ("the image" if in_memory else source), length),
        warnings.catch_warnings(action="ignore"),
        Image.open(file(), formats=IMAGE_FORMATS) as image,
    ):
        check_image_size(*image.size)
        can_draft = required_size and image.format in ("JPEG", "MPO")
        size = draft_jpeg(image, required_size) if can_draft else None
        # the pixel format in the file, which load() forgets
        raw_modes = [tile.args for tile in image.tile]
        image.load()
        if "transparency" in image.info:
            convert_transparent_color(file(), image, raw_modes)
        ImageOps.exif_transpose(image, in_place=True)
        return convert_to_rgb(image), size or image.size


@contextlib.contextmanager
def image_errors(name, length=None):
    """Turns each error of opening an image into a UserError that names it, with a reason.

    length: number of bytes of an image in memory.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} {error}", error.reason) from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder, not an image", "no image") from None
    except Image.UnidentifiedImageError:
        if (os.path.getsize(name) if length is None else length) == 0:
            raise UserError(f"{name} is empty (0 bytes)", "no image") from None
        formats = ", ".join(IMAGE_FORMATS)
        raise UserError(
            f"{name} is no image that can be read here ({formats})", "no image"
        ) from None
    except Image.DecompressionBombError as error:
        # Pillow counts before check_image_size can; its message has the number.
        pixels = int(re.search(r"\((\d+) pixels\)", str(error))[1])
        raise UserError(f"{name} {too_many_pixels(pixels)}", "image too large") from None
    except FileNotFoundError as error:
        raise UserError(f"{name}: {error.strerror}", "image missing") from None
    except Exception as error:  # on broken bytes Pillow raises nearly every kind of error
        if isinstance(error, OSError) and error.strerror:  # from the system, not from Pillow
            raise UserError(f"{name}: {error.strerror}", "image unreadable") from None
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is broken or cut short: {text}", "image cut short") from None


def draft_jpeg(image, required_size):
    """Returns the upright (width, height) of a JPEG, and sets it to be decoded smaller.

    It is decoded at a half, a quarter or an eighth if that is at least twice the required size.
    """
    is_rotated = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    size = image.size[::-1] if is_rotated else image.size
    min_size = tuple(2 * edge for edge in required_size(size))
    image.draft(None, min_size[::-1] if is_rotated else min_size)
    return size


def too_many_pixels(pixels):
    return f"has {pixels:,} pixels, more than the {MAX_PIXELS:,} that are allowed"


def check_image_size(width, height):
    """Raises UserError if an image has too many pixels, a side too long, or an extreme shape."""
    if width * height > MAX_PIXELS:
        raise UserError(too_many_pixels(width * height), "image too large")
    if max(width, height) > MAX_SIDE:
        raise UserError(
            f"is {width} x {height} pixels, more than the {MAX_SIDE:,} that a side may have",
            "image too large",
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"is {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other",
            "image too long and thin",
        )


def convert_transparent_color(file, image, raw_modes):
    """Scales the transparent color of a PNG from the file's bits to the 8 bits of its pixels.

    A PNG names the color in its own bits, but Pillow compares it with the decoded ones. In place.
    """
    if "L;2" in raw_modes or "L;4" in raw_modes:
        image.info["transparency"] *= 85 if "L;2" in raw_modes else 17  # 255 / 3, 255 / 15
    if "RGB;16B" in raw_modes:
        with Image.open(file, formats=["PNG"]) as low:
            # the bytes swapped: the lower 8 bits of each number
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            values_YXC = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        opaque_YX = (values_YXC != image.info.pop("transparency")).any(-1)
        image.putalpha(Image.fromarray(opaque_YX))


def convert_to_rgb(image):
    """Returns a loaded image of any mode as RGB.

    Raises UserError if its gray values have neither 8 nor 16 bits.
    """
    if image.mode == "F":
        raise UserError(
            "holds float pixels, for which white is not defined", "unsupported pixel format"
        )
    if image.mode.startswith("I"):
        return convert_16_bit_gray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def convert_16_bit_gray(image):
    """Returns the upper 8 of 16 bits, as Pillow does for color; for gray it would clip at 255."""
    values_YX = np.asarray(image).astype(np.int64)
    if values_YX.min() < 0 or values_YX.max() > 65535:
        raise UserError(
            f"holds gray from {values_YX.min()} to {values_YX.max()}, neither 8 nor 16 bits",
            "unsupported pixel format",
        )
    gray_YX = values_YX >> 8
    gray_YX[values_YX == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray_YX.astype(np.uint8)).convert("RGB")
