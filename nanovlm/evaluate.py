"""Exam papers: reading the questions, marking the answers. The model is not known here; a door asks it and hands the answers over."""
import json
import re
from pathlib import Path

from . import Mistake


def read_questions(path, benchmark="exact", prompt=""):
    """[{id, kind, image (a list of paths), question, answers (any is right)}] from JSON lines of these, or from a JSON list in LLaVA's format.

    Of a LLaVA sample the first turn is the question and the reply to it the answer; its label, if it has one, is the kind. prompt: asked in
    place of every question. Raises Mistake, naming the question, for what cannot be read or marked, an id that comes again, an unknown benchmark.
    """
    if benchmark not in MARKS:
        raise Mistake(f"--benchmark={benchmark} is not known: {', '.join(MARKS)}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not text in UTF-8: {error}") from None
    questions = [read_question(record, f"{path}, question {number}", prompt) for number, record in enumerate(read_records(text, path), 1)]
    if not questions:
        raise Mistake(f"{path} holds no questions")
    seen = set()
    for number, question in enumerate(questions, 1):
        if str(question["id"]) in seen:
            raise Mistake(f"{path}, question {number}: the id {question['id']} comes again")
        seen.add(str(question["id"]))
    return questions


def read_records(text, path):
    """The records of a JSON list, or of a file with one on each line."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise Mistake(f"{path}: not JSON: {error}") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what splitlines takes for the end of a line
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise Mistake(f"{path}, line {number}: not JSON: {error}") from None
    return records


def read_question(record, where, prompt):
    if not isinstance(record, dict):
        raise Mistake(f"{where} is not an object: {record!r:.80}")
    match record:
        case {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}, *_]}:
            record = {**record, "question": asked, "answers": [answer], "kind": record.get("label", "all")}
        case {"conversations": _}:
            raise Mistake(f"{where}: its first two turns are no question and answer")
    missing = [key for key in ("id", "question", "answers") if key not in record]
    if missing:
        raise Mistake(f"{where}: no {', '.join(missing)}")
    image, answers = record.get("image", []), record["answers"]
    image = [image] if isinstance(image, str) else image
    question = prompt or record["question"]
    for name, texts in (("id", [str(record["id"])]), ("image", image), ("answers", answers or [None]), ("question", [question])):
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.replace("<image>", "").strip() for text in texts):
            raise Mistake(f"{where}: `{name}` should be text that says something, not {texts!r:.80}")
    if question.count("<image>") not in (0, len(image)):
        raise Mistake(f"{where}: {question.count('<image>')} <image> in its text but {len(image)} pictures")
    return {"id": record["id"], "kind": str(record.get("kind", "all")), "image": image, "question": question, "answers": answers}


def exact(answer, golds):
    """1.0 if the answer is one of the golds letter for letter, white space at the ends aside."""
    return float(answer.strip() in [gold.strip() for gold in golds])


def contains(answer, golds):
    """1.0 if one of the golds stands in the answer as whole words, whatever their case: "a photo of a cat." names a cat, "a catfish" does not."""
    return float(any(re.search(rf"(?<!\w){re.escape(gold.strip())}(?!\w)", answer, re.IGNORECASE) for gold in golds if gold.strip()))


MARKS = {"exact": exact, "contains": contains}


def table(questions, scores):
    """[(kind, questions of it, mean score)], the last row over all."""
    kinds = {}
    for question, score in zip(questions, scores, strict=True):
        kinds.setdefault(question["kind"], []).append(score)
    kinds["all"] = scores
    return [(kind, len(marks), sum(marks) / len(marks)) for kind, marks in kinds.items()]
