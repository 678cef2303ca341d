"""prepare.py as a user runs it: it writes complete data, or prints one line that names what is
wrong, and no file is lost."""

import io
import json
import os
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import prepare
from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError, cli
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.data import dataset, image_processing

SMALL = dict(
    vocab_size=260,
    tile=12,
    patch=3,
    shuffle=2,
    width=24,
    layers=1,
    heads=6,
    kv_heads=2,
    intermediate_size=20,
    vision_width=20,
    vision_layers=1,
    vision_heads=5,
    vision_intermediate_size=28,
)
TOKENS = 4  # of an image


def conversation(*texts):
    return [
        {"from": role, "value": text}
        for role, text in zip(("human", "gpt") * len(texts), texts, strict=False)
    ]


RECORDS = [
    {
        "id": "egg",
        "image": "egg.png",
        "conversations": conversation(
            "<image>\nWhat is it?", "An egg.", "And its colour?", "White."
        ),
    },
    {"id": 7, "conversations": conversation("Hello", "Hello you")},
    {
        "id": "pair",
        "image": ["egg.png", "deep/milk.jpg"],
        "conversations": conversation("First <image> then <image>: what was added?", "Milk."),
    },
    {"id": "egg", "image": "egg.png", "conversations": conversation("<image>", "A white egg.")},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images, and a model with random weights."""
    home = tmp_path_factory.mktemp("home")
    (home / "images" / "deep").mkdir(parents=True)
    g = np.random.default_rng(0)
    for name, size in [
        ("egg.png", (14, 10, 3)),
        ("deep/milk.jpg", (9, 20, 3)),
        ("big.jpg", (90, 90, 3)),
    ]:
        Image.fromarray(g.integers(256, size=size, dtype=np.uint8)).save(home / "images" / name)
    (home / "images" / "text.jpg").write_text("no image")
    complete = (home / "images" / "big.jpg").read_bytes()
    (home / "images" / "cut.jpg").write_bytes(complete[: len(complete) // 2])
    (home / "good.json").write_text(json.dumps(RECORDS))
    prepare.random_init(source=[str(home / "good.json")], out=str(home / "model"), **SMALL)
    return home


@pytest.fixture
def run_prepare(home, tmp_path, monkeypatch):
    """A function that runs `python prepare.py command --setting=value …`. It returns None, or what
    the script passes to sys.exit."""
    defaults = {
        "data": dict(
            model=home / "model",
            source=home / "good.json",
            images=home / "images",
            out=tmp_path / "set",
        ),
        "random_init": dict(source=home / "good.json", out=tmp_path / "random_init", **SMALL),
    }

    def run(command, **settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "prepare.py",
                command,
                *(f"--{n}={v}" for n, v in (defaults.get(command, {}) | settings).items()),
            ],
        )
        try:
            cli.run_script(
                {
                    "data": prepare.data,
                    "random_init": prepare.random_init,
                    "stitch": prepare.stitch,
                    "fridge": prepare.fridge,
                    "show": prepare.show,
                    "check": prepare.check,
                }
            )
        except SystemExit as end:
            return end.code

    return run


def assert_refused(code, message):
    """The script ends with this message in one line; sys.exit makes exit code 1 of a text."""
    assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, code
    assert message in code


def source(folder, records):
    path = folder / "source.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


# ---- data ----


def test_prepared_data_has_the_content_of_its_source(home, run_prepare, tmp_path, capsys):
    assert run_prepare("data") is None
    model, read = load_checkpoint(home / "model"), dataset.PreparedDataset(tmp_path / "set")
    read.check_fingerprint(model.fingerprint())
    assert read.names == ["egg", "7", "pair", "egg"]
    pixels = {
        name: image_processing.load_image(home / "images" / name, model.image_config).tiles
        for name in ("egg.png", "deep/milk.jpg")
    }
    for i, names in enumerate([["egg.png"], [], ["egg.png", "deep/milk.jpg"], ["egg.png"]]):
        ids_T, _, images = read.read(i)
        assert (ids_T == IMAGE_TOKEN_ID).sum() == TOKENS * len(names)
        assert all(
            np.array_equal(image.tiles, pixels[name])
            for image, name in zip(images, names, strict=True)
        )
    answers = [
        model.tokenizer.decode([x for x in read.read(i)[1].tolist() if x != IGNORE_INDEX])
        for i in range(4)
    ]
    assert answers == ["An egg.</s>White.</s>", "Hello you</s>", "Milk.</s>", "A white egg.</s>"]
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and "samples of 0 image(s): 1\nsamples of 1 image(s): 2\nsamples of 2 image(s): 1\n"
        f"{tmp_path}/set: 4 samples"
        in printed.err
        and f"longest of {read.table[:, dataset.LENGTH].max()} tokens" in printed.err
    )


def test_images_are_beside_the_source_without_a_folder(home, run_prepare):
    assert run_prepare("data", images="", source=source(home / "images", RECORDS)) is None


def test_the_same_command_again_is_done_and_another_one_is_refused(run_prepare, tmp_path, capsys):
    assert run_prepare("data") is None
    printed = capsys.readouterr().err
    assert run_prepare("data", workers=1) is None
    again = capsys.readouterr().err
    assert (
        again == f"{tmp_path}/set is done: the same command made it\n{printed.splitlines()[-1]}\n"
    )
    for other in (dict(seq_len=99), dict(images=""), dict(allow_outside_images="true")):
        assert_refused(run_prepare("data", **other), "set was begun with other settings: ")


def test_images_outside_are_skipped_by_name_or_read_with_a_setting(home, run_prepare, tmp_path):
    (tmp_path / "egg.png").symlink_to(home / "images" / "egg.png")
    words = dict(source=source(tmp_path, [changed(id="a link"), RECORDS[1]]), images="")
    refused = run_prepare("data", **words)
    assert_refused(
        refused, "1 of 2 samples cannot be used, more than --max_skipped=1% ({'path climbs"
    )
    assert_refused(refused, "the path 'egg.png' climbs out of")
    words |= dict(out=tmp_path / "read", allow_outside_images="true")
    assert run_prepare("data", **words) is None
    assert dataset.PreparedDataset(tmp_path / "read").names == ["a link", "7"]


def test_conversations_about_one_image_are_held_out_together(home, run_prepare, tmp_path):
    """LLaVA's own data gives one id to all conversations about one image. Training on one of them
    and validating on another would leak the image."""
    records = [
        {"id": number % 200, "conversations": conversation(f"Question {number}", "Answer")}
        for number in range(400)
    ]
    assert run_prepare("data", source=source(tmp_path, records), images="") is None
    held_out = dataset.PreparedDataset(tmp_path / "set").table[:, dataset.IS_VALIDATION].tolist()
    assert held_out[:200] == held_out[200:] and 0 < sum(held_out) < 40


# ---- one line names what is wrong ----


def changed(**fields):
    return {name: value for name, value in (RECORDS[0] | fields).items() if value is not ...}


@pytest.mark.parametrize(
    "records, message",
    [
        ("{'id': 1}", "is not JSON"),
        ("\x00", "neither JSON"),
        ("", "it begins with b''"),
        ("[]", "holds no samples"),
        ("5", "neither JSON"),
        ([5], "sample 1 is not an object: 5"),
        ([{"words": 1}], "{'words': 1}"),
    ],
)
def test_an_invalid_source_is_refused_before_anything_is_written(
    run_prepare, tmp_path, records, message
):
    assert_refused(run_prepare("data", source=source(tmp_path, records)), message)
    assert os.listdir(tmp_path) == ["source.json"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(source="nowhere/x.json"), "nowhere/x.json is neither a file nor a folder of .tar"),
        (
            dict(source=str(ROOT / "tests")),
            "is neither a file nor a folder of .tar or .parquet files",
        ),
        (dict(images="nowhere"), "--images=nowhere is not a folder or zip"),
        (dict(images=__file__), "neither a folder nor a zip"),
        (dict(model="nowhere"), "no such model: nowhere"),
        (dict(model=str(ROOT / "tests")), "holds no nanovlm checkpoint"),
        (dict(out=""), "prepare.py data needs --out"),
        (dict(sauce="x"), "did you mean --source?"),
        (dict(seq_len=0), "--seq_len=0 must be at least 1"),
        (dict(workers=-1), "--workers=-1 must be at least 0"),
        (dict(max_skipped="101%"), "--max_skipped=1.01 must be from 0 to 1"),
    ],
)
def test_invalid_settings_of_data_are_refused(run_prepare, tmp_path, settings, message):
    assert_refused(run_prepare("data", **settings), message)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("command", ["data", "random_init", "stitch", "fridge"])
def test_an_existing_folder_is_never_overwritten(home, run_prepare, tmp_path, command):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("my work")
    parts = dict(vision=home / "model", decoder=home / "model") if command == "stitch" else {}
    assert_refused(
        run_prepare(command, out=tmp_path / "mine", **parts),
        f"--out={tmp_path}/mine exists already",
    )
    assert (tmp_path / "mine" / "notes").read_text() == "my work"


# ---- random init ----


def test_random_weights_are_a_function_of_the_seed(run_prepare, tmp_path):
    for name, seed in [("one", 3), ("two", 3), ("three", 4)]:
        assert run_prepare("random_init", out=tmp_path / name, seed=seed) is None
    one, two, three = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")
    )
    assert one == two != three


def test_tiles_are_part_of_the_image_config(run_prepare, tmp_path):
    assert run_prepare("random_init", out=tmp_path / "plain") is None
    assert (
        run_prepare(
            "random_init",
            out=tmp_path / "tiled",
            tiles=6,
            tile_tags="true",
            thumbnail="false",
            tile_choice="area",
            draft="false",
        )
        is None
    )
    plain, tiled = (load_checkpoint(tmp_path / name).image_config for name in ("plain", "tiled"))
    assert plain == {
        "tile": 12,
        "patch": 3,
        "shuffle": 2,
        "fit": "squash",
        "resample": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "draft": True,
    }
    assert tiled == plain | {
        "fit": "tiles",
        "tiles": 6,
        "tags": True,
        "thumbnail": False,
        "choice": "area",
        "draft": False,
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(vocab_size=10), "--vocab_size=10 must be at least 256"),
        (dict(heads=0, layers=-1), "--layers=-1 must be at least 1; --heads=0 must be at least 1"),
        (
            dict(layers=10**12, vision_width=10**12),
            "--layers=1000000000000 must be at most 1,024; --vision_width=1000000000000 must be at "
            "most 1,048,576",
        ),
        (dict(heads=5), "--width=24 must be a multiple of 2 × --heads=5"),
        (dict(kv_heads=4), "--heads=6 must be a multiple of --kv_heads=4"),
        (dict(vision_heads=3), "--vision_width=20 must be a multiple of --vision_heads=3"),
        (dict(tile=13), "--patch=3 must divide --tile=13"),
        (dict(fit="stretch"), "is not one of squash, pad, crop"),
        (
            dict(tiles=4, fit="pad"),
            "--fit=pad makes one tile of an image, --tiles=4 several: give one of the two",
        ),
        (dict(tiles=-1), "--tiles=-1 must be at least 1"),
        (dict(tiles=4, tile_choice="best"), "--tile_choice=best is not one of aspect, area"),
        (
            dict(tile_tags="true", thumbnail="false"),
            "--thumbnail=false changes nothing without --tiles; "
            "--tile_tags=true changes nothing without --tiles",
        ),
        (dict(template="mistrl"), "--template=mistrl is not one of mistral"),
        (dict(seed=-1), "--seed=-1"),
        (dict(source="nowhere.json"), "nowhere.json is neither a file nor a folder of .tar"),
    ],
)
def test_invalid_settings_of_random_init_are_refused(run_prepare, tmp_path, settings, message):
    assert_refused(run_prepare("random_init", **settings), message)
    assert not os.listdir(tmp_path)


def test_a_tokenizer_is_trained_on_all_readable_records(run_prepare, tmp_path, capsys):
    complete, lines = tmp_path / "complete.json", tmp_path / "lines.jsonl"
    complete.write_text(json.dumps(RECORDS))
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + "{broken\n")
    for path in (complete, lines):
        assert run_prepare("random_init", source=path, out=tmp_path / path.stem) is None
    assert (tmp_path / "complete" / "tokenizer.json").read_bytes() == (
        tmp_path / "lines" / "tokenizer.json"
    ).read_bytes()
    assert (
        f"trained without 1 of {len(RECORDS) + 1} records, which cannot be read: {lines}, line 5 is "
        "not JSON" in capsys.readouterr().err
    )


def test_a_tokenizer_without_any_text_is_refused(run_prepare, tmp_path):
    assert_refused(
        run_prepare(
            "random_init",
            source=source(tmp_path, [changed(conversations=conversation("<image>", " "))]),
        ),
        "there is no text to train a tokenizer on: ",
    )


def test_a_demonstration_without_fridges_is_refused(run_prepare, tmp_path):
    assert_refused(
        run_prepare("fridge", out=tmp_path / "fridge", scenes=0, eval_scenes=-1),
        "--scenes=0 must be at least 1; --eval_scenes=-1 must be at least 1",
    )


def test_a_broken_link_counts_as_an_existing_file(tmp_path):
    (tmp_path / "set").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "set", f"{tmp_path}/set/"):
        with pytest.raises(UserError, match="exists already: remove it, or choose another"):
            prepare.refuse_to_overwrite(str(out))
