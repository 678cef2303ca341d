"""For any text our tokenizer gives the ids of the reference (tokenizers, sentencepiece,
mistral-common) that reads the same file."""

import json
import random
import time
import unicodedata
from functools import cache, partial

import pytest
from bench.tokenizer import MISTRAL, converted, converted_tekken, ids_of
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from real import smollm2
from sentencepiece import SentencePieceProcessor
from test_real_weights import real as weights_of
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Reference
from transformers import AutoTokenizer

from nanovlm import UserError
from nanovlm.data import chat_template
from nanovlm.data.tokenizer import DIGITS_GPT2, Tokenizer, train_tokenizer

TEXTS = [
    "top apple milk, middle nothing, bottom egg",
    "How many eggs are there?",
    "Là-bas, 25 œufs; 日本の卵 🥚🥚",
    "don't we'll\n\n  x  1 23\t4 ",
] * 3
TRAINED = train_tokenizer(TEXTS, 300, ["<s>", "</s>", "[INST]"])
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}

# Qwen's: as Llama 3's, but each digit is a piece; characters are composed first
QWEN = json.loads(json.dumps(SPLIT).replace("{1,3}", ""))


def with_spec(**changes):
    return json.dumps({**json.loads(TRAINED.files["tokenizer.json"]), **changes}).encode()


BOTH = {
    name: (
        Tokenizer({"tokenizer.json": source}),
        Reference.from_str(json.dumps({**json.loads(source), "added_tokens": []})),
    )
    for name, source in {
        "gpt2": TRAINED.files["tokenizer.json"],
        "digits": with_spec(pre_tokenizer=DIGITS),
        "split": with_spec(pre_tokenizer=SPLIT),
        "qwen": with_spec(pre_tokenizer=QWEN, normalizer={"type": "NFC"}),
    }.items()
}
ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("aeg 's'll 0129 \n\t  ,.½²")
    ),
    max_size=40,
)


@pytest.mark.parametrize("kind", BOTH)
@settings(max_examples=150)
@given(text=ANY_TEXT)
def test_ids_equal_the_reference_and_decode_to_the_text(kind, text):
    ours, reference = BOTH[kind]
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    text = unicodedata.normalize("NFC", text) if kind == "qwen" else text
    assert ours.decode(ours.encode(text)) == text


