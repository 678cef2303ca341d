"""The estimate of operations is what torch counts, and the plan of a run needs no weights."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SEVEN_BILLION,
    SEVEN_BILLION_IMAGE_CONFIG,
    TOKENS,
    make_batch,
    make_samples,
    make_vlm,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID
from nanovlm.checkpoints.lora import add_lora
from nanovlm.data import tokenizer
from nanovlm.models import cross_entropy
from nanovlm.training import flops, memory, recipes


def count_head(hidden_shape, head_shape, targets_shape, dtype, hidden_grad, head_grad, **_):
    """The products inside the cross-entropy operator, which the counter takes as a whole."""
    hidden_ND, head_VD = torch.zeros(hidden_shape), torch.zeros(head_shape)
    targets_N = torch.zeros(targets_shape, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        cross_entropy.chunked_loss(hidden_ND, head_VD, targets_N, dtype, hidden_grad, head_grad)
    return counter.get_total_flops()


LORA = dict(rank=2, alpha=4, target="decoder")


@pytest.mark.parametrize(
    "peak_lrs, lora",
    [
        ({"vision": 1, "projector": 1, "decoder": 1}, None),
        ({"projector": 1}, None),
        ({"projector": 1, "decoder": 1}, None),
        ({"decoder": 1}, None),
        ({"vision": 1, "projector": 1}, None),
        ({"vision": 1}, None),
        ({"projector": 1, "decoder": 1}, LORA),
        ({"vision": 1, "projector": 1, "decoder": 1}, LORA),
    ],
)
@pytest.mark.parametrize(
    "vision, decoder",
    [
        ({}, {"qkv_bias": True, "qk_norm": True, "rope_layers": [1, 0, 1]}),
        ({"class_token": True, "vision_feature_layer": -2}, {}),
    ],
)
def test_operations_are_those_that_torch_counts(peak_lrs, lora, vision, decoder):
    """SDPBackend.MATH computes attention as products, which the counter sees."""
    model = make_vlm(vision=vision, decoder=decoder).train()
    if lora:
        add_lora(model, **lora)
    recipes.freeze_parts(model, peak_lrs, lora)
    batch = make_batch(
        [[sample] for sample in make_samples(lengths=(13, 13, 9, 13), images=(1, 1, 2, 1))]
    )
    operator = {torch.ops.nanovlm.linear_cross_entropy: count_head}
    counter = FlopCounterMode(display=False, custom_mapping=operator)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).backward()
    assert batch["ids_BT"].shape[1] == 13 + TOKENS
    parts = flops.step_flops(model, peak_lrs, batch)
    assert (
        sum(parts.values())
        == counter.get_total_flops()
        == flops.micro_batch_flops(model, peak_lrs, [(batch, [])])
    )
    assert flops.micro_batch_flops(model, peak_lrs, [(batch, [])] * 3) == 3 * sum(parts.values())


def test_an_assumed_sequence_is_half_images():
    sequence, tiles, labels = flops.assumed_sequence(40, {"tile": 12, "patch": 3, "shuffle": 2})
    assert (tiles, labels) == (5, 10) and int(
        (sequence["ids_BT"] == IMAGE_TOKEN_ID).sum()
    ) == 5 * TOKENS == 20
    assert int((sequence["targets_BT"] != IGNORE_INDEX).sum()) == 10 and sequence[
        "tiles_NCYX"
    ].shape == (5, 3, 12, 12)


def test_the_estimate_for_seven_billion_parameters_reads_no_weights(tmp_path):
    """Mistral 7B and CLIP-L/14@336 by Megatron's recipe, without a weight in the folder.

    7.25 billion weights of 4 bytes, as much for gradients and twice as much for moments, are 108
    GiB. 6 · parameters · tokens is 1.14e16 operations per step; activation checkpointing adds a
    third, and attention the rest.
    """
    meta = {
        "version": 2,
        "shapes": SEVEN_BILLION,
        "image_config": SEVEN_BILLION_IMAGE_CONFIG,
        "chat_template": "mistral",
        "history": {},
    }
    (tmp_path / "nanovlm.json").write_text(json.dumps(meta))
    tokenizer.train_tokenizer(["a"], 256, ["<s>", "</s>", "[INST]", "[/INST]"]).save(tmp_path)
    # The peak of resident memory; getrusage's would be our own, if that is larger.
    peak = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    code = f"import sys, prepare; from nanovlm import cli; cli.run_script(prepare.estimate); {peak}"
    words = [
        "--stage=sft",
        f"--model={tmp_path}",
        "--micro_batch_size=1",
        "--activation_checkpointing=decoder",
        "--mfu=0.5",
        "--peak_tflops=1000",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    first, *_, one, eight, sixty_four, kilobytes = done.stdout.splitlines()
    assert (
        first == "sft: 20,000 steps of 128 sequences of 2,048 tokens; "
        "assumed: 512 labelled tokens and 1 tiles in each"
    )
    assert (
        "7,248,023,552" in done.stdout
        and "operations of a step: 1.5" in done.stdout
        and "e+16" in done.stdout
    )
    assert (
        one.startswith("  1 GPU: 11")
        and one.endswith("7.3 days at 500 TFLOP/s a GPU")
        and "by fsdp" not in one
    )
    assert (
        "GiB a GPU by ddp" in eight
        and "GiB by fsdp" in eight
        and sixty_four.endswith("0.1 days at 500 TFLOP/s a GPU")
    )
    assert int(kilobytes) < 2_000_000, "no weight is in memory"


def test_gpus_without_a_sequence_are_not_printed(tmp_path, capsys):
    """A step of nine sequences has none for most of 64 GPUs."""
    model, image_config = make_vlm().train(), {"tile": 12, "patch": 3, "shuffle": 2}
    run = SimpleNamespace(
        stage="sft",
        steps=7,
        global_batch_size=9,
        micro_batch_size=2,
        seq_len=40,
        dtype="float32",
        activation_checkpointing="none",
        cpu_offload=False,
        hsdp_shard_size=0,
        peak_lrs={"projector": 1.0, "decoder": 1.0},
    )
    model.vision.requires_grad_(False)
    memory.print_estimate(run, model, image_config, speed=1e9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[-2:]] == ["1 GPU", "8 GPUs"]
