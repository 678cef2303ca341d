"""Stitching: a vision encoder and a decoder, each from its own folder, become one model with a new
projector between them."""

from pathlib import Path

import torch

from .. import UserError, cli
from . import huggingface
from .checkpoint import Checkpoint, build_model, list_checkpoints, load_checkpoint, save_checkpoint


def load_vision_encoder(name, **options):
    """Returns the vision encoder of a nanovlm checkpoint (a Checkpoint) or of a Hugging Face folder
    (a Part). options: of huggingface.read_vision_encoder."""
    return load_part(name, huggingface.read_vision_encoder, options)


def load_decoder(name, **options):
    """Returns the decoder, tokenizer and template of a nanovlm checkpoint (a Checkpoint) or of a
    Hugging Face folder (a Part). options: of huggingface.read_decoder."""
    return load_part(name, huggingface.read_decoder, options)


def load_part(name, read_huggingface, options):
    if not ((Path(name) / "nanovlm.json").is_file() or list_checkpoints(name)):
        return read_huggingface(name, **options)
    if options:
        setting, value = next(iter(options.items()))
        raise UserError(
            f"--{setting}={cli.format_value(value)} is for a Hugging Face folder; {name} is a "
            "checkpoint of nanovlm and has its own"
        )
    return load_checkpoint(name)


def stitch_parts(vision, decoder, seed):
    """Returns a Checkpoint of two parts, each a Checkpoint or a Part, and a new projector.

    Tokenizer and chat template are the decoder's. No weight of the parts changes.
    """
    shapes = {
        "vision": vision.shapes["vision"],
        "decoder": decoder.shapes["decoder"],
        "shuffle": vision.shapes["shuffle"],
    }
    torch.manual_seed(seed)
    # a second decoder may not fit into memory: build one without layers, and replace it
    small = shapes["decoder"] | {"layers": 0, "vocab_size": 1}
    model = build_model(shapes | {"decoder": small}, vision.image_config)
    model.vision, model.decoder = vision.model.vision, decoder.model.decoder
    history = {
        "vision": vision.history["folder"],
        "decoder": decoder.history["folder"],
        "projector": f"fresh, seed {seed}",
    }
    return Checkpoint(
        model.eval(),
        decoder.tokenizer,
        shapes,
        vision.image_config,
        decoder.chat_template,
        history,
        vision.unused_vision_tensors,
    )


@torch.no_grad()
def outputs_of_parts(vision, decoder):
    """Returns (features_NPD, logits_BTV) of the parts alone, for an image of noise and 8 tokens."""
    tiles_NCYX, ids_BT, positions_BT = example_input(vision.image_config, decoder.shapes)
    mean_C11 = torch.tensor(vision.image_config["mean"]).view(3, 1, 1)
    std_C11 = torch.tensor(vision.image_config["std"]).view(3, 1, 1)
    pixels_NCYX = (tiles_NCYX.float() / 255 - mean_C11) / std_C11
    encoder, language_model = vision.model.vision, decoder.model.decoder
    features = encoder(pixels_NCYX.to(encoder.patches.weight.dtype))
    hidden = language_model(language_model.embed_tokens(ids_BT), positions_BT)
    return features, language_model.lm_head(hidden)


@torch.no_grad()
def outputs_of_model(checkpoint):
    """Returns the same outputs of a whole model: what its projector gets, and its logits."""
    tiles_NCYX, ids_BT, positions_BT = example_input(checkpoint.image_config, checkpoint.shapes)
    model, features = checkpoint.model, []
    hook = model.projector.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    model.encode_images(tiles_NCYX)
    hook.remove()
    hidden_BTD = model.decoder(model.embed(ids_BT, tiles_NCYX[:0]), positions_BT)
    return features[0], model.decoder.lm_head(hidden_BTD)


def example_input(image_config, shapes):
    size = (1, 3, image_config["tile"], image_config["tile"])
    generator = torch.Generator().manual_seed(0)
    tiles_NCYX = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    ids_BT = torch.arange(1, 9)[None] * 997 % shapes["decoder"]["vocab_size"]
    return tiles_NCYX, ids_BT, torch.arange(8)[None]


def verify_stitch(folder, expected):
    """Read a stitched checkpoint again and compare its outputs with those of the parts.

    Returns the largest difference; raises UserError if it is more than rounding.
    """
    largest = 0.0
    names = ("the features of the vision encoder", "the logits of the decoder")
    outputs = outputs_of_model(load_checkpoint(folder, dtype=None))
    for name, output, reference in zip(names, outputs, expected, strict=True):
        # products depend slightly on the alignment of a tensor in memory
        tolerance = 1e-4 if reference.dtype == torch.float32 else 2e-2
        difference = (output.float() - reference.float()).abs().max().item()
        if not difference <= tolerance * reference.float().abs().max().item():
            raise UserError(f"{folder}: {name} differ by {difference:.2g} from the part's alone")
        largest = max(largest, difference)
    return largest


def stitch_folders(*, vision, decoder, out, seed, vision_choices={}, template=None):
    """Stitch the vision encoder of one folder to the decoder of another, write the checkpoint to
    `out`, and verify it.

    vision_choices: options of load_vision_encoder. template: of a Hugging Face decoder, None for
    its own.
    """
    options = {} if template is None else {"template": template}
    vision_part = load_vision_encoder(vision, **vision_choices)
    decoder_part = load_decoder(decoder, **options)
    expected = outputs_of_parts(vision_part, decoder_part)
    save_checkpoint(stitch_parts(vision_part, decoder_part, seed), out)
    del vision_part, decoder_part  # free their memory before the new checkpoint is read
    difference = verify_stitch(out, expected)
    cli.print_status(
        f"{out}: the vision encoder of {vision}, the decoder of {decoder}, a new projector"
    )
    cli.print_status(
        "verified: features of a noise image and logits of 8 tokens are those of the parts; the "
        f"largest difference is {difference:.2g}"
    )
