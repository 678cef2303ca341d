"""Exercise 4: pixel shuffle.

A vision encoder gives one vector per patch: 24 × 24 patches are 576 vectors. Each of them would
become an image token, and the language model pays for every token. Pixel shuffle trades number for
width: a square of factor × factor patches becomes one image feature, factor² times as wide. Nothing
is lost, and the projector decides what matters.

    4 × 4 patches        factor 2        2 × 2 image features
     0  1  2  3                          [0 1 4 5]   [2 3 6 7]
     4  5  6  7                          [8 9 12 13] [10 11 14 15]
     8  9 10 11
    12 13 14 15

Patches come row by row, and so do the squares, and the patches of a square.

Fill in `pixel_shuffle`, then run

    python -m pytest -n 0 tests/exercises/04_pixel_shuffle.py

The core's answer: `pixel_shuffle` in nanovlm/models/projector.py. Source: InternVL, Chen et al. 2024.
"""

import torch
import torch.nn.functional as F
from checking import check_equal


def pixel_shuffle(features_NPD, factor):
    """(N, P, D) -> (N, P / factor², D · factor²). P is a square number."""
    ...


def test_the_drawing_above():
    features_NPD = torch.arange(16.0)[None, :, None]
    expected = torch.tensor(
        [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]], dtype=torch.float
    )
    found = pixel_shuffle(features_NPD, 2)
    check_equal(found, expected, "16 patches of one number, factor 2, as drawn in the lesson")


def test_factor_1_changes_nothing():
    features_NPD = torch.randn(2, 9, 5)
    check_equal(pixel_shuffle(features_NPD, 1), features_NPD, "factor 1: every patch by itself")


def test_it_is_pixel_unshuffle_but_for_the_order_of_the_width():
    torch.manual_seed(0)
    features_NPD = torch.randn(2, 36, 5)
    map_NDYX = features_NPD.unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    unshuffled = F.pixel_unshuffle(map_NDYX, 3)  # width: D, then the place within the square
    expected = unshuffled.unflatten(1, (5, 9)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)
    found = pixel_shuffle(features_NPD, 3)
    check_equal(found, expected, "a square's patches side by side, each with its D = 5 numbers")
