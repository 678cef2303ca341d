"""The benchmarks: for each, the files of its questions, its prompt, and the metric of its answers.

A benchmark is one entry of BENCHMARKS. formats.py parses its files, metrics.py scores its answers.
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
    find_image,
    find_question_files,
    parse_ai2d,
    parse_coco,
    parse_mathvista,
    parse_mme,
    parse_mmmu,
    parse_mmstar,
    parse_realworldqa,
    parse_records,
    parse_split_files,
    parse_user_questions,
    parse_vqav2,
    read_document,
)

# TextVQA, DocVQA, InfoVQA
WORD_PROMPT = "Answer the question using a single word, phrase, or number."
# Metrics that compare whole texts. One of their references may be blank; for other metrics, every
# answer would contain it.
TEXT_METRICS = ("vqa", "textvqa", "anls", "relaxed")


class Benchmark(NamedTuple):
    """The files of a benchmark and their keys, its prompt, and its metric.

    A key that is two names, such as "answers answer", is that of two editions: a record has one.
    """

    metric: str  # its name in metrics.METRICS, or captions
    prompt: str = ""  # follows the question
    files: tuple = ("*.jsonl", "*.json")  # in a folder or zip: the first pattern that matches
    parse: Callable = parse_records  # returns the records of a file
    annotation_files: tuple = ()  # like files, if the references are in a separate file
    id_key: str = "id"  # "": the questions are numbered
    image_key: str = "image"
    image_paths: tuple = ("{}",)  # the paths at which an image of this name may be
    question_key: str = "question"
    answers_key: str = "answers answer"
    kind_key: str = "kind"
    extra_keys: tuple = ()  # what else the metric needs
    from_user: bool = False  # a user's own questions: --prompt replaces them
    choices_in_question: bool = False  # the question already lists its choices
    open_prompt: str = ""  # replaces the prompt if a question has no choices
    hidden_answers: tuple = ()  # what stands for an answer that is not published
    submission_keys: tuple = ()  # the names of id and answer in a submission


BENCHMARKS = {
    "exact": Benchmark("exact", parse=parse_user_questions, from_user=True),
    "contains": Benchmark("contains", parse=parse_user_questions, from_user=True),
    "vqa": Benchmark("vqa", SHORT_PROMPT, parse=parse_user_questions, from_user=True),
    "letters": Benchmark("letters", LETTER_PROMPT, parse=parse_user_questions, from_user=True),
    "captions": Benchmark("captions", parse=parse_user_questions, from_user=True),
    "coco": Benchmark(
        "captions",
        files=("dataset_coco.json", "coco_karpathy_test.json", "captions_val2014.json"),
        parse=parse_coco,
        annotation_files=("captions_val2014.json",),
        image_paths=("val2014/{name}", "{name}"),
        from_user=True,
        submission_keys=("image_id", "caption"),
    ),
    "vqav2": Benchmark(
        "vqa",
        SHORT_PROMPT,
        ("*val2014_questions.json", "*test2015_questions.json"),
        parse_vqav2,
        ("*val2014_annotations.json",),
        id_key="question_id",
        image_paths=("val2014/{}", "test2015/{}", "{}"),
        hidden_answers=(None,),
        submission_keys=("question_id", "answer"),
    ),
    "textvqa": Benchmark(
        "textvqa",
        WORD_PROMPT,
        ("TextVQA_*_val.json",),
        id_key="question_id",
        image_key="image_id",
        image_paths=("train_images/{}.jpg", "test_images/{}.jpg", "{}.jpg"),
        hidden_answers=(None,),
    ),
    "chartqa": Benchmark(
        "relaxed",
        SHORT_PROMPT,
        ("test_*.json",),
        parse_split_files,
        image_key="imgname",
        image_paths=("png/{}", "{}"),
        question_key="query",
        answers_key="label",
    ),
    "docvqa": Benchmark(
        "anls",
        WORD_PROMPT,
        ("val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json"),
        id_key="questionId",
        image_paths=("spdocvqa_images/{name}", "{}", "{name}"),
        hidden_answers=(None,),
        submission_keys=("questionId", "answer"),
    ),
    "infovqa": Benchmark(
        "anls",
        WORD_PROMPT,
        ("infographic*_val_v1.0*.json", "infographic*_test_v1.0.json"),
        id_key="questionId",
        image_key="image_local_name",
        image_paths=("infographicsvqa_images/{}", "{}"),
        hidden_answers=(None,),
        submission_keys=("questionId", "answer"),
    ),
    "ai2d": Benchmark(
        "letters", LETTER_PROMPT, ("questions/*.json",), parse_ai2d, ("ai2d_test_ids.csv",)
    ),
    "mmmu": Benchmark(
        "mmmu",
        LETTER_PROMPT,
        ("validation-*.parquet", "test-*.parquet"),
        parse_mmmu,
        open_prompt=SHORT_PROMPT,
        hidden_answers=("?",),
    ),
    "mmstar": Benchmark(
        "letters",
        LETTER_PROMPT,
        ("mmstar.parquet",),
        parse_mmstar,
        id_key="index",
        kind_key="category",
    ),
    "ocrbench": Benchmark(
        "ocrbench",
        files=("OCRBench.json", "test-*.parquet"),
        id_key="",
        image_key="image_path image",
        image_paths=("OCRBench_Images/{}", "{}"),
        kind_key="type question_type",
        extra_keys=("dataset_name dataset",),
    ),
    "pope": Benchmark(
        "yesno",
        SHORT_PROMPT,
        ("coco_pope_*.json",),
        parse_split_files,
        image_paths=("val2014/{}", "{}"),
        question_key="text",
        answers_key="label",
    ),
    "mme": Benchmark("mme", SHORT_PROMPT, ("MME_Benchmark/*.txt", "*.txt"), parse_mme),
    "mathvista": Benchmark(
        "mathvista",
        files=("testmini*.parquet", "*testmini.json"),
        parse=parse_mathvista,
        id_key="pid",
        image_key="decoded_image image",
        image_paths=("{}", "{name}"),
        question_key="query",
        extra_keys=("answer_type", "precision"),
        hidden_answers=(None, ""),
    ),
    "realworldqa": Benchmark(
        "letters",
        files=("annotations.json*", "test-*.parquet"),
        parse=parse_realworldqa,
        id_key="",
        image_paths=("images/{}", "{}"),
        choices_in_question=True,
    ),
}


def find_benchmark(name):
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark={name} is not known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_questions(name, questions, annotations="", images="", prompt=""):
    """Returns the questions of a benchmark, a dict each:

    id, kind
    image      refs to the images
    question   the text for the model, with <image> for each image
    answers    the references; [] if they are not published
    choices    [] unless it is multiple choice
    and the benchmark's extra_keys.

    questions, annotations: each a file, a folder or a zip as published, or a part of it (see
    find_question_files). images: a folder or zip, if the images are not beside the questions.
    prompt: replaces the benchmark's prompt; for a user's own questions, it replaces the questions.
    Raises UserError, naming the question, for a question that cannot be parsed or scored, a missing
    image, or a repeated id.
    """
    benchmark = find_benchmark(name)
    notes = read_annotations(name, annotations) if annotations else None
    result, seen, path_count = [], {}, 0
    for file in find_question_files(questions, benchmark.files):
        records = read_benchmark(name, file, notes, annotations)
        for number, record in enumerate(records, 1):
            where = f"{file.name}, question {number}"
            entry = make_question(benchmark, record, len(result), prompt, where)
            before = seen.setdefault(str(entry["id"]), where)
            if before != where:
                raise UserError(f"{where}: the id {entry['id']} is already that of {before}")
            path_count += sum(isinstance(value, str) for value in entry["image"])
            entry["image"] = [
                find_image(value, benchmark.image_paths, file, images, where)
                for value in entry["image"]
            ]
            result.append(entry)
    if not result:
        raise UserError(f"{questions} has no questions")
    hidden = [entry["id"] for entry in result if not entry["answers"]]
    if 0 < len(hidden) < len(result):
        raise UserError(
            f"{questions}: {len(hidden):,} of {len(result):,} questions have no answers, the first "
            f"is {hidden[0]}"
        )
    if images and not path_count:
        raise UserError(
            f"--images={images}: no question of {questions} has the path of an image: leave it out"
        )
    return result


def read_annotations(name, annotations):
    patterns = BENCHMARKS[name].annotation_files
    if not patterns:
        raise UserError(
            f"--annotations={annotations}: the answers of {name} are in its questions: leave it out"
        )
    files = find_question_files(annotations, patterns)
    if len(files) > 1:
        raise UserError(
            f"--annotations={annotations} has {len(files)} files: name the one of these questions"
        )
    return read_document(files[0])


def read_benchmark(name, file, notes, annotations):
    """Yields the records of a file. Raises UserError if it is not in the benchmark's format."""
    try:
        yield from BENCHMARKS[name].parse(read_document(file), file, notes)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        files = f"{file.name} and {annotations} are" if annotations else f"{file.name} is"
        raise UserError(
            f"{files} not in the format that {name} is published in: {type(error).__name__}: "
            f"{one_line(error):.200}"
        ) from None


