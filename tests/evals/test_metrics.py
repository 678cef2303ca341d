"""Scores by hand, by the owners' own programs if a package has them, and by their definitions."""

import itertools
import math
import random
import re
import shutil
import subprocess
import time
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
    mmstar_score,
    ocrbench_score,
    pope_score,
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
        ("1,000", "1000", 0),  # pix2struct reads no thousands separators
        ("1040", "1,000", 0),
        ("1,000", "1,000", 1),
        ("50 %", "0.5", 1),
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
        ("nan", "nan", 0),  # as Python's float says
        ("1e309", "100", 0),
        ("9" * 310, "9", 0),
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
        "1,000",
        "1000",
        "1_000",
        "1e309",
        "inf",
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
        ("abcd", ["abxy"], 0.5),  # NL = 2/4
        ("abcdx", ["abyzw"], 0.0),  # NL = 3/5
        ("Total\namount", ["total  amount"], 1.0),  # the amount of white space
        ("ab ", ["ax"], 1 - 1 / 3),  # the length has the space
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


def anls_script(answer, references):
    """The competition's script (rrc.cvc.uab.es), step by step."""

    def levenshtein_distance(s1, s2):
        if len(s1) > len(s2):
            s1, s2 = s2, s1
        distances = range(len(s1) + 1)
        for i2, c2 in enumerate(s2):
            distances_ = [i2 + 1]
            for i1, c1 in enumerate(s1):
                if c1 == c2:
                    distances_.append(distances[i1])
                else:
                    distances_.append(1 + min((distances[i1], distances[i1 + 1], distances_[-1])))
            distances = distances_
        return distances[-1]

    values = []
    for reference in references:
        gt_answer = " ".join(reference.strip().lower().split())
        det_answer = " ".join(answer.strip().lower().split())
        dist = levenshtein_distance(gt_answer, det_answer)
        length = max(len(reference.upper()), len(answer.upper()))
        values.append(0.0 if length == 0 else float(dist) / float(length))
    question_result = 1 - min(values)
    return 0 if question_result < 0.5 else question_result


def test_anls_equals_the_competitions_script():
    rng, scores = random.Random(5), set()
    for _ in range(3000):
        answer, *references = (
            "".join(rng.choices("abB \n", k=rng.randint(0, 9))) for _ in range(rng.randint(2, 4))
        )
        expected = anls_script(answer, references)
        assert anls_score(answer, references) == expected, (answer, references)
        scores.add(expected)
    assert {0, 0.5, 1} < scores


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
        ("B. a dog, and not (A)", "B"),  # the letter at the start decides
        ("B. a dog, since option C is a tree.", "B"),
        ("A is the correct option. Option B is incorrect, as it is a bird", "A"),
        ("A: a dog", None),  # the letter and the text disagree
        ("A:  The correct option letter is D.", "D"),
        ("The correct option letter is B.", "B"),
        ("The answer is B or C", None),
        ("The answer is not B", None),
        ("Option B is incorrect", None),
        ("B (a dog)", "B"),
        ("B - a dog", "B"),
        ("b) a dog", "B"),
        ("**B**: a dog", "B"),
        ("The answer is b", "B"),
        ("A dog, as it barks", "B"),  # a choice's text and a mark
        ("A dog, a cat", None),
        ('The answer is "a dog".', "B"),
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


