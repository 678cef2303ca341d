"""An evaluation answers each question once, on any number of ranks and despite interruptions.

Its answers equal those to single questions. All that two ranks do is in one launch of
this file, since most of a launch is the import of torch.
"""

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
from nanovlm.training.logger import read_training_log

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
RESULT = {
    "id": "x",
    "kind": "all",
    "prompt": "?",
    "answer": "egg",
    "answers": ["egg"],
    "tokens": 2,
    "cut": False,
}


def make_folder(folder):
    """A checkpoint whose tokens are bytes and often end, images of 3 sizes, and 23 questions."""
    words = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
    model = make_vlm(decoder={"vocab_size": words.vocab_size})
    with torch.no_grad():
        model.decoder.lm_head.weight[259] *= 2.5
        model.decoder.lm_head.weight[128:256] *= 0.5  # mostly letters
    shapes = {"vision": VISION, "decoder": DECODER | {"vocab_size": words.vocab_size}, "shuffle": 2}
    save_checkpoint(
        Checkpoint(model, words, shapes, IMAGE_CONFIG, "mistral", {"born": "here"}),
        folder / "model",
    )
    g = np.random.default_rng(0)
    for name, (width, height) in {"a": (12, 12), "b": (50, 13), "c": (11, 70)}.items():
        Image.fromarray(g.integers(256, size=(height, width, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
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
    write_questions(folder, records)
    generated = answers(
        load_checkpoint(folder / "model"),
        benchmarks.load_questions("exact", str(folder / "questions.jsonl")),
        max_tokens=12,
    )
    for i in (4, 5, 9, 13, 14, 17):  # these answers are right
        records[i]["answers"].append(generated[i].answer.strip() or "?")
    write_questions(folder, records)
    return folder


def write_questions(folder, records):
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in records)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(folder / "model")


@pytest.fixture(scope="module")
def questions(folder):
    return benchmarks.load_questions("contains", str(folder / "questions.jsonl"))


def with_tiles(checkpoint):
    """A model that cuts images into tiles: their number of tokens depends on their size."""
    return checkpoint._replace(image_config=TILES)


def answer_alone(checkpoint, question, **choices):
    """The answer as sample.py gives it."""
    images = [
        image_processing.load_image(ref.path, checkpoint.image_config) for ref in question["image"]
    ]
    parts = list(
        sample.stream_answer(checkpoint, [("user", question["question"])], images, **choices)
    )
    return "".join(parts)


def answers(checkpoint, questions, **how):
    """The Outputs, in the order of the questions."""
    found = sorted(
        pair for pairs in runner.answer_questions(checkpoint, questions, **how) for pair in pairs
    )
    assert [i for i, _ in found] == list(range(len(questions)))
    return [output for _, output in found]


# ---- answers ----


@pytest.mark.parametrize(
    "how", [{"max_tokens": 20}, {"max_tokens": 9, "temperature": 1.5, "seed": 3, "top_k": 50}]
)
@pytest.mark.parametrize("cut", [lambda checkpoint: checkpoint, with_tiles])
def test_many_answers_at_once_are_the_answers_one_by_one(checkpoint, questions, how, cut):
    checkpoint = cut(checkpoint)
    want = [answer_alone(checkpoint, question, **how) for question in questions]
    for batch in (1, 4, 100):
        output = answers(checkpoint, questions, batch_size=batch, **how)
        assert [one.answer for one in output] == want
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
        assert (output.cut, output.tokens, output.answer) == (
            cut,
            min(most, short.tokens),
            short.answer if not cut else output.answer,
        )
        assert short.answer.startswith(output.answer.rstrip("\ufffd"))


def test_blank_images_hides_the_images_and_nothing_else(checkpoint):
    def seen(color):
        return image_processing.ProcessedImage(
            np.full((1, 3, 12, 12), color, np.uint8), np.arange(4), (12, 12)
        )

    asked = [("<image>x", [seen(3)]), ("<image>x", [seen(250)]), ("y", [])]
    texts, blank, gray = (
        [one.answer for one in runner.generate_answers(checkpoint, what, max_tokens=20, **how)]
        for what, how in [
            (asked, {}),
            (asked, {"blank_images": True}),
            ([("<image>x", [seen(128)])], {}),
        ]
    )
    assert texts[0] != texts[1] and blank[0] == blank[1] == gray[0] and blank[2] == texts[2]


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


@pytest.mark.parametrize("cut", [lambda checkpoint: checkpoint, with_tiles])
def test_prompts_of_similar_length_share_a_batch(checkpoint, questions, cut):
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


def test_image_sizes_are_read_from_files_and_from_bytes(folder, tmp_path):
    content = (folder / "b.png").read_bytes()
    assert (
        runner.read_image_size(image_refs.ImageFile(str(folder / "b.png")))
        == runner.read_image_size(image_refs.ImageBytes("b", content))
        == (50, 13)
    )
    for ref in (
        image_refs.ImageBytes("b", b"no image"),
        image_refs.ImageFile(str(folder / "questions.jsonl")),
        image_refs.ImageFile(str(folder / "none.png")),
    ):
        with pytest.raises(
            UserError,
            match="b is not an image|questions.jsonl is not an image|none.png cannot be read",
        ):
            runner.read_image_size(ref)


# ---- scores ----


def scored(score, kind="all", answers=("x",), cut=False):
    return {"id": 1, "kind": kind, "answers": list(answers), "score": score, "cut": cut}


def test_the_table_counts_each_question_once_in_its_kind_and_once_in_all():
    rows = [scored(1, "b"), scored(0, "a", cut=True), scored(None, "b"), scored(0, "b"), scored(1)]
    b, a, every = report.make_table(rows)
    assert b[:3] == ("b", 3, 1 / 3) and a[:3] == ("a", 1, 0.0) and every[:3] == ("all", 5, 2 / 5)
    assert (b.unparsed, a.unparsed, every.unparsed) == (1 / 3, 0, 1 / 5), (
        "what cannot be parsed counts as 0"
    )
    assert (b.cut, a.cut, every.cut) == (0, 1, 1 / 5)
    assert (a.low, a.high) == (0, 0) and 0 <= b.low <= b.score <= b.high <= 1


def test_the_interval_is_as_wide_as_the_normal_approximation():
    """The mean of n answers, a share p right, has the deviation √(p (1 - p) / n): ± 1.96 of it."""
    rows = [scored(float(i % 4 == 0)) for i in range(1000)]
    line = report.make_table(rows, seed=1)[-1]
    half = 1.96 * (0.25 * 0.75 / 1000) ** 0.5
    assert (line.low, line.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.004)
    assert line == report.make_table(rows, seed=1)[-1] != report.make_table(rows, seed=2)[-1]


def test_an_answer_without_references_has_no_score():
    rows = benchmarks.score_results(
        [
            {**scored(None, answers=()), "answer": "x"},
            {**scored(None), "answer": "x"},
            {**scored(None), "answer": "y"},
        ],
        "exact",
    )
    assert [one["score"] for one in rows] == [None, 1.0, 0.0]
    line = report.make_table(rows)[-1]
    assert (line.questions, line.score, line.unparsed) == (3, 0.5, 0.0)
    assert report.make_table(rows[:1])[-1][2:6] == (None, None, None, None)


def test_captions_are_scored_all_at_once():
    """CIDEr's idf needs the whole corpus: a caption of all images has no weight."""
    rows = [
        {**scored(None), "answer": answer, "answers": references, "prompt": "?"}
        for answer, references in [
            ("a cat on a mat", ["a cat on a mat", "the cat sits"]),
            ("a dog", ["a bird flies", "a dog"]),
            ("nothing", ["a house", "some house"]),
        ]
    ]
    rows = benchmarks.score_results(rows, "captions")
    scores = [one["score"] for one in rows]
    assert scores[0] > scores[1] > scores[2] == 0
    captions, vqa = (benchmarks.BENCHMARKS[name] for name in ("captions", "vqa"))
    assert captions.is_caption and not vqa.is_caption
    output = report.format_table(report.make_table(rows), {}, "captions")
    mean = f"{100 * sum(scores) / 3:.1f}"
    assert (
        f"{mean:>6} CIDEr-D" in output
        and "do not compare it with scores over other images" in output
    )
    shares = re.findall(r"[\d.]+%.*?(?=$|   )", output.splitlines()[-2])
    assert shares == ["0.0% unparsed", "0.0% cut off"], "CIDEr-D is not a percentage"


# ---- an evaluation from beginning to end ----


def mock_model(monkeypatch, give):
    """Replaces the model: the answer is give(text of the question)."""
    monkeypatch.setattr(
        runner,
        "generate_answers",
        lambda checkpoint, prompts, **how: [
            runner.Output(text, give(text), 2, False) for text, _ in prompts
        ],
    )


def test_a_benchmark_is_reported_by_its_owners_metrics(
    folder, checkpoint, tmp_path, monkeypatch, capsys
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
        (tmp_path / path).write_bytes((text and text.encode()) or (folder / "a.png").read_bytes())
    tables = {}
    for name in ("pope", "mme"):
        questions = benchmarks.load_questions(name, str(tmp_path / name))
        mock_model(monkeypatch, lambda text: "Yes.")
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
    folder, checkpoint, tmp_path, monkeypatch, capsys
):
    records = [
        {"questionId": i, "question": text, "image": "documents/a.png"}
        for i, text in ((7, "What?"), (8, "When?"))
    ]
    (tmp_path / "test_v1.0.json").write_text(json.dumps({"data": records}))
    questions = benchmarks.load_questions(
        "docvqa", str(tmp_path / "test_v1.0.json"), images=str(folder)
    )
    mock_model(monkeypatch, lambda text: " 1993" if "When" in text else "milk\n")
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
        **{"max_tokens": 12, "batch_size": 4, **how},
    )
    runner.summarize(rows, about, questions, "contains", out=str(out))
    return rows


def test_an_interrupted_evaluation_resumes_to_the_same_bytes_and_answers_nothing_twice(
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
            file.write('{"id": "n0", "answer": "to')  # an incomplete line
    monkeypatch.setattr(runner, "generate_answers", until(100))
    capsys.readouterr()
    run_and_summarize(checkpoint, questions, out)
    assert sorted(prompts) == sorted(question["question"] for question in questions)
    assert (
        out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        and without_speed(last := capsys.readouterr().out) == table
    )
    metadata = out.with_suffix(".json").read_text()
    run_and_summarize(checkpoint, questions, out, batch_size=5)
    assert len(prompts) == 23, "a finished evaluation generates nothing"
    assert out.with_suffix(".json").read_text() == metadata and capsys.readouterr().out == last, (
        "and keeps its metadata"
    )
    one, other = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "stopped")
    )
    assert {
        name: one[name] for name in ("settings", "history", "versions", "table", "figures")
    } == {name: other[name] for name in ("settings", "history", "versions", "table", "figures")}


