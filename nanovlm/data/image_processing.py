"""From a picture, whatever its kind, to the uint8 tiles that training and use both see.

The picture policy is a plain dict that travels in the checkpoint:

    tile      pixels across a tile            fit        squash, pad (to a square, with the mean colour), crop (the middle square), tiles, anyres
    patch     pixels across a patch           resample   bicubic or bilinear
    shuffle   shuffle² patches a token        mean, std  three numbers each, of pixels between 0 and 1; applied by the model, on its device
    draft     where it is true, a JPEG may be decoded at a half, a quarter or an eighth, if that is twice as large still as what it is resized to

    tiles     for tiles alone, the way of InternVL (Chen et al. 2024) and NVLM (Dai et al. 2024): the picture is squashed to the grid of at most
              `tiles` tiles that its shape asks for, and cut row by row; with `thumbnail`, the whole of it comes last where there are several.
              choice: how a grid is chosen (GRIDS); tags: whether a text that numbers it stands before each tile.
    pinpoints for anyres alone, LLaVA-NeXT's way (Liu et al. 2024): the heights and widths in pixels that a picture may be enlarged to. Its first
              tile is the whole picture, squashed; the others cut the enlarged one, black around it, row by row.
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

FITS = ("squash", "pad", "crop")  # that make one tile of any picture
RESAMPLE_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SMALL_IMAGE_PIXELS = 1 << 16  # pixels of a picture on which half a millisecond of Pillow's may be spent
IMAGE_NEWLINE = -1  # among places: the vector that a model has learnt for the end of a row


class ProcessedImage(NamedTuple):
    """A picture cut for a model."""

    tiles: np.ndarray  # (N, C, Y, X), uint8
    feature_index: np.ndarray  # which tokens of the tiles are read, in order
    size: tuple  # (width, height) in pixels, upright, before it was cut


# ---- the policy ----


def check_image_config(policy):
    """Raise UserError unless a policy has each of its parts, nothing else, and numbers that go together."""

    def whole(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 1

    def shares(x, low):
        return (
            isinstance(x, list | tuple)
            and len(x) == 3
            and all(isinstance(c, int | float) and low <= c <= 1 for c in x)
        )

    def grids(x):
        return (
            isinstance(x, list)
            and x
            and all(
                isinstance(edges, list) and len(edges) == 2 and all(map(of_tiles, edges))
                for edges in x
            )
        )

    def of_tiles(x):
        return whole(x) and whole(policy.get("tile")) and x % policy["tile"] == 0

    rules = {
        **{name: (whole, "is no whole number from 1 on") for name in ("tile", "patch", "shuffle")},
        "fit": (
            lambda x: x in (*FITS, "tiles", "anyres"),
            f"is none of {', '.join(FITS)}, tiles, anyres",
        ),
        "resample": (lambda x: x in RESAMPLE_FILTERS, f"is none of {', '.join(RESAMPLE_FILTERS)}"),
        "mean": (lambda x: shares(x, 0), "is not three numbers from 0 to 1"),
        "std": (lambda x: shares(x, 1e-6), "is not three numbers above 0, at most 1"),
    }
    truth = (lambda x: isinstance(x, bool), "is neither true nor false")
    if policy.get("fit") == "anyres":
        rules["pinpoints"] = (grids, "is no list of heights and widths in whole tiles")
    if policy.get("fit") == "tiles":
        rules |= {
            "tiles": rules["tile"],
            "choice": (lambda x: x in GRID_CHOICES, f"is none of {', '.join(GRID_CHOICES)}"),
            "thumbnail": truth,
            "tags": truth,
        }
    if "draft" in policy:
        rules["draft"] = truth
    wrong = [f"{name} is missing" for name in rules if name not in policy] + [
        f"{name} is not known" for name in policy if name not in rules
    ]
    wrong += [
        f"{name} {policy[name]!r} {what}"
        for name, (holds, what) in rules.items()
        if name in policy and not holds(policy[name])
    ]
    if not wrong:
        across, left = divmod(policy["tile"], policy["patch"])
        if left:
            wrong = [f"a tile of {policy['tile']} pixels is not whole patches of {policy['patch']}"]
        elif across % policy["shuffle"]:
            wrong = [
                f"{across} patches across a tile ({policy['tile']} pixels / {policy['patch']}) do not shuffle by {policy['shuffle']}"
            ]
    if wrong:
        raise UserError(f"picture policy: {'; '.join(wrong)}")


def tokens_per_tile(policy):
    return (policy["tile"] // policy["patch"] // policy["shuffle"]) ** 2


@functools.cache
def candidate_grids(most):
    """Every (columns, rows) of at most so many tiles, the fewest tiles first; of as many, in the order of a Python set, as InternVL's code has
    them: among the grids that show a large square equally well, GRIDS["area"] takes the first."""
    pairs = {
        (i, j)
        for n in range(1, most + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= most
    }
    return sorted(pairs, key=math.prod)


def closest_aspect_ratio(size, tile, grids):
    """The grid whose width / height is closest to the picture's; of several, the largest of which the picture covers more than half, else the
    smallest (InternVL's `find_closest_aspect_ratio`)."""

    def distance(grid):
        return abs(size[0] / size[1] - grid[0] / grid[1])

    nearest = min(map(distance, grids))
    first, *larger = [grid for grid in grids if distance(grid) == nearest]
    return next(
        (
            grid
            for grid in reversed(larger)
            if math.prod(size) > 0.5 * tile * tile * math.prod(grid)
        ),
        first,
    )


def closest_area_weighted_aspect_ratio(size, tile, grids):
    """The grid with the best product of how much of the picture's area it has, 0.6 being enough, and how well the shapes agree (Megatron-LM's
    examples/multimodal, `find_closest_area_weighted_aspect_ratio`)."""
    aspect, area = size[0] / size[1], math.prod(size)

    def merit(grid):
        own = grid[0] / grid[1]
        return min(math.prod(grid) * tile * tile / area, 0.6) * min(own / aspect, aspect / own)

    return max(grids, key=merit)


GRID_CHOICES = {"aspect": closest_aspect_ratio, "area": closest_area_weighted_aspect_ratio}


def tile_grid(size, policy, limit=None):
    """The (rows, columns) of tiles that a picture of `size` (width, height) is cut into where fit is tiles; limit: at most so many tiles."""
    most = policy["tiles"] if limit is None else min(limit, policy["tiles"])
    columns, rows = GRID_CHOICES[policy["choice"]](size, policy["tile"], candidate_grids(most))
    return rows, columns


def select_best_resolution(size, policy):
    """The (height, width), of the policy's, that shows most of a picture of `size` (width, height), and of these the one that wastes least."""

    def merit(edges):
        scale = min(edges[1] / size[0], edges[0] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - edges[0] * edges[1]

    return max(policy["pinpoints"], key=merit)


def tile_count(size, policy, limit=None):
    """How many tiles a picture of `size` (width, height) makes; limit: as for `grid`."""
    if policy["fit"] == "anyres":
        height, width = select_best_resolution(size, policy)
        return 1 + height // policy["tile"] * (width // policy["tile"])
    count = math.prod(tile_grid(size, policy, limit)) if policy["fit"] == "tiles" else 1
    return count + (count > 1 and policy["thumbnail"])


def image_feature_index(size, policy, tiles):
    """Which tokens of its tiles are read of a picture of `size` (width, height), in order: an array of places, NEWLINE among them after a row.

    anyres: the first tile's tokens, then the grid's, row by row across its tiles, without the rows or columns that show only black
    (`unpad_image` of transformers' modeling_llava_next.py, whose rounding this is). All others: every token of all `tiles` tiles.
    """
    tokens = tokens_per_tile(policy)
    if policy["fit"] != "anyres":
        return np.arange(tiles * tokens)
    side, (rows, columns) = (
        math.isqrt(tokens),
        (edge // policy["tile"] for edge in select_best_resolution(size, policy)),
    )
    numbers = np.arange(tokens, tokens * tiles).reshape(rows, columns, side, side)
    grid_YX = numbers.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    height, width = grid_YX.shape
    if size[0] / size[1] > width / height:
        black = (height - int(round(size[1] * (width / size[0]), 7))) // 2
        grid_YX = grid_YX[black : height - black]
    else:
        black = (width - int(round(size[0] * (height / size[1]), 7))) // 2
        grid_YX = grid_YX[:, black : width - black]
    return np.concatenate(
        [np.arange(tokens), np.pad(grid_YX, ((0, 0), (0, 1)), constant_values=IMAGE_NEWLINE).ravel()]
    )


def image_token_count(size, policy, limit=None):
    """How many tokens a picture of `size` (width, height) takes; everyone who counts, counts with this or with the places themselves."""
    return len(plan_image(size, policy, limit).feature_index)


def tile_tags(tiles, policy):
    """NVLM's texts before a picture's tiles, one each, the whole picture's last; None for a policy without."""
    if not policy.get("tags"):
        return None
    numbered = [f"<tile_{i}>" for i in range(1, tiles + 1)]
    return [*numbered[:-1], "<tile_global_thumbnail>"] if policy["thumbnail"] else numbered


# ---- cutting ----


def resize_image(pixels, size, resample):
    """Pillow's antialiased resize of (Y, X, C) uint8 to `size` (width, height), as a new (C, Y, X): about five times as fast in narrowing.

    What is promised is Pillow's number or one level beside it. torch rounds a filter's weights to 16 bits, Pillow to 32, and both round to whole
    levels between the two directions. Two steps by torch may differ by a level each, which makes two levels in one number of some millions; so
    Pillow takes the first step where it is short (SMALL) or where torch's weights are coarser yet (in widening). Pillow 13 goes down before it goes
    across where that saves more. The count of threads changes nothing; another CPU may take another path in torch, with no more than this promise.
    """
    (height, width), (columns, rows) = pixels.shape[:2], size
    if (
        columns == 1
    ):  # torch 2.13, if the CPU has no AVX2, makes all rows of such a picture the first
        return (
            np.asarray(Image.fromarray(pixels).resize(size, RESAMPLE_FILTERS[resample]))
            .transpose(2, 0, 1)
            .copy()
        )
    first = (width, rows) if height - rows > max(2 * (width - columns), 0) else (columns, height)
    if columns > width or width * height < SMALL_IMAGE_PIXELS:
        pixels = np.asarray(Image.fromarray(pixels).resize(first, RESAMPLE_FILTERS[resample]))
    step = functools.partial(F.interpolate, mode=resample, antialias=True)
    with warnings.catch_warnings(
        action="ignore"
    ):  # of what Pillow hands out being read-only: nobody writes to it
        pixels_1CYX = torch.from_numpy(pixels).permute(2, 0, 1)[
            None
        ]  # channels last, for which torch has its fastest path
    if columns != width == first[0]:  # F.interpolate by itself goes across first
        pixels_1CYX = step(pixels_1CYX, first[::-1])
    return step(pixels_1CYX, size[::-1])[0].contiguous().numpy()


def resized_size(size, policy, limit=None):
    """The (width, height) that the whole of a picture of `size` is resized to before it is cut; without the bars of pad."""
    tile, fit = policy["tile"], policy["fit"]
    if fit in ("crop", "pad"):  # as CLIP: the short side becomes `tile`; as LLaVA-1.5: the long one
        edge = min(size) if fit == "crop" else max(size)
        return max(size[0] * tile // edge, 1), max(size[1] * tile // edge, 1)
    rows, columns = tile_grid(size, policy, limit) if fit == "tiles" else (1, 1)
    return columns * tile, rows * tile


def split_into_tiles(pixels_CYX, tile):
    """(C, Y, X) cut into its tiles, row by row, as (N, C, tile, tile)."""
    C, Y, X = pixels_CYX.shape
    return (
        pixels_CYX.reshape(C, Y // tile, tile, X // tile, tile)
        .transpose(1, 3, 0, 2, 4)
        .reshape(-1, C, tile, tile)
    )


def cut_into_tiles(picture, policy, limit=None, size=None):
    """An RGB picture as tiles_NCYX (uint8); limit: as for `grid`; size: its own before it was drafted."""
    pixels, tile, fit, resample = (
        np.asarray(picture),
        policy["tile"],
        policy["fit"],
        policy["resample"],
    )
    if fit == "anyres":
        whole, enlarged = (
            resize_image(pixels, (tile, tile), resample),
            resize_and_pad(pixels, select_best_resolution(picture.size, policy), resample),
        )
        return np.concatenate([whole[None], split_into_tiles(enlarged, tile)])
    if fit == "pad":
        return resize_image(expand_to_square(pixels, policy["mean"]), (tile, tile), resample)[None]
    resized = resize_image(pixels, resized_size(size or picture.size, policy, limit), resample)
    if fit == "crop":
        top, left = (resized.shape[1] - tile) // 2, (resized.shape[2] - tile) // 2
        resized = np.ascontiguousarray(resized[:, top : top + tile, left : left + tile])
    cut = split_into_tiles(resized, tile)
    if len(cut) > 1 and policy["thumbnail"]:
        cut = np.concatenate([cut, resize_image(pixels, (tile, tile), resample)[None]])
    return cut


def expand_to_square(pixels_YXC, mean):
    """A picture in the middle of a square of the mean colour (`expand2square` of LLaVA-1.5)."""
    height, width, _ = pixels_YXC.shape
    side = max(height, width)
    row = np.tile(np.array([int(x * 255) for x in mean], np.uint8), (side, 1))
    square = np.tile(row, (side, 1, 1))  # row by row: ten times as fast as pixel by pixel
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels_YXC
    return square


def resize_and_pad(pixels_YXC, edges, resample):
    """A picture in the middle of (height, width) pixels, as large as fits, black around it (`get_patch_output_size` of transformers); (C, Y, X)."""
    (height, width), (rows, columns) = edges, pixels_YXC.shape[:2]
    scale = min(width / columns, height / rows)
    inner = resize_image(
        pixels_YXC,
        (min(math.ceil(columns * scale), width), min(math.ceil(rows * scale), height)),
        resample,
    )
    top, left = (height - inner.shape[1]) // 2, (width - inner.shape[2]) // 2
    padded = np.zeros((3, height, width), np.uint8)
    padded[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    return padded


def required_size(policy):
    """What opening.read may spare: the size to which a picture is resized, as a function of its own; None for all of it."""
    return (
        functools.partial(resized_size, policy=policy)
        if policy.get("draft") and policy["fit"] != "anyres"
        else None
    )


def plan_image(size, policy, limit=None):
    """The Picture that one of `size` (width, height) becomes, before it is cut: its tiles are blank and take no memory."""
    tiles = tile_count(size, policy, limit)
    blank_NCYX = np.broadcast_to(np.uint8(0), (tiles, 3, policy["tile"], policy["tile"]))
    return ProcessedImage(blank_NCYX, image_feature_index(size, policy, tiles), size)


def load_image(source, policy, limit=None, name=None):
    """A picture, a path or its bytes, as a Picture, by the model's own policy; limit: at most so many tiles, where fit is tiles."""
    picture, size = image_files.read_image(source, name, required_size(policy))
    return plan_image(size, policy, limit)._replace(tiles=cut_into_tiles(picture, policy, limit, size))


def tile_to_image(tile_CYX):
    """A tile as a picture to look at."""
    return Image.fromarray(np.ascontiguousarray(tile_CYX.transpose(1, 2, 0)))
