"""A dataset is the same byte for byte for any number of workers and interruptions. It lists each
record that was skipped, with the reason."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import ROOT, make_batch, make_vlm
from PIL import Image
from pyarrow import parquet

from nanovlm import UserError
from nanovlm.data import chat_template, dataset, image_processing, image_refs, packing, tokenizer
from nanovlm.preprocess import build, readers

IMAGE_CONFIG = {
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
TOKENIZER = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
OPTIONS = build.BuildOptions(TOKENIZER, "mistral", IMAGE_CONFIG, seq_len=60, images="")


def record(number, image, answer="Yes.", **other):
    turns = [("human", f"<image>\n{number}?" if image else f"{number}?"), ("gpt", answer)]
    return {
        "id": f"id {number}",
        **({"image": image} if image else {}),
        "conversations": [{"from": role, "value": text} for role, text in turns],
        **other,
    }


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    """23 records and their images; every third record has no image."""
    folder, g = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for number, size in enumerate([(20, 20), (60, 20), (33, 50), (7, 90)]):
        pixels = g.integers(256, size=(*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "text.jpg").write_text("I am no image")
    images = [f"{number % 4}.png" if number % 3 else None for number in range(23)]
    records = [record(number, image) for number, image in enumerate(images)]
    (folder / "good.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(build, "SHARD_RECORDS", 4)


def make(out, source, options=OPTIONS, workers=1, max_skipped=0.0):
    return build.build_dataset([str(source)], out, options, workers, max_skipped)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


# ---- the same bytes in every case ----


def test_any_number_of_workers_writes_the_same_bytes(source_folder, tmp_path):
    for workers in (1, 2, 3):
        assert make(tmp_path / f"{workers}", source_folder / "good.json", workers=workers) == []
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]
    assert sorted(os.listdir(tmp_path / "1")) == [
        *(f"{n:05d}" for n in range(6)),
        "header.json",
        "plan.json",
        "skipped.jsonl",
        "tokenizer.json",
    ]
    assert dataset.PreparedDataset(tmp_path / "1").names == [f"id {number}" for number in range(23)]


def test_a_dataset_has_the_texts_and_images_of_its_source(source_folder, tmp_path):
    make(tmp_path / "set", source_folder / "good.json")
    samples = dataset.PreparedDataset(tmp_path / "set")
    for i in range(23):
        ids_T, targets_T, images = samples.read(i)
        assert len(images) == (i % 3 > 0)
        text, labels = (
            TOKENIZER.decode([x for x in array.tolist() if x >= 0]) for array in (ids_T, targets_T)
        )
        assert labels == "Yes.</s>" and f"{i}?" in text
        for image in images:
            assert np.array_equal(
                image.tiles,
                image_processing.load_image(source_folder / f"{i % 4}.png", IMAGE_CONFIG).tiles,
            )


@pytest.mark.parametrize("count, step", [(512, 1), (12, 2), (5, 5)])
def test_pixels_are_measured_over_images_in_equal_distances(source_folder, count, step):
    """The records are 23; two of three have an image."""
    config = {key: IMAGE_CONFIG[key] for key in ("tile", "patch", "shuffle", "resample")}
    config |= {"fit": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    shown = [f"{i % 4}.png" for i in range(0, 23, step) if i % 3]
    opened = [image_processing.load_image(source_folder / name, config) for name in shown]
    pixels_CN = np.concatenate([image.tiles for image in opened]).swapaxes(0, 1).reshape(3, -1)
    found = build.measure_pixels([str(source_folder / "good.json")], "", config, count)
    for numbers, expected in zip(found, (pixels_CN.mean(1), pixels_CN.std(1)), strict=True):
        assert numbers == pytest.approx((expected / 255).tolist(), abs=1e-4)


def test_images_of_one_color_have_a_deviation_to_divide_by(tmp_path):
    Image.new("RGB", (5, 7), (0, 51, 255)).save(tmp_path / "0.png")
    (tmp_path / "one.json").write_text(json.dumps([record(0, "0.png")]))
    config = {**IMAGE_CONFIG, "tiles": 1}
    mean, std = build.measure_pixels([str(tmp_path / "one.json")], "", config)
    assert (mean, std) == ([0.0, 0.2, 1.0], [0.05] * 3)
    image_processing.check_image_config(config | {"mean": mean, "std": std})


# ---- each question a sample of its own ----

CHAT = {
    "id": "chat",
    "image": ["0.png", "3.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "An egg."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Left."},
        {"role": "user", "content": "And <image>?"},
        {"role": "assistant", "content": "No egg."},
    ],
}


@pytest.fixture(scope="module")
def split_set(source_folder, tmp_path_factory):
    """CHAT, a conversation of two turns without images, and CHAT under another id."""
    folder = tmp_path_factory.mktemp("split")
    words = {"id": "words", "messages": [x for x in CHAT["messages"][1:5] if x["content"]]}
    words["messages"][0] = {"role": "user", "content": "What?"}
    (folder / "chats.json").write_text(json.dumps([CHAT, words, CHAT | {"id": "again"}]))
    options = OPTIONS._replace(split_turns=True, images=str(source_folder), seq_len=200)
    make(folder / "set", folder / "chats.json", options)
    return dataset.PreparedDataset(folder / "set")


def test_a_conversation_of_n_turns_about_images_becomes_n_samples_as_asked_alone(
    split_set, source_folder
):
    system, what, egg, where, left, _, no = ((x["role"], x["content"]) for x in CHAT["messages"])
    alone = [
        ([system, what, egg], ["0.png"]),
        ([system, ("user", chat_template.place_images(where[1], 1)), left], ["0.png"]),
        ([system, ("user", "<image>\nAnd <image>?"), no], ["0.png", "3.png"]),
    ]
    whole = [([("user", "What?"), egg, where, left], [])]
    assert split_set.names == ["chat"] * 3 + ["words"] + ["again"] * 3
    for i, (turns, files) in enumerate([*alone, *whole, *alone]):
        ids, loss_mask, images = split_set.stored_sample(i)
        expected = chat_template.render_conversation(turns, TOKENIZER, "mistral")
        assert (ids.tolist(), loss_mask.astype(bool).tolist()) == expected
        for image, file in zip(images, files, strict=True):
            opened = image_processing.load_image(source_folder / file, IMAGE_CONFIG)
            assert np.array_equal(image.tiles, opened.tiles)


def test_the_samples_of_one_conversation_store_their_tiles_once(split_set):
    (shard,) = split_set.shards
    tiles = [len(image.tiles) for image in split_set.stored_sample(2)[2]]
    assert len(shard["tiles"]) == 2 * sum(tiles)
    assert split_set.shares_image.tolist() == [False, True, True, False, False, True, True]


def test_samples_of_one_image_have_together_the_loss_and_gradients_that_each_has_alone(split_set):
    """The vision encoder sees each distinct tile once."""
    vlm = make_vlm(decoder={"vocab_size": TOKENIZER.vocab_size}).double()
    seen, distinct = [], len(split_set.shards[0]["tiles"])
    vlm.vision.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    batch, _ = packing.collate(split_set, [[0, 1, 3, 2], [5, 4, 6]])
    together = vlm(**batch)
    together.backward()
    assert seen == [distinct] and len(batch["ids_BT"][batch["ids_BT"] == -1]) > distinct * 4
    gradient = vlm.vision.patches.weight.grad.clone()
    vlm.zero_grad()
    losses = []
    for ids, targets, images in (split_set.read(i) for i in range(len(split_set.names))):
        tiles = [torch.empty(0, 3, 12, 12, dtype=torch.uint8)]
        tiles += [torch.from_numpy(image.tiles.copy()) for image in images]
        sample = torch.from_numpy(ids), torch.from_numpy(targets), torch.cat(tiles)
        losses.append(vlm(**make_batch([[sample]])))
    sum(losses).backward()
    assert together.item() == pytest.approx(sum(losses).item(), rel=1e-6)
    torch.testing.assert_close(vlm.vision.patches.weight.grad, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_build_continues_to_the_same_dataset(
    source_folder, tmp_path, monkeypatch, after
):
    """Ctrl-C inside a shard: complete shards stay and are not made again. The folder gets its name
    only at the end."""
    make(tmp_path / "whole", source_folder / "good.json")
    cut, made = build.build_shard, []

    def interrupted(folder, raws, options):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(folder)
        return cut(folder, raws, options)

    monkeypatch.setattr(build, "build_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", source_folder / "good.json")
    assert sorted(os.listdir(tmp_path)) == ["set.tmp", "whole"]
    assert sorted(path.name for path in (tmp_path / "set.tmp").glob("0*")) == [
        f"{n:05d}" for n in range(after)
    ]
    monkeypatch.setattr(
        build, "build_shard", lambda folder, *rest: made.append(folder) or cut(folder, *rest)
    )
    make(tmp_path / "set", source_folder / "good.json")
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
def test_a_build_killed_with_its_workers_at_any_moment_continues(source_folder, tmp_path, seconds):
    make(tmp_path / "whole", source_folder / "good.json")
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(
            root=str(ROOT), out=str(tmp_path / "set"), source=str(source_folder / "good.json")
        )
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
    if not (tmp_path / "set").exists():  # it may have finished before
        make(tmp_path / "set", source_folder / "good.json", workers=2)
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_workers_do_not_outlive_their_parent(source_folder, tmp_path):
    """They hold its stderr, which ends with the last of them."""
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(
            root=str(ROOT), out=str(tmp_path / "set"), source=str(source_folder / "good.json")
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(tmp_path.glob("set.tmp/0*")):
        time.sleep(0.01)
    # They start as soon as the first shard is there, and import torch for longer than this.
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "set").exists()


@pytest.mark.parametrize("at", ["write_header", "remove_build_files"])
def test_a_build_killed_at_its_very_end_continues(source_folder, tmp_path, monkeypatch, at):
    make(tmp_path / "whole", source_folder / "good.json")
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
        make(tmp_path / "set", source_folder / "good.json")
    monkeypatch.setattr(owner, at, real)
    make(tmp_path / "set", source_folder / "good.json")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(options=OPTIONS._replace(seq_len=61)), "its seq_len is 60, now 61"),
        (
            dict(options=OPTIONS._replace(image_config=IMAGE_CONFIG | {"tiles": 4})),
            "its fingerprint image_config tiles is 6, now 4",
        ),
        (
            dict(options=OPTIONS._replace(chat_template="mistral-v1")),
            "its fingerprint chat_template is mistral, now mistral-v1",
        ),
        (dict(options=OPTIONS._replace(split_turns=True)), "its split_turns is False, now True"),
        (dict(), "its sources 0 is .*good.json"),
    ],
)
def test_a_build_continues_only_with_the_source_and_settings_that_it_was_begun_with(
    source_folder, tmp_path, monkeypatch, other, message
):
    source = tmp_path / "good.json"
    source.write_bytes((source_folder / "good.json").read_bytes())
    for path in source_folder.glob("*.png"):
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
        match=f"set.tmp was begun with other settings: .*{message}.*; remove it to start again",
    ):
        make(tmp_path / "set", source, **other)


def test_other_images_or_another_order_of_sources_is_another_dataset(
    source_folder, tmp_path, monkeypatch
):
    """Shards are counted through all sources. In another order some records would be lost, and some
    would come twice."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps([record(f"{name}{number}", "0.png") for number in range(7)])
        )
    paths, options = (
        [str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        OPTIONS._replace(images=str(source_folder)),
    )
    monkeypatch.setattr(
        build, "finish_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build.build_dataset(paths, tmp_path / "set", options, 1, 0.0)
    with pytest.raises(
        UserError, match="its sources 0 is .*a.json.*, now .*b.json.*sources 1 is .*b.json.*a.json"
    ):
        build.build_dataset(paths[::-1], tmp_path / "set", options, 1, 0.0)
    with pytest.raises(UserError, match=f"its images is {source_folder}, now {tmp_path}"):
        build.build_dataset(paths, tmp_path / "set", options._replace(images=str(tmp_path)), 1, 0.0)


def test_a_source_that_changes_while_it_is_read_makes_no_dataset(
    source_folder, tmp_path, monkeypatch
):
    source, cut = tmp_path / "texts.json", build.build_shard
    source.write_text(json.dumps([record(number, None) for number in range(9)]))
    monkeypatch.setattr(
        build,
        "build_shard",
        lambda *task: (source.write_bytes(source.read_bytes() + b" "), cut(*task))[1],
    )
    with pytest.raises(
        UserError, match="its sources 0 is .*texts.json.*, now .*; remove it to start again"
    ):
        make(tmp_path / "set", source)
    assert sorted(os.listdir(tmp_path)) == ["set.tmp", "texts.json"]


def test_a_slash_behind_its_name_is_no_other_dataset(source_folder, tmp_path):
    make(f"{tmp_path}/set/", source_folder / "good.json")
    assert (
        os.listdir(tmp_path) == ["set"]
        and len(dataset.PreparedDataset(tmp_path / "set").names) == 23
    )


def test_progress_names_the_speed_and_the_place_in_the_sources(monkeypatch, capsys):
    """A line after more than five seconds: not at the third second, at the eighth."""
    now = [100.0]

    def completed(tasks, options, workers):
        for seconds, shard in [(3, (30, 10**9, "a.json, line 30")), (5, (10, 10**9, "b, 7"))]:
            now[0] += seconds
            yield shard

    monkeypatch.setattr(build.time, "time", lambda: now[0])
    monkeypatch.setattr(build, "completed_shards", completed)
    build.build_missing_shards([], Path("set.tmp"), OPTIONS, 1)
    assert capsys.readouterr().err == "40 samples, 5/s, 2.0 GB of tiles, at b, 7\n"


def test_a_build_killed_after_its_end_is_done_for_the_same_command(
    source_folder, tmp_path, monkeypatch, capsys
):
    source, reasons = dirty(source_folder, tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(
            build.files, "fsync_path", lambda path: sys.exit() if path == tmp_path else 0
        )
        with pytest.raises(SystemExit):  # after the last rename
            make(tmp_path / "set", source, max_skipped=0.6)
    before = content(tmp_path / "set")
    monkeypatch.setattr(build, "build_shard", lambda *_: pytest.fail("a shard was made again"))
    capsys.readouterr()
    assert len(make(f"{tmp_path}/set/", source, max_skipped=0.6)) == len(reasons)
    assert f"{tmp_path}/set is done: the same command made it\n" in capsys.readouterr().err
    assert content(tmp_path / "set") == before and not (tmp_path / "set.tmp").exists()
    with pytest.raises(
        UserError, match="set was begun with other settings: its seq_len is 60, now"
    ):
        make(tmp_path / "set", source, OPTIONS._replace(seq_len=61))


def test_two_processes_do_not_write_the_same_dataset(source_folder, tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(UserError, match="set.tmp is being written by another process"):
            make(tmp_path / "set", source_folder / "good.json")
        return 0, 0

    cut = build.build_shard
    monkeypatch.setattr(build, "build_shard", lambda *task: (second(), cut(*task))[1])
    make(tmp_path / "set", source_folder / "good.json")


def test_a_full_disk_keeps_complete_shards_and_says_how_to_continue(
    source_folder, tmp_path, monkeypatch, capsys
):
    real = dataset.write_shard

    def full(folder, *rest):
        if folder.name == "00002":
            raise OSError(28, "No space left on device")
        return real(folder, *rest)

    monkeypatch.setattr(dataset, "write_shard", full)
    with pytest.raises(OSError):
        make(tmp_path / "set", source_folder / "good.json")
    assert f"{tmp_path}/set.tmp, and the same command continues" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "set.tmp").glob("0*")) == ["00000", "00001"]


def test_a_disk_that_is_full_at_the_very_last_file_damages_nothing(
    source_folder, tmp_path, monkeypatch
):
    make(tmp_path / "whole", source_folder / "good.json")
    real = dataset.fsync_path

    def full(path):
        if "header" in str(path):
            path.write_bytes(path.read_bytes()[:50])
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(dataset, "fsync_path", full)
    with pytest.raises(OSError):
        make(tmp_path / "set", source_folder / "good.json")
    monkeypatch.setattr(dataset, "fsync_path", real)
    make(tmp_path / "set", source_folder / "good.json")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_shard_ends_when_the_images_of_its_records_grow_large(monkeypatch):
    """The records of a parquet carry their images. Each worker would have a thousand in memory."""
    monkeypatch.setattr(build, "SHARD_IMAGE_BYTES", 100)
    sizes = [60, 60, 10, 0, 0, 0, 0, 101, 99, 1, 1]
    raws = [
        readers.RawRecord(f"row {n}", f"{n}", {"id": n}, [image_refs.ImageBytes("x", bytes(size))])
        for n, size in enumerate(sizes)
    ]
    assert [
        [len(raw.images[0].content) for raw in shard] for shard in build.split_into_shards(raws)
    ] == [[60, 60], [10, 0, 0, 0], [0, 101], [99, 1, 1]]


# ---- records that cannot be used ----


def dirty(source_folder, tmp_path):
    """A source in which records that cannot be used, one of each reason, stand among good ones."""
    (tmp_path / "cut.png").write_bytes((source_folder / "0.png").read_bytes()[:300])
    Image.new("RGB", (4, 900)).save(tmp_path / "thin.png")
    (tmp_path / "0.png").write_bytes((source_folder / "0.png").read_bytes())
    (tmp_path / "text.jpg").write_text("I am no image")
    bad = {
        "image broken": record(1, "cut.png"),
        "image too large or too thin": record(2, "thin.png"),
        "no image": record(3, "text.jpg"),
        "image missing": record(4, "nowhere.png"),
        "empty answer": record(5, None, answer=" "),
        "wrong number of <image>": record(6, None) | {"image": "0.png"},
        "longer than seq_len": record(7, None, answer="word " * 30),
    }
    records = [record(100, "0.png")]
    for number, one in enumerate(bad.values()):
        records += [one, record(200 + number, None)]
    lines = [json.dumps(one) for one in records]
    (tmp_path / "dirty.jsonl").write_text("\n".join([*lines[:6], "{broken", *lines[6:]]))
    return tmp_path / "dirty.jsonl", {*bad, "broken JSON"}


def test_records_of_each_reason_are_skipped_counted_and_listed(source_folder, tmp_path):
    source, reasons = dirty(source_folder, tmp_path)
    skipped = make(tmp_path / "set", source, max_skipped=0.6)
    assert {one["reason"] for one in skipped} == reasons and len(skipped) == len(reasons)
    assert sorted(build.count_reasons(skipped)) == sorted((reason, 1) for reason in reasons)
    listed = [
        json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()
    ]
    assert listed == skipped and all(str(source) in one["where"] and one["error"] for one in listed)
    assert {one["id"] for one in listed if one["reason"] != "broken JSON"} == {
        f"id {n}" for n in range(1, 8)
    }
    assert dataset.PreparedDataset(tmp_path / "set").names == [
        "id 100",
        *(f"id {200 + n}" for n in range(7)),
    ]


def test_too_many_skipped_records_are_an_error_until_the_limit_is_raised(
    source_folder, tmp_path, monkeypatch
):
    source, reasons = dirty(source_folder, tmp_path)
    with pytest.raises(
        UserError,
        match=f"{len(reasons)} of 16 samples cannot be used, more than --max_skipped=1% "
        r"\(.*'image broken': 1.*skipped.jsonl",
    ):
        make(tmp_path / "set", source, max_skipped=0.01)
    assert len((tmp_path / "set.tmp" / "skipped.jsonl").read_text().splitlines()) == len(reasons)
    monkeypatch.setattr(build, "build_shard", lambda *_: pytest.fail("a shard was made again"))
    assert len(make(tmp_path / "set", source, max_skipped=0.6)) == len(reasons)


def test_a_source_without_a_usable_record_makes_no_dataset_at_any_limit(source_folder, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([record(1, "nowhere.png")]))
    with pytest.raises(UserError, match=r"1 of 1 samples cannot be used, so none is left \(\{"):
        make(tmp_path / "set", tmp_path / "bad.json", max_skipped=1.0)


# ---- what became of the records ----


def test_a_build_ends_with_how_many_samples_have_how_many_images_and_the_fields_without_a_use(
    source_folder, tmp_path, capsys
):
    records = [record(n, "0.png" if n % 3 else None, model="", url="x") for n in range(6)]
    records += [record(9, None, tools="[{}]"), record(10, None, img="0.png")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    options = OPTIONS._replace(images=str(source_folder))
    for workers in (1, 2):
        out = tmp_path / f"{workers}"
        (skipped,) = make(out, tmp_path / "a.json", options, workers, max_skipped=0.5)
        assert skipped["reason"] == "image in an unknown field"
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "samples, " not in line] == [  # without progress
            "images that records name: 4",
            "samples of 0 image(s): 3",
            "samples of 1 image(s): 4",
            "samples with an unused `tools`: 1",
            "samples with an unused `url`: 6",
        ]
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_build_ends_with_how_many_images_were_moved_as_llava_does(
    source_folder, tmp_path, capsys
):
    """Its training moves <image> to the front (llava/train/train.py, preprocess_multimodal)."""
    records = [record(n, f"{n % 4}.png") for n in range(7)]
    (tmp_path / "front.json").write_text(json.dumps(records))
    for n in range(2, 5):
        records[n]["conversations"][0]["value"] = f"{n}?\n<image>"
    (tmp_path / "last.json").write_text(json.dumps(records))
    for name in ("front", "last"):
        options = OPTIONS._replace(images=str(source_folder))
        make(tmp_path / name, tmp_path / f"{name}.json", options)
    line = "samples with <image> moved to the front of its turn, as LLaVA does: 3\n"
    assert capsys.readouterr().err.count(line) == 1
    for name in ("ids", "loss_mask", "tiles"):
        parts = [tmp_path / folder / "00001" / name for folder in ("front", "last")]
        assert parts[0].read_bytes() == parts[1].read_bytes()


def test_images_that_no_record_uses_are_refused(source_folder, tmp_path):
    """With text alone the message says so."""
    options = OPTIONS._replace(images=str(source_folder))
    (tmp_path / "a.json").write_text(json.dumps([record(1, None, file=17)]))
    with pytest.raises(
        UserError,
        match=f"no sample names an image in --images={source_folder}: "
        r"\{'samples of 0 image\(s\)': 1, 'samples with an unused `file`': 1\}; leave it out, or name",
    ):
        make(tmp_path / "set", tmp_path / "a.json", options)
    assert not (tmp_path / "set").exists()
    columns = {"image": [(source_folder / "0.png").read_bytes()], "caption": ["An egg."]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no sample names an image in --images="):
        make(tmp_path / "other", tmp_path / "a.parquet", options)
    (tmp_path / "b.json").write_text(json.dumps([record(1, None)]))
    with pytest.raises(UserError, match="the source has only text; leave it out, then remove"):
        make(tmp_path / "text", tmp_path / "b.json", options)
    assert make(tmp_path / "words", tmp_path / "b.json") == []
    # an image that is named, but does not fit, is no text
    (tmp_path / "c.json").write_text(json.dumps([record(1, "1.png", "x" * 99), record(2, None)]))
    assert len(make(tmp_path / "long", tmp_path / "c.json", options, max_skipped=0.5)) == 1


# ---- tiles ----


@pytest.mark.parametrize(
    "seq_len, tiles", [(39, 7), (38, 5), (31, 5), (30, 3), (23, 3), (22, 1), (15, 1)]
)
def test_tiles_step_down_until_the_sample_fits(source_folder, tmp_path, seq_len, tiles):
    """240 × 40 pixels make 6 tiles side by side and a thumbnail, then 4, 2 and 1. A tile takes 4
    tokens, the text 11."""
    (tmp_path / "one.json").write_text(json.dumps([record(1, str(source_folder / "wide.png"))]))
    Image.new("RGB", (240, 40)).save(source_folder / "wide.png")
    make(tmp_path / "set", tmp_path / "one.json", OPTIONS._replace(seq_len=seq_len, images="/"))
    ids_T, _, (image,) = dataset.PreparedDataset(tmp_path / "set").read(0)
    assert len(image.tiles) == tiles and len(ids_T) == 11 + 4 * tiles <= seq_len


def test_a_sample_longer_than_seq_len_is_skipped_with_both_numbers(source_folder, tmp_path):
    (tmp_path / "one.json").write_text(
        json.dumps([record(1, str(source_folder / "0.png")), record(2, None)])
    )
    (skipped,) = make(
        tmp_path / "set",
        tmp_path / "one.json",
        OPTIONS._replace(seq_len=14, images="/"),
        max_skipped=0.5,
    )
    assert skipped["reason"] == "longer than seq_len"
    assert "15 tokens, --seq_len=14" in skipped["error"]


def test_images_that_cannot_fit_are_not_even_opened(source_folder, tmp_path, monkeypatch):
    """10 images of at least 4 tokens each, and text."""
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
    (skipped,) = make(
        tmp_path / "set",
        tmp_path / "two.json",
        OPTIONS._replace(seq_len=40, images=str(source_folder)),
        max_skipped=0.5,
    )
    assert skipped["reason"] == "longer than seq_len"
    assert re.search(r"at least 4\d tokens, --seq_len=40", skipped["error"])