def mmmu_choice(response, all_choices, index2ans):
    """MMMU's parse_multi_choice_response, step by step; None where it calls random.choice."""
    for char in [",", ".", "!", "?", ";", ":", "'"]:
        response = response.strip(char)
    response = " " + response + " "
    index_ans, ans_with_brack, candidates = True, False, []
    for choice in all_choices:
        if f"({choice})" in response:
            candidates.append(choice)
            ans_with_brack = True
    if len(candidates) == 0:
        for choice in all_choices:
            if f"{choice} " in response:
                candidates.append(choice)
    if len(candidates) == 0:
        for choice in all_choices:
            if f"{choice}." in response:
                candidates.append(choice)
    if len(candidates) == 0 and len(response.split()) > 5:
        for index, ans in index2ans.items():
            if ans.lower() in response.lower():
                candidates.append(index)
                index_ans = False
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    start_indexes = []
    for can in candidates:
        if index_ans and ans_with_brack:
            start_indexes.append(response.rfind(f"({can})"))
        elif index_ans:
            start_indexes.append(response.rfind(f" {can} "))
        else:
            start_indexes.append(response.lower().rfind(index2ans[can].lower()))
    return candidates[start_indexes.index(max(start_indexes))]  # np.argmax: the first of equals


def mmstar_right(predict, answer):
    """MMStar_eval's comparison, step by step."""
    answer = answer.lower().strip().replace("\n", " ")
    predict = predict.lower().strip().replace("\n", " ")
    try:
        return (
            answer == predict[0]
            or (predict[0] == "(" and answer == predict[1])
            or (predict[0:7] == "option " and answer == predict[7])
            or (predict[0:14] == "the answer is " and answer == predict[14])
        )
    except IndexError:
        return False


def test_multiple_choice_equals_the_owners_scripts_on_random_answers():
    rng = random.Random(3)
    choices = ["a dog", "Yes", "3", "a big dog"]
    letters = dict(zip("ABCD", choices, strict=True))
    pieces = ["A", "B", "(C)", "(D)", "b", ".", ". ", " ", ", ", ":", "option ", "the answer is "]
    pieces += ["\n", "'", "a dog", "yes ", "a big dog", "3", "it is one of them ", "USA ", "(", "e"]
    found, right = [], []
    for _ in range(6000):
        answer = "".join(rng.choices(pieces, k=rng.randint(0, 6)))
        found.append(mmmu_choice(answer, [*letters], letters))
        for letter in letters:
            score = mmmu_score(answer, [letter], {"choices": choices})
            assert score == (None if found[-1] is None else found[-1] == letter), answer
            right.append(mmstar_right(answer, letter))
            score = mmstar_score(answer, [letter], {"choices": choices})
            assert (score or 0) == right[-1], answer
    assert {*found} == {*letters, None} and 1000 < sum(right) < 5000


def test_mmstar_takes_the_letter_that_the_answer_begins_with():
    question = {"choices": ["cat", "dog"]}
    for answer, score in [("b", 1), ("(B) dog", 1), ("A dog", 0), ("option b", 1), ("Dog", None)]:
        assert mmstar_score(answer, ["B"], question) == score, answer
    assert mmstar_score("", ["B"], question) is None and mmstar_score("B", ["B"], {}) == 1


def test_mmmu_prints_the_score_with_the_scripts_guesses_too():
    """Of four questions with two choices one is right, one wrong; two would be guessed."""
    questions = [{"answers": ["A"], "choices": ["cat", "dog"]} for _ in range(4)]
    answers = ["A", "(B)", "I do not know", ""]
    found = benchmark_metrics("mmmu", questions, answers)
    assert found == {"accuracy": 0.25, "accuracy with guesses": 0.5, "unparsed": 0.5}


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


def pope_word(text):
    """POPE's evaluate.py, step by step."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    text = text.replace(",", "")
    words = text.split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def mme_word(pred_ans):
    """MME's calculation.py, step by step."""
    pred_ans = pred_ans.lower()
    if pred_ans in ["yes", "no"]:
        return pred_ans
    prefix_pred_ans = pred_ans[:4]
    if "yes" in prefix_pred_ans:
        return "yes"
    return "no" if "no" in prefix_pred_ans else "other"


