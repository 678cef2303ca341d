"""What training costs, before it is paid.

A product of (n, a) and (a, b) is 2·n·a·b floating-point operations. A layer's backward pass is one more such product for the gradient of what
goes in, and one for the gradient of its weight: each is spared where nobody trains what would read it. Attention is two products, and four
backward, over all pairs of tokens of a row: as if every row were one sample (the convention of PaLM, appendix B; masks save time, not count).
"""

import torch
import torch.nn as nn

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..data import image_processing


def products(module, positions, *, into, own):
    """Operations of all weights of a module on so many positions; into: whether gradients go on to what went in; own: whether it trains."""
    weights = sum(
        part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)
    )
    return 2 * weights * positions * (1 + into + own)


def attended(layers, heads, head_size, rows, length, backward):
    """Operations of queries · keys and weights · values in all layers."""
    return layers * rows * 4 * heads * head_size * length**2 * (3 if backward else 1)


def flops(model, rates, rows, length, tiles, trained, recompute="none"):
    """{part: operations} of a training step over `rows` rows of `length` tokens with `tiles` tiles in all, of which `trained` tokens are trained.

    rates: {part that trains: its rate}; recompute: which blocks run once more in the backward pass: none, decoder or all.
    """
    sees, speaks = "vision" in rates, "decoder" in rates
    vision, decoder = model.vision, model.decoder
    patches = (model.tile // vision.patches.weight.shape[-1]) ** 2
    seen = patches + (vision.class_token is not None)
    look, block = vision.layers[0], decoder.layers[0]
    eye = products(vision.patches, tiles * patches, into=False, own=sees) + products(
        vision.layers, tiles * seen, into=sees, own=sees
    )
    eye += attended(
        len(vision.layers), look.heads, vision.positions.shape[1] // look.heads, tiles, seen, sees
    )
    read, joins = tiles * patches // model.projector.shuffle**2, "projector" in rates
    between = products(model.projector.up, read, into=sees, own=joins) + products(
        model.projector.down, read, into=sees or joins, own=joins
    )
    brain = products(decoder.layers, rows * length, into=True, own=speaks)
    brain += attended(len(decoder.layers), block.heads, block.head_size, rows, length, True)
    if recompute == "all" and sees:
        eye += products(vision.layers, tiles * seen, into=False, own=False)
        eye += attended(
            len(vision.layers),
            look.heads,
            vision.positions.shape[1] // look.heads,
            tiles,
            seen,
            False,
        )
    if recompute != "none":
        brain += products(decoder.layers, rows * length, into=False, own=False)
        brain += attended(len(decoder.layers), block.heads, block.head_size, rows, length, False)
    return {
        "vision": eye,
        "projector": between,
        "decoder": brain,
        "head": products(decoder.head, trained, into=True, own=speaks),
    }


def of_batches(model, rates, batches):
    """Operations of a training step over micro-batches as packing.Loader gives them; what is computed a second time is no use, and not counted."""
    return sum(
        sum(
            flops(
                model,
                rates,
                *batch["ids_BT"].shape,
                len(batch["tiles_NCYX"]),
                int((batch["targets_BT"] != IGNORE_INDEX).sum()),
            ).values()
        )
        for batch, _ in batches
    )


def assumed_row(length, policy):
    """(batch of one, its tiles, its trained tokens) for a row of which nothing is known but its length: half of it is pictures, a quarter is
    trained, which is about what LLaVA's mix comes to."""
    tokens, tile, trained = image_processing.tokens_per_tile(policy), policy["tile"], length // 4
    tiles = max(length // 2 // tokens, 1)
    ids_BT, targets_BT = (
        torch.zeros(1, length, dtype=torch.int64),
        torch.full((1, length), IGNORE_INDEX),
    )
    ids_BT[:, : tiles * tokens] = IMAGE_TOKEN_ID
    targets_BT[:, length - trained :] = 0
    row = {
        "ids_BT": ids_BT,
        "targets_BT": targets_BT,
        "positions_BT": torch.arange(length)[None],
        "documents_BT": torch.zeros_like(ids_BT),
        "tiles_NCYX": torch.zeros(tiles, 3, tile, tile, dtype=torch.uint8),
    }
    return row, tiles, trained
