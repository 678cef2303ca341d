"""Floating-point operations of a training step.

A product of (n, a) and (a, b) takes 2·n·a·b operations. The backward pass of a layer takes as many
for the gradient of its input, and as many for the gradient of its weight; it skips a gradient that
no trained parameter needs. (With LoRA, that of the first layer's input is counted although none
needs it.) Attention is two products in the forward pass and four in the backward pass, over all
pairs of tokens of a sequence (PaLM, appendix B): a mask does not change the count.
"""

import torch
import torch.nn as nn

from .. import IGNORE_INDEX, IMAGE_TOKEN_ID
from ..data import image_processing


def linear_flops(module, positions, input_grad=None):
    """Operations of a module's linear layers on so many positions.

    input_grad: whether the backward pass computes the gradient of a layer's input; None: there is
    no backward pass. It computes that of a weight if the weight trains.
    """
    total = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            backward = 0 if input_grad is None else input_grad + layer.weight.requires_grad
            total += 2 * layer.weight.numel() * positions * (1 + backward)
    return total


def step_flops(model, peak_lrs, batch, activation_checkpointing="none"):
    """Returns {part: operations} of a training step over a batch, as VLM.forward takes it.

    peak_lrs: {trained part: its learning rate}. activation_checkpointing: none, decoder or all;
    the forward pass of these blocks counts twice.
    """
    vision, projector, decoder = model.vision, model.projector, model.decoder
    train_vision = "vision" in peak_lrs
    tiles, vision_length = len(batch["tiles_NCYX"]), len(vision.positions)
    patches = tiles * (vision_length - (vision.class_token is not None))
    tokens = patches // projector.shuffle**2
    sequences, length = batch["ids_BT"].shape
    labelled_tokens = int((batch["targets_BT"] != IGNORE_INDEX).sum())
    linear_2 = projector.linear_2 or nn.Identity()  # without operations
    through_linear_2 = train_vision or "projector" in peak_lrs
    linear_layers = [  # part, module, positions, gradient of its input
        ("vision", vision.patches, patches, False),
        ("vision", vision.layers, tiles * vision_length, train_vision),
        ("projector", projector.linear_1, tokens, train_vision),
        ("projector", linear_2, tokens, through_linear_2),
        ("decoder", decoder.layers, sequences * length, True),
        ("head", decoder.lm_head, labelled_tokens, True),
    ]
    vision_twice = train_vision and activation_checkpointing == "all"
    decoder_twice = activation_checkpointing != "none"
    blocks = [  # part, its blocks, sequences, their length, backward pass, forward pass again
        ("vision", vision.layers, tiles, vision_length, train_vision, vision_twice),
        ("decoder", decoder.layers, sequences, length, True, decoder_twice),
    ]
    flops = dict.fromkeys(("vision", "projector", "decoder", "head"), 0)
    for part, module, positions, input_grad in linear_layers:
        flops[part] += linear_flops(module, positions, input_grad)
    for part, layers, count, length, backward, forward_twice in blocks:
        # query · key and weights · value; q_proj.out_features = heads · head_dim
        attention = len(layers) * count * 4 * layers[0].q_proj.out_features * length**2
        flops[part] += attention * (3 if backward else 1)
        if forward_twice:
            flops[part] += attention + linear_flops(layers, count * length)
    return flops


def micro_batch_flops(model, peak_lrs, batches):
    """Operations of a training step over the micro-batches that PackedDataLoader returns.

    The second forward pass of activation checkpointing is not counted: it does no useful work.
    """
    total = 0
    for batch, _ in batches:
        total += sum(step_flops(model, peak_lrs, batch).values())
    return total


def assumed_sequence(length, image_config):
    """Returns (batch of one sequence, its tiles, its labelled tokens) for a sequence length.

    Half of the tokens are image tokens and a quarter have labels, about as in LLaVA's data. The
    tensors have the right shapes, but no content.
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
        "tiles_NCYX": torch.zeros(tiles, 3, tile, tile, dtype=torch.uint8),
    }
    return batch, tiles, labelled_tokens
