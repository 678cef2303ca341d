"""The memory of a GPU that trains Mistral 7B with CLIP-L/14@336, as estimated: no weights needed.

python tests/bench/memory.py
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from conftest import SEVEN_BILLION, SEVEN_BILLION_IMAGE_CONFIG  # noqa: E402

import prepare  # noqa: E402
from nanovlm import cli  # noqa: E402
from nanovlm.checkpoints.checkpoint import build_model  # noqa: E402
from nanovlm.checkpoints.lora import add_lora  # noqa: E402
from nanovlm.training.flops import assumed_sequence  # noqa: E402
from nanovlm.training.memory import estimate_memory  # noqa: E402
from nanovlm.training.recipes import freeze_parts, load_settings  # noqa: E402

CHECKPOINTED = {"activation_checkpointing": "decoder"}
OPTIONS = [  # settings of train.py, and how many GPUs share a copy of the model
    (dict(stage="pretrain"), 1),
    (dict(stage="pretrain", **CHECKPOINTED), 1),
    (dict(stage="sft", lora_rank=16), 1),
    (dict(stage="sft", lora_rank=16, **CHECKPOINTED), 1),
    (dict(stage="sft"), 1),
    (dict(stage="sft", **CHECKPOINTED), 1),
    (dict(stage="sft", **CHECKPOINTED, cpu_offload=True), 1),
    (dict(stage="sft"), 8),
    (dict(stage="sft", **CHECKPOINTED), 8),
]


def bench():
    """Print the memory of a GPU, with bfloat16 products and float32 states, for some settings."""
    defaults = {name: default for name, _, default, _ in cli.settings(prepare.estimate)}
    for chosen, gpus in OPTIONS:
        run = load_settings(defaults | {"micro_batch_size": 1} | chosen, 1)
        with torch.device("meta"):
            model = build_model(SEVEN_BILLION, SEVEN_BILLION_IMAGE_CONFIG).train()
            model.decoder.to(torch.bfloat16)  # as published; CLIP is in float32
            if run.lora:
                add_lora(model, **run.lora)
        freeze_parts(model, run.peak_lrs, run.lora)
        sequence, *_ = assumed_sequence(run.seq_len, SEVEN_BILLION_IMAGE_CONFIG)
        parallel = "fsdp" if gpus > 1 or run.cpu_offload else "none"
        device, dtype = torch.device("cpu"), torch.bfloat16
        sizes = estimate_memory(run, model, sequence, device, dtype, parallel, gpus)
        words = " ".join(f"--{name}={cli.format_value(value)}" for name, value in chosen.items())
        many = " --parallel=fsdp" * (parallel == "fsdp") + f", on {gpus} GPUs" * (gpus > 1)
        print(
            f"{sum(sizes.values()) / 2**30:4.0f} GiB   {words} --micro_batch_size=1{many}",
            flush=True,
        )


if __name__ == "__main__":
    cli.run_script(bench)
