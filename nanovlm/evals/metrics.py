"""The score of an answer, by each benchmark's own rule: pure functions of text.

A score takes (answer, references, question) and returns a number from 0 to 1, or None if the answer
cannot be parsed: that counts as 0, and the table has its share. question holds what else the rule
needs (`choices`, `precision`, …). Captions are scored all at once: see cider.py.
"""

import json
import re
import string
from collections import Counter

import numpy as np

from .. import UserError

# 1,000 is a number, as are .5, -3 and 1e3; 1,00 is none.
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d*)?(?:[eE][-+]?\d+)?"
TO_TEN = "zero one two three four five six seven eight nine ten"
NUMBER_WORDS = {word: str(i) for i, word in enumerate(TO_TEN.split())} | {"none": "0"}
FULL_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've"""
# vqaEval.py's table: each full form without one of its apostrophes. The last pair is its own error.
CONTRACTIONS = {}
for full in FULL_FORMS.split():
    for i in range(len(full)):
        if full[i] == "'":
            CONTRACTIONS[full[:i] + full[i + 1 :]] = full
CONTRACTIONS["somebody'd"] = "somebodyd"


# ---- metrics that compare texts ----


def exact_match(answer, references, question=None):
    """Returns 1.0 if the answer equals a reference, apart from white space at the ends."""
    return float(answer.strip() in [reference.strip() for reference in references])


def contains_reference(answer, references, question=None):
    """Returns 1.0 if the answer contains a reference as whole words, in any case.

    "A photo of a cat." contains "cat", "a catfish" does not.
    """
    for reference in map(str.strip, references):
        pattern = rf"(?<!\w){re.escape(reference)}(?!\w)"
        if reference and re.search(pattern, answer, re.IGNORECASE):
            return 1.0
    return 0.0


def vqa_accuracy(answer, references, question=None):
    """Returns the VQA accuracy (GT-Vision-Lab/VQA, vqaEval.py).

    For each of the ten references: min(1, matches among the other nine / 3); then their mean. Texts
    are normalized only if the references differ: a question about written text asks for the text
    as it is written.
    """
    is_same = len({*map(join_lines, references)}) == 1
    clean = join_lines if is_same else normalize_vqa
    return vote_accuracy(clean(answer), [*map(clean, references)])


def textvqa_accuracy(answer, references, question=None):
    """Returns the VQA accuracy of TextVQA (Pythia, m4c_evaluators.py).

    Texts are always normalized; before that, `,`, `?` and a possessive 's are removed.
    """

    def clean(text):
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        return normalize_vqa(text)

    return vote_accuracy(clean(answer), [*map(clean, references)])


def vote_accuracy(answer, references):
    # A reference that equals the answer has n - 1 matches among the others, any other has n.
    n = references.count(answer)
    return (n * min(1, (n - 1) / 3) + (len(references) - n) * min(1, n / 3)) / len(references)


def join_lines(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_vqa(text):
    """Returns the text as the VQA script normalizes it: punctuation, case, number words, articles
    and contractions, in this order."""
    text = join_lines(text)
    has_comma, result = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        removed = has_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if removed else " ")
    # The script passes re.UNICODE, which is 32, as the count.
    result = re.sub(r"\.(?!\d)", "", result, count=32)
    words = (NUMBER_WORDS.get(word, word) for word in result.lower().split())
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")
    )


def relaxed_accuracy(answer, references, question=None):
    """Returns ChartQA's relaxed accuracy: a number may differ by 5% from a reference.

    Other texts must be equal, in any case. 50% is 0.5; a year is a number. As in pix2struct's
    metrics.py, a reference of 0 is a text. Numbers may have thousands separators in both.
    """

    def matches(text, reference):
        value, expected = parse_number(text), parse_number(reference)
        if value is None or not expected:
            return text.lower() == reference.lower()
        return abs(value - expected) / abs(expected) <= 0.05

    return float(any(matches(answer.strip(), reference.strip()) for reference in references))


