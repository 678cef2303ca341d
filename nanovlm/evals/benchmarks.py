"""The benchmarks: for each, the files of its questions, its prompt, and how its answers are scored.

A benchmark is one entry of BENCHMARKS. formats.py parses its files, metrics.py scores its answers.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from .. import UserError
from ..data.chat_template import place_images
from ..data.image_refs import one_line
from ..data.turns import CAPTION_PROMPT, LETTER_PROMPT, LONE_SURROGATE, SHORT_PROMPT
from ..preprocess.records import LETTERS, first_field
from . import metrics
from .cider import cider_scores
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


class Benchmark(NamedTuple):
    """The files of a benchmark and their keys, its prompt, and its score.

    Editions of a benchmark differ: of two names in one string ("answers answer") a record has one.
    """

    score: Callable  # of an answer: a function of metrics.py, or cider_scores
    prompt: str = ""  # follows the question
    files: tuple = ("*.jsonl", "*.json")  # in a folder: the first pattern that matches
    parse: Callable = parse_records  # returns the records of a file
    annotation_files: tuple = ()  # like files, if the references are in a separate file
    id_key: str = "id"  # "": the questions are numbered
    image_key: str = "image"
    image_paths: tuple = ("{}",)  # the paths at which an image of this name may be
    question_key: str = "question"
    default_question: str = ""  # of a record without a question
    answers_key: str = "answers answer"
    kind_key: str = "kind"
    extra_keys: tuple = ()  # what else the score needs
    from_user: bool = False  # --prompt replaces the question, not only the benchmark's prompt
    lists_choices: bool = False  # the choices follow the question, a line each
    open_prompt: str = ""  # replaces the prompt if a question has no choices
    hidden_answers: tuple = ()  # what stands for an answer that is not published
    submission_keys: tuple = ()  # the names of id and answer in a submission
    score_name: str = "accuracy"  # of the mean score
    summarize: Callable | None = None  # results -> {metric: value} as the owners report

    @property
    def is_caption(self):
        """Whether all answers are scored at once, as CIDEr's word weights require."""
        return self.score is cider_scores


