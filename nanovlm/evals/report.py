"""How an exam goes, a line now and then, and how it went: a table, and one page of HTML to leaf through with pictures, questions, answers and marks,
which needs nothing but itself."""

import base64
import datetime
import html
import io
import sys
import time
from typing import NamedTuple

from ..data import image_files, image_refs
from . import benchmarks, metrics

EVERY = 5.0  # seconds between two lines of progress
MOST = 1000  # questions on a page: of 15 kB each, a browser turns the leaves of these at once
EDGE = 320  # pixels that the longer side of a picture may have

STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .1em 1em; text-align: right } td:first-child, th:first-child { text-align: left }
section { border-top: 1px solid #bbb; padding: 1em 0; display: flow-root } section img { float: left; margin: 0 1em 1em 0 }
pre { white-space: pre-wrap; font: inherit; margin: .3em 0 } b { display: inline-block; min-width: 6em } .mark { float: right; font-size: 1.5em }
"""


class Line(NamedTuple):
    """A line of the table: a kind of question, or all of them. None: no right answer is known."""

    kind: str
    questions: int
    score: float | None  # the mean, an answer that cannot be parsed counting as 0
    low: float | None  # its 95% interval
    high: float | None
    unparsed: float | None  # the share of answers that cannot be parsed
    cut: float | None  # and that of those that were cut off


# ---- on the way ----


class Progress:
    """What a person who waits wants to know, on standard error."""

    def __init__(self, total, before):
        self.total, self.before, self.done, self.tokens, self.marks = total, before, 0, 0, []
        self.began = self.told = time.perf_counter()

    def speeds(self):
        took = time.perf_counter() - self.began
        return (
            {"answers_per_s": self.done / took, "tokens_per_s": self.tokens / took}
            if self.done
            else {}
        )

    def tell(self, rows, benchmark):
        self.done += len(rows)
        self.tokens += sum(row["tokens"] for row in rows)
        self.marks += [row["score"] or 0.0 for row in rows if row["answers"]]
        if time.perf_counter() - self.told < EVERY:
            return
        self.told = time.perf_counter()
        left = self.total - self.before - self.done
        score = (
            f" | {sum(self.marks) / len(self.marks):.1%} so far"
            if self.marks and not is_of_all(benchmark)
            else ""
        )
        speed = self.speeds()["answers_per_s"]
        print(
            f"{self.before + self.done:,}/{self.total:,} questions | {speed:,.1f} answers/s{score} | "
            f"{datetime.timedelta(seconds=round(left / speed))} left",
            file=sys.stderr,
            flush=True,
        )


# ---- the table ----


def is_of_all(benchmark):
    """Whether a score needs all answers at once, as CIDEr's idf does."""
    return benchmarks.BENCHMARKS[benchmark].score not in metrics.METRICS


def table(rows, seed=0):
    """A Line for each kind, the last for all; seed: of the bootstrap that gives the intervals."""
    kinds = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    kinds["all"] = rows
    return [line(kind, some, seed) for kind, some in kinds.items()]


def line(kind, rows, seed):
    marks, cut = (
        [row["score"] for row in rows if row["answers"]],
        sum(row["cut"] for row in rows) / len(rows),
    )
    told = (
        (
            metrics.mean_score(marks),
            *metrics.confidence_interval(marks, seed),
            sum(mark is None for mark in marks) / len(marks),
        )
        if marks
        else (None,) * 4
    )
    return Line(kind, len(rows), *told, cut)


def points(score, benchmark):
    """A score as its owners write it: CIDEr-D is no share of anything."""
    return f"{100 * score:.1f}" if is_of_all(benchmark) else f"{score:.1%}"


def show(lines, figures, benchmark, tokens_per_s=None):
    """Print a table, how fast it was come by if that is known, and what else the benchmark's owners report (`figures`, of scores.summary)."""
    wide, name = (
        max(10, *(len(line.kind) for line in lines)),
        "CIDEr-D" if is_of_all(benchmark) else metrics.MEAN_NAMES.get(benchmark, "right"),
    )
    for line in lines:
        told = [f"{line.kind:{wide}} {line.questions:5} questions"]
        if line.score is None:
            told += ["no right answers are known"]
        else:
            score, low, high = (points(share, benchmark) for share in line[2:5])
            told += [f"{score:>6} {name}", f"{low} to {high}"] + (
                [] if is_of_all(benchmark) else [f"{line.unparsed:.1%} unparsed"]
            )
        told += [f"{line.cut:.1%} cut off"]
        if line is lines[-1] and tokens_per_s is not None:
            told += [f"{tokens_per_s:,.0f} tokens/s"]
        print("   ".join(told))
    if is_of_all(benchmark):
        print(
            "CIDEr-D weighs words by these pictures' captions: compare it with no score over others, be they a part of these"
        )
    for figure, value in figures.items():
        if figure not in (name, "accuracy", "unparsed"):
            print(f"{figure}: {value:,.5g}")


# ---- the page ----


def picture(ref):
    """An <img> that carries a small JPEG of a picture in itself."""
    content, name = image_refs.load(ref)
    small, _ = image_files.read(content, name)
    small.thumbnail((EDGE, EDGE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def mark(row):
    if not row["answers"]:
        return "unmarked"
    return "unparsed" if row["score"] is None else f"{row['score']:.2f}"


def worth(row):
    """Where a row comes: the worst first, of these what could not be parsed, last what has no right answer."""
    return not row["answers"], -1.0 if row["score"] is None else row["score"]


def section(row, question):
    """A question, its pictures, what was said and what would have been right."""
    pictures = "".join(map(picture, question["image"]))
    told = [
        ("asked", row["prompt"]),
        ("it says", row["answer"] + (" … (cut off)" if row["cut"] else "")),
        ("right", " | ".join(dict.fromkeys(row["answers"])) or "not known"),
    ]
    words = "".join(f"<pre><b>{name}</b> {html.escape(text)}</pre>" for name, text in told)
    name = html.escape(f"{row['id']}, {row['kind']}")
    return f'<section><span class="mark">{mark(row)}</span>{pictures}<p>{name}</p>{words}</section>'


def cells(line, benchmark):
    shares = [
        *(x if x is None else points(x, benchmark) for x in line[2:5]),
        *(x if x is None else f"{x:.1%}" for x in line[5:]),
    ]
    return f"<tr><td>{html.escape(line.kind)}<td>{line.questions}" + "".join(
        f"<td>{share or ''}" for share in shares
    )


def page(rows, questions, lines, benchmark, model):
    """The page; questions: those of the rows, for their pictures; lines: the table."""
    pairs, title = (
        sorted(zip(rows, questions, strict=True), key=lambda pair: worth(pair[0])),
        f"{benchmark}: {model}",
    )
    table = "".join(cells(line, benchmark) for line in lines)
    first = f"the {MOST:,} worst of " if len(pairs) > MOST else ""
    head = "".join(
        f"<th>{name}" for name in ("", "questions", "score", "from", "to", "unparsed", "cut off")
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n'
        f"<h1>{html.escape(title)}</h1>\n<table><tr>{head}{table}</table>\n<p>Here are {first}{len(pairs):,} questions, the worst first.</p>\n"
        + "\n".join(section(row, question) for row, question in pairs[:MOST])
        + "\n</html>\n"
    )
