"""How answers are marked: each benchmark by its owners' own rule. Pure functions of text; nothing here knows a model or a file.

A score takes (answer, golds, question) and gives 0 to 1, or None where the answer names none of what was asked for: that counts as 0, is told as a
share, and is never guessed. question holds what else a rule needs (`choices`, `precision`, ...). Captions are marked all at once: see `cider`.
"""

import json
import re
import string
from collections import Counter

import numpy as np

from .. import UserError
from .cider import cider

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d*)?(?:[eE][-+]?\d+)?"  # 1,000 is a number, as are .5, -3 and 1e3; 1,00 is none
NUMBER_WORDS = {
    word: str(i)
    for i, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
NUMBER_WORDS["none"] = "0"
FULL_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
    isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
# vqaEval.py's table: each as it is written with one apostrophe left out; the last pair is its own slip
CONTRACTIONS = {
    full[:i] + full[i + 1 :]: full
    for full in FULL_FORMS.split()
    for i in range(len(full))
    if full[i] == "'"
} | {"somebody'd": "somebodyd"}


# ---- by comparing texts ----


def exact_match(answer, golds, question=None):
    """1.0 if the answer is one of the golds letter for letter, white space at the ends aside."""
    return float(answer.strip() in [gold.strip() for gold in golds])


def contains_reference(answer, golds, question=None):
    """1.0 if one of the golds stands in the answer as whole words, whatever their case: "a photo of a cat." names a cat, "a catfish" does not."""
    return float(
        any(
            re.search(rf"(?<!\w){re.escape(gold.strip())}(?!\w)", answer, re.IGNORECASE)
            for gold in golds
            if gold.strip()
        )
    )


def vqa_accuracy(answer, golds, question=None):
    """VQA accuracy (GT-Vision-Lab/VQA, vqaEval.py): for each of the ten people min(1, matches among the other nine / 3), averaged.

    Texts are normalised only where the people do not all say the same: a question about written text is to be answered as it is written.
    """
    answer, *golds = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *golds)
    )
    if len(set(golds)) > 1:
        answer, *golds = map(normalize_vqa, (answer, *golds))
    return vote_accuracy(answer, golds)


def textvqa_accuracy(answer, golds, question=None):
    """VQA accuracy as TextVQA's owners mark it (Pythia, m4c_evaluators.py): always normalised, and `,`, `?` and a possessive 's taken off first."""
    tidy = (
        text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        for text in (answer, *golds)
    )
    answer, *golds = (normalize_vqa(text.replace("\n", " ").replace("\t", " ").strip()) for text in tidy)
    return vote_accuracy(answer, golds)


def vote_accuracy(answer, golds):
    n = golds.count(answer)  # of these, each sees n - 1 among the others, and everybody else n
    return (n * min(1, (n - 1) / 3) + (len(golds) - n) * min(1, n / 3)) / len(golds)


def normalize_vqa(text):
    """A text after the VQA script's normalisation: punctuation, then case, number words, articles, contractions."""
    glued, kept = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        kept = kept.replace(mark, "" if glued or f"{mark} " in text or f" {mark}" in text else " ")
    kept = re.sub(
        r"\.(?!\d)", "", kept, count=32
    )  # the script hands re.UNICODE, which is 32, to where the count belongs
    spoken = (NUMBER_WORDS.get(word, word) for word in kept.lower().split())
    return " ".join(
        CONTRACTIONS.get(word, word) for word in spoken if word not in ("a", "an", "the")
    )


def relaxed_accuracy(answer, golds, question=None):
    """ChartQA's relaxed accuracy: a number within 5% of a gold that is one, else the same text whatever its case. 50% is 0.5; a year is a number.

    As in pix2struct's metrics.py, where a gold of 0 is a text. Thousands may have commas there as here.
    """

    def right(said, gold):
        value, wanted = parse_number(said), parse_number(gold)
        return (
            abs(value - wanted) / abs(wanted) <= 0.05
            if value is not None and wanted
            else said.lower() == gold.lower()
        )

    return float(any(right(answer.strip(), gold.strip()) for gold in golds))


def parse_number(text):
    found = re.fullmatch(rf"({NUMBER})\s*(%?)", text)
    return float(found[1].replace(",", "")) / (100 if found[2] else 1) if found else None


def levenshtein_score(answer, golds, question=None):
    """Average normalised Levenshtein similarity (DocVQA, InfoVQA): 1 - NL if NL < 0.5 else 0, the best over golds; case and ends aside, no more."""
    answer = answer.strip().lower()
    return max((levenshtein_similarity(answer, gold.strip().lower()) for gold in golds), default=0.0)


