"""The settings of a training run: the published values of each stage, and rules for all values."""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from .. import UserError
from ..checkpoints.lora import LORA_PARTS, is_trained
from ..cli import changed_settings, check_rules, did_you_mean, format_value, one_of
from ..files import is_repo_id, read_json, size_rules

# The values of a stage for settings that the user does not give. `decoder` and `vision` are stages
# of the demonstration; `pretrain` (alignment: projector only) and `sft` are the recipe of
# Megatron-LM/examples/multimodal (pretrain_mistral_clip.sh, sft_mistral_clip.sh).
STAGES = {
    "decoder": dict(
        freeze="vision,projector",
        model="out/demo/random_init",
        data="data/demo/text",
        lr=1e-3,
        min_lr=3e-5,
        steps=1100,
        global_batch_size=8,
        seq_len=256,
        weight_decay=0.1,
        grad_clip=1.0,
    ),
    "vision": dict(
        freeze="decoder",
        model="out/demo/decoder",
        data="data/demo/captions",
        lr=1e-3,
        min_lr=3e-5,
        steps=1000,
        global_batch_size=5,
        seq_len=320,
        weight_decay=0.1,
        grad_clip=1.0,
    ),
    "pretrain": dict(
        freeze="vision,decoder",
        model="out/stitched",
        data="data/captions",
        lr=1.5e-4,
        min_lr=1e-5,
        steps=20000,
        global_batch_size=256,
        seq_len=1024,
        weight_decay=0.01,
        grad_clip=1.0,
    ),
    "sft": dict(
        freeze="vision",
        model="out/pretrain",
        data="data/chats",
        lr=1e-6,
        min_lr=1e-7,
        steps=20000,
        global_batch_size=128,
        seq_len=2048,
        weight_decay=0.1,
        grad_clip=0.5,
    ),
}
# LLaVA-1.5 (scripts/v1_5/pretrain.sh and finetune.sh): one epoch of its 558,128 captions and of its
# 665,298 conversations, with one sample in a sequence. Sequences here are packed with several, so
# these steps are several epochs; `prepare.py check` prints the sequences of one.
LLAVA_1_5 = {
    "pretrain": dict(
        lr=1e-3,
        min_lr=0.0,
        steps=2181,
        global_batch_size=256,
        seq_len=2048,
        warmup_ratio=0.03,
        weight_decay=0.0,
        beta2=0.999,
    ),
    "sft": dict(
        lr=2e-5,
        min_lr=0.0,
        steps=5198,
        global_batch_size=128,
        seq_len=2048,
        warmup_ratio=0.03,
        weight_decay=0.0,
        grad_clip=1.0,
        beta2=0.999,
    ),
}
RECIPES = {"megatron": STAGES, "llava": LLAVA_1_5}
PARTS = ("vision", "projector", "decoder")
# Settings that runs of an older version do not have in their training.json.
NEW_SETTINGS = {"lora_rank": 0, "lora_alpha": None, "lora_target": "decoder"}
OLD_STAGES = {"brain": "decoder", "eye": "vision"}  # in runs of an older version
# These settings may change if a run resumes; all others must stay the same.
FREE_ON_RESUME = (
    "data",
    "out",
    "resume",
    "micro_batch_size",
    "save_every",
    "keep_checkpoints",
    "validate_every",
    "log_every",
    "eval_questions",
    "eval_images",
    "eval_every",
    "eval_benchmark",
    "device",
    "parallel",
    "hsdp_shard_size",
    "activation_checkpointing",
    "cpu_offload",
    "compile",
    "kernels",
    "profile",
    "tensorboard",
    "recipe",
    "epochs",  # gives the steps, which must stay the same
    "patience",
)

