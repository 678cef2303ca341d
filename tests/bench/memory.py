"""What a card must hold to train Mistral 7B with CLIP-L/14@336, by train.py's own estimate: no weight is needed, and no card.

python tests/bench/memory.py
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from conftest import SEVEN_BILLION, SEVEN_BILLION_POLICY  # noqa: E402

import train  # noqa: E402
from nanovlm import cli  # noqa: E402
from nanovlm.checkpoints.checkpoint import build_model  # noqa: E402
from nanovlm.training import flops, memory  # noqa: E402

OPTIONS = [  # settings of train.py, and how many cards share a copy of the model
    ("--stage=pretrain --micro=1", dict(stage="pretrain"), 1),
    (
        "--stage=pretrain --micro=1 --recompute=decoder",
        dict(stage="pretrain", recompute="decoder"),
        1,
    ),
    ("--stage=sft --micro=1", dict(stage="sft"), 1),
    ("--stage=sft --micro=1 --recompute=decoder", dict(stage="sft", recompute="decoder"), 1),
    (
        "--stage=sft --micro=1 --recompute=decoder --parallel=fsdp --offload=true",
        dict(stage="sft", recompute="decoder", offload=True),
        1,
    ),
    ("--stage=sft --micro=1 --parallel=fsdp, on 8 cards", dict(stage="sft"), 8),
    (
        "--stage=sft --micro=1 --recompute=decoder --parallel=fsdp, on 8 cards",
        dict(stage="sft", recompute="decoder"),
        8,
    ),
]


def bench():
    """Print the bytes that a card takes, in bfloat16 products and float32 states, for some settings."""
    defaults = {name: default for name, _, default, _ in cli.settings(train.train)}
    for words, chosen, cards in OPTIONS:
        run = train.resolve(defaults | {"dry_run": True, "micro": 1} | chosen, 1)
        with torch.device("meta"):
            model = build_model(SEVEN_BILLION, SEVEN_BILLION_POLICY).train()
        train.hold_still(model, run.rates)
        row, *_ = flops.assumed_row(run.row, SEVEN_BILLION_POLICY)
        how = "fsdp" if cards > 1 or run.offload else "none"
        sizes = memory.estimate_memory(
            model,
            row,
            run.micro,
            torch.device("cpu"),
            torch.bfloat16,
            how=how,
            shards=cards,
            recompute=run.recompute,
            accumulates=run.micro * cards < run.batch,
            offload=run.offload,
        )
        print(f"{sum(sizes.values()) / 2**30:4.0f} GiB   {words}", flush=True)


if __name__ == "__main__":
    cli.run_script(bench)
