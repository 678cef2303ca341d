"""Any record of images and words becomes a conversation. The fields of a record show its kind:

    fields                                  the conversation
    conversations | messages                its own; a turn may be a list of parts, as OpenAI's
    texts                                   its pairs of user and assistant (the_cauldron)
    question | context, choices | options   choices by letter; the answer is the letter of the right
                                            one, which is given by its letter or index
    question | context, answers | answer    one of the answers, by weight if there are weights
    caption | text                          a request for a brief description, and the caption

Images come first unless the text says where. Random choices are made by a hash of the sample's id,
so they are the same in every run.
"""

import hashlib
import itertools
import string
from bisect import bisect

from .. import UserError
from ..data import chat_template

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


def first_field(record, *names):
    """Returns the first field that a record has of several names for one thing, or None.

    None and an empty list count as missing.
    """
    return next((record[name] for name in names if record.get(name) not in (None, [])), None)


def find_kind(record):
    """Returns (the function that makes a conversation of a record, the fields that it needs).

    Returns None if the kind of the record is unknown.
    """
    for kind, *fields in RECORD_KINDS:
        values = [first_field(record, *names) for names in fields]
        if None not in values:
            return kind, values
    return None


def record_messages(record, name, image_count):
    """Returns the messages of a record of known kind; name: its id. Raises UserError."""
    kind, values = find_kind(record)
    if kind is caption_question and not image_count:
        raise UserError("a caption, but no image", "no image")
    messages = kind(record, name, *values)
    return messages if kind is conversation_turns else alternate_turns(messages, image_count)


def image_paths(record):
    """Returns the paths of the images that a record names."""
    paths = first_field(record, "image", "images") or []
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UserError(
            f"`image` is neither a path nor a list of paths: {paths!r:.80}", "no path of an image"
        )
    return paths


def alternate_turns(texts, image_count):
    """Returns texts as messages of user and assistant in turn.

    The images come first unless the user's texts say where.
    """
    if not any("<image>" in text for text in texts[::2]):
        texts = ["<image>\n" * image_count + texts[0], *texts[1:]]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def as_text(value, name):
    """Returns a text, or a number as text; raises UserError for anything else."""
    if type(value) not in (str, int, float):  # not bool, which is an int
        raise UserError(f"its {name} is no text: {value!r:.80}", f"{name} is no text")
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


def choice_question(record, name, question, choices, right):
    if not isinstance(choices, list) or len(choices) > len(LETTERS):
        raise UserError(
            f"its choices are no list of up to {len(LETTERS)}: {choices!r:.80}",
            "choices are no list",
        )
    letters, letter = LETTERS[: len(choices)], None
    if isinstance(right, str):
        letter = right.strip().upper()
    elif type(right) is int and 0 <= right < len(letters):
        letter = letters[right]
    if letter not in [*letters]:
        raise UserError(
            f"{right!r:.80} is neither the letter nor the index of one of its "
            f"{len(choices)} choices",
            "no right choice",
        )
    lines = [as_text(question, "question")]
    for option, choice in zip(letters, choices, strict=True):
        lines.append(f"{option}. {as_text(choice, 'choice')}")
    return ["\n".join([*lines, chat_template.LETTER_PROMPT]), letter]


def answer_question(record, name, question, answers):
    prompt = f"{as_text(question, 'question')}\n{chat_template.SHORT_PROMPT}"
    weights = first_field(record, "answer_weights", "weights")
    return [prompt, choose_answer(answers, weights, name)]


def caption_question(record, name, captions):
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
QUESTION = ("question", "context")
CHOICES = ("choices", "options")
RIGHT = ("correct_choice_idx", "correct", "answer")
ANSWERS = ("answers", "answer")
CAPTION = ("caption", "text")
RECORD_KINDS = [
    (conversation_turns, ("conversations", "messages")),
    (text_pairs, ("texts",)),
    (choice_question, QUESTION, CHOICES, RIGHT),
    (answer_question, QUESTION, ANSWERS),
    (caption_question, CAPTION),
]
