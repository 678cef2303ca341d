"""A new model with random weights and a tokenizer learnt from text, for training from nothing."""

import torch

from .. import cli
from ..data import chat_template, image_processing, tokenizer
from .checkpoint import Checkpoint, build_model, save_checkpoint


def create_model(texts, *, out, vocab_size, template, image_config, vision, decoder, seed):
    """Write a checkpoint into `out`. texts: strings from which a tokenizer of `vocabulary` tokens is learnt, and the special tokens of
    `template` beside them; vision, decoder: the numbers of their constructors."""
    words = tokenizer.train_tokenizer(texts, vocab_size, chat_template.special_token_names(template))
    shapes = {
        "vision": vision,
        "decoder": {"vocab_size": words.vocab_size, **decoder},
        "shuffle": image_config["shuffle"],
    }
    torch.manual_seed(seed)
    model = build_model(shapes, image_config)
    save_checkpoint(
        Checkpoint(model, words, shapes, image_config, template, {"newborn": f"seed {seed}"}), out
    )
    cli.print_status(
        f"{out}: {sum(p.numel() for p in model.parameters()):,} random parameters, {words.vocab_size} tokens, "
        f"{image_processing.image_token_count((image_config['tile'],) * 2, image_config)} tokens a picture"
    )
