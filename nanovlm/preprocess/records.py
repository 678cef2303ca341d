"""Any record of images and words becomes a conversation. The fields of a record show its kind:

    fields                                  the conversation
    conversations | messages                its own; a turn may be a list of parts, as OpenAI's
    texts                                   its pairs of user and assistant (the_cauldron)
    question | context, choices | options   choices by letter; the answer is the letter of the right
                                            one, which is given by its letter, index or text
    question | context, answers | answer    one of the answers, by weight if there are weights
    caption | text                          a request for a brief description, and the caption

`system` becomes the first turn; `context` and `hint` stand before their `question`. Fields without
a use are counted; one that seems to name the image of a record without images is refused.

Images come first unless the text says where. Random choices are made by a hash of the sample's id,
so they are the same in every run.
"""

import hashlib
import itertools
import math
import re
import string
from bisect import bisect

from .. import UserError
from ..data.turns import LETTER_PROMPT, SHORT_PROMPT

# "Instructions for brief image description", Liu et al. 2023 (Visual Instruction Tuning), table 11
CAPTION_PROMPTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
LETTERS = string.ascii_uppercase
# 'name': value of a field that may hold an image: by its name (but FineVision rates each answer in
# `image_correspondence_ratings`, texts without images too), bytes, a data: URI or a file's name
IMAGE_FIELD = re.compile(
    r"^(?!'\w+_(ratings|min)':)[^:]*(image|img|\bpic\b|picture|photo)|: (b['\"]|\[?['\"]data:image)"
    r"|\.(jpe?g|jfif|png|webp|bmp|gif|tiff?|ppm|avif|heic)\W*$",
    re.IGNORECASE,
)


def first_field(record, *names):
    """Returns the first field that a record has of several names for one thing, or None.

    None, NaN (pandas' None) and an empty list count as missing.
    """
    values = map(record.get, names)
    return next((value for value in values if value not in (None, []) and value == value), None)


def find_kind(record):
    """Returns (the function that makes a conversation of a record, the values that it needs, the
    names of the fields without a use).

    Returns None if the kind of the record is unknown.
    """
    for kind, optional, *fields in RECORD_KINDS:
        values = [first_field(record, *names) for names in fields]
        if None not in values:
            used = {*ANY_KIND, *optional}.union(*fields)
            return kind, values, [x for x in record if x not in used and first_field(record, x)]
    return None


def record_messages(record, name, image_count):
    """Returns the messages of a record of known kind; name: its id. Raises UserError."""
    kind, values, unused = find_kind(record)
    fields = [(key, record[key]) for key in unused]
    for turn in values[0] if isinstance(values[0], list) else []:
        found = turn.items() if isinstance(turn, dict) else ()
        fields += [(key, value) for key, value in found if key not in TURN_FIELDS]
    for key, value in [] if image_count else fields:
        if value not in (None, []) and IMAGE_FIELD.search(field := f"{key!r}: {value!r}"):
            raise UserError(
                f"it has no image, but {field:.160}; make it the record's `image`, or remove it",
                "image in an unknown field",
            )
    if kind is caption_question and not image_count:
        raise UserError(
            "a caption, but no image (in a tar, the members of a record follow one another, as "
            "tar --sort=name writes them)",
            "no image",
        )
    messages = kind(record, name, *values)
    if kind is not conversation_turns:
        messages = alternate_turns(messages, image_count)
    if (system := first_field(record, "system")) and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def image_values(record):
    """Returns what a record gives as its images: in `image`, `images` or the parts of its turns.

    Each should be a path, bytes, {"bytes", "path"} or a data: URI. Raises UserError if two places
    give different images.
    """
    turns, found = first_field(record, "conversations", "messages"), []
    for turn in turns if isinstance(turns, list) else []:
        parts = first_field(turn, "value", "content") if isinstance(turn, dict) else None
        for part in parts if isinstance(parts, list) else []:
            match part:
                case {"image_url": {"url": str(url)} | str(url)} | {"image": str(url)} if url:
                    found.append(url)
    for value in (first_field(record, "image"), first_field(record, "images")):
        values = value if isinstance(value, list) else [value]
        if found and value and values != found:
            raise UserError(
                "gives other images in its turns, in `image` or in `images`", "images in two places"
            )
        found = values if value else found
    return found


def image_first(text):
    """Returns a turn with <image> on a line before it, as LLaVA's preprocess_multimodal does."""
    if "<image>" not in text:
        return text
    return f"<image>\n{text.replace('<image>', '').strip()}".strip()


def alternate_turns(texts, image_count):
    """Returns texts as messages of user and assistant in turn.

    The images come first unless the user's texts say where.
    """
    if not any("<image>" in text for text in texts[::2]):
        texts = ["<image>\n" * image_count + texts[0], *texts[1:]]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def as_text(value, name):
    """Returns a text, or a finite number as text; raises UserError for anything else."""
    # not bool, which is an int, and no float that is NaN or infinite
    if type(value) not in (str, int) and not (type(value) is float and math.isfinite(value)):
        raise UserError(f"its {name} is not a text: {value!r:.80}", f"{name} is not a text")
    return str(value).strip()


