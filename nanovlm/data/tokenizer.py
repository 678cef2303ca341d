"""Every tokenizer file becomes a tiktoken encoding.

BPE splits a text into pieces by a pattern, and a piece into bytes. Then it merges the two neighbors
whose union has the lowest rank, again and again. tiktoken does the merging. It needs the bytes and
the rank of each token. A rank need not be the id, which a second table gives.
Each format has a reader, which returns these tables. The Tokenizer at the end knows no formats.

    tekken.json       Mistral since Nemo: ranks and pattern as tiktoken has them
    tokenizer.json    Hugging Face: byte-level BPE (GPT-2, Llama 3, SmolLM2, what `train_tokenizer`
                      makes) or a converted SentencePiece (Llama 2, LLaVA)
    tokenizer.model   SentencePiece BPE (Mistral to v0.3, Llama 2, Vicuna), with the
                      added_tokens.json and tokenizer_config.json that may lie beside it

Special tokens are never found in a text. A user who types "</s>" types four characters. Templates
(chat_template.py) ask for special tokens by name. Only the tokens that an owner added as words
("special": false in a tokenizer.json, such as [SEG]) are found in texts, as in Hugging Face.
"""

import base64
import bisect
import codecs
import contextlib
import hashlib
import json
import struct
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken
from tiktoken._educational import bpe_train

