"""Every tokenizer file as a tiktoken encoding."""
import base64, codecs, hashlib, json, re
from pathlib import Path
import tiktoken
from tiktoken._educational import bpe_train
from nanovlm import Mistake

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

def byte_letters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + len(letters) - len(plain))
    return letters

class Tokenizer:
    def __init__(self, source):
        self.source = source
        spec = json.loads(source)
        letters = {c: b for b, c in byte_letters().items()}
        raw = lambda t: bytes(letters[c] for c in t)
        vocab = {raw(t): i for t, i in spec["model"]["vocab"].items()}
        merged = [raw(a) + raw(b) for a, b in spec["model"]["merges"]]
        ranks = {bytes([b]): b for b in range(256)}
        for m in merged: ranks.setdefault(m, len(ranks))
        self.id_of = {r: vocab[t] for t, r in ranks.items() if t in vocab}
        self.bytes_of = {i: t for t, i in vocab.items()}
        self.special = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self.bytes_of |= {i: t.encode() for t, i in self.special.items()}
        self.encoding = tiktoken.Encoding("x", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = max(self.bytes_of) + 1
        self.fingerprint = hashlib.sha256(source).hexdigest()[:16]
    @classmethod
    def load(cls, folder): return cls((Path(folder) / "tokenizer.json").read_bytes())
    def save(self, folder): (Path(folder) / "tokenizer.json").write_bytes(self.source)
    def encode(self, text): return [self.id_of[r] for r in self.encoding.encode_ordinary(text)]
    def decode(self, ids): return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace")
    def stream(self): return Stream(self)

class Stream:
    def __init__(self, t): self.t, self.d = t, codecs.getincrementaldecoder("utf-8")("replace")
    def push(self, i): return self.d.decode(self.t.bytes_of[i])
    def flush(self): return self.d.decode(b"", True)

def learn(texts, vocab_size, special):
    from collections import Counter
    import regex
    words = Counter(w for t in texts for w in regex.findall(GPT2, t))
    sample = "".join(w * min(8, 1 + c.bit_length()) for w, c in sorted(words.items()))
    ranks = bpe_train(sample, vocab_size, GPT2, visualise=None)
    letters = byte_letters()
    show = lambda b: "".join(letters[x] for x in b)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
        if len(token) > 1:
            parts = [bytes([x]) for x in token]
            while len(parts) > 2:
                i = min((i for i in range(len(parts) - 1) if ranks.get(parts[i] + parts[i + 1], rank) < rank), key=lambda i: ranks[parts[i] + parts[i + 1]])
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            merges.append([show(parts[0]), show(parts[1])])
    spec = {"added_tokens": [{"id": len(ranks) + i, "content": s, "special": True} for i, s in enumerate(special)],
            "model": {"type": "BPE", "vocab": {show(t): r for t, r in ranks.items()}, "merges": merges}}
    return Tokenizer(json.dumps(spec).encode())
