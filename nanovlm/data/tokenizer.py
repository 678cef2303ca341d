"""Every tokenizer file as a tiktoken encoding.

A BPE cuts a text by a pattern into pieces, a piece into bytes, and joins the two neighbours whose union has the lowest rank, again and again.
tiktoken does the joining; it only wants to know each token's bytes and its rank, which need not be its id: the ids come from a table beside it.
One reader a format below finds these parts; the Tokenizer at the end knows nothing of formats.

    tekken.json       Mistral since Nemo: ranks and pattern as tiktoken has them
    tokenizer.json    Hugging Face: byte-level BPE (GPT-2, Llama 3, SmolLM2, what `learn` makes) or a converted SentencePiece (Llama 2, LLaVA)
    tokenizer.model   SentencePiece BPE (Mistral to v0.3, Llama 2, Vicuna), with the added_tokens.json that may lie beside it

Special tokens are never found in a text. A user who types "</s>" has typed four characters; templates (chat.py) ask for them by name.
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
# Every digit is cut out before GPT-2's pattern sees what lies between, so white space before a digit counts as the end of a text (SmolLM2).
DIGITS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# SentencePiece takes a text as one piece. Where no token goes on past the end of a word, cutting there changes nothing and is faster.
WHOLE_TEXT, WORDS, EACH_SPACE = r"(?s).+", r" *[^ ]+| +", r" ?[^ ]+| "
PATTERN_SECONDS = 60  # for the pieces of one text, which take none unless a stranger's pattern tries every way to cut them
MAX_PATTERN_CHARS = 900_000  # letters; tiktoken's pattern matcher gives up at 1,000,000 spaces in a row
BYTES = [bytes([b]) for b in range(256)]
# Mistral's own, for a tekken.json that lists none (versions 1 to 7); their ids are their places in it.
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
NORMAL, UNUSED, BYTE_PIECE = (
    1,
    5,
    6,
)  # kinds of SentencePiece's pieces; the others, unknown, control and user-defined, are special here


def bytes_to_unicode():
    """GPT-2's letter for each byte, so that a vocabulary can be printed: itself where that is visible, else one from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_UNICODE = bytes_to_unicode()
UNICODE_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_UNICODE.items()}


class Vocabulary(NamedTuple):
    """What a reader finds in a file. A token without an id is given as its bytes' ids; a byte without one is left out, as Hugging Face does."""

    ranks: dict  # bytes of a token -> rank
    ids: dict  # bytes of a token -> id
    special: dict  # name -> id
    pattern: str  # what a piece is
    # SentencePiece's space in front of a text: "always"; "missing": unless it is there; "first": so for a text alone, in a conversation where
    # its template has one (chat.space_before); "never"; None: bytes need none
    prefix_space: str | None = None
    byte_ids: dict = {}  # a byte -> id, for the bytes of what has no id; beside the id of the character that a byte may be


def merge_parts(token, ranks):
    """The two tokens whose merge makes `token`: its bytes, joined by rank until two are left; more than two if no merge leads there."""
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
    """Add to `ranks` the tokens that a text can come to. rank_of(left, right): the rank of a merge, None if there is none.

    What happens inside a token's bytes before they are one does not depend on the text around them: a merge across their edge would spoil it for
    good. So the last merge is always of the same two tokens, those of `parts_of`, and a rank for each token says as much as one for each merge.
    A token that no merge leads to must not have a rank, as tiktoken takes a piece that is a token whole.
    """
    base = len(ranks)
    for token in sorted(tokens, key=len):
        parts = merge_parts(token, ranks)
        if len(parts) == 2 and (rank := rank_of(*parts)) is not None:
            ranks[token] = base + rank


def read_tekken(files, where):
    spec = json.loads(files["tekken.json"])
    config, named = spec["config"], spec.get("special_tokens")
    shift, size = config["default_num_special_tokens"], config["default_vocab_size"]
    if named is None and int(config["version"].removeprefix("v").split("m")[0]) > 7:
        raise UserError(
            f"{where}: version {config['version']} lists no special_tokens: only the first seven versions have them in common"
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
            f"{where}: {len(ranks):,} tokens and {len(names):,} named ones do not make its {size:,} with {shift:,} special ones"
        )
    return Vocabulary(
        ranks, {token: shift + rank for token, rank in ranks.items()}, special, config["pattern"]
    )


def protobuf_fields(message):
    """(number, value) of each field of a protobuf message, a value an int or bytes. protobuf.dev/programming-guides/encoding"""
    at = 0

    def varint():
        nonlocal at
        value, shift, more = 0, 0, True
        while more:
            value, more = value | (message[at] & 127) << shift, message[at] > 127
            at, shift = at + 1, shift + 7
            if shift > 70:
                raise ValueError("a number of more than ten bytes")
        return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes where {len(message) - at} are left")
        yield number, message[at : at + size]
        at += size