# The prompts are LLaVA-1.5's, which its training data has, too. This one is for TextVQA, DocVQA and
# InfoVQA.
NUMBER_PROMPT = "Answer the question using a single word, phrase, or number."
BENCHMARKS = {
    "exact": Benchmark(metrics.exact_match, parse=parse_user_questions, from_user=True),
    "contains": Benchmark(metrics.contains_reference, parse=parse_user_questions, from_user=True),
    "vqa": Benchmark(
        metrics.vqa_accuracy,
        prompt=SHORT_PROMPT,
        parse=parse_user_questions,
        from_user=True,
        score_name="VQA accuracy",
    ),
    "letters": Benchmark(
        metrics.letter_score,
        prompt=LETTER_PROMPT,
        parse=parse_user_questions,
        from_user=True,
        lists_choices=True,
    ),
    "captions": Benchmark(
        cider_scores,
        parse=parse_user_questions,
        default_question=CAPTION_PROMPT,
        from_user=True,
        score_name="CIDEr-D",
    ),
    "coco": Benchmark(
        cider_scores,
        files=("dataset_coco.json", "coco_karpathy_test.json"),
        parse=parse_coco,
        image_paths=("val2014/{name}", "{name}"),
        default_question=CAPTION_PROMPT,
        from_user=True,
        submission_keys=("image_id", "caption"),
        score_name="CIDEr-D",
    ),
    "vqav2": Benchmark(
        metrics.vqa_accuracy,
        prompt=SHORT_PROMPT,
        files=("*val2014_questions.json", "*test2015_questions.json"),
        parse=parse_vqav2,
        annotation_files=("*val2014_annotations.json",),
        id_key="question_id",
        image_paths=("val2014/{}", "test2015/{}", "{}"),
        hidden_answers=(None,),
        submission_keys=("question_id", "answer"),
        score_name="VQA accuracy",
    ),
    "textvqa": Benchmark(
        metrics.textvqa_accuracy,
        prompt=NUMBER_PROMPT,
        files=("TextVQA_*_val.json",),
        id_key="question_id",
        image_key="image_id",
        image_paths=("train_images/{}.jpg", "test_images/{}.jpg", "{}.jpg"),
        hidden_answers=(None,),
        score_name="VQA accuracy",
    ),
    "chartqa": Benchmark(
        metrics.relaxed_accuracy,
        prompt=SHORT_PROMPT,
        files=("test_*.json",),
        parse=parse_split_files,
        image_key="imgname",
        image_paths=("png/{}", "{}"),
        question_key="query",
        answers_key="label",
        score_name="relaxed accuracy",
    ),
    "docvqa": Benchmark(
        metrics.anls_score,
        prompt=NUMBER_PROMPT,
        files=("val_v1.0_withQT.json", "val_v1.0.json", "test_v1.0.json"),
        id_key="questionId",
        image_paths=("spdocvqa_images/{name}", "{}", "{name}"),
        hidden_answers=(None,),
        submission_keys=("questionId", "answer"),
        score_name="ANLS",
    ),
    "infovqa": Benchmark(
        metrics.anls_score,
        prompt=NUMBER_PROMPT,
        files=("infographic*_val_v1.0*.json", "infographic*_test_v1.0.json"),
        id_key="questionId",
        image_key="image_local_name",
        image_paths=("infographicsvqa_images/{}", "{}"),
        hidden_answers=(None,),
        submission_keys=("questionId", "answer"),
        score_name="ANLS",
    ),
    "ai2d": Benchmark(
        metrics.letter_score,
        prompt=LETTER_PROMPT,
        files=("questions/*.json",),
        parse=parse_ai2d,
        annotation_files=("ai2d_test_ids.csv",),
        lists_choices=True,
    ),
    "mmmu": Benchmark(
        metrics.mmmu_score,
        prompt=LETTER_PROMPT,
        files=("validation-*.parquet", "test-*.parquet"),
        parse=parse_mmmu,
        lists_choices=True,
        open_prompt=SHORT_PROMPT,
        hidden_answers=("?",),
        summarize=metrics.mmmu_metrics,
    ),
    "mmstar": Benchmark(
        metrics.mmstar_score,
        prompt=LETTER_PROMPT,
        files=("mmstar.parquet",),
        parse=parse_mmstar,
        id_key="index",
        kind_key="category",
        lists_choices=True,
    ),
    "ocrbench": Benchmark(
        metrics.ocrbench_score,
        files=("OCRBench.json", "test-*.parquet"),
        id_key="",
        image_key="image_path image",
        image_paths=("OCRBench_Images/{}", "{}"),
        kind_key="type question_type",
        extra_keys=("dataset_name dataset",),
    ),
    "pope": Benchmark(
        metrics.pope_score,
        prompt=SHORT_PROMPT,
        files=("coco_pope_*.json",),
        parse=parse_split_files,
        image_paths=("val2014/{}", "{}"),
        question_key="text",
        answers_key="label",
        summarize=metrics.pope_metrics,
    ),
    "mme": Benchmark(
        metrics.mme_score,
        prompt=SHORT_PROMPT,
        files=("MME_Benchmark/*.txt", "*.txt"),
        parse=parse_mme,
        summarize=metrics.mme_metrics,
    ),
    "mathvista": Benchmark(
        metrics.mathvista_score,
        files=("testmini*.parquet",),
        parse=parse_mathvista,
        id_key="pid",
        image_key="decoded_image",
        question_key="query",
        extra_keys=("answer_type", "precision"),
        hidden_answers=(None, ""),
    ),
    "realworldqa": Benchmark(
        metrics.letter_score,
        files=("annotations.json*", "test-*.parquet"),
        parse=parse_realworldqa,
        id_key="",
        image_paths=("images/{}", "{}"),
    ),
}


