"""An evaluation asks each question once, on any number of ranks and despite interruptions.

Its answers are those that are given one by one. Everything that two ranks do is in one launch of
this file, since most of a launch is the import of torch.
"""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODER, ROOT, VISION, make_vlm
from PIL import Image

import sample
from nanovlm import UserError, distributed
from nanovlm import files as disk
from nanovlm.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nanovlm.data import chat_template, image_processing, image_refs, tokenizer
from nanovlm.evals import benchmarks, report, runner

IMAGE_CONFIG = {
    "tile": 12,
    "patch": 3,
    "shuffle": 2,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
TILES = IMAGE_CONFIG | {
    "fit": "tiles",
    "tiles": 6,
    "choice": "aspect",
    "thumbnail": True,
    "tags": False,
}
CPU = torch.device("cpu")
ROW = {
    "id": "x",
    "kind": "all",
    "prompt": "?",
    "answer": "egg",
    "answers": ["egg"],
    "tokens": 2,
    "cut": False,
}


def make_home(home):
    """A checkpoint whose tokens are bytes and often end, images of 3 sizes, and 23 questions."""
    words = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
    model = make_vlm(decoder={"vocab_size": words.vocab_size})
    with torch.no_grad():
        model.decoder.lm_head.weight[259] *= 2.5
        model.decoder.lm_head.weight[128:256] *= 0.5  # mostly letters
    shapes = {"vision": VISION, "decoder": DECODER | {"vocab_size": words.vocab_size}, "shuffle": 2}
    save_checkpoint(
        Checkpoint(model, words, shapes, IMAGE_CONFIG, "mistral", {"born": "here"}), home / "model"
    )
    g = np.random.default_rng(0)
    for name, (width, height) in {"a": (12, 12), "b": (50, 13), "c": (11, 70)}.items():
        Image.fromarray(g.integers(256, size=(height, width, 3), dtype=np.uint8)).save(
            home / f"{name}.png"
        )
    kinds, shown, records = (
        ["one", "two", "<three>"],
        [["a.png"], [], ["b.png", "c.png"], ["c.png"], ["b.png"]],
        [],
    )
    for i in range(23):
        records.append(
            {
                "id": i if i % 2 else f"n{i}",
                "kind": kinds[i % 3],
                "image": shown[i % 5],
                "question": "x" * (i * 7 % 12) + f"? & {i}",
                "answers": ["nothing", "?"][: 1 + i % 2],
            }
        )
    write_questions(home, records)
    generated = answers(
        load_checkpoint(home / "model"),
        benchmarks.load_questions("exact", str(home / "questions.jsonl")),
        max_tokens=12,
    )
    for i in (4, 5, 9, 13, 14, 17):  # what is right of these
        records[i]["answers"].append(generated[i].text.strip() or "?")
    write_questions(home, records)
    return home


def write_questions(home, records):
    (home / "questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in records)
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def checkpoint(home):
    return load_checkpoint(home / "model")


@pytest.fixture(scope="module")
def questions(home):
    return benchmarks.load_questions("contains", str(home / "questions.jsonl"))


def tiled(checkpoint):
    """A model that cuts images into tiles: their number of tokens depends on their size."""
    return checkpoint._replace(image_config=TILES)


def alone(checkpoint, question, **choices):
    """The answer as sample.py gives it, and its tokens."""
    images = [
        image_processing.load_image(ref.path, checkpoint.image_config) for ref in question["image"]
    ]
    parts = list(
        sample.stream_answer(checkpoint, [("user", question["question"])], images, **choices)
    )
    return "".join(parts)


def answers(checkpoint, questions, **how):
    """In the order of the questions."""
    found = sorted(
        pair for pairs in runner.answer_questions(checkpoint, questions, **how) for pair in pairs
    )
    assert [i for i, _ in found] == list(range(len(questions)))
    return [output for _, output in found]


# ---- asking ----


@pytest.mark.parametrize(
    "how", [{"max_tokens": 20}, {"max_tokens": 9, "temperature": 1.5, "seed": 3, "top_k": 50}]
)
@pytest.mark.parametrize("cut", [lambda checkpoint: checkpoint, tiled])
def test_many_answers_at_once_are_the_answers_one_by_one(checkpoint, questions, how, cut):
    checkpoint = cut(checkpoint)
    want = [alone(checkpoint, question, **how) for question in questions]
    for batch in (1, 4, 100):
        output = answers(checkpoint, questions, batch=batch, **how)
        assert [one.text for one in output] == want
        assert (
            all(one.cut == (one.tokens == how["max_tokens"]) or not one.cut for one in output)
            and len({one.cut for one in output}) == 2
        )
    assert len(set(want)) > 10
    assert answers(checkpoint, [], max_tokens=3) == []


def test_an_answer_is_cut_off_if_it_has_not_ended_and_its_tokens_count_the_end(
    checkpoint, questions
):
    long = answers(checkpoint, questions, max_tokens=60)
    short = next(one for one in long if not one.cut and one.tokens > 2)
    question = [questions[long.index(short)]]
    for most, cut in ((short.tokens - 1, True), (short.tokens, False), (short.tokens + 1, False)):
        (output,) = answers(checkpoint, question, max_tokens=most)
        assert (output.cut, output.tokens, output.text) == (
            cut,
            min(most, short.tokens),
            short.text if not cut else output.text,
        )
        assert short.text.startswith(output.text.rstrip("\ufffd"))


def test_blank_images_hides_the_images_and_nothing_else(checkpoint):
    def seen(color):
        return image_processing.ProcessedImage(
            np.full((1, 3, 12, 12), color, np.uint8), np.arange(4), (12, 12)
        )

    asked = [("<image>x", [seen(3)]), ("<image>x", [seen(250)]), ("y", [])]
    texts, blind, grey = (
        [one.text for one in runner.generate_answers(checkpoint, what, max_tokens=20, **how)]
        for what, how in [
            (asked, {}),
            (asked, {"blank_images": True}),
            ([("<image>x", [seen(128)])], {}),
        ]
    )
    assert texts[0] != texts[1] and blind[0] == blind[1] == grey[0] and blind[2] == texts[2]


def test_the_model_is_called_in_the_context_that_is_given(checkpoint, questions):
    narrow = torch.autocast("cpu", torch.bfloat16)
    scores = []
    for how in ({}, {"autocast": narrow}):
        head = checkpoint.model.decoder.lm_head.register_forward_hook(
            lambda module, x, logits: scores.append(logits.float())
        )
        answers(checkpoint, questions[:1], max_tokens=1, **how)
        head.remove()
    assert not torch.equal(*scores) and torch.allclose(*scores, atol=0.2)


@pytest.mark.parametrize("cut", [lambda checkpoint: checkpoint, tiled])
def test_neighbours_in_length_share_a_batch(checkpoint, questions, cut):
    """No prompt is longer than those of the next batch; equal lengths keep their order."""
    checkpoint = cut(checkpoint)
    lengths = []
    for question in questions:
        images = [
            image_processing.load_image(ref.path, checkpoint.image_config)
            for ref in question["image"]
        ]
        lengths.append(
            len(chat_template.encode_prompt(checkpoint, [("user", question["question"])], images))
        )
    assert runner.prompt_lengths(checkpoint, questions) == lengths
    batches = runner.batches_by_length(lengths, 4)
    assert [len(members) for members in batches] == [4] * 5 + [3]
    assert sum(batches, []) == sorted(range(23), key=lambda i: (lengths[i], i)) != list(range(23))


def test_sizes_are_read_of_files_zips_and_bytes_alike(home, tmp_path):
    content = (home / "b.png").read_bytes()
    assert (
        runner.read_image_size(image_refs.ImageFile(str(home / "b.png")))
        == runner.read_image_size(image_refs.ImageBytes("b", content))
        == (50, 13)
    )
    for ref in (
        image_refs.ImageBytes("b", b"no image"),
        image_refs.ImageFile(str(home / "questions.jsonl")),
        image_refs.ImageFile(str(home / "none.png")),
    ):
        with pytest.raises(
            UserError, match="b is no image|questions.jsonl is no image|none.png: No such file"
        ):
            runner.read_image_size(ref)


# ---- marking ----


def row(score, kind="all", answers=("x",), cut=False):
    return {"id": 1, "kind": kind, "answers": list(answers), "score": score, "cut": cut}


def test_the_table_counts_each_question_once_in_its_kind_and_once_in_all():
    rows = [row(1, "b"), row(0, "a", cut=True), row(None, "b"), row(0, "b"), row(1)]
    b, a, every = report.make_table(rows)
    assert b[:3] == ("b", 3, 1 / 3) and a[:3] == ("a", 1, 0.0) and every[:3] == ("all", 5, 2 / 5)
    assert (b.unparsed, a.unparsed, every.unparsed) == (1 / 3, 0, 1 / 5), (
        "what cannot be parsed counts as 0"
    )
    assert (b.cut, a.cut, every.cut) == (0, 1, 1 / 5)
    assert (a.low, a.high) == (0, 0) and 0 <= b.low <= b.score <= b.high <= 1


def test_the_interval_is_as_wide_as_theory_says():
    """The mean of n answers, a share p right, has the deviation √(p (1 - p) / n): ± 1.96 of it."""
    rows = [row(float(i % 4 == 0)) for i in range(1000)]
    line = report.make_table(rows, seed=1)[-1]
    half = 1.96 * (0.25 * 0.75 / 1000) ** 0.5
    assert (line.low, line.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.004)
    assert line == report.make_table(rows, seed=1)[-1] != report.make_table(rows, seed=2)[-1]


def test_an_answer_without_references_has_no_score():
    rows = runner.score_results(
        [
            {**row(None, answers=()), "answer": "x"},
            {**row(None), "answer": "x"},
            {**row(None), "answer": "y"},
        ],
        "exact",
    )
    assert [one["score"] for one in rows] == [None, 1.0, 0.0]
    line = report.make_table(rows)[-1]
    assert (line.questions, line.score, line.unparsed) == (3, 0.5, 0.0)
    assert report.make_table(rows[:1])[-1][2:6] == (None, None, None, None)


def test_a_question_that_cannot_be_scored_is_refused_before_anything_is_generated(
    checkpoint, questions, monkeypatch
):
    monkeypatch.setattr(runner, "generate_answers", None)
    for begin in (runner.run_benchmark, runner.evaluate):
        with pytest.raises(UserError, match="question n0 has 1 reference answers"):
            begin(checkpoint, questions, benchmark="vqa", max_tokens=3)


def test_captions_are_scored_all_at_once(capsys):
    """CIDEr's idf needs the whole corpus: a caption that all images have says nothing."""
    rows = [
        {**row(None), "answer": answer, "answers": references, "prompt": "?"}
        for answer, references in [
            ("a cat on a mat", ["a cat on a mat", "the cat sits"]),
            ("a dog", ["a bird flies", "a dog"]),
            ("nothing", ["a house", "some house"]),
        ]
    ]
    rows = runner.score_results(rows, "captions")
    scores = [one["score"] for one in rows]
    assert scores[0] > scores[1] > scores[2] == 0
    assert report.needs_all_answers("captions") and not report.needs_all_answers("vqa")
    report.print_table(report.make_table(rows), {}, "captions")
    output = capsys.readouterr().out
    mean = f"{100 * sum(scores) / 3:.1f}"
    assert (
        f"{mean:>6} CIDEr-D" in output
        and "do not compare it with scores over other images" in output
    )
    page = report.html_page(rows, 3 * [{"image": []}], report.make_table(rows), "captions", "m")
    assert f"<td>3<td>{mean}<td>" in page and page.count("%") == 2, (
        "on the page, too, only what was unparsed and cut off is a share"
    )


# ---- an exam from beginning to end ----


def answer_by(monkeypatch, give):
    """A model that gives the answer give(text of the question) and sees nothing."""
    monkeypatch.setattr(
        runner,
        "generate_answers",
        lambda checkpoint, prompts, **how: [
            runner.Answer(give(text), 2, False, text) for text, _ in prompts
        ],
    )


def test_a_benchmark_is_reported_by_its_owners_metrics(
    home, checkpoint, tmp_path, monkeypatch, capsys
):
    """Always "yes", and half of the references are no.

    POPE: accuracy 50%, all yes, F1 2 · 0.5 · 1 / 1.5. MME: 50 of 100 for acc, 0 for acc+, which
    needs both answers of an image.
    """
    records = [
        {"question_id": i, "image": "a.png", "text": f"Is it {i}?", "label": label}
        for i, label in enumerate(("yes", "no"))
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files = {f"pope/coco_pope_{kind}.json": lines for kind in ("random", "popular")} | {
        "pope/a.png": None
    }
    for kind in ("color", "code_reasoning", "count"):
        files |= {
            f"mme/{kind}/a.txt": "Is it red?\tYes\nIs it blue?\tNo\n",
            f"mme/{kind}/a.png": None,
        }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((text and text.encode()) or (home / "a.png").read_bytes())
    tables = {}
    for name in ("pope", "mme"):
        questions = benchmarks.load_questions(name, str(tmp_path / name))
        answer_by(monkeypatch, lambda text: "Yes.")
        rows, about = runner.run_benchmark(checkpoint, questions, benchmark=name, max_tokens=9)
        runner.summarize(rows, about, questions, name)
        tables[name] = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in tables["pope"][:3]] == [
        [kind, count, "questions", "50.0%", "right"]
        for kind, count in (("popular", "2"), ("random", "2"), ("all", "4"))
    ]
    assert {"F1: 0.66667", "yes-rate: 1", "precision: 0.5", "recall: 1"} <= set(tables["pope"])
    assert {"perception: 100", "cognition: 50", "total: 150", "color: 50"} <= set(tables["mme"])


def test_a_hidden_test_set_is_submitted_without_scores(
    home, checkpoint, tmp_path, monkeypatch, capsys
):
    records = [
        {"questionId": i, "question": text, "image": "documents/a.png"}
        for i, text in ((7, "What?"), (8, "When?"))
    ]
    (tmp_path / "test_v1.0.json").write_text(json.dumps({"data": records}))
    questions = benchmarks.load_questions(
        "docvqa", str(tmp_path / "test_v1.0.json"), images=str(home)
    )
    answer_by(monkeypatch, lambda text: " 1993" if "When" in text else "milk\n")
    rows, about = runner.run_benchmark(checkpoint, questions, benchmark="docvqa", max_tokens=9)
    runner.summarize(
        rows,
        about,
        questions,
        "docvqa",
        submission=str(tmp_path / "hand-in.json"),
        page=str(tmp_path / "page.html"),
    )
    assert re.fullmatch(
        r"all            2 questions   no reference answers   0.0% cut off   [\d,]+ tokens/s\n",
        capsys.readouterr().out,
    )
    assert json.loads((tmp_path / "hand-in.json").read_text()) == [
        {"questionId": 7, "answer": "milk"},
        {"questionId": 8, "answer": "1993"},
    ]
    assert (tmp_path / "page.html").read_text().count("not scored") == 2


def without_speed(table):
    assert len(found := re.findall(r" {3}[\d,]+ tokens/s$", table, re.MULTILINE)) == 1
    return table.replace(found[0], "")


def run_and_summarize(checkpoint, questions, out, **how):
    rows, about = runner.run_benchmark(
        checkpoint,
        questions,
        benchmark="contains",
        out=str(out),
        **{"max_tokens": 12, "batch": 4, **how},
    )
    runner.summarize(rows, about, questions, "contains", out=str(out))
    return rows


def test_an_interrupted_evaluation_resumes_to_the_same_bytes_and_asks_nothing_twice(
    checkpoint, questions, tmp_path, monkeypatch, capsys
):
    run_and_summarize(checkpoint, questions, tmp_path / "whole.jsonl")
    table = without_speed(capsys.readouterr().out)
    answer, prompts = runner.generate_answers, []

    def until(most):
        def counted(checkpoint, some, **how):
            if len(prompts) >= most:
                raise KeyboardInterrupt
            prompts.extend(text for text, _ in some)
            return answer(checkpoint, some, **how)

        return counted

    out = tmp_path / "stopped.jsonl"
    for most in (8, 15):
        monkeypatch.setattr(runner, "generate_answers", until(most))
        with pytest.raises(KeyboardInterrupt):
            run_and_summarize(checkpoint, questions, out)
        assert (
            len(out.read_text().splitlines()) == len(prompts)
            and json.loads(out.with_suffix(".json").read_text())["settings"]
        )
        with open(out, "a") as file:
            file.write('{"id": "n0", "answer": "to')  # a line that was torn
    monkeypatch.setattr(runner, "generate_answers", until(100))
    capsys.readouterr()
    run_and_summarize(checkpoint, questions, out)
    assert sorted(prompts) == sorted(question["question"] for question in questions)
    assert (
        out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        and without_speed(last := capsys.readouterr().out) == table
    )
    metadata = out.with_suffix(".json").read_text()
    run_and_summarize(checkpoint, questions, out, batch=5)
    assert len(prompts) == 23, "an exam that is over is not prompts again"
    assert out.with_suffix(".json").read_text() == metadata and capsys.readouterr().out == last, (
        "nor is it metadata otherwise how it was prompts, and how fast"
    )
    one, other = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "stopped")
    )
    assert {
        name: one[name] for name in ("settings", "history", "versions", "table", "figures")
    } == {name: other[name] for name in ("settings", "history", "versions", "table", "figures")}


