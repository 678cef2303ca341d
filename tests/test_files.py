"""Folders and files that are written: by one process at a time, and a full disk names them."""

import contextlib
import json
import resource

import pytest
from PIL import Image

import prepare
from nanovlm import UserError
from nanovlm.checkpoints.checkpoint import atomic_folder, load_checkpoint
from nanovlm.evals import runner
from nanovlm.training.logger import Logger


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with captions.json, the images that it names, and a `model` with random weights."""
    home, records = tmp_path_factory.mktemp("home"), []
    for name in map("{}.png".format, range(15)):
        Image.new("RGB", (12, 12), "red").save(home / name)
        records.append({"id": name, "image": name, "caption": "a b " * 9})
    (home / "captions.json").write_text(json.dumps(records))
    random_init(home, home / "model")
    return home


def random_init(home, out):
    sizes = dict(tile=12, patch=3, width=24, layers=3, heads=6, intermediate_size=36)
    prepare.random_init(source=[str(home / "captions.json")], out=str(out), vocab_size=260, **sizes)


def stitch(home, out):
    prepare.stitch(vision=str(home / "model"), decoder=str(home / "model"), out=str(out))


def data(home, out):
    source = [str(home / "captions.json")]
    prepare.data(model=str(home / "model"), source=source, out=str(out), seq_len=200, workers=1)


# ---- one process at a time ----


@pytest.mark.parametrize("command", [random_init, stitch])
def test_a_second_command_with_the_same_out_is_refused_before_it_reads(command, home, tmp_path):
    with atomic_folder(tmp_path / "new") as tmp:
        (tmp / "first.json").touch()
        with pytest.raises(UserError, match="new.tmp is being written by another process"):
            command(tmp_path / "nothing to read", tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "first.json"]


def test_what_a_killed_command_has_left_is_removed(home, tmp_path):
    (tmp_path / "new.tmp" / "sharded").mkdir(parents=True)
    (tmp_path / "new.tmp" / "half.safetensors").touch()
    stitch(home, tmp_path / "new")
    assert load_checkpoint(tmp_path / "new") and [path.name for path in tmp_path.iterdir()] == [
        "new"
    ]
    assert not (tmp_path / "new" / "sharded").exists()
    assert not (tmp_path / "new" / "half.safetensors").exists()


# ---- a full disk ----


@contextlib.contextmanager
def full_disk(size):
    """No file can be longer than `size` bytes: for the program, the disk is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            yield caught
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caught.value.strerror


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (random_init, "new.tmp/model.safetensors"),
        (stitch, "new.tmp/model.safetensors"),
        (data, "new.tmp"),
    ],
)
def test_a_full_disk_names_the_file_or_folder(command, place, home, tmp_path):
    with full_disk(5000) as caught:
        command(home, tmp_path / "new")
    assert caught.value.filename == str(tmp_path / place)
    if command is not data:  # whose finished shards stay
        assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_log(tmp_path):
    numbers = dict(loss=3.0, lr=0.1, grad_norm=2.0, label_fraction=0.5)
    with Logger(tmp_path, 0, steps=9) as log, full_disk(10) as caught:
        log.log(1, {}, **numbers)
    assert caught.value.filename == str(tmp_path / "log.jsonl")


def test_a_full_disk_names_the_answers(home, tmp_path, monkeypatch):
    """Their metadata, answers.json, still fits."""
    output = runner.Output(prompt="a" * 9000, answer="b", tokens=1, cut=False)
    monkeypatch.setattr(runner, "answer_questions", lambda *_, **__: [[(0, output)]])
    question = {"id": "1", "kind": "", "image": [], "question": "a", "answers": ["b"]}
    checkpoint, out = load_checkpoint(home / "model"), tmp_path / "answers.jsonl"
    with full_disk(5000) as caught:
        runner.run_benchmark(
            checkpoint, [question], benchmark="exact", out=str(out), max_tokens=4, seed=0
        )
    assert caught.value.filename == str(out)