def parse_number(text):
    found = re.fullmatch(rf"({NUMBER})\s*(%?)", text)
    return float(found[1].replace(",", "")) / (100 if found[2] else 1) if found else None


def anls_score(answer, references, question=None):
    """Returns the average normalized Levenshtein similarity, ANLS (DocVQA, InfoVQA).

    With the normalized distance NL: 1 - NL if NL < 0.5, else 0; the best over all references. Case
    and white space at the ends do not count.
    """
    answer = answer.strip().lower()
    return max(
        (levenshtein_similarity(answer, text.strip().lower()) for text in references), default=0.0
    )


def levenshtein_similarity(left, right):
    costs = list(range(len(right) + 1))
    for i, letter in enumerate(left, 1):
        previous, costs = costs, [i]
        for j, other in enumerate(right, 1):
            replace = previous[j - 1] + (letter != other)
            costs.append(min(previous[j] + 1, costs[-1] + 1, replace))
    distance = costs[-1] / max(len(left), len(right), 1)
    return 1 - distance if distance < 0.5 else 0.0


def ocrbench_score(answer, references, question):
    """Returns 1.0 if the answer contains a reference, in any case.

    A formula (dataset_name HME100k) is compared with its case and without its spaces.
    """
    is_formula = question.get("dataset_name") == "HME100k"

    def normalize(text):
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    return float(any(normalize(reference) in normalize(answer) for reference in references))


# ---- metrics that parse what the answer chooses ----


def yes_no_score(answer, references, question=None):
    """Returns 1.0 if the answer's yes or no (see parse_yes_no) is a reference."""
    word = parse_yes_no(answer)
    return None if word is None else float(word in [text.strip().lower() for text in references])


def parse_yes_no(answer):
    """Returns "no" if the first sentence has the word no or not, "yes" if it only has yes, or None.

    POPE's own script counts None as yes.
    """
    words = re.findall(r"\w+", answer.partition(".")[0].lower())
    return "no" if {"no", "not"} & set(words) else "yes" if "yes" in words else None


def mme_score(answer, references, question=None):
    """Returns 1.0 if the answer's first word, yes or no, is a reference.

    MME's script compares four letters, and takes "not" and "noti" for a no.
    """
    word = re.match(r"\W*(yes|no)(?!\w)", answer.lower())
    return float(word[1] in [text.strip().lower() for text in references]) if word else None


def letter_score(answer, references, question):
    """Multiple choice: returns 1.0 if the answer's letter is a reference.

    References that are no letters are compared as texts, in any case.
    """
    if not all(re.fullmatch("[A-Z]", reference.strip()) for reference in references):
        return float(strip_punctuation(answer) in map(strip_punctuation, references))
    letter = extract_choice(answer, question.get("choices") or [])
    return None if letter is None else float(letter in [text.strip() for text in references])


def extract_choice(answer, choices):
    """Returns the letter that an answer chooses, or None.

    The first of these patterns that is found decides; if it is found with two letters, none is
    chosen:

    1. nothing but a letter: B, b, "B.", (B)
    2. a letter after the word answer, option or choice: the answer is B, "Answer: (B)"
    3. a letter in brackets, or at the start with a mark after it: "B. the cat", "B: the cat"
    4. a choice's text, alone or after "the answer is"

    Before a word, A is an article and I a pronoun, except before "because". A letter after the last
    choice is no choice; if the choices are not known, A to Z are.
    """
    known = "".join(chr(65 + i) for i in range(len(choices) or 26))
    text = answer.strip()
    alone = re.findall(r"^\W*([A-Za-z])\W*$", text)
    named = re.findall(
        r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is|\s*:)*\s*[\"'(*]*"
        r"\b([A-Z])\b(?!['’])(?!(?<=[AI])\s+(?!because\b)[a-z])",
        text,
    )
    marked = re.findall(r"\(([A-Z])\)", text) + re.findall(r"^([A-Z])\s*[).:\n]", text)
    for found in ([letter.upper() for letter in alone], named, marked):
        if found:
            return found[0] if len(set(found)) == 1 and found[0] in known else None
    prefix = r"^(?:the )?(?:correct )?answer(?: is:?|:)\s+"
    content = strip_punctuation(re.sub(prefix, "", text, flags=re.IGNORECASE))
    equal = [
        letter
        for letter, choice in zip(known, choices, strict=False)
        if strip_punctuation(choice) == content
    ]
    return equal[0] if len(equal) == 1 else None


