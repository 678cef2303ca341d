"""A tokenizer of ours and the reference (Hugging Face's `tokenizers`, reading the same file) give the same ids for any text."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from nanovlm import Mistake
from nanovlm.tokenizer import DIGITS_GPT2, Tokenizer, learn

TEXTS = ["top apple milk, middle nothing, bottom egg", "How many eggs are there?", "Là-bas, 25 œufs; 日本の卵 🥚🥚", "don't we'll\n\n  x  1 23\t4 "] * 3
LEARNT = learn(TEXTS, 300, ["<s>", "</s>", "[INST]"])
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                                               {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def with_spec(**changes):
    return json.dumps({**json.loads(LEARNT.source), **changes}).encode()


BOTH = {name: (Tokenizer(source), Reference.from_str(source.decode())) for name, source in
        {"gpt2": LEARNT.source, "digits": with_spec(pre_tokenizer=DIGITS), "split": with_spec(pre_tokenizer=SPLIT)}.items()}
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aeg 's'll 0129 \n\t  ,.½²")), max_size=40)


@pytest.mark.parametrize("kind", BOTH)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_every_text_gets_the_references_ids_and_comes_back(kind, text):
    ours, reference = BOTH[kind]
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_are_asked_for_by_name_and_never_found_in_a_text():
    ids = LEARNT.encode("<s>[INST]</s>")
    assert not set(ids) & set(LEARNT.special.values()) and LEARNT.decode(ids) == "<s>[INST]</s>"
    assert sorted(LEARNT.special.values()) == [300, 301, 302] and LEARNT.vocab_size == 303


@given(text=ANY_TEXT)
def test_a_stream_says_the_same_and_never_half_a_letter(text):
    stream = LEARNT.stream()
    pieces = [stream.push(i) for i in LEARNT.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text and ("\ufffd" in text or not any("\ufffd" in piece for piece in pieces))


def test_a_reply_cut_inside_a_letter_ends_in_a_replacement_mark():
    stream = LEARNT.stream()
    said = "".join(stream.push(i) for i in LEARNT.encode("🍏")[:2]) + stream.flush()
    assert said == "\ufffd"


def test_a_lone_surrogate_is_no_reason_to_stop():
    assert LEARNT.decode(LEARNT.encode("a\ud800b")) == "a\ufffdb"


def test_a_word_that_is_a_token_is_taken_whole_where_merges_are_ignored():
    model = json.loads(LEARNT.source)["model"]
    model = {**model, "ignore_merges": True, "vocab": {**model["vocab"], "zebra": 300}}
    source = with_spec(model=model, added_tokens=[])
    assert Tokenizer(source).encode("zebra") == Reference.from_str(source.decode()).encode("zebra").ids == [300]


def test_spaces_before_a_digit_stay_whole():
    assert DIGITS_GPT2 != BOTH["gpt2"][0].encoding._pat_str
    assert [BOTH["digits"][0].decode([i]) for i in BOTH["digits"][0].encode("  1")][-1] == "1"


@pytest.mark.parametrize("source, word", [
    (b"{", "JSONDecodeError"), (b"[]", "TypeError"), (b"{}", "model"), (with_spec(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (with_spec(pre_tokenizer=None), "none"), (with_spec(normalizer={"type": "NFC"}), "NFC"),
    (with_spec(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}), "space"),
    (with_spec(model={**json.loads(LEARNT.source)["model"], "type": "Unigram"}), "Unigram"),
    (with_spec(model={**json.loads(LEARNT.source)["model"], "merges": ["q z"]}), "b'qz'"),
])
def test_what_is_not_known_is_refused_by_name(source, word):
    with pytest.raises(Mistake, match=f"here.json.*{word}"):
        Tokenizer(source, "here.json")
