"""Exam papers: the questions of each benchmark, read as its owner publishes them, and the answers as its owner wants them handed in.

What a benchmark is stands in BENCHMARKS, a few lines each. Neither the model is known here nor how an answer is marked: that is scores.py.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from .. import UserError
from ..data.chat_template import CAPTION_PROMPT, LETTER_PROMPT, SHORT_PROMPT
from ..data.image_refs import one_line
from ..preprocess.records import LETTERS, first_field
from . import metrics
from .formats import (
    parse_ai2d,
    parse_user_questions,
    parse_split_files,
    parse_coco,
    read_document,
    parse_records,
    parse_mathvista,
    parse_mme,
    parse_mmmu,
    parse_mmstar,
    find_image,
    parse_realworldqa,
    find_question_files,
    parse_vqav2,
)

WORD_PROMPT = (
    "Answer the question using a single word, phrase, or number."  # TextVQA, DocVQA, InfoVQA
)
TEXT_METRICS = (
    "vqa",
    "textvqa",
    "anls",
    "relaxed",
)  # scores of whole texts, where an owner's blank answer does no harm: to others it is in every answer


class Benchmark(NamedTuple):
    """Where its owner keeps what. Two names of a field are those of two editions, of which a record has one."""

    score: str  # its name in scores.py
    prompt: str = ""  # stands after the question
    files: tuple = ("*.jsonl", "*.json")  # of a folder or a zip: the first pattern that matches any
    layout: Callable = parse_records
    notes: tuple = ()  # likewise of the annotations, if they are apart
    id: str = "id"  # "": questions are counted
    image: str = "image"
    forms: tuple = ("{}",)  # of a picture's path
    question: str = "question"
    answers: str = "answers answer"
    kind: str = "kind"
    keep: tuple = ()  # what else the score needs
    mine: bool = (
        False  # anybody's questions: --prompt takes their place, and each has a list of answers
    )
    spoken: bool = False  # the question says its choices already
    openly: str = ""  # in place of the prompt where there are no choices
    secret: tuple = ()  # what stands for an answer where the test's are not published
    submission: tuple = ()  # the names of id and answer in what is handed in


BENCHMARKS = {
    "exact": Benchmark("exact", layout=parse_user_questions, mine=True),
    "contains": Benchmark("contains", layout=parse_user_questions, mine=True),
    "vqa": Benchmark("vqa", SHORT_PROMPT, layout=parse_user_questions, mine=True),
    "letters": Benchmark("letters", LETTER_PROMPT, layout=parse_user_questions, mine=True),
    "captions": Benchmark("captions", layout=parse_user_questions, mine=True),
    "coco": Benchmark(
        "captions",
        files=("dataset_coco.json", "coco_karpathy_test.json", "captions_val2014.json"),
        layout=parse_coco,
        notes=("captions_val2014.json",),
        forms=("val2014/{name}", "{name}"),
        mine=True,
        submission=("image_id", "caption"),
    ),
    "vqav2": Benchmark(
        "vqa",
        SHORT_PROMPT,
        ("*val2014_questions.json", "*test2015_questions.json"),
        parse_vqav2,
        ("*val2014_annotations.json",),
        id="question_id",
        forms=("val2014/{}", "test2015/{}", "{}"),
        secret=(None,),
        submission=("question_id", "answer"),
    ),
    "textvqa": Benchmark(
        "textvqa",
        WORD_PROMPT,
        ("TextVQA_*_val.json",),
        id="question_id",
        image="image_id",
        forms=("train_images/{}.jpg", "test_images/{}.jpg", "{}.jpg"),
        secret=(None,),
    ),
    "chartqa": Benchmark(
        "relaxed",
        SHORT_PROMPT,
        ("test_*.json",),
        parse_split_files,
        image="imgname",
        forms=("png/{}", "{}"),
        question="query",
        answers="label",
    ),
    "docvqa": Benchmark(
        "anls",
        WORD_PROMPT,
        ("val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json"),
        id="questionId",
        forms=("spdocvqa_images/{name}", "{}", "{name}"),
        secret=(None,),
        submission=("questionId", "answer"),
    ),
    "infovqa": Benchmark(
        "anls",
        WORD_PROMPT,
        ("infographic*_val_v1.0*.json", "infographic*_test_v1.0.json"),
        id="questionId",
        image="image_local_name",
        forms=("infographicsvqa_images/{}", "{}"),
        secret=(None,),
        submission=("questionId", "answer"),
    ),
    "ai2d": Benchmark(
        "letters", LETTER_PROMPT, ("questions/*.json",), parse_ai2d, ("ai2d_test_ids.csv",)
    ),
    "mmmu": Benchmark(
        "mmmu",
        LETTER_PROMPT,
        ("validation-*.parquet", "test-*.parquet"),
        parse_mmmu,
        secret=("?",),
        openly=SHORT_PROMPT,
    ),
    "mmstar": Benchmark(
        "letters", LETTER_PROMPT, ("mmstar.parquet",), parse_mmstar, id="index", kind="category"
    ),
    "ocrbench": Benchmark(
        "ocrbench",
        files=("OCRBench.json", "test-*.parquet"),
        id="",
        image="image_path image",
        forms=("OCRBench_Images/{}", "{}"),
        kind="type question_type",
        keep=("dataset_name dataset",),
    ),
    "pope": Benchmark(
        "yesno",
        SHORT_PROMPT,
        ("coco_pope_*.json",),
        parse_split_files,
        forms=("val2014/{}", "{}"),
        question="text",
        answers="label",
    ),
    "mme": Benchmark("mme", SHORT_PROMPT, ("MME_Benchmark/*.txt", "*.txt"), parse_mme),
    "mathvista": Benchmark(
        "mathvista",
        files=("testmini*.parquet", "*testmini.json"),
        layout=parse_mathvista,
        id="pid",
        image="decoded_image image",
        forms=("{}", "{name}"),
        question="query",
        keep=("answer_type", "precision"),
        secret=(None, ""),
    ),
    "realworldqa": Benchmark(
        "letters",
        files=("annotations.json*", "test-*.parquet"),
        layout=parse_realworldqa,
        id="",
        forms=("images/{}", "{}"),
        spoken=True,
    ),
}


def load_questions(name, questions, annotations="", images="", prompt=""):
    """[{id, kind, image (refs), question (what is put to the model, <image> where a picture belongs), answers (golds; none if they are secret),
    choices (none unless it is a matter of choosing), and what else the score needs}] of a benchmark.

    questions, annotations: each a file, a folder or a zip, as its owner publishes them, or a part of these (see `sheets`). images: a folder or a
    zip, if pictures are not beside the questions. prompt: asked in place of the benchmark's own, which stands after a question; of anybody's
    questions, in their place. Raises UserError, naming the question, for what cannot be read or marked, a picture that is missing, an id that comes
    again.
    """
    benchmark = find_benchmark(name)
    if annotations and not benchmark.notes:
        raise UserError(
            f"--annotations={annotations}: of {name}, the answers are with the questions"
        )
    notes, *more = map(read_document, find_question_files(annotations, benchmark.notes)) if annotations else [None]
    if more:
        raise UserError(
            f"--annotations={annotations} are {1 + len(more)} files: name the one that goes with the questions"
        )
    rows, seen, paths = [], {}, 0
    for sheet in find_question_files(questions, benchmark.files):
        for number, record in enumerate(read_benchmark(name, sheet, notes, annotations), 1):
            where = f"{sheet.name}, question {number}"
            row = make_question(benchmark, record, len(rows), prompt, where)
            if (before := seen.setdefault(str(row["id"]), where)) != where:
                raise UserError(f"{where}: the id {row['id']} comes again, after {before}")
            paths += sum(isinstance(value, str) for value in row["image"])
            rows.append(
                row
                | {
                    "image": [
                        find_image(value, benchmark.forms, sheet, images, where)
                        for value in row["image"]
                    ]
                }
            )
    if not rows:
        raise UserError(f"{questions} holds no questions")
    secret = [row["id"] for row in rows if not row["answers"]]
    if 0 < len(secret) < len(rows):
        raise UserError(
            f"{questions}: {len(secret):,} of {len(rows):,} questions have no answers, the first is {secret[0]}"
        )
    if images and not paths:
        raise UserError(
            f"--images={images}: no question of {questions} names a picture, each brings its own or has none"
        )
    return rows


def find_benchmark(name):
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark={name} is not known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_benchmark(name, sheet, notes, annotations):
    """Of a file, in the benchmark's layout; UserError if it is in no such."""
    try:
        yield from BENCHMARKS[name].layout(read_document(sheet), sheet, notes)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        files = f"{sheet.name} and {annotations} are" if annotations else f"{sheet.name} is"
        raise UserError(
            f"{files} not laid out as {name}'s owner does it: {type(error).__name__}: {one_line(error):.200}"
        ) from None


