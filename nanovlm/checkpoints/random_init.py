"""A new model with random weights, and a tokenizer trained on text, for training from scratch."""

import torch

from .. import cli
from ..data.chat_template import special_token_names
from ..data.image_processing import tokens_per_tile
from ..data.tokenizer import train_tokenizer
from .checkpoint import Checkpoint, build_model, save_checkpoint


def create_model(texts, *, out, vocab_size, template, image_config, vision, decoder, seed):
    """Write a checkpoint to `out`.

    texts: strings that a tokenizer of `vocab_size` tokens is trained on; the special tokens of
    `template` are added. vision, decoder: arguments of VisionEncoder and Decoder.
    """
    tokenizer = train_tokenizer(texts, vocab_size, special_token_names(template))
    shapes = {
        "vision": vision,
        "decoder": {"vocab_size": tokenizer.vocab_size, **decoder},
        "shuffle": image_config["shuffle"],
    }
    torch.manual_seed(seed)
    model = build_model(shapes, image_config)
    history = {"random_init": f"seed {seed}"}
    save_checkpoint(Checkpoint(model, tokenizer, shapes, image_config, template, history), out)
    parameters = sum(p.numel() for p in model.parameters())
    cli.print_status(
        f"{out}: {parameters:,} random parameters, {tokenizer.vocab_size} tokens, "
        f"{tokens_per_tile(image_config)} tokens per image"
    )