@pytest.mark.parametrize("torn", ["", '{"id": "n0", "answer": "to', json.dumps(ROW), "\0" * 9])
def test_an_evaluation_resumes_after_the_last_complete_line(tmp_path, torn):
    out, settings, question = (
        tmp_path / "answers.jsonl",
        {"benchmark": "exact"},
        {"id": "x", "question": "?"},
    )
    (tmp_path / "answers.json").write_text(json.dumps({"settings": settings}))
    whole = json.dumps(ROW | {"id": "y"}) + "\n"
    out.write_text(whole + torn)
    with open(out, "a") as writer:
        assert list(
            runner.resume_answers(out, [question, question | {"id": "y"}], settings, {})
        ) == [1]
        writer.write("more")
    assert out.read_text() == whole + "more"
    with pytest.raises(UserError, match=f"{out} answers question y, which is not in --questions"):
        runner.resume_answers(out, [question], settings, {})


@pytest.mark.parametrize(
    "kept",
    [
        "[]",
        "{}",
        '{"settings": 5}',
        '{"settings": {}}',
        '{"settings": {"benchmark": 5}}',
        '{"settings": {"benchmark": "exact"}, "history": 5}',
        '{"asked": {"benchmark": "exact"}, "card": 5}',
    ],
)
def test_a_file_that_is_no_answers_json_is_named(tmp_path, kept):
    (tmp_path / "answers.json").write_text(kept)
    with pytest.raises(
        UserError,
        match=f"^{tmp_path}/answers.json(, where the scores of .* belong, is something else| is no "
        "JSON object)",
    ):
        runner.read_metadata(tmp_path / "answers.jsonl")