@pytest.mark.parametrize(
    "incomplete", ["", '{"id": "n0", "answer": "to', json.dumps(RESULT), "\0" * 9]
)
def test_an_evaluation_resumes_after_the_last_complete_line(tmp_path, incomplete):
    out, settings, question = (
        tmp_path / "answers.jsonl",
        {"benchmark": "exact"},
        {"id": "x", "question": "?"},
    )
    (tmp_path / "answers.json").write_text(json.dumps({"settings": settings}))
    whole = json.dumps(RESULT | {"id": "y"}) + "\n"
    out.write_text(whole + incomplete)
    with open(out, "a") as writer:
        assert list(
            runner.resume_answers(out, [question, question | {"id": "y"}], {"settings": settings})[
                1
            ]
        ) == [1]
        writer.write("more")
    assert out.read_text() == whole + "more"
    with pytest.raises(UserError, match=f"{out} answers question y, which is not in --questions"):
        runner.resume_answers(out, [question], {"settings": settings})


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
def test_a_file_that_is_not_an_answers_json_is_named(tmp_path, kept):
    (tmp_path / "answers.json").write_text(kept)
    with pytest.raises(
        UserError,
        match=f"^{tmp_path}/answers.json(, where the scores of .* belong, is something else| is not "
        "a JSON object)",
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


def test_an_evaluation_does_not_resume_with_other_images(
    folder, checkpoint, questions, tmp_path, monkeypatch
):
    """The same names and sizes: one number of the last pixel differs."""
    out = tmp_path / "answers.jsonl"
    rows = run_and_summarize(checkpoint, questions, out)
    out.write_text(runner.format_lines(rows[:9]))

    def answer_from(images):
        asked = benchmarks.load_questions(
            "contains", str(folder / "questions.jsonl"), images=str(images)
        )
        return run_and_summarize(checkpoint, asked, out)

    copied = tmp_path / "copied"
    shutil.copytree(folder, copied, ignore=lambda *_: ["model"])
    again = answer_from(copied)
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]
    assert str(copied) in again[0]["image"][0], "only the folder has another name"
    with Image.open(copied / "a.png") as image:
        pixels = np.asarray(image).copy()
    pixels[-1, -1, -1] ^= 1
    Image.fromarray(pixels).save(copied / "a.png")
    with pytest.raises(UserError, match=r"images was \d+ \(\w{8}\), now \d+ \(\w{8}\); choose"):
        answer_from(copied)


