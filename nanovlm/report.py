"""How an exam went: a table, and one page of HTML to leaf through with pictures, questions, answers and marks, which needs nothing but itself."""
import base64
import html
import io
from typing import NamedTuple

from . import opening, papers, refs, scores

MOST = 1000  # questions on a page: of 15 kB each, a browser turns the leaves of these at once
EDGE = 320   # pixels that the longer side of a picture may have

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
    score: float | None     # the mean, an answer that cannot be parsed counting as 0
    low: float | None       # its 95% interval
    high: float | None
    unparsed: float | None  # the share of answers that cannot be parsed
    cut: float | None       # and that of those that were cut off


# ---- the table ----

def is_of_all(benchmark):
    """Whether a score needs all answers at once, as CIDEr's idf does."""
    return papers.BENCHMARKS[benchmark].score not in scores.SCORES


def table(rows, seed=0):
    """A Line for each kind, the last for all; seed: of the bootstrap that gives the intervals."""
    kinds = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    kinds["all"] = rows
    return [line(kind, some, seed) for kind, some in kinds.items()]


def line(kind, rows, seed):
    marks, cut = [row["score"] for row in rows if row["answers"]], sum(row["cut"] for row in rows) / len(rows)
    told = (scores.mean(marks), *scores.interval(marks, seed), sum(mark is None for mark in marks) / len(marks)) if marks else (None,) * 4
    return Line(kind, len(rows), *told, cut)


def show(lines, figures, benchmark):
    """Print a table, and what else the benchmark's owners report (`figures`, as scores.summary gives them)."""
    wide, name = max(10, *(len(line.kind) for line in lines)), scores.MEANS.get(benchmark, "right")
    for line in lines:
        told = f"{line.kind:{wide}} {line.questions:5} questions   "
        if line.score is None:
            print(f"{told}no right answers are known   {line.cut:.1%} cut off")
        elif is_of_all(benchmark):
            print(f"{told}{100 * line.score:6.1f} CIDEr-D   {100 * line.low:.1f} to {100 * line.high:.1f}   {line.cut:.1%} cut off")
        else:
            print(f"{told}{line.score:6.1%} {name}   {line.low:.1%} to {line.high:.1%}   {line.unparsed:.1%} unparsed   {line.cut:.1%} cut off")
    if is_of_all(benchmark):
        print("CIDEr-D weighs words by these pictures' captions: compare it with no score over others, be they a part of these")
    for figure, value in figures.items():
        if figure not in (name, "accuracy", "unparsed"):
            print(f"{figure}: {value:,.5g}")


# ---- the page ----

def picture(ref):
    """An <img> that carries a small JPEG of a picture in itself."""
    content, name = refs.load(ref)
    small, _ = opening.read(content, name)
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
    told = [("asked", row["prompt"]), ("it says", row["answer"] + (" … (cut off)" if row["cut"] else "")),
            ("right", " | ".join(dict.fromkeys(row["answers"])) or "not known")]
    words = "".join(f"<pre><b>{name}</b> {html.escape(text)}</pre>" for name, text in told)
    name = html.escape(f"{row['id']}, {row['kind']}")
    return f'<section><span class="mark">{mark(row)}</span>{pictures}<p>{name}</p>{words}</section>'


def page(rows, questions, lines, title):
    """The page; questions: those of the rows, for their pictures; lines: the table."""
    pairs = sorted(zip(rows, questions, strict=True), key=lambda pair: worth(pair[0]))
    share = lambda x: "" if x is None else f"{x:.1%}"  # noqa: E731
    table = "".join(f"<tr><td>{html.escape(line.kind)}<td>{line.questions}" + "".join(f"<td>{share(x)}" for x in line[2:]) for line in lines)
    first = f"the {MOST:,} worst of " if len(pairs) > MOST else ""
    head = "".join(f"<th>{name}" for name in ("", "questions", "score", "from", "to", "unparsed", "cut off"))
    return (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n'
            f"<h1>{html.escape(title)}</h1>\n<table><tr>{head}{table}</table>\n<p>Here are {first}{len(pairs):,} questions, the worst first.</p>\n"
            + "\n".join(section(row, question) for row, question in pairs[:MOST]) + "\n</html>\n")
