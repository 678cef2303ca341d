"""Every tokenizer file as a tiktoken encoding.

A byte-level BPE (GPT-2, Llama 3, SmolLM2 and the one that `learn` makes) cuts a text by a pattern into pieces, a piece into bytes, and joins the
two neighbours whose union was learnt first, again and again. tiktoken does the joining; it only wants to know each token's bytes and its rank,
the order of learning, which need not be its id: the ids come from a table beside it.

Special tokens are never found in a text. A user who types "</s>" has typed four characters; templates (chat.py) ask for them by name.
"""
import codecs
import hashlib
import json
from collections import Counter
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken
from tiktoken._educational import bpe_train

from . import Mistake

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit is cut out before GPT-2's pattern sees what lies between, so white space before a digit counts as the end of a text (SmolLM2).
DIGITS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def byte_letters():
    """GPT-2's letter for each byte, so that a vocabulary can be printed: itself where that is visible, else one from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(others)}


LETTER = byte_letters()
BYTE = {letter: byte for byte, letter in LETTER.items()}


def pattern_of(spec, where):
    """The regular expression that a tokenizer.json cuts texts by; Mistake if it cuts in a way that is not known here."""
    steps = spec["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    match [step["type"] for step in steps], steps:
        case ["ByteLevel"], [last] if last["use_regex"]:
            pattern = GPT2
        case ["Digits", "ByteLevel"], [first, last] if first["individual_digits"] and last["use_regex"]:
            pattern = DIGITS_GPT2
        case ["Split", "ByteLevel"], [first, last] if first["behavior"] == "Isolated" and "Regex" in first["pattern"] and not last["use_regex"]:
            pattern = first["pattern"]["Regex"]
        case kinds, _:
            raise Mistake(f"{where} cuts texts by {', '.join(kinds)}, which is not known here")
    if steps[-1].get("add_prefix_space"):
        raise Mistake(f"{where} puts a space before every text, which is not known here")
    return pattern


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, stream() for a text that comes id by id; special: the ids of special tokens by name.

    source: the bytes of a tokenizer.json in Hugging Face's format, byte-level BPE; kept, so that it can be handed on unchanged.
    """

    def __init__(self, source, where="tokenizer.json"):
        self.source, self.fingerprint = source, hashlib.sha256(source).hexdigest()[:16]
        try:
            spec = json.loads(source)
            if spec["model"]["type"] != "BPE" or spec["normalizer"]:
                raise Mistake(f"{where}: model {spec['model']['type']}, normalizer {spec['normalizer']}: only byte-level BPE without one is known here")
            pattern = pattern_of(spec, where)
            vocabulary = {bytes(BYTE[letter] for letter in token): i for token, i in spec["model"]["vocab"].items()
                          if all(letter in BYTE for letter in token)}
            ranks = {bytes([b]): b for b in range(256)}
            for merge in spec["model"]["merges"]:
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                ranks.setdefault(bytes(BYTE[letter] for letter in left + right), len(ranks))
            if spec["model"].get("ignore_merges"):  # a piece that is a token is taken whole even if no merge leads there
                for token in sorted(vocabulary, key=vocabulary.get):
                    ranks.setdefault(token, len(ranks))
            self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        except (ValueError, KeyError, TypeError) as error:
            raise Mistake(f"{where} is no tokenizer that can be read here: {type(error).__name__} {error}") from None
        missing = [token for token in ranks if token not in vocabulary]
        if missing:
            raise Mistake(f"{where}: {len(missing)} tokens that its merges make are not in its vocabulary, such as {missing[0]}")
        self.id_of_rank = {rank: vocabulary[token] for token, rank in ranks.items()}
        self.bytes_of = {i: token for token, i in vocabulary.items()} | {i: name.encode() for name, i in self.special.items()}
        self.vocab_size = max(self.bytes_of) + 1
        self.encoding = tiktoken.Encoding(self.fingerprint, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise Mistake(f"no such file: {path}")
        return cls(path.read_bytes(), path)

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_bytes(self.source)

    def encode(self, text):
        return [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, ids):
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode(errors="replace")  # a padded vocabulary has ids without bytes

    def stream(self):
        return Stream(self.bytes_of)


class Stream:
    """A text that comes id by id: `push` returns what is whole so far, holding back the first bytes of a letter until its last have come."""

    def __init__(self, bytes_of):
        self.bytes_of, self.decoder = bytes_of, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i):
        return self.decoder.decode(self.bytes_of.get(i, b""))

    def flush(self):
        return self.decoder.decode(b"", final=True)


def parts_of(token, ranks):
    """The two tokens whose merge made `token`: join its bytes by the merges learnt before it until two are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        order = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        i = order.index(min(order))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spec_of(ranks, special):
    """Learnt ranks and special names as a tokenizer.json that Hugging Face's `tokenizers` reads too."""
    show = {token: "".join(LETTER[b] for b in token) for token in ranks}
    merged = [token for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(ranks) + n, "content": name, **flags} for n, name in enumerate(special)],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {show[token]: rank for token, rank in ranks.items()},
            "merges": [" ".join(show[part] for part in parts_of(token, {t: r for t, r in ranks.items() if r < ranks[token]})) for token in merged],
        },
    }


def learn(texts, vocabulary, special):
    """A Tokenizer of `vocabulary` tokens learnt from texts by tiktoken's own trainer, and the special tokens after them.

    The trainer is written to be read and walks over every word at each merge, so it is given each distinct word of the texts, repeated by the
    logarithm of its count.
    """
    counts = Counter(word for text in texts for word in regex.findall(GPT2, text))
    sample = "".join(word * count.bit_length() for word, count in sorted(counts.items()))
    try:
        ranks = bpe_train(sample, vocabulary, GPT2, visualise=None)
    except ValueError:  # no two neighbours are left to join
        raise Mistake(f"there is too little text for a vocabulary of {vocabulary} tokens") from None
    return Tokenizer(json.dumps(spec_of(ranks, special)).encode())