def levenshtein_similarity(left, right):
    longer = max(len(left), len(right))
    if (
        2 * abs(len(left) - len(right)) >= longer > 0
    ):  # as many edits at least as the lengths differ by
        return 0.0
    row = list(range(len(right) + 1))
    for i, letter in enumerate(left, 1):
        above, row = row, [i]
        for j, other in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    distance = row[-1] / longer if longer else 0.0
    return 1 - distance if distance < 0.5 else 0.0


def ocrbench_score(answer, golds, question):
    """1.0 if the answer contains a gold, whatever their case; of a formula (dataset_name HME100k) with its case and without its spaces."""
    formula = question["dataset_name"] == "HME100k"

    def tidy(text):
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return float(any(tidy(gold) in tidy(answer) for gold in golds))


# ---- by reading what was chosen ----


def pope_score(answer, golds, question=None):
    """POPE: whether the answer says what the gold says (see `said`)."""
    return (
        None
        if (word := parse_yes_no(answer)) is None
        else float(word in [gold.strip().lower() for gold in golds])
    )


def parse_yes_no(answer):
    """ "no" if the first sentence has the word no or not, else "yes" if it has the word yes, else None (which POPE's own script takes for yes)."""
    spoken = re.findall(r"\w+", answer.partition(".")[0].lower())
    return "no" if {"no", "not"} & set(spoken) else "yes" if "yes" in spoken else None


def mme_score(answer, golds, question=None):
    """MME: the answer's first word, yes or no (its script looks at four letters, and finds a no in "not" and in "noti")."""
    word = re.match(r"\W*(yes|no)(?!\w)", answer.lower())
    return float(word[1] in [gold.strip().lower() for gold in golds]) if word else None


def letter_score(answer, golds, question):
    """Multiple choice: 1.0 if the letter that the answer names is a gold. Golds that are no letters are compared as texts, whatever their case."""
    if not all(re.fullmatch("[A-Z]", gold.strip()) for gold in golds):
        return float(strip_punctuation(answer) in map(strip_punctuation, golds))
    letter = extract_choice(answer, question.get("choices") or [])
    return None if letter is None else float(letter in [gold.strip() for gold in golds])


def extract_choice(answer, choices):
    """The letter that an answer names, or None. The first of these that finds any decides, and names none where it finds two:

    nothing but a letter (B, b, "B.", (B)); one after the word answer, option or choice (the answer is B, "Answer: (B)"); one in brackets, or one that
    opens the answer with a mark behind it ("B. the cat", "B: the cat"); a choice's own text, alone or after "the answer is".
    Before a word, A is an article and I a person, unless the word is because. A letter past the last choice is none; where choices are not known,
    A to Z are.
    """
    known = "".join(chr(65 + i) for i in range(len(choices) or 26))
    text = answer.strip()
    alone = re.findall(r"^\W*([A-Za-z])\W*$", text)
    told = re.findall(
        r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is|\s*:)*\s*[\"'(*]*\b([A-Z])\b(?!['’])(?!(?<=[AI])\s+(?!because\b)[a-z])",
        text,
    )
    marked = re.findall(r"\(([A-Z])\)", text) + re.findall(r"^([A-Z])\s*[).:\n]", text)
    for found in ([letter.upper() for letter in alone], told, marked):
        if found:
            return found[0] if len(set(found)) == 1 and found[0] in known else None
    said_so = strip_punctuation(
        re.sub(r"^(?:the )?(?:correct )?answer(?: is:?|:)\s+", "", text, flags=re.IGNORECASE)
    )
    own = [
        letter for letter, choice in zip(known, choices, strict=False) if strip_punctuation(choice) == said_so
    ]
    return own[0] if len(own) == 1 else None


def strip_punctuation(text):
    """Lower case, without quotes, brackets and the end of a sentence around it."""
    return text.strip().strip("\"'`()[]").rstrip(".!?;:,").strip().lower()


MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)  # MMMU's numbers


def mmmu_score(answer, golds, question):
    """MMMU (its eval_utils.py): letters where there are choices; else open, right if a part of the answer holds a gold or a number in it is one."""
    if question.get("choices"):
        return letter_score(answer, golds, question)
    parts = extract_responses(answer.strip().strip(".").lower())
    figures = [
        found for part in parts for pattern in MMMU_NUMBERS for found in re.findall(pattern, part)
    ]
    wanted, given = (
        [form for text in texts for form in normalize_mmmu(text)] for texts in (golds, parts + figures)
    )
    held = any(
        gold in part
        for part in given
        for gold in wanted
        if isinstance(part, str) and isinstance(gold, str)
    )
    return float(held or any(part in wanted for part in given if isinstance(part, float)))


