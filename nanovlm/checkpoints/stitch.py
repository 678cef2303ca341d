"""Stitching: a vision encoder and a decoder, each from its own folder, become one model with a new
projector between them."""

from pathlib import Path

import torch

from .. import UserError, cli
from .checkpoint import (
    atomic_folder,
    list_checkpoints,
    load_checkpoint,
    saved_parameters,
    write_checkpoint_files,
)
from .huggingface import combine_parts, read_decoder, read_vision_encoder


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


def stitch_folders(*, vision, decoder, out, seed, vision_choices={}, template=None):
    """Stitch the vision encoder of one folder to the decoder of another; write the checkpoint.

    vision_choices: options of read_vision_encoder. template: of a Hugging Face decoder, None for
    its own.
    """
    options = {} if template is None else {"template": template}
    with atomic_folder(out) as tmp:
        vision_part = load_part(vision, read_vision_encoder, **vision_choices)
        decoder_part = load_part(decoder, read_decoder, **options)
        stitched = stitch_parts(vision_part, decoder_part, seed)
        write_checkpoint_files(stitched, tmp, saved_parameters(stitched.model))
    cli.print_status(
        f"{out}: the vision encoder of {vision}, the decoder of {decoder}, a new projector"
    )
