"""A conversation of a file, read as turns: [(role, text)]."""

import re

from .. import UserError

# JSON can hold one half of a UTF-16 pair; UTF-8 cannot.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Megatron's COCO prompt, for captions that come without a question
CAPTION_PROMPT = "Give a brief description of this image in one sentence."
# follows a question of VQAv2, ChartQA, POPE and MME
SHORT_PROMPT = "Answer the question using a single word or phrase."
# follows a question and its choices in AI2D, MMMU and MMStar
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}


def read_turns(record, name):
    """Returns a LLaVA `conversations` or an OpenAI `messages` list as [(role, text)].

    Roles are "system", "user" and "assistant". An answer loses the white space around it. A first
    question that is an image alone asks for a caption (CAPTION_PROMPT). Raises UserError, which
    begins with `name`, if it is not a conversation.
    """
    raw = isinstance(record, dict) and (record.get("conversations") or record.get("messages"))
    if not raw or not isinstance(raw, list) or not all(isinstance(turn, dict) for turn in raw):
        raise UserError(
            f"{name}: neither `conversations` nor `messages` is a list of turns in {record!r:.80}",
            "no conversation",
        )
    turns = []
    for turn in raw:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if str(role) not in ROLES or not isinstance(text, str):
            raise UserError(
                f"{name}: a turn needs a text and a role, one of {', '.join(ROLES)}, "
                f"not {turn!r:.80}",
                "no conversation",
            )
        if LONE_SURROGATE.search(text):
            raise UserError(
                f"{name}: a turn has half a character (a lone surrogate): {text!a:.80}",
                "half a character",
            )
        # The model must not learn to begin or to end an answer in white space.
        turns.append((ROLES[role], text.strip() if ROLES[role] == "assistant" else text))
    roles = [role for role, _ in turns]
    if "user" in roles:
        first = roles.index("user")
        if turns[first][1].strip() == "<image>":
            turns[first] = ("user", f"<image>\n{CAPTION_PROMPT}")
    return turns


def check_turns(turns, image_count, name):
    """Raises UserError if a conversation cannot be a sample.

    Users and assistants must alternate, each answer must have a text, and there must be one <image>
    per image.
    """
    roles = [role for role, _ in turns]
    after_system = roles[1:] if roles[:1] == ["system"] else roles
    pairs = len(after_system) // 2
    if not pairs or after_system != ["user", "assistant"] * pairs:
        raise UserError(
            f"{name}: turns must go (system,) user, assistant, user, assistant …, "
            f"not {', '.join(roles)}",
            "turns out of order",
        )
    tag_count = sum(text.count("<image>") for role, text in turns if role != "assistant")
    if tag_count != image_count:
        raise UserError(
            f"{name}: {tag_count} <image> in its text but {image_count} images",
            "wrong number of <image>",
        )
    for number, (role, text) in enumerate(turns, 1):
        if role == "assistant" and not text.strip():
            raise UserError(
                f"{name}: turn {number}, the assistant's, is empty: there is nothing to learn",
                "empty answer",
            )
