"""A tokenizer of ours and the reference (Hugging Face's `tokenizers`, reading the same file) give the same ids for any text."""
import json
import random
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Reference

from nanovlm import Mistake
from nanovlm.tokenizer import DIGITS_GPT2, Tokenizer, learn

TEXTS = ["top apple milk, middle nothing, bottom egg", "How many eggs are there?", "Là-bas, 25 œufs; 日本の卵 🥚🥚",
         "don't we'll\n\n  x  1 23\t4 "] * 3
LEARNT = learn(TEXTS, 300, ["<s>", "</s>", "[INST]"])
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                                               {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def with_spec(**changes):
    return json.dumps({**json.loads(LEARNT.files["tokenizer.json"]), **changes}).encode()


BOTH = {name: (Tokenizer({"tokenizer.json": source}), Reference.from_str(json.dumps({**json.loads(source), "added_tokens": []}))) for name, source in
        {"gpt2": LEARNT.files["tokenizer.json"], "digits": with_spec(pre_tokenizer=DIGITS), "split": with_spec(pre_tokenizer=SPLIT)}.items()}
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


def test_half_a_character_is_named():
    with pytest.raises(Mistake, match=r"U\+D800, at letter 2"):
        LEARNT.encode("a\ud800b")


def test_a_word_that_is_a_token_is_taken_whole_where_merges_are_ignored():
    model = json.loads(LEARNT.files["tokenizer.json"])["model"]
    model = {**model, "ignore_merges": True, "vocab": {**model["vocab"], "zebra": 300}}
    source = with_spec(model=model, added_tokens=[])
    assert Tokenizer({"tokenizer.json": source}).encode("zebra") == Reference.from_str(source.decode()).encode("zebra").ids == [300]


def test_spaces_before_a_digit_stay_whole():
    assert BOTH["gpt2"][0].encoding._pat_str != DIGITS_GPT2
    assert [BOTH["digits"][0].decode([i]) for i in BOTH["digits"][0].encode("  1")][-1] == "1"


@pytest.mark.parametrize("source, word", [
    (b"{", "JSONDecodeError"), (b"[]", "TypeError"), (b"{}", "model"), (with_spec(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (with_spec(pre_tokenizer=None), "none"), (with_spec(normalizer={"type": "NFC"}), "NFC"),
    (with_spec(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}), "space"),
    (with_spec(model={**json.loads(LEARNT.files["tokenizer.json"])["model"], "type": "Unigram"}), "Unigram"),
    (with_spec(model={**json.loads(LEARNT.files["tokenizer.json"])["model"], "merges": ["q z"]}), "'qz'"),
])
def test_what_is_not_known_is_refused_by_name(source, word):
    with pytest.raises(Mistake, match=f"here.json.*{word}"):
        Tokenizer({"tokenizer.json": source}, "here.json")


def test_a_text_that_has_no_more_to_join_gives_a_smaller_vocabulary():
    """" ab" holds two merges beside the bytes: a + b, then space + ab."""
    assert learn([" ab ab"], 400, ["<s>"]).vocab_size == 256 + 2 + 1
    assert learn([""], 400, ["<s>"]).vocab_size == 256 + 1


# ---- the real files of Mistral's models, which mistral-common carries ----

MISTRAL = files("mistral_common") / "data"
SCRAPS = ["The", " quick", "  ", "    ", "\n", "\t", "\n\n", " 1234567", "3.14", "def f(x):\n    return x", "'re", "!!!", "{};", "https://a.b/c?d=e",
          "ab", " ", "é", "e\u0301", " naïve", "日本の卵", "漢", "안녕", "🥚", "👩\u200d🍳", "Привет", "Ω", "ﬁ", "▁", "<s>", "[INST]",
          "\u00a0", "\x00", "\x7f", "\ud7ff", "\U0010ffff"]


def texts(count):
    draw = random.Random(0)
    return ["".join(draw.choices(SCRAPS, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", "mistral_instruct_tokenizer_240323.model.v3",
                                  "mistral_instruct_tokenizer_241114.model.v7"])
def test_sentencepiece_models_give_sentencepieces_ids(name):
    """Mistral 7B v0.1, v0.2, v0.3 and v7: bytes for what has no piece, ▁ for a space, one in front."""
    source = (MISTRAL / name).read_bytes()
    ours, reference = Tokenizer({"tokenizer.model": source}), SentencePieceProcessor(model_proto=source)
    assert ours.vocab_size == reference.vocab_size() and ours.special["<s>"] == reference.bos_id()
    for text in texts(600):
        ids = reference.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == reference.decode(ids) == text.replace("▁", " "), text


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_files_give_mistral_commons_ids(name):
    """Nemo and Pixtral: ids are shifted by the special tokens."""
    ours, reference = Tokenizer({"tekken.json": (MISTRAL / name).read_bytes()}), Tekkenizer.from_file(str(MISTRAL / name))
    assert ours.vocab_size == reference.n_words and ours.special["</s>"] == reference.eos_id
    for text in texts(600):
        ids = reference.encode(text, bos=False, eos=False)
        assert ours.encode(text) == ids and ours.decode(ids) == text


def test_a_folders_file_is_found_and_handed_on_unchanged(tmp_path):
    source = (MISTRAL / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "tokenizer.model").write_bytes(source)
    Tokenizer.load(tmp_path / "in").save(tmp_path / "out")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("tokenizer.model", source)]


@pytest.mark.parametrize("name, damage", [("tokenizer.model", lambda b: b[: len(b) // 2]), ("tokenizer.model", lambda b: b""),
                                          ("tekken.json", lambda b: b[:1000])])
def test_a_damaged_file_is_one_line(tmp_path, name, damage):
    real = {"tokenizer.model": "tokenizer.model.v1", "tekken.json": "tekken_240718.json"}[name]
    (tmp_path / name).write_bytes(damage((MISTRAL / real).read_bytes()))
    with pytest.raises(Mistake) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
