"""Floating-point operations of a training step.

A product of (n, a) and (a, b) takes 2·n·a·b operations. The backward pass of a layer takes as many
for the gradient of its input, and as many for the gradient of its weight; it skips a gradient that
no trained parameter needs. Attention is two products forward and four backward over all pairs of
tokens of a sequence, as in PaLM, appendix B: masks save time, but not operations in this count.
"""

import torch
import torch.nn as nn

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..data import image_processing


def linear_flops(module, positions, *, input_grad, weight_grad):
    """Operations of a module's linear layers on so many positions.

    input_grad, weight_grad: whether the backward pass computes these gradients.
    """
    weights = sum(
        part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)
    )
    return 2 * weights * positions * (1 + input_grad + weight_grad)


def attention_flops(layers, heads, head_dim, sequences, length, backward):
    """Operations of query · key and weights · value in all layers."""
    return layers * sequences * 4 * heads * head_dim * length**2 * (3 if backward else 1)


def vision_flops(model, tiles, trains, checkpointing):
    """Operations of the vision encoder on so many tiles."""
    vision = model.vision
    layers, heads = vision.layers, vision.layers[0].heads
    head_dim = vision.positions.shape[1] // heads
    patches = (model.tile // vision.patches.weight.shape[-1]) ** 2
    length = patches + (vision.class_token is not None)
    flops = linear_flops(
        vision.patches, tiles * patches, input_grad=False, weight_grad=trains
    ) + linear_flops(layers, tiles * length, input_grad=trains, weight_grad=trains)
    flops += attention_flops(len(layers), heads, head_dim, tiles, length, trains)
    if checkpointing and trains:  # the forward pass once more
        flops += linear_flops(layers, tiles * length, input_grad=False, weight_grad=False)
        flops += attention_flops(len(layers), heads, head_dim, tiles, length, False)
    return flops


def projector_flops(model, tiles, trains, vision_trains):
    """Operations of the projector on the features of so many tiles."""
    patches = (model.tile // model.vision.patches.weight.shape[-1]) ** 2
    tokens = tiles * patches // model.projector.shuffle**2
    up, down = model.projector.up_proj, model.projector.down_proj
    return linear_flops(up, tokens, input_grad=vision_trains, weight_grad=trains) + linear_flops(
        down, tokens, input_grad=vision_trains or trains, weight_grad=trains
    )


def decoder_flops(model, sequences, length, trains, checkpointing):
    """Operations of the decoder's blocks on sequences of one length."""
    layers, heads, head_dim = (
        model.decoder.layers,
        model.decoder.layers[0].heads,
        model.decoder.layers[0].head_dim,
    )
    flops = linear_flops(layers, sequences * length, input_grad=True, weight_grad=trains)
    flops += attention_flops(len(layers), heads, head_dim, sequences, length, True)
    if checkpointing:  # the forward pass once more
        flops += linear_flops(layers, sequences * length, input_grad=False, weight_grad=False)
        flops += attention_flops(len(layers), heads, head_dim, sequences, length, False)
    return flops


def step_flops(
    model, peak_lrs, sequences, length, tiles, labelled_tokens, activation_checkpointing="none"
):
    """{part: operations} of a training step over sequences of one length.

    peak_lrs: {trained part: its learning rate}; tiles: of all sequences; labelled_tokens: those
    for which the head computes logits; activation_checkpointing: none, decoder or all.
    """
    vision, projector, decoder = (part in peak_lrs for part in ("vision", "projector", "decoder"))
    return {
        "vision": vision_flops(model, tiles, vision, activation_checkpointing == "all"),
        "projector": projector_flops(model, tiles, projector, vision),
        "decoder": decoder_flops(
            model, sequences, length, decoder, activation_checkpointing != "none"
        ),
        "head": linear_flops(
            model.decoder.lm_head, labelled_tokens, input_grad=True, weight_grad=decoder
        ),
    }


def micro_batch_flops(model, peak_lrs, batches):
    """Operations of a training step over the micro-batches that PackedDataLoader returns.

    The second forward pass of activation checkpointing is not counted: it does no useful work.
    """
    total = 0
    for batch, _ in batches:
        labelled_tokens = int((batch["targets_BT"] != IGNORE_INDEX).sum())
        sequences, length = batch["ids_BT"].shape
        parts = step_flops(
            model, peak_lrs, sequences, length, len(batch["tiles_NCYX"]), labelled_tokens
        )
        total += sum(parts.values())
    return total


def assumed_sequence(length, image_config):
    """Returns (batch of one sequence, its tiles, its labelled tokens) if only the length is known.

    Half of the tokens are image tokens and a quarter have labels, about as in LLaVA's data.
    """
    tile, labelled_tokens = image_config["tile"], length // 4
    tokens = image_processing.tokens_per_tile(image_config)
    tiles = max(length // 2 // tokens, 1)
    ids_BT = torch.zeros(1, length, dtype=torch.int64)
    targets_BT = torch.full((1, length), IGNORE_INDEX)
    ids_BT[:, : tiles * tokens] = IMAGE_TOKEN_ID
    targets_BT[:, length - labelled_tokens :] = 0
    batch = {
        "ids_BT": ids_BT,
        "targets_BT": targets_BT,
        "positions_BT": torch.arange(length)[None],
        "documents_BT": torch.zeros_like(ids_BT),
        "tiles_NCYX": torch.zeros(tiles, 3, tile, tile, dtype=torch.uint8),
    }
    return batch, tiles, labelled_tokens
