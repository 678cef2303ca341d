"""The image processor: any image becomes the uint8 tiles that training and inference both take.

`image_feature_index` decides how many tokens an image takes and which features they are;
`image_token_count` is its length. `load_image` makes the tiles. All follow the image config, a
plain dict that is part of the checkpoint:

    tile      width and height of a tile in pixels
    patch     width and height of a patch in pixels
    shuffle   shuffle² patches become one token (pixel shuffle)
    fit       squash, pad (to a square, with the mean color), crop (the middle square), tiles or
              anyres
    resample  bicubic or bilinear
    mean, std three numbers each, of pixels between 0 and 1; the model normalizes on its device
    draft     whether a JPEG may be decoded at a half, a quarter or an eighth of its size, as long
              as that is at least twice the size that it is resized to

    tiles     for fit=tiles, the way of InternVL (Chen et al. 2024) and NVLM (Dai et al. 2024): the
              image is squashed to a grid of at most `tiles` tiles, chosen by its shape, and cut row
              by row. thumbnail: the whole image follows as the last tile if there are several.
              choice: how the grid is chosen (GRID_CHOICES). tags: a text with its number before
              each tile.
    pinpoints for fit=anyres, the way of LLaVA-NeXT (Liu et al. 2024): the heights and widths in
              pixels that an image may be enlarged to. The first tile is the whole image, squashed.
              The others are the enlarged image with black borders, cut row by row.
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
from . import image_files

FITS = ("squash", "pad", "crop")  # each of these makes one tile of any image
RESAMPLE_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SMALL_IMAGE_PIXELS = 1 << 16  # Pillow's first step takes at most half a millisecond for these
IMAGE_NEWLINE = -1  # in feature_index: the learned vector at the end of a row (image_newline)


class ProcessedImage(NamedTuple):
    """An image as the model takes it."""

    tiles: np.ndarray  # (N, C, Y, X), uint8
    feature_index: np.ndarray  # which features of its tiles are used, in order
    size: tuple  # (width, height) of the upright image in pixels, before it is cut


# ---- the image config ----


def check_image_config(image_config):
    """Raises UserError if an image config lacks a key, has an unknown one, or values disagree."""

    def is_positive_int(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 1

    def is_triple(x, low):
        return (
            isinstance(x, list | tuple)
            and len(x) == 3
            and all(isinstance(c, int | float) and low <= c <= 1 for c in x)
        )

    def is_whole_tiles(x):
        tile = image_config.get("tile")
        return is_positive_int(x) and is_positive_int(tile) and x % tile == 0

    def is_pinpoints(x):
        return (
            isinstance(x, list)
            and x
            and all(
                isinstance(edges, list) and len(edges) == 2 and all(map(is_whole_tiles, edges))
                for edges in x
            )
        )

    positive_int = (is_positive_int, "is no whole number from 1 on")
    boolean = (lambda x: isinstance(x, bool), "is neither true nor false")
    rules = {  # key -> (test, error)
        "tile": positive_int,
        "patch": positive_int,
        "shuffle": positive_int,
        "fit": (
            lambda x: x in (*FITS, "tiles", "anyres"),
            f"is none of {', '.join(FITS)}, tiles, anyres",
        ),
        "resample": (lambda x: x in RESAMPLE_FILTERS, f"is none of {', '.join(RESAMPLE_FILTERS)}"),
        "mean": (lambda x: is_triple(x, 0), "is not three numbers from 0 to 1"),
        "std": (lambda x: is_triple(x, 1e-6), "is not three numbers above 0, at most 1"),
    }
    if image_config.get("fit") == "anyres":
        rules["pinpoints"] = (is_pinpoints, "is no list of heights and widths in whole tiles")
    if image_config.get("fit") == "tiles":
        rules["tiles"] = positive_int
        rules["choice"] = (lambda x: x in GRID_CHOICES, f"is none of {', '.join(GRID_CHOICES)}")
        rules |= {"thumbnail": boolean, "tags": boolean}
    if "draft" in image_config:
        rules["draft"] = boolean
    errors = [f"{name} is missing" for name in rules if name not in image_config]
    errors += [f"{name} is not known" for name in image_config if name not in rules]
    for name, (is_valid, error) in rules.items():
        if name in image_config and not is_valid(image_config[name]):
            errors.append(f"{name} {image_config[name]!r} {error}")
    if not errors:
        tile, patch, shuffle = (image_config[name] for name in ("tile", "patch", "shuffle"))
        if tile % patch:
            errors = [f"a tile of {tile} pixels is not whole patches of {patch}"]
        elif tile // patch % shuffle:
            errors = [
                f"{tile // patch} patches across a tile ({tile} pixels / {patch}) "
                f"do not shuffle by {shuffle}"
            ]
    if errors:
        raise UserError(f"image config: {'; '.join(errors)}")


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

    Of several it is the largest one of which the image covers more than half, else the smallest.
    `find_closest_aspect_ratio` of InternVL.
    """

    def distance(grid):
        return abs(size[0] / size[1] - grid[0] / grid[1])

    min_distance = min(map(distance, grids))
    smallest, *others = [grid for grid in grids if distance(grid) == min_distance]
    for grid in reversed(others):
        if math.prod(size) > 0.5 * tile * tile * math.prod(grid):
            return grid
    return smallest


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