def test_the_keys_of_older_answers_are_read_by_their_new_names(tmp_path):
    (tmp_path / "a.json").write_text('{"asked": {"benchmark": "vqa"}, "card": {"folder": "x"}}')
    new = {"settings": {"benchmark": "vqa"}, "history": {"folder": "x"}}
    assert runner.read_metadata(tmp_path / "a.jsonl") == new


def test_a_line_is_written_as_soon_as_it_is_answered(checkpoint, questions, tmp_path, monkeypatch):
    out, seen, answer = tmp_path / "answers.jsonl", [], runner.generate_answers

    def watched(*arguments, **how):
        seen.append(len(out.read_text().splitlines()))
        return answer(*arguments, **how)

    monkeypatch.setattr(runner, "generate_answers", watched)
    run_and_summarize(checkpoint, questions, out)
    assert seen == [0, 3, 7, 11, 15, 19], "the longest first: the batch of three"


def test_answers_json_has_the_settings_and_the_scores(checkpoint, questions, tmp_path):
    rows = run_and_summarize(
        checkpoint, questions, tmp_path / "answers.jsonl", seed=5, temperature=0.5
    )
    metadata = json.loads((tmp_path / "answers.json").read_text())
    settings = metadata["settings"]
    assert {
        name: settings[name] for name in ("benchmark", "seed", "temperature", "max_tokens")
    } == {"benchmark": "contains", "seed": 5, "temperature": 0.5, "max_tokens": 12}
    assert (
        metadata["history"]["folder"].endswith("model")
        and re.fullmatch("[0-9a-f]{8}", settings["model"])
        and settings["questions"].startswith("23 (")
    )
    assert metadata["history"]["born"] == "here" and metadata["batch"] == 4
    assert (
        metadata["table"][-1] == report.make_table(rows)[-1]._asdict()
        and metadata["answers_per_s"] > 0
    )
    assert metadata["tokens_per_s"] / metadata["answers_per_s"] == pytest.approx(
        sum(row["tokens"] for row in rows) / 23
    )


