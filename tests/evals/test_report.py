"""The page of an evaluation: every answer as text, every image once, counts that are the scores'."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nanovlm.data.image_refs import ImageBytes, ImageFile
from nanovlm.evals import benchmarks, report, runner

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def image_bytes(seed, width, height):
    file = io.BytesIO()
    pixels_YXC = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels_YXC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """(results, questions): 70 questions of three kinds about four images, two of them equal."""
    path = tmp_path_factory.mktemp("images") / f"{'a' * 9}.png"
    path.write_bytes(image_bytes(0, 50, 13))
    images = [
        ImageFile(str(path)),
        ImageBytes("the same", path.read_bytes()),
        ImageBytes("small", image_bytes(1, 12, 12)),
        ImageBytes("tall", image_bytes(2, 11, 70)),
    ]
    questions, results = [], []
    for i in range(70):
        question = {
            "id": f"{EVIL} {i}" if i == 3 else i,
            "kind": ["count", "exists", EVIL][i % 3],
            "image": [[images[0]], [], [images[2], images[3]], [images[1]]][i % 4],
            "question": f"<image>\nWhat is {i}? {EVIL}",
            "answers": [] if i == 69 else [["one", "two"], ["yes"], [f"{EVIL} {i}"]][i % 3],
        }
        answer = ["one", "Yes.", "no", EVIL, question["question"], "yes", "", "two"][i * 5 % 8]
        output = runner.Output(f"[INST]{i}", answer, 3, i == 1, -0.25 if i % 2 else None)
        questions.append(question)
        results.append(runner.make_result(question, output))
    results = benchmarks.score_results(results, "exact")
    results[5]["score"], results[7]["score"] = None, 0.5  # as other benchmarks give
    return results, questions


def make_page(evaluation, benchmark="exact", **options):
    results, questions = evaluation
    lines = report.make_table(results)
    return report.html_page(results, questions, benchmark, "out/<model>", lines, **options)


def data_of(page):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def open_images(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
        for uri in data_of(page)["images"]
    ]


def test_texts_cannot_become_html_and_nothing_is_fetched(evaluation):
    page = make_page(evaluation, notes=[EVIL])
    assert "alert(1)</script>" not in page and "<img src=x" not in page
    # The script of the page builds HTML from no text.
    assert not re.search(r"https?://|<link|url\(|innerHTML|insertAdjacent|document\.write", page)
    data = data_of(page)
    assert (data["benchmark"], data["model"], data["notes"]) == ("exact", "out/<model>", [EVIL])
    shown = {row["id"]: row for row in data["rows"]}
    for result, question in zip(*evaluation, strict=True):
        row = shown[result["id"]]
        for name in ("kind", "answer", "answers", "cut", "score"):
            assert row[name] == result[name]
        assert row["question"] == question["question"]


def test_the_worst_answers_come_first(evaluation, monkeypatch):
    outcomes = [row["outcome"] for row in data_of(make_page(evaluation))["rows"]]
    order = ["unparsed", "wrong", "partly right", "right", "not scored"]
    assert list(dict.fromkeys(outcomes)) == order
    assert outcomes == sorted(outcomes, key=order.index)
    monkeypatch.setattr(report, "MAX_QUESTIONS", 9)
    data = data_of(make_page(evaluation))
    assert [row["outcome"] for row in data["rows"]] == outcomes[:9] and data["total"] == 70


def test_the_counts_of_outcomes_are_the_scores(evaluation):
    """Right answers and halves of those that are partly right make the mean score of a kind."""
    blank = {"exists": 0.25}
    data = data_of(make_page(evaluation, blank_scores=blank))
    for line in data["table"]:
        rows = [row for row in data["rows"] if line["kind"] in ("all", row["kind"])]
        assert len(rows) == line["questions"] and line["blank"] == blank.get(line["kind"])
        counts = Counter(row["outcome"] for row in rows)
        scored = len(rows) - counts["not scored"]
        assert line["score"] == (counts["right"] + 0.5 * counts["partly right"]) / scored
        assert line["unparsed"] == counts["unparsed"] / scored
    captions = data_of(make_page(evaluation, "captions"))["rows"]
    assert {row["outcome"] for row in captions} == {"unparsed", "scored", "not scored"}


def test_each_image_is_on_the_page_once_and_many_are_smaller(evaluation, monkeypatch):
    page = make_page(evaluation)
    assert sorted(image.size for image in open_images(page)) == [(11, 70), (12, 12), (50, 13)]
    data, sizes = data_of(page), [image.size for image in open_images(page)]
    expected = [[(50, 13)], [], [(12, 12), (11, 70)], [(50, 13)]]
    for row in data["rows"]:
        i = int(re.search(r"\d+\?", row["question"])[0][:-1])
        assert [sizes[number] for number in row["images"]] == expected[i % 4]
    names = {name for row in data["rows"] for name in row["names"]}
    assert names == {f"{'a' * 9}.png", "the same", "small", "tall"}
    # Four references to images share this number of pixels: 25 along an edge.
    monkeypatch.setattr(report, "PAGE_PIXELS", 4 * 25**2)
    sizes = sorted(image.size for image in open_images(make_page(evaluation)))
    assert sizes == [(4, 25), (12, 12), (25, 7)]


def test_a_confusion_table_counts_answers_by_reference():
    def labels(answer, references, score):
        result = {"answer": answer, "answers": references, "score": score}
        return report.answer_labels(result)

    pairs = [
        labels("cat", ["dog", "cat", "dog"], 0.3),  # the most frequent reference counts
        labels("a dog", ["dog"], 1),  # right by the benchmark's rule
        labels("Dog. ", ["Cat"], 0),
        labels("bird", ["cat"], 0),
        labels("bird", ["dog"], 0),
        labels("Cat.", ["cat"], 0),  # wrong by the rule, so not on the diagonal
        labels("I see an animal, perhaps a cat", ["cat"], None),
    ]
    assert pairs[:4] == [("dog", "cat"), ("dog", "dog"), ("cat", "dog"), ("cat", "bird")]
    # the last of a row: all other answers
    expected = {"references": ["cat", "dog"], "counts": [[0, 1, 3], [1, 1, 1]]}
    assert report.confusion_table(pairs) == expected


@pytest.mark.parametrize(
    "labels",
    [
        [("yes", "yes"), ("no", "no")],  # no confusion
        [("yes", "no"), ("yes", "yes")],  # one reference
        [("a b " * 9, "yes"), ("yes", "yes")],  # long
        [(str(i), "0") for i in range(report.MAX_ROWS + 1)],  # many
    ],
)
def test_long_or_many_references_have_no_confusion_table(labels):
    assert report.confusion_table(labels) is None


def test_the_diagonals_of_confusion_tables_are_the_right_answers(evaluation):
    found = data_of(make_page(evaluation))["confusions"]
    assert dict.fromkeys(found) == found == dict.fromkeys(["count", "exists", EVIL, "all"])
    results, questions = evaluation
    pairs = zip(results, [["one"], ["two"]] * 35, strict=True)
    results = [result | {"answers": references} for result, references in pairs]
    data = data_of(make_page((benchmarks.score_results(results, "exact"), questions)))
    for kind, table in data["confusions"].items():
        rows = [row for row in data["rows"] if kind in ("all", row["kind"])]
        assert table["references"] == ["one", "two"]
        assert sum(map(sum, table["counts"])) == len(rows)
        diagonal = table["counts"][0][0] + table["counts"][1][1]
        assert diagonal == sum(row["outcome"] == "right" for row in rows)


DRIVE = """
<script>
const report = [];
function note() {
  report.push([byId("count").textContent.split(" ")[0], shown.length,
    [...byId("outcomes").children].map(button => button.textContent)]);
}
const choose = kind => { byId("kind").value = kind; chooseKind(); };
note();
choose("exists"); note();
[...byId("outcomes").children].find(button => button.textContent.startsWith("wrong")).click(); note();
choose("all"); note();
byId("outcomes").children[0].click();
byId("search").value = "ALERT(1)<\\/SCRIPT><IMG SRC=X ONERROR=ALERT(1)> 32"; filter(); note();
report.push(document.querySelectorAll("#rows .row").length, document.scripts.length,
  document.querySelectorAll("#rows img").length, document.documentElement.scrollWidth);
