"""From a picture file, whatever its kind, to the uint8 tiles that training and use both see.

The picture policy is a plain dict that travels in the checkpoint:

    tile      pixels across a tile            fit        squash, pad (to a square, with the mean colour) or crop (the middle square)
    patch     pixels across a patch           resample   bicubic or bilinear
    shuffle   shuffle² patches a token        mean, std  three numbers each, of pixels between 0 and 1; applied by the model, on its device
"""
import warnings

import numpy as np
from PIL import Image, ImageOps

from . import Mistake

MAX_PIXELS = 100_000_000  # a picture of 300 MB; a bomb of a few kB unpacks to more
MAX_ASPECT = 200
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FITS = ("squash", "pad", "crop")


def check_policy(policy):
    """Raise Mistake unless `fit` and `resample` are known and tile, patch and shuffle divide."""
    if policy["fit"] not in FITS or policy["resample"] not in RESAMPLE:
        raise Mistake(f"fit {policy['fit']} must be one of {', '.join(FITS)}, resample {policy['resample']} one of {', '.join(RESAMPLE)}")
    if min(policy["tile"], policy["patch"], policy["shuffle"]) < 1 or policy["tile"] % (policy["patch"] * policy["shuffle"]):
        raise Mistake(f"a tile of {policy['tile']} pixels is no multiple of patch {policy['patch']} × shuffle {policy['shuffle']}")


def picture_tokens(tiles, policy):
    """How many tokens a picture of so many tiles takes; everyone who counts, counts with this."""
    return tiles * (policy["tile"] // policy["patch"] // policy["shuffle"]) ** 2


def open_picture(path):
    """Any picture file as RGB: turned as its EXIF says, transparency over white, 16 bits scaled to 8, the first frame if it moves.

    Raises Mistake, naming the file, for what is no picture, is cut short, has more than MAX_PIXELS or is longer than MAX_ASPECT times its width.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise Mistake(f"{path}: {width} × {height} pixels are more than {MAX_PIXELS:,}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise Mistake(f"{path}: {width} × {height} pixels are longer than {MAX_ASPECT} to 1")
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    except Image.DecompressionBombError:
        raise Mistake(f"{path}: more than {MAX_PIXELS:,} pixels") from None
    except Mistake:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError, ZeroDivisionError, NotImplementedError,
            MemoryError, AttributeError) as error:  # what Pillow's decoders raise on broken files; each is the file's fault, not ours
        raise Mistake(f"{path} is not a picture that can be read: {error}") from None


def to_rgb(picture):
    if picture.mode.startswith(("I;16", "I")):  # Pillow's own conversion clips at 255
        values_YX = np.asarray(picture).astype(np.float64)
        return Image.fromarray(np.round(values_YX.clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        return Image.fromarray(np.nan_to_num(np.asarray(picture)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def cut(picture, policy):
    """An RGB picture as tiles_NCYX (uint8); here N is 1."""
    tile, resample = policy["tile"], RESAMPLE[policy["resample"]]
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
    if picture.size != (tile, tile):
        picture = picture.resize((tile, tile), resample)
    return np.asarray(picture).transpose(2, 0, 1)[None]


def load_tiles(path, policy):
    """A picture file as tiles_NCYX (uint8), by the model's own policy."""
    return cut(open_picture(path), policy)