def test_progress_prints_speed_score_and_the_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    progress = report.EvaluationProgress(20, 4)
    assert progress.speeds() == {}, "of nothing in no time"
    clock[0] = 102.0
    rows = [{"tokens": 10, "score": score, "answers": ["x"]} for score in (1, 1, 0, None)]
    progress.update(rows, "exact")
    assert capsys.readouterr().err == ""
    clock[0] = 106.0
    progress.update(rows[:2], "exact")  # 6 in 6 s: one a second; 4 of 6 right; 10 left
    output = capsys.readouterr().err
    assert output == "10/20 questions | 1.0 answers/s | 66.7% so far | 0:00:10 left\n"
    assert progress.speeds() == {"answers_per_s": 1.0, "tokens_per_s": 10.0}


def test_the_table_ends_with_the_speed_where_it_is_known(capsys):
    for speed, message in ((1234.5, "0.0% cut off   1,234 tokens/s"), (None, "0.0% cut off")):
        report.print_table(report.make_table([row(1, "b"), row(0, "a")]), {}, "exact", speed)
        b, a, every = capsys.readouterr().out.splitlines()
        assert every.endswith(message) and a.endswith("cut off") and b.endswith("cut off")


def test_versions_include_our_own_files_and_what_an_image_passes_through(tmp_path, monkeypatch):
    versions = runner.package_versions()
    assert (
        versions["torch"] == torch.__version__
        and versions["numpy"] == np.__version__
        and "pillow" in versions
    )
    shutil.copytree(Path(runner.__file__).parents[1], tmp_path / "nanovlm")
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "nanovlm" / "evals" / "runner.py"))
    assert runner.package_versions() == versions
    with open(tmp_path / "nanovlm" / "data" / "chat_template.py", "a") as file:
        file.write("\n")
    assert [
        name for name, version in runner.package_versions().items() if version != versions[name]
    ] == ["nanovlm"]


