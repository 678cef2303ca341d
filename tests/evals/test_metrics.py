"""Scores by hand, by the owners' own programs if a package has them, and by their definitions."""

import itertools
import math
import random
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pycocoevalcap.tokenizer.ptbtokenizer as ptb
import pytest
from pycocoevalcap.cider.cider import Cider

from nanovlm import UserError
from nanovlm.evals import benchmarks, metrics
from nanovlm.evals.cider import cider_scores, tokenize_caption
from nanovlm.evals.metrics import (
    anls_score,
    confidence_interval,
    letter_score,
    mathvista_score,
    mme_score,
    mmmu_score,
    ocrbench_score,
    relaxed_accuracy,
    textvqa_accuracy,
    vqa_accuracy,
    yes_no_score,
)


def scored(name, questions, answers):
    """The results of a benchmark's questions, with their scores."""
    results = [
        {"id": 7, **question, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return benchmarks.score_results(results, name)


def benchmark_metrics(name, questions, answers):
    return benchmarks.benchmark_metrics(name, scored(name, questions, answers))


# ---- VQA accuracy ----


def references_of(**counts):
    return [word for word, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    "matches, score",
    [
        (0, 0.0),
        (1, 0.3),  # nine of ten have 1 among the others: 9 x 1/3 / 10
        (2, 0.6),  # eight have 2, two have 1: (8 x 2/3 + 2 x 1/3) / 10
        (3, 0.9),  # seven have 3, three have 2: (7 x 1 + 3 x 2/3) / 10, not min(1, 3/3) = 1
        (4, 1.0),  # each has 3 or more
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_of_ten_references_out(matches, score):
    assert vqa_accuracy("red", references_of(red=matches, blue=10 - matches)) == pytest.approx(
        score, abs=1e-12
    )


def test_vqa_normalizes_only_if_references_differ():
    same, mixed = (
        references_of(**{"the red one": 10}),
        references_of(**{"the red one": 9, "blue": 1}),
    )
    assert vqa_accuracy("The red one.", same) == 0  # it must be as written
    assert vqa_accuracy("the red one", same) == 1
    assert vqa_accuracy("Red 1!", mixed) == 1  # "the red one" and "Red 1!" are both "red 1"
    assert textvqa_accuracy("The red one.", same) == 1  # TextVQA's owners always normalizes
    assert (
        textvqa_accuracy("man 's", references_of(**{"Man's": 10})) == 1
        and vqa_accuracy("man 's", references_of(**{"Man's": 9, "x": 1})) == 0
    )  # and split off a possessive


@pytest.mark.parametrize(
    "text, kept",
    [
        ("The two Cats", "2 cats"),
        ("a", ""),  # so letters are not normalized
        ("None", "0"),
        ("dont", "don't"),
        ("couldn'tve been", "couldn't've been"),
        ("somebody'd", "somebodyd"),  # an error of the script's table
        ("1,000", "1000"),  # a comma between digits: all scores go without a space
        ("yes/no", "yes no"),  # otherwise a mark becomes a space
        ("yes / no", "yes no"),  # or nothing if a space is beside it
        ("yes, no/maybe", "yes no maybe"),
        ("x-ray -ray", "xray ray"),  # everywhere, if a space is beside it anywhere
        ("x,1/2", "x 1 2"),  # this comma is not between digits
        ("3.5 m.", "3.5 m"),  # a period stays before a digit
        ("a.m.", "am"),
        ("it's; fine", "it's fine"),  # apostrophes and colons stay
        ("10:30 o'clock", "10:30 o'clock"),
        ("." * 33, "."),  # the script strips at most 32 periods
    ],
)
def test_vqa_normalization(text, kept):
    assert metrics.normalize_vqa(text) == kept


def test_the_contractions_are_the_scripts():
    """The checksum is that of vqaEval.py's table.

    It is without the four pairs that lower-cased words never meet, and two that change nothing.
    """
    table = "\n".join(f"{short} {full}" for short, full in sorted(metrics.CONTRACTIONS.items()))
    assert len(metrics.CONTRACTIONS) == 114 and zlib.crc32(table.encode()) == 621764067


class Literal:
    """vqaEval.py's definition, step by step, without our code."""

    numbers = {
        "none": "0",
        "zero": "0",
        "one": "1",
        "two": "2",
        "three": "3",
        "four": "4",
        "five": "5",
        "six": "6",
        "seven": "7",
        "eight": "8",
        "nine": "9",
        "ten": "10",
    }
    signs = [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]

    def punctuation(self, text):
        out = text
        for sign in self.signs:
            if (sign + " " in text or " " + sign in text) or re.search(
                r"(\d)(\,)(\d)", text
            ) is not None:
                out = out.replace(sign, "")
            else:
                out = out.replace(sign, " ")
        return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, 32)

    def articles(self, text):
        out = []
        for word in text.lower().split():
            word = self.numbers.get(word, word)
            if word not in ("a", "an", "the"):
                out.append(word)
        return " ".join(
            {"dont": "don't", "its": "its", "isnt": "isn't", "hed've": "he'd've"}.get(word, word)
            for word in out
        )

    def accuracy(self, answer, references):
        answer = answer.replace("\n", " ").replace("\t", " ").strip()
        if len(set(references)) > 1:
            references = [self.articles(self.punctuation(reference)) for reference in references]
            answer = self.articles(self.punctuation(answer))
        scores = []
        for i in range(len(references)):
            others = [reference for j, reference in enumerate(references) if j != i]
            scores.append(
                min(1, len([reference for reference in others if reference == answer]) / 3)
            )
        return sum(scores) / len(scores)

    def textvqa(self, answer, references):
        def tidy(text):
            text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
            return self.articles(
                self.punctuation(text.replace("\n", " ").replace("\t", " ").strip())
            )

        references, answer = list(enumerate(map(tidy, references))), tidy(answer)
        return sum(
            min(1, len([g for g in references if g != left and g[1] == answer]) / 3)
            for left in references
        ) / len(references)


def test_vqa_equals_a_literal_transcription_on_random_answers():
    rng, literal = random.Random(7), Literal()
    pieces = [
        "the",
        "A",
        "two",
        "ten",
        "red",
        "Red",
        "dont",
        "isnt",
        "hed've",
        "1,000",
        "3.5",
        "b.",
        "x-ray",
        "yes/no",
        "?",
        "!",
        ", ",
        "man's",
        "@",
    ]

    def phrase():
        return "".join(
            rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randint(1, 3))
        ).strip()

    for _ in range(3000):
        pool = [phrase() for _ in range(rng.randint(1, 4))]
        references, answer = (
            [rng.choice(pool) for _ in range(10)],
            rng.choice([*pool, "red", "\tthe red.\n"]),
        )
        assert vqa_accuracy(answer, references) == pytest.approx(
            literal.accuracy(answer, references), abs=1e-12
        ), (answer, references)
        assert textvqa_accuracy(answer, references) == pytest.approx(
            literal.textvqa(answer, references), abs=1e-12
        ), (answer, references)


@pytest.mark.parametrize(
    "score, question, message",
    [
        (
            "vqa",
            {"answers": ["red"] * 3},
            "question 7 has 3 reference answers, but VQA accuracy needs at least 4",
        ),
        ("textvqa", {"answers": ["red"]}, "question 7 has 1 reference answers"),
        (
            "mathvista",
            {"answers": ["7"], "choices": []},
            "question 7 has no choices, so its answer_type must be integer, list, or float",
        ),
    ],
)
def test_a_question_that_a_metric_cannot_score_is_named(score, question, message):
    with pytest.raises(UserError, match=message):
        scored(score, [question], ["red"])


# ---- scores that compare texts ----


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("-3", "3", 0),
        ("-3", "-3.1", 1),  # the minus sign counts
        ("1,000", "1000", 1),
        ("1040", "1,000", 1),
        ("1,00", "100", 0),
        ("50%", "0.5", 1),
        ("51%", "50%", 1),
        ("50", "50%", 0),
        ("1950", "2000", 1),
        ("1899", "2000", 0),  # a year is a number: within 100 of 2000
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.01", "0", 0),  # nothing is within 5% of 0: compared as texts
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("nan", "nan", 1),
        ("", "3", 0),
        ("3 cats", "3", 0),
    ],
)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_accuracy(answer, [reference]) == score


