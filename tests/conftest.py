"""What tests share: a model whose sizes all differ, so that a swapped axis is noticed."""

import json
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
# Triton reads this when it is imported: kernels run in its interpreter on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(ROOT))
# The first use of torch.device lists the tensor factories. It must not be inside from_pretrained of
# transformers, which replaces linspace.
with torch.device("meta"):
    torch.empty(0)
# A shared machine may pause in any example.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
# Small models gain nothing from more threads, and lose much if another process uses the core.
torch.set_num_threads(1)

from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID  # noqa: E402
from nanovlm.data import dataset  # noqa: E402
from nanovlm.models.vlm import VLM  # noqa: E402

VISION = dict(tile=12, patch=3, width=20, layers=2, heads=5, intermediate_size=28)  # 16 patches
DECODER = dict(
    vocab_size=41, width=24, layers=3, heads=6, kv_heads=2, intermediate_size=36, head_dim=8
)
TOKENS = 4  # of an image, after pixel shuffle by 2

# The shapes of Megatron-LM/examples/multimodal: CLIP ViT-L/14@336, of which the last layer but one
# is used, and Mistral-7B-Instruct-v0.3.
SEVEN_BILLION = {
    "vision": dict(
        tile=336,
        patch=14,
        width=1024,
        layers=24,
        heads=16,
        intermediate_size=4096,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        vision_feature_layer=-2,
    ),
    "decoder": dict(
        vocab_size=32768, width=4096, layers=32, heads=32, kv_heads=8, intermediate_size=14336
    ),
    "shuffle": 1,
}
SEVEN_BILLION_IMAGE_CONFIG = {
    "tile": 336,
    "patch": 14,
    "shuffle": 1,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def make_vlm(seed=0, vision={}, decoder={}, **other):
    torch.manual_seed(seed)
    model = VLM(
        **{"vision": VISION | vision, "decoder": DECODER | decoder, "shuffle": 2, **other}
    ).eval()
    with torch.no_grad():
        # initial zeros and ones would hide some paths
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def vlm():
    return make_vlm()


def make_samples(seed=0, lengths=(9, 14, 6, 11), images=(1, 0, 2, 1)):
    """[(ids_T, targets_T, tiles_NCYX)]: random words after images; the later half has
    labels."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for length, count in zip(lengths, images, strict=True):
        words = torch.randint(41, (length,), generator=g)
        ids_T = torch.cat([torch.full((count * TOKENS,), IMAGE_TOKEN_ID), words])
        targets_T = torch.full_like(ids_T, IGNORE_INDEX)
        targets_T[len(ids_T) - length // 2 - 1 : -1] = ids_T[len(ids_T) - length // 2 :]
        samples.append(
            (
                ids_T,
                targets_T,
                torch.randint(256, (count, 3, 12, 12), generator=g, dtype=torch.uint8),
            )
        )
    return samples


def make_batch(sequences):
    """Packed sequences, each a list of samples, for VLM.forward. Padding is document -1."""
    T = max(sum(len(ids) for ids, _, _ in samples) for samples in sequences)
    batch = {
        name: torch.full((len(sequences), T), fill)
        for name, fill in [
            ("ids_BT", 0),
            ("targets_BT", IGNORE_INDEX),
            ("positions_BT", 0),
            ("documents_BT", -1),
        ]
    }
    for b, samples in enumerate(sequences):
        start = 0
        for document, (ids, targets, _) in enumerate(samples):
            span = slice(start, start + len(ids))
            for name, value in [
                ("ids_BT", ids),
                ("targets_BT", targets),
                ("positions_BT", torch.arange(len(ids))),
                ("documents_BT", document),
            ]:
                batch[name][b, span] = value
            start = span.stop
    tiles = [tiles for samples in sequences for _, _, tiles in samples]
    return batch | {"tiles_NCYX": torch.cat(tiles)}


def write_set(out, fingerprint, *shards):
    """A prepared dataset of several shards, each a list of samples as write_shard takes them."""
    receipts = []
    for number, samples in enumerate(shards):
        dataset.write_shard(out / f"{number:05d}", fingerprint["image_config"], samples)
        receipts.append(json.loads((out / f"{number:05d}" / "receipt.json").read_text()))
    dataset.write_header(out, fingerprint, [receipt["files"] for receipt in receipts])
    return out
