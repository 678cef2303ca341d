"""The projector makes image features as wide as the decoder's embeddings."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def pixel_shuffle(features_NPD, factor):
    """(N, P, D) -> (N, P / factor², D · factor²): a square of patches becomes one image feature.

    Squares go row by row (InternVL, Chen et al. 2024). It is torch.nn.PixelUnshuffle, but for the
    order of D.
    """
    side = int(features_NPD.shape[1] ** 0.5) // factor
    blocks_NYyXxD = features_NPD.unflatten(1, (side, factor, side, factor))
    return blocks_NYyXxD.transpose(2, 3).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """Two linear layers with a GELU between (LLaVA-1.5), after an optional pixel shuffle.

    Returns the features of all tiles, one vector per image token: (N · P, D). newline: append one
    more, a learned vector that ends a row of image tokens (LLaVA-NeXT). mlp: if False, there is
    only the first layer, without a bias (Idefics3, SmolVLM).
    """

    def __init__(self, *, vision_width, width, shuffle=1, newline=False, mlp=True):
        super().__init__()
        self.shuffle = shuffle
        self.linear_1 = nn.Linear(vision_width * shuffle**2, width, bias=mlp)
        self.linear_2 = nn.Linear(width, width) if mlp else None
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5) if newline else None

    def forward(self, features_NPD):
        features_NPD = self.linear_1(pixel_shuffle(features_NPD, self.shuffle))
        if self.linear_2 is not None:
            features_NPD = self.linear_2(F.gelu(features_NPD))
        features = features_NPD.flatten(0, 1)
        if self.newline is None:
            return features
        return torch.cat([features, self.newline[None].to(features)])