def find_benchmark(name):
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark={name} is not known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


# ---- questions ----


def load_questions(
    name, questions, annotations="", images="", prompt="", allow_outside_images=False
):
    """Returns the questions of a benchmark, a dict each:

    id, kind
    image      refs to the images
    question   the text for the model, with <image> for each image
    answers    the references; [] if they are not published
    choices    [] unless it is multiple choice
    and the benchmark's extra_keys.

    questions, annotations: each a file, a folder or a pattern (see find_question_files). images: a
    folder or zip, if the images are not beside the questions. allow_outside_images: they may lie
    elsewhere, too.
    prompt: replaces the benchmark's prompt; for a user's own questions, it replaces the questions.
    Raises UserError, naming the question, for a question that cannot be parsed or scored, a missing
    image, or a repeated id.
    """
    benchmark = find_benchmark(name)
    result, seen, notes, has_paths = [], {}, None, False
    if annotations and not benchmark.annotation_files:
        raise UserError(
            f"--annotations={annotations}: the answers of {name} are in its questions: leave it out"
        )
    if annotations:
        notes_file, *others = find_question_files(annotations, benchmark.annotation_files)
        if others:
            raise UserError(
                f"--annotations={annotations} has {len(others) + 1} files: name the one of these "
                "questions"
            )
        notes = read_document(notes_file.name)
    for file in find_question_files(questions, benchmark.files, allow_outside_images):
        records = read_benchmark(name, file, notes, annotations)
        for number, record in enumerate(records, 1):
            where = f"{file.name}, question {number}"
            entry = make_question(benchmark, record, len(result), prompt, where)
            before = seen.setdefault(str(entry["id"]), where)
            if before != where:
                raise UserError(f"{where}: the id {entry['id']} is already that of {before}")
            has_paths |= any(isinstance(value, str) for value in entry["image"])
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
    if images and not has_paths:
        raise UserError(
            f"--images={images}: no question of {questions} has the path of an image: leave it out"
        )
    return result


def read_benchmark(name, file, notes, annotations):
    """Yields the records of a file. Raises UserError if it is not in the benchmark's format."""
    try:
        yield from BENCHMARKS[name].parse(read_document(file.name), file, notes)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        source = f"{file.name} or {annotations}" if annotations else file.name
        raise UserError(
            f"{source} is not in the format that {name} is published in: {type(error).__name__}: "
            f"{one_line(error):.200}"
        ) from None


def make_question(benchmark, record, count, prompt, where):
    """Returns an entry of load_questions, its images still as in the record.

    count: of the questions before it.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object: {record!r:.80}")
    fields = {
        part: first_field(record, *getattr(benchmark, f"{part}_key").split())
        for part in ("id", "kind", "image", "question", "answers")
    }
    is_hidden = fields["answers"] in benchmark.hidden_answers
    references = [] if is_hidden else as_list(fields["answers"])
    question = {
        "id": fields["id"] if benchmark.id_key else count,
        "kind": "all" if fields["kind"] in (None, "") else str(fields["kind"]),
        "image": as_list(fields["image"]),
        "question": fields["question"] or benchmark.default_question,
        "answers": [str(text) if isinstance(text, int | float) else text for text in references],
        "choices": as_list(first_field(record, "choices")),
    }
    for keys in benchmark.extra_keys:
        question[keys.split()[0]] = first_field(record, *keys.split())
    if benchmark.from_user and prompt:
        question["question"] = prompt
    check_parts(benchmark, question, is_hidden, where)
    if not is_hidden:
        metrics.check_references(benchmark.score, question, where)
    text = format_question(benchmark, question, prompt)
    question["question"] = place_images(text, len(question["image"]), where)
    return question


def as_list(value):
    """Returns a field's value as a list; [] if it is missing."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def check_parts(benchmark, question, is_hidden, where):
    """Raises UserError if a part of a question is missing, blank or of the wrong type."""
    label, references, choices = question["id"], question["answers"], question["choices"]
    is_label = isinstance(label, str | int | float) and str(label).isprintable() and label != ""
    # One of the ten references of an owner may be blank.
    has_references = references and all(
        is_text(text, may_be_blank=not benchmark.from_user) for text in references
    )
    may_lack_image = benchmark.from_user and not benchmark.is_caption
    are_choices = len(choices) <= len(LETTERS) and all(is_text(text, True) for text in choices)
    rules = [
        ("id", is_label, "a number or a line of text"),
        ("kind", question["kind"].isprintable(), "a line of text"),
        ("image", question["image"] or may_lack_image, "an image or its path"),
        ("question", is_text(question["question"]), "a non-empty text"),
        ("answers", is_hidden or has_references, "a list of non-empty texts"),
        ("choices", are_choices, f"a list of at most {len(LETTERS)} texts"),
    ]
    for part, is_valid, expected in rules:
        if not is_valid:
            raise UserError(f"{where}: `{part}` must be {expected}, not {question[part]!r:.80}")


