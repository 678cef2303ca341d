"""Every tokenizer file becomes a tiktoken encoding.

BPE splits a text into pieces by a pattern, and a piece into bytes. Then it merges the two neighbors
whose union has the lowest rank, again and again. tiktoken does the merging. It needs the bytes and
the rank of each token. A rank need not be the id, which a second table gives.
Each format has a reader, which returns these tables as a Vocabulary. The Tokenizer at the end knows
no formats.

    tekken.json       Mistral since Nemo: ranks and pattern as tiktoken has them
    tokenizer.json    Hugging Face: byte-level BPE (GPT-2, Llama 3, SmolLM2, what `train_tokenizer`
                      makes) or a converted SentencePiece (Llama 2, LLaVA)
    tokenizer.model   SentencePiece BPE (Mistral to v0.3, Llama 2, Vicuna), with the
                      added_tokens.json that may lie beside it

Special tokens are never found in a text. A user who types "</s>" types four characters. Templates
(chat_template.py) ask for special tokens by name.
"""

import base64
import bisect
import codecs
import contextlib
import hashlib
import json
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import regex  # comes with tiktoken
import tiktoken
from tiktoken._educational import bpe_train

from .. import UserError

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 splits off each digit before it applies GPT-2's pattern to the text between them. So white
# space before a digit counts as the end of a text.
DIGITS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
WHOLE_TEXT = r"(?s).+"  # SentencePiece takes a text as one piece
BYTES = [bytes([b]) for b in range(256)]
# GPT-2 writes a byte as one character: itself if it is printable, else one from U+0100 on.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_UNICODE = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}
UNICODE_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_UNICODE.items()}
# Mistral's special tokens by id, for a tekken.json that lists none (versions 1 to 7).
TEKKEN_SPECIAL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]
# Types of SentencePiece's pieces. The others (unknown, control, user-defined) are special tokens.
NORMAL, UNUSED, BYTE_PIECE = 1, 5, 6


class Vocabulary(NamedTuple):
    """What a reader finds in a tokenizer file.

    A token without an id is encoded as the ids of its bytes. A byte without an id is left out, as
    Hugging Face does.
    """

    ranks: dict  # bytes of a token -> rank
    # id -> bytes of its token. If two ids have the same bytes, the text gets the later one: a
    # character of SentencePiece comes after the byte, which is for tokens without an id.
    bytes_of: dict
    special: dict  # name -> id
    pattern: str  # of a piece
    # SentencePiece's space before a text: "always"; "missing": unless the text starts with one;
    # "first": as "missing" for a single text, but in a conversation the template decides
    # (chat_template.prepend_space); "never"; None for byte-level tokens
    prefix_space: str | None = None


def check_settings(where, *settings):
    """Raises UserError unless each (name, value, supported value) has the supported value."""
    for name, value, supported in settings:
        if value != supported:
            raise UserError(f"{where}: {name} is {value!r}, only {supported!r} is known here")