def test_a_model_is_known_by_what_its_files_hold_and_not_by_where_they_lie_and_since_when(
    home, checkpoint, tmp_path
):
    def known(folder, **change):
        there = checkpoint._replace(history={"folder": str(folder)}, **change)
        return runner.evaluation_settings(there, [], "exact", "", {})["model"]

    copied = tmp_path / "copy"
    shutil.copytree(home / "model", copied, copy_function=shutil.copyfile)
    assert known(copied) == known(home / "model") != known(copied, chat_template="plain")
    model = load_checkpoint(copied)
    with torch.no_grad():
        for number in (
            model.model.projector.parameters()
        ):  # as alignment trains it: as many bytes, in the same places
            number += 1e-3
    save_checkpoint(model, copied)
    assert (copied / "model.safetensors").stat().st_size == (
        home / "model" / "model.safetensors"
    ).stat().st_size
    assert known(copied) != known(home / "model")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "sharded/rank-00000.safetensors"]
)
def test_the_hash_of_a_large_weights_file_samples_every_layer(tmp_path, monkeypatch, name):
    """Of 1,000 bytes the first 8 of every 125 are read here."""
    monkeypatch.setattr(runner, "HASH_BLOCK", 8)
    (tmp_path / "sharded").mkdir()
    content, known = bytearray(range(250)) * 4, []
    for place in (None, 0, 7, 8, 124, 125, 999):
        changed = content.copy()
        if place is not None:
            changed[place] ^= 1
        (tmp_path / name).write_bytes(changed)
        known.append(runner.hash_weights(str(tmp_path)))
    assert [one != known[0] for one in known[1:]] == [True, True, False, False, True, False]
    (tmp_path / name).write_bytes(content[:-1])
    assert runner.hash_weights(str(tmp_path)) != known[0]