def make_question(benchmark, record, count, prompt, where):
    """A row of `read`, its pictures still as the record has them."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object: {record!r:.80}")
    told = {
        part: first_field(record, *getattr(benchmark, part).split())
        for part in ("id", "image", "question", "answers", "kind")
    }
    whole = prompt if benchmark.mine else ""
    told["id"] = told["id"] if benchmark.id else count
    told["question"] = (
        whole or told["question"] or (CAPTION_PROMPT if benchmark.score == "captions" else None)
    )
    image = (
        []
        if told["image"] is None
        else told["image"]
        if type(told["image"]) is list
        else [told["image"]]
    )  # a ref is a tuple
    blind = benchmark.mine and benchmark.score != "captions"  # may be asked without a picture
    needed = [
        "id",
        "question",
        *["answers"] * (None not in benchmark.secret),
        *["image"] * (not blind),
    ]
    if missing := [part for part in needed if (told | {"image": image or None})[part] is None]:
        raise UserError(f"{where}: no {', '.join(missing)}; it has {', '.join(record)}")
    choices, answers = (
        [] if record.get("choices") is None else record["choices"],
        read_references(benchmark, told["answers"]),
    )
    kind = "all" if told["kind"] in (None, "") else told["kind"]
    check_labels(where, id=told["id"], kind=kind)
    check_texts(where, question=told["question"])
    check_texts(
        where,
        not benchmark.mine and benchmark.score in TEXT_METRICS,
        answers=answers or [None] * benchmark.mine,
    )
    check_texts(where, True, choices=choices)
    text = whole or format_question(
        benchmark,
        told["question"],
        choices,
        prompt or (benchmark.prompt if choices else benchmark.openly or benchmark.prompt),
    )
    if text.count("<image>") not in (0, len(image)):
        raise UserError(
            f"{where}: {text.count('<image>')} <image> in its text but {len(image)} pictures"
        )
    text = text if "<image>" in text else "<image>\n" * len(image) + text
    more = {names.split()[0]: first_field(record, *names.split()) for names in benchmark.keep}
    row = {
        "id": told["id"],
        "kind": str(kind),
        "image": image,
        "question": text,
        "answers": answers,
        "choices": choices,
        **more,
    }
    if answers:
        metrics.check_reference(benchmark.score, row, where)
    return row


def read_references(benchmark, told):
    """The answers as a list of texts, of which VQAv2 has each in an object; none where the test's are secret."""
    if benchmark.mine:
        return told
    if told in benchmark.secret:
        return []
    told = (
        told if isinstance(told, list) and told else [told]
    )  # an empty list is no secret: it is kept, and refused
    texts = [text.get("answer") if isinstance(text, dict) else text for text in told]
    return [str(text) if isinstance(text, int | float) else text for text in texts]