def test_yes_and_no_are_the_owners_on_random_answers():
    rng, pieces = random.Random(4), ["Yes", "no", "No", "NO", "not", "t", " ", ".", ",", "!", "\n"]
    for _ in range(3000):
        answer = "".join(rng.choices(pieces, k=rng.randint(0, 5)))
        assert pope_score(answer, ["no"]) == (pope_word(answer) == "no"), answer
        assert pope_score(answer, ["yes"]) == (pope_word(answer) == "yes"), answer
        answer, word = answer.strip(), mme_word(answer.strip())
        assert mme_score(answer, ["No"]) == (None if word == "other" else word == "no"), answer


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
        ("The correct option letter is B.", "No", 1, {"choices": ["Yes", "No"]}),
        ("Yes, there are fewer cubes", "Yes", 1, {"choices": ["Yes", "No"]}),
        ('The answer is "tokyo".', "tokyo", 1, {"choices": ["paris", "tokyo"]}),
        ("9" * 310, "7", 0, {"answer_type": "integer"}),
        ("1e309", "7", 0, {"answer_type": "integer"}),
        ("1e309", "0.7", 0, {"answer_type": "float", "precision": 1}),
        ("[" + "1" * 5000 + "]", "[1]", 0, {"answer_type": "list"}),
    ],
)
def test_mathvista(answer, reference, score, question):
    assert mathvista_score(answer, [reference], question) == score


