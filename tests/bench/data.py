"""The speed of data preparation and loading beside the usual ways: tiles, shards, batches, packing.

    python tests/bench/data.py               a minute or two
    python tests/bench/data.py --rounds=3    fewer measurements

The ways take turns in one run; times are medians. One core is used unless a line names more.
Photographs are drawn: soft shapes under noise, as JPEG of quality 90, 100 kB at 640 × 480.
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

IMAGE_CONFIG = {
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
    """CLIP's preprocessing by Pillow: decode, resize the short side to `tile`, crop the center."""
    image = Image.open(io.BytesIO(source)).convert("RGB")
    short = min(image.size)
    size = image.width * tile // short, image.height * tile // short
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - tile) // 2, (image.height - tile) // 2
    pixels_YXC = np.asarray(image.crop((left, top, left + tile, top + tile)))
    return np.ascontiguousarray(pixels_YXC.transpose(2, 0, 1))


def median_seconds(rounds, **functions):
    """Returns {name: median seconds of a call}; the functions take turns."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def time_tiles(small, large, rounds):
    for what, photographs, tile, draft in [
        ("640 × 480", small, 336, False),
        *(("640 × 480", small, tile, True) for tile in (224, 336, 384)),
        *(("2048 × 1536", large, 336, draft) for draft in (False, True)),
    ]:
        config = {**IMAGE_CONFIG, "tile": tile, "draft": draft}
        took = median_seconds(
            rounds,
            pillow=lambda tile=tile, some=photographs: [by_pillow(source, tile) for source in some],
            ours=lambda config=config, some=photographs: [
                image_processing.load_image(source, config) for source in some
            ],
        )
        print(
            f"tiles of {tile} from {what}{', draft' * draft}: "
            f"{len(photographs) / took['ours']:,.0f} images/s per core, "
            f"{took['pillow'] / took['ours']:.2f} times Pillow alone",
            flush=True,
        )


def compare_pixels(photographs):
    """How far the tiles are from Pillow's. A draft decodes photographs of 640 × 480 in full."""
    want = np.array([by_pillow(source, 336) for source in photographs], dtype=int)
    for draft in (False, True):
        config = {**IMAGE_CONFIG, "draft": draft}
        tiles = [image_processing.load_image(source, config).tiles[0] for source in photographs]
        counts = np.bincount(np.abs(np.array(tiles) - want).ravel(), minlength=3)
        shares = ", ".join(f"{n} {100 * counts[n] / want.size:.5f}%" for n in (1, 2))
        print(f"pixels{', draft' * draft}: levels from Pillow's {shares}, more {sum(counts[3:])}")


def samples_of(photographs, count):
    images = [image_processing.load_image(source, IMAGE_CONFIG) for source in photographs]
    for number in range(count):
        ids = [IMAGE_TOKEN_ID, *range(40 + number % 60)]
        yield f"{number}", ids, [0] * 20 + [1] * (len(ids) - 20), [images[number % len(images)]]


def time_writing(folder, photographs, count, rounds):
    """A shard beside a plain write of as many bytes; both are flushed to disk."""
    samples, number = list(samples_of(photographs, count)), iter(range(10**6))
    block = np.concatenate([images[0].tiles for *_, images in samples]).tobytes()

    def write_plain():
        with open(folder / "plain", "wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    took = median_seconds(
        rounds,
        disk=write_plain,
        ours=lambda: dataset.write_shard(folder / f"{next(number):05d}", IMAGE_CONFIG, samples),
    )
    print(
        f"write: {len(block) / took['ours'] / 1e6:,.0f} MB/s of tiles, "
        f"{took['disk'] / took['ours']:.2f} of a plain write's speed"
    )


class Decoding(torch.utils.data.Dataset):
    """The usual dataset of a torch DataLoader: images are decoded when they are needed."""

    def __init__(self, photographs, count):
        self.photographs, self.count = photographs, count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return torch.from_numpy(
            by_pillow(self.photographs[number % len(self.photographs)], IMAGE_CONFIG["tile"])
        )


