"""How fast a model speaks beside transformers and llama.cpp (speech.py), and answers an exam, 16 questions at once beside one by one:

    python tests/bench/sample.py

The demonstration's model is at hand once `python train.py` has run, SmolLM2-135M-Instruct with its true weights after `python -m pytest -m real`.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from bench.speech import speech  # noqa: E402

from nanovlm import UserError, cli  # noqa: E402
from nanovlm.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from nanovlm.evals import benchmarks, runner  # noqa: E402
from nanovlm.inference.optimize import optimize  # noqa: E402


def answers_per_s(checkpoint, questions, batch, max_tokens):
    """And the answers."""
    began = time.time()
    said = sorted(
        pair
        for pairs in runner.answer_questions(
            checkpoint, questions, batch=batch, max_tokens=max_tokens
        )
        for pair in pairs
    )
    return len(questions) / (time.time() - began), [one.text for _, one in said]


def measure_questions(model, questions, images, count, batch, max_tokens, rounds):
    """Print answers a second one by one and at once, each the median over the rounds, and the median of the rounds' ratios."""
    asked = benchmarks.load_questions("exact", questions, images=images)
    asked = asked[:: max(1, len(asked) // count)][:count]
    checkpoint, speeds, same = load_checkpoint(model), [], 0
    optimize(checkpoint.model)
    for _ in range(rounds):
        (alone, ones), (together, many) = (
            answers_per_s(checkpoint, asked, size, max_tokens) for size in (1, batch)
        )
        speeds.append((alone, together))
        same = sum(a == b for a, b in zip(ones, many, strict=True))
    ratio = statistics.median(together / alone for alone, together in speeds)
    alone, together = map(statistics.median, zip(*speeds, strict=True))
    print(
        f"{len(asked)} questions: {alone:,.1f} answers/s one by one, {together:,.1f} in batches of {batch}, {ratio:.1f} times as many; "
        f"{same} of {len(asked)} the same answers"
    )


def sample(
    *,
    decoder: str = "data/real/smollm2",  # the language model, a Hugging Face folder
    dtype: str = "bfloat16",  # of its numbers: bfloat16, float16 or float32
    threads: int = torch.get_num_threads(),  # of each process
    tokens: int = 64,  # generated in a round
    model: str = "out/demo/sft",  # the model that answers
    questions: str = "data/demo/fridge/questions.jsonl",  # questions for it
    images: str = "data/demo/fridge/images",  # and their images
    count: int = 192,  # of the questions, spread over all kinds
    batch: int = 16,  # at once
    max_tokens: int = 64,  # the longest answer
    rounds: int = 5,  # all in turns
):
    """Measure both; print what is missing."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype={dtype} is none of bfloat16, float16, float32")
    torch.set_num_threads(threads)
    if Path(decoder).is_dir():
        speech(decoder, getattr(torch, dtype), threads, tokens, rounds)
    else:
        print(f"generation is not measured: there is no {decoder}")
    if Path(model).is_dir():
        measure_questions(model, questions, images, count, batch, max_tokens, rounds)
    else:
        print(f"questions are not measured: there is no {model}")


if __name__ == "__main__":
    cli.run_script(sample)