def test_relaxed_equals_pix2structs():
    def to_float(text):
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    def literal(target, prediction):
        value, wanted = to_float(prediction), to_float(target)
        if value is not None and wanted:
            return abs(value - wanted) / abs(wanted) <= 0.05
        return prediction.lower() == target.lower()

    stems = [
        "3",
        "3.1",
        ".5",
        "100",
        "104.9",
        "2.",
        "1e2",
        "0",
        "007",
        "Dog",
        "dog",
        "0.03",
        "+3",
        "two 3",
    ]
    made = [sign + stem + unit for sign in ("", "-") for stem in stems for unit in ("", "%")]
    for prediction, target in itertools.product(made, made):
        assert relaxed_accuracy(prediction, [target]) == literal(target, prediction), (
            prediction,
            target,
        )


@pytest.mark.parametrize(
    "answer, references, score",
    [
        ("kitten", ["sitting"], 1 - 3 / 7),  # two letters changed, one added, of seven
        ("abcd", ["abxy"], 0.0),  # NL = 2/4: not under 0.5
        ("abcde", ["abcxy"], 1 - 2 / 5),
        (" Paris ", ["paris", "london"], 1.0),  # case and ends; the best of the references
        ("paris.", ["paris"], 1 - 1 / 6),  # a period is an edit
        ("the paris", ["paris"], 1 - 4 / 9),  # so is an article
        ("", ["paris"], 0.0),
        ("x", ["a much longer text"], 0.0),
    ],
)
def test_anls(answer, references, score):
    assert anls_score(answer, references) == pytest.approx(score, abs=1e-12)


