"""What a run is made of: the stages and their published settings, and what a user's settings make of them."""

from importlib.util import find_spec
from types import SimpleNamespace

from .. import UserError

# What a stage sets where no setting overrides it. brain and eye are the demonstration's; pretrain and sft are the recipe of
# Megatron-LM/examples/multimodal (pretrain_mistral_clip.sh, sft_mistral_clip.sh): rates, floors, steps, batch, decay and clipping.
STAGES = {
    "brain": dict(
        freeze="vision,projector",
        model="out/newborn",
        data="data/text",
        lr=1e-3,
        floor=3e-5,
        steps=1100,
        batch=8,
        row=256,
        decay=0.1,
        clip=1.0,
    ),
    "eye": dict(
        freeze="decoder",
        model="out/brain",
        data="data/captions",
        lr=1e-3,
        floor=3e-5,
        steps=1000,
        batch=5,
        row=320,
        decay=0.1,
        clip=1.0,
    ),
    "pretrain": dict(
        freeze="vision,decoder",
        model="out/stitched",
        data="data/captions",
        lr=1.5e-4,
        floor=1e-5,
        steps=20000,
        batch=256,
        row=1024,
        decay=0.01,
        clip=1.0,
    ),
    "sft": dict(
        freeze="vision",
        model="out/pretrain",
        data="data/chats",
        lr=1e-6,
        floor=1e-7,
        steps=20000,
        batch=128,
        row=2048,
        decay=0.1,
        clip=0.5,
    ),
}
# LLaVA-1.5's (scripts/v1_5/pretrain.sh and finetune.sh), one epoch of its 558,128 captions and 665,298 conversations: a row there is one sample.
RECIPES = {
    "megatron": STAGES,
    "llava": {
        "pretrain": dict(
            lr=1e-3, floor=0.0, steps=2181, batch=256, row=2048, warmup=0.03, decay=0.0, beta2=0.999
        ),
        "sft": dict(
            lr=2e-5,
            floor=0.0,
            steps=5198,
            batch=128,
            row=2048,
            warmup=0.03,
            decay=0.0,
            clip=1.0,
            beta2=0.999,
        ),
    },
}
PARTS = ("vision", "projector", "decoder")
FREE = (
    "data",
    "out",
    "resume",
    "micro",
    "save_every",
    "keep",
    "validate_every",
    "log_every",
    "exam",
    "exam_images",
    "exam_every",
    "benchmark",
    "device",
    "parallel",
    "shard",
    "recompute",
    "offload",
    "compile",
    "kernels",
    "profile",
    "tensorboard",
    "recipe",
    "dry_run",
    "mfu",
    "peak",
)  # may change when a run is resumed
DRY = (
    "stage",
    "recipe",
    "model",
    "steps",
    "batch",
    "micro",
    "row",
    "freeze",
    "lr",
    "vision_lr",
    "projector_lr",
    "decoder_lr",
    "dtype",
    "recompute",
    "offload",
    "dry_run",
    "mfu",
    "peak",
)  # what a dry run heeds; any other setting would change nothing in what it prints


def resolve(typed, world):
    """The settings of a run on `world` ranks: what was typed, else what its stage sets, and `rates`, {part that trains: peak rate}."""
    run = SimpleNamespace(**typed)
    if run.stage not in STAGES:
        raise UserError(f"--stage={run.stage} is not known: {', '.join(STAGES)}")
    if run.stage not in RECIPES.get(run.recipe, {}):
        known = "; ".join(f"{name} has {', '.join(stages)}" for name, stages in RECIPES.items())
        raise UserError(f"--recipe={run.recipe} has no --stage={run.stage}: {known}")
    preset = {
        "out": f"out/{run.stage}",
        "warmup": 0.01,
        "beta2": 0.95,
        **STAGES[run.stage],
        **RECIPES[run.recipe][run.stage],
    }
    vars(run).update({name: value for name, value in preset.items() if typed[name] in (None, "")})
    frozen = [part.strip() for part in run.freeze.split(",")] if run.freeze != "none" else []
    if unknown := [part for part in frozen if part not in PARTS]:
        raise UserError(f"--freeze={run.freeze}: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if not (trained := [part for part in PARTS if part not in frozen]):
        raise UserError(f"--freeze={run.freeze} leaves nothing to train")
    check(run, world, idle=[f"{part}_lr" for part in frozen])
    if given := [name for name in ("mfu", "peak") if typed[name] is not None and not run.dry_run]:
        raise UserError(f"--{given[0]}={typed[given[0]]} is for --dry_run=true")
    own = {part: getattr(run, f"{part}_lr") for part in trained}
    run.rates = {part: run.lr if rate is None else rate for part, rate in own.items()}
    run.micro = min(run.micro, -(-run.batch // world))
    return run


def check(run, world, idle):
    """One UserError that names every setting out of its range; idle: the rates of parts that stand still, which nobody may set."""
    rules = [
        (
            "must be at least 1",
            lambda x: x >= 1,
            (
                "steps",
                "micro",
                "row",
                "save_every",
                "keep",
                "validate_every",
                "log_every",
                "exam_every",
            ),
        ),
        (f"must be at least {world}, a row for each rank", lambda x: x >= world, ("batch",)),
        (
            "must be above 0",
            lambda x: x > 0,
            ("lr", "vision_lr", "projector_lr", "decoder_lr", "clip", "peak"),
        ),
        ("must be above 0 and at most 1", lambda x: 0 < x <= 1, ("mfu",)),
        (f"must be between 0 and --lr={run.lr}", lambda x: 0 <= x <= run.lr, ("floor",)),
        ("must be at least 0", lambda x: x >= 0, ("decay", "seed")),
        ("must be at least 0 and below 1", lambda x: 0 <= x < 1, ("warmup", "beta1", "beta2")),
        (
            "is none of auto, float32, bfloat16",
            lambda x: x in ("auto", "float32", "bfloat16"),
            ("dtype",),
        ),
        ("is none of auto, ddp, fsdp", lambda x: x in ("auto", "ddp", "fsdp"), ("parallel",)),
        (
            "is none of none, decoder, all",
            lambda x: x in ("none", "decoder", "all"),
            ("recompute",),
        ),
        (
            f"wants --parallel=fsdp, and to divide the {world} ranks",
            lambda x: x == 0 or (run.parallel == "fsdp" and x > 0 and world % x == 0),
            ("shard",),
        ),
        (
            "wants --parallel=fsdp",
            lambda x: not x or run.parallel == "fsdp" or run.dry_run,
            ("offload",),
        ),
        (
            "needs tensorboard: pip install tensorboard",
            lambda x: not x or find_spec("tensorboard"),
            ("tensorboard",),
        ),
        ("is none of auto, torch", lambda x: x in ("auto", "torch"), ("kernels",)),
        (f"is for a part that --freeze={run.freeze} holds still", lambda x: False, idle),
    ]
    values = {name: value for name, value in vars(run).items() if value is not None}
    wrong = [
        f"--{name}={values[name]} {must}"
        for must, holds, names in rules
        for name in names
        if name in values and not holds(values[name])
    ]
    if wrong:
        raise UserError("; ".join(wrong))