def read_sentencepiece(files, where):
    """sentencepiece_model.proto: 1 pieces (1 piece, 2 score, 3 type), 2 trainer_spec, 3 normalizer_spec, 5 denormalizer_spec."""
    model = list(protobuf_fields(files["tokenizer.model"]))
    trainer, normalizer, denormalizer = (
        dict(protobuf_fields(b"".join(value for number, value in model if number == n))) for n in (2, 3, 5)
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
            f"{where}: piece {names[kinds.index(UNUSED)]!r} is marked as unused, which is not known here"
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
                f"{where}: {name!r} has the score of another piece, {score}: which of them is joined first is not known here"
            )
    # Of merges with one score the leftmost comes first. For the runs of spaces, which share one in Mistral's files, this is as if longer ones came
    # first: the leftmost run grows by one space at a time, and joins the run before it as soon as they make a piece.
    order = sorted(scores, key=lambda name: (-scores[name], -len(name)))
    rank_of = {name.replace("▁", " ").encode(): rank for rank, name in enumerate(order)}
    normal, byte_pieces = (
        {name: i for i, name in enumerate(names) if kinds[i] == kind}
        for kind in (NORMAL, BYTE_PIECE)
    )
    front = "always" if normalizer.get(3, 1) else "never"
    return character_vocabulary(
        normal,
        byte_pieces,
        lambda left, right: rank_of.get(left + right),
        special,
        WORDS,
        front,
        where,
    )


def character_vocabulary(pieces, byte_pieces, rank_of, special, pattern, front, where):
    """A BPE of characters as one of bytes: the bytes of a character are joined before all else, by way of prefixes of UTF-8 that have no id.

    pieces: {piece with ▁ for a space: id}; byte_pieces: {"<0x0A>": id}, for the bytes of a character that is no piece; rank_of: of a merge.
    """
    ids = {piece.replace("▁", " ").encode(): i for piece, i in pieces.items()}
    byte_ids = {BYTES[int(name[3:5], 16)]: i for name, i in byte_pieces.items()}
    if len(byte_ids) < 256 or len(ids) < len(pieces):
        raise UserError(
            f"{where}: {len(byte_ids)} of 256 bytes have a piece and {len(pieces) - len(ids)} pieces differ in '▁' for ' ' alone"
        )
    characters = [token for token in ids if 1 < len(token) <= 4 and len(token.decode()) == 1]
    prefixes = sorted({token[:n] for token in characters for n in range(2, len(token))}, key=len)
    ranks = {token: n for n, token in enumerate([*BYTES, *prefixes, *characters])}
    add_merge_ranks(ranks, [token for token in ids if token not in ranks], rank_of)
    whole = pattern == WORDS and any(b" " in token.lstrip(b" ") for token in ranks)
    return Vocabulary(ranks, ids, special, WHOLE_TEXT if whole else pattern, front, byte_ids)


def read_huggingface(files, where):
    spec = json.loads(files["tokenizer.json"])
    model, special = (
        spec["model"],
        {token["content"]: token["id"] for token in spec["added_tokens"]},
    )
    strange = [
        f"{key} {model[key]}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if model.get("type", "BPE") != "BPE" or strange:  # GPT-2's file is from before types
        raise UserError(
            f"{where}: model {', '.join([model['type'], *strange])}: only a plain BPE is known here"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    missing = [
        left + right
        for left, right in merges
        if not {left, right, left + right} <= model["vocab"].keys()
    ]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} merges are of or to tokens that are not in its vocabulary, such as {missing[0]!r}"
        )
    pattern, front = pre_tokenizer_pattern(spec, where)
    if front is None:
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
        pieces, byte_pieces, lambda *pair: pairs.get(pair), special, pattern, front, where
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
            f"{where}: {absent} bytes have no token but something that stands for them, which is not known here"
        )
    add_merge_ranks(ranks, {left + right for left, right in pairs}, lambda *pair: pairs.get(pair))
    if model.get(
        "ignore_merges"
    ):  # a piece that is a token is taken whole even if no merge leads there, but a part of a piece is not
        for token in ids.keys() - ranks.keys() - {name.encode() for name in special}:
            if len(merge_parts(token, ranks)) == 2:
                raise UserError(
                    f"{where}: {token!r} is one token as a piece and two inside one, which is not known here"
                )
            ranks[token] = 256 + len(merges) + ids[token]
    return Vocabulary(ranks, ids, special, pattern)


def pre_tokenizer_pattern(spec, where):
    """The pattern that a tokenizer.json cuts texts by, and the `front` of Parts: None if its tokens are of bytes."""
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
            return (
                rf"{pattern}|(?:(?!{pattern})[\s\S])+",
                None,
            )  # what lies between two matches is a piece too
    raise UserError(
        f"{where} changes or cuts texts by {', '.join(step['type'] for step in steps) or 'none'}, in a way that is not known here"
    )


