"""The trainer against a plain loop around transformers: a published LLaVA trains on the same
samples with the same loss at each step.

Here samples are packed into sequences, and the loss is summed over micro-batches. There each sample
is a padded sequence of one batch, and transformers takes the mean. Freezing, schedule, clipping,
weight decay and Adam are written out.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import write_set
from safetensors.torch import load_file
from test_llava import IMAGE_ID, KINDS, publish

import train
from nanovlm import IGNORE_INDEX
from nanovlm.checkpoints import llava
from nanovlm.checkpoints.checkpoint import load_checkpoint, load_checkpoint_info
from nanovlm.data import dataset, image_processing, packing

STEPS, SEQ_LEN, BATCH_SIZE = 20, 96, 3
PATCHES = 16  # tokens of an image: 28 pixels, patches of 7


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A LLaVA-1.5 folder by transformers, and 90 samples for it, two of three with an image."""
    home = tmp_path_factory.mktemp("home")
    (home / "llava").mkdir()
    publish(home / "llava", **KINDS["1.5"])
    ours, g, samples = load_checkpoint_info(home / "llava"), np.random.default_rng(0), []
    for number in range(90):
        images = [
            image_processing.ProcessedImage(
                g.integers(256, size=(1, 3, 28, 28), dtype=np.uint8), np.arange(PATCHES), (28, 28)
            )
        ] * (number % 3 > 0)
        words = g.integers(0, 250, size=g.integers(6, 30)).tolist()
        ids = [ours.tokenizer.special["<s>"], *[-1] * len(images), *words]
        samples.append((f"{number}", ids, [0] * (len(ids) - 5) + [1] * 5, images))
    write_set(home / "data", json.loads(json.dumps(ours.fingerprint())), samples)
    return home


def padded(samples, numbers, image_config):
    """The arguments of LlavaForConditionalGeneration: a padded sequence per sample."""
    read = [samples.read(i) for i in numbers]
    T, mean, std = (
        max(len(ids) for ids, _, _ in read),
        *(torch.tensor(image_config[name]).view(3, 1, 1) for name in ("mean", "std")),
    )
    batch = {
        "input_ids": torch.zeros(len(read), T, dtype=torch.int64),
        "labels": torch.full((len(read), T), -100),
        "attention_mask": torch.zeros(len(read), T, dtype=torch.int64),
    }
    for b, (ids, targets, _) in enumerate(read):
        batch["input_ids"][b, : len(ids)] = torch.from_numpy(np.where(ids < 0, IMAGE_ID, ids))
        batch["labels"][b, 1 : len(ids)] = torch.from_numpy(
            np.where(targets == IGNORE_INDEX, -100, targets)
        )[:-1]
        batch["attention_mask"][b, : len(ids)] = 1
    tiles = [torch.from_numpy(image.tiles) for _, _, images in read for image in images]
    return batch | (
        {"pixel_values": (torch.cat(tiles).float() / 255 - mean) / std} if tiles else {}
    )


def their_run(home, samples, trained_parts, lr, min_lr, weight_decay, grad_clip, warmup):
    """(losses, gradient norms) of the plain loop, and the model that it leaves."""
    model = (
        hf.LlavaForConditionalGeneration.from_pretrained(
            home / "llava", attn_implementation="eager"
        )
        .float()
        .train()
    )
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in trained_parts))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    image_config, loader, losses, norms = (
        samples.image_config,
        packing.PackedDataLoader(
            samples,
            seq_len=SEQ_LEN,
            global_batch_size=BATCH_SIZE,
            micro_batch_size=BATCH_SIZE,
            seed=0,
        ),
        [],
        [],
    )
    for step in range(STEPS):
        lr_now = (
            lr * (step + 1) / warmup
            if step < warmup
            else min_lr
            + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr_now
        ((_, members),) = next(loader)
        loss = model(**padded(samples, members, image_config)).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


@pytest.mark.parametrize(
    "stage, trained_parts",
    [
        ("pretrain", ["multi_modal_projector"]),
        ("sft", ["multi_modal_projector", "language_model", "lm_head"]),
    ],
)
def test_twenty_steps_are_those_of_transformers(home, tmp_path, stage, trained_parts):
    settings = dict(lr=3e-3, min_lr=3e-4, weight_decay=0.1, grad_clip=0.7)
    samples = dataset.PreparedDataset(home / "data")
    losses, norms, theirs = their_run(home, samples, trained_parts, warmup=4, **settings)
    train.train(
        stage=stage,
        model=str(home / "llava"),
        data=str(home / "data"),
        out=str(tmp_path / "run"),
        steps=STEPS,
        seq_len=SEQ_LEN,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=1,
        warmup_ratio=0.2,
        log_every=1,
        validate_every=STEPS,
        device="cpu",
        **settings,
    )
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert (
        losses[-1] < losses[0] - 0.05 and max(norms) > settings["grad_clip"]
    )  # it learns, and clipping has something to do
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        llava.llava_tensors(load_checkpoint(tmp_path / "run")),
        load_file(tmp_path / "theirs/model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)  # a step of Adam's is up to 3e-3