# The command that makes the checkpoint from which a stage starts.
MISSING_MODEL_HINTS = {
    "decoder": "`python train.py` makes the one of the demonstration",
    "vision": "`python train.py` makes the one of the demonstration",
    "pretrain": "`python prepare.py stitch --vision=DIR --decoder=DIR` writes out/stitched",
    "sft": "`python train.py --stage=pretrain` writes out/pretrain",
}
# (settings, whether a value x is allowed beside settings s, what is wrong if not). s.world is the
# number of ranks.
SETTING_RULES = [
    (
        "steps micro_batch_size seq_len save_every keep_checkpoints validate_every log_every "
        "eval_every",
        lambda x, s: x >= 1,
        "must be at least 1",
    ),
    (
        "global_batch_size",
        lambda x, s: x >= s.world,
        "must be at least {world}, a sequence for each rank",
    ),
    *size_rules("steps epochs global_batch_size seq_len"),
    (
        "lr vision_lr projector_lr decoder_lr grad_clip peak_tflops epochs",
        lambda x, s: x > 0,
        "must be above 0",
    ),
    ("mfu", lambda x, s: 0 < x <= 1, "must be above 0 and at most 1"),
    ("min_lr", lambda x, s: 0 <= x <= s.lr, "must be between 0 and --lr={lr}"),
    ("weight_decay seed patience", lambda x, s: x >= 0, "must be at least 0"),
    ("warmup_ratio beta1 beta2", lambda x, s: 0 <= x < 1, "must be at least 0 and below 1"),
    ("lora_rank", lambda x, s: x >= 0, "must be at least 0; 0: no LoRA"),
    ("lora_alpha", lambda x, s: x > 0 and s.lora_rank, "must be above 0, and needs --lora_rank"),
    one_of("lora_target", *LORA_PARTS),
    ("lora_target", lambda x, s: x == "decoder" or s.lora_rank, "needs --lora_rank"),
    one_of("dtype", "auto", "float32", "bfloat16"),
    one_of("parallel", "auto", "ddp", "fsdp"),
    one_of("activation_checkpointing", "none", "decoder", "all"),
    one_of("kernels", "auto", "torch"),
    (
        "hsdp_shard_size",
        lambda x, s: x == 0 or (s.parallel == "fsdp" and x > 0 and s.world % x == 0),
        "needs --parallel=fsdp, and must divide the {world} ranks",
    ),
    (
        "cpu_offload",
        # prepare.py estimate has no --parallel: it plans for FSDP, too
        lambda x, s: not x or getattr(s, "parallel", "fsdp") == "fsdp",
        "needs --parallel=fsdp",
    ),
    (
        "tensorboard",
        lambda x, s: not x or find_spec("tensorboard"),
        "needs tensorboard: pip install tensorboard",
    ),
]