TOKENIZER_READERS = {"tekken.json": read_tekken, "tokenizer.json": read_huggingface, "tokenizer.model": read_sentencepiece}


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, stream() for a text that comes id by id; special: the ids of special tokens by name.

    files: {name: bytes}, first one that READERS knows, then what belongs to it; kept, so that they can be handed on unchanged.
    """

    def __init__(self, files, where=None):
        self.files, self.fingerprint = (
            files,
            hashlib.sha256(b"".join(files.values())).hexdigest()[:16],
        )
        name = next(iter(files))
        where = where or name
        try:
            ranks, ids, self.special, pattern, self.prefix_space, byte_ids = TOKENIZER_READERS[name](files, where)
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
                f"{where}: the white space {blank[0]!r} is a special token, and would have to be found in texts"
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
        """The first of READERS that lies in a folder: what the model's maker tests with, then what holds the most special tokens."""
        folder = Path(folder)
        name = next((name for name in TOKENIZER_READERS if (folder / name).is_file()), None)
        if name is None:
            raise UserError(f"{folder} holds none of {', '.join(TOKENIZER_READERS)}")
        names = (
            [name, "added_tokens.json"]
            if name == "tokenizer.model" and (folder / "added_tokens.json").is_file()
            else [name]
        )
        return cls({name: (folder / name).read_bytes() for name in names}, folder / name)

    def save(self, folder):
        for name, source in self.files.items():
            (Path(folder) / name).write_bytes(source)

    def encode(self, text, space=None):
        """space: whether SentencePiece's is put in front; None: as the file says."""
        said = text
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
            at = error.start - len(text) + len(said)
            raise UserError(
                f"a text has half a character, U+{ord(said[at]):X}, at letter {at + 1}: {said[:40]!a}"
            ) from None
        try:
            ranks = self.ranks(
                text, whole=len(text) < MAX_PATTERN_CHARS and source.translate(None, self.dropped) == source
            )
        except BaseException as error:
            if type(error).__name__ not in (
                "PanicException",
                "TimeoutError",
            ):  # tiktoken's matcher gives up after a million steps, by a panic
                raise
            raise UserError(
                f"the tokenizer's own pattern does not come to an end with this text: {said[:40]!a}"
            ) from None
        return list(chain.from_iterable(map(self.ids_of_rank.__getitem__, ranks)))

    def ranks(self, text, whole):
        """Of its tokens, by tiktoken if it can take the text as a whole; else of pieces that are found here, as tiktoken's own tests do it."""
        if whole:
            return self.encoding.encode_ordinary(text)
        found = (
            match.group().encode().translate(None, self.dropped)
            for match in regex.finditer(self.encoding._pat_str, text, timeout=PATTERN_SECONDS)
        )
        return [
            rank for piece in found if piece for rank in self.encoding._encode_single_piece(piece)
        ]

    def decode(self, ids):
        stream = self.stream()
        return stream.push(*ids) + stream.flush()

    def stream(self):
        return TextStream(self.bytes_of, self.prefix_space not in (None, "never"))


class TextStream:
    """A text that comes id by id: `push` returns what is whole so far, holding back the first bytes of a letter until its last have come."""

    def __init__(self, bytes_of, front):
        self.bytes_of, self.prefix_space, self.decoder = (
            bytes_of,
            front,
            codecs.getincrementaldecoder("utf-8")("replace"),
        )

    def push(self, *ids):
        new = b"".join(
            self.bytes_of.get(i, b"") for i in ids
        )  # a padded vocabulary has ids without bytes
        if self.prefix_space and new:  # the space that encode put there
            self.prefix_space, new = False, new.removeprefix(b" ")
        return self.decoder.decode(new)

    def flush(self):
        return self.decoder.decode(b"", final=True)


def tokenizer_spec(ranks, special):
    """Learnt ranks and special names as a tokenizer.json that Hugging Face's `tokenizers` reads too."""
    show = {token: "".join(BYTE_TO_UNICODE[b] for b in token) for token in ranks}
    merged = [token for token in sorted(ranks, key=ranks.get) if len(token) > 1]
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
            "vocab": {show[token]: rank for token, rank in ranks.items()},
            "merges": [" ".join(show[part] for part in merge_parts(token, ranks)) for token in merged],
        },
    }


def train_tokenizer(texts, vocabulary, special):
    """A Tokenizer of `vocabulary` tokens learnt from texts by tiktoken's own trainer, fewer if these have no more to join; special ones come after.

    The trainer is written to be read and walks over every word at each merge, so it is given each distinct word of the texts, repeated by the
    logarithm of its count.
    """
    counts = Counter(word for text in texts for word in regex.findall(GPT2, text))
    sample = "".join(word * count.bit_length() for word, count in sorted(counts.items()))

    def ranks_of(size):
        with contextlib.suppress(
            ValueError
        ):  # which it raises when no two neighbours are left to join
            return bpe_train(sample, size, GPT2, visualise=None)

    ranks = ranks_of(vocabulary)
    if ranks is None:
        enough = bisect.bisect(
            range(257, vocabulary), False, key=lambda size: ranks_of(size) is None
        )
        ranks = ranks_of(256 + enough)
    return Tokenizer({"tokenizer.json": json.dumps(tokenizer_spec(ranks, special)).encode()})