def test_anls_equals_the_recursion():
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(
            distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0])
        )

    rng = random.Random(5)
    for _ in range(150):
        a, b = ("".join(rng.choice("ab c") for _ in range(rng.randint(1, 6))) for _ in range(2))
        left, right = a.strip(), b.strip()
        nl = distance(left, right) / max(len(left), len(right), 1)
        assert anls_score(a, [b]) == pytest.approx(1 - nl if nl < 0.5 else 0.0, abs=1e-12)


def test_exact_and_contains():
    assert metrics.exact_match(" cat\n", ["cat"]) == 1 and metrics.exact_match("Cat", ["cat"]) == 0
    assert (
        metrics.contains_reference("a photo of a Cat.", ["cat"]) == 1
        and metrics.contains_reference("a catfish", ["cat"]) == 0
    )
    assert metrics.contains_reference("anything", [" "]) == 0


def test_ocrbench_is_containment_and_at_most_one_per_question():
    text, formula = {"dataset_name": "textVQA"}, {"dataset_name": "HME100k"}
    assert (
        ocrbench_score("It says STOP\nHere", ["stop here", "stop"], text) == 1
    )  # two alternatives match: still 1
    assert ocrbench_score("s top", ["stop"], text) == 0
    assert (
        ocrbench_score("x ^ 2 + Y", ["x^2 +Y"], formula) == 1
        and ocrbench_score("x^2+y", ["x^2+Y"], formula) == 0
    )  # its case, not its spaces
    assert ocrbench_score("", ["stop"], text) == 0


# ---- scores that parse a choice ----


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        (" B\n", "B"),
        ("**B**", "B"),
        ("B. a dog", "B"),
        ("B: a dog", "B"),
        ("(B) a dog", "B"),
        ("B)", "B"),
        ("B\nbecause it barks", "B"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("The correct answer is: B, a dog", "B"),
        ("I choose option B", "B"),
        ("It must be (B), as it barks", "B"),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("The answer is a dog.", "B"),
        ("A cat and a dog", None),
        ("A large animal", None),  # "A" is an article here
        ("Answer: A dog", "B"),
        ("The answer is A because it purrs", "A"),
        ("The answer is A large animal", None),
        ("Both (A) and (B)", None),
        ("(A) and (B)", None),
        ("The answer is A. No, the answer is B", None),
        ("A and B", None),
        ("A, B", None),
        ("B. a dog, and not (A)", None),
        ("B. a dog. The answer is B", "B"),
        ("(A) a cat? The answer is B", "B"),
        ("E", None),
        ("(E)", None),
        ("", None),
        ("dog", None),
        ("I do not know", None),
        ("a", "A"),
        ("Bob", None),
    ],
)
def test_letters_are_parsed_or_unparsed(answer, letter):
    question = {"choices": ["a cat", "a dog", "a large horse", "a cow"]}
    for reference in "ABCD":
        assert letter_score(answer, [reference], question) == (
            None if letter is None else float(letter == reference)
        )


