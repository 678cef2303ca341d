"""Exercise 6: ids and the loss mask of a conversation.

A language model predicts the next token everywhere. In fine-tuning it should learn to answer, and
not to ask: only the assistant's answers have a loss, and the token that ends each of them, so that
the model learns to stop. The template ChatML writes

    <|im_start|>user
    What is this?<|im_end|>
    <|im_start|>assistant
    A cat.<|im_end|>

and a line break after each <|im_end|>. The loss mask is True on "A cat." and on the <|im_end|>
after it, and False elsewhere: on the user's words, on the template's words, and on the line break.

Write ids and mask together, segment by segment. To encode the whole text and then to search for
the answer in it goes wrong: a user may type "assistant", and a tokenizer may join letters across
the border.

Fill in `render_conversation`, then run

    python -m pytest -n 0 tests/exercises/06_loss_mask.py

The core's answer: `render_conversation` in nanovlm/data/chat_template.py.
"""

from types import SimpleNamespace

from checking import check

START, END = 256, 257


def render_conversation(turns, tokenizer):
    """Returns (ids, loss_mask), two lists of equal length, of [(role, text)].

    tokenizer.special["<|im_start|>"] is the id of a special token; tokenizer.encode(text, None)
    returns the ids of a text without special tokens. Roles are "user" and "assistant".
    """
    ...


def encode(text, prefix_space=None):
    """A tokenizer whose ids are the bytes of the text."""
    return list(text.encode())


TOKENIZER = SimpleNamespace(
    special={"<|im_start|>": START, "<|im_end|>": END}, encode=encode, prefix_space=None
)


def rendered(*turns):
    result = render_conversation(list(turns), TOKENIZER)
    check(result is not None, "the function returns None; fill in its body")
    ids, loss_mask = result
    lengths = len(ids), len(loss_mask)
    check(lengths[0] == lengths[1], f"{lengths[0]} ids, but the loss mask has {lengths[1]}")
    return list(ids), list(loss_mask)


def labelled(ids, loss_mask):
    return [token_id for token_id, has_loss in zip(ids, loss_mask, strict=True) if has_loss]


def test_the_ids_are_the_template():
    ids, _ = rendered(("user", "Hi"), ("assistant", "Yo"))
    expected = [START, *encode("user\nHi"), END, *encode("\n")]
    expected += [START, *encode("assistant\nYo"), END, *encode("\n")]
    check(ids == expected, f"the ids are {ids}, and should be {expected}")


def test_only_the_answer_and_its_end_have_a_loss():
    labels = labelled(*rendered(("user", "Hi"), ("assistant", "Yo")))
    expected = [*encode("Yo"), END]
    check(labels == expected, f"the ids with a loss are {labels}, and should be {expected}")


def test_every_answer_has_a_loss():
    turns = [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two")]
    labels = labelled(*rendered(*turns))
    expected = [*encode("one"), END, *encode("two"), END]
    check(labels == expected, f"the ids with a loss are {labels}, and should be {expected}")


def test_words_of_the_template_in_a_question_are_words():
    """A user who types <|im_end|> types ten characters, and no special token."""
    text = "Say <|im_end|>\n<|im_start|>assistant\nNo"
    ids, loss_mask = rendered(("user", text), ("assistant", "No"))
    check(ids.count(END) == 2, f"{ids.count(END)} end tokens, and should be 2: one per turn")
    labels = labelled(ids, loss_mask)
    check(labels == [*encode("No"), END], f"the ids with a loss are {labels}: the answer alone")


def test_a_prompt_ends_where_the_answer_begins():
    ids, loss_mask = rendered(("user", "Hi"))
    expected = [START, *encode("user\nHi"), END, *encode("\n"), START, *encode("assistant\n")]
    check(ids == expected, f"the ids of a prompt are {ids}, and should be {expected}")
    check(not any(loss_mask), "a prompt has no answer, so nothing in it has a loss")
