"""The data road beside what it replaces, in one run, interleaved, medians: cutting, writing, reading, packing.

    python tests/bench/data.py               a minute or two
    python tests/bench/data.py --rounds=3    a rough look

One core unless a line says otherwise. Photographs are drawn: soft shapes under noise, JPEG of quality 90, about 100 kB at 640 × 480.
"""

import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
from nanovlm import IMAGE_TOKEN_ID, cli  # noqa: E402
from nanovlm.data import dataset, image_processing, packing  # noqa: E402

POLICY = {
    "tile": 336,
    "patch": 14,
    "shuffle": 1,
    "fit": "crop",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def photograph(g, width=640, height=480):
    soft = Image.fromarray(
        g.integers(256, size=(height // 40, width // 40, 3), dtype=np.uint8)
    ).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(soft).astype(int) + g.normal(0, 9, (height, width, 3)).astype(int)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def by_pillow(source, tile):
    """What a loop of Pillow does for CLIP: decode, the short side to `tile`, the middle square, channels first."""
    picture = Image.open(io.BytesIO(source)).convert("RGB")
    short = min(picture.size)
    picture = picture.resize(
        (picture.width * tile // short, picture.height * tile // short), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - tile) // 2, (picture.height - tile) // 2
    return np.ascontiguousarray(
        np.asarray(picture.crop((left, top, left + tile, top + tile))).transpose(2, 0, 1)
    )


def seconds(rounds, **ways):
    """{way: median seconds of a call}; the ways take turns."""
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, do in ways.items():
            began = time.perf_counter()
            do()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def cutting(small, large, rounds):
    for what, photographs, tile, draft in [
        *(("640 × 480", small, tile, False) for tile in (224, 336, 384)),
        *(("2048 × 1536", large, 336, draft) for draft in (False, True)),
    ]:
        policy = {**POLICY, "tile": tile, "draft": draft}
        took = seconds(
            rounds,
            pillow=lambda tile=tile, some=photographs: [by_pillow(source, tile) for source in some],
            ours=lambda policy=policy, some=photographs: [
                image_processing.load_image(source, policy) for source in some
            ],
        )
        print(
            f"cut {what} to {tile}{', drafted' * draft}: {len(photographs) / took['ours']:,.0f} images/s a core, "
            f"{took['pillow'] / took['ours']:.2f} times a loop of Pillow",
            flush=True,
        )


def samples_of(photographs, count):
    pictures = [image_processing.load_image(source, POLICY) for source in photographs]
    for number in range(count):
        ids = [IMAGE_TOKEN_ID, *range(40 + number % 60)]
        yield f"{number}", ids, [0] * 20 + [1] * (len(ids) - 20), [pictures[number % len(pictures)]]


def writing(folder, photographs, count, rounds):
    """A shard of cut pictures beside a plain write of as many bytes, both flushed to the disk."""
    samples, number = list(samples_of(photographs, count)), iter(range(10**6))
    block = np.concatenate([pictures[0].tiles for *_, pictures in samples]).tobytes()

    def plainly():
        with open(folder / "plain", "wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    took = seconds(
        rounds,
        disk=plainly,
        ours=lambda: dataset.write_shard(folder / f"{next(number):05d}", POLICY, samples),
    )
    print(
        f"write: {len(block) / took['ours'] / 1e6:,.0f} MB/s of tiles, {took['disk'] / took['ours']:.2f} of the disk's own rate"
    )


class Decoding(torch.utils.data.Dataset):
    """What a torch DataLoader is usually given: pictures that are decoded when they are asked for."""

    def __init__(self, photographs, count):
        self.photographs, self.count = photographs, count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return torch.from_numpy(
            by_pillow(self.photographs[number % len(self.photographs)], POLICY["tile"])
        )


def reading(folder, photographs, count, rounds):
    """Batches from a set on warm pages, beside a plain copy of as many bytes and a DataLoader that decodes on two processes."""
    dataset.write_shard(folder / "set/00000", POLICY, samples_of(photographs, count))
    receipt = json.loads((folder / "set/00000/receipt.json").read_text())
    dataset.write_header(
        folder / "set",
        {"tokenizer": "none", "chat_template": "none", "image_config": POLICY},
        [receipt["files"]],
    )
    samples = dataset.PreparedDataset(folder / "set")
    lots = np.array_split(np.arange(count), count // 16)
    source = samples.shards[0]["tiles"]
    target = np.ones_like(source)  # its pages are warm too
    decoding = torch.utils.data.DataLoader(
        Decoding(photographs, count), batch_size=16, num_workers=2
    )
    found = [[samples.read(i)[2][0] for i in lot] for lot in lots]

    def one_after_another(things):
        for thing in things:  # each is let go before the next is made, as training does
            del thing

    took = seconds(
        rounds,
        memcpy=lambda: np.copyto(target, source),
        tiles=lambda: one_after_another(
            packing.collate_images(pictures, POLICY) for pictures in found
        ),
        batches=lambda: one_after_another(
            packing.collate(samples, [[i] for i in lot]) for lot in lots
        ),
        dataloader=lambda: one_after_another(decoding),
    )
    size = count * source[0].nbytes / 1e9
    print(
        f"read tiles: {size / took['tiles']:.1f} GB/s, {took['memcpy'] / took['tiles']:.2f} of memcpy's"
    )
    print(
        f"read whole batches, 600 ids beside each tile: {count / took['batches']:,.0f} samples/s, {took['memcpy'] / took['batches']:.2f} of "
        f"memcpy's rate; {took['dataloader'] / took['batches']:.0f} times a DataLoader that decodes in two processes"
    )


def llava_like(count=665_000, picture=576):
    """Lengths such as LLaVA's fine-tuning mix has (assumed: 94% with a picture, about 150 words beside it; long conversations without)."""
    g = np.random.default_rng(0)
    told, chat = (
        g.lognormal(5.0, 0.8, count).clip(20, 1470),
        g.lognormal(6.2, 0.7, count).clip(30, 2048),
    )
    return np.where(g.random(count) < 0.06, chat, told + picture).astype(int)


def filling(out):
    sets = {
        "LLaVA-like": (llava_like(), (2048, 4096, 8192)),
        "the same, 144 tokens a picture": (llava_like(picture=144), (2048, 4096, 8192)),
    }
    if Path(out).exists():
        samples = dataset.PreparedDataset(out)
        sets[out] = samples.table[samples.split(False), dataset.LENGTH], (320, 640, 1280)
    for name, (lengths, rows) in sets.items():
        for row in rows:
            began = time.perf_counter()
            filled = sum(1 for _ in packing.pack_sequences(lengths, row))
            print(
                f"pack {name}: {len(lengths):,} samples into sequences of {row:,}: {lengths.sum() / filled / row:.1%} full, "
                f"planned in {time.perf_counter() - began:.1f} s"
            )


def bench(
    *,
    rounds: int = 9,  # of each measurement
    photographs: int = 48,  # drawn
    samples: int = 512,  # in the set that is written and read
    chats: str = "data/demo/chats",  # the demonstration's set, whose lengths are packed if it is there
):
    """Print every figure as a ratio to what stands beside it in the same run."""
    torch.set_num_threads(1)
    g = np.random.default_rng(0)
    drawn = [photograph(g) for _ in range(photographs)]
    cutting(drawn, [photograph(g, 2048, 1536) for _ in range(6)], rounds)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writing(Path(folder), drawn, samples, rounds)
        reading(Path(folder), drawn, samples, rounds)
    filling(chats)


if __name__ == "__main__":
    cli.run_script(bench)