def strip_punctuation(text):
    """Returns the text in lower case, without quotes, brackets and the end of a sentence."""
    return text.strip().strip("\"'`()[]").rstrip(".!?;:,").strip().lower()


MMMU_NUMBERS = (  # eval_utils.py's patterns: with commas, in scientific notation, simple
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_score(answer, references, question):
    """MMMU (its eval_utils.py): multiple choice if the question has choices, else open.

    An open answer is right if one of its responses contains a reference, or a number in it equals
    one.
    """
    if question.get("choices"):
        return letter_score(answer, references, question)
    responses = extract_responses(answer.strip().strip(".").lower())
    numbers = []
    for response in responses:
        for pattern in MMMU_NUMBERS:
            numbers += re.findall(pattern, response)
    expected = sum(map(normalize_mmmu, references), [])
    found = sum(map(normalize_mmmu, responses + numbers), [])
    for form in found:
        if isinstance(form, float) and form in expected:
            return 1.0
        if isinstance(form, str) and any(isinstance(e, str) and e in form for e in expected):
            return 1.0
    return 0.0


def extract_responses(answer):
    """Returns the shortest text after a word that announces an answer, for each line that has one;
    the whole answer if no line has."""
    lines, responses = answer.split("\n"), []
    keywords = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    for i, line in enumerate(lines):
        short = ""
        for keyword in keywords + ["="] * (i == len(lines) - 1):
            tail = line.split(keyword)[-1].strip() if keyword in line else short
            short = tail if not short or len(tail) < len(short) else short
        responses += [short] if short not in ("", *":,.!?;'") else []
    return responses or [answer]


def normalize_mmmu(text):
    """Returns the forms in which a text is compared, in a list.

    A number is rounded to two places. A text is in lower case; a single letter gets a space before
    or after it, so that it is found as a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text.lower()}", f"{text.lower()} "] if len(text) == 1 else [text.lower()]


def mathvista_score(answer, references, question):
    """MathVista: returns 1.0 if what the answer contains equals the reference as a text.

    Its owners let a language model extract it; here patterns do, and the score is None if they find
    none. With choices: the choice that extract_choice finds. Without: the number (answer_type
    integer: its integer part; float: rounded to `precision` places) or the list in brackets that
    stands after "answer is", else at the end after "=", else is the only one.
    """
    reference, text = references[0].strip(), answer.strip()
    choices = question.get("choices") or []
    if choices:
        letter = extract_choice(text, choices)
        return None if letter is None else float(choices[ord(letter) - 65].strip() == reference)
    kind = question["answer_type"]
    if kind == "text":
        return float(strip_punctuation(text) == strip_punctuation(reference))
    value = r"\[[^\[\]]*\]" if kind == "list" else rf"(?<![\w.]){NUMBER}(?!\w)"
    patterns = (rf"answer(?:\s+is|\s*:)+\s*\$?({value})", rf"=\s*\$?({value})\W*$", value)
    for pattern in patterns:
        found = set(re.findall(pattern, text, re.IGNORECASE))
        if found:
            break
    if len(found) != 1:
        return None
    return float(format_reference(found.pop(), kind, question) == reference)


def format_reference(found, kind, question):
    """Returns a number or list as MathVista's references are written."""
    if kind == "list":
        try:
            return str(json.loads(found))
        except json.JSONDecodeError:
            return found
    value = float(found.replace(",", ""))
    return str(int(value)) if kind == "integer" else str(round(value, int(question["precision"])))


# ---- checks ----


def check_references(score, question, where):
    """Raises UserError for a question that a score does not fit, or whose references no answer can
    match."""
    references = [reference.strip() for reference in question["answers"]]
    letters = string.ascii_uppercase[: len(question.get("choices") or [])]
    kind, precision = question.get("answer_type"), question.get("precision")
    is_supported = kind in ("integer", "list") or (kind == "float" and precision in range(10))
    if score is mathvista_score and not letters and not is_supported:
        raise UserError(
            f"{where} has no choices, so its answer_type must be integer, list, or float with a "
            f"precision from 0 to 9, not {kind!r:.40} with {precision!r:.40}"
        )
    if score in (vqa_accuracy, textvqa_accuracy) and len(references) < 4:
        raise UserError(
            f"{where} has {len(references)} reference answers, but VQA accuracy needs at least 4: "
            "use --benchmark=exact"
        )
    words = {reference.lower() for reference in references}
    if score in (yes_no_score, mme_score) and not words <= {"yes", "no"}:
        raise UserError(f"{where}: its answers, {references!r:.80}, are not yes or no")
    if score in (letter_score, mmmu_score) and letters and not {*references} <= {*letters}:
        raise UserError(
            f"{where}: its answers, {references!r:.80}, are not letters of its "
            f"{len(letters)} choices"
        )


# ---- metrics of a whole benchmark: [question with its answer and score] -> {metric: value} ----

COGNITION = (  # MME's; its other ten kinds are perception
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def mean_score(scores):
    return sum(score or 0 for score in scores) / len(scores)


def confidence_interval(scores, seed=0, samples=1000):
    """Returns the 95% bootstrap interval of the mean: `samples` draws with replacement.

    CIDEr-D's word weights stay those of all captions.
    """
    values, rng = np.array([score or 0 for score in scores], float), np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(samples)]
    return tuple(float(bound) for bound in np.quantile(means, (0.025, 0.975)))


def pope_metrics(results):
    """Returns POPE's metrics of all questions and of each of its files; yes is the positive class.

    An answer that cannot be parsed is wrong and no yes: it lowers accuracy and recall, not
    precision.
    """
    kinds = {"": Counter()}
    for result in results:
        pair = parse_yes_no(result["answer"]), result["answers"][0].strip().lower()
        for kind in ("", f"{result['kind']} "):
            kinds.setdefault(kind, Counter())[pair] += 1
    found = {}
    for kind, counts in kinds.items():
        if len(kinds) > 2 or not kind:
            found |= {f"{kind}{name}": value for name, value in yes_no_metrics(counts).items()}
    return found


def yes_no_metrics(counts):
    """Returns the metrics of {(answer, reference): count}."""
    true_yes, yes = counts["yes", "yes"], counts["yes", "yes"] + counts["yes", "no"]
    expected_yes = sum(count for (_, reference), count in counts.items() if reference == "yes")
    precision = true_yes / yes if yes else 0.0
    recall = true_yes / expected_yes if expected_yes else 0.0
    return {
        "accuracy": (true_yes + counts["no", "no"]) / counts.total(),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes-rate": yes / counts.total(),
    }


def mme_metrics(results):
    """Returns acc + acc+ of each category, of 200, and the owners' two sums.

    acc is the percentage of right answers, acc+ that of images whose two answers are both right.
    """
    kinds, sums = {}, {}
    for result in results:
        images = kinds.setdefault(result["kind"], {})
        images.setdefault(str(result["image"]), []).append(result["score"] or 0)
    for kind, images in kinds.items():
        both_right = [min(scores) for scores in images.values()]
        sums[kind] = 100 * mean_score(sum(images.values(), [])) + 100 * mean_score(both_right)
    total = sum(sums.values())
    cognition = sum(value for kind, value in sums.items() if kind in COGNITION)
    return {"perception": total - cognition, "cognition": cognition, "total": total, **sums}