LONG_ANSWERS = [
    piece * (20_000 // len(piece))
    for piece in (
        *"1a AZ.,:-=([$%!\n",
        "1,",
        "1,111,",
        "1.1",
        "1e",
        "=1",
        "yes ",
        "(B) ",
        "B or ",
        "answer: ",
        "option A ",
        "is 1 so ",
        "a,b;",
        "[1,",
        '[{"a":',
        "-\t",
        "n't'n",
        "A&",
        "\u0661\u00b2",
    )
]
ODD_ANSWERS = [
    "",
    " ",
    "\0",
    "\ud800",
    "1e309",
    "-1e309",
    "nan",
    "inf",
    "9" * 310,
    "[1e999]",
    "[NaN]",
]
ODD_ANSWERS += [
    "answer is 1e309",
    "[" + "1" * 5000 + "]",
    "=" + "1" * 5000,
    "\u0661",
    "\u00b2",
    "(",
    "\\",
]


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_no_answer_stops_an_evaluation(name):
    """Each score is None or from 0 to 1, and 20,000 characters take linear time."""
    question = {"id": 1, "kind": "all", "image": [], "answers": ["red"] * 10, "choices": []}
    number = {"answers": ["7"], "precision": 1, "dataset_name": "HME100k"}
    questions = [question | number | {"answer_type": kind} for kind in ("integer", "float", "list")]
    if name in ("pope", "mme"):
        questions = [question | {"answers": ["yes"]}]
    elif name in ("letters", "ai2d", "mmmu", "mmstar", "realworldqa", "mathvista"):
        choices = ["a red bus", "1,000", "yes", "("]
        references = choices[:1] if name == "mathvista" else ["A"]
        questions += [question | {"choices": choices, "answers": references}]
    elif name not in ("ocrbench", "chartqa"):
        questions = [question]
    rng, answers = random.Random(9), [*ODD_ANSWERS]
    pieces = [answer[:9] for answer in LONG_ANSWERS] + [
        "answer is ",
        "1e309",
        "\\",
        "B",
        "[",
        "]",
        "{",
    ]
    answers += ["".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(200)]
    start = time.process_time()
    for ask in questions:
        results = benchmarks.score_results([{**ask, "answer": each} for each in answers], name)
        assert all(row["score"] is None or 0 <= row["score"] <= 10 for row in results)
        for answer in LONG_ANSWERS:
            (result,) = benchmarks.score_results([{**ask, "answer": answer}], name)
            assert not result["score"] or 0 <= result["score"] <= 10
    assert time.process_time() - start < 10


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
    "Wow!! What?? Oh?! It is -5 or -.5 or +1,000, (-3) and - 5.": (
        "wow !! what ?? oh ?! it is -5 or -.5 or +1,000 -lrb- -3 -rrb- and 5"
    ),
    "get 'em at AT&T, 6 ft. of Mt. Fuji on Sunset Blvd. ca. 1900, salt&pepper": (
        "get 'em at at&t 6 ft. of mt. fuji on sunset blvd. ca. 1900 salt & pepper"
    ),
    "No!No!The man, -5-6., at plan b. in Wash., a cat., Pa. and Ore., to wash. ore.": (
        "no!no!the man -5 -6 at plan b. in wash. a cat. pa. and ore. to wash ore"
    ),
    "x!y or J. Smith, vitamin c. The U.S. The Ph.D. of Rt. 5, art. 7, art. and a mass.": (
        "x!y or j. smith vitamin c the u.s. the ph.d. of rt. 5 art. 7 art and a mass"
    ),
    "rock'n'roll 'til Tues. in Calif., ol' man o'neil": (
        "rock 'n' roll 'til tues. in calif. ol' man o'neil"
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

    POPE's script takes ? for yes: 2 of the 4 yes are right, 2 of the 3 expected ones are found: F1 =
    2 x 1/2 x 2/3 / (7/6) = 4/7.
    """
    questions = [{"kind": "all", "answers": [reference]} for reference in ["yes"] * 3 + ["no"] * 3]
    answers = ["Yes", "yes, one", "no", "yes", "No.", "a dog"]
    got = benchmark_metrics("pope", questions, answers)
    assert got == pytest.approx(
        {
            "accuracy": 0.5,
            "precision": 1 / 2,
            "recall": 2 / 3,
            "F1": 4 / 7,
            "yes-rate": 2 / 3,
            "unparsed": 0,
        }
    )
    for question, kind in zip(questions, ["random", "popular"] * 3, strict=True):
        question["kind"] = kind
    parts = benchmark_metrics("pope", questions, answers)
    assert got.items() <= parts.items() and len(parts) == 3 * 5 + 1
    assert parts["random accuracy"] == 2 / 3 and parts["popular yes-rate"] == 1
    got = benchmark_metrics("pope", questions, [*answers[:5], "No!"])
    assert (got["accuracy"], got["accuracy, read with punctuation"]) == (3 / 6, 4 / 6)
    # random: references yes yes no, answers yes no No.; popular: yes, yes, ?


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
    references = {mme_score: ["yes"], letter_score: ["B"], mmstar_score: ["B"]}
    references[mathvista_score] = ["3"]
    question = {"choices": [], "dataset_name": "IAM", "answer_type": "integer", "precision": 1}
    scores = {one.score for one in benchmarks.BENCHMARKS.values() if not one.is_caption}
    assert len(scores) == 13
    for score in scores:
        # POPE's script takes it for yes
        red = ["no" if score is pope_score else "red"] * 10
        found = score("", references.get(score, red), question)
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
    answers = ["yes", "no", "yes", "Yes", "maybe", "yes"]
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
    # MME's script takes "notable" for a no: 50 + 0 in code_reasoning
    got = benchmark_metrics("mme", questions, [*answers[:5], "notable"])
    assert (got["total"], got["accuracy, read with punctuation"]) == (175, 3 / 6)


def test_other_benchmarks_report_the_mean_score_by_their_owners_name():
    results = [{"score": score, "choices": ["x"] * 3} for score in (1.0, 0.5, None)]
    for name, metric in (
        ("docvqa", "ANLS"),
        ("coco", "CIDEr-D"),
        ("vqav2", "VQA accuracy"),
        ("chartqa", "relaxed accuracy"),
        ("ocrbench", "accuracy"),
        ("mmmu", "accuracy"),
    ):
        found = benchmarks.benchmark_metrics(name, results)
        guesses = {"accuracy with guesses": 0.5 + 1 / 9} if name == "mmmu" else {}
        assert found == {metric: 0.5, "unparsed": 1 / 3} | guesses


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