def tile_grid(size, image_config, max_tiles=None):
    """Returns the (rows, columns) of tiles of an image of `size` (width, height), for fit=tiles.

    max_tiles: at most so many tiles, if that is fewer than the image config allows.
    """
    tiles = image_config["tiles"]
    most = tiles if max_tiles is None else min(max_tiles, tiles)
    choose = GRID_CHOICES[image_config["choice"]]
    columns, rows = choose(size, image_config["tile"], candidate_grids(most))
    return rows, columns


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
    """Returns the number of tiles of an image of `size` (width, height); arguments of tile_grid."""
    if image_config["fit"] == "anyres":
        height, width = select_best_resolution(size, image_config)
        return 1 + height // image_config["tile"] * (width // image_config["tile"])
    if image_config["fit"] != "tiles":
        return 1
    count = math.prod(tile_grid(size, image_config, max_tiles))
    return count + (count > 1 and image_config["thumbnail"])


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
    height, width = select_best_resolution(size, image_config)
    rows, columns = height // image_config["tile"], width // image_config["tile"]
    index = np.arange(tokens, tokens * tiles).reshape(rows, columns, side, side)
    index_YX = index.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    height, width = index_YX.shape
    if size[0] / size[1] > width / height:
        black = (height - int(round(size[1] * (width / size[0]), 7))) // 2
        index_YX = index_YX[black : height - black]
    else:
        black = (width - int(round(size[0] * (height / size[1]), 7))) // 2
        index_YX = index_YX[:, black : width - black]
    with_newlines = np.pad(index_YX, ((0, 0), (0, 1)), constant_values=IMAGE_NEWLINE)
    return np.concatenate([np.arange(tokens), with_newlines.ravel()])


def image_token_count(size, image_config, max_tiles=None):
    """Returns how many image tokens an image of `size` (width, height) takes.

    It is the length of image_feature_index, the one place where image tokens are counted. Code that
    has a ProcessedImage takes len(image.feature_index) instead.
    """
    return len(plan_image(size, image_config, max_tiles).feature_index)


def tile_tags(tiles, image_config):
    """Returns NVLM's text before each tile of an image; None without tags in the image config."""
    if not image_config.get("tags"):
        return None
    tags = [f"<tile_{i}>" for i in range(1, tiles + 1)]
    return [*tags[:-1], "<tile_global_thumbnail>"] if image_config["thumbnail"] else tags


# ---- resizing and cutting ----


def resize_image(pixels, size, resample):
    """Returns an image resized as Pillow does: uint8 (Y, X, C) -> (C, Y, X).

    size: (width, height). It is about five times as fast as Pillow if the image gets smaller. Each
    number is Pillow's or differs from it by one level. torch rounds a filter's weights to 16 bits
    and Pillow to 32, and both round to whole levels between the two directions. Two steps by torch
    may differ by a level each, so one number in some millions would differ by two. So Pillow does
    the first step if it is short (SMALL_IMAGE_PIXELS) or if torch's weights are even coarser (the
    image gets wider). Pillow 13 resizes the height first if that saves more. The number of threads
    changes nothing. Another CPU may take another path in torch, with the same bound.
    """
    (height, width), (columns, rows) = pixels.shape[:2], size
    if columns == 1:  # torch 2.13 copies the first row to all rows here if the CPU has no AVX2
        image = Image.fromarray(pixels).resize(size, RESAMPLE_FILTERS[resample])
        return np.asarray(image).transpose(2, 0, 1).copy()
    first = (width, rows) if height - rows > max(2 * (width - columns), 0) else (columns, height)
    if columns > width or width * height < SMALL_IMAGE_PIXELS:
        pixels = np.asarray(Image.fromarray(pixels).resize(first, RESAMPLE_FILTERS[resample]))
    step = functools.partial(F.interpolate, mode=resample, antialias=True)
    # Pillow's arrays are read-only, of which torch warns; nobody writes to them here.
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
    rows, columns = tile_grid(size, image_config, max_tiles) if fit == "tiles" else (1, 1)
    return columns * tile, rows * tile


