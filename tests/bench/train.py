"""A training step beside transformers': the same weights, samples, precision and optimizer, in one run, interleaved, medians.

    python tests/bench/train.py                                  SmolLM2-135M's shapes with a small CLIP, on the CPU: minutes
    python tests/bench/train.py --rounds=3                       a rough look
    python tests/bench/train.py --dtype=bfloat16 --compile=true  the fastest that we can

Trained are projector and decoder, as in sft. transformers gets its samples as its collators make batches, a row each, padded to the longest; we pack
the same samples into rows. Once all samples have one length, so that nothing is padded; once lengths are ragged as in LLaVA's mix.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers as hf

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from conftest import make_batch  # noqa: E402

from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID, cli, distributed  # noqa: E402
from nanovlm.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from nanovlm.data.packing import pack_sequences  # noqa: E402
from nanovlm.data.tokenizer import train_tokenizer  # noqa: E402

EYE = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=3,
    image_size=112,
    patch_size=14,
)
BRAIN = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)  # SmolLM2-135M
PATCHES, IMAGE_ID, ROW = 64, 49151, 512


def two_models():
    """A LLaVA by transformers, and ours read from the folder that it writes."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**EYE),
        text_config=hf.LlamaConfig(**BRAIN),
        image_token_index=IMAGE_ID,
        image_seq_length=PATCHES,
    )
    theirs = hf.LlavaForConditionalGeneration(config).float()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        square = {"height": EYE["image_size"], "width": EYE["image_size"]}
        preprocessor = {
            "size": square,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        train_tokenizer(["a"], 256, ["<s>", "</s>", "<image>"]).save(folder)
        ours = load_checkpoint(folder).model
    for frozen in (theirs.model.vision_tower, ours.vision):
        frozen.requires_grad_(False)
    return theirs.train(), ours.train()


def samples_of(lengths, seed=0):
    """[(ids_T with the picture in front, targets_T, tile_CYX)], the later third trained."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids_T = torch.cat(
            [
                torch.full((PATCHES,), IMAGE_TOKEN_ID),
                torch.randint(49000, (length - PATCHES,), generator=g),
            ]
        )
        targets_T = torch.full_like(ids_T, IGNORE_INDEX)
        targets_T[-length // 3 - 1 : -1] = ids_T[-length // 3 :]
        found.append(
            (ids_T, targets_T, torch.randint(256, (1, 3, 112, 112), generator=g, dtype=torch.uint8))
        )
    return found


def for_them(samples):
    T = max(len(ids) for ids, _, _ in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), T, dtype=torch.int64),
        "labels": torch.full((len(samples), T), -100),
        "attention_mask": torch.zeros(len(samples), T, dtype=torch.int64),
        "pixel_values": torch.cat([tile for _, _, tile in samples]).float() / 127.5 - 1,
    }
    for b, (ids, targets, _) in enumerate(samples):
        batch["input_ids"][b, : len(ids)] = torch.where(ids == IMAGE_TOKEN_ID, IMAGE_ID, ids)
        batch["labels"][b, 1 : len(ids)] = torch.where(targets == IGNORE_INDEX, -100, targets)[:-1]
        batch["attention_mask"][b, : len(ids)] = 1
    return batch


def for_us(samples):
    rows = pack_sequences([len(ids) for ids, _, _ in samples], ROW)
    return make_batch([[samples[i] for i in members] for members in rows])


def step(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def peak_bytes(run):
    """The most memory that was in use at once while `run` ran, above what was in use before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    return int(np.cumsum([size for _, size in events]).max())


def compare(name, lengths, rounds, mixed, joined):
    theirs, ours = two_models()
    distributed.compile_blocks(distributed.transformer_blocks(ours) if joined else ())
    samples, (adam, our_adam) = (
        samples_of(lengths),
        [
            torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True
            )
            for model in (theirs, ours)
        ],
    )

    def by_transformers():
        with mixed:
            loss = theirs(**for_them(samples)).loss
        return step(loss, adam)

    def by_us():
        batch = for_us(samples)
        with mixed:
            loss = ours(**batch) / (batch["targets_BT"] != IGNORE_INDEX).sum()
        return step(loss, our_adam)

    taken, losses = (
        {by_transformers: [], by_us: []},
        [by_transformers(), by_us()],
    )  # the first steps warm up
    for _ in range(rounds):
        for do, times in taken.items():
            began = time.perf_counter()
            do()
            times.append(time.perf_counter() - began)
    (slow, fast), (large, small) = map(statistics.median, taken.values()), map(peak_bytes, taken)
    padding = len(lengths) * max(lengths) - sum(lengths)
    print(
        f"{name}: {len(lengths)} samples of {sum(lengths):,} tokens, padded there by {padding:,}; losses {losses[0]:.4f}, ours {losses[1]:.4f}"
    )
    print(
        f"    {sum(lengths) / fast:,.0f} tokens/s, {slow / fast:.2f} times transformers'; {small / 2**20:,.0f} MiB at most, "
        f"{small / large:.2f} of transformers'",
        flush=True,
    )


def bench(
    *,
    rounds: int = 7,  # of each measurement
    samples: int = 8,  # in a step
    dtype: str = "float32",  # or bfloat16: of the products
    compile: bool = False,  # our blocks, by torch.compile, as train.py --compile=true does
):
    """Print how a training step of ours compares."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    g = np.random.default_rng(0)
    ragged = (PATCHES + g.lognormal(4.3, 0.9, samples).clip(12, ROW - PATCHES)).astype(int).tolist()
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    compare("even", [ROW // 2] * samples, rounds, mixed, compile)
    compare("ragged", ragged, rounds, mixed, compile)


if __name__ == "__main__":
    cli.run_script(bench)
