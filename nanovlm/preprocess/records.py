"""Any record of pictures and words as a conversation. What a record is shows in its fields:

    fields                                   the conversation
    conversations | messages                 its own; a turn may be a list of parts, as OpenAI's
    texts                                    its pairs of user and assistant, the pictures first (the_cauldron)
    question | context, choices | options    choices by letter; the answer is the letter of the right one, an index or a letter itself
    question | context, answers | answer     one of the answers, by weight if there are weights
    caption | text                           one of LLaVA's requests for a brief description, answered by the caption

What is drawn is drawn by a hash of the sample's id, so that it is the same in every run.
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
UNKNOWN_KIND = "no known kind of record"


def first_field(record, *names):
    """The first that a record has of several names for one thing."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def stated_id(record):
    return first_field(record, "id", "question_id")


def find_kind(record):
    """The function that makes a conversation of such a record; None if there is none."""
    return next(
        (
            kind
            for kind, *things in RECORD_KINDS
            if all(first_field(record, *names) is not None for names in things)
        ),
        None,
    )


def require_kind(record, where):
    if not (kind := find_kind(record)):
        raise UserError(
            f"{where} is {UNKNOWN_KIND} (of a conversation, a question with answers or choices, a caption): {record!r:.200}",
            UNKNOWN_KIND,
        )
    return kind


def record_turns(record, name, pictures, where):
    """[(role, text)] of a record, checked; name: its id; pictures: how many it has. Raises UserError."""
    kind = require_kind(record, where)
    try:
        said = kind(record, name)
    except UserError as mistake:
        raise UserError(f"{where}: {mistake}", mistake.reason) from None
    if kind is caption_question and not pictures:
        raise UserError(f"{where}: a caption, but no picture", "no picture")
    said = chat_template.read_turns(
        {"conversations": said if kind is conversation_turns else alternate_turns(said, pictures)}, where
    )
    chat_template.check_turns(said, pictures, where)
    return said


def image_paths(record, where):
    """Of the pictures that a record names."""
    value = first_field(record, "image", "images") or []
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise UserError(
            f"{where}: `image` is neither a path nor a list of paths: {value!r:.80}",
            "no path of a picture",
        )
    return listed


def alternate_turns(texts, pictures):
    """What a user and an assistant say in turn; the pictures come first unless the user says where."""
    if texts and not any("<image>" in text for text in texts[::2]):
        texts = ["<image>\n" * pictures + texts[0], *texts[1:]]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def as_text(value, what):
    """A text, or a number as one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"its {what} is no text: {value!r:.80}", f"{what} is no text")
    return str(value).strip()


def hash_fraction(what, name):
    """A number from 0 up to 1 for a sample, another for everything that is drawn."""
    return int.from_bytes(hashlib.sha256(f"{what} {name}".encode()).digest()[:6], "little") / 2**48


# ---- kinds: what user and assistant say in turn ----


def conversation_turns(record, name):
    said = record.get("conversations") or record.get("messages") or []
    return [join_parts(turn) for turn in said] if isinstance(said, list) else said


def join_parts(turn):
    """A turn in parts as one text, a line for each, <image> where a picture is; as it was if it has other parts."""
    parts = first_field(turn, "value", "content") if isinstance(turn, dict) else None
    lines = []
    for part in parts if isinstance(parts, list) else [None]:
        match part:
            case {"type": "text", "text": str(text)}:
                lines.append(text)
            case {"type": "image" | "image_url"}:
                lines.append("<image>")
            case _:
                return turn
    return {"role": first_field(turn, "from", "role"), "content": "\n".join(lines)}


def text_pairs(record, name):
    texts = record["texts"] if isinstance(record["texts"], list) else [record["texts"]]
    return [
        as_text(pair.get(role) if isinstance(pair, dict) else None, "turn")
        for pair in texts
        for role in ("user", "assistant")
    ]


def choice_question(record, name):
    options, right = first_field(record, *CHOICES), first_field(record, *RIGHT)
    if options == []:
        return answer_question(record, name)
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise UserError(
            f"its choices are no list of up to {len(LETTERS)}: {options!r:.80}",
            "choices are no list",
        )
    number = (
        LETTERS.index(letter)
        if isinstance(right, str) and (letter := right.strip().upper()) in [*LETTERS]
        else right
    )
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(options):
        raise UserError(
            f"{right!r:.80} is neither the letter nor the index of one of its {len(options)} choices",
            "no right choice",
        )
    return [
        multiple_choice(
            as_text(first_field(record, *QUESTION), "question"),
            [as_text(option, "choice") for option in options],
        ),
        LETTERS[number],
    ]


def multiple_choice(question, options):
    return "\n".join(
        [
            question,
            *(f"{LETTERS[i]}. {option}" for i, option in enumerate(options)),
            chat_template.LETTER_PROMPT,
        ]
    )


def answer_question(record, name):
    asked = f"{as_text(first_field(record, *QUESTION), 'question')}\n{chat_template.SHORT_PROMPT}"
    return [asked, choose_answer(first_field(record, *ANSWERS), first_field(record, *WEIGHTS), name)]


def caption_question(record, name):
    return [
        CAPTION_PROMPTS[int(hash_fraction("prompt", name) * len(CAPTION_PROMPTS))],
        choose_answer(first_field(record, *CAPTION), None, name),
    ]


def choose_answer(answers, weights, name):
    """One of several answers, the more weight the likelier, always the same for a sample; Megatron's task_encoder.py draws anew each time."""
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    weights = [1] * len(answers) if weights is None else weights
    if (
        not isinstance(weights, list)
        or len(weights) != len(answers)
        or not all(
            isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < 1e9
            for weight in weights
        )
    ):
        raise UserError(
            f"its weights are not a number from 0 on for each of {len(answers)} answers: {weights!r:.80}",
            "wrong weights",
        )
    ends = list(itertools.accumulate(weights))
    if not ends or ends[-1] < 1e-9:
        raise UserError("no answer has any weight" if ends else "it has no answer", "empty answer")
    chosen = answers[bisect(ends, hash_fraction("answer", name) * ends[-1])]
    return as_text(chosen.get("answer") if isinstance(chosen, dict) else chosen, "answer")


QUESTION, CHOICES, RIGHT = (
    ("question", "context"),
    ("choices", "options"),
    ("correct_choice_idx", "correct", "answer"),
)
ANSWERS, WEIGHTS, CAPTION = (
    ("answers", "answer"),
    ("answer_weights", "weights"),
    ("caption", "text"),
)
RECORD_KINDS = [
    (conversation_turns, ("conversations", "messages")),
    (text_pairs, ("texts",)),
    (choice_question, QUESTION, CHOICES, RIGHT),
    (answer_question, QUESTION, ANSWERS),
    (caption_question, CAPTION),
]
