"""The speed of our encode beside the libraries that made the files, on one thread.

    python tests/bench/tokenizer.py               all kinds of files and texts: a minute
    python tests/bench/tokenizer.py --rounds=3    fewer measurements

It prints microseconds per text, and the time of each library divided by ours. The libraries take
turns; times are medians. Ids are compared first. `tokenizers` cannot read .model files and
tekken.json: it gets what transformers converts them to. SmolLM2 is measured if
`python -m pytest tests/checkpoints/test_real_weights.py` has downloaded it.
"""

import base64
import json
import os
import statistics
import sys
import time
from functools import partial
from importlib.resources import files
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
from mistral_common.tokens.tokenizers.tekken import Tekkenizer  # noqa: E402
from sentencepiece import SentencePieceProcessor  # noqa: E402
from tokenizers import Tokenizer as Reference  # noqa: E402
from tokenizers import decoders, models, normalizers  # noqa: E402
from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: E402
from transformers.tokenization_utils_base import generate_merges  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from nanovlm import cli  # noqa: E402
from nanovlm.data.tokenizer import Tokenizer  # noqa: E402

MISTRAL, SMOLLM2 = files("mistral_common") / "data", ROOT / "data/real/smollm2/tokenizer.json"
TEXTS = {
    "question": "What is in the fridge, and is there enough milk left to make pancakes for four?",
    "prose": (ROOT / "README.md").read_text()[:4000],
    "code": (ROOT / "nanovlm/data/tokenizer.py").read_text()[:4000],
    "cjk": "日本の卵は新鮮で、冷蔵庫の一番下の引き出しに入っている。今天天气很好,我们去公园散步吧。안녕하세요, 오늘 날씨가 좋네요. "
    * 20,
    "emoji": "👩\u200d🍳 is cooking 🥚🥚🍳 with 👨\u200d👩\u200d👧 and 🏳\ufe0f\u200d🌈 🇫🇷! 😂😂😂 "
    * 20,
    "arabic": "السلام عليكم ورحمة الله وبركاته. שָׁלוֹם עֲלֵיכֶם " * 20,
    "numbers": "".join(f"{i * 7919} {i * 0.37:.3f}, " for i in range(100)),
    "indent": "".join(f"{' ' * (i % 9) * 4}x\t= [{i}]\n\n" for i in range(200)),
    "one word": "a" * 20_000,
}


def converted(model):
    """A SentencePiece .model as the tokenizer.json that transformers makes of it for Llama 2."""
    pieces = SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = {
        name: pieces.get_score(i)
        for name, i in vocabulary.items()
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    words = Reference(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return words


def converted_tekken(source):
    """A tekken.json as transformers converts it; ids are ranks, special tokens come last."""
    spec = json.loads(source)
    size = spec["config"]["default_vocab_size"] - spec["config"]["default_num_special_tokens"]
    converter = TikTokenConverter(pattern=spec["config"]["pattern"])
    converter.load_tiktoken_bpe = lambda _: {
        base64.b64decode(token["token_bytes"]): token["rank"] for token in spec["vocab"][:size]
    }
    return converter.converted()


def ids_of(reference, text, shift=0):
    ids = reference.encode(text, add_special_tokens=False).ids
    return [i + shift for i in ids] if shift else ids


def kinds():
    """Yields (name, {library: encode}) of each file; ours first."""
    if SMOLLM2.exists():
        yield (
            "SmolLM2",
            {
                "ours": Tokenizer({"tokenizer.json": SMOLLM2.read_bytes()}).encode,
                "tokenizers": partial(ids_of, Reference.from_file(str(SMOLLM2))),
            },
        )
    for name, file in [
        ("Mistral v1", "tokenizer.model.v1"),
        ("Mistral v7", "mistral_instruct_tokenizer_241114.model.v7"),
    ]:
        source = (MISTRAL / file).read_bytes()
        spec = converted(source)
        yield (
            name,
            {
                "ours": Tokenizer({"tokenizer.model": source}).encode,
                "tokenizers": partial(ids_of, spec),
                "sentencepiece": SentencePieceProcessor(model_proto=source).encode,
            },
        )
        yield (
            f"{name}, json",
            {
                "ours": Tokenizer({"tokenizer.json": spec.to_str().encode()}).encode,
                "tokenizers": partial(ids_of, spec),
            },
        )
    path = MISTRAL / "tekken_240911.json"
    tekken = Tekkenizer.from_file(str(path))
    yield (
        "Tekken",
        {
            "ours": Tokenizer({"tekken.json": path.read_bytes()}).encode,
            "tokenizers": partial(
                ids_of, converted_tekken(path.read_bytes()), shift=tekken.num_special_tokens
            ),
            "mistral-common": partial(tekken.encode, bos=False, eos=False),
        },
    )


def measure(encoders, text, rounds):
    """Returns {library: microseconds per text}; a library encodes 20,000 letters in each round."""
    times, repeats = {name: [] for name in encoders}, max(1, 20_000 // len(text))
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter()
            for _ in range(repeats):
                encode(text)
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def speed(
    *,
    rounds: int = 25,  # of each text and library
):
    """Encode the same texts with our tokenizer and with the references."""
    for kind, encoders in kinds():
        for name, text in TEXTS.items():
            ids = encoders["ours"](text)
            differ = [library for library, encode in encoders.items() if encode(text) != ids]
            took = measure(encoders, text, rounds)
            ratios = "  ".join(
                f"{library} {each / took['ours']:4.2f}x"
                for library, each in took.items()
                if library != "ours"
            )
            wrong = f"  other ids: {differ}" if differ else ""
            print(f"{kind:16} {name:9} ours {took['ours']:7.1f} us  {ratios}{wrong}", flush=True)


if __name__ == "__main__":
    cli.run_script(speed)
