"""A set is the same byte for byte whatever the number of workers and however it was stopped, and says of everything it left out why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from nanovlm import UserError
from nanovlm.data import dataset, image_processing, image_refs, tokenizer
from nanovlm.preprocess import build, readers

POLICY = {
    "tile": 12,
    "patch": 3,
    "shuffle": 2,
    "fit": "tiles",
    "tiles": 6,
    "thumbnail": True,
    "choice": "aspect",
    "tags": False,
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
WORDS = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
RECIPE = build.BuildOptions(WORDS, "mistral", POLICY, seq_len=60, images="")


def record(number, image, answer="Yes.", **other):
    turns = [("human", f"<image>\n{number}?" if image else f"{number}?"), ("gpt", answer)]
    return {
        "id": f"id {number}",
        **({"image": image} if image else {}),
        "conversations": [{"from": role, "value": said} for role, said in turns],
        **other,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """23 records and their images; every third has none."""
    home, g = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    for number, size in enumerate([(20, 20), (60, 20), (33, 50), (7, 90)]):
        Image.fromarray(g.integers(256, size=(*size[::-1], 3), dtype=np.uint8)).save(
            home / f"{number}.png"
        )
    (home / "text.jpg").write_text("I am no image")
    (home / "good.json").write_text(
        json.dumps(
            [record(number, f"{number % 4}.png" if number % 3 else None) for number in range(23)]
        )
    )
    return home


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(build, "SHARD_RECORDS", 4)


def make(out, source, recipe=RECIPE, workers=1, max_skipped=0.0):
    return build.build_dataset([str(source)], out, recipe, workers, max_skipped)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


# ---- the same, whatever happens ----


def test_any_number_of_workers_writes_the_same_bytes(home, tmp_path):
    for workers in (1, 2, 3):
        assert make(tmp_path / f"{workers}", home / "good.json", workers=workers) == []
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]
    assert sorted(os.listdir(tmp_path / "1")) == [
        *(f"{n:05d}" for n in range(6)),
        "header.json",
        "skipped.jsonl",
        "tokenizer.json",
    ]
    assert dataset.PreparedDataset(tmp_path / "1").names == [f"id {number}" for number in range(23)]


def test_what_is_in_a_set_is_what_the_source_says(home, tmp_path):
    make(tmp_path / "set", home / "good.json")
    samples = dataset.PreparedDataset(tmp_path / "set")
    for i in range(23):
        ids_T, targets_T, images = samples.read(i)
        assert len(images) == (i % 3 > 0)
        said, trained = (
            WORDS.decode([x for x in array.tolist() if x >= 0]) for array in (ids_T, targets_T)
        )
        assert trained == "Yes.</s>" and f"{i}?" in said
        for image in images:
            assert np.array_equal(
                image.tiles, image_processing.load_image(home / f"{i % 4}.png", POLICY).tiles
            )


@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_and_begun_again_is_uninterrupted(home, tmp_path, monkeypatch, after):
    """Ctrl-C inside a shard: what was whole stays, and is not made again; the folder has its name only in the end."""
    make(tmp_path / "whole", home / "good.json")
    cut, made = build.build_shard, []

    def interrupted(folder, raws, recipe):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(folder)
        return cut(folder, raws, recipe)

    monkeypatch.setattr(build, "build_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", home / "good.json")
    assert sorted(os.listdir(tmp_path)) == ["set.tmp", "whole"]
    assert sorted(path.name for path in (tmp_path / "set.tmp").glob("0*")) == [
        f"{n:05d}" for n in range(after)
    ]
    monkeypatch.setattr(
        build, "build_shard", lambda folder, *rest: made.append(folder) or cut(folder, *rest)
    )
    make(tmp_path / "set", home / "good.json")
    assert len(made) == len(set(made)) == 6
    assert content(tmp_path / "set") == content(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/preprocess"]
from nanovlm.preprocess import build
import test_build as t
build.SHARD_RECORDS = 4
if __name__ == "__main__":
    t.make({out!r}, {source!r}, workers=2)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_killed_outright_with_its_workers_at_any_moment_it_goes_on(home, tmp_path, seconds):
    make(tmp_path / "whole", home / "good.json")
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(root=str(ROOT), out=str(tmp_path / "set"), source=str(home / "good.json"))
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(tmp_path.glob("set.tmp/0*")):
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not (tmp_path / "set").exists():  # it may have been quicker
        make(tmp_path / "set", home / "good.json", workers=2)
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_workers_do_not_outlive_their_parent(home, tmp_path):
    """They hold its stderr, which ends when the last of them does."""
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(root=str(ROOT), out=str(tmp_path / "set"), source=str(home / "good.json"))
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(tmp_path.glob("set.tmp/0*")):
        time.sleep(0.01)
    time.sleep(
        0.5
    )  # they start as soon as the first shard is there, and take longer than this to import torch
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "set").exists()


@pytest.mark.parametrize("at", ["write_header", "remove_build_files"])
def test_killed_at_its_very_end_it_ends_the_same(home, tmp_path, monkeypatch, at):
    make(tmp_path / "whole", home / "good.json")
    owner, real = (
        (dataset, dataset.write_header)
        if at == "write_header"
        else (build, build.remove_build_files)
    )

    def killed(*arguments):
        real(*arguments)
        raise SystemExit

    monkeypatch.setattr(owner, at, killed)
    with pytest.raises(SystemExit):
        make(tmp_path / "set", home / "good.json")
    monkeypatch.setattr(owner, at, real)
    make(tmp_path / "set", home / "good.json")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(recipe=RECIPE._replace(seq_len=61)), "its seq_len is 60, now 61"),
        (
            dict(recipe=RECIPE._replace(image_config=POLICY | {"tiles": 4})),
            "its fingerprint image_config tiles is 6, now 4",
        ),
        (
            dict(recipe=RECIPE._replace(chat_template="mistral-v1")),
            "its fingerprint chat_template is mistral, now mistral-v1",
        ),
        (dict(), "good.json is"),
    ],
)
def test_a_set_goes_on_only_with_the_source_and_settings_that_it_was_begun_with(
    home, tmp_path, monkeypatch, other, said
):
    source = tmp_path / "good.json"
    source.write_bytes((home / "good.json").read_bytes())
    for path in home.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(
        build, "finish_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", source)
    if not other:
        source.write_bytes(source.read_bytes() + b" ")
    with pytest.raises(
        UserError,
        match=f"set.tmp was begun with other settings: .*{said}.*; remove it to start again",
    ):
        make(tmp_path / "set", source, **other)


def test_other_images_or_another_order_of_sources_is_another_set(home, tmp_path, monkeypatch):
    """Shards are counted through all sources: in another order, records would be lost and others there twice."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps([record(f"{name}{number}", "0.png") for number in range(7)])
        )
    paths, recipe = (
        [str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        RECIPE._replace(images=str(home)),
    )
    monkeypatch.setattr(
        build, "finish_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build.build_dataset(paths, tmp_path / "set", recipe, 1, 0.0)
    with pytest.raises(
        UserError, match="its order of sources is .*a.json.*b.json.*, now .*b.json.*a.json"
    ):
        build.build_dataset(paths[::-1], tmp_path / "set", recipe, 1, 0.0)
    with pytest.raises(UserError, match=f"its images is {home}, now {tmp_path}"):
        build.build_dataset(paths, tmp_path / "set", recipe._replace(images=str(tmp_path)), 1, 0.0)


def test_a_source_that_changes_while_it_is_read_makes_no_set(home, tmp_path, monkeypatch):
    source, cut = tmp_path / "texts.json", build.build_shard
    source.write_text(json.dumps([record(number, None) for number in range(9)]))
    monkeypatch.setattr(
        build,
        "build_shard",
        lambda *task: (source.write_bytes(source.read_bytes() + b" "), cut(*task))[1],
    )
    with pytest.raises(UserError, match="texts.json is .*, now .*; remove it to start again"):
        make(tmp_path / "set", source)
    assert sorted(os.listdir(tmp_path)) == ["set.tmp", "texts.json"]


def test_a_slash_behind_its_name_is_no_other_set(home, tmp_path):
    make(f"{tmp_path}/set/", home / "good.json")
    assert (
        os.listdir(tmp_path) == ["set"]
        and len(dataset.PreparedDataset(tmp_path / "set").names) == 23
    )


def test_time_left_is_told_of_what_is_left_whatever_an_earlier_run_has_left_out(
    monkeypatch, capsys
):
    """Found: 30% of the sources, in whatever places. Another 20% took 8 seconds, so that the rest takes 20."""
    now = [100.0]
    monkeypatch.setattr(build.time, "time", lambda: now[0])
    progress = build.Progress()
    progress.found, now[0] = 0.3, 104.0
    progress.update(30, 10**9, 0.15)
    now[0] = 108.0
    progress.update(10, 10**9, 0.05)
    assert capsys.readouterr().err == "40 samples, 5/s, 2.0 GB of tiles, 20 s left\n"


def test_two_at_once_do_not_write_the_same_set(home, tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(UserError, match="set.tmp is being written by another process"):
            make(tmp_path / "set", home / "good.json")
        return 0, 0

    cut = build.build_shard
    monkeypatch.setattr(build, "build_shard", lambda *task: (second(), cut(*task))[1])
    make(tmp_path / "set", home / "good.json")


def test_a_full_disk_keeps_what_is_whole_and_says_how_to_go_on(home, tmp_path, monkeypatch):
    real = dataset.write_shard

    def full(folder, *rest):
        if folder.name == "00002":
            raise OSError(28, "No space left on device")
        return real(folder, *rest)

    monkeypatch.setattr(dataset, "write_shard", full)
    with pytest.raises(OSError) as caught:
        make(tmp_path / "set", home / "good.json")
    assert "the same command continues" in caught.value.filename
    assert sorted(path.name for path in (tmp_path / "set.tmp").glob("0*")) == ["00000", "00001"]


def test_a_disk_that_is_full_at_the_very_last_file_spoils_nothing(home, tmp_path, monkeypatch):
    make(tmp_path / "whole", home / "good.json")
    real = dataset.fsync_path

    def full(path):
        if "header" in str(path):
            path.write_bytes(path.read_bytes()[:50])
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(dataset, "fsync_path", full)
    with pytest.raises(OSError):
        make(tmp_path / "set", home / "good.json")
    monkeypatch.setattr(dataset, "fsync_path", real)
    make(tmp_path / "set", home / "good.json")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_shard_ends_where_the_images_that_its_records_carry_grow_large(monkeypatch):
    """Parquet's records bring their images along, which would else lie in memory a thousand at a time for each worker."""
    monkeypatch.setattr(build, "SHARD_IMAGE_BYTES", 100)
    sizes = [60, 60, 10, 0, 0, 0, 0, 101, 99, 1, 1]
    raws = [
        readers.RawRecord(
            f"row {n}", {"id": n}, [image_refs.ImageBytes("x", bytes(size))], None, f"{n}"
        )
        for n, size in enumerate(sizes)
    ]
    assert [
        [len(raw.images[0].content) for raw in shard] for shard in build.split_into_shards(raws)
    ] == [[60, 60], [10, 0, 0, 0], [0, 101], [99, 1, 1]]


# ---- dirt ----


def dirty(home, tmp_path):
    """A source in which every kind of dirt stands among good records."""
    (tmp_path / "cut.png").write_bytes((home / "0.png").read_bytes()[:300])
    Image.new("RGB", (4, 900)).save(tmp_path / "thin.png")
    (tmp_path / "0.png").write_bytes((home / "0.png").read_bytes())
    (tmp_path / "text.jpg").write_text("I am no image")
    bad = {
        "image cut short": record(1, "cut.png"),
        "image too long and thin": record(2, "thin.png"),
        "no image": record(3, "text.jpg"),
        "image missing": record(4, "nowhere.png"),
        "empty answer": record(5, None, answer=" "),
        "wrong number of <image>": record(6, None) | {"image": "0.png"},
        "longer than seq_len": record(7, None, answer="word " * 30),
        "duplicate": record(100, "0.png"),
    }
    records = [
        record(100, "0.png"),
        *(
            one
            for pair in zip(bad.values(), (record(200 + n, None) for n in range(9)), strict=False)
            for one in pair
        ),
    ]
    lines = [json.dumps(one) for one in records]
    (tmp_path / "dirty.jsonl").write_text("\n".join([*lines[:6], "{broken", *lines[6:]]))
    return tmp_path / "dirty.jsonl", {*bad, "broken JSON"}


def test_each_kind_of_dirt_is_skipped_counted_and_listed(home, tmp_path):
    source, reasons = dirty(home, tmp_path)
    skipped = make(tmp_path / "set", source, max_skipped=0.6)
    assert {one["reason"] for one in skipped} == reasons and len(skipped) == len(reasons)
    assert sorted(build.count_reasons(skipped)) == sorted((reason, 1) for reason in reasons)
    listed = [
        json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()
    ]
    assert listed == skipped and all(str(source) in one["where"] and one["error"] for one in listed)
    assert {one["id"] for one in listed if one["reason"] != "broken JSON"} == {
        *(f"id {n}" for n in range(1, 8)),
        "id 100",
    }
    assert dataset.PreparedDataset(tmp_path / "set").names == [
        "id 100",
        *(f"id {200 + n}" for n in range(8)),
    ]


def test_too_much_dirt_is_a_mistake_that_a_higher_limit_forgives_at_once(
    home, tmp_path, monkeypatch
):
    source, reasons = dirty(home, tmp_path)
    with pytest.raises(
        UserError,
        match=f"{len(reasons)} of 18 samples cannot be used, more than --max_skipped=1%.*skipped.jsonl",
    ):
        make(tmp_path / "set", source, max_skipped=0.01)
    assert len((tmp_path / "set.tmp" / "skipped.jsonl").read_text().splitlines()) == len(reasons)
    monkeypatch.setattr(build, "build_shard", lambda *_: pytest.fail("a shard was made again"))
    assert len(make(tmp_path / "set", source, max_skipped=0.6)) == len(reasons)


def test_a_source_of_nothing_but_dirt_is_no_set_whatever_is_forgiven(home, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([record(1, "nowhere.png")]))
    with pytest.raises(UserError, match="1 of 1 samples cannot be used"):
        make(tmp_path / "set", tmp_path / "bad.json", max_skipped=1.0)


# ---- tiles ----


@pytest.mark.parametrize(
    "row, tiles", [(39, 7), (38, 5), (31, 5), (30, 3), (23, 3), (22, 1), (15, 1)]
)
def test_tiles_step_down_until_the_sample_fits(home, tmp_path, row, tiles):
    """240 × 40 pixels ask for 6 tiles in a row and a thumbnail; 4, 2 and 1 are what it steps down to. Each takes 4 tokens, the words 11."""
    (tmp_path / "one.json").write_text(json.dumps([record(1, str(home / "wide.png"))]))
    Image.new("RGB", (240, 40)).save(home / "wide.png")
    make(tmp_path / "set", tmp_path / "one.json", RECIPE._replace(seq_len=row, images="/"))
    ids_T, _, (image,) = dataset.PreparedDataset(tmp_path / "set").read(0)
    assert len(image.tiles) == tiles and len(ids_T) == 11 + 4 * tiles <= row


def test_a_sample_that_fits_no_row_is_skipped_with_both_numbers(home, tmp_path):
    (tmp_path / "one.json").write_text(
        json.dumps([record(1, str(home / "0.png")), record(2, None)])
    )
    (said,) = make(
        tmp_path / "set",
        tmp_path / "one.json",
        RECIPE._replace(seq_len=14, images="/"),
        max_skipped=0.5,
    )
    assert said["reason"] == "longer than seq_len" and "15 tokens, --seq_len=14" in said["error"]


def test_images_that_cannot_fit_are_not_even_opened(home, tmp_path, monkeypatch):
    """10 of at least 4 tokens each, and words."""
    many = {
        "id": "many",
        "image": ["0.png"] * 10,
        "conversations": record(1, None)["conversations"],
    }
    many["conversations"][0]["value"] = "<image>" * 10
    (tmp_path / "two.json").write_text(json.dumps([many, record(2, None)]))
    monkeypatch.setattr(
        build.image_files, "read_image", lambda *_: pytest.fail("an image was opened")
    )
    (said,) = make(
        tmp_path / "set",
        tmp_path / "two.json",
        RECIPE._replace(seq_len=40, images=str(home)),
        max_skipped=0.5,
    )
    assert said["reason"] == "longer than seq_len" and re.search(
        r"at least 4\d tokens, --seq_len=40", said["error"]
    )