def hash_fraction(purpose, name):
    """Returns a pseudorandom number in [0, 1) for a sample, a different one for each purpose."""
    digest = hashlib.sha256(f"{purpose} {name}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


# ---- kinds of records: each returns the texts of user and assistant, in turn ----


def conversation_turns(record, name, turns):
    return [join_parts(turn) for turn in turns] if isinstance(turns, list) else turns


def join_parts(turn):
    """Returns a turn of parts as one text, a line per part and <image> for an image.

    A turn with other parts is returned unchanged.
    """
    parts = first_field(turn, "value", "content") if isinstance(turn, dict) else None
    if not isinstance(parts, list):
        return turn
    lines = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                lines.append(text)
            case {"type": "image" | "image_url"}:
                lines.append("<image>")
            case _:
                return turn
    return {"role": first_field(turn, "from", "role"), "content": "\n".join(lines)}


def text_pairs(record, name, pairs):
    texts = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        for role in ("user", "assistant"):
            texts.append(as_text(pair.get(role) if isinstance(pair, dict) else None, "turn"))
    return texts


def question_text(record):
    """Returns the question of a record, after its context and hint as in LLaVA's MMBench."""
    fields = (first_field(record, name) for name in ("context", "hint", "question"))
    return "\n".join(as_text(field, "question") for field in fields if field not in (None, ""))


def choice_question(record, name, _, choices, right):
    if not isinstance(choices, list) or len(choices) > len(LETTERS):
        raise UserError(
            f"its choices are not a list of up to {len(LETTERS)}: {choices!r:.80}",
            "choices are not a list",
        )
    texts = [as_text(choice, "choice") for choice in choices]
    bare = [re.sub(rf"^\(?{LETTERS[i]}[.):]+\s*", "", text) for i, text in enumerate(texts)]
    if {*bare} & {*texts}:  # they do not all begin with their letters
        bare = texts
    lines, found = [question_text(record)], []
    key = right.strip() if isinstance(right, str) else f"index {right}"
    for i, text in enumerate(texts):
        lines.append(f"{LETTERS[i]}. {bare[i]}")
        names = (f"index {i}", str(i), text, bare[i], lines[-1])
        if key in names or key.strip("().:").upper() == LETTERS[i]:
            found.append(LETTERS[i])
    if len(found) != 1:
        raise UserError(
            f"{right!r:.80} must be the letter, index or text of one of its choices, not {found}",
            "no right choice",
        )
    return ["\n".join([*lines, LETTER_PROMPT]), *found]


def answer_question(record, name, _, answers):
    prompt = f"{question_text(record)}\n{SHORT_PROMPT}"
    weights = first_field(record, "answer_weights", "weights")
    return [prompt, choose_answer(answers, weights, name)]


def caption_question(record, name, captions):
    evaluation = first_field(record, "question_id", "label", "question", "answer", "answers")
    if evaluation is not None and first_field(record, "caption") is None:
        raise UserError(
            "its `text` is the question of an evaluation, with no answer to learn: call it "
            "`question`, beside an `answer`, or `caption` if it is one",
            "question of an evaluation",
        )
    number = int(hash_fraction("prompt", name) * len(CAPTION_PROMPTS))
    return [CAPTION_PROMPTS[number], choose_answer(captions, None, name)]


def choose_answer(answers, weights, name):
    """Returns one of several answers, with a probability in proportion to its weight.

    It is always the same for a sample. Megatron's task_encoder.py draws a new one each time.
    """
    if not isinstance(answers, list):
        answers = [answers]
    if weights is None:
        weights = [1] * len(answers)
    if (
        not isinstance(weights, list)
        or len(weights) != len(answers)
        or not all(type(weight) in (int, float) and 0 <= weight < 1e9 for weight in weights)
    ):
        raise UserError(
            f"its weights are not a number from 0 on for each of {len(answers)} answers: "
            f"{weights!r:.80}",
            "wrong weights",
        )
    if sum(weights) < 1e-9:
        raise UserError(f"none of its {len(answers)} answers has any weight", "empty answer")
    ends = list(itertools.accumulate(weights))
    chosen = answers[bisect(ends, hash_fraction("answer", name) * ends[-1])]
    return as_text(chosen.get("answer") if isinstance(chosen, dict) else chosen, "answer")


# names of fields; a record has any one of them
ANY_KIND = ("id", "question_id", "image", "images", "system")
TURN_FIELDS = ("from", "value", "role", "content", "user", "assistant")
QUESTION = ("question", "context")
CHOICES = ("choices", "options")
RIGHT = ("correct_choice_idx", "correct", "answer")
ANSWERS = ("answers", "answer")
CAPTION = ("caption", "text")
RECORD_KINDS = [  # (kind, fields that it may have, and fields that it needs)
    (conversation_turns, (), ("conversations", "messages")),
    (text_pairs, (), ("texts",)),
    (choice_question, ("hint",), QUESTION, CHOICES, RIGHT),
    (answer_question, ("hint", "answer_weights", "weights"), QUESTION, ANSWERS),
    (caption_question, (), CAPTION),
]
