"""A training step beside that of transformers: the same weights, samples, precision and optimizer.

    python tests/bench/train.py                                  on the CPU: minutes
    python tests/bench/train.py --rounds=3                       fewer measurements
    python tests/bench/train.py --dtype=bfloat16 --compile=true  our fastest settings
    python tests/bench/train.py --lora_rank=16                   LoRA of the decoder, beside peft's
    taskset -c 0 python tests/bench/train.py                     one thread, beside other processes

The shapes are those of SmolLM2-135M and a small CLIP. Projector and decoder train, as in sft; with
--lora_rank the decoder has LoRA, that of peft for transformers. For transformers each sample is a
sequence, padded to the longest; ours are packed. Measured with samples of one length, which need no
padding, and with lengths such as in LLaVA's data. The two take turns in one run; times are medians,
in seconds of the CPU, for which other processes count less.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers as hf

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from conftest import make_batch  # noqa: E402

from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID, cli, distributed  # noqa: E402
from nanovlm.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from nanovlm.checkpoints.lora import add_lora  # noqa: E402
from nanovlm.data.packing import pack_sequences  # noqa: E402
from nanovlm.data.tokenizer import train_tokenizer  # noqa: E402
from nanovlm.training.recipes import freeze_parts  # noqa: E402

VISION = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=3,
    image_size=112,
    patch_size=14,
)
DECODER = dict(  # SmolLM2-135M
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
PATCHES, IMAGE_ID, SEQ_LEN = 64, 49151, 512


def two_models(lora_rank):
    """Returns a LLaVA of transformers, and our model read from the folder that it writes.

    lora_rank: of the decoder, by peft for transformers; 0: the decoder trains whole.
    """
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_ID,
        image_seq_length=PATCHES,
    )
    theirs = hf.LlavaForConditionalGeneration(config).float()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        square = {"height": VISION["image_size"], "width": VISION["image_size"]}
        preprocessor = {
            "size": square,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        train_tokenizer(["a"], 256, ["<s>", "</s>", "<image>"]).save(folder)
        ours = load_checkpoint(folder, template="plain").model
    theirs.model.vision_tower.requires_grad_(False)
    lora = None
    if lora_rank:
        lora = dict(rank=lora_rank, alpha=2 * lora_rank, target="decoder")
        config = peft.LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            target_modules=r".*language_model.*_proj",
            modules_to_save=["multi_modal_projector"],
        )
        theirs = peft.get_peft_model(theirs, config)
        add_lora(ours, **lora)
    freeze_parts(ours, ("projector", "decoder"), lora)
    return theirs.train(), ours.train()


def samples_of(lengths, seed=0):
    """Returns [(ids_T, targets_T, tile_CYX)]: an image, then text; the last third has labels."""
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


def padded_batch(samples):
    """The samples as transformers takes them."""
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


def packed_batch(samples):
    sequences = pack_sequences([len(ids) for ids, _, _ in samples], SEQ_LEN)
    return make_batch([[samples[i] for i in members] for members in sequences])


def step(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def peak_bytes(run):
    """Returns the peak of additional memory while `run` runs, in bytes."""
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


def compare(name, lengths, rounds, autocast, compile, lora_rank):
    theirs, ours = two_models(lora_rank)
    distributed.compile_blocks(distributed.transformer_blocks(ours) if compile else ())
    samples, optimizers = samples_of(lengths), []
    for model in (theirs, ours):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=1e-6, fused=True))

    def transformers_step():
        with autocast:
            loss = theirs(**padded_batch(samples)).loss
        return step(loss, optimizers[0])

    def own_step():
        batch = packed_batch(samples)
        with autocast:
            loss = ours(**batch) / (batch["targets_BT"] != IGNORE_INDEX).sum()
        return step(loss, optimizers[1])

    losses = [transformers_step(), own_step()]  # these steps warm up
    seconds = {transformers_step: [], own_step: []}
    for _ in range(rounds):
        for run, times in seconds.items():
            start = time.process_time()
            run()
            times.append((time.process_time() - start) / torch.get_num_threads())
    slow, fast = map(statistics.median, seconds.values())
    large, small = map(peak_bytes, seconds)
    padding = len(lengths) * max(lengths) - sum(lengths)
    print(
        f"{name}: {len(lengths)} samples of {sum(lengths):,} tokens, {padding:,} tokens of padding "
        f"for transformers; losses {losses[0]:.4f}, ours {losses[1]:.4f}"
    )
    print(
        f"    {sum(lengths) / fast:,.0f} tokens/s, {slow / fast:.2f} times transformers'; peak of "
        f"{small / 2**20:,.0f} MiB, {small / large:.2f} of transformers'",
        flush=True,
    )


def bench(
    *,
    rounds: int = 7,  # of each measurement
    samples: int = 8,  # in a step
    dtype: str = "float32",  # of matrix products: float32 or bfloat16
    compile: bool = False,  # torch.compile our blocks, as train.py --compile=true does
    lora_rank: int = 0,  # LoRA of the decoder's blocks; 0: none
):
    """Print the speed and the memory of our training step beside those of transformers."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    g = np.random.default_rng(0)
    ragged = (
        (PATCHES + g.lognormal(4.3, 0.9, samples).clip(12, SEQ_LEN - PATCHES)).astype(int).tolist()
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    compare("even", [SEQ_LEN // 2] * samples, rounds, autocast, compile, lora_rank)
    compare("ragged", ragged, rounds, autocast, compile, lora_rank)


if __name__ == "__main__":
    cli.run_script(bench)