from .. import UserError
from ..files import read_json

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 splits off each digit before it applies GPT-2's pattern to the text between them. So white
# space before a digit counts as the end of a text.
DIGITS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
GPT2_PATTERNS = (GPT2, DIGITS_GPT2)
WHOLE_TEXT = r"(?s).+"  # SentencePiece takes a text as one piece
NO_RANK = 1 << 32  # more than any rank
NFC = {"type": "NFC"}  # the normalizer that composes characters: e and ´ become é
BYTES = [bytes([b]) for b in range(256)]
# GPT-2 writes a byte as one character: itself if it is printable, else one from U+0100 on.
BYTE_TO_UNICODE = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
OTHER_BYTES = sorted(set(range(256)) - BYTE_TO_UNICODE.keys())
BYTE_TO_UNICODE |= {b: chr(256 + n) for n, b in enumerate(OTHER_BYTES)}
UNICODE_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_UNICODE.items()}
SPECIAL_TOKEN = {  # the flags of a special token in a tokenizer.json
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
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


def check_settings(*settings):
    """Raises ValueError unless each (name, value, supported value) has the supported value."""
    for name, value, supported in settings:
        if value != supported:
            raise ValueError(f"{name} is {value!r}, only {supported!r} is supported")


def merge_parts(token, ranks):
    """Returns the two tokens whose merge makes `token`; more than two if no merge leads to it.

    These are its bytes, merged by rank until two are left.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        order = [ranks.get(left + right, NO_RANK) for left, right in pairwise(parts)]
        rank = min(order)
        if rank == NO_RANK:
            break
        i = order.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def add_merge_ranks(ranks, tokens, merges):
    """Add to `ranks` the tokens that merges can make.

    merges: {(left, right): rank}, or {left + right: rank} for SentencePiece.

    The merges inside a token's bytes do not depend on the text around them, because a merge across
    its edge would prevent the token. So the last merge always joins the same two tokens, those of
    merge_parts, and one rank per token is as good as one per merge. A token that no merge leads to
    must have no rank: tiktoken encodes a piece that is a token at once.
    """
    base = len(ranks)
    for token in sorted(tokens, key=len):
        parts = tuple(merge_parts(token, ranks))
        rank = merges.get(parts, merges.get(token))
        if len(parts) == 2 and rank is not None:
            ranks[token] = base + rank


# A reader of a tokenizer file returns (ranks, bytes_of, special, pattern, prefix_space):
#     ranks         {bytes of a token: rank}
#     bytes_of      {id: bytes of its token}. A token without an id is encoded as the ids of its
#                   bytes, and a byte without an id is left out, as Hugging Face does. If two ids
#                   have the same bytes, a text gets the later one.
#     special       {name of a special token: id}
#     pattern       regular expression of a piece
#     prefix_space  SentencePiece's space before a text: "always"; "missing": unless the text starts
#                   with one; "first": as "missing" for a single text, but in a conversation the
#                   template decides (chat_template.prepend_space); "never"; None: byte-level tokens
# It raises ValueError if the file has a setting that is not supported.


def read_tekken(files):
    """Returns the tables of a tekken.json: special tokens come first, then tokens by rank."""
    spec = json.loads(files["tekken.json"])
    size = spec["config"]["default_vocab_size"]
    special_count = spec["config"]["default_num_special_tokens"]
    names = TEKKEN_SPECIAL_TOKENS
    if spec.get("special_tokens") is not None:
        names = [token["token_str"] for token in spec["special_tokens"]]
    names = [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), special_count))]
    special = {name: i for i, name in enumerate(names)}
    vocab = spec["vocab"][: size - special_count]
    tokens = [base64.b64decode(token["token_bytes"]) for token in vocab]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    check_settings(
        ("the number of its special tokens", len(special), special_count),
        ("the number of all its tokens", len(special) + len(ranks), size),
        ("whether it begins with the 256 bytes", tokens[:256] == BYTES, True),
    )
    bytes_of = {special_count + rank: token for token, rank in ranks.items()}
    return ranks, bytes_of, special, spec["config"]["pattern"], None


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


def read_sentencepiece(files):
    """Returns the tables of a tokenizer.model.

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
            raise ValueError(f"the piece {name!r} is of type unused, which is not supported")
        ids = pieces if kind in (NORMAL, BYTE_PIECE) else special
        ids[name] = i
        if kind == NORMAL and len(name) > 1:
            scores[name] = struct.unpack("<f", piece.get(2, bytes(4)))[0]
    times = Counter(scores.values())
    tied = [name for name, score in scores.items() if times[score] > 1 and name.strip("▁")]
    check_settings(
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
            raise ValueError(f"added_tokens.json has {name!r} at {i}, where another piece is")
        special[name] = i
    # Of merges with equal scores the leftmost comes first. The runs of spaces share a score in
    # Mistral's files. For them this is as if longer runs came first: the leftmost run grows by one
    # space at a time, and joins the run before it as soon as both make a piece.
    order = sorted(scores, key=lambda name: (-scores[name], -len(name)))
    merges = {piece_bytes(name): rank for rank, name in enumerate(order)}
    prefix_space = "always" if normalizer.get(3, 1) else "never"
    if prefix_space == "always" and "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        prefix_space = "missing" if config["legacy"] else "first"
    return piece_vocabulary(pieces, merges, special, prefix_space)


def prefix_space_config(folder):
    """Returns what decides where transformers 5 puts SentencePiece's space of a tokenizer.model.

    {"legacy": False}: at the start. {}: before each text between special tokens. A true `legacy`
    with a Llama's class: before each of these that has none.
    """
    config = {}
    for name in ("config.json", "tokenizer_config.json"):
        config |= read_json(folder / name) if (folder / name).is_file() else {}
    own_class = f"{config.get('model_type')}tokenizer"  # if it has the class of its own model
    is_own = str(config.get("tokenizer_class")).lower().removesuffix("fast") == own_class
    if not config.get("legacy", not is_own):
        return {"legacy": False}
    return {name: config[name] for name in ("legacy", "model_type", "tokenizer_class") if is_own}


def piece_bytes(piece):
    """Returns the bytes of a SentencePiece piece, in which ▁ stands for a space."""
    return piece.replace("▁", " ").encode()


def piece_vocabulary(pieces, merges, special, prefix_space):
    """Returns the tables of a BPE of characters, as a BPE of bytes.

    The bytes of a character are merged before all else. The prefixes of its UTF-8 that arise on the
    way have a rank but no id. pieces: {piece: id}; "<0x0A>" stands for a byte, for characters that
    are not a piece. merges: as for add_merge_ranks.
    """
    bytes_of = {}
    for piece, i in pieces.items():
        if regex.fullmatch("<0x[0-9A-F]{2}>", piece):
            bytes_of[i] = BYTES[int(piece[3:5], 16)]
    check_settings(("the number of bytes with a piece", len(bytes_of), 256))
    tokens = {piece_bytes(piece): i for piece, i in pieces.items() if i not in bytes_of}
    bytes_of |= {i: token for token, i in tokens.items()}
    ranks = {byte: n for n, byte in enumerate(BYTES)}
    for token in tokens:
        if len(token.decode()) == 1:
            for length in range(2, len(token) + 1):
                ranks.setdefault(token[:length], len(ranks))
    add_merge_ranks(ranks, tokens, merges)
    return ranks, bytes_of, special, WHOLE_TEXT, prefix_space


def read_huggingface(files):
    """Returns the tables of a tokenizer.json."""
    spec = json.loads(files["tokenizer.json"])
    model = spec["model"]
    vocab = model["vocab"]
    unknown = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    check_settings(
        ("the model's type", model.get("type", "BPE"), "BPE"),  # GPT-2's file has none
        ("the list of its options", [name for name in unknown if model.get(name)], []),
    )
    pattern, prefix_space = pre_tokenizer_pattern(spec)
    token_bytes = byte_level_bytes if prefix_space is None else piece_bytes
    merges = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(
                f"its vocabulary lacks one of {left!r}, {right!r} and their merge {left + right!r}"
            )
        merges[token_bytes(left), token_bytes(right)] = rank
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token in spec["added_tokens"]:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if token.get("normalized") and spec.get("normalizer") and token["content"] in words(spec):
            flags.append("normalized")
        check_settings((f"the flags of its added token {token['content']!r}", flags, []))
    pieces = {piece: i for piece, i in vocab.items() if piece not in special}
    if prefix_space is not None:
        check_settings(("byte_fallback", model.get("byte_fallback", False), True))
        return piece_vocabulary(pieces, merges, special, prefix_space)
    return byte_level_vocabulary(model, pieces, merges, special, pattern)


def words(spec):
    """Returns the added tokens of a tokenizer.json that are found in texts, the longest first.

    Those of chats never are, whatever the file says: a user who types one would end his turn.
    """
    tokens = [token["content"] for token in spec["added_tokens"] if token.get("special") is False]
    found = [name for name in tokens if not regex.match(r"<\||</?s>|\[/?INST", name)]
    return sorted(found, key=len, reverse=True)


def byte_level_bytes(piece):
    """Returns the bytes of a token of byte-level BPE, in which a character stands for a byte."""
    return bytes(UNICODE_TO_BYTE[letter] for letter in piece)


def byte_level_vocabulary(model, pieces, merges, special, pattern):
    """Returns the tables of a byte-level BPE; model: "model" of its tokenizer.json."""
    bytes_of = {
        i: byte_level_bytes(piece)
        for piece, i in pieces.items()
        if UNICODE_TO_BYTE.keys() >= set(piece)
    }
    tokens = set(bytes_of.values())
    if (model.get("unk_token") or model.get("byte_fallback")) and not tokens.issuperset(BYTES):
        raise ValueError("an unknown token stands for some bytes, which is not supported")
    ranks = {byte: n for n, byte in enumerate(BYTES)}
    add_merge_ranks(ranks, tokens, merges)
    # With ignore_merges, a piece that is a token is encoded at once even if no merge leads to it;
    # a part of a piece is not.
    for i, token in bytes_of.items():
        if model.get("ignore_merges") and token not in ranks:
            if len(merge_parts(token, ranks)) == 2:
                raise ValueError(f"{token!r} is one token as a piece, but two as a part of one")
            ranks[token] = 256 + len(merges) + i
    return ranks, bytes_of, special, pattern, None


def pre_tokenizer_pattern(spec):
    """Returns the pattern by which a tokenizer.json splits texts, and its prefix_space."""
    steps = []
    for step in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        if step and step != NFC:
            steps += step.get("normalizers") or step.get("pretokenizers") or [step]
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
    raise ValueError(f"it splits texts by {json.dumps(steps):.300}, which is not supported")


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
        try:
            ranks, bytes_of, self.special, pattern, self.prefix_space = TOKENIZER_READERS[name](
                files
            )
            spec = json.loads(files.get("tokenizer.json", '{"added_tokens": []}'))
            self.words = regex.compile("|".join(map(regex.escape, words(spec))) or "(?!)")
            self.has_nfc = spec.get("normalizer") == NFC
            # Special tokens are not found in texts.
            blank = [name for name in self.special if not piece_bytes(name).strip()]
            check_settings(("the list of special tokens of white space", blank[:3], []))
            self.encoding = tiktoken.Encoding(
                self.fingerprint, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
            self.bytes_of = bytes_of | {i: name.encode() for name, i in self.special.items()}
            self.vocab_size = max(self.bytes_of) + 1
        except Exception as error:  # a stranger's file can raise any error of Python
            raise UserError(
                f"{where or name} cannot be read as a tokenizer: {type(error).__name__}: {error}"
            ) from None
        ids = {token: i for i, token in bytes_of.items()}
        self.ids_of_rank = {}
        for token, rank in ranks.items():
            parts = [token] if token in ids else [bytes([b]) for b in token]
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
        files = {name: (folder / name).read_bytes() for name in names}
        config = prefix_space_config(folder) if names[0] == "tokenizer.model" else {}
        if config:
            files["tokenizer_config.json"] = json.dumps(config).encode()
        return cls(files, folder / names[0])

    def save(self, folder):
        """Write the tokenizer's files to a folder, unchanged."""
        for name, source in self.files.items():
            (Path(folder) / name).write_bytes(source)

    def encode(self, text, space=None):
        """Returns the ids of a text.

        space: whether SentencePiece's space is put before it; None: as the tokenizer's file says.
        Raises UserError if the pattern takes too long.
        """
        ids, start = [], 0
        for match in self.words.finditer(text):
            ids += self.encode_part(text[start : match.start()], space)
            ids.append(self.special[match[0]])
            start, space = match.end(), False if self.prefix_space == "first" else None
        return ids + self.encode_part(text[start:], space)

    def encode_part(self, text, space):
        """Returns the ids of a text without added tokens; space: as for encode."""
        if self.has_nfc:
            text = unicodedata.normalize("NFC", text)
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
                f"the tokenizer's pattern does not come to an end with this text: {text[:40]!a}"
            ) from None
        # A stranger's pattern is run by tiktoken alone, which stops one without an end.
        if self.encoding._pat_str in GPT2_PATTERNS and not all(map(self.ids_of_rank.get, ranks)):
            ranks = self.ranks_of_known_bytes(text)
        ids = []
        for rank in ranks:
            ids += self.ids_of_rank[rank]
        return ids

    def ranks_of_known_bytes(self, text):
        """Returns the ranks of a text in which some bytes have no id.

        Such a byte leaves its piece before the merges, as in Hugging Face: its neighbors may merge.
        With other patterns than GPT2_PATTERNS it leaves after them.
        """
        missing = bytes(b for b in range(256) if not self.ids_of_rank[b])
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken
        ranks = []
        for piece in regex.findall(self.encoding._pat_str, text):
            known = piece.encode().translate(None, missing)
            if known:  # tiktoken panics at no bytes
                ranks += self.encoding._encode_single_piece(known)
        return ranks

    def decode(self, ids):
        stream = self.stream()
        return stream.push(*ids) + stream.flush()

    def stream(self):
        return TextStream(self)


class TextStream:
    """Decodes a text whose ids come one by one.

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
    """Returns the content of a Hugging Face tokenizer.json with these ranks and special tokens."""
    pieces = {token: "".join(map(BYTE_TO_UNICODE.get, token)) for token in ranks}
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
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(ranks) + n, "content": name, **SPECIAL_TOKEN}
            for n, name in enumerate(special)
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
    """Returns a byte-level Tokenizer, trained on texts by tiktoken's own trainer.

    It has vocab_size tokens, or fewer if nothing is left to merge; the special tokens follow. The
    trainer is written for teaching and visits each word at each merge. So it gets each distinct
    word of the texts, repeated by the logarithm of its count.
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