def test_letters_without_choices():
    assert (
        letter_score("D.", ["D"], {"choices": []}) == 1
        and letter_score("D.", ["C"], {}) == 0
        and letter_score("a cat", ["A"], {"choices": []}) is None
    )
    assert (
        letter_score("Yes.", ["yes"], {"choices": []}) == 1
        and letter_score("3", ["4"], {"choices": []}) == 0
    )  # RealWorldQA's open questions
    assert (
        letter_score("red", ["A"], {"choices": ["red", "Red."]}) is None
    )  # two choices with one text


def test_mmmu_parses_open_answers_as_its_script():
    ask = {"choices": []}
    assert mmmu_score("B", ["B"], {"choices": ["1", "2"]}) == 1
    assert (
        mmmu_score("So the result is 1234.501 volts", ["1,234.50"], ask) == 1
    )  # a number to two places
    assert (
        mmmu_score("It is 1,234.5 volts", ["1234.50"], ask) == 0
    )  # its script finds 1,234 and 234.5 here
    assert (
        mmmu_score("x = 0.334", ["0.33"], ask) == 1 and mmmu_score("x = 0.344", ["0.33"], ask) == 0
    )
    assert mmmu_score("The organ is the left Ventricle.", ["left ventricle"], ask) == 1
    assert (
        mmmu_score("It is 12 and then it is 7", ["12"], ask) == 0
    )  # the shortest tail alone counts: "7"
    assert mmmu_score("$6,000", ["6000"], ask) == 1 and mmmu_score("16", ["6"], ask) == 0
    assert mmmu_score("", ["6"], ask) == 0


def mmmu_open(response, reference):
    """MMMU's parse_open_response and eval_open, step by step."""

    def normalize(string):
        string = string.strip()
        try:
            return [round(float(string.replace(",", "")), 2)]
        except ValueError:
            string = string.lower()
            return [" " + string, string + " "] if len(string) == 1 else [string]

    response = response.strip().strip(".").lower()
    parts, keys = re.split(r"\.\s(?=[A-Z])|\n", response), []
    indicators = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    for index, part in enumerate(parts):
        if index == len(parts) - 1:
            indicators.extend(["="])
        shortest = None
        for indicator in indicators:
            if indicator in part:
                tail = part.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest.strip() not in [":", ",", ".", "!", "?", ";", ":", "'"]:
            keys.append(shortest)
    keys = keys or [response]
    found = list(keys)
    for key in keys:
        found += re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", key) + re.findall(
            r"-?\d+(?:\.\d+)?[eE][+-]?\d+", key
        )
        found += re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", key)
    wanted = [norm for answer in reference for norm in normalize(answer)]
    for guess in [norm for text in found for norm in normalize(text)]:
        if isinstance(guess, str) and any(
            isinstance(norm, str) and norm in guess for norm in wanted
        ):
            return 1.0
        if isinstance(guess, float) and guess in wanted:
            return 1.0
    return 0.0


def test_mmmu_equals_a_literal_transcription_on_random_answers():
    rng, right = random.Random(13), 0
    pieces = [
        "the answer is ",
        "so ",
        "x = ",
        "result ",
        "12",
        "1,234.5",
        "-3",
        ".5",
        "2e3",
        "16v",
        "Left ventricle",
        "c",
        ".",
        "\n",
        " ",
        ": ",
        "3.14159 ",
        "$6,000",
    ]
    references = [
        "12",
        "1234.50",
        "-3",
        "0.5",
        "2000",
        "left ventricle",
        "C",
        "3.14",
        "6,000",
        "16v",
    ]
    for _ in range(4000):
        answer, reference = (
            "".join(rng.choices(pieces, k=rng.randint(1, 6))),
            rng.sample(references, rng.randint(1, 2)),
        )
        assert mmmu_score(answer, reference, {"choices": []}) == mmmu_open(answer, reference), (
            answer,
            reference,
        )
        right += mmmu_open(answer, reference)
    assert 400 < right < 3600, "both come up"


@pytest.mark.parametrize(
    "answer, word",
    [
        ("Yes", "yes"),
        ("yes, there is a cat", "yes"),
        ("No.", "no"),
        ("There is no cat", "no"),
        ("It is not there", "no"),
        ("notice the cat", None),
        ("Nothing", None),
        ("a cat", None),
        ("", None),
        ("Yesterday", None),
        ("I see a cat. No dog", None),  # the first sentence alone
        ("Yes, and no dog", "no"),  # POPE's rule: any no
    ],
)
def test_yes_and_no_are_whole_words(answer, word):
    for reference in ("yes", "no"):
        assert yes_no_score(answer, [reference]) == (
            None if word is None else float(word == reference)
        )