def test_progress_prints_speed_and_the_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    progress = report.EvaluationProgress(20, 4)
    assert progress.speeds() == {}, "no answer yet"
    clock[0] = 102.0
    outputs = [runner.Output("?", "x", 10, False)] * 4
    progress.update(outputs)
    assert capsys.readouterr().err == ""
    clock[0] = 106.0
    progress.update(outputs[:2])  # 6 in 6 s: one per second; 10 left
    output = capsys.readouterr().err
    assert output == "10/20 questions | 1.0 answers/s | 0:00:10 left\n"
    assert progress.speeds() == {"answers_per_s": 1.0, "tokens_per_s": 10.0}


def test_the_table_ends_with_the_speed_if_it_is_known():
    for speed, message in ((1234.5, "0.0% cut off   1,234 tokens/s"), (None, "0.0% cut off")):
        table = report.make_table([scored(1, "b"), scored(0, "a")])
        b, a, every = report.format_table(table, {}, "exact", speed).splitlines()
        assert every.endswith(message) and a.endswith("cut off") and b.endswith("cut off")


def test_a_terminal_is_not_controlled_by_a_kind(capsys):
    runner.summarize([scored(1.0, kind="a\x1b[2J\x9b")], {}, [], "exact")
    assert capsys.readouterr().out.startswith(r"a\x1b[2J\x9b ")