document.body.replaceChildren();
document.body.textContent = JSON.stringify(report);
</script></html>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_filters_of_the_page_count_as_the_scores_do(evaluation, tmp_path):
    page = make_page(evaluation)
    (tmp_path / "page.html").write_text(page.replace("</html>", DRIVE))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--dump-dom", "--window-size=500,900"]
    done = subprocess.run(
        [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=60
    )
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]
    *notes, rows, scripts, images, width = json.loads(body)
    data = data_of(page)

    def counts(kept):
        kept = [row for row in data["rows"] if kept(row)]
        found = dict.fromkeys(row["outcome"] for row in data["rows"])
        number = Counter(row["outcome"] for row in kept)
        return [f"all {len(kept)}", *(f"{name} {number[name]}" for name in found)]

    def is_exists(row):
        return row["kind"] == "exists"

    everything, exists = counts(lambda row: True), counts(is_exists)
    wrong = [
        sum(row["outcome"] == "wrong" for row in data["rows"] if test(row))
        for test in (is_exists, bool)
    ]
    assert notes[0] == ["70", 70, everything]
    assert notes[1] == [exists[0].split()[1], int(exists[0].split()[1]), exists]
    assert notes[2] == [str(wrong[0]), wrong[0], exists]
    assert notes[3] == [str(wrong[1]), wrong[1], everything]
    assert notes[4][1] == rows == 1 and scripts == 3  # data, the page's and this test's
    assert images == 1 and width <= 500  # nothing is wider than the window
