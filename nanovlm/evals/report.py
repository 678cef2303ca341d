"""What a person sees of an evaluation: its progress, a table of the scores, and an HTML page.

The page shows images, questions, answers and scores, and needs no other file.
"""

import base64
import datetime
import io
import itertools
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .. import cli, distributed
from ..data import image_files, image_refs
from . import metrics
from .benchmarks import BENCHMARKS

PROGRESS_SECONDS = 5.0  # between two lines of progress
REPORT_PAGE = Path(__file__).with_name("report.html")
MAX_QUESTIONS = 5000  # on a page
PAGE_PIXELS = 128_000_000  # of all images on a page: about 25 MB as JPEGs
MAX_IMAGE_EDGE = 960  # pixels of an image's longer edge on a page
MAX_ROWS, MAX_LABEL = 20, 24  # of a confusion table: its references, and their characters


class TableLine(NamedTuple):
    """The scores of a kind of questions, or of all. None: there are no reference answers."""

    kind: str
    questions: int
    score: float | None  # the mean; an answer that cannot be parsed counts as 0
    low: float | None  # the 95% confidence interval
    high: float | None
    unparsed: float | None  # the share of answers that cannot be parsed
    cut: float  # the share of answers that were cut off


# ---- progress ----


class EvaluationProgress:
    """Prints how far an evaluation is to standard error, every few seconds."""

    def __init__(self, total, answered_before):
        self.total, self.answered_before = total, answered_before
        self.done = self.tokens = 0
        self.start = self.last_print = time.perf_counter()

    def speeds(self):
        seconds = time.perf_counter() - self.start
        if not self.done:
            return {}
        return {"answers_per_s": self.done / seconds, "tokens_per_s": self.tokens / seconds}

    def update(self, outputs):
        self.done += len(outputs)
        self.tokens += sum(output.tokens for output in outputs)
        is_early = time.perf_counter() - self.last_print < PROGRESS_SECONDS
        if is_early or distributed.get_rank() > 0:
            return
        self.last_print = time.perf_counter()
        done, speed = self.answered_before + self.done, self.speeds()["answers_per_s"]
        remaining = datetime.timedelta(seconds=round((self.total - done) / speed))
        cli.print_status(
            f"{done:,}/{self.total:,} questions | {speed:,.1f} answers/s | {remaining} left"
        )


# ---- the table ----


def make_table(results, seed=0):
    """Returns a TableLine for each kind, then one for all; seed: of the confidence intervals."""
    kinds = {}
    for result in results:
        kinds.setdefault(result["kind"], []).append(result)
    kinds["all"] = results
    return [make_line(kind, part, seed) for kind, part in kinds.items()]


def make_line(kind, results, seed):
    scores = [result["score"] for result in results if result["answers"]]
    cut = sum(result["cut"] for result in results) / len(results)
    if not scores:
        return TableLine(kind, len(results), None, None, None, None, cut)
    low, high = metrics.confidence_interval(scores, seed)
    unparsed = sum(score is None for score in scores) / len(scores)
    return TableLine(kind, len(results), metrics.mean_score(scores), low, high, unparsed, cut)


def format_table(lines, owner_metrics, benchmark, tokens_per_s=None):
    """Returns the table as text, then owner_metrics: what the benchmark's owners report."""
    is_caption, name = BENCHMARKS[benchmark].is_caption, BENCHMARKS[benchmark].score_name
    label = "right" if name == "accuracy" else name
    form, scale = ("{:.1f}", 100) if is_caption else ("{:.1%}", 1)  # CIDEr-D is not a percentage
    width = max(10, *(len(line.kind) for line in lines))
    texts = []
    for line in lines:
        cells = "no reference answers"
        if line.score is not None:
            score, low, high = (form.format(scale * share) for share in line[2:5])
            cells = f"{score:>6} {label}   {low} to {high}   {line.unparsed:.1%} unparsed"
        count = f"{line.kind:{width}} {line.questions:5} questions"
        texts.append(f"{count}   {cells}   {line.cut:.1%} cut off")
    if tokens_per_s is not None:
        texts[-1] += f"   {tokens_per_s:,.0f} tokens/s"
    if is_caption:
        texts.append(
            "CIDEr-D takes its word weights from the captions of these images: do not compare it "
            "with scores over other images, or over a part of these"
        )
    for metric, value in owner_metrics.items():
        if metric not in (name, "unparsed"):
            texts.append(f"{metric}: {value:,.5g}")
    return "\n".join(texts)