def test_mme_takes_the_first_word():
    assert mme_score("Yes, and no dog", ["Yes"]) == 1 and mme_score("No", ["Yes"]) == 0
    assert (
        mme_score("notice it", ["No"]) is None
        and mme_score("Not so", ["No"]) is None
        and mme_score("The answer is yes", ["Yes"]) is None
    )


@pytest.mark.parametrize(
    "answer, reference, score, question",
    [
        ("B", "large", 1, {"choices": ["small", "large"]}),
        ("(A) small", "large", 0, {"choices": ["small", "large"]}),
        (
            "larger",
            "large",
            None,
            {"choices": ["small", "large"]},
        ),  # the owners' script would take the nearest
        ("7", "7", 1, {"answer_type": "integer"}),
        ("The answer is 7.", "7", 1, {"answer_type": "integer"}),
        ("3 + 4 = 7, so the answer is 7", "7", 1, {"answer_type": "integer"}),
        ("3 + 4 = 7.", "7", 1, {"answer_type": "integer"}),  # the prompt requires it at the end
        ("3 + 4 = 7, not 8", "7", None, {"answer_type": "integer"}),
        ("7.9", "7", 1, {"answer_type": "integer"}),  # int(float(x))
        ("-1,200 dollars", "-1200", 1, {"answer_type": "integer"}),
        ("3 or 4", "3", None, {"answer_type": "integer"}),
        ("seven", "7", None, {"answer_type": "integer"}),
        ("1.249", "1.2", 1, {"answer_type": "float", "precision": 1.0}),
        ("1.26", "1.2", 0, {"answer_type": "float", "precision": 1}),
        ("It is 0.5", "0.5", 1, {"answer_type": "float", "precision": 2}),
        ("[1,2, 3]", "[1, 2, 3]", 1, {"answer_type": "list"}),
        ("1, 2, 3", "[1, 2, 3]", None, {"answer_type": "list"}),
        ("", "7", None, {"answer_type": "integer"}),
    ],
)
def test_mathvista(answer, reference, score, question):
    assert mathvista_score(answer, [reference], question) == score


# ---- captions ----

CAPTIONS = [
    "a man riding a wave on a surfboard",
    "two dogs play with a red frisbee in the grass",
    "a plate of food with broccoli and rice",
    "a dog catches a frisbee",
    "the man is riding a big wave in the ocean",
    "a red bus driving down a street",
    "food on a white plate",
    "a",
]


def test_cider_equals_pycocoevalcap_on_random_captions():
    rng, vocabulary = (
        random.Random(11),
        sorted({word for caption in CAPTIONS for word in caption.split()}),
    )
    for image_count in (1, 2, 37):
        pool = CAPTIONS + [
            " ".join(rng.choices(vocabulary, k=rng.randint(1, 9))) for _ in range(20)
        ]
        references = [rng.choices(pool, k=rng.randint(1, 6)) for _ in range(image_count)]
        answers = [
            rng.choice([*CAPTIONS, "", rng.choice(texts), "riding riding riding"])
            for texts in references
        ]
        each = cider_scores(answers, references)
        score = sum(each) / len(each)
        theirs, parts = Cider().compute_score(
            dict(enumerate(references)), {i: [answer] for i, answer in enumerate(answers)}
        )
        assert score == pytest.approx(theirs, abs=1e-6) and each == pytest.approx(
            list(parts), abs=1e-6
        )


def test_cider_by_hand():
    """Two images with one reference each, which share no word.

    Each weight is log 2, which cancels: cosines are of counts. "a cat sat", "a cat ran": 1-grams
    2/3, 2-grams 1/2, 3-grams 0, no 4-grams: 10 x (2/3 + 1/2) / 4. Both have two pairs of words: no
    penalty.
    """
    each = cider_scores(["a cat sat", "dog"], [["a cat ran"], ["dog"]])
    assert each == pytest.approx([10 * (2 / 3 + 1 / 2) / 4, 10 / 4])
    # clipped: one of three counts, 1 x 1 / (3 x 1); the length differs by 2 pairs
    longer = cider_scores(["dog dog dog", "dog"], [["dog"], ["x"]])[0]
    assert longer == pytest.approx(10 * math.exp(-(2**2) / (2 * 6**2)) * (1 / 3) / 4)