def test_prompts_longer_than_those_of_training_give_a_warning(
    checkpoint, questions, tmp_path, capsys
):
    lengths, checkpoint = (
        runner.prompt_lengths(checkpoint, questions),
        checkpoint._replace(history={"folder": str(tmp_path)}),
    )
    longest, row = max(lengths), sorted(lengths)[-4]
    long = sum(length > row for length in lengths)
    assert 0 < long < 4
    for seq_len, message in (
        (longest, ""),
        (
            row,
            f"{long} of 23 prompts take up to {longest} tokens, but the model was trained on "
            f"sequences of {row}: the answers may be poor\n",
        ),
    ):
        (tmp_path / "training.json").write_text(json.dumps({"step": 1, "row": seq_len}))
        runner.run_benchmark(checkpoint, questions, benchmark="contains", max_tokens=1)
        assert capsys.readouterr().err == message
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(UserError, match="training.json holds no step"):
        runner.check_prompt_lengths(checkpoint, lengths, 1)
    with pytest.raises(
        UserError,
        match=f"^{longest} tokens of prompt and --max_tokens=1048576 are more than 1,048,576 "
        "together$",
    ):
        runner.run_benchmark(checkpoint, questions, benchmark="contains", max_tokens=1 << 20)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"id": 1}\n',
            "line 1: not an answer, kind, prompt, answer, answers, tokens, cut missing or of the "
            "wrong type: {'id': 1}",
        ),
        ("[]\n", "line 1: not an answer"),
        ('{"id": 1\n{"id": 2}\n', "line 1: not JSON"),
        (2 * (json.dumps(ROW) + "\n"), "line 2: question x is answered twice"),
        (
            json.dumps(ROW | {"answer": 3, "cut": 0}) + "\n",
            "line 1: not an answer, answer, cut missing or of the wrong type",
        ),
        (
            json.dumps(ROW | {"answers": [3]}) + "\n",
            "line 1: not an answer, answers missing or of the wrong type",
        ),
        ("", "has no answers"),
    ],
)
def test_a_file_that_is_no_answers_jsonl_is_named(tmp_path, text, message):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        runner.rescore(tmp_path / "answers.jsonl", [], "exact")