def merge_parts(token, ranks):
    """Returns the two tokens whose merge makes `token`; more than two if no merge leads to it.

    These are its bytes, merged by rank until two are left.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [left + right for left, right in pairwise(parts)]
        best = min(unions, key=lambda union: ranks.get(union, 1 << 32))
        if best not in ranks:
            break
        i = unions.index(best)
        parts[i : i + 2] = [best]
    return parts


def add_merge_ranks(ranks, tokens, merges):
    """Add to `ranks` the tokens that merges can make. merges: {(left, right): rank}.

    The merges inside a token's bytes do not depend on the text around them, because a merge across
    its edge would prevent the token. So the last merge always joins the same two tokens, those of
    merge_parts, and one rank per token is as good as one per merge. A token that no merge leads to
    must have no rank: tiktoken encodes a piece that is a token at once.
    """
    base = len(ranks)
    for token in sorted(tokens, key=len):
        parts = tuple(merge_parts(token, ranks))
        if parts in merges:
            ranks[token] = base + merges[parts]


def read_tekken(files, where):
    """Returns the Vocabulary of a tekken.json."""
    spec = json.loads(files["tekken.json"])
    config, names = spec["config"], dict(enumerate(TEKKEN_SPECIAL_TOKENS))
    special_count, size = config["default_num_special_tokens"], config["default_vocab_size"]
    if spec.get("special_tokens") is not None:
        names = {token["rank"]: token["token_str"] for token in spec["special_tokens"]}
    names = {i: f"<SPECIAL_{i}>" for i in range(special_count)} | names
    special = {name: i for i, name in names.items()}
    bytes_of = {
        special_count + token["rank"]: base64.b64decode(token["token_bytes"])
        for token in spec["vocab"][: size - special_count]
    }
    ranks = {token: i - special_count for i, token in bytes_of.items()}
    ids = [*special.values(), *bytes_of]
    if ids != list(range(size)) or len(ranks) < len(bytes_of) or list(ranks)[:256] != BYTES:
        raise UserError(
            f"{where}: its {len(ranks):,} tokens and {len(special):,} special tokens are not the "
            f"256 bytes, longer tokens and {special_count:,} special tokens of a vocabulary of "
            f"{size:,}"
        )
    return Vocabulary(ranks, bytes_of, special, config["pattern"])


def protobuf_fields(message):
    """Yields (number, value) of each field of a protobuf message; a value is an int or bytes.

    protobuf.dev/programming-guides/encoding
    """
    position = 0

    def read_varint():
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):
            byte = message[position]
            value, position = value | (byte & 127) << shift, position + 1
            if byte < 128:
                return value
        raise ValueError("a number of more than ten bytes")

    while position < len(message):
        number, kind = divmod(read_varint(), 8)
        if kind == 0:
            yield number, read_varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else read_varint()
        if position + size > len(message):
            raise ValueError(f"a field of {size} bytes where {len(message) - position} are left")
        yield number, message[position : position + size]
        position += size


def read_sentencepiece(files, where):
    """Returns the Vocabulary of a tokenizer.model.

    sentencepiece_model.proto: 1 pieces (1 piece, 2 score, 3 type), 2 trainer_spec, 3
    normalizer_spec, 5 denormalizer_spec.
    """
    model = list(protobuf_fields(files["tokenizer.model"]))
    trainer, normalizer, denormalizer = (
        dict(protobuf_fields(dict(model).get(number, b""))) for number in (2, 3, 5)
    )
    pieces, special, scores = {}, {}, {}
    for i, message in enumerate(value for number, value in model if number == 1):
        piece = dict(protobuf_fields(message))
        name, kind = piece[1].decode(), piece.get(3, NORMAL)
        if kind == UNUSED:
            raise UserError(f"{where}: the piece {name!r} is unused, which is not known here")
        ids = pieces if kind in (NORMAL, BYTE_PIECE) else special
        ids[name] = i
        if kind == NORMAL and len(name) > 1:
            scores[name] = struct.unpack("<f", piece.get(2, bytes(4)))[0]
    times = Counter(scores.values())
    tied = [name for name, score in scores.items() if times[score] > 1 and name.strip("▁")]
    check_settings(
        where,
        ("model_type (1 Unigram, 2 BPE)", trainer.get(3, 1), 2),
        ("treat_whitespace_as_suffix", trainer.get(24, 0), 0),
        ("remove_extra_whitespaces", normalizer.get(4, 1), 0),
        ("escape_whitespaces", normalizer.get(5, 1), 1),
        ("the normalizer's precompiled_charsmap", normalizer.get(2, b"")[:40], b""),
        ("the denormalizer's precompiled_charsmap", denormalizer.get(2, b"")[:40], b""),
        ("the list of pieces with the score of another piece", tied[:3], []),
    )
    own = pieces | special
    for name, i in json.loads(files.get("added_tokens.json", "{}")).items():
        if i < len(own) and own.get(name) != i:
            raise UserError(
                f"{where}: added_tokens.json has {name!r} at {i}, where another piece is"
            )
        special[name] = i
    # Of merges with equal scores the leftmost comes first. The runs of spaces share a score in
    # Mistral's files. For them this is as if longer runs came first: the leftmost run grows by one
    # space at a time, and joins the run before it as soon as both make a piece.
    order = sorted(scores, key=lambda name: (-scores[name], -len(name)))
    merges = {}
    for rank, name in enumerate(order):
        for i in range(1, len(name)):
            merges[piece_bytes(name[:i]), piece_bytes(name[i:])] = rank
    prefix_space = "always" if normalizer.get(3, 1) else "never"
    return piece_vocabulary(pieces, merges, special, prefix_space, where)


def piece_bytes(piece):
    """Returns the bytes of a SentencePiece piece, in which ▁ stands for a space."""
    return piece.replace("▁", " ").encode()


def piece_vocabulary(pieces, merges, special, prefix_space, where):
    """Returns a BPE of characters as a Vocabulary, which is of bytes.

    The bytes of a character are merged before all else, by way of prefixes of UTF-8 without an id.
    pieces: {piece: id}; "<0x0A>" is a byte of a character that is no piece. merges: {(left, right):
    rank}, in bytes.
    """
    bytes_of = {}
    for piece, i in pieces.items():
        if regex.fullmatch("<0x[0-9A-F]{2}>", piece):
            bytes_of[i] = BYTES[int(piece[3:5], 16)]
    byte_count = len(bytes_of)
    bytes_of |= {i: piece_bytes(piece) for piece, i in pieces.items() if i not in bytes_of}
    tokens = set(list(bytes_of.values())[byte_count:])
    if byte_count < 256 or byte_count + len(tokens) < len(pieces):
        raise UserError(
            f"{where}: {byte_count} of 256 bytes have a piece and "
            f"{len(pieces) - byte_count - len(tokens)} pieces differ in '▁' for ' ' alone"
        )
    ranks = {byte: n for n, byte in enumerate(BYTES)}
    for token in tokens:
        if len(token.decode()) == 1:
            for length in range(2, len(token) + 1):
                ranks.setdefault(token[:length], len(ranks))
    add_merge_ranks(ranks, tokens, merges)
    return Vocabulary(ranks, bytes_of, special, WHOLE_TEXT, prefix_space)


def read_huggingface(files, where):
    """Returns the Vocabulary of a tokenizer.json."""
    spec = json.loads(files["tokenizer.json"])
    model = spec["model"]
    vocab = model["vocab"]
    check_settings(
        where,
        ("the model's type", model.get("type", "BPE"), "BPE"),  # GPT-2's file has none
        ("dropout", model.get("dropout") or None, None),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
        ("end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
    )
    pattern, prefix_space = pre_tokenizer_pattern(spec, where)
    token_bytes = byte_level_bytes if prefix_space is None else piece_bytes
    merges = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(
                f"{where}: {left!r} and {right!r} are merged to {left + right!r}, but its "
                "vocabulary does not hold all three"
            )
        merges[token_bytes(left), token_bytes(right)] = rank
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    pieces = {piece: i for piece, i in vocab.items() if piece not in special}
    if prefix_space is not None:
        check_settings(where, ("byte_fallback", model.get("byte_fallback", False), True))
        return piece_vocabulary(pieces, merges, special, prefix_space, where)
    return byte_level_vocabulary(model, pieces, merges, special, pattern, where)


def byte_level_bytes(piece):
    """Returns the bytes of a token of byte-level BPE, in which a character stands for a byte."""
    return bytes(UNICODE_TO_BYTE[letter] for letter in piece)


def byte_level_vocabulary(model, pieces, merges, special, pattern, where):
    bytes_of = {
        i: byte_level_bytes(piece)
        for piece, i in pieces.items()
        if UNICODE_TO_BYTE.keys() >= set(piece)
    }
    tokens = set(bytes_of.values())
    if not tokens.issuperset(BYTES):
        check_settings(
            where,
            ("unk_token of a vocabulary that lacks a byte", model.get("unk_token") or None, None),
            ("byte_fallback", model.get("byte_fallback") or False, False),
        )
    ranks = {byte: n for n, byte in enumerate(BYTES)}
    add_merge_ranks(ranks, tokens, merges)
    # With ignore_merges a piece that is a token is encoded at once even if no merge leads to it,
    # but a part of a piece is not.
    unmerged = {i: token for i, token in bytes_of.items() if token not in ranks}
    if model.get("ignore_merges"):
        for i, token in unmerged.items():
            if len(merge_parts(token, ranks)) == 2:
                raise UserError(
                    f"{where}: {token!r} is one token as a piece and two inside one, "
                    "which is not known here"
                )
            ranks[token] = 256 + len(merges) + i
    return Vocabulary(ranks, bytes_of, special, pattern)


def pre_tokenizer_pattern(spec, where):
    """Returns the pattern by which a tokenizer.json splits texts, and Vocabulary.prefix_space."""
    steps = []
    for key, several in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = spec.get(key) or {several: []}
        steps += step.get(several, [step])
    match steps:
        case [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]:
            return WHOLE_TEXT, "always"
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            return WHOLE_TEXT, "never"
        case [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return WHOLE_TEXT, {"always": "missing", "first": "first", "never": "never"}[scheme]
        case [*before, {"type": "ByteLevel", "add_prefix_space": False} as last]:
            match before, last.get("use_regex", True):
                case [], True:
                    return GPT2, None
                case [{"type": "Digits", "individual_digits": True}], True:
                    return DIGITS_GPT2, None
                case [{"type": "Split", "pattern": {"Regex": pattern}} as split], False:
                    if split["behavior"] == "Isolated":
                        # The text between two matches is a piece too.
                        return rf"{pattern}|(?:(?!{pattern})[\s\S])+", None
                    if (split["behavior"], split["invert"]) == ("Removed", True):
                        return pattern, None
    raise UserError(
        f"{where} changes or splits texts by {json.dumps(steps):.300}, which is not known here"
    )


TOKENIZER_READERS = {
    "tekken.json": read_tekken,
    "tokenizer.json": read_huggingface,
    "tokenizer.model": read_sentencepiece,
}


class Tokenizer:
    """A tokenizer: encode(text) -> ids, decode(ids) -> text, stream() -> TextStream.

    special: the ids of special tokens by name. bytes_of: the bytes of each id.
    files: {name: bytes}, first a file of TOKENIZER_READERS, then those that belong to it. They are
    kept, so that `save` writes them unchanged. where: their path, for messages.
    """

    def __init__(self, files, where=None):
        self.files = files
        self.fingerprint = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
        name = next(iter(files))
        where = where or name
        try:
            ranks, bytes_of, self.special, pattern, self.prefix_space = TOKENIZER_READERS[name](
                files, where
            )
            self.encoding = tiktoken.Encoding(
                self.fingerprint, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
            self.bytes_of = bytes_of | {i: name.encode() for name, i in self.special.items()}
            self.vocab_size = max(self.bytes_of) + 1
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            struct.error,
        ) as error:
            raise UserError(
                f"{where} is no tokenizer that can be read here: {type(error).__name__} {error}"
            ) from None
        # Special tokens are not found in texts.
        blank = [name for name in self.special if not name.replace("▁", " ").strip()]
        check_settings(where, ("the list of special tokens that are white space", blank[:3], []))
        ids = {token: i for i, token in bytes_of.items()}
        self.ids_of_rank = {}
        for token, rank in ranks.items():
            parts = [token] if token in ids else [BYTES[b] for b in token]
            self.ids_of_rank[rank] = [ids[part] for part in parts if part in ids]

    @classmethod
    def load(cls, folder):
        """Returns the tokenizer of a folder, from the first of TOKENIZER_READERS that lies there.

        Their order: the file that the model's authors test with, then the one with the most special
        tokens.
        """
        folder = Path(folder)
        names = [name for name in TOKENIZER_READERS if (folder / name).is_file()][:1]
        if not names:
            raise UserError(f"{folder} holds none of {', '.join(TOKENIZER_READERS)}")
        if names == ["tokenizer.model"] and (folder / "added_tokens.json").is_file():
            names.append("added_tokens.json")
        return cls({name: (folder / name).read_bytes() for name in names}, folder / names[0])

    def save(self, folder):
        for name, source in self.files.items():
            (Path(folder) / name).write_bytes(source)

    def encode(self, text, space=None):
        """Returns the ids of a text.

        space: whether SentencePiece's space is put before it; None: as the tokenizer's file says.
        Raises UserError if the text has a lone surrogate (half a character), or if the pattern
        takes too long.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"a text has half a character, U+{ord(text[error.start]):X}, "
                f"at letter {error.start + 1}: {text[:40]!a}"
            ) from None
        original = text
        if self.prefix_space and text:
            text = text.replace("▁", " ")
            if space is None:
                is_missing = self.prefix_space != "never" and text[0] != " "
                space = self.prefix_space == "always" or is_missing
            text = " " + text if space else text
        try:
            ranks = self.encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's, after a million steps
                raise
            raise UserError(
                "the tokenizer's own pattern does not come to an end with this text: "
                f"{original[:40]!a}"
            ) from None
        ids = []
        for rank in ranks:
            ids += self.ids_of_rank[rank]
        return ids

    def decode(self, ids):
        stream = self.stream()
        return stream.push(*ids) + stream.flush()

    def stream(self):
        return TextStream(self)