def test_cider_needs_references():
    with pytest.raises(UserError, match="1 of 2 images have no reference caption"):
        cider_scores(["a", "b"], [["a"], []])


TREEBANK = {  # by PTBTokenizer 3.4.1 -lowerCase, less what pycocoevalcap drops
    "A man's dog isn't here; it can't run!": "a man 's dog is n't here it ca n't run",
    'The (small) "red" t-shirt, $5.00 at 3:30 p.m. on Jan. 5th...': (
        "the -lrb- small -rrb- red t-shirt $ 5.00 at 3:30 p.m. on jan. 5th"
    ),
    "black/white cat & dog -- isn't it? 50% of it's": (
        "black/white cat & dog is n't it 50 % of it 's"
    ),
    "I'm gonna cannot we'll they've he'd o'clock 'tis 'twas dogs' tail": (
        "i 'm gon na can not we 'll they 've he 'd o'clock 't is 't was dogs tail"
    ),
    "A dog... with a U.S. flag and Mr. Smith. and St. Louis No. 5": (
        "a dog with a u.s. flag and mr. smith and st. louis no. 5"
    ),
    "1,000 people 3.5 meters #1 @home a*b [x] 1/2 cup e-mail": (
        "1,000 people 3.5 meters # 1 @home a * b -lsb- x -rsb- 1/2 cup e-mail"
    ),
    "a \u201cstop\u201d sign it\u2019s caf\u00e9 \u2013 dash \u2014 long \u2026 end": (
        "a stop sign it 's caf\u00e9 dash long end"
    ),
    "don't y'all 80's 1980s '90s d'oh ma'am": "do n't y' all 80 's 1980s '90s d'oh ma'am",
}


def test_words_are_the_treebanks():
    for text, tokens in TREEBANK.items():
        assert tokenize_caption(text) == tokens.split()