def extract_responses(answer):
    """Of each line the shortest text after a word that announces an answer; the whole answer if there is none."""
    lines, found = answer.split("\n"), []
    signs = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    for i, line in enumerate(lines):
        short = ""
        for sign in signs + ["="] * (i == len(lines) - 1):
            tail = line.split(sign)[-1].strip() if sign in line else short
            short = tail if not short or len(tail) < len(short) else short
        found += [short] if short not in ("", *":,.!?;'") else []
    return found or [answer]


def normalize_mmmu(text):
    """A number to two places; or the text in lower case, and if it is one letter, with the space on either side that keeps it a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text.lower()}", f"{text.lower()} "] if len(text) == 1 else [text.lower()]


def mathvista_score(answer, golds, question):
    """MathVista, whose owners let a language model extract the answer; here it is read, and None where it cannot be.

    With choices: the choice that `chosen` finds. Else the number (answer_type integer: its whole part; float: to `precision` places) or the list in
    brackets that stands after "answer is", else at the end after "=", else is the only one there. Compared with the gold as texts, as the owners do.
    """
    gold, text, choices = golds[0].strip(), answer.strip(), question.get("choices") or []
    if choices:
        letter = extract_choice(text, choices)
        return None if letter is None else float(choices[ord(letter) - 65].strip() == gold)
    kind = question["answer_type"]
    if kind == "text":
        return float(strip_punctuation(text) == strip_punctuation(gold))
    pattern = r"\[[^\[\]]*\]" if kind == "list" else rf"(?<![\w.]){NUMBER}(?!\w)"
    ways = (rf"answer(?:\s+is|\s*:)+\s*\$?({pattern})", rf"=\s*\$?({pattern})\W*$", pattern)
    found = next(
        (found for way in ways if (found := set(re.findall(way, text, re.IGNORECASE)))), ()
    )
    return None if len(found) != 1 else float(format_number(found.pop(), kind, question) == gold)


def format_number(found, kind, question):
    if kind == "list":
        try:
            return str(json.loads(found))
        except json.JSONDecodeError:
            return found
    value = float(found.replace(",", ""))
    return str(int(value)) if kind == "integer" else str(round(value, int(question["precision"])))


METRICS = {
    "exact": exact_match,
    "contains": contains_reference,
    "vqa": vqa_accuracy,
    "textvqa": textvqa_accuracy,
    "relaxed": relaxed_accuracy,
    "anls": levenshtein_score,
    "ocrbench": ocrbench_score,
    "yesno": pope_score,
    "mme": mme_score,
    "letters": letter_score,
    "mmmu": mmmu_score,
    "mathvista": mathvista_score,
}


def score_answers(score, answers, questions):
    """The scores of answers to questions: each by SCORES[score]; captions per picture, by `cider` over all. UserError for what cannot be marked so."""
    if score == "captions":
        return cider(answers, [question["answers"] for question in questions])[1]
    for question in questions:
        check_reference(score, question, f"question {question.get('id')}")
    return [
        METRICS[score](answer, question["answers"], question)
        for answer, question in zip(answers, questions, strict=True)
    ]


def check_reference(score, question, where):
    """Raise UserError for a question that a score cannot mark, or of which a right answer would never be marked as one."""
    golds, letters = (
        [gold.strip() for gold in question["answers"]],
        string.ascii_uppercase[: len(question.get("choices") or [])],
    )
    needed, kind, places = (
        {"ocrbench": "dataset_name", "mathvista": "answer_type"}.get(score),
        question.get("answer_type"),
        question.get("precision"),
    )
    if needed and question.get(needed) is None:
        raise UserError(f"{where} has no {needed}, without which {score} cannot mark it")
    if (
        score == "mathvista"
        and not letters
        and kind not in ("integer", "list")
        and (kind != "float" or places not in range(10))
    ):
        raise UserError(
            f"{where} has no choices, and its answer_type, {kind!r:.40}, and precision, {places!r:.40}, tell no kind of number"
        )
    if score in ("vqa", "textvqa") and len(golds) < 4:
        raise UserError(
            f"{where} has {len(golds)} right answers, but VQA accuracy asks if three other people agree: mark by `exact`"
        )
    if score in ("yesno", "mme") and not {gold.lower() for gold in golds} <= {"yes", "no"}:
        raise UserError(f"{where}: its answers, {golds!r:.80}, are not yes or no")
    if score in ("letters", "mmmu") and letters and not {*golds} <= {*letters}:
        raise UserError(
            f"{where}: its answers, {golds!r:.80}, are not letters of its {len(letters)} choices"
        )


# ---- over all ----

MEAN_NAMES = {
    "docvqa": "ANLS",
    "infovqa": "ANLS",
    "chartqa": "relaxed accuracy",
    **dict.fromkeys(("vqa", "vqav2", "textvqa"), "VQA accuracy"),
}
DISCIPLINES = {  # MMMU's, of its subjects
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": [
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ],
    "Humanities and Social Science": ["History", "Literature", "Psychology", "Sociology"],
    "Tech and Engineering": [
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ],
}
RECOGNITION = (
    "Regular Text",
    "Irregular Text",
    "Artistic Text",
    "Handwriting",
    "Digit String",
    "Non-Semantic Text",
)  # OCRBench's, of 300
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)  # MME's; its other ten kinds are perception


def mean_score(scores):
    return sum(score or 0 for score in scores) / len(scores)


def confidence_interval(scores, seed=0, samples=1000):
    """The middle 95% of the means of `samples` draws of as many questions, with replacement. Of captions the words' weights are held as they are."""
    marks, rng = np.array([score or 0 for score in scores], float), np.random.default_rng(seed)
    means = [marks[rng.integers(len(marks), size=len(marks))].mean() for _ in range(samples)]
    return tuple(float(edge) for edge in np.quantile(means, (0.025, 0.975)))


