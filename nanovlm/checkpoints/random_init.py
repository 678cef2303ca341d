"""A new model with random weights, and a tokenizer trained on text, for training from scratch."""

import os

import torch

from .. import UserError, cli
from ..data.chat_template import special_token_names
from ..data.image_processing import tokens_per_tile
from ..data.tokenizer import train_tokenizer
from ..models.decoder import Decoder
from ..models.vision_encoder import VisionEncoder
from .checkpoint import (
    Checkpoint,
    atomic_folder,
    build_model,
    check_arguments,
    saved_parameters,
    write_checkpoint_files,
)


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


def create_model(texts, *, out, vocab_size, template, image_config, vision, decoder, seed):
    """Write a checkpoint to `out`.

    texts: strings that a tokenizer of `vocab_size` tokens is trained on; the special tokens of
    `template` are added. vision, decoder: arguments of VisionEncoder and Decoder.
    """
    largest = {"vocab_size": vocab_size, **decoder}
    check_arguments(VisionEncoder, vision, "random_init")
    check_arguments(Decoder, largest, "random_init")
    with torch.device("meta"):  # takes no memory
        model = build_model({"vision": vision, "decoder": largest}, image_config)
    size = 4 * parameter_count(model)  # bytes, in float32
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"these sizes make a model of {size >> 30:,} GiB, this machine has {memory >> 30:,}: "
            "choose a smaller --width, --layers, --intermediate_size or --vocab_size"
        )
    with atomic_folder(out) as tmp:
        tokenizer = train_tokenizer(texts, vocab_size, special_token_names(template))
        shapes = {
            "vision": vision,
            "decoder": {"vocab_size": tokenizer.vocab_size, **decoder},
            "shuffle": image_config["shuffle"],
        }
        torch.manual_seed(seed)
        model = build_model(shapes, image_config)
        history = {"random_init": f"seed {seed}"}
        checkpoint = Checkpoint(model, tokenizer, shapes, image_config, template, history)
        write_checkpoint_files(checkpoint, tmp, saved_parameters(model))
    cli.print_status(
        f"{out}: {parameter_count(model):,} random parameters, {tokenizer.vocab_size} tokens, "
        f"{tokens_per_tile(image_config)} tokens per image"
    )
