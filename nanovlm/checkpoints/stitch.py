"""Stitching: a vision encoder and a language model, each from its own folder, become one model with a fresh projector."""

from pathlib import Path

import torch

from .. import UserError, cli
from . import huggingface
from .checkpoint import Checkpoint, build_model, list_checkpoints, load_checkpoint, save_checkpoint


def load_vision_encoder(name, **how):
    """The eye of a checkpoint of ours, or of a public model's folder with `how`, the choices of huggingface.eye."""
    return load_part(name, huggingface.read_vision_encoder, how)


def load_decoder(name, **how):
    """The brain, tokenizer and template of a checkpoint of ours, or of a public model's folder with `how`, the choices of huggingface.brain."""
    return load_part(name, huggingface.read_decoder, how)


def load_part(name, public, how):
    if not ((Path(name) / "nanovlm.json").is_file() or list_checkpoints(name)):
        return public(name, **how)
    for setting, value in how.items():
        raise UserError(
            f"--{setting}={value} is for a public model's folder; {name} has settled it"
        )
    return load_checkpoint(name)


def stitch_parts(vision, decoder, seed):
    """An eye and a brain, each from a Checkpoint or a Part, the brain's tokenizer and template, and a fresh projector; no other number changes."""
    shapes = {
        "vision": vision.shapes["vision"],
        "decoder": decoder.shapes["decoder"],
        "shuffle": vision.shapes["shuffle"],
    }
    torch.manual_seed(seed)
    model = build_model(
        shapes | {"decoder": shapes["decoder"] | {"layers": 0, "vocab_size": 1}}, vision.image_config
    )  # a brain may be too large to have twice
    model.vision, model.decoder = vision.model.vision, decoder.model.decoder
    card = {
        "vision": vision.history["folder"],
        "decoder": decoder.history["folder"],
        "projector": f"fresh, seed {seed}",
    }
    return Checkpoint(
        model.eval(), decoder.tokenizer, shapes, vision.image_config, decoder.chat_template, card, vision.unused_vision_tensors
    )


@torch.no_grad()
def outputs_of_parts(vision, decoder):
    """What an eye sees by itself in a picture of noise, and the logits of a brain by itself over eight tokens: (features_NPD, logits_BTV)."""
    tiles_NCYX, ids_BT, positions_BT = example_input(vision.image_config, decoder.shapes)
    mean_C11, std_C11 = (
        torch.tensor(vision.image_config[name]).view(3, 1, 1) for name in ("mean", "std")
    )
    eye, brain = vision.model.vision, decoder.model.decoder
    normal_NCYX = ((tiles_NCYX.float() / 255 - mean_C11) / std_C11).to(eye.patches.weight.dtype)
    return eye(normal_NCYX), brain.lm_head(brain(brain.embed_tokens(ids_BT), positions_BT))


@torch.no_grad()
def outputs_of_model(checkpoint):
    """The same of a whole model: the features that reach its projector, and its logits."""
    tiles_NCYX, ids_BT, positions_BT = example_input(checkpoint.image_config, checkpoint.shapes)
    vlm, features = checkpoint.model, []
    hook = vlm.projector.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    vlm.encode_images(tiles_NCYX)
    hook.remove()
    return features[0], vlm.decoder.lm_head(
        vlm.decoder(vlm.embed(ids_BT, tiles_NCYX[:0]), positions_BT)
    )


def example_input(policy, shapes):
    tiles_NCYX = torch.randint(
        256,
        (1, 3, policy["tile"], policy["tile"]),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )
    ids_BT = torch.arange(1, 9)[None] * 997 % shapes["decoder"]["vocab_size"]
    return tiles_NCYX, ids_BT, torch.arange(8)[None]


def verify_stitch(folder, expected):
    """Read a stitched checkpoint again; the largest difference from what its parts did alone, or a UserError if that is more than rounding."""
    largest = 0.0
    for what, found, wanted in zip(
        ("the eye's features", "the brain's logits"),
        outputs_of_model(load_checkpoint(folder, dtype=None)),
        expected,
        strict=True,
    ):
        rounding = (
            1e-4 if wanted.dtype == torch.float32 else 2e-2
        )  # products depend a little on where in memory a file's tensors lie
        difference = (found.float() - wanted.float()).abs().max().item()
        if not difference <= rounding * wanted.float().abs().max().item():
            raise UserError(f"{folder}: {what} differ by {difference:.2g} from the bare part's")
        largest = max(largest, difference)
    return largest


def stitch_folders(*, vision, decoder, out, seed, vision_choices={}, template=None):
    """Stitch the vision encoder of one folder to the decoder of another, write the checkpoint into `out` and verify it.

    vision_choices: as load_vision_encoder takes them, for a published one; template: of a published decoder, None for its own.
    """
    eye, brain = (
        load_vision_encoder(vision, **vision_choices),
        load_decoder(decoder, **{} if template is None else {"template": template}),
    )
    expected = outputs_of_parts(eye, brain)
    save_checkpoint(stitch_parts(eye, brain, seed), out)
    del eye, brain  # their files are let go before the new one is read
    difference = verify_stitch(out, expected)
    cli.print_status(
        f"{out}: the eye of {vision}, the brain of {decoder}, a projector that knows nothing yet"
    )
    cli.print_status(
        f"read again, it sees in a picture of noise and says over eight tokens what they do alone: the largest difference is {difference:.2g}"
    )
