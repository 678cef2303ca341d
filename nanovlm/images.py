"""From a picture file, whatever its kind, to the uint8 tiles that training and use both see.

The picture policy is a plain dict that travels in the checkpoint:

    tile      pixels across a tile            fit        squash, pad (to a square, with the mean colour) or crop (the middle square)
    patch     pixels across a patch           resample   bicubic or bilinear
    shuffle   shuffle² patches a token        mean, std  three numbers each, of pixels between 0 and 1; applied by the model, on its device
"""
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

from . import Mistake

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what people have; Pillow knows 40 more, some of which start other programs
FITS = ("squash", "pad", "crop")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a bomb of a few kB unpacks to more
MAX_ASPECT = 200


# ---- the policy ----

def check_policy(policy):
    """Raise Mistake unless a policy has each of its parts, nothing else, and numbers that go together."""
    def whole(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 1

    def shares(x, low):
        return isinstance(x, list | tuple) and len(x) == 3 and all(isinstance(c, int | float) and low <= c <= 1 for c in x)

    rules = {
        **{name: (whole, "is no whole number from 1 on") for name in ("tile", "patch", "shuffle")},
        "fit": (lambda x: x in FITS, f"is none of {', '.join(FITS)}"),
        "resample": (lambda x: x in FILTERS, f"is none of {', '.join(FILTERS)}"),
        "mean": (lambda x: shares(x, 0), "is not three numbers from 0 to 1"),
        "std": (lambda x: shares(x, 1e-6), "is not three numbers above 0, at most 1"),
    }
    wrong = [f"{name} is missing" for name in rules if name not in policy] + [f"{name} is not known" for name in policy if name not in rules]
    wrong += [f"{name} {policy[name]!r} {what}" for name, (holds, what) in rules.items() if name in policy and not holds(policy[name])]
    if not wrong:
        across, left = divmod(policy["tile"], policy["patch"])
        if left:
            wrong = [f"a tile of {policy['tile']} pixels is not whole patches of {policy['patch']}"]
        elif across % policy["shuffle"]:
            wrong = [f"{across} patches across a tile ({policy['tile']} pixels / {policy['patch']}) do not shuffle by {policy['shuffle']}"]
    if wrong:
        raise Mistake(f"picture policy: {'; '.join(wrong)}")


def tokens_per_tile(policy):
    return (policy["tile"] // policy["patch"] // policy["shuffle"]) ** 2


def picture_tokens(tiles, policy):
    """How many tokens a picture of so many tiles takes; everyone who counts, counts with this."""
    return tiles * tokens_per_tile(policy)


# ---- opening ----

def open_picture(path):
    """Any picture file as RGB: turned as its EXIF says, transparency over white, 16 bits scaled to 8, the first frame if it moves.

    Raises Mistake, naming the file, for what is no picture of FORMATS, is cut short, has more than MAX_PIXELS or is longer than MAX_ASPECT
    times its width.
    """
    picture = decode(path)
    try:
        return to_rgb(picture)
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from None


def decode(path):
    """A picture as Pillow decodes it, upright; every way in which that can fail as a Mistake."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            check_size(path, *picture.size)
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Mistake:
        raise
    except IsADirectoryError:
        raise Mistake(f"{path} is a folder, not a picture") from None
    except (FileNotFoundError, PermissionError) as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    except Image.UnidentifiedImageError:
        what = "is empty (0 bytes)" if os.path.getsize(path) == 0 else f"is no picture that can be read here ({', '.join(FORMATS)})"
        raise Mistake(f"{path} {what}") from None
    except Image.DecompressionBombError as error:  # Pillow counts before we can; its message says how many
        check_size(path, int(re.search(r"\((\d+) pixels\)", str(error))[1]), 1)
        raise Mistake(f"{path}: {error}") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly every kind of error; nothing of ours runs in here
        raise Mistake(f"{path} is broken or cut short: {' '.join(str(error).split()) or type(error).__name__}") from None


def check_size(path, width, height):
    if width * height > MAX_PIXELS:
        raise Mistake(f"{path} has {width * height:,} pixels, more than the {MAX_PIXELS:,} that are allowed")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise Mistake(f"{path} is {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def to_rgb(picture):
    """A loaded picture of any mode as RGB; Mistake for grey values that are neither 8 nor 16 bits."""
    if picture.mode == "F":
        raise Mistake("float pixels have no agreed white")
    if picture.mode.startswith("I"):
        return grey_of_16_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def grey_of_16_bits(picture):
    """The upper 8 of 16 bits, as Pillow takes them from 16-bit colour; its own conversion of grey would clip at 255."""
    values_YX = np.asarray(picture).astype(np.int64)
    if values_YX.min() < 0 or values_YX.max() > 65535:
        raise Mistake(f"grey from {values_YX.min()} to {values_YX.max()} is neither 8 nor 16 bits")
    grey_YX = values_YX >> 8
    grey_YX[values_YX == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey_YX.astype(np.uint8)).convert("RGB")


# ---- cutting ----

def cut(picture, policy):
    """An RGB picture as tiles_NCYX (uint8); here N is 1."""
    tile, resample = policy["tile"], FILTERS[policy["resample"]]
    if policy["fit"] == "pad":  # as LLaVA-1.5's expand2square
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in policy["mean"]))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    if policy["fit"] == "crop":  # as CLIP: the short side becomes `tile`, then the middle is cut out
        short = min(picture.size)
        picture = picture.resize((picture.width * tile // short, picture.height * tile // short), resample)
        left, top = (picture.width - tile) // 2, (picture.height - tile) // 2
        picture = picture.crop((left, top, left + tile, top + tile))
    return np.array(picture.resize((tile, tile), resample)).transpose(2, 0, 1)[None].copy()


def load_tiles(path, policy):
    """A picture file as tiles_NCYX (uint8), by the model's own policy."""
    return cut(open_picture(path), policy)


def picture_of(tile_CYX):
    """A tile as a picture to look at."""
    return Image.fromarray(np.ascontiguousarray(tile_CYX.transpose(1, 2, 0)))