def load_settings(given, world):
    """Returns the settings of a run on `world` ranks, as attributes.

    given: the user's settings; the recipe has the values of those that are None or empty. Added are
    peak_lrs, {trained part: its peak learning rate}, and lora, the arguments of add_lora or None.
    A part with LoRA trains, whatever --freeze is. Raises UserError if a rule is broken.
    """
    run = SimpleNamespace(**given)
    stages = RECIPES.get(run.recipe, {})
    if run.stage not in stages:
        known = "; ".join(f"{name} has {', '.join(stages)}" for name, stages in RECIPES.items())
        hint = did_you_mean(run.stage, stages, "--stage=")
        raise UserError(f"--stage={run.stage} is not known to --recipe={run.recipe}: {known}{hint}")
    folder = "out/demo" if run.stage in ("decoder", "vision") else "out"
    preset = {
        "out": f"{folder}/{run.stage}",
        "warmup_ratio": 0.01,
        "beta2": 0.95,
        "lora_alpha": 2 * run.lora_rank or None,
        "hsdp_shard_size": 0,  # which prepare.py estimate does not have
        **STAGES[run.stage],
        **stages[run.stage],
    }
    for name, value in preset.items():
        if given.get(name) in (None, ""):
            setattr(run, name, value)
    frozen = [part.strip() for part in run.freeze.split(",")] if run.freeze != "none" else []
    if unknown := [part for part in frozen if part not in PARTS]:
        raise UserError(f"--freeze={run.freeze}: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    lora_parts = LORA_PARTS.get(run.lora_target, ()) if run.lora_rank else ()
    frozen = [part for part in frozen if part not in lora_parts]
    if not (trained := [part for part in PARTS if part not in frozen]):
        raise UserError(f"--freeze={run.freeze} leaves nothing to train")
    unused = " ".join(f"{part}_lr" for part in frozen)
    is_frozen = (unused, lambda x, s: False, "is for a part that --freeze={freeze} freezes")
    one_length = ("epochs", lambda x, s: given["steps"] is None, "excludes --steps={steps}")
    rules = [*SETTING_RULES, is_frozen, one_length]
    values = {name: value for name, value in vars(run).items() if value is not None}
    check_rules(values, rules, SimpleNamespace(**vars(run), world=world))
    run.peak_lrs = {part: getattr(run, f"{part}_lr", None) or run.lr for part in trained}
    run.lora = None
    if run.lora_rank:
        run.lora = dict(rank=run.lora_rank, alpha=run.lora_alpha, target=run.lora_target)
    run.micro_batch_size = min(run.micro_batch_size, -(-run.global_batch_size // world))
    return run


def check_inputs(run):
    """Raises UserError if the model or the data does not exist; the message says what makes it."""
    if not (run.resume or Path(run.model).exists() or is_repo_id(run.model)):
        raise UserError(
            f"no such model: {run.model}. --stage={run.stage} starts from a checkpoint: "
            f"{MISSING_MODEL_HINTS[run.stage]}; or give another --model. "
            "`python train.py` without a --stage runs the demonstration, from scratch to sft"
        )
    if run.data == STAGES[run.stage]["data"] and not Path(run.data).exists():
        raise UserError(
            f"no such data: {run.data}. Give another --data, or write it: python prepare.py data "
            f"--model={run.model} --source=FILE --images=DIR --out={run.data}"
        )


def freeze_parts(model, peak_lrs, lora=None):
    """Freeze all parts that have no learning rate, and the base of those with LoRA."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, peak_lrs, lora))


def read_saved_settings(path):
    """Returns the step and the settings in a checkpoint's training.json."""
    settings = read_json(path, "step", "seq_len")
    stage = settings.get("stage")
    return NEW_SETTINGS | settings | {"stage": OLD_STAGES.get(stage, stage)}


def parse_dataset_weights(text):
    """Returns (folders, weights) of --data.

    "a:0.7,b:0.3" gives each dataset's share of the samples that are read. "a,b" gives None as
    weights: each sample is read once per epoch. The samples of one image (group_samples) count as
    one. Raises UserError if the text is neither.
    """
    folders, weights = [], []
    for part in map(str.strip, text.split(",")):
        folder, colon, weight = part.rpartition(":")
        if not colon or Path(part).exists():
            folder, weight = part, None
        folders.append(folder)
        weights.append(weight)
    if "" in folders:
        raise UserError(f"--data={text} names nothing between two commas")
    if len(set(map(Path, folders))) < len(folders):
        raise UserError(f"--data={text} names a dataset twice")
    if set(weights) == {None}:
        return folders, None
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise UserError(
            f"--data={text}: give each dataset a weight, a number after a colon, or give none"
        ) from None
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"--data={text}: weights must be above 0")
    return folders, [number / sum(numbers) for number in numbers]


def describe_run(run, saved, device, world):
    """Returns the plan of a run in one line."""
    sequences = -(-run.global_batch_size // world)  # of a rank
    accumulation = -(-sequences // run.micro_batch_size)
    epochs = f" ({run.epochs:g} epochs)" if run.epochs else ""
    return (
        f"{run.stage}: {run.steps} steps{epochs} of {run.global_batch_size} sequences of "
        f"{run.seq_len} tokens on {world} × {device}, {accumulation} gradient-accumulation steps "
        f"of {run.micro_batch_size} sequences, from {saved or run.model} on {run.data}"
    )


def check_demonstration(script, given):
    """Raises UserError for any setting, and under torchrun: both need a --stage."""
    stages = ", ".join(STAGES)
    changed = changed_settings(script, given).items()
    if changed:
        settings = ", ".join(f"--{name}={format_value(value)}" for name, value in changed)
        raise UserError(
            f"{settings}: the demonstration takes no settings; give a --stage ({stages})"
        )
    if "RANK" in os.environ:
        raise UserError(
            f"the demonstration is one process: with torchrun, give a --stage ({stages})"
        )