def test_answers_are_scored_again_by_the_references_that_the_questions_have_now(
    checkpoint, questions, tmp_path
):
    rows = run_and_summarize(checkpoint, questions, tmp_path / "answers.jsonl")
    assert runner.rescore(tmp_path / "answers.jsonl", [], "contains") == rows
    taught = [
        question | {"answers": [row["answer"]]}
        for question, row in zip(questions, rows, strict=True)
    ]
    assert [
        row["score"] for row in runner.rescore(tmp_path / "answers.jsonl", taught, "exact")
    ] == [1.0] * 23
    with pytest.raises(UserError, match="has 23 answers, --questions 22 questions$"):
        runner.rescore(tmp_path / "answers.jsonl", questions[1:], "exact")
    with pytest.raises(
        UserError, match="has 23 answers, --questions 23 questions; not answered is new"
    ):
        runner.rescore(
            tmp_path / "answers.jsonl", [*questions[1:], questions[0] | {"id": "new"}], "exact"
        )


# ---- the page ----


def pictures_in(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    ]


def test_the_page_shows_the_worst_first_and_needs_nothing_but_itself(home, questions, monkeypatch):
    rows = [
        runner.make_result(question, runner.Answer(f"<b>{i}", 3, i == 1, question["question"]))
        | {"score": [None, 0.5, 0.0, 1.0, 0.25][i % 5]}
        for i, question in enumerate(questions)
    ]
    rows[7]["answers"] = []
    text = report.html_page(rows, questions, report.make_table(rows), "exact", "exam & <model>")
    assert (
        "<h1>exact: exam &amp; &lt;model&gt;" in text
        and "&lt;three&gt;" in text
        and "<b>7" not in text
        and "&lt;b&gt;7" in text
    )
    assert not re.search(r"https?://|<script|<link|url\(", text)
    scores = re.findall(r'class="score">([\w. ]+)<', text)
    assert scores == ["unparsed"] * 5 + ["0.00"] * 4 + ["0.25"] * 4 + ["0.50"] * 5 + [
        "1.00"
    ] * 4 + ["not scored"]
    assert text.count("(cut off)") == 1
    found = pictures_in(text)
    assert len(found) == sum(len(question["image"]) for question in questions) and {
        p.size for p in found
    } == {(12, 12), (50, 13), (11, 70)}
    monkeypatch.setattr(report, "MAX_QUESTIONS", 9)
    monkeypatch.setattr(report, "MAX_IMAGE_EDGE", 25)
    short = report.html_page(rows, questions, report.make_table(rows), "exact", "x")
    assert {p.size for p in pictures_in(short)} == {(12, 12), (25, 7), (4, 25)}
    assert short.count("<section>") == 9 and "the 9 worst of 23 questions" in short


# ---- ranks ----