def check_texts(where, may_be_blank=False, **parts):
    """Raise UserError for a question that is no text, and for answers and choices that are no list of texts."""
    for name, value in parts.items():
        wanted, texts = (
            ("text that says", [value])
            if name == "question"
            else ("a list of texts that say", value)
        )
        if not isinstance(texts, list) or not all(
            is_valid_text(text) and (may_be_blank or text.replace("<image>", "").strip())
            for text in texts
        ):
            raise UserError(f"{where}: `{name}` should be {wanted} something, not {value!r:.80}")


def is_valid_text(value):
    """Half a character of UTF-16, which JSON can spell, cannot be written or read by a tokenizer."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def check_labels(where, **names):
    for part, name in names.items():
        if (
            isinstance(name, bool)
            or not isinstance(name, str | int | float)
            or not (str(name).isprintable() and str(name).strip())
        ):
            raise UserError(
                f"{where}: `{part}` should be a number or a line of text, not {name!r:.80}"
            )


def format_question(benchmark, asked, choices, prompt):
    """A question, its choices if these decide, a line each, and how to answer unless it says so already."""
    if len(choices) > len(LETTERS):
        raise UserError(
            f"a question has {len(choices)} choices, the letters are {len(LETTERS)}: {asked[:80]!r}"
        )
    listed = choices if benchmark.score in ("letters", "mmmu") and not benchmark.spoken else []
    lines = [asked, *(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(listed))]
    return "\n".join(lines if not prompt or asked.endswith(prompt) else [*lines, prompt])


def format_submission(name, rows):
    """What is handed in where the answers are secret, as JSON; rows: an id and an answer each."""
    names = find_benchmark(name).submission
    if not names:
        known = ", ".join(other for other, benchmark in BENCHMARKS.items() if benchmark.submission)
        raise UserError(f"--submission: {name} has no form of its own; {known} have")
    return json.dumps(
        [dict(zip(names, (row["id"], row["answer"].strip()), strict=True)) for row in rows]
    )