def make_question(benchmark, record, count, prompt, where):
    """Returns an entry of load_questions, its images still as in the record."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object: {record!r:.80}")
    found = {
        part: first_field(record, *getattr(benchmark, f"{part}_key").split())
        for part in ("id", "image", "question", "answers", "kind")
    }
    user_prompt = prompt if benchmark.from_user else ""
    is_caption = benchmark.metric == "captions"
    if not benchmark.id_key:
        found["id"] = count
    default = CAPTION_PROMPT if is_caption else None
    found["question"] = user_prompt or found["question"] or default
    images = found["image"]
    if images is None:
        images = []
    elif type(images) is not list:  # isinstance would not do: a ref to an image is a tuple
        images = [images]
    check_parts(benchmark, record, found | {"image": images or None}, where)
    choices = [] if record.get("choices") is None else record["choices"]
    references = read_references(benchmark, found["answers"])
    kind = "all" if found["kind"] in (None, "") else found["kind"]
    check_labels(where, id=found["id"], kind=kind)
    check_texts(where, question=found["question"])
    may_be_blank = not benchmark.from_user and benchmark.metric in TEXT_METRICS
    check_texts(where, may_be_blank, answers=references or [None] * benchmark.from_user)
    check_texts(where, True, choices=choices)
    default = benchmark.prompt if choices else benchmark.open_prompt or benchmark.prompt
    text = user_prompt or format_question(benchmark, found["question"], choices, prompt or default)
    if text.count("<image>") not in (0, len(images)):
        raise UserError(
            f"{where}: {text.count('<image>')} <image> in its text, but {len(images)} images"
        )
    question = {
        "id": found["id"],
        "kind": str(kind),
        "image": images,
        "question": text if "<image>" in text else "<image>\n" * len(images) + text,
        "answers": references,
        "choices": choices,
    }
    for keys in benchmark.extra_keys:
        question[keys.split()[0]] = first_field(record, *keys.split())
    if references:
        metrics.check_references(benchmark.metric, question, where)
    return question


def check_parts(benchmark, record, found, where):
    """Raises UserError for a record without a part that its benchmark needs."""
    needed = ["id", "question"]
    if None not in benchmark.hidden_answers:
        needed.append("answers")
    if not benchmark.from_user or benchmark.metric == "captions":
        needed.append("image")
    if missing := [part for part in needed if found[part] is None]:
        raise UserError(f"{where}: no {', '.join(missing)}; it has {', '.join(record)}")


def read_references(benchmark, value):
    """Returns the reference answers as a list of texts, [] if they are hidden.

    VQAv2 has each of them in an object.
    """
    if benchmark.from_user:
        return value
    if value in benchmark.hidden_answers:
        return []
    # An empty list does not mean hidden: it is kept, and refused later.
    values = value if isinstance(value, list) and value else [value]
    texts = [text.get("answer") if isinstance(text, dict) else text for text in values]
    return [str(text) if isinstance(text, int | float) else text for text in texts]


def check_texts(where, may_be_blank=False, **parts):
    """Raises UserError for a question that is no text, answers or choices that are no texts."""
    for name, value in parts.items():
        expected, texts = "a list of non-empty texts", value
        if name == "question":
            expected, texts = "a non-empty text", [value]
        if not isinstance(texts, list) or not all(
            is_valid_text(text) and (may_be_blank or text.replace("<image>", "").strip())
            for text in texts
        ):
            raise UserError(f"{where}: `{name}` must be {expected}, not {value!r:.80}")


def is_valid_text(value):
    """A lone surrogate, which JSON can hold, can be neither written nor tokenized."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def check_labels(where, **labels):
    for part, label in labels.items():
        is_label = isinstance(label, str | int | float) and not isinstance(label, bool)
        if not is_label or not (str(label).isprintable() and str(label).strip()):
            raise UserError(
                f"{where}: `{part}` must be a number or a line of text, not {label!r:.80}"
            )


def format_question(benchmark, question, choices, prompt):
    """Returns the question, its choices a line each, and the prompt, unless it has them already."""
    if len(choices) > len(LETTERS):
        raise UserError(
            f"a question has {len(choices)} choices, but there are {len(LETTERS)} letters: "
            f"{question[:80]!r}"
        )
    if benchmark.metric not in ("letters", "mmmu") or benchmark.choices_in_question:
        choices = []
    lines = [question, *(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))]
    return "\n".join(lines if not prompt or question.endswith(prompt) else [*lines, prompt])


def format_submission(name, results):
    """Returns the JSON that a benchmark's owner scores, if the references are not published.

    results: dicts with an id and an answer.
    """
    keys = find_benchmark(name).submission_keys
    if not keys:
        known = [other for other, benchmark in BENCHMARKS.items() if benchmark.submission_keys]
        raise UserError(f"--submission: {name} has no submission format; {', '.join(known)} have")
    return json.dumps(
        [
            dict(zip(keys, (result["id"], result["answer"].strip()), strict=True))
            for result in results
        ]
    )