def split_into_tiles(pixels_CYX, tile):
    """Returns (C, Y, X) cut into its tiles, row by row: (N, C, tile, tile)."""
    C, Y, X = pixels_CYX.shape
    return (
        pixels_CYX.reshape(C, Y // tile, tile, X // tile, tile)
        .transpose(1, 3, 0, 2, 4)
        .reshape(-1, C, tile, tile)
    )


def cut_into_tiles(image, image_config, max_tiles=None, size=None):
    """Returns an RGB image as tiles_NCYX (uint8).

    max_tiles: as for tile_grid. size: the image's (width, height) in its file, if it was decoded
    smaller.
    """
    pixels = np.asarray(image)
    tile, fit, resample = (image_config[name] for name in ("tile", "fit", "resample"))
    if fit == "anyres":
        resolution = select_best_resolution(image.size, image_config)
        overview = resize_image(pixels, (tile, tile), resample)
        enlarged = resize_and_pad(pixels, resolution, resample)
        return np.concatenate([overview[None], split_into_tiles(enlarged, tile)])
    if fit == "pad":
        square_YXC = expand_to_square(pixels, image_config["mean"])
        return resize_image(square_YXC, (tile, tile), resample)[None]
    new_size = resized_size(size or image.size, image_config, max_tiles)
    resized = resize_image(pixels, new_size, resample)  # (C, height, width)
    if fit == "crop":
        top, left = (resized.shape[1] - tile) // 2, (resized.shape[2] - tile) // 2
        resized = np.ascontiguousarray(resized[:, top : top + tile, left : left + tile])
    tiles_NCYX = split_into_tiles(resized, tile)
    if len(tiles_NCYX) > 1 and image_config["thumbnail"]:
        thumbnail = resize_image(pixels, (tile, tile), resample)
        tiles_NCYX = np.concatenate([tiles_NCYX, thumbnail[None]])
    return tiles_NCYX


def expand_to_square(pixels_YXC, mean):
    """Returns an image in the middle of a square of the mean color (LLaVA-1.5's expand2square)."""
    height, width, _ = pixels_YXC.shape
    side = max(height, width)
    row = np.tile(np.array([int(x * 255) for x in mean], np.uint8), (side, 1))
    square = np.tile(row, (side, 1, 1))  # row by row: ten times as fast as pixel by pixel
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels_YXC
    return square


def resize_and_pad(pixels_YXC, resolution, resample):
    """Returns an image in the middle of `resolution` (height, width), as large as fits: (C, Y, X).

    The borders are black. `get_patch_output_size` of transformers.
    """
    (height, width), (rows, columns) = resolution, pixels_YXC.shape[:2]
    scale = min(width / columns, height / rows)
    new_size = min(math.ceil(columns * scale), width), min(math.ceil(rows * scale), height)
    resized = resize_image(pixels_YXC, new_size, resample)
    top, left = (height - resized.shape[1]) // 2, (width - resized.shape[2]) // 2
    padded = np.zeros((3, height, width), np.uint8)
    padded[:, top : top + resized.shape[1], left : left + resized.shape[2]] = resized
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
    blank_NCYX = np.broadcast_to(np.uint8(0), (tiles, 3, tile, tile))
    return ProcessedImage(blank_NCYX, image_feature_index(size, image_config, tiles), size)


def load_image(source, image_config, max_tiles=None, name=None):
    """Returns an image (a path, or the bytes of a file) as a ProcessedImage.

    max_tiles: as for tile_grid; name: of bytes, for messages.
    """
    image, size = image_files.read_image(source, name, required_size(image_config))
    tiles_NCYX = cut_into_tiles(image, image_config, max_tiles, size)
    return plan_image(size, image_config, max_tiles)._replace(tiles=tiles_NCYX)


def tile_to_image(tile_CYX):
    """Returns a tile as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(tile_CYX.transpose(1, 2, 0)))
