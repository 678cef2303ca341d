"""From a picture file, whatever its kind, to the uint8 tiles that training and use both see.

The picture policy is a plain dict that travels in the checkpoint:

    tile      pixels across a tile            fit        squash, pad (to a square, with the mean colour), crop (the middle square) or anyres
    patch     pixels across a patch           resample   bicubic or bilinear
    shuffle   shuffle² patches a token        mean, std  three numbers each, of pixels between 0 and 1; applied by the model, on its device
    pinpoints for anyres alone, LLaVA-NeXT's way (Liu et al. 2024): the heights and widths in pixels that a picture may be enlarged to. Its first
              tile is the whole picture, squashed; the others cut the enlarged one, black around it, row by row.
"""
import math
import os
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from . import Mistake

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what people have; Pillow knows 40 more, some of which start other programs
FITS = ("squash", "pad", "crop")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a bomb of a few kB unpacks to more
MAX_SIDE = 20_000  # the square that it is padded to is 1.6 GB as Pillow keeps it
MAX_ASPECT = 200
NEWLINE = -1  # among places: the vector that a model has learnt for the end of a row


class Picture(NamedTuple):
    """A picture cut for a model."""

    tiles: np.ndarray   # (N, C, Y, X), uint8
    places: np.ndarray  # which tokens of the tiles are read, in order


# ---- the policy ----