def test_versions_include_a_hash_of_our_files_and_pillows(tmp_path, monkeypatch):
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


def test_a_model_is_identified_by_the_content_of_its_files(folder, checkpoint, tmp_path):
    def known(folder, **change):
        there = checkpoint._replace(history={"folder": str(folder)}, **change)
        return runner.evaluation_settings(there, [], "exact", "", {})["model"]

    copied = tmp_path / "copy"
    shutil.copytree(folder / "model", copied, copy_function=shutil.copyfile)
    assert known(copied) == known(folder / "model") != known(copied, chat_template="plain")
    model = load_checkpoint(copied)
    with torch.no_grad():
        for (
            number
        ) in model.model.projector.parameters():  # as alignment changes it: the file keeps its size
            number += 1e-3
    save_checkpoint(model, copied)
    assert (copied / "model.safetensors").stat().st_size == (
        folder / "model" / "model.safetensors"
    ).stat().st_size
    assert known(copied) != known(folder / "model")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "sharded/rank-00000.safetensors"]
)
def test_each_byte_of_a_weights_file_counts(tmp_path, name):
    (tmp_path / "sharded").mkdir()
    content, known = bytearray(range(250)) * 4, []
    for place in (None, 0, 125, 999):
        changed = content.copy()
        if place is not None:
            changed[place] ^= 1
        (tmp_path / name).write_bytes(changed)
        known.append(str(runner.hash_weights(str(tmp_path))))
    (tmp_path / name).write_bytes(content[:-1])
    known.append(str(runner.hash_weights(str(tmp_path))))
    assert len(set(known)) == 5


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
            f"the longest prompt takes {longest} tokens, but the model was trained on sequences of "
            f"{row}: {long} of 23 answers may be poor\n",
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
        ('{"id": 1}\n', "line 1: not a line of answers, remove it: {'id': 1}"),
        ('{"id": 1\n{"id": 2}\n', "line 1: not JSON"),
        (2 * (json.dumps(RESULT) + "\n"), "line 2: question x is answered twice"),
        (json.dumps(RESULT | {"answer": 3}) + "\n", "line 1: not a line of answers"),
        (json.dumps(RESULT | {"cut": 0}) + "\n", "line 1: not a line of answers"),
        (json.dumps(RESULT | {"answers": [3]}) + "\n", "line 1: not a line of answers"),
        (json.dumps(RESULT | {"mean_logprob": "x"}) + "\n", "line 1: not a line of answers"),
        ("", "has no answers"),
    ],
)
def test_a_file_that_is_not_an_answers_jsonl_is_named(tmp_path, text, message):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        runner.rescore(tmp_path / "answers.jsonl", [], "exact")