def test_nfc_composes_characters_but_not_across_a_token_that_is_added_as_a_word():
    """The mark that follows > would make ≯ of it, if the word were not found first."""
    source = with_spec(pre_tokenizer=QWEN, normalizer={"type": "NFC"}, added_tokens=[])
    reference, source = with_added(source, AddedToken("<seg>", normalized=False))
    ours = Tokenizer({"tokenizer.json": source})
    for text in ("e\u0301 \u1112\u1161\u11ab 2024", "<seg>\u0338 >\u0338", "\u0344\u2126"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert ours.encode("e\u0301") == ours.encode("é") != TRAINED.encode("e\u0301")


def test_special_tokens_have_names_and_are_never_found_in_a_text():
    ids = TRAINED.encode("<s>[INST]</s>")
    assert not set(ids) & set(TRAINED.special.values()) and TRAINED.decode(ids) == "<s>[INST]</s>"
    assert sorted(TRAINED.special.values()) == [300, 301, 302] and TRAINED.vocab_size == 303


@given(text=ANY_TEXT)
def test_a_stream_gives_the_same_text_and_never_half_a_character(text):
    stream = TRAINED.stream()
    pieces = [stream.push(i) for i in TRAINED.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text and (
        "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    )


def test_a_text_that_ends_inside_a_character_ends_in_a_replacement_character():
    stream = TRAINED.stream()
    text = "".join(stream.push(i) for i in TRAINED.encode("🍏")[:2]) + stream.flush()
    assert text == "\ufffd"


def test_a_piece_that_is_a_token_is_encoded_at_once_if_merges_are_ignored():
    model = json.loads(TRAINED.files["tokenizer.json"])["model"]
    model = {**model, "ignore_merges": True, "vocab": {**model["vocab"], "zebra": 300}}
    source = with_spec(model=model, added_tokens=[])
    assert (
        Tokenizer({"tokenizer.json": source}).encode("zebra")
        == Reference.from_str(source.decode()).encode("zebra").ids
        == [300]
    )


def test_spaces_before_a_digit_are_one_piece():
    assert BOTH["gpt2"][0].encoding._pat_str != DIGITS_GPT2
    assert [BOTH["digits"][0].decode([i]) for i in BOTH["digits"][0].encode("  1")][-1] == "1"


@pytest.mark.parametrize(
    "source, detail",
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b"{}", "model"),
        (with_spec(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (with_spec(pre_tokenizer=None), r"\[\]"),
        (with_spec(normalizer={"type": "NFKC"}), "NFKC"),
        (
            with_spec(
                pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
            ),
            "space",
        ),
        (
            with_spec(
                model={**json.loads(TRAINED.files["tokenizer.json"])["model"], "type": "Unigram"}
            ),
            "Unigram",
        ),
        (
            with_spec(
                model={**json.loads(TRAINED.files["tokenizer.json"])["model"], "merges": ["q z"]}
            ),
            "'qz'",
        ),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(source, detail):
    with pytest.raises(UserError, match=f"here.json.*{detail}"):
        Tokenizer({"tokenizer.json": source}, "here.json")


def test_a_text_without_further_merges_gives_a_smaller_vocabulary():
    """ " ab" holds two merges beside the bytes: a + b, then space + ab."""
    assert train_tokenizer([" ab ab"], 400, ["<s>"]).vocab_size == 256 + 2 + 1
    assert train_tokenizer([""], 400, ["<s>"]).vocab_size == 256 + 1


# ---- real files: Mistral's (as mistral-common has them, and converted by transformers), SmolLM2's

SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKEN = {"Nemo": "tekken_240718.json", "Pixtral": "tekken_240911.json"}
CONVERTED = {"v1 json": "always", "v3 json": "first"}  # as in Llama 2 and in Mistral v0.3
REAL = pytest.mark.parametrize("kind", [*SENTENCEPIECE, *TEKKEN, *CONVERTED, "SmolLM2"])


@cache
def real(kind):
    """Returns (our tokenizer, the reference's encode, its decode)."""
    if kind in SENTENCEPIECE:
        source = (MISTRAL / SENTENCEPIECE[kind]).read_bytes()
        reference = SentencePieceProcessor(model_proto=source)
        return Tokenizer({"tokenizer.model": source}), reference.encode, reference.decode
    if kind in TEKKEN:
        reference = Tekkenizer.from_file(str(MISTRAL / TEKKEN[kind]))
        return (
            Tokenizer({"tekken.json": (MISTRAL / TEKKEN[kind]).read_bytes()}),
            partial(reference.encode, bos=False, eos=False),
            partial(reference.decode, special_token_policy=SpecialTokenPolicy.IGNORE),
        )
    if kind in CONVERTED:
        reference = converted((MISTRAL / SENTENCEPIECE[kind.split()[0]]).read_bytes())
        if CONVERTED[kind] == "first":
            reference.normalizer, reference.pre_tokenizer = (
                None,
                pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            )
        reference.add_special_tokens(
            [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
        )
        source = reference.to_str()
    else:
        source = (weights_of(smollm2, "gguf") / "tokenizer.json").read_text()
    # Without added tokens, the reference finds no special tokens in a text.
    reference = Reference.from_str(json.dumps(json.loads(source) | {"added_tokens": []}))
    return (
        Tokenizer({"tokenizer.json": source.encode()}),
        partial(ids_of, reference),
        partial(reference.decode, skip_special_tokens=False),
    )


SCRAPS = [
    "The",
    " quick",
    "ABCdef",
    "'re",
    "'LL",
    "!!!",
    "{};",
    "https://a.b/c?d=e",
    "def f(x):\n    return x",
    "x" * 60,
    "<s>",
    "[INST]",
    "▁",
    "▁a",
    " ",
    "  ",
    "    ",
    "\n",
    "\t",
    "\n\n",
    "\r\n",
    "\r",
    "\v\f",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\ufeff",
    " 1234567",
    "3.14",
    "½²",
    "٣",
    "é",
    "e\u0301",
    "a\u0301\u0323\u0302",
    " naïve",
    "日本の卵",
    "漢",
    "안녕",
    "\u1112\u1161\u11ab",
    "Привет",
    "Ω",
    "ﬁ",
    "ǅ",
    "हिन्दी",
    "ไทย",
    "السلام عليكم",
    "שָׁלוֹם",
    "\u202eabc\u202c",
    "🥚",
    "👩\u200d🍳",
    "👩🏽\u200d❤\ufe0f\u200d👨",
    "🇫🇷",
    "\U000e0061",
    "\x00",
    "\x1b[0m",
    "\x7f",
    "\x85",
    "\ud7ff",
    "\ue000",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
]


def corpus():
    """Yields texts: scraps of many scripts in any order, white space and digits of every length,
    each character of Unicode's first blocks, code."""
    draw = random.Random(0)
    yield ""
    yield from ("".join(draw.choices(SCRAPS, k=draw.randint(1, 12))) for _ in range(600))
    for unit in [
        " ",
        "\t",
        "\n",
        "\r\n",
        " \n",
        "\u00a0",
        "7",
        "a",
        "A",
        "=",
        "é",
        "日",
        "🥚",
        "▁",
    ]:
        for length in [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]:
            run = unit * length
            yield from (run, f"a{run}", f"{run}b", f"a{run}1", f" {run}\n")
    yield from ("".join(map(chr, range(start, start + 16))) for start in range(0, 0x3100, 16))
    yield from (
        path.read_text()
        for folder in ("nanovlm", "tests")
        for path in sorted((ROOT / folder).glob("*.py"))[:6]
    )


def missing_bytes(ours):
    """Bytes without a token: SmolLM2 lacks a dozen."""
    known = set(ours.bytes_of.values())
    return bytes(b for b in range(256) if bytes([b]) not in known)


@REAL
def test_a_real_file_gives_the_ids_and_the_text_of_its_reference(kind):
    ours, encode, decode = real(kind)
    for text in corpus():
        ids = encode(text)
        assert ours.encode(text) == ids, text[:200]
        assert ours.decode(ids) == decode(ids), text[:200]
        if ours.prefix_space:
            text = text.replace("▁", " ")
        if ours.prefix_space == "first":
            text = text.removeprefix(
                " "
            )  # No further space is put before it, and decode removes it.
        assert ours.decode(ids) == text.encode().translate(None, missing_bytes(ours)).decode()


@REAL
@settings(max_examples=100)
@given(text=ANY_TEXT)
# SmolLM2 has no id for the byte F2: without it, the bytes beside it merge.
@example(text="\x82\U000b9000")
@example(text="\x82\U000b9000\U000b9000, as\U000b9000if")
def test_a_real_file_gives_the_ids_of_its_reference_for_any_text(kind, text):
    ours, encode, _ = real(kind)
    assert ours.encode(text) == encode(text)


@REAL
def test_the_text_of_each_token_is_encoded_as_the_reference_does(kind):
    """sentencepiece finds user-defined pieces in a text; here they stay text."""
    ours, encode, _ = real(kind)
    special = set(ours.special.values())
    differ = []
    for i, token in ours.bytes_of.items():
        text = token.decode(errors="replace").replace(" ", "▁" if ours.prefix_space else " ")
        ids = ours.encode(text)
        assert not special.intersection(ids)
        if ids != encode(text):
            differ.append(i)
    # pieces of type user-defined: [REFERENCE_DOC_0] …
    user_defined = {"v3": 20, "v7": 22}
    assert special.issuperset(differ) and len(differ) <= user_defined.get(kind, 0)


@REAL
def test_a_stream_of_a_real_file_gives_the_text_of_its_reference(kind):
    ours, encode, decode = real(kind)
    for text in SCRAPS:
        stream, ids = ours.stream(), encode(f"a {text} b{text}")
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["v1", "v7", "Pixtral", "v3 json", "SmolLM2"])
@pytest.mark.parametrize("unit", ["a", " "])
def test_a_megabyte_of_one_character_takes_linear_time(kind, unit):
    ours, encode, _ = real(kind)
    if kind in TEKKEN and unit == " ":  # tiktoken's matcher, and mistral-common with it, fails
        encode = partial(
            ids_of, converted_tekken((MISTRAL / TEKKEN[kind]).read_bytes()), shift=1000
        )
    text = unit * 900_000  # tiktoken refuses 1,000,000 spaces in a row
    start = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - start < 10  # s; about 0.2 in linear time, hours in quadratic time
    assert ids == encode(text)


@REAL
def test_a_lone_surrogate_becomes_a_replacement_character_as_in_tiktoken(kind):
    ours = real(kind)[0]
    for rest in ("", "\U000b9000"):  # whose first byte has no id in SmolLM2
        assert ours.encode("egg\udc00" + rest) == ours.encode("egg\ufffd" + rest)


def test_a_folders_file_is_found_and_saved_unchanged(tmp_path):
    source = (MISTRAL / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "tokenizer.model").write_bytes(source)
    Tokenizer.load(tmp_path / "in").save(tmp_path / "out")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [
        ("tokenizer.model", source)
    ]


@pytest.mark.parametrize(
    "name, damage",
    [
        ("tokenizer.model", lambda b: b[: len(b) // 2]),
        ("tokenizer.model", lambda b: b""),
        ("tekken.json", lambda b: b[:1000]),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, damage):
    real = {"tokenizer.model": "tokenizer.model.v1", "tekken.json": "tekken_240718.json"}[name]
    (tmp_path / name).write_bytes(damage((MISTRAL / real).read_bytes()))
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def with_added(source, *tokens):
    """Returns the reference of a tokenizer.json with added tokens, and the source of the two."""
    reference = Reference.from_str(source.decode())
    reference.add_tokens(list(tokens))
    return reference, reference.to_str().encode()


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_a_token_that_is_added_as_a_word_is_found_in_texts(scheme):
    """Of tokens that begin alike, tokenizers takes the longest. What follows one is not the start
    of a text: SentencePiece's space is there if the scheme says always."""
    source = TRAINED.files["tokenizer.json"]
    if scheme:
        spec = converted((MISTRAL / "tokenizer.model.v1").read_bytes())
        spec.normalizer = None
        spec.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        source = spec.to_str().encode()
    reference, source = with_added(source, "[SEG]", "[SEG]x", "<loc>")
    ours = Tokenizer({"tokenizer.json": source})
    for text in (
        "egg [SEG] b",
        "[SEG]a[SEG][SEG]xx y",
        " [SEG]",
        "<loc>",
        "",
        "milk[SEG]\n <loc>a",
    ):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode("a [SEG]")) == "a [SEG]"
    assert ours.encode("[SEG]") == [reference.token_to_id("[SEG]")]


def test_a_token_of_chats_is_never_found_in_a_text_even_if_it_was_added_as_a_word():
    _, source = with_added(TRAINED.files["tokenizer.json"], "<|im_end|>")
    ours = Tokenizer({"tokenizer.json": source})
    assert "<|im_end|>" in ours.special and len(ours.encode("<|im_end|>")) > 1


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_in_what_is_beside_it_is_refused(flag):
    _, source = with_added(TRAINED.files["tokenizer.json"], AddedToken("[SEG]", **{flag: True}))
    with pytest.raises(UserError, match=rf"its added token '\[SEG\]' is \['{flag}'\]"):
        Tokenizer({"tokenizer.json": source})


def test_an_added_word_that_a_normalizer_changes_is_refused():
    source = converted((MISTRAL / "tokenizer.model.v1").read_bytes()).to_str().encode()
    Tokenizer({"tokenizer.json": with_added(source, AddedToken("[S]", normalized=False))[1]})
    with pytest.raises(UserError, match=r"'\[S\]' is \['normalized'\]"):
        Tokenizer({"tokenizer.json": with_added(source, "[S]")[1]})


@pytest.mark.parametrize("kind", ["llama", "mistral", "llava"])
@pytest.mark.parametrize("fields", [{}, {"legacy": True}, {"legacy": False}, {"legacy": None}])
def test_spaces_of_a_tokenizer_model_are_those_of_transformers(kind, fields, tmp_path):
    """transformers 5 puts no space after a special token if `legacy` is false; for a Llama also if
    it is not given. If it is true, a Llama's text that starts with a space gets no other one."""
    source = (MISTRAL / "mistral_instruct_tokenizer_240216.model.v2").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(source)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    config = {"tokenizer_class": "LlamaTokenizer", **fields}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "USER")]
    ids = chat_template.render_conversation(turns, ours, "vicuna")[0]
    end = len(ids) - ids[::-1].index(2) - 1
    theirs = reference.encode("</s>USER: USER ASSISTANT:", add_special_tokens=False)
    assert ids[end:] == theirs
    for text in ("USER", " USER", " ", ""):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False)
    (tmp_path / "out").mkdir()
    ours.save(tmp_path / "out")  # a checkpoint has no config.json
    assert Tokenizer.load(tmp_path / "out").prefix_space == ours.prefix_space
