"""`prepare.py figures` draws the READMEs' figures from the folders of a demonstration."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import prepare
from nanovlm import UserError
from nanovlm.checkpoints.random_init import create_model
from nanovlm.demo import figures, fridge, run
from nanovlm.demo.experiments import EXPERIMENTS
from nanovlm.preprocess.build import prepare_dataset
from nanovlm.preprocess.readers import read_texts

FIGURES = {"answers.png", "attention.png", "losses.png", "sequence.png"}
EXPERIMENT_FIGURES = {f"{name}.png" for name in EXPERIMENTS}  # `prepare.py experiment` draws them


@pytest.fixture
def demonstration(tmp_path, monkeypatch):
    """The folders that a demonstration leaves, with few samples and a model with random weights."""
    monkeypatch.chdir(tmp_path)
    fridge.write_fridges(out=run.FRIDGE, scenes=12, text=200, eval_scenes=1, seed=0)
    create_model(
        read_texts([f"{run.FRIDGE}/text.json"]),
        out="out/demo/sft",
        vocab_size=512,
        template="mistral",
        image_config=run.IMAGE_CONFIG,
        seed=0,
        **run.SHAPES,
    )
    prepare_dataset(
        model="out/demo/sft",
        source=[f"{run.FRIDGE}/chats.json"],
        images=f"{run.FRIDGE}/images",
        out="data/demo/chats",
        seq_len=2048,
        workers=1,
    )
    Path("out/demo/scores.json").write_text("{}")
    for stage in figures.TRAINED_PARTS:
        folder = Path("out/demo", stage)
        folder.mkdir(exist_ok=True)
        lines = [
            {"step": 10, "loss": 3.0},
            {"step": 20, "val_loss": 2.5, "blank_image_loss": 2.5},
            {"step": 30, "val_loss": 0.5, "blank_image_loss": 3.2},
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_demonstration_gives_the_same_figures_each_time(demonstration):
    for out in ("one", "other"):
        prepare.figures(out=out)
    for name in FIGURES:
        assert Path("one", name).read_bytes() == Path("other", name).read_bytes()
        with Image.open(Path("one", name)) as figure:
            assert figure.width == figures.WIDTH * figures.DENSITY
            assert hex_color(figures.WHITE) in colors(figure)
            # maps of attention have the image's own colors
            assert (hex_color(figures.BLUE) in colors(figure)) == (name != "attention.png")
    assert {path.name for path in Path("one").iterdir()} == FIGURES


def hex_color(text):
    return tuple(bytes.fromhex(text.removeprefix("#")))


def colors(image):
    return {color for _, color in image.convert("RGB").getcolors()}


def test_a_missing_demonstration_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^out/demo/scores.json is missing: run `python train.py`"):
        prepare.figures(out="figures")
    assert not Path("figures").exists()


def test_the_figures_of_the_readmes_are_there_and_small():
    shown = set()
    for readme in [ROOT / "README.md", *ROOT.glob("nanovlm/*/README.md")]:
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme.read_text()):
            shown.add((readme.parent / target).resolve())
    assert shown == {ROOT / "nanovlm/demo/figures" / name for name in FIGURES | EXPERIMENT_FIGURES}
    assert sum(path.stat().st_size for path in shown) < 270_000
