"""What a person sees of an evaluation: its progress, a table of the scores, and an HTML page.

The page shows images, questions, answers and scores, and needs no other file.
"""

import base64
import datetime
import html
import io
import time
from typing import NamedTuple

from .. import cli, distributed
from ..data import image_files, image_refs
from . import metrics
from .benchmarks import BENCHMARKS

PROGRESS_SECONDS = 5.0  # between two lines of progress
MAX_QUESTIONS = 1000  # on a page: with 15 kB each, a browser still scrolls at once
MAX_IMAGE_EDGE = 320  # pixels of an image's longer edge on a page

STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
section { border-top: 1px solid #bbb; padding: 1em 0; display: flow-root }
section img { float: left; margin: 0 1em 1em 0 }
pre { white-space: pre-wrap; font: inherit; margin: .3em 0 }
pre.table { white-space: pre; font-family: monospace }
b { display: inline-block; min-width: 6em } .score { float: right; font-size: 1.5em }
"""


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
    form, scale = ("{:.1f}", 100) if is_caption else ("{:.1%}", 1)  # CIDEr-D is no percentage
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


def image_tag(ref):
    """Returns an <img> that contains a small JPEG of an image."""
    content, name = image_refs.load_image_bytes(ref)
    small, _ = image_files.read_image(content, name)
    small.thumbnail((MAX_IMAGE_EDGE, MAX_IMAGE_EDGE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{data}">'


def score_text(result):
    if not result["answers"]:
        return "not scored"
    return "unparsed" if result["score"] is None else f"{result['score']:.2f}"


def sort_key(result):
    """Unparsed answers come first, then low scores; questions without references come last."""
    return not result["answers"], -1.0 if result["score"] is None else result["score"]


def question_section(result, question):
    """Returns the HTML of a question: its images, prompt, answer and reference answers."""
    images = "".join(map(image_tag, question["image"]))
    lines = [
        ("prompt", result["prompt"]),
        ("answer", result["answer"] + (" … (cut off)" if result["cut"] else "")),
        ("reference", " | ".join(dict.fromkeys(result["answers"])) or "not known"),
    ]
    texts = "".join(f"<pre><b>{name}</b> {html.escape(text)}</pre>" for name, text in lines)
    title = html.escape(f"{result['id']}, {result['kind']}")
    score = f'<span class="score">{score_text(result)}</span>'
    return f"<section>{score}{images}<p>{title}</p>{texts}</section>"


def html_page(results, questions, title, table):
    """Returns the page; questions: those of the results, for their images; table: its text."""
    pairs = sorted(zip(results, questions, strict=True), key=lambda pair: sort_key(pair[0]))
    shown = pairs[:MAX_QUESTIONS]
    sections = "\n".join(question_section(*pair) for pair in shown)
    title, table = html.escape(title), html.escape(table)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<style>{STYLE}</style>\n<h1>{title}</h1>\n<pre class="table">{table}</pre>\n'
        f"<p>{len(shown):,} of {len(pairs):,} questions, the worst first</p>\n"
        f"{sections}\n</html>\n"
    )
