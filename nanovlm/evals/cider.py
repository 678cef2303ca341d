"""CIDEr-D: how like the captions that people gave a picture a caption is, words counting the more the fewer pictures they are said of."""

import math
import re
from collections import Counter

from .. import UserError

BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}  # kept: the list of what is dropped has -LRB-
CLITIC = r"(?:n't|'(?:s|m|d|ll|ve|re))(?!\w)"
TOKEN = re.compile(
    rf"""
    (?:[a-z]\.){{2,}} | (?:mr|mrs|ms|dr|prof|st|ave|jr|sr|inc|corp|ltd|vs|etc|jan|feb|mar|apr|aug|sept?|oct|nov|dec|ph\.d)\. | no\.(?=\s*\d)
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | y'(?=all\b) | lem(?=me\b) | gim(?=me\b) | 't(?=is\b|was\b)
    | {CLITIC} | '\d\ds?\b | o'clock\b | ma'am\b | d'oh\b
    | \d+(?:[.,:/]\d+)*(?:-?\w+(?:-\w+)*)?
    | @?\w(?:(?!{CLITIC})(?:\w|[-./](?=\w)|'(?=\w)))*
    | \*+ | [^\s\w]""",
    re.VERBOSE,
)
DROPPED = set("`'\".?!,:-;\u2018\u2019\u201c\u201d\u2013\u2014\u2026")


def words(text):
    """A caption's tokens as pycocoevalcap compares them: Stanford's PTBTokenizer's, lower-cased (don't is do n't, man's is man 's), less punctuation.

    Theirs is a Java program; this one says the same of captions, and differs on smileys, <tags>, web addresses and the like.
    """
    return [
        BRACKETS.get(token, token)
        for token in TOKEN.findall(text.lower().replace("\u2019", "'"))
        if token not in DROPPED
    ]


def cider(answers, golds):
    """(CIDEr-D of all, of each picture), as in pycocoevalcap: n = 4, sigma = 6, times 10, over tokens of `words`.

    A word's weight comes from how many of these pictures' references have it: scores of two sets of pictures, or of a part, cannot be compared.
    """
    if bare := sum(not texts for texts in golds):
        raise UserError(f"{bare} of {len(golds)} pictures have no caption to compare with")
    tests, references = (
        [grams(answer) for answer in answers],
        [[grams(text) for text in texts] for texts in golds],
    )
    pictures = Counter(gram for texts in references for gram in set().union(*texts))
    idf = {gram: math.log(len(golds) / count) for gram, count in pictures.items()}
    unseen = math.log(len(golds))

    def weigh(counts):
        vector = {gram: count * idf.get(gram, unseen) for gram, count in counts.items()}
        norms = [
            math.sqrt(sum(weight**2 for gram, weight in vector.items() if len(gram) == n))
            for n in range(1, 5)
        ]
        return (
            vector,
            norms,
            sum(count for gram, count in counts.items() if len(gram) == 2),
        )  # pycocoevalcap's length: pairs of words

    def alike(test, reference):
        (vector, norms, length), (wanted, sizes, size) = test, reference
        dots = [0.0] * 4
        for gram in vector.keys() & wanted.keys():
            dots[len(gram) - 1] += min(vector[gram], wanted[gram]) * wanted[gram]
        cosines = (
            dot / (a * b) if a and b else 0.0 for dot, a, b in zip(dots, norms, sizes, strict=True)
        )
        return math.exp(-((length - size) ** 2) / (2 * 6**2)) * sum(cosines) / 4

    scores = []
    for test, texts in zip(map(weigh, tests), references, strict=True):
        scores.append(10 * sum(alike(test, weigh(text)) for text in texts) / len(texts))
    return sum(scores) / len(scores), scores


def grams(text):
    """How often each run of one to four words comes in a text."""
    tokens = words(text)
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1)
    )