@pytest.mark.parametrize("cut", [lambda checkpoint: checkpoint, with_tiles])
def test_the_mean_logprob_is_over_the_tokens_of_an_answer_with_its_end(checkpoint, questions, cut):
    """In a batch as one by one; without it, the answers are the same."""
    checkpoint = cut(checkpoint)
    outputs = answers(checkpoint, questions, batch_size=4, max_tokens=12, logprobs=True)
    assert len({output.tokens for output in outputs}) > 3
    plain = answers(checkpoint, questions, batch_size=4, max_tokens=12)
    assert [output._replace(mean_logprob=None) for output in outputs] == plain
    for question, output in zip(questions, outputs, strict=True):
        steps = []
        answer_alone(checkpoint, question, max_tokens=12, logprobs=steps)
        logprobs = [logprob for ((_, logprob),) in steps]
        assert len(logprobs) == output.tokens
        assert output.mean_logprob == pytest.approx(np.mean(logprobs), abs=1e-4)


def test_calibration_is_the_score_of_the_most_and_the_least_certain_third():
    lines = [(-0.1, 1), (-0.9, None), (-0.3, 0), (-0.2, 0.5), (-0.5, 0), (-0.7, 0.25)]
    rows = [scored(score) | {"mean_logprob": mean} for mean, score in lines]
    assert report.calibration(rows) == {
        "score of the most certain third": 0.75,  # -0.1 and -0.2
        "score of the least certain third": 0.125,  # -0.9, which is unparsed, and -0.7
    }
    assert report.calibration(rows[:5]) == {  # a third of five is one answer
        "score of the most certain third": 1.0,
        "score of the least certain third": 0.0,
    }
    assert report.calibration(rows[:2]) == report.calibration([scored(1)] * 6) == {}


def test_the_mean_logprob_is_kept_in_each_line_if_asked_for(
    checkpoint, questions, tmp_path, capsys
):
    kept, plain = tmp_path / "kept.jsonl", tmp_path / "plain.jsonl"
    rows = run_and_summarize(checkpoint, questions, kept, logprobs=True)
    table = capsys.readouterr().out
    means = [row.pop("mean_logprob") for row in rows]
    assert rows == run_and_summarize(checkpoint, questions, plain) and len(set(means)) > 10
    for name, score in report.calibration(list(runner.read_results(kept))).items():
        assert f"{name}: {score:.5g}\n" in table and name not in capsys.readouterr().out
    again = runner.rescore(kept, questions, "contains")
    assert [row.pop("mean_logprob") for row in again] == means and again == rows
    with pytest.raises(UserError, match="logprobs was True, now None; choose"):
        run_and_summarize(checkpoint, questions, kept)
    with pytest.raises(UserError, match="logprobs was None, now True; choose"):
        run_and_summarize(checkpoint, questions, plain, logprobs=True)
    whole = kept.read_text()
    kept.write_text("".join(whole.splitlines(keepends=True)[:8]))
    run_and_summarize(checkpoint, questions, kept, logprobs=True)
    for one, other in zip(
        runner.read_results(kept), map(json.loads, whole.splitlines()), strict=True
    ):
        assert one == other | {"mean_logprob": pytest.approx(other["mean_logprob"], abs=1e-4)}


def test_answers_are_scored_again_by_the_references_of_the_questions(
    checkpoint, questions, tmp_path
):
    rows = run_and_summarize(checkpoint, questions, tmp_path / "answers.jsonl")
    assert runner.rescore(tmp_path / "answers.jsonl", [], "contains") == rows
    corrected = [
        question | {"answers": [row["answer"]]}
        for question, row in zip(questions, rows, strict=True)
    ]
    assert [
        row["score"] for row in runner.rescore(tmp_path / "answers.jsonl", corrected, "exact")
    ] == [1.0] * 23
    with pytest.raises(UserError, match="answers question n0, which is not in --questions"):
        runner.rescore(tmp_path / "answers.jsonl", questions[1:], "exact")
    with pytest.raises(
        UserError, match="has 23 answers, --questions 24 questions; not answered is new"
    ):
        new = questions[0] | {"id": "new"}
        runner.rescore(tmp_path / "answers.jsonl", [*questions, new], "exact")


