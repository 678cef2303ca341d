"""Stitching: a vision encoder and a decoder, each from its own folder, become one model with a new
projector between them."""

from pathlib import Path

import torch
import torch.nn as nn

from .. import UserError, cli
from .checkpoint import (
    atomic_folder,
    list_checkpoints,
    load_checkpoint,
    saved_parameters,
    write_checkpoint_files,
)
from .huggingface import add_special_tokens, combine_parts, read_decoder, read_vision_encoder
from .idefics3 import IDEFICS3_TOKENS


def load_part(name, read_published, **options):
    """Returns a Checkpoint: a nanovlm checkpoint, or what `read_published` makes of a Hugging Face
    folder.

    options: of read_published. Raises UserError if there are any for a nanovlm checkpoint.
    """
    if not ((Path(name) / "nanovlm.json").is_file() or list_checkpoints(name)):
        return read_published(name, **options)
    if options:
        raise UserError(
            f"--{', --'.join(options)}: only for a Hugging Face folder; {name} is a checkpoint of "
            "nanovlm and has its own"
        )
    return load_checkpoint(name)


def add_tokens(decoder, names):
    """Returns the Checkpoint of a decoder with these special tokens in its tokenizer.

    If the embedding and lm_head have no row for one, they get the mean of their rows. So its logit
    is the mean of all logits, and never the largest.
    """
    tokenizer = add_special_tokens(decoder.tokenizer, names)
    model, shapes = decoder.model.decoder, decoder.shapes["decoder"]
    size = max(shapes["vocab_size"], tokenizer.vocab_size)
    for module in (model.embed_tokens, model.lm_head):
        weight = module.weight.detach()
        new_rows = weight.mean(0).expand(size - len(weight), -1)
        module.weight = nn.Parameter(torch.cat([weight, new_rows]))
    if shapes.get("tied"):
        model.lm_head.weight = model.embed_tokens.weight
    shapes = decoder.shapes | {"decoder": shapes | {"vocab_size": size}}
    return decoder._replace(tokenizer=tokenizer, shapes=shapes)


def stitch_parts(vision, decoder, seed):
    """Returns the Checkpoint of two parts, a Checkpoint each, and a projector with random weights.

    Tokenizer and chat template are the decoder's. No weight of the parts changes.
    """
    torch.manual_seed(seed)
    history = {
        "vision": vision.history["folder"],
        "decoder": decoder.history["folder"],
        "projector": f"fresh, seed {seed}",
    }
    return combine_parts(vision, decoder, history)


def stitch_folders(
    *, vision, decoder, out, seed, vision_choices={}, template=None, projector="mlp"
):
    """Stitch the vision encoder of one folder to the decoder of another; write the checkpoint.

    vision_choices: options of read_vision_encoder. template: of a Hugging Face decoder, None for
    its own. projector: mlp or linear.
    """
    options = {} if template is None else {"template": template}
    with atomic_folder(out) as tmp:
        vision_part = load_part(vision, read_vision_encoder, **vision_choices)
        vision_part.shapes["projector_mlp"] = projector == "mlp"
        decoder_part = load_part(decoder, read_decoder, **options)
        if vision_part.image_config.get("tile_texts") == "idefics3":
            decoder_part = add_tokens(decoder_part, IDEFICS3_TOKENS)
        stitched = stitch_parts(vision_part, decoder_part, seed)
        write_checkpoint_files(stitched, tmp, saved_parameters(stitched.model))
    cli.print_status(
        f"{out}: the vision encoder of {vision}, the decoder of {decoder}, a new projector"
    )