class TextStream:
    """A text that comes id by id.

    `push` returns the characters that are complete. The first bytes of a character wait for its
    last. The space that `encode` put before the text is removed.
    """

    def __init__(self, tokenizer):
        self.bytes_of = tokenizer.bytes_of
        self.has_prefix_space = tokenizer.prefix_space not in (None, "never")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids):
        # A padded vocabulary has ids without bytes.
        new = b"".join(self.bytes_of.get(i, b"") for i in ids)
        if self.has_prefix_space and new:
            self.has_prefix_space, new = False, new.removeprefix(b" ")
        return self.decoder.decode(new)

    def flush(self):
        return self.decoder.decode(b"", final=True)


def tokenizer_spec(ranks, special):
    """Returns ranks and names of special tokens as a tokenizer.json, as in Hugging Face."""
    pieces = {token: "".join(BYTE_TO_UNICODE[b] for b in token) for token in ranks}
    merges = []
    for token in ranks:
        if len(token) > 1:
            merges.append(" ".join(pieces[part] for part in merge_parts(token, ranks)))
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(ranks) + n, "content": name, **flags} for n, name in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {pieces[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def train_tokenizer(texts, vocab_size, special):
    """Returns a Tokenizer that tiktoken's own trainer trains on texts.

    It has vocab_size tokens, or fewer if nothing is left to merge; special tokens follow.
    That trainer is written for teaching and visits each word at each merge. So it gets each
    distinct word of the texts, repeated by the logarithm of its count.
    """
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(GPT2, text))
    sample = "".join(word * count.bit_length() for word, count in sorted(counts.items()))

    def ranks_of(size):
        with contextlib.suppress(ValueError):  # raised if no two neighbors are left to merge
            return bpe_train(sample, size, GPT2, visualise=None)

    ranks = ranks_of(vocab_size)
    if ranks is None:
        merges = bisect.bisect(
            range(257, vocab_size), False, key=lambda size: ranks_of(size) is None
        )
        ranks = ranks_of(256 + merges)
    return Tokenizer({"tokenizer.json": json.dumps(tokenizer_spec(ranks, special)).encode()})