def two(home, rank, world):
    """What two ranks do; the table that each of them gets is None but for the first."""
    checkpoint = load_checkpoint(home / "model")
    questions, did, how = (
        benchmarks.load_questions("contains", str(home / "questions.jsonl")),
        {},
        dict(benchmark="contains", max_tokens=12),
    )
    for count, out in ((23, home / "two.jsonl"), (3, home / "few.jsonl")):
        rows, about = runner.run_benchmark(
            checkpoint, questions[:count], rank, world, out=str(out), batch=4, **how
        )
        if rank == 0:
            runner.summarize(rows, about, questions[:count], "contains", out=str(out))
        did[out.stem, "rows"] = distributed.all_gather_object(rows and len(rows))
    did["ask"] = distributed.all_gather_object(
        runner.evaluate(checkpoint, questions, rank, world, batch=4, **how)
    )
    sharded = load_checkpoint(home / "model", dtype=None)
    model, mixed = distributed.wrap_model(sharded.model.train(), "fsdp", CPU, torch.float32)
    for batch in (4, 100):  # with a batch for one of two in the last round; with one in all
        did["fsdp", batch] = distributed.all_gather_object(
            runner.evaluate(sharded, questions, rank, world, autocast=mixed, batch=batch, **how)
        )
    broken = [
        questions[0],
        questions[5] | {"image": [image_refs.ImageBytes("torn.png", b"\x89PNG")]},
    ]
    try:
        runner.evaluate(checkpoint, broken, rank, world, batch=1, **how)
    except (UserError, SystemExit) as end:
        did["broken"] = distributed.all_gather_object((type(end).__name__, str(end)))
    with disk.lock_path(home / "two.jsonl") if rank == 0 else contextlib.nullcontext():
        did["held"] = distributed.all_gather_object(sitting(home / "two.jsonl", rank))
    did["score"] = distributed.all_gather_object(marking_again(home, "few"))
    did["no answers"] = distributed.all_gather_object(marking_again(home, "none"))
    return did


def sitting(out, rank):
    """What a rank ends with that would write answers to `out`."""
    try:
        with runner.lock_output(out, rank):
            return "it writes"
    except (UserError, SystemExit) as end:
        return type(end).__name__


def marking_again(home, name):
    """What `sample.py --score` prints on a rank, or what it ends with."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            sample.sample(score=str(home / f"{name}.jsonl"), device="cpu")
        except (UserError, SystemExit) as end:
            return type(end).__name__
    return output.getvalue()


@pytest.fixture(scope="module")
def ranks(home):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        __file__,
        str(home),
    ]
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests")]
    )  # pytest's own does not reach a process
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return torch.load(home / "two.pt", weights_only=False)


def test_ranks_share_the_questions_and_leave_the_same_bytes_as_one(
    ranks, home, checkpoint, questions, tmp_path
):
    run_and_summarize(checkpoint, questions, tmp_path / "one.jsonl")
    assert (home / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert ranks["two", "rows"] == [23, None] and ranks["few", "rows"] == [3, None], (
        "with less to do than there are ranks, too"
    )
    assert len((home / "few.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("how", ["ask", ("fsdp", 4), ("fsdp", 100)])
def test_a_sharded_model_in_training_gets_the_same_table(ranks, checkpoint, questions, how):
    table, other = ranks[how]
    assert (
        table == runner.evaluate(checkpoint, questions, benchmark="contains", max_tokens=12)
        and other is None
    )
    assert 0 < table[-1].score < 1


def test_an_image_that_one_rank_cannot_read_ends_all_ranks(ranks):
    assert sorted(name for name, _ in ranks["broken"]) == ["SystemExit", "UserError"]
    assert any("torn.png is" in text for _, text in ranks["broken"])


def test_a_file_that_another_process_holds_ends_all_ranks(ranks):
    assert ranks["held"] == ["UserError", "SystemExit"]


def test_answers_are_scored_again_once_on_any_number_of_ranks(ranks):
    first, other = ranks["score"]
    assert (
        len(first.splitlines()) > 1
        and first.splitlines()[-1].startswith("all            3 questions")
        and other == ""
    )
    assert ranks["no answers"] == ["UserError", "SystemExit"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    did = two(folder, *distributed.init_distributed(CPU))
    if distributed.dist.get_rank() == 0:
        torch.save(did, folder / "two.pt")