def is_text(value, may_be_blank=False):
    """Whether a value is a text that can be written and tokenized."""
    if not isinstance(value, str) or LONE_SURROGATE.search(value):
        return False
    return may_be_blank or value.replace("<image>", "").strip() != ""


def format_question(benchmark, question, prompt):
    """Returns the question, its choices a line each, and the prompt, unless it ends with it."""
    text, choices = question["question"], question["choices"]
    if benchmark.from_user and prompt:
        return text
    if benchmark.lists_choices:
        text = "\n".join([text, *(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))])
    own_prompt = benchmark.prompt if choices else benchmark.open_prompt or benchmark.prompt
    prompt = prompt or own_prompt
    return text if not prompt or question["question"].endswith(prompt) else f"{text}\n{prompt}"


# ---- scores ----


def score_results(results, name):
    """Returns the results, questions with an `answer` each, with their scores.

    None: the answer cannot be parsed, or there are no references. Raises UserError for a question
    that the benchmark cannot score.
    """
    score = BENCHMARKS[name].score
    known = [result for result in results if result["answers"]]
    for result in known:
        metrics.check_references(score, result, f"question {result['id']}")
    if BENCHMARKS[name].is_caption:
        answers = [result["answer"] for result in known]
        scores = cider_scores(answers, [result["answers"] for result in known])
    else:
        scores = [score(result["answer"], result["answers"], result) for result in known]
    scores = iter(scores)
    return [{**result, "score": next(scores) if result["answers"] else None} for result in results]


def benchmark_metrics(name, results):
    """Returns {metric: value} as a benchmark's owners report it, and the share of answers that
    cannot be parsed (`unparsed`).

    results: questions with their `answer` and `score`.
    """
    benchmark, scores = BENCHMARKS[name], [result["score"] for result in results]
    found = {benchmark.score_name: metrics.mean_score(scores)}
    if benchmark.summarize:
        found = benchmark.summarize(results)
    if benchmark.score in (metrics.pope_score, metrics.mme_score):
        read = [metrics.yes_no_score(result["answer"], result["answers"]) for result in results]
        if metrics.mean_score(read) != metrics.mean_score(scores):
            found["accuracy, read with punctuation"] = metrics.mean_score(read)
    return found | {"unparsed": sum(score is None for score in scores) / len(scores)}


def format_submission(name, results):
    """Returns the JSON that a benchmark's owner scores, if the references are not published.

    results: dicts with an id and an answer.
    """
    keys = find_benchmark(name).submission_keys
    if not keys:
        known = [other for other, benchmark in BENCHMARKS.items() if benchmark.submission_keys]
        raise UserError(f"--submission: {name} has no submission format; {', '.join(known)} have")
    rows = [{keys[0]: result["id"], keys[1]: result["answer"].strip()} for result in results]
    return json.dumps(rows)
