"""The image processor: any image becomes the uint8 tiles that training and inference both take.

`image_feature_index` decides how many tokens an image takes and which features they are.
`load_image` makes the tiles. Both follow the image config, a plain dict that is part of the
checkpoint:

    tile      width and height of a tile in pixels
    patch     width and height of a patch in pixels
    shuffle   shuffle² patches become one token (pixel shuffle)
    fit       squash, pad (to a square, with the mean color), crop (the middle square), tiles,
              anyres, split or grid
    resample  bicubic, bilinear or lanczos
    mean, std three numbers each, of pixels between 0 and 1; the model normalizes on its device
    draft     faster, but other pixels: whether a JPEG may be decoded at a half, a quarter or an
              eighth of its size, as long as that is at least twice the size that it is resized
              to, and torch may resize instead of Pillow

    tiles     for fit=tiles, the way of InternVL (Chen et al. 2024) and NVLM (Dai et al. 2024): the
              image is squashed to a grid of at most `tiles` tiles, chosen by its shape, and cut row
              by row. thumbnail: the whole image follows as the last tile if there are several.
              choice: how the grid is chosen (GRID_CHOICES). tags: a text with its number before
              each tile.
    pinpoints for fit=anyres, the way of LLaVA-NeXT (Liu et al. 2024): the heights and widths in
              pixels that an image may be enlarged to. The first tile is the whole image, squashed.
              The others are the enlarged image with black borders, cut row by row.
    longest_edge
              for fit=split, the way of Idefics3 (Laurençon et al. 2024) and SmolVLM: the long side
              of the image becomes so many pixels; then each side is stretched to whole tiles and
              cut. If there are several tiles, the result, squashed to one, is the last. tile_texts:
              which texts stand around the tiles (TILE_TEXTS).
              For fit=grid, the way of Hugging Face's nanoVLM: each side is enlarged to whole tiles,
              the long one to at most longest_edge, or just to it with `enlarge`. The tile of the
              whole is the first.
"""

import functools
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .. import UserError
from ..files import size_error
from . import image_files

FITS = ("squash", "pad", "crop")  # each of these makes one tile of any image
RESAMPLE_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
# The texts before a tile of the grid, with its row and column from 1 on, after each row, after the
# grid, before the global tile, and after it.
TILE_TEXTS = {
    "idefics3": (
        "<fake_token_around_image><row_{row}_col_{column}>",
        "\n",
        "\n",
        "<fake_token_around_image><global-img>",
        "<fake_token_around_image>",
    ),
    "nanovlm": ("<row_{row}_col_{column}>", "", "", "<|global_image|>", ""),
}
SMALL_IMAGE_PIXELS = 1 << 16  # Pillow's first step takes at most half a millisecond for these
MAX_IMAGE_PIXELS = 1 << 28  # of all tiles of an image
IMAGE_NEWLINE = -1  # in feature_index: the learned vector at the end of a row (image_newline)


class ProcessedImage(NamedTuple):
    """An image as the model takes it."""

    tiles: np.ndarray  # (N, C, Y, X), uint8
    feature_index: np.ndarray  # which features of its tiles are used, in order
    size: tuple  # (width, height) of the upright image in pixels, before it is cut


# ---- the image config ----


