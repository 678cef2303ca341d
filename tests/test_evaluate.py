"""An exam is read whole or refused by the question that is wrong, and each question counts once."""
import json

import pytest

from nanovlm import Mistake, evaluate

GOOD = {"id": "a", "question": "What?", "answers": ["milk"], "image": "a.jpg", "kind": "what"}


def turns(*said):
    return [{"from": who, "value": text} for who, text in zip(["human", "gpt", "human", "gpt"], said, strict=False)]


def read(tmp_path, text, **how):
    (tmp_path / "exam.json").write_text(text, encoding="utf-8")
    return evaluate.read_questions(tmp_path / "exam.json", **how)


def test_json_lines_and_a_list_in_llavas_format_are_the_same_exam(tmp_path):
    lines = [GOOD, {"id": 2, "question": "Ho\u2028w?", "answers": ["a", "b"]}, {**GOOD, "id": "c", "image": ["a.jpg", "b.jpg"]}]
    want = [{**GOOD, "image": ["a.jpg"]}, {"id": 2, "kind": "all", "image": [], "question": "Ho\u2028w?", "answers": ["a", "b"]},
            {**GOOD, "id": "c", "image": ["a.jpg", "b.jpg"]}]
    assert read(tmp_path, "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)) == want
    assert read(tmp_path, json.dumps(lines, indent=1)) == want
    llava = [{"id": "a", "image": "a.jpg", "label": "what", "conversations": turns("What?\n<image>", "milk", "Sure?", "yes")}]
    assert read(tmp_path, json.dumps(llava)) == [{**GOOD, "image": ["a.jpg"], "question": "What?\n<image>"}], "the picture stays where it was"
    assert read(tmp_path, json.dumps(llava), prompt="Say.")[0]["question"] == "Say."
    bare = [{"id": 1, "image": "a.jpg", "conversations": turns("<image>", "a cat")}]
    assert read(tmp_path, json.dumps(bare), prompt="Say.")[0]["question"] == "Say."


@pytest.mark.parametrize("text, said", [
    ("", "exam.json holds no questions"),
    ("[]", "exam.json holds no questions"),
    ("[{]", "exam.json: not JSON: "),
    (json.dumps(GOOD) + "\n{", "exam.json, line 2: not JSON: "),
    ("3", "exam.json, question 1 is not an object: 3"),
    ("[[]]", r"exam.json, question 1 is not an object: \[\]"),
    (json.dumps({"id": 1}), "exam.json, question 1: no question, answers"),
    (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "exam.json, question 2: the id a comes again"),
    (json.dumps([{**GOOD, "id": 1}, {**GOOD, "id": "1"}]), "exam.json, question 2: the id 1 comes again"),
    (json.dumps({**GOOD, "answers": "milk"}), "`answers` should be text that says something, not 'milk'"),
    (json.dumps({**GOOD, "answers": []}), r"`answers` should be text that says something, not \[None\]"),
    (json.dumps({**GOOD, "answers": ["milk", " "]}), "`answers` should be text that says something"),
    (json.dumps({**GOOD, "image": {"path": "a"}}), "`image` should be text"),
    (json.dumps({**GOOD, "image": [1]}), "`image` should be text"),
    (json.dumps({**GOOD, "question": None}), "`question` should be text"),
    (json.dumps({**GOOD, "question": "<image> "}), "`question` should be text that says something"),
    (json.dumps({**GOOD, "question": "<image> or <image>?"}), "question 1: 2 <image> in its text but 1 pictures"),
    (json.dumps([{"id": 1, "conversations": turns("What?")}]), "question 1: its first two turns are no question and answer"),
    (json.dumps([{"id": 1, "conversations": [{"from": "system", "value": "x"}, *turns("What?", "milk")]}]), "its first two turns are no question"),
    (json.dumps([{"id": 1, "conversations": "What?"}]), "its first two turns are no question and answer"),
])
def test_what_is_no_exam_is_named(tmp_path, text, said):
    with pytest.raises(Mistake, match=said) as mistake:
        read(tmp_path, text)
    assert "\n" not in str(mistake.value)


def test_bytes_that_are_no_text_and_benchmarks_that_are_not_known_are_named(tmp_path):
    (tmp_path / "exam.json").write_bytes(b"\xff\xfe")
    with pytest.raises(Mistake, match="exam.json is not text in UTF-8"):
        evaluate.read_questions(tmp_path / "exam.json")
    with pytest.raises(Mistake, match="--benchmark=extact is not known: exact, contains"):
        evaluate.read_questions(tmp_path / "exam.json", "extact")


@pytest.mark.parametrize("answer, golds, exact, contains", [
    ("milk", ["milk"], 1, 1),
    (" milk\n", ["egg", "milk "], 1, 1),
    ("Milk", ["milk"], 0, 1),
    ("a photo of a cat.", ["cat"], 0, 1),
    ("a catfish", ["cat"], 0, 0),
    ("the cats", ["cat"], 0, 0),
    ("cat_food", ["cat"], 0, 0),
    ("it costs 3.50 (about)", ["3.50 (about)"], 0, 1),
    ("", ["milk"], 0, 0),
    ("3450", ["3.50", "345"], 0, 0),
])
def test_marks(answer, golds, exact, contains):
    assert (evaluate.exact(answer, golds), evaluate.contains(answer, golds)) == (exact, contains)


def test_the_table_counts_each_question_once_in_its_kind_and_once_in_all():
    questions = [{"kind": kind} for kind in ("b", "a", "b", "b", "all")]
    assert evaluate.table(questions, [1, 0, 0, 1, 1]) == [("b", 3, 2 / 3), ("a", 1, 0.0), ("all", 5, 3 / 5)]
    with pytest.raises(ValueError):
        evaluate.table(questions, [1])
