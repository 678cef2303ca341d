"""Every tokenizer file becomes a tiktoken encoding.

BPE splits a text into pieces by a pattern and a piece into bytes. Then it merges the two neighbors
whose union has the lowest rank, again and again. tiktoken does the merging. It needs the bytes and
the rank of each token; the rank need not be the id, which comes from a table beside it.
One reader per format finds these parts in a file. The Tokenizer at the end knows no formats.

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
from itertools import chain
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
# SentencePiece takes a text as one piece. If no token continues past the end of a word, splitting
# there changes nothing and is faster.
WHOLE_TEXT, WORDS, EACH_SPACE = r"(?s).+", r" *[^ ]+| +", r" ?[^ ]+| "
PATTERN_SECONDS = 60  # time limit of splitting one text, for patterns that backtrack
MAX_PATTERN_CHARS = 900_000  # tiktoken's pattern matcher fails at 1,000,000 spaces in a row
BYTES = [bytes([b]) for b in range(256)]
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
# types of SentencePiece's pieces; the others (unknown, control, user-defined) are special tokens
# here
NORMAL, UNUSED, BYTE_PIECE = 1, 5, 6


def bytes_to_unicode():
    """Returns GPT-2's character for each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_UNICODE = bytes_to_unicode()
UNICODE_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_UNICODE.items()}


class Vocabulary(NamedTuple):
    """What a reader finds in a tokenizer file.

    A token without an id is encoded as the ids of its bytes. A byte without an id is left out, as
    Hugging Face does.
    """

    ranks: dict  # bytes of a token -> rank
    ids: dict  # bytes of a token -> id
    special: dict  # name -> id
    pattern: str  # of a piece
    # SentencePiece's space in front of a text: "always"; "missing": unless the text starts with
    # one; "first": as "missing" for a single text, while in a conversation the template decides
    # (chat_template.prepend_space); "never"; None for byte-level tokens
    prefix_space: str | None = None
    # a byte -> id, for tokens without an id; the character of that byte may have another id
    byte_ids: dict = {}


