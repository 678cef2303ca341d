"""Three experiments: trainings that differ in one thing, from the demonstration's own parts.

    projector       two layers, one layer or none between the two models
    image_tokens    64, 16, 4 or 1 image tokens for a fridge
    vision_encoder  frozen, or trained at one of two learning rates

Each training starts from the vision encoder and the language model of the demonstration, with a new
projector between them, and reads the same fridges in the same order. README.md says what comes out.
"""

import torch

from ..checkpoints.checkpoint import load_checkpoint, save_checkpoint
from ..checkpoints.random_init import parameter_count
from ..checkpoints.stitch import stitch_parts
from ..data.dataset import LENGTH, PreparedDataset
from ..data.image_processing import tokens_per_tile
from ..training.recipes import PARTS
from .figures import check_finished, draw_loss_panels, read_validations
from .run import load_fridge_questions, prepare_records, run_stage, score_questions

OUT = "out/demo/experiments"
STEPS = 100
ALIGN = {"freeze": "vision,decoder", "lr": 2e-3}
LINEAR = {"projector_mlp": False}
ALL_PARTS = {"freeze": "none", "lr": 1e-3}
# {experiment: {what is tried: (shapes that differ from the demonstration's, settings of train.py)}}
EXPERIMENTS = {
    "projector": {
        "two layers": ({}, ALIGN),
        "one layer": (LINEAR, ALIGN),
        # A frozen projector is none: see stitch_trial.
        "vision encoder alone": (LINEAR, {"freeze": "projector,decoder", "lr": 1e-3}),
        "decoder alone": (LINEAR, {"freeze": "vision,projector", "lr": 1e-3}),
    },
    "image_tokens": {
        "64 image tokens": ({"shuffle": 1}, ALL_PARTS),
        "16 image tokens": ({}, ALL_PARTS),
        "4 image tokens": ({"shuffle": 4}, ALL_PARTS),
        "1 image token": ({"shuffle": 8}, ALL_PARTS),
    },
    "vision_encoder": {
        "frozen": ({}, ALIGN),
        "lr 2e-4": ({}, ALIGN | {"freeze": "decoder", "vision_lr": 2e-4}),
        "lr 2e-3": ({}, ALIGN | {"freeze": "decoder"}),
    },
}
# The table of an experiment. trained: parameters; right: share of the fridges that are read without
# an error; seconds: of training.
TABLE_HEADER = f"\n{'':20}    trained  image tokens  val_loss  blank_image_loss    right  seconds"
TABLE_LINE = (
    "{name:20} {trained:10,} {image_tokens:13} {val_loss:9.4f} {blank_image_loss:17.4f} "
    "{right:8.1%} {seconds:8.0f}"
)


def run_experiment(train, name):
    """Run an experiment, print its table, draw its figure. train: the function of train.py.

    Trainings that are finished are skipped. Returns what `run_trial` does of each.
    """
    check_finished()
    _, readings = load_fridge_questions()
    results = []
    for trial, (shapes, settings) in EXPERIMENTS[name].items():
        out = f"{OUT}/{name}/{trial.replace(' ', '_')}"
        results.append(run_trial(train, trial, shapes, settings, out, readings))
    print(TABLE_HEADER)
    panels = {}
    for result in results:
        print(TABLE_LINE.format_map(result))
        panels[result["name"]] = "{right:.1%} of fridges right".format_map(result), result["log"]
    draw_loss_panels(panels, f"{OUT}/{name}.png")
    print(f"losses by step: {OUT}/{name}.png")
    return results


def run_trial(train, name, shapes, settings, out, readings):
    """Stitch, train and evaluate a model.

    Returns the last line of its log, with what else TABLE_LINE prints. log: lines with a val_loss.
    """
    stitched, data = f"{out}_stitched", "data/demo/captions"
    stitch_trial(shapes, settings["freeze"], stitched)
    if "shuffle" in shapes:
        data += f"_shuffle_{shapes['shuffle']}"
        prepare_records("captions", stitched, data)
    run_stage(
        train,
        "pretrain",
        f"{name}: train.",
        out=out,
        model=stitched,
        data=data,
        seq_len=2 * int(PreparedDataset(data).table[:, LENGTH].max()),  # two fridges, never three
        steps=STEPS,
        global_batch_size=7,
        validate_every=20,
        **settings,
    )
    log = read_validations(out)
    checkpoint = load_checkpoint(out)
    parts = [getattr(checkpoint.model, x) for x in PARTS if x not in settings["freeze"]]
    return log[-1] | {
        "name": name,
        "trained": sum(map(parameter_count, parts)),
        "image_tokens": tokens_per_tile(checkpoint.image_config),
        "right": score_questions(out, readings)[-1][2],
        "seconds": log[-1]["hours"] * 3600,
        "log": log,
    }


def stitch_trial(shapes, freeze, out):
    """Stitch the demonstration's parts; shapes: what differs from the demonstration's own.

    If the projector is frozen, it is the mean of the patches of an image token: the features enter
    the language model as they are.
    """
    vision, decoder = load_checkpoint("out/demo/vision"), load_checkpoint("out/demo/decoder")
    shapes = vision.shapes | shapes
    shuffle = shapes["shuffle"]
    image_config = vision.image_config | {"shuffle": shuffle}
    vision = vision._replace(shapes=shapes, image_config=image_config)
    checkpoint = stitch_parts(vision, decoder, seed=0)
    if "projector" in freeze:
        weight = checkpoint.model.projector.linear_1.weight
        weight.data = torch.eye(len(weight)).repeat(1, shuffle**2) / shuffle**2
    save_checkpoint(checkpoint, out)
