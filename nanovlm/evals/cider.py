"""CIDEr-D: how similar a caption is to the captions that people wrote for an image.

A word counts more the fewer images have it in their captions (its idf).
"""

import math
import re
from collections import Counter

from .. import UserError

# pycocoevalcap keeps brackets: they are -lrb- here, but its list of removed tokens has -LRB-.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CONTRACTION = r"(?:(?:n't|'(?:s|m|d|ll|ve|re))(?!\w)|'n(?:'|(?!\w)))"
ABBREVIATIONS = (  # PTBLexer.flex knows the states of the last line only with a capital
    "mr|mrs|ms|messrs|mme|mlle|drs?|profs?|rev|hon|esq|jr|sr|bros|jos|alex|wm|mfg|mtg|seq|cie"
    "|gen|govs?|sens?|reps?|lt|lieut|col|cpl|capt|cmdr|comdr|sgt|sfc|spc|adm|adj|maj|brig|pres"
    "|supts?|pvt|pfc|det|ens|insp|asst|attys?|msgr|treas|invt|st|ste|ave|blvd|rd|rt|bldg|ft|mt|sq"
    "|inc|cos?|corp|bancorp|ltd|plc|bhd|pty|pp?tys|ppty|ptes?|sys|assn|assoc|dept|univ|intl|natl"
    "|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri"
    "|ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn"
    r"|tenn|va|vt|wisc?|wyo|al|adv|elec|est|ext|tel|cf|vs|etc|ph(?:\.d)?"
    "|(?=(?-i:[A-Z]))(?:az|ark|del|ill|la|mass|miss|ore|pa|tex|wash)"
)
TOKEN_PATTERN = re.compile(
    rf"""
    (?:[a-z]\.){{2,}}(?!\w) | [a-z]\.(?!\w|\s+(?-i:An?|The(?:re|se|y)?|Th(?:is|at)|It)\b)
    | (?:{ABBREVIATIONS})\. | (?:nos?|ca|figs?|pp|op|art|prop)\.(?=\s*\d)
    | (?-i:[A-Z]+(?:&[A-Z]+)+)
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b)
    | y'(?=all\b) | lem(?=me\b) | gim(?=me\b) | 't(?=is\b|was\b)
    | {CONTRACTION} | '\d\ds?\b | o'clock\b | ma'am\b | d'oh\b
    | '(?:em|till?|cause)\b | ol'(?!\w)
    | (?<![-a-z])[-+](?:\d+|(?=\.\d))(?:[.,:]\d+)*
    | (?:\d+|(?<!\.)(?=\.\d))(?:[.,:/]\d+)*(?:-?\w+(?:-\w+)*)? (?:\.(?=[,;:]))?
    | @?\w(?:(?!{CONTRACTION})(?:\w|[-./](?=\w)|'(?=\w)|[!?](?=[^\W\d])))* (?:\.(?=[,;:]))?
    | \*+ | [!?]{{2,}} | [^\s\w]""",
    re.VERBOSE | re.IGNORECASE,
)
PUNCTUATION = set("`'\".?!,:-;\u2018\u2019\u201c\u201d\u2013\u2014\u2026")


def tokenize_caption(text):
    """Returns a caption's tokens as pycocoevalcap compares them.

    These are the tokens of Stanford's PTBTokenizer in lower case, without punctuation: don't is do
    n't, man's is man 's. That one is a Java program; this one is equal on captions, and differs on
    smileys, <tags>, web addresses and the like.
    """
    tokens = TOKEN_PATTERN.findall(text.replace("\u2019", "'"))
    return [BRACKETS.get(token, token.lower()) for token in tokens if token not in PUNCTUATION]


def cider_scores(answers, references):
    """Returns the CIDEr-D of each answer as in pycocoevalcap: n = 4, sigma = 6, times 10.

    references: a list of captions per image. The word weights depend on all of them: scores over
    other images, or over a part of these, cannot be compared. Raises UserError if an image has no
    caption.
    """
    if missing := sum(not texts for texts in references):
        raise UserError(f"{missing} of {len(references)} images have no reference caption")
    reference_counts = [list(map(count_ngrams, texts)) for texts in references]
    image_counts = Counter()
    for counts in reference_counts:
        image_counts.update(set().union(*counts))

    def weight_ngrams(counts):
        weights, squares = {}, [0.0] * 4
        for ngram, count in counts.items():
            idf = math.log(len(references) / max(1, image_counts[ngram]))
            weights[ngram] = count * idf
            squares[len(ngram) - 1] += weights[ngram] ** 2
        # pycocoevalcap's length of a caption is its number of word pairs.
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return weights, list(map(math.sqrt, squares)), length

    def similarity(answer, reference):
        (weights, norms, length), (ref_weights, ref_norms, ref_length) = answer, reference
        dots = [0.0] * 4
        for ngram, weight in weights.items():
            ref_weight = ref_weights.get(ngram, 0.0)
            dots[len(ngram) - 1] += min(weight, ref_weight) * ref_weight
        cosines = (
            dot / (a * b) if a and b else 0.0
            for dot, a, b in zip(dots, norms, ref_norms, strict=True)
        )
        return math.exp(-((length - ref_length) ** 2) / (2 * 6**2)) * sum(cosines) / 4

    scores = []
    for text, counts in zip(answers, reference_counts, strict=True):
        answer = weight_ngrams(count_ngrams(text))
        total = sum(similarity(answer, weight_ngrams(count)) for count in counts)
        scores.append(10 * total / len(counts))
    return scores


def count_ngrams(text):
    """Returns how often each sequence of one to four words occurs in a text."""
    tokens = tokenize_caption(text)
    counts = Counter()
    for n in range(1, 5):
        counts.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return counts
