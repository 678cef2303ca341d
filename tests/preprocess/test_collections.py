"""The README's commands turn the_cauldron and FineVision, here a few rows in their layout, into data."""

import io
import shlex

import numpy as np
import pyarrow
import pytest
from conftest import DECODER, ROOT, VISION, make_vlm
from PIL import Image
from pyarrow import parquet

import prepare
from nanovlm import cli
from nanovlm.checkpoints.checkpoint import Checkpoint, save_checkpoint
from nanovlm.data import dataset, tokenizer

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
PAIR = [("user", pyarrow.string()), ("assistant", pyarrow.string())]
RATINGS = ["relevance", "image_correspondence", "visual_dependency", "formatting"]
SCHEMAS = {
    "cauldron": [
        ("images", pyarrow.list_(IMAGE)),
        ("texts", pyarrow.list_(pyarrow.struct([*PAIR, ("source", pyarrow.string())]))),
    ],
    "finevision": [
        ("images", pyarrow.list_(IMAGE)),
        ("texts", pyarrow.list_(pyarrow.struct(PAIR))),
        ("source", pyarrow.string()),
        *((f"{name}_ratings", pyarrow.list_(pyarrow.int64())) for name in RATINGS),
        *((f"{name}_min", pyarrow.int64()) for name in RATINGS),
    ],
}
QUESTIONS = [("What is it?", "A cat."), ("Which?", "This one."), ("And 2 + 3?", "5")]
IMAGE_CONFIG = dict(tile=12, patch=3, shuffle=2, fit="squash", resample="bicubic")
IMAGE_CONFIG |= dict(mean=[0.5] * 3, std=[0.5] * 3)


def rows(fields):
    """A row with one image and two pairs, one with two images, one without an image."""
    for number, (image_count, pair_count) in enumerate([(1, 2), (2, 1), (0, 3)]):
        images = []
        for n in range(image_count):
            noise = np.random.default_rng(n).integers(256, size=(17, 23, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file := io.BytesIO(), format="PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        pairs = [{"user": u, "assistant": a, "source": "ai2d"} for u, a in QUESTIONS[:pair_count]]
        row = {"images": images, "texts": pairs, "source": "ai2d"}
        row |= {f"{name}_ratings": [5] * pair_count for name in RATINGS}
        row |= {f"{name}_min": number + 1 for name in RATINGS}
        yield {name: row[name] for name in fields}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_readmes_command_prepares_a_collection(name, tmp_path, monkeypatch, capfd):
    words = tokenizer.train_tokenizer(["a cat"], 257, ["<s>", "</s>", "[INST]", "[/INST]"])
    model = make_vlm(decoder={"vocab_size": words.vocab_size})
    decoder = DECODER | {"vocab_size": words.vocab_size}
    shapes = {"vision": VISION, "decoder": decoder, "shuffle": 2}
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Checkpoint(model, words, shapes, IMAGE_CONFIG, "mistral", {}), "out/stitched")
    folder = tmp_path / name / "ai2d"
    folder.mkdir(parents=True)
    schema = pyarrow.schema(SCHEMAS[name])
    table = pyarrow.Table.from_pylist(list(rows(schema.names)), schema=schema)
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")

    readme = (ROOT / "nanovlm/preprocess/README.md").read_text()
    start = f'    python prepare.py data --model=out/stitched --source="{name}/'
    command = next(line for line in readme.splitlines() if line.startswith(start))
    prepare.data(**cli.parse_arguments(prepare.data, shlex.split(command)[3:]))

    samples = dataset.PreparedDataset(tmp_path / "data" / name)
    assert len(samples.names) == 3
    for number, (image_count, pair_count) in enumerate([(1, 2), (2, 1), (0, 3)]):
        ids_T, targets_T, images = samples.read(number)
        text, labels = (
            words.decode([i for i in array.tolist() if i >= 0]) for array in (ids_T, targets_T)
        )
        assert len(images) == image_count
        assert labels == "".join(f"{answer}</s>" for _, answer in QUESTIONS[:pair_count])
        assert all(question in text for question, _ in QUESTIONS[:pair_count])
    unused = "samples with an unused `image_correspondence_ratings`: 3" in capfd.readouterr().err
    assert unused == (name == "finevision")