def check_policy(policy):
    """Raise Mistake unless a policy has each of its parts, nothing else, and numbers that go together."""
    def whole(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 1

    def shares(x, low):
        return isinstance(x, list | tuple) and len(x) == 3 and all(isinstance(c, int | float) and low <= c <= 1 for c in x)

    def grids(x):
        return isinstance(x, list) and x and all(isinstance(edges, list) and len(edges) == 2 and all(map(of_tiles, edges)) for edges in x)

    def of_tiles(x):
        return whole(x) and whole(policy.get("tile")) and x % policy["tile"] == 0

    rules = {
        **{name: (whole, "is no whole number from 1 on") for name in ("tile", "patch", "shuffle")},
        "fit": (lambda x: x in FITS or x == "anyres", f"is none of {', '.join(FITS)}, anyres"),
        "resample": (lambda x: x in FILTERS, f"is none of {', '.join(FILTERS)}"),
        "mean": (lambda x: shares(x, 0), "is not three numbers from 0 to 1"),
        "std": (lambda x: shares(x, 1e-6), "is not three numbers above 0, at most 1"),
    }
    if policy.get("fit") == "anyres":
        rules["pinpoints"] = (grids, "is no list of heights and widths in whole tiles")
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


def pinpoint(size, policy):
    """The (height, width), of the policy's, that shows most of a picture of `size` (width, height), and of these the one that wastes least."""
    def merit(edges):
        scale = min(edges[1] / size[0], edges[0] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - edges[0] * edges[1]
    return max(policy["pinpoints"], key=merit)


def places(size, policy):
    """Which tokens of its tiles are read of a picture of `size` (width, height), in order: an array of places, NEWLINE among them after a row.

    anyres: the first tile's tokens, then the grid's, row by row across its tiles, without the rows or columns that show only black
    (`unpad_image` of transformers' modeling_llava_next.py, whose rounding this is).
    """
    tokens = tokens_per_tile(policy)
    if policy["fit"] != "anyres":
        return np.arange(tokens)
    side, (rows, columns) = math.isqrt(tokens), (edge // policy["tile"] for edge in pinpoint(size, policy))
    grid = np.arange(tokens, tokens * (1 + rows * columns)).reshape(rows, columns, side, side)
    grid_YX = grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    height, width = grid_YX.shape
    if size[0] / size[1] > width / height:
        black = (height - int(round(size[1] * (width / size[0]), 7))) // 2
        grid_YX = grid_YX[black : height - black]
    else:
        black = (width - int(round(size[0] * (height / size[1]), 7))) // 2
        grid_YX = grid_YX[:, black : width - black]
    return np.concatenate([np.arange(tokens), np.pad(grid_YX, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()])


def picture_tokens(size, policy):
    """How many tokens a picture of `size` (width, height) takes; everyone who counts, counts with this or with the places themselves."""
    return len(places(size, policy))


# ---- opening ----

def open_picture(path):
    """Any picture file as RGB: turned as its EXIF says, transparency over white, 16 bits scaled to 8, the first frame if it moves.

    Raises Mistake, naming the file, for what is no picture of FORMATS, is cut short, has more than MAX_PIXELS, a side of more than MAX_SIDE
    or one MAX_ASPECT times the other, or holds grey that is neither 8 nor 16 bits.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            check_size(*picture.size)
            codings = [part.args for part in picture.tile]  # how the file keeps a pixel, which loading forgets
            picture.load()
            if "transparency" in picture.info:
                translate_transparency(path, picture, codings)
            return to_rgb(ImageOps.exif_transpose(picture))
    except Mistake as mistake:
        raise Mistake(f"{path} {mistake}") from None
    except IsADirectoryError:
        raise Mistake(f"{path} is a folder, not a picture") from None
    except Image.UnidentifiedImageError:
        what = "is empty (0 bytes)" if os.path.getsize(path) == 0 else f"is no picture that can be read here ({', '.join(FORMATS)})"
        raise Mistake(f"{path} {what}") from None
    except Image.DecompressionBombError as error:  # Pillow counts before we can; its message says how many
        pixels = int(re.search(r"\((\d+) pixels\)", str(error))[1])
        raise Mistake(f"{path} {too_many(pixels)}") from None
    except Exception as error:  # on broken bytes Pillow raises nearly every kind of error
        if isinstance(error, OSError) and error.strerror:  # the system's word, not Pillow's
            raise Mistake(f"{path}: {error.strerror}") from None
        raise Mistake(f"{path} is broken or cut short: {' '.join(str(error).split()) or type(error).__name__}") from None


def too_many(pixels):
    return f"has {pixels:,} pixels, more than the {MAX_PIXELS:,} that are allowed"


def check_size(width, height):
    if width * height > MAX_PIXELS:
        raise Mistake(too_many(width * height))
    if max(width, height) > MAX_SIDE:
        raise Mistake(f"is {width} x {height} pixels, more than the {MAX_SIDE:,} that a side may have")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise Mistake(f"is {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def translate_transparency(path, picture, codings):
    """A PNG names its transparent colour in the file's own depth; Pillow compares it with the 8 bits that it decodes to. In place."""
    if "L;2" in codings or "L;4" in codings:
        picture.info["transparency"] *= 85 if "L;2" in codings else 17  # 255 / 3, 255 / 15
    if "RGB;16B" in codings:
        with Image.open(path, formats=["PNG"]) as lower:
            lower.tile = [part._replace(args="RGB;16L") for part in lower.tile]  # the bytes swapped: the lower 8 bits of each number
            values_YXC = np.asarray(picture).astype(np.uint16) << 8 | np.asarray(lower)
        picture.putalpha(Image.fromarray((values_YXC != picture.info.pop("transparency")).any(-1)))


def to_rgb(picture):
    """A loaded picture of any mode as RGB; Mistake for grey values that are neither 8 nor 16 bits."""
    if picture.mode == "F":
        raise Mistake("holds float pixels, which have no agreed white")
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
        raise Mistake(f"holds grey from {values_YX.min()} to {values_YX.max()}, neither 8 nor 16 bits")
    grey_YX = values_YX >> 8
    grey_YX[values_YX == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey_YX.astype(np.uint8)).convert("RGB")


# ---- cutting ----

def cut(picture, policy):
    """An RGB picture as tiles_NCYX (uint8); N is 1 but for anyres."""
    tile, resample = policy["tile"], FILTERS[policy["resample"]]
    if policy["fit"] == "anyres":
        grid, squashed = enlarge(picture, pinpoint(picture.size, policy), resample), picture.resize((tile, tile), resample)
        parts = [grid.crop((x, y, x + tile, y + tile)) for y in range(0, grid.height, tile) for x in range(0, grid.width, tile)]
        return np.stack([np.asarray(part).transpose(2, 0, 1) for part in (squashed, *parts)])
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


def enlarge(picture, edges, resample):
    """A picture in the middle of (height, width) pixels, as large as fits, black around it (`get_patch_output_size` of transformers)."""
    height, width = edges
    scale = min(width / picture.width, height / picture.height)
    inner = (min(math.ceil(picture.width * scale), width), min(math.ceil(picture.height * scale), height))
    padded = Image.new("RGB", (width, height))
    padded.paste(picture.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return padded


def load(path, policy):
    """A picture file as a Picture, by the model's own policy."""
    picture = open_picture(path)
    return Picture(cut(picture, policy), places(picture.size, policy))


def load_tiles(path, policy):
    """A picture file as tiles_NCYX (uint8), by the model's own policy."""
    return cut(open_picture(path), policy)


def picture_of(tile_CYX):
    """A tile as a picture to look at."""
    return Image.fromarray(np.ascontiguousarray(tile_CYX.transpose(1, 2, 0)))