def check_image_config(image_config, where="image config"):
    """Raises UserError, which begins with `where`, if an image config lacks a key, has an unknown
    one or an invalid value."""
    if not isinstance(image_config, dict):
        raise UserError(f"{where}: {image_config!r:.80} is not an image config")
    keys = ["tile", "patch", "shuffle", "fit", "resample", "mean", "std"]
    if image_config.get("fit") == "tiles":
        keys += ["tiles", "choice", "thumbnail", "tags"]
    if image_config.get("fit") == "anyres":
        keys.append("pinpoints")
    if image_config.get("fit") in ("split", "grid"):
        keys += ["longest_edge", "tile_texts"]
    if image_config.get("fit") == "grid":
        keys.append("enlarge")
    errors = [f"{key} is missing" for key in keys if key not in image_config]
    for key, value in image_config.items():
        values = CONFIG_VALUES.get(key)
        if key not in (*keys, "draft"):
            errors.append(f"{key} is not known")
        elif values and repr(value) not in map(repr, values):  # 1 == True, but its repr differs
            errors.append(f"{key} {value!r} is not one of {', '.join(map(str, values))}")
        elif key in ("tile", "patch", "shuffle", "tiles", "longest_edge"):
            errors += filter(None, [size_error(key, value)])
        elif key in ("mean", "std") and not is_color(value, 0 if key == "mean" else 1e-6):
            errors.append(f"{key} {value!r} is not three numbers from 0 to 1, for std above 0")
    if not errors:
        tile, patch = image_config["tile"], image_config["patch"]
        shuffle = image_config["shuffle"]
        # 27 patches of 14 pixels leave 6 of SigLIP so400m's 384 pixels unused.
        if tile < patch or tile // patch % shuffle:
            errors.append(
                f"{tile // patch} patches of {patch} pixels across a tile of {tile} do not shuffle "
                f"by {shuffle}"
            )
        split_edge = image_config.get("longest_edge", -tile) + tile
        pinpoints = np.array(image_config.get("pinpoints", [[tile, tile]]), dtype=object)
        is_whole = [not (size_error("edge", edge) or edge % tile) for edge in pinpoints.ravel()]
        if pinpoints.shape[1:] != (2,) or not all(is_whole):
            errors.append("pinpoints is not a list of heights and widths in whole tiles")
        elif (
            max(pinpoints.prod(1)) + image_config.get("tiles", 1) * tile**2 + split_edge**2
            > MAX_IMAGE_PIXELS
        ):
            errors.append(f"the tiles of an image have more than {MAX_IMAGE_PIXELS:,} pixels")
    if errors:
        raise UserError(f"{where}: {'; '.join(errors)}")