@pytest.mark.skipif(not shutil.which("java"), reason="the treebank tokenizer is a Java program")
def test_words_are_stanfords(tmp_path):
    texts = [
        *TREEBANK,
        *CAPTIONS,
        "A kitchen with cabinets, a stove, microwave and refrigerator.",
        "A giraffe is eating it's food in the zoo.",
        "a small air plane getting ready to take off .",
        "An airplane wing pointed toward the ground?",
        "Cat lying on a red vehicle's wheel. ",
    ]
    (tmp_path / "texts").write_text("\n".join(texts), encoding="utf-8")
    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    command = [
        "java",
        "-cp",
        jar,
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        tmp_path / "texts",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    for text, line in zip(texts, lines, strict=False):
        assert tokenize_caption(text) == [
            token for token in line.split() if token not in ptb.PUNCTUATIONS
        ], text


# ---- metrics of a whole benchmark ----


def balanced(n):
    """POPE's shape: as many yes as no."""
    return [{"kind": "all", "answers": [("yes", "no")[i % 2]], "image": [i]} for i in range(n)]


def test_pope_by_hand():
    """References yes yes yes no no no, answers yes yes no yes no ?: 3 of 6 are right.

    2 of the 3 yes are right, 2 of the 3 expected ones are found: F1 = 2 x (2/3)^2 / (4/3) = 2/3.
    """
    questions = [{"kind": "all", "answers": [reference]} for reference in ["yes"] * 3 + ["no"] * 3]
    answers = ["Yes", "yes, one", "no", "yes", "No.", "a dog"]
    got = benchmark_metrics("pope", questions, answers)
    assert got == pytest.approx(
        {
            "accuracy": 0.5,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "F1": 2 / 3,
            "yes-rate": 0.5,
            "unparsed": 1 / 6,
        }
    )
    for question, kind in zip(questions, ["random", "popular"] * 3, strict=True):
        question["kind"] = kind
    parts = benchmark_metrics("pope", questions, answers)
    assert got.items() <= parts.items() and len(parts) == 3 * 5 + 1
    assert (
        parts["random accuracy"] == 2 / 3 and parts["popular yes-rate"] == 2 / 3
    )  # random: yes yes no ...: references yes yes no, answers yes no No.


@pytest.mark.parametrize(
    "answer, want",
    [
        (
            "yes",
            {
                "accuracy": 0.5,
                "precision": 0.5,
                "recall": 1,
                "F1": 2 / 3,
                "yes-rate": 1,
                "unparsed": 0,
            },
        ),
        (
            "no",
            {"accuracy": 0.5, "precision": 0, "recall": 0, "F1": 0, "yes-rate": 0, "unparsed": 0},
        ),
        ("", {"accuracy": 0, "precision": 0, "recall": 0, "F1": 0, "yes-rate": 0, "unparsed": 1}),
    ],
)
def test_one_answer_to_all_of_pope(answer, want):
    questions = balanced(40)
    answers = [answer] * 40
    assert benchmark_metrics("pope", questions, answers) == pytest.approx(want)


def test_random_answers_get_the_score_of_chance():
    """Within four standard errors: 4 x sqrt(p (1 - p) / n)."""
    rng, n = random.Random(2), 4000
    questions = [
        {"kind": "all", "answers": [rng.choice("ABCD")], "choices": ["w", "x", "y", "z"]}
        for _ in range(n)
    ]
    always, thrown = ["A"] * n, [rng.choice("ABCD") for _ in range(n)]
    share = sum(question["answers"] == ["A"] for question in questions) / n
    assert benchmark_metrics("mmstar", questions, always) == {"accuracy": share, "unparsed": 0}
    got = benchmark_metrics("mmstar", questions, thrown)["accuracy"]
    assert abs(got - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    coins = [rng.choice(["yes", "no"]) for _ in range(n)]
    assert abs(benchmark_metrics("pope", balanced(n), coins)["accuracy"] - 0.5) < 4 * math.sqrt(
        0.25 / n
    )


def test_an_empty_answer_gets_nothing_anywhere():
    references = {yes_no_score: ["yes"], mme_score: ["yes"], letter_score: ["B"]}
    references[mathvista_score] = ["3"]
    question = {"choices": [], "dataset_name": "IAM", "answer_type": "integer", "precision": 1}
    scores = {one.score for one in benchmarks.BENCHMARKS.values() if not one.is_caption}
    assert len(scores) == 12
    for score in scores:
        found = score("", references.get(score, ["red"] * 10), question)
        assert not found, score
        # nothing to parse is not the same as wrong
        assert (found is None) == (score in references)


def test_mme_by_hand():
    """Perception: two images of `count`, 3 of 4 answers right, one image with both: 75 + 50.

    Cognition: one image, an unparsed and a wrong answer: 0. A model that always answers yes has acc
    50 and acc+ 0 in each category, as each image has a yes and a no.
    """
    questions = [
        {"kind": kind, "image": [image], "answers": [reference]}
        for kind, image in (("count", "a.jpg"), ("count", "b.jpg"), ("code_reasoning", "a.jpg"))
        for reference in ("Yes", "No")
    ]
    answers = ["yes", "no", "yes", "Yes", "notice", "yes"]
    got = benchmark_metrics("mme", questions, answers)
    assert got == pytest.approx(
        {
            "perception": 125,
            "cognition": 0,
            "total": 125,
            "count": 125,
            "code_reasoning": 0,
            "unparsed": 1 / 6,
        }
    )
    always = ["yes"] * 6
    assert benchmark_metrics("mme", questions, always)["total"] == 100


def test_other_benchmarks_report_the_mean_score_by_their_owners_name():
    results = [{"score": score} for score in (1.0, 0.5, None)]
    for name, metric in (
        ("docvqa", "ANLS"),
        ("coco", "CIDEr-D"),
        ("vqav2", "VQA accuracy"),
        ("chartqa", "relaxed accuracy"),
        ("ocrbench", "accuracy"),
        ("mmmu", "accuracy"),
    ):
        found = benchmarks.benchmark_metrics(name, results)
        assert found == {metric: 0.5, "unparsed": 1 / 3}


def test_the_interval_is_the_binomials():
    """Of n coins with share p, the middle 95% is p ± 1.96 √(p (1 - p) / n); None counts as 0.

    The same seed gives the same interval.
    """
    scores = [1.0] * 300 + [0.0] * 600 + [None] * 100
    low, high = confidence_interval(scores, seed=1)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.005) and high == pytest.approx(
        0.3 + half, abs=0.005
    )
    assert confidence_interval(scores, seed=1) == (low, high) != confidence_interval(
        scores, seed=2
    ) and confidence_interval([1.0] * 9, seed=0) == (1.0, 1.0)