@pytest.mark.parametrize("line", [b"null", b"7", b"[]", b"\xff", b'{"id": %s}' % (b"1" * 5000)])
def test_a_broken_line_of_answers_or_of_a_log_is_named(tmp_path, line):
    """Of any file of JSON lines; a last line without its end is what a killed run leaves."""
    for name, read in {
        "answers.jsonl": runner.read_results,
        "log.jsonl": read_training_log,
    }.items():
        path = tmp_path / name
        path.write_bytes(line + b"\n")
        with pytest.raises(UserError, match=rf"{name}, line 1: not .*; remove the line$"):
            list(read(path))


# ---- ranks ----


def run_rank(folder, rank):
    """What each of two ranks does."""
    checkpoint = load_checkpoint(folder / "model")
    questions, results, how = (
        benchmarks.load_questions("contains", str(folder / "questions.jsonl")),
        {},
        dict(benchmark="contains", max_tokens=12),
    )
    for count, out in ((23, folder / "two.jsonl"), (3, folder / "few.jsonl")):
        rows, about = runner.run_benchmark(
            checkpoint, questions[:count], out=str(out), batch_size=4, **how
        )
        if rank == 0:
            runner.summarize(rows, about, questions[:count], "contains", out=str(out))
        results[out.stem, "rows"] = distributed.all_gather_object(rows and len(rows))
    results["evaluate"] = distributed.all_gather_object(
        runner.evaluate(checkpoint, questions, batch_size=4, **how)
    )
    sharded = load_checkpoint(folder / "model", dtype=None)
    model, mixed = distributed.wrap_model(sharded.model.train(), "fsdp", CPU, torch.float32)
    for batch in (4, 100):  # the last round has one batch; there is one batch in all
        results["fsdp", batch] = distributed.all_gather_object(
            runner.evaluate(sharded, questions, autocast=mixed, batch_size=batch, **how)
        )
    broken = [
        questions[0],
        questions[5] | {"image": [image_refs.ImageBytes("torn.png", b"\x89PNG")]},
    ]
    try:
        runner.evaluate(checkpoint, broken, batch_size=1, **how)
    except (UserError, SystemExit) as end:
        results["broken"] = distributed.all_gather_object((type(end).__name__, str(end)))
    with disk.lock_path(folder / "two.jsonl") if rank == 0 else contextlib.nullcontext():
        results["locked"] = distributed.all_gather_object(try_to_lock(folder / "two.jsonl"))
    results["score"] = distributed.all_gather_object(score_again(folder, "few"))
    results["no answers"] = distributed.all_gather_object(score_again(folder, "none"))
    return results


def try_to_lock(out):
    """The name of the exception of a rank that locks `out`."""
    try:
        with runner.lock_output(out):
            return "it writes"
    except (UserError, SystemExit) as end:
        return type(end).__name__


def score_again(folder, name):
    """What `sample.py --score` prints on a rank, or what it ends with."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            sample.sample(score=str(folder / f"{name}.jsonl"), device="cpu")
        except (UserError, SystemExit) as end:
            return type(end).__name__
    return output.getvalue()


@pytest.fixture(scope="module")
def ranks(folder):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        __file__,
        str(folder),
    ]
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests")]
    )  # pytest's sys.path does not reach a process
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "two.pt", weights_only=False)


def test_ranks_share_the_questions_and_leave_the_same_bytes_as_one(
    ranks, folder, checkpoint, questions, tmp_path
):
    run_and_summarize(checkpoint, questions, tmp_path / "one.jsonl")
    assert (folder / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert ranks["two", "rows"] == [23, 23] and ranks["few", "rows"] == [3, 3], (
        "also with fewer batches than ranks"
    )
    assert len((folder / "few.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("how", ["evaluate", ("fsdp", 4), ("fsdp", 100)])
def test_a_sharded_model_in_training_gets_the_same_table(ranks, checkpoint, questions, how):
    table, other = ranks[how]
    assert (
        table == runner.evaluate(checkpoint, questions, benchmark="contains", max_tokens=12)
        and other == table
    )
    assert 0 < table[-1].score < 1


def test_an_image_that_one_rank_cannot_read_ends_all_ranks(ranks):
    assert sorted(name for name, _ in ranks["broken"]) == ["SystemExit", "UserError"]
    assert any("torn.png is" in text for _, text in ranks["broken"])


def test_a_file_that_another_process_locks_ends_all_ranks(ranks):
    assert ranks["locked"] == ["UserError", "SystemExit"]


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
    results = run_rank(folder, distributed.init_distributed(CPU)[0])
    if distributed.dist.get_rank() == 0:
        torch.save(results, folder / "two.pt")