def time_reading(folder, photographs, count, rounds):
    """Batches of a dataset in the page cache, beside a copy of as many bytes in memory, and beside
    a DataLoader that decodes in two processes."""
    dataset.write_shard(folder / "set/00000", IMAGE_CONFIG, samples_of(photographs, count))
    receipt = json.loads((folder / "set/00000/receipt.json").read_text())
    dataset.write_header(
        folder / "set",
        {"tokenizer": "none", "chat_template": "none", "image_config": IMAGE_CONFIG},
        [receipt["files"]],
    )
    samples = dataset.PreparedDataset(folder / "set")
    batches = np.array_split(np.arange(count), count // 16)
    source = samples.shards[0]["tiles"]
    target = np.ones_like(source)  # its pages are mapped, too
    decoding = torch.utils.data.DataLoader(
        Decoding(photographs, count), batch_size=16, num_workers=2
    )
    found = [[samples.read(i)[2][0] for i in batch] for batch in batches]

    def consume(items):
        for item in items:  # each is freed before the next is made, as in training
            del item

    took = median_seconds(
        rounds,
        memcpy=lambda: np.copyto(target, source),
        tiles=lambda: consume(packing.collate_images(images, IMAGE_CONFIG) for images in found),
        batches=lambda: consume(
            packing.collate(samples, [[i] for i in batch]) for batch in batches
        ),
        dataloader=lambda: consume(decoding),
    )
    size = count * source[0].nbytes / 1e9
    print(
        f"read tiles: {size / took['tiles']:.1f} GB/s, "
        f"{took['memcpy'] / took['tiles']:.2f} of memcpy's speed"
    )
    print(
        f"read batches, 600 ids beside each tile: {count / took['batches']:,.0f} samples/s, "
        f"{took['memcpy'] / took['batches']:.2f} of memcpy's speed; "
        f"{took['dataloader'] / took['batches']:.0f} times a DataLoader that decodes in 2 processes"
    )


def llava_like(count=665_000, image_tokens=576):
    """Lengths as in LLaVA's data for fine-tuning.

    Assumed: 94% have an image and about 150 tokens of text; the others are long conversations.
    """
    g = np.random.default_rng(0)
    text = g.lognormal(5.0, 0.8, count).clip(20, 1470)
    chat = g.lognormal(6.2, 0.7, count).clip(30, 2048)
    return np.where(g.random(count) < 0.06, chat, text + image_tokens).astype(int)


def time_packing(out):
    sets = {
        "LLaVA-like": (llava_like(), (2048, 4096, 8192)),
        "144 tokens per image": (llava_like(image_tokens=144), (2048, 4096, 8192)),
    }
    if Path(out).exists():
        samples = dataset.PreparedDataset(out)
        sets[out] = samples.table[samples.split(False), dataset.LENGTH], (320, 640, 1280)
    for name, (lengths, seq_lens) in sets.items():
        for seq_len in seq_lens:
            start = time.perf_counter()
            sequences = sum(1 for _ in packing.pack_sequences(lengths, seq_len))
            print(
                f"pack {name}: {len(lengths):,} samples into sequences of {seq_len:,}: "
                f"{lengths.sum() / sequences / seq_len:.1%} full, "
                f"planned in {time.perf_counter() - start:.1f} s"
            )


def bench(
    *,
    rounds: int = 9,  # of each measurement
    photographs: int = 48,  # drawn photographs
    samples: int = 512,  # samples of the dataset that is written and read
    chats: str = "data/demo/chats",  # prepared data whose lengths are packed, too, if it exists
):
    """Print each speed, also as a ratio to that of the usual way in the same run."""
    torch.set_num_threads(1)
    g = np.random.default_rng(0)
    drawn = [photograph(g) for _ in range(photographs)]
    time_tiles(drawn, [photograph(g, 2048, 1536) for _ in range(6)], rounds)
    compare_pixels(drawn)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        time_writing(Path(folder), drawn, samples, rounds)
        time_reading(Path(folder), drawn, samples, rounds)
    time_packing(chats)


if __name__ == "__main__":
    cli.run_script(bench)
