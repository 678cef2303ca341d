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
    return float(answer.strip() in map(str.strip, references))


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
    """Returns ChartQA's relaxed accuracy (pix2struct, metrics.py): a number may differ by 5%.

    Other texts must be equal, in any case. 50% is 0.5; a year is a number; 1,000 and a reference of
    0 are texts.
    """

    def matches(text, reference):
        value, expected = parse_number(text), parse_number(reference)
        if value is None or not expected:
            return text.lower() == reference.lower()
        return abs(value - expected) / abs(expected) <= 0.05

    return float(any(matches(answer.strip(), reference.strip()) for reference in references))


def parse_number(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls_score(answer, references, question=None):
    """Returns the average normalized Levenshtein similarity, ANLS (DocVQA, InfoVQA).

    With the normalized distance NL: 1 - NL if NL <= 0.5, else 0; the best over all references. As
    in the competition's script, case and the amount of white space do not count for the distance,
    but white space counts for the length that the distance is divided by.
    """
    return max((levenshtein_similarity(answer, text) for text in references), default=0.0)


def levenshtein_similarity(answer, reference):
    length = max(len(answer), len(reference), 1)
    left, right = (" ".join(text.lower().split()) for text in (answer, reference))
    # The distance is at least the difference in length: a very long answer is not compared.
    if abs(len(left) - len(right)) > length / 2:
        return 0.0
    letters, steps = np.array([*map(ord, right)]), np.arange(len(right) + 1)
    costs = steps
    for letter in map(ord, left):
        best = np.minimum(costs[1:] + 1, costs[:-1] + (letters != letter))
        # An insertion costs 1 more than the entry to the left.
        costs = np.minimum.accumulate(np.append(costs[0] + 1, best) - steps) + steps
    similarity = 1 - int(costs[-1]) / length
    return similarity if similarity >= 0.5 else 0.0


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
    """Returns 1.0 if the answer's yes or no is a reference, None if it has neither.

    It is no if the first sentence has the word no or not, yes if it only has yes.
    """
    words = {*re.findall(r"\b(?:yes|not?)\b", answer.partition(".")[0].lower())}
    return score_parsed("no" if words - {"yes"} else "yes", references) if words else None


def pope_score(answer, references, question=None):
    """POPE (its evaluate.py): no if the first sentence has No, no or not between spaces.

    All else is yes, also "No!" and an empty answer.
    """
    sentence = answer.partition(".")[0].replace(",", "")
    is_no = re.search("(?<![^ ])([Nn]o|not)(?![^ ])", sentence)
    return score_parsed("no" if is_no else "yes", references)


def mme_score(answer, references, question=None):
    """MME (its calculation.py): yes or no if the first four letters contain it, else None."""
    word = re.search("yes|no", answer.strip().lower()[:4])
    return score_parsed(word and word[0], references)


def score_parsed(found, references):
    """Returns whether a word or letter is a reference, in any case; None if it is None."""
    return found and float(found.lower() in [text.strip().lower() for text in references])


def letter_score(answer, references, question):
    """Multiple choice: returns 1.0 if the answer's letter is a reference.

    References that are not letters are compared as texts, in any case.
    """
    if not all(re.fullmatch("[A-Z]", reference.strip()) for reference in references):
        return float(strip_punctuation(answer) in map(strip_punctuation, references))
    return score_parsed(extract_choice(answer, question.get("choices") or []), references)


# A letter, neither a word ("A dog") nor denied ("B is wrong"); with it a second one ("B or C").
LETTER = (
    r"([A-Z]|[a-z](?=\W*$|[).:]| [-(]))\b(?!['\u2019]|(?<=[AI]) +(?!because\b|is\b)\w"
    r"|\)? (?:is|was) (?:not|incorrect|wrong|false)\b)"
)
SECOND = r"(?:\)?\s*(?:[,/&]|or\b|and\b)\s*(?:or |and )?\(?([A-Z])\b)?"
NOUN = r"\b(?i:answer|option|choice)"
CONCLUSION = rf"{NOUN}(?: letter)?(?:\s+is|\s*:)+\s*[\"'(*]*{LETTER}{SECOND}"
AT_START = (
    rf"^\W*{LETTER}(?=\W*$|[*\s]*[).:(,\n]|[*\s]+(?:[-\u2013\u2014*]|is\b|because\b)){SECOND}"
)
NAMED = rf"(?:{NOUN}\s+[\"'(*]*|\((?=[A-Z]\))){LETTER}{SECOND}"
BEFORE_TEXT = rf"^(?i:the )?(?i:correct )?(?i:answer)(?i: is:?|:)\s+|{AT_START}[*\s]*[).:(,]*\s*"


def extract_choice(answer, choices):
    """Returns the letter that an answer chooses, or None.

    The first of these that is found decides; if it is found with two letters, none is chosen:

    1. a letter after "answer is", "answer:", "option letter is"
    2. a letter at the start, alone or with a mark after it: "B", "b) a cat", "B is right"; and a
       choice's text, alone, after such a letter or after "the answer is", or at the start of a
       longer answer with a mark after it: "Yes, there are two"
    3. a letter in brackets, or after the word answer, option or choice

    Before a word, A is an article and I a pronoun, except before "because" and "is". A letter after
    the last choice is not a choice; if the choices are not known, A to Z are.
    """
    known = string.ascii_uppercase[: len(choices) or 26]
    text, texts = answer.strip(), [*map(strip_punctuation, choices)]

    def find_letters(pattern):
        return "".join(map("".join, re.findall(pattern, text))).upper()

    content = strip_punctuation(re.sub(BEFORE_TEXT, "", text))
    # A number with a mark after it may be one of a list, as may a text before another choice.
    others = "|".join(map(re.escape, texts))
    end = rf"(?:$|(?<=[^\W\d])[,.;:]\s+(?!(?:and |or )?(?:{others})\b))"
    by_text = "".join(
        letter
        for letter, choice in zip(known, texts, strict=False)
        if not re.fullmatch("[a-z]?", choice) and re.match(re.escape(choice) + end, content)
    )
    found = find_letters(CONCLUSION) or find_letters(AT_START) + by_text or find_letters(NAMED)
    return found[0] if len({*found}) == 1 and found[0] in known else None


def strip_punctuation(text):
    """Returns the text in lower case, without quotes, brackets and the end of a sentence."""
    return text.strip().lstrip("\"'`()[]").rstrip("\"'`()[].!?;:, ").strip().lower()


def mmstar_score(answer, references, question):
    """MMStar (its evaluate/mmstar.py): the letter that the answer begins with.

    "(", "option " or "the answer is " may be in front of it.
    """
    last = string.ascii_lowercase[len(question.get("choices") or []) - 1]
    start = rf"(?:\(|option\s|the\sanswer\sis\s)?([a-{last}])"
    letter = re.match(start, answer.strip().lower())
    return score_parsed(letter and letter[1], references)


# eval_utils.py's patterns: with commas, in scientific notation, simple. (?<!\d) is ours: it changes
# no match, and makes the time linear.
MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_score(answer, references, question):
    """MMMU (its eval_utils.py): multiple choice if the question has choices, else open.

    An open answer is right if one of its responses contains a reference, or a number in it equals
    one.
    """
    if question.get("choices"):
        return score_parsed(parse_mmmu_choice(answer, question["choices"]), references)
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


def parse_mmmu_choice(answer, choices):
    """Returns the letter that MMMU's script finds, or None if it takes one at random.

    Of "(A)", else "A ", else "A.", else the texts of choices in more than five words: the last one.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    forms = [(text, "({0})", "({0})"), (text, "{0} ", " {0} "), (text, "{0}.", " {0} ")]
    if len(text.split()) > 5:
        forms.append((text.lower(), "{1}", "{1}"))
    for body, form, last_form in forms:  # the script looks for the last "A." as for the last " A "
        last_positions = {
            letter: body.rfind(last_form.format(letter, choice))
            for letter, choice in zip(string.ascii_uppercase, map(str.lower, choices), strict=False)
            if form.format(letter, choice) in body
        }
        if last_positions:
            return max(last_positions, key=last_positions.get)
    return None


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
    value = r"\[[^\[\]{}]*\]" if kind == "list" else rf"(?<![\w.]){NUMBER}(?!\w)"
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
    try:
        if kind == "list":
            return str(json.loads(found))
        value = float(found.replace(",", ""))
        return str(int(value) if kind == "integer" else round(value, int(question["precision"])))
    except (OverflowError, ValueError):
        return found


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
    if score in (pope_score, mme_score) and not words <= {"yes", "no"}:
        raise UserError(f"{where}: its answers, {references!r:.80}, are not yes or no")
    is_choice = letters and score in (letter_score, mmmu_score, mmstar_score)
    if is_choice and not {*references} <= {*letters}:
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


def mmmu_metrics(results):
    """Returns the mean score without and with a guess if no choice is found.

    MMMU's script guesses at random: this is the mean of what it returns.
    """
    accuracy = mean_score([result["score"] for result in results])
    guesses = sum(1 / len(result["choices"]) for result in results if result["score"] is None)
    return {"accuracy": accuracy, "accuracy with guesses": accuracy + guesses / len(results)}


def pope_metrics(results):
    """Returns POPE's metrics of all questions and of each file; yes is the positive class."""
    kinds = {"": results}
    for result in results:
        kinds.setdefault(f"{result['kind']} ", []).append(result)
    found = {}
    for kind, part in kinds.items():
        if len(kinds) > 2 or not kind:
            found |= {f"{kind}{name}": value for name, value in yes_no_metrics(part).items()}
    return found


def yes_no_metrics(results):
    counts = Counter((row["score"], row["answers"][0].strip().lower()) for row in results)
    true_yes, yes = counts[1.0, "yes"], counts[1.0, "yes"] + counts[0.0, "no"]
    expected_yes = sum(count for (_, reference), count in counts.items() if reference == "yes")
    precision = true_yes / yes if yes else 0.0
    recall = true_yes / expected_yes if expected_yes else 0.0
    return {
        "accuracy": (true_yes + counts[1.0, "no"]) / len(results),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes-rate": yes / len(results),
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