def is_color(value, low):
    """Returns whether a value is a list of three numbers from `low` to 1."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(isinstance(x, int | float) and low <= x <= 1 for x in value)


def tokens_per_tile(image_config):
    return (image_config["tile"] // image_config["patch"] // image_config["shuffle"]) ** 2


# ---- how many tiles and tokens ----


@functools.cache
def candidate_grids(max_tiles):
    """Returns each (columns, rows) of at most `max_tiles` tiles, the fewest tiles first.

    Grids of equally many tiles come in the order of a Python set, as in InternVL's code: of the
    grids that fit a large square equally well, GRID_CHOICES["area"] takes the first.
    """
    grids = set()
    for n in range(1, max_tiles + 1):
        for i in range(1, n + 1):
            for j in range(1, n + 1):
                if i * j <= max_tiles:
                    grids.add((i, j))
    return sorted(grids, key=math.prod)


def closest_aspect_ratio(size, tile, grids):
    """Returns the grid whose width / height is closest to the image's.

    If several are equally close, it is the largest one of which the image covers more than half, or
    else the smallest. `find_closest_aspect_ratio` of InternVL.
    """
    best, min_distance = None, math.inf
    for grid in grids:
        distance = abs(size[0] / size[1] - grid[0] / grid[1])
        is_half_covered = math.prod(size) > 0.5 * tile * tile * math.prod(grid)
        if distance < min_distance or (distance == min_distance and is_half_covered):
            best, min_distance = grid, distance
    return best


def closest_area_weighted_aspect_ratio(size, tile, grids):
    """Returns the grid with the best product of area ratio (at most 0.6) and aspect ratio match.

    `find_closest_area_weighted_aspect_ratio` of Megatron-LM's examples/multimodal.
    """
    aspect_ratio, area = size[0] / size[1], math.prod(size)

    def score(grid):
        grid_ratio = grid[0] / grid[1]
        area_ratio = min(math.prod(grid) * tile * tile / area, 0.6)
        return area_ratio * min(grid_ratio / aspect_ratio, aspect_ratio / grid_ratio)

    return max(grids, key=score)


GRID_CHOICES = {"aspect": closest_aspect_ratio, "area": closest_area_weighted_aspect_ratio}
CONFIG_VALUES = {
    "fit": (*FITS, "tiles", "anyres", "split", "grid"),
    "enlarge": (True, False),
    "tile_texts": tuple(TILE_TEXTS),
    "resample": tuple(RESAMPLE_FILTERS),
    "choice": tuple(GRID_CHOICES),
    "thumbnail": (True, False),
    "tags": (True, False),
    "draft": (True, False),
}


def tile_grid(size, image_config, max_tiles=None):
    """Returns the (rows, columns) of tiles that an image of `size` (width, height) is cut into.

    max_tiles: at most so many tiles, if that is fewer than the image config of fit=tiles allows.
    """
    tile, fit = image_config["tile"], image_config["fit"]
    if fit == "anyres":
        height, width = select_best_resolution(size, image_config)
        return height // tile, width // tile
    if fit == "split":
        return split_grid(size, image_config)
    if fit == "grid":
        return whole_tile_grid(size, image_config)
    if fit != "tiles":
        return 1, 1
    most = min(max_tiles or image_config["tiles"], image_config["tiles"])
    columns, rows = GRID_CHOICES[image_config["choice"]](size, tile, candidate_grids(most))
    return rows, columns


def scale_longest_edge(size, longest_edge):
    """Returns (width, height) with the long side `longest_edge`, the other rounded up to even.

    `_resize_output_size_rescale_to_max_len` of transformers.
    """
    ratio = size[0] / size[1]
    short = int(longest_edge / ratio if ratio >= 1 else longest_edge * ratio)
    short = max(short + short % 2, 1)
    return (longest_edge, short) if ratio >= 1 else (short, longest_edge)


def split_grid(size, image_config):
    """Returns the (rows, columns) of fit=split (`resize_for_vision_encoder` of transformers)."""
    tile = image_config["tile"]
    width, height = scale_longest_edge(size, image_config["longest_edge"])
    columns, rows = math.ceil(width / tile), math.ceil(height / tile)
    if width >= height:
        rows = math.ceil(int(columns * tile / (width / height)) / tile)
    else:
        columns = math.ceil(int(rows * tile * (width / height)) / tile)
    return rows, columns


def whole_tile_grid(size, image_config):
    """Returns the (rows, columns) of fit=grid (`DynamicResize` of nanoVLM)."""
    tile = image_config["tile"]
    most = max(image_config["longest_edge"] // tile, 1)
    length = most if image_config["enlarge"] else min(most, math.ceil(max(size) / tile))
    scale = length * tile / max(size)
    short = max(math.ceil(min(size) * scale / tile), 1)
    return (short, length) if size[0] >= size[1] else (length, short)


def select_best_resolution(size, image_config):
    """Returns the (height, width), of the pinpoints, that shows most pixels of an image.

    Of several it is the one that wastes least. size: (width, height). As in LLaVA-NeXT.
    """

    def score(edges):
        scale = min(edges[1] / size[0], edges[0] / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return pixels, pixels - edges[0] * edges[1]

    return max(image_config["pinpoints"], key=score)


def tile_count(size, image_config, max_tiles=None):
    """Returns the number of tiles of an image, with its overview; arguments of tile_grid."""
    count = math.prod(tile_grid(size, image_config, max_tiles))
    has_overview = image_config["fit"] == "anyres" or (
        count > 1 and image_config.get("thumbnail", True)
    )
    return count + has_overview


def image_feature_index(size, image_config, tiles):
    """Returns which features of an image's tiles are used, in order: an index array.

    size: (width, height); tiles: the number of its tiles.
    For anyres these are the features of the first tile, then those of the grid, row by row across
    its tiles, each row followed by IMAGE_NEWLINE. Rows or columns that show only black are left out
    (`unpad_image` of transformers' modeling_llava_next.py, with its rounding). For all others these
    are all features of all tiles.
    """
    tokens = tokens_per_tile(image_config)
    if image_config["fit"] != "anyres":
        return np.arange(tiles * tokens)
    side = math.isqrt(tokens)
    rows, columns = tile_grid(size, image_config)
    index = np.arange(tokens, tokens * tiles).reshape(rows, columns, side, side)
    index_YX = index.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    height, width = index_YX.shape
    # The black border on each side. In the direction that the image fills, there is none.
    top = max((height - int(round(size[1] * (width / size[0]), 7))) // 2, 0)
    left = max((width - int(round(size[0] * (height / size[1]), 7))) // 2, 0)
    index_YX = index_YX[top : height - top, left : width - left]
    with_newlines = np.pad(index_YX, ((0, 0), (0, 1)), constant_values=IMAGE_NEWLINE)
    return np.concatenate([np.arange(tokens), with_newlines.ravel()])


def tile_tags(tiles, image_config, size=None):
    """Returns a text before each tile of an image and one after the last; None if it has none.

    They are NVLM's, or those of TILE_TEXTS for split and grid. size: as for image_feature_index.
    """
    if image_config.get("tags"):
        # Megatron-LM's examples/multimodal: all tags of a model have equally many tokens
        digits, end = (2, "0") if image_config["tiles"] > 9 else (1, "")
        tags = [f"<tile_{i:0{digits}}>" for i in range(1, tiles + 1)]
        last = [f"<tile_global_thumbnail{end}>"] if image_config["thumbnail"] else tags[-1:]
        return [*tags[:-1], *last, ""]
    if image_config["fit"] not in ("split", "grid"):
        return None
    of_tile, row_end, grid_end, of_global, end = TILE_TEXTS[image_config["tile_texts"]]
    rows, columns = tile_grid(size, image_config)
    tags, before = [], ""
    for row in range(1, rows + 1 if tiles > 1 else 1):
        for column in range(1, columns + 1):
            tags.append(before + of_tile.format(row=row, column=column))
            before = ""
        before = row_end
    if image_config["fit"] == "grid":
        return [of_global, *tags, end]
    return [*tags, before + grid_end * (tiles > 1) + of_global, end]


# ---- resizing and cutting ----


def resize_image(pixels, size, image_config):
    """Returns an image resized: uint8 (Y, X, C) -> (C, Y, X). size: (width, height).

    Pillow resizes it, as for the training of the published vision encoders. With `draft`, torch
    does, except for lanczos, which it lacks: about five times as fast if the image gets smaller,
    and each number differs from Pillow's by at most two levels of 255.

    An image is resized in one direction, rounded to whole levels, then resized in the other. torch
    rounds a filter's weights to 16 bits, Pillow to 32, so a step by torch may differ by a level.
    Pillow does the first step if it is short (SMALL_IMAGE_PIXELS), or if the image gets wider,
    where torch's weights are even coarser. Like Pillow 13, torch resizes the height first if that
    saves more. The number of threads changes nothing. On another CPU torch may compute in another
    way, with the same bound.
    """
    resample = image_config["resample"]
    resample_filter = RESAMPLE_FILTERS[resample]
    if resample == "lanczos" or not image_config.get("draft"):
        resized = Image.fromarray(pixels).resize(size, resample_filter)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
    (height, width), (columns, rows) = pixels.shape[:2], size
    first = (width, rows) if height - rows > max(2 * (width - columns), 0) else (columns, height)
    if columns > width or width * height < SMALL_IMAGE_PIXELS:
        pixels = np.asarray(Image.fromarray(pixels).resize(first, resample_filter))
    step = functools.partial(F.interpolate, mode=resample, antialias=True)
    # torch warns that Pillow's arrays are read-only; nothing writes to them here.
    with warnings.catch_warnings(action="ignore"):
        # channels last, which is torch's fastest path
        pixels_1CYX = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if columns != width == first[0]:  # F.interpolate alone resizes the width first
        pixels_1CYX = step(pixels_1CYX, first[::-1])
    return step(pixels_1CYX, size[::-1])[0].contiguous().numpy()


def resized_size(size, image_config, max_tiles=None):
    """Returns the (width, height) that an image of `size` is resized to before it is cut.

    The borders of fit=pad are not counted.
    """
    tile, fit = image_config["tile"], image_config["fit"]
    if fit in ("crop", "pad"):  # the short side becomes `tile` (CLIP), or the long one (LLaVA-1.5)
        edge = min(size) if fit == "crop" else max(size)
        return max(size[0] * tile // edge, 1), max(size[1] * tile // edge, 1)
    rows, columns = tile_grid(size, image_config, max_tiles)
    return columns * tile, rows * tile


def split_into_tiles(pixels_CYX, tile):
    """Returns (C, Y, X) cut into its tiles, row by row: (N, C, tile, tile)."""
    C, Y, _ = pixels_CYX.shape
    return (
        pixels_CYX.reshape(C, Y // tile, tile, -1, tile)
        .transpose(1, 3, 0, 2, 4)
        .reshape(-1, C, tile, tile)
    )


def process_image(image, size, image_config, max_tiles=None):
    """Returns the ProcessedImage of an RGB image.

    image, size: as image_files.read_image returns them; max_tiles: as for tile_grid.
    """
    tile, fit = image_config["tile"], image_config["fit"]
    new_size = resized_size(size, image_config, max_tiles)
    if fit == "pad":
        image, new_size = expand_to_square(image, image_config["mean"]), (tile, tile)
    pixels = np.asarray(image)
    if fit == "split":
        edges = scale_longest_edge(size, image_config["longest_edge"])
        pixels = resize_image(pixels, edges, image_config).transpose(1, 2, 0)
    resize = resize_and_pad if fit == "anyres" else resize_image
    resized = resize(pixels, new_size, image_config)  # (C, height, width)
    if fit == "crop":
        top, left = (resized.shape[1] - tile) // 2, (resized.shape[2] - tile) // 2
        resized = np.ascontiguousarray(resized[:, top : top + tile, left : left + tile])
    tiles_NCYX = split_into_tiles(resized, tile)
    if len(tiles_NCYX) < tile_count(size, image_config, max_tiles):
        if fit in ("split", "grid"):
            pixels = resized.transpose(1, 2, 0)
        if fit == "grid":
            image_config = image_config | {"resample": "bilinear"}
        overview = resize_image(pixels, (tile, tile), image_config)[None]
        is_first = fit in ("anyres", "grid")
        parts = [overview, tiles_NCYX] if is_first else [tiles_NCYX, overview]
        tiles_NCYX = np.concatenate(parts)
    index = image_feature_index(size, image_config, len(tiles_NCYX))
    return ProcessedImage(tiles_NCYX, index, size)


def expand_to_square(image, mean):
    """Returns an image in the middle of a square of the mean color (LLaVA-1.5's expand2square)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resize_and_pad(pixels_YXC, size, image_config):
    """Returns an image in the middle of `size` (width, height), as large as fits: (C, Y, X).

    The borders are black. `get_patch_output_size` of transformers.
    """
    (width, height), (rows, columns) = size, pixels_YXC.shape[:2]
    scale = min(width / columns, height / rows)
    new_width = min(math.ceil(columns * scale), width)
    new_height = min(math.ceil(rows * scale), height)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    padded = np.zeros((3, height, width), np.uint8)
    padded[:, top : top + new_height, left : left + new_width] = resize_image(
        pixels_YXC, (new_width, new_height), image_config
    )
    return padded


def required_size(image_config):
    """Returns the function that image_files.read_image takes as `required_size`: from an image's
    size to the size that it is resized to. It is None if it must be decoded at full size."""
    if image_config.get("draft") and image_config["fit"] != "anyres":
        return functools.partial(resized_size, image_config=image_config)
    return None


def plan_image(size, image_config, max_tiles=None):
    """Returns the ProcessedImage of an image of `size` (width, height), before it is cut.

    Its tiles are blank and take no memory.
    """
    tiles = tile_count(size, image_config, max_tiles)
    tile = image_config["tile"]
    blank = np.broadcast_to(np.uint8(0), (tiles, 3, tile, tile))
    return ProcessedImage(blank, image_feature_index(size, image_config, tiles), size)


def load_image(source, image_config, max_tiles=None, name=None):
    """Returns an image (a path, or the bytes of a file) as a ProcessedImage.

    max_tiles: as for tile_grid; name: of bytes, for messages.
    """
    image, size = image_files.read_image(source, name, required_size(image_config))
    return process_image(image, size, image_config, max_tiles)


def tile_to_image(tile_CYX):
    """Returns a tile as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(tile_CYX.transpose(1, 2, 0)))
