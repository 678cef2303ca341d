"""prepare.py through its door: whatever a user hands it becomes a whole set, or one line that names what is wrong, and nothing is lost."""
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import prepare
from nanovlm import IMAGE, UNTRAINED, cli, data, images, weights

SMALL = dict(vocabulary=260, tile=12, patch=3, shuffle=2, width=24, layers=1, heads=6, kv_heads=2, ffn=20,
             vision_width=20, vision_layers=1, vision_heads=5, vision_ffn=28)
TOKENS = 4  # a picture


def talk(*texts):
    return [{"from": role, "value": text} for role, text in zip(("human", "gpt") * len(texts), texts, strict=False)]


RECORDS = [
    {"id": "egg", "image": "egg.png", "conversations": talk("<image>\nWhat is it?", "An egg.", "And its colour?", "White.")},
    {"id": 7, "conversations": talk("Hello", "Hello you")},
    {"id": "pair", "image": ["egg.png", "deep/milk.jpg"], "conversations": talk("First <image> then <image>: what was added?", "Milk.")},
    {"id": "egg", "image": "egg.png", "conversations": talk("<image>", "A white egg.")},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pictures and a newborn model."""
    home = tmp_path_factory.mktemp("world")
    (home / "pictures" / "deep").mkdir(parents=True)
    g = np.random.default_rng(0)
    for name, size in [("egg.png", (14, 10, 3)), ("deep/milk.jpg", (9, 20, 3)), ("big.jpg", (90, 90, 3))]:
        Image.fromarray(g.integers(256, size=size, dtype=np.uint8)).save(home / "pictures" / name)
    (home / "pictures" / "text.jpg").write_text("I am no picture")
    whole = (home / "pictures" / "big.jpg").read_bytes()
    (home / "pictures" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (home / "good.json").write_text(json.dumps(RECORDS))
    prepare.new(source=[str(home / "good.json")], out=str(home / "model"), **SMALL)
    return home


@pytest.fixture
def door(world, tmp_path, monkeypatch):
    """door(what, setting=value, …) -> None, or the exit code that `python prepare.py what --setting=value …` would end with (1 for a text)."""
    usual = {"data": dict(model=world / "model", source=world / "good.json", images=world / "pictures", out=tmp_path / "set"),
             "new": dict(source=world / "good.json", out=tmp_path / "new", **SMALL)}

    def run(what, **settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.setattr(sys, "argv", ["prepare.py", what, *(f"--{n}={v}" for n, v in (usual.get(what, {}) | settings).items())])
        try:
            cli.run({"data": prepare.data, "new": prepare.new, "stitch": prepare.stitch, "fridge": prepare.fridge})
        except SystemExit as end:
            return end.code
    return run


def refused(code, said):
    """One line that says so; sys.exit makes exit code 1 of a text."""
    assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, code
    assert said in code


def source(folder, records):
    path = folder / "source.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


# ---- a set ----

def test_what_is_prepared_is_what_the_source_says(world, door, tmp_path, capsys):
    assert door("data") is None
    model, read = weights.load(world / "model"), data.Samples(tmp_path / "set")
    read.check_fingerprint(model.fingerprint())
    assert read.names == ["egg", "7", "pair", "egg"]
    pixels = {name: images.load_tiles(world / "pictures" / name, model.policy) for name in ("egg.png", "deep/milk.jpg")}
    for i, names in enumerate([["egg.png"], [], ["egg.png", "deep/milk.jpg"], ["egg.png"]]):
        ids_T, _, tiles_NCYX = read.read(i)
        assert (ids_T == IMAGE).sum() == TOKENS * len(names)
        assert np.array_equal(tiles_NCYX, np.concatenate([np.zeros((0, 3, 12, 12), np.uint8), *(pixels[name] for name in names)]))
    learnt = [model.tokenizer.decode([x for x in read.read(i)[1].tolist() if x != UNTRAINED]) for i in range(4)]
    assert learnt == ["An egg.</s>White.</s>", "Hello you</s>", "Milk.</s>", "A white egg.</s>"]
    said = capsys.readouterr()
    assert said.out == "" and "4 samples" in said.err and f"longest of {read.table[:, data.LENGTH].max()} tokens" in said.err


def test_pictures_lie_beside_the_source_unless_a_folder_is_named(world, door):
    assert door("data", images="", source=source(world / "pictures", RECORDS)) is None


def test_conversations_about_one_picture_are_held_out_together():
    """LLaVA's own mix gives one id to all conversations about one picture: it must not be trained in one and be examined in another."""
    records = [{"id": number % 200, "conversations": talk(f"Question {number}", "Answer")} for number in range(400)]
    samples = [prepare.read_sample(record, number, ROOT) for number, record in enumerate(records, 1)]
    held_out = [data.held_out(sample.name) for sample in samples]
    assert held_out[:200] == held_out[200:] and 0 < sum(held_out) < 40


# ---- what is wrong is told in one line ----

def changed(**fields):
    return {name: value for name, value in (RECORDS[0] | fields).items() if value is not ...}


@pytest.mark.parametrize("records, said", [
    ("{'id': 1}", "source.json is not JSON"), ("\x00", "is not JSON"), ("", "is not JSON"), ("[]", "source.json holds no samples"),
    ({"id": 1}, "not a list of samples"), ("5", "not a list of samples"),
    ([5], "sample 1 needs an id"), (["a\nb"], "sample 1 needs an id"), ([RECORDS[0], None], "sample 2 needs an id"),
    ([changed(id=...)], "sample 1 needs an id"), ([changed(id=None)], "sample 1 needs an id"), ([changed(id=True)], "sample 1 needs an id"),
    ([changed(id=["a"])], "sample 1 needs an id"), ([changed(id="")], "the id '' is not one line"), ([changed(id="a\nb")], r"the id 'a\nb' is not"),
    ([changed(image="nowhere.png")], "pictures/nowhere.png"), ([changed(image="deep")], "no such picture"),
    ([changed(image="a\0b")], "no such picture"),
    ([changed(image=5)], "`image` is neither"), ([changed(image=[None])], "`image` is neither"), ([changed(image={"a": 1})], "`image` is neither"),
    ([changed(image=...)], "sample 1 (egg): 1 <image> in its text but 0 pictures"),
    ([changed(image=["egg.png"] * 2)], "1 <image> in its text but 2 pictures"),
    ([changed(image="text.jpg")], "sample 1 (egg): "), ([changed(image="text.jpg")], "text.jpg is no picture"),
    ([changed(image="cut.jpg")], "cut.jpg"),
    ([changed(conversations=talk("<image>", ""))], "sample 1 (egg): turn 2, the assistant's, is empty"),
    ([changed(conversations=talk("<image>"))], "turns must go"), ([changed(conversations=...)], "neither `conversations` nor `messages`"),
])
def test_a_source_that_cannot_be_used(door, tmp_path, records, said):
    code = door("data", source=source(tmp_path, records))
    refused(code, said)
    assert os.listdir(tmp_path) == ["source.json"]  # neither a set nor half of one


@pytest.mark.parametrize("settings, said", [
    (dict(source="nowhere/x.json"), "no such file: nowhere/x.json"), (dict(source=str(ROOT)), "Is a directory"),
    (dict(images="nowhere"), "--images=nowhere is no folder"),
    (dict(model="nowhere"), "no such model: nowhere"), (dict(model=str(ROOT / "tests")), "holds no nanovlm checkpoint"),
    (dict(source=""), "needs --source"), (dict(out=""), "needs --source=FILE.json and --out"), (dict(sauce="x"), "did you mean --source?"),
])
def test_settings_that_lead_nowhere(door, tmp_path, settings, said):
    refused(door("data", **settings), said)
    assert not os.listdir(tmp_path)


def test_all_that_is_wrong_is_told_at_once_and_before_any_picture_is_opened(door, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "load_tiles", lambda *_: pytest.fail("a picture was opened"))
    records = [changed(id=number, image="nowhere.png" if number % 2 else "egg.png") for number in range(12)]
    code = door("data", source=source(tmp_path, records))
    refused(code, "sample 2 (1): no such picture")
    assert all(f"sample {number} ({number - 1})" in code for number in (2, 4, 6)) and "and 3 more samples are wrong" in code
    refused(door("data", source=source(tmp_path, [changed(), changed(id="a\nb")])), "is not one line")
    refused(door("data", source=source(tmp_path, [changed(), changed(conversations=talk("<image>", "\ud800"))])), "half a character")


def test_unreadable_pictures_are_all_told_in_one_go(door, tmp_path):
    records = [changed(id=number, image=name) for number, name in enumerate(["text.jpg", "egg.png", "cut.jpg"], 1)]
    code = door("data", source=source(tmp_path, records))
    refused(code, "sample 1 (1)")
    assert "sample 3 (3)" in code and "sample 2" not in code


@pytest.mark.parametrize("what", ["data", "new", "stitch"])
def test_what_is_there_is_never_written_over(world, door, tmp_path, what):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("years of work")
    parts = dict(vision=world / "model", decoder=world / "model") if what == "stitch" else {}
    refused(door(what, out=tmp_path / "mine", **parts), f"--out={tmp_path}/mine is there already")
    assert (tmp_path / "mine" / "precious").read_text() == "years of work"


# ---- however it ends ----

def test_ctrl_c_leaves_nothing_and_the_next_run_is_whole(door, tmp_path, monkeypatch):
    opened = []

    def load_tiles(path, policy):
        opened.append(path)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(path, policy)

    real = images.load_tiles
    monkeypatch.setattr(images, "load_tiles", load_tiles)
    assert door("data") == 130
    assert len(opened) == 3 and not os.listdir(tmp_path)
    assert door("data") is None
    assert len(data.Samples(tmp_path / "set").names) == len(RECORDS)


def test_a_full_disk_ends_it_at_once_and_names_the_set(door, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.Writer, "_put", full)
    refused(door("data"), f"{tmp_path}/set: No space left on device")
    assert not os.listdir(tmp_path)


def run(code, *settings):
    done = subprocess.run([sys.executable, *code, *map(str, settings)], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def test_killed_and_run_again_as_a_person_would(world, tmp_path):
    """In processes of their own: killed outright while it writes, there is no set; the same command again makes it; once more, it is refused."""
    settings = ["data", f"--model={world}/model", f"--source={world}/good.json", f"--images={world}/pictures", f"--out={tmp_path}/set"]
    killer = ("import os, signal, prepare; from nanovlm import cli, data; put = data.Writer._put; "
              "kill = lambda self, kind, rows: os.kill(os.getpid(), signal.SIGKILL) if self.rows['samples'] == 2 else put(self, kind, rows); "
              "data.Writer._put = kill; cli.run({'data': prepare.data})")
    assert run(["-c", killer], *settings)[0] == -9
    assert os.listdir(tmp_path) == ["set.tmp"]
    code, out, err = run(["prepare.py"], *settings)
    assert (code, out) == (0, "") and "4 samples" in err
    assert os.listdir(tmp_path) == ["set"] and len(data.Samples(tmp_path / "set").names) == 4
    assert run(["prepare.py"], *settings) == (1, "", f"error: --out={tmp_path}/set is there already: remove it, or name another\n")


# ---- a newborn ----

def test_a_newborn_is_a_function_of_its_seed(door, tmp_path):
    for name, seed in [("one", 3), ("two", 3), ("three", 4)]:
        assert door("new", out=tmp_path / name, seed=seed) is None
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_a_newborn_sees_tiles_where_it_is_told_to(door, tmp_path):
    assert door("new", out=tmp_path / "plain") is None
    assert door("new", out=tmp_path / "tiled", tiles=6, tile_tags="true", thumbnail="false", tile_choice="area", draft="false") is None
    plain, tiled = (weights.load(tmp_path / name).policy for name in ("plain", "tiled"))
    assert plain == {"tile": 12, "patch": 3, "shuffle": 2, "fit": "squash", "resample": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "draft": True}
    assert tiled == plain | {"fit": "tiles", "tiles": 6, "tags": True, "thumbnail": False, "choice": "area", "draft": False}


@pytest.mark.parametrize("settings, said", [
    (dict(vocabulary=10), "--vocabulary=10 must be at least 256"),
    (dict(heads=0, layers=-1), "--layers=-1 must be at least 1; --heads=0 must be at least 1"),
    (dict(heads=5), "--width=24 is no multiple of 2 × --heads=5"),
    (dict(kv_heads=4), "--heads=6 is no multiple of --kv_heads=4"), (dict(vision_heads=3), "--vision_width=20 is no multiple of --vision_heads=3"),
    (dict(tile=13), "a tile of 13 pixels is not whole patches of 3"), (dict(fit="stretch"), "is none of squash, pad, crop"),
    (dict(tiles=4, fit="pad"), "--fit=pad makes one tile of a picture, --tiles=4 several: give one of the two"),
    (dict(tiles=-1), "--tiles=-1 must be at least 1"), (dict(tiles=4, tile_choice="best"), "--tile_choice=best is not known: aspect, area"),
    (dict(tile_tags="true", thumbnail="false"), "--thumbnail, --tile_tags without --tiles"),
    (dict(template="mistrl"), "--template=mistrl is not known: mistral"), (dict(seed=-1), "--seed=-1"),
    (dict(source="nowhere.json"), "no such file: nowhere.json"),
])
def test_a_newborn_that_cannot_be(door, tmp_path, settings, said):
    refused(door("new", **settings), said)
    assert not os.listdir(tmp_path)


def test_a_newborn_names_the_sample_it_cannot_learn_from(door, tmp_path):
    path = source(tmp_path, [RECORDS[0], {"id": 2, "text": "Hi"}])
    refused(door("new", source=path), f"{path}, sample 2: neither `conversations` nor `messages`")


def test_a_world_without_fridges_is_none(door, tmp_path):
    refused(door("fridge", out=tmp_path / "fridge", scenes=0, exam=-1), "--scenes=0 must be at least 1; --exam=-1 must be at least 1")