def merge_parts(token, ranks):
    """Returns the two tokens whose merge makes `token`; more than two if no merge leads to it.

    These are its bytes, merged by rank until two are left.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        order = [
            ranks.get(left + right, 1 << 32) for left, right in zip(parts, parts[1:], strict=False)
        ]
        rank = min(order)
        if rank == 1 << 32:
            break
        i = order.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def add_merge_ranks(ranks, tokens, rank_of):
    """Add to `ranks` the tokens that merges can make; rank_of(left, right): a merge's rank or None.

    The merges inside a token's bytes do not depend on the text around them, because a merge across
    its edge would prevent the token. So the last merge always joins the same two tokens, those of
    merge_parts, and one rank per token is as good as one per merge. A token that no merge leads to
    must have no rank: tiktoken encodes a piece that is a token at once.
    """
    base = len(ranks)
    for token in sorted(tokens, key=len):
        parts = merge_parts(token, ranks)
        if len(parts) == 2 and (rank := rank_of(*parts)) is not None:
            ranks[token] = base + rank


def read_tekken(files, where):
    """Returns the Vocabulary of a tekken.json."""
    spec = json.loads(files["tekken.json"])
    config, named = spec["config"], spec.get("special_tokens")
    shift, size = config["default_num_special_tokens"], config["default_vocab_size"]
    if named is None and int(config["version"].removeprefix("v").split("m")[0]) > 7:
        raise UserError(
            f"{where}: version {config['version']} lists no special_tokens: "
            "only the first seven versions have them in common"
        )
    names = (
        dict(enumerate(TEKKEN_SPECIAL_TOKENS))
        if named is None
        else {token["rank"]: token["token_str"] for token in named}
    )
    special = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(shift)}
    ranks = {
        base64.b64decode(token["token_bytes"]): token["rank"]
        for token in spec["vocab"]
        if token["rank"] < size - shift
    }
    if (
        sorted(ranks.values()) != list(range(size - shift))
        or len(special) < shift
        or max(names) >= shift
        or not ranks.keys() >= set(BYTES)
    ):
        raise UserError(
            f"{where}: {len(ranks):,} tokens and {len(names):,} named ones do not make its "
            f"{size:,} with {shift:,} special ones"
        )
    return Vocabulary(
        ranks, {token: shift + rank for token, rank in ranks.items()}, special, config["pattern"]
    )


def protobuf_fields(message):
    """Yields (number, value) of each field of a protobuf message; a value is an int or bytes.

    protobuf.dev/programming-guides/encoding
    """
    position = 0

    def varint():
        nonlocal position
        value, shift, more = 0, 0, True
        while more:
            value, more = value | (message[position] & 127) << shift, message[position] > 127
            position, shift = position + 1, shift + 7
            if shift > 70:
                raise ValueError("a number of more than ten bytes")
        return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
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
        dict(protobuf_fields(b"".join(value for number, value in model if number == n)))
        for n in (2, 3, 5)
    )
    for name, value, known in (
        ("model_type (1 Unigram, 2 BPE)", trainer.get(3, 1), 2),
        ("treat_whitespace_as_suffix", trainer.get(24, 0), 0),
        (
            "normalizer",
            normalizer.get(1, b"unnamed") if normalizer.get(2) else b"identity",
            b"identity",
        ),
        ("remove_extra_whitespaces", normalizer.get(4, 1), 0),
        ("escape_whitespaces", normalizer.get(5, 1), 1),
        (
            "denormalizer",
            denormalizer.get(1, b"unnamed") if denormalizer.get(2) else b"identity",
            b"identity",
        ),
    ):
        if value != known:
            raise UserError(f"{where}: {name} is {value!r}, only {known!r} is known here")
    pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
    names, kinds = [piece[1].decode() for piece in pieces], [piece.get(3, 1) for piece in pieces]
    if UNUSED in kinds:
        raise UserError(
            f"{where}: piece {names[kinds.index(UNUSED)]!r} is marked as unused, "
            "which is not known here"
        )
    special = {name: i for i, name in enumerate(names) if kinds[i] not in (NORMAL, BYTE_PIECE)}
    for name, i in json.loads(files.get("added_tokens.json", "{}")).items():
        if i < len(names) and names[i] != name:
            raise UserError(
                f"{where}: added_tokens.json has {name!r} at {i}, where {names[i]!r} is"
            )
        special[name] = i
    scores = {
        names[i]: struct.unpack("<f", piece.get(2, bytes(4)))[0]
        for i, piece in enumerate(pieces)
        if kinds[i] == NORMAL and len(names[i]) > 1
    }
    times = Counter(scores.values())
    for name, score in scores.items():
        if times[score] > 1 and name.strip("▁"):
            raise UserError(
                f"{where}: {name!r} has the score of another piece, {score}: "
                "which of them is joined first is not known here"
            )
    # Of merges with equal scores the leftmost comes first. The runs of spaces share a score in
    # Mistral's files. For them this is as if longer runs came first: the leftmost run grows by one
    # space at a time, and joins the run before it as soon as both make a piece.
    order = sorted(scores, key=lambda name: (-scores[name], -len(name)))
    rank_of = {name.replace("▁", " ").encode(): rank for rank, name in enumerate(order)}
    normal, byte_pieces = (
        {name: i for i, name in enumerate(names) if kinds[i] == kind}
        for kind in (NORMAL, BYTE_PIECE)
    )
    prefix_space = "always" if normalizer.get(3, 1) else "never"
    return character_vocabulary(
        normal,
        byte_pieces,
        lambda left, right: rank_of.get(left + right),
        special,
        WORDS,
        prefix_space,
        where,
    )


def character_vocabulary(pieces, byte_pieces, rank_of, special, pattern, prefix_space, where):
    """Returns a BPE of characters as a Vocabulary, which is of bytes.

    The bytes of a character are merged before all else, by way of prefixes of UTF-8 without an id.
    pieces: {piece with ▁ for a space: id}; byte_pieces: {"<0x0A>": id}, for the bytes of a
    character that is no piece; rank_of: the rank of a merge.
    """
    ids = {piece.replace("▁", " ").encode(): i for piece, i in pieces.items()}
    byte_ids = {BYTES[int(name[3:5], 16)]: i for name, i in byte_pieces.items()}
    if len(byte_ids) < 256 or len(ids) < len(pieces):
        raise UserError(
            f"{where}: {len(byte_ids)} of 256 bytes have a piece and {len(pieces) - len(ids)} "
            "pieces differ in '▁' for ' ' alone"
        )
    characters = [token for token in ids if 1 < len(token) <= 4 and len(token.decode()) == 1]
    prefixes = sorted({token[:n] for token in characters for n in range(2, len(token))}, key=len)
    ranks = {token: n for n, token in enumerate([*BYTES, *prefixes, *characters])}
    add_merge_ranks(ranks, [token for token in ids if token not in ranks], rank_of)
    has_phrases = pattern == WORDS and any(b" " in token.lstrip(b" ") for token in ranks)
    pattern = WHOLE_TEXT if has_phrases else pattern
    return Vocabulary(ranks, ids, special, pattern, prefix_space, byte_ids)


def read_huggingface(files, where):
    """Returns the Vocabulary of a tokenizer.json."""
    spec = json.loads(files["tokenizer.json"])
    model = spec["model"]
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    unknown = [
        f"{key} {model[key]}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if model.get("type", "BPE") != "BPE" or unknown:  # GPT-2's file is from before types
        raise UserError(
            f"{where}: model {', '.join([model['type'], *unknown])}: only a plain BPE is known here"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    missing = [
        left + right
        for left, right in merges
        if not {left, right, left + right} <= model["vocab"].keys()
    ]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} merges are of or to tokens that are not in its vocabulary, "
            f"such as {missing[0]!r}"
        )
    pattern, prefix_space = pre_tokenizer_pattern(spec, where)
    if prefix_space is None:
        return byte_level_vocabulary(model, merges, special, pattern, where)
    if not model.get("byte_fallback"):
        raise UserError(
            f"{where}: letters that are no piece do not become bytes, which is not known here"
        )
    pieces = {piece: i for piece, i in model["vocab"].items() if piece not in special}
    byte_pieces = {
        piece: pieces.pop(piece)
        for piece in list(pieces)
        if regex.fullmatch("<0x[0-9A-F]{2}>", piece)
    }
    pairs = {
        tuple(part.replace("▁", " ").encode() for part in merge): n
        for n, merge in enumerate(merges)
    }
    return character_vocabulary(
        pieces, byte_pieces, lambda *pair: pairs.get(pair), special, pattern, prefix_space, where
    )


def byte_level_vocabulary(model, merges, special, pattern, where):
    ids = {
        bytes(UNICODE_TO_BYTE[letter] for letter in token): i
        for token, i in model["vocab"].items()
        if all(letter in UNICODE_TO_BYTE for letter in token)
    }
    pairs = {
        tuple(bytes(UNICODE_TO_BYTE[letter] for letter in part) for part in merge): n
        for n, merge in enumerate(merges)
    }
    ranks = {b: n for n, b in enumerate(BYTES)}
    if (model.get("unk_token") or model.get("byte_fallback")) and not ids.keys() >= ranks.keys():
        absent = len(ranks.keys() - ids.keys())
        raise UserError(
            f"{where}: {absent} bytes have no token but something that stands for them, "
            "which is not known here"
        )
    add_merge_ranks(ranks, {left + right for left, right in pairs}, lambda *pair: pairs.get(pair))
    # With ignore_merges a piece that is a token is encoded at once even if no merge leads to it,
    # but a part of a piece is not.
    if model.get("ignore_merges"):
        for token in ids.keys() - ranks.keys() - {name.encode() for name in special}:
            if len(merge_parts(token, ranks)) == 2:
                raise UserError(
                    f"{where}: {token!r} is one token as a piece and two inside one, "
                    "which is not known here"
                )
            ranks[token] = 256 + len(merges) + ids[token]
    return Vocabulary(ranks, ids, special, pattern)


def pre_tokenizer_pattern(spec, where):
    """Returns the pattern by which a tokenizer.json splits texts, and Vocabulary.prefix_space."""
    steps = []
    for key, several in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = spec.get(key) or {"type": "Sequence", several: []}
        steps += step[several] if step["type"] == "Sequence" else [step]
    match steps:
        case [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]:
            return WORDS, "always"
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            return WORDS, "never"
        case [{"type": "Metaspace", "replacement": "▁"} as step]:
            scheme = step.get(
                "prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"
            )
            return EACH_SPACE if step.get("split", True) else WORDS, {
                "always": "missing",
                "first": "first",
                "never": "never",
            }[scheme]
        case [*_, {"type": "ByteLevel", "add_prefix_space": True}]:
            raise UserError(f"{where} puts a space before every text, which is not known here")
        case [{"type": "ByteLevel"} as last] if last.get("use_regex", True):
            return GPT2, None
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"} as last] if (
            last.get("use_regex", True)
        ):
            return DIGITS_GPT2, None
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            return pattern, None
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            # The text between two matches is a piece too.
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+", None
    types = ", ".join(step["type"] for step in steps) or "none"
    raise UserError(f"{where} changes or cuts texts by {types}, in a way that is not known here")


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
            vocabulary = TOKENIZER_READERS[name](files, where)
            ranks, ids, self.special, pattern, self.prefix_space, byte_ids = vocabulary
            self.encoding = tiktoken.Encoding(
                self.fingerprint, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
            self.bytes_of = {i: token for token, i in [*byte_ids.items(), *ids.items()]} | {
                i: name.encode() for name, i in self.special.items()
            }
            self.vocab_size = max(self.bytes_of) + 1
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RecursionError,
            struct.error,
        ) as error:
            raise UserError(
                f"{where} is no tokenizer that can be read here: {type(error).__name__} {error}"
            ) from None
        blank = [name for name in self.special if not name.replace("▁", " ").strip()]
        if blank:
            raise UserError(
                f"{where}: the white space {blank[0]!r} is a special token, "
                "and would have to be found in texts"
            )
        byte_ids = byte_ids | {b: ids[b] for b in BYTES if b in ids}
        self.dropped = b"".join(b for b in BYTES if b not in byte_ids)
        in_bytes = {
            token: [byte_ids[BYTES[b]] for b in token if BYTES[b] in byte_ids]
            for token in ranks
            if token not in ids
        }
        self.ids_of_rank = {
            rank: [ids[token]] if token in ids else in_bytes[token] for token, rank in ranks.items()
        }

    @classmethod
    def load(cls, folder):
        """Returns the tokenizer of a folder, from the first of TOKENIZER_READERS that lies there.

        Their order: the file that the model's authors test with, then the one with the most special
        tokens.
        """
        folder = Path(folder)
        name = next((name for name in TOKENIZER_READERS if (folder / name).is_file()), None)
        if name is None:
            raise UserError(f"{folder} holds none of {', '.join(TOKENIZER_READERS)}")
        names = [name]
        if name == "tokenizer.model" and (folder / "added_tokens.json").is_file():
            names.append("added_tokens.json")
        return cls({name: (folder / name).read_bytes() for name in names}, folder / name)

    def save(self, folder):
        for name, source in self.files.items():
            (Path(folder) / name).write_bytes(source)

    def encode(self, text, space=None):
        """Returns the ids of a text.

        space: whether SentencePiece's space is put in front; None: as the tokenizer's file says.
        Raises UserError if the text has half a character (a lone surrogate), or if the pattern does
        not end.
        """
        original = text
        if self.prefix_space and text:
            text = text.replace("▁", " ")
            if space is None:
                space = {
                    "always": True,
                    "missing": text[0] != " ",
                    "first": text[0] != " ",
                    "never": False,
                }[self.prefix_space]
            text = " " + text if space else text
        try:
            source = text.encode()
        except UnicodeEncodeError as error:
            position = error.start - len(text) + len(original)
            raise UserError(
                f"a text has half a character, U+{ord(original[position]):X}, "
                f"at letter {position + 1}: {original[:40]!a}"
            ) from None
        is_plain = source.translate(None, self.dropped) == source
        try:
            ranks = self.ranks(text, at_once=len(text) < MAX_PATTERN_CHARS and is_plain)
        except BaseException as error:
            # tiktoken's matcher panics after a million steps
            if type(error).__name__ not in ("PanicException", "TimeoutError"):
                raise
            raise UserError(
                "the tokenizer's own pattern does not come to an end with this text: "
                f"{original[:40]!a}"
            ) from None
        return list(chain.from_iterable(map(self.ids_of_rank.__getitem__, ranks)))

    def ranks(self, text, at_once):
        """Returns the ranks of a text's tokens.

        at_once: by tiktoken. Otherwise the pieces are found here, as in tiktoken's own tests.
        """
        if at_once:
            return self.encoding.encode_ordinary(text)
        pieces = (
            match.group().encode().translate(None, self.dropped)
            for match in regex.finditer(self.encoding._pat_str, text, timeout=PATTERN_SECONDS)
        )
        return [
            rank for piece in pieces if piece for rank in self.encoding._encode_single_piece(piece)
        ]

    def decode(self, ids):
        stream = self.stream()
        return stream.push(*ids) + stream.flush()

    def stream(self):
        return TextStream(self.bytes_of, self.prefix_space not in (None, "never"))


class TextStream:
    """A text that comes id by id.

    `push` returns the characters that are complete; the first bytes of a character wait for its
    last. prefix_space: the text starts with a space that `encode` added.
    """

    def __init__(self, bytes_of, prefix_space):
        self.bytes_of, self.prefix_space = bytes_of, prefix_space
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids):
        # A padded vocabulary has ids without bytes.
        new = b"".join(self.bytes_of.get(i, b"") for i in ids)
        if self.prefix_space and new:
            self.prefix_space, new = False, new.removeprefix(b" ")
        return self.decoder.decode(new)

    def flush(self):
        return self.decoder.decode(b"", final=True)


def tokenizer_spec(ranks, special):
    """Returns ranks and names of special tokens as a tokenizer.json, as in Hugging Face."""
    chars = {token: "".join(BYTE_TO_UNICODE[b] for b in token) for token in ranks}
    merged = [token for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = []
    for token in merged:
        merges.append(" ".join(chars[part] for part in merge_parts(token, ranks)))
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
            "vocab": {chars[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def train_tokenizer(texts, vocab_size, special):
    """Returns a Tokenizer that tiktoken's own trainer trains on texts.

    It has vocab_size tokens, or fewer if nothing is left to merge; special tokens follow.
    That trainer is written for teaching and visits each word at each merge. So it gets each
    distinct word of the texts, repeated by the logarithm of its count.
    """
    counts = Counter(word for text in texts for word in regex.findall(GPT2, text))
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
