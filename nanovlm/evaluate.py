"""Exam papers: reading the questions, marking the answers. The model is not known here; a door asks it and hands the answers over."""
import json
from pathlib import Path

from . import Mistake


def read_questions(path):
    """JSON lines of id, image (a path or a list of them), question, answers (any of them is right), and perhaps a kind."""
    questions = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise Mistake(f"{path}, line {number}: not JSON: {error}") from None
        missing = [key for key in ("id", "question", "answers") if key not in record]
        if missing:
            raise Mistake(f"{path}, line {number}: no {', '.join(missing)}")
        image = record.get("image", [])
        questions.append({"kind": "all", **record, "image": [image] if isinstance(image, str) else image})
    return questions


def exact(answer, golds):
    """1.0 if the answer is one of the golds letter for letter, white space at the ends aside."""
    return float(answer.strip() in [gold.strip() for gold in golds])


def table(questions, scores):
    """[(kind, questions of it, mean score)], the last row over all."""
    kinds = {}
    for question, score in zip(questions, scores, strict=True):
        kinds.setdefault(question["kind"], []).append(score)
    rows = [(kind, len(marks), sum(marks) / len(marks)) for kind, marks in kinds.items()]
    return [*rows, ("all", len(scores), sum(scores) / len(scores))]