def benchmark_metrics(name, questions, answers, scores):
    """{figure: value} as a benchmark's owners report it; `unparsed`: the share of answers that no rule could read."""
    unparsed = {"unparsed": sum(score is None for score in scores) / len(scores)}
    match name:
        case "coco" | "captions":
            return {
                f"CIDEr-D as pycocoevalcap gives it (words weighed over these {len(scores):,} pictures)": mean_score(
                    scores
                )
            }
        case "pope":
            return pope_metrics(questions, answers) | unparsed
        case "mme":
            return mme_sums(questions, scores) | unparsed
        case "ocrbench":
            return ocrbench_metrics(questions, scores)
        case "mmmu":
            return {"accuracy": mean_score(scores)} | by_discipline(questions, scores) | unparsed
    return {MEAN_NAMES.get(name, "accuracy"): mean_score(scores)} | unparsed


def pope_metrics(questions, answers):
    """Of all and of each of its files. Yes is the positive; what cannot be read is wrong and no yes: it lowers accuracy and recall, not precision."""
    kinds = {"": list(zip(questions, answers, strict=True))}
    for question, answer in kinds[""]:
        kinds.setdefault(f"{question['kind']} ", []).append((question, answer))
    return {
        f"{kind}{name}": value
        for kind, pairs in kinds.items()
        if len(kinds) > 2 or not kind
        for name, value in yes_no_metrics(pairs).items()
    }


def yes_no_metrics(pairs):
    counts = Counter(
        (parse_yes_no(answer), question["answers"][0].strip().lower()) for question, answer in pairs
    )
    hits, yes = counts["yes", "yes"], counts["yes", "yes"] + counts["yes", "no"]
    wanted = sum(count for (_, gold), count in counts.items() if gold == "yes")
    precision, recall = hits / yes if yes else 0.0, hits / wanted if wanted else 0.0
    return {
        "accuracy": (hits + counts["no", "no"]) / len(pairs),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes-rate": yes / len(pairs),
    }


def ocrbench_metrics(questions, scores):
    """Right answers: all, of text recognition, of each kind."""
    kinds = Counter()
    for question, score in zip(questions, scores, strict=True):
        kinds[question["kind"]] += score
    text = sum(
        right for kind, right in kinds.items() if kind.removesuffix(" Recognition") in RECOGNITION
    )
    return {f"score of {len(scores)}": sum(scores), "Text Recognition": text, **kinds}


def by_discipline(questions, scores):
    parts = {
        field: [
            score
            for question, score in zip(questions, scores, strict=True)
            if question["kind"] in subjects
        ]
        for field, subjects in DISCIPLINES.items()
    }
    return {field: mean_score(part) for field, part in parts.items() if part}


def mme_sums(questions, scores):
    """Per category acc + acc+, of 200: the percentages of right answers and of pictures with both answers right; and the owners' two sums."""
    kinds, sums = {}, {}
    for question, score in zip(questions, scores, strict=True):
        kinds.setdefault(question["kind"], {}).setdefault(str(question["image"]), []).append(
            score or 0
        )
    for kind, pictures in kinds.items():
        sums[kind] = 100 * mean_score(
            [mark for marks in pictures.values() for mark in marks]
        ) + 100 * mean_score([min(marks) for marks in pictures.values()])
    thought = sum(value for kind, value in sums.items() if kind in COGNITION)
    odd = sum(len(marks) != 2 for pictures in kinds.values() for marks in pictures.values())
    return {
        "perception": sum(sums.values()) - thought,
        "cognition": thought,
        "total": sum(sums.values()),
        **sums,
        **({"pictures without two questions (acc+ is not MME's)": odd} if odd else {}),
    }