def calibration(results):
    """Returns the mean scores of two thirds of the answers: those with the highest mean_logprob, of
    which the model is most certain, and those with the lowest. {} for fewer than three answers."""
    known = [result for result in results if result.get("mean_logprob") is not None]
    known.sort(key=lambda result: result["mean_logprob"])
    scores, third = [result["score"] for result in known], len(known) // 3
    if not third:
        return {}
    return {
        "score of the most certain third": metrics.mean_score(scores[-third:]),
        "score of the least certain third": metrics.mean_score(scores[:third]),
    }


# ---- the page ----


def data_uri(image, kind="jpeg", **options):
    """Returns a PIL image as a data: URI, for a page that needs no other file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def small_image(ref, edge):
    """Returns an image with at most `edge` pixels along its longer edge."""
    content, name = image_refs.load_image_bytes(ref)
    image, _ = image_files.read_image(content, name, lambda size: (edge, edge))
    image.thumbnail((edge, edge))
    return image


def outcome(result, benchmark):
    if not result["answers"]:
        return "not scored"
    if result["score"] is None:
        return "unparsed"
    if BENCHMARKS[benchmark].is_caption:  # CIDEr-D compares captions; none is right or wrong
        return "scored"
    return {0: "wrong", 1: "right"}.get(result["score"], "partly right")


def sort_key(result):
    """Unparsed answers come first, then low scores; questions without references come last."""
    return not result["answers"], -1.0 if result["score"] is None else result["score"]


def answer_labels(result):
    """Returns (reference, answer) of a result, in small letters and without a last period.

    A right answer has its reference's label; a wrong one that is spelled like it has None.
    """
    texts = statistics.mode(result["answers"] or [""]), result["answer"]
    reference, answer = (text.strip().removesuffix(".").casefold() for text in texts)
    if answer == reference:
        answer = None
    return reference, reference if result["score"] == 1 else answer


def confusion_table(labels):
    """Returns the references and counts[reference][answer], at the end the number of other answers.

    labels: of answer_labels. None if references are long or many, or if all answers are right.
    """
    counts, totals = Counter(labels), Counter(reference for reference, _ in labels)
    references, table = sorted(totals), []
    is_small = 2 <= len(references) <= MAX_ROWS and max(map(len, references)) <= MAX_LABEL
    if not is_small or len(counts) == len(references):
        return None
    for reference in references:
        cells = [counts[reference, answer] for answer in references]
        table.append([*cells, totals[reference] - sum(cells)])
    return {"references": references, "counts": table}


def html_page(results, questions, benchmark, model, lines, notes=(), blank_scores=None):
    """Returns the page of an evaluation, which needs no other file.

    questions: those of the results, for their images; lines: of make_table; notes: texts below it;
    blank_scores: {kind: score with blank images}, if they are known.
    """
    labels, rows = {}, []  # {kind: its labels}; a row of the page for each question
    for result, question in zip(results, questions, strict=True):
        names = ("id", "kind", "answer", "answers", "cut", "score", "mean_logprob")
        row = {name: result.get(name) for name in names}
        row |= {"outcome": outcome(result, benchmark), "labels": answer_labels(result)}
        row |= {"question": question["question"], "images": question["image"]}
        row["names"] = [Path(name).name for name in result["image"]]
        rows.append(row)
        for kind in {result["kind"], "all"} if result["answers"] else ():
            labels.setdefault(kind, []).append(row["labels"])
    rows = sorted(rows, key=sort_key)[:MAX_QUESTIONS]
    refs = list(dict.fromkeys(itertools.chain(*(row["images"] for row in rows))))
    edge = min(MAX_IMAGE_EDGE, math.isqrt(PAGE_PIXELS // max(1, len(refs))))
    uris, number_of = {}, {}  # {uri: its number}, each distinct image once; {ref: that number}
    for ref in refs:
        number_of[ref] = uris.setdefault(data_uri(small_image(ref, edge)), len(uris))
    for row in rows:
        row["images"] = [number_of[ref] for ref in row["images"]]
    blank_scores = blank_scores or {}
    data = {
        "benchmark": benchmark,
        "label": BENCHMARKS[benchmark].score_name,
        "model": model,
        "notes": notes,
        "table": [line._asdict() | {"blank": blank_scores.get(line.kind)} for line in lines],
        "confusions": {kind: confusion_table(pairs) for kind, pairs in labels.items()},
        "prompt": results[0]["prompt"],
        "total": len(results),
        "rows": rows,
        "images": list(uris),
    }
    # "<" would end the element that the data are in
    text = json.dumps(data).replace("<", "\\u003c")
    return REPORT_PAGE.read_text().replace("DATA", text, 1)
