"""The speed of generation beside transformers and llama.cpp (engines.py), and that of answers in
batches of 16 beside one by one:

    python tests/bench/sample.py

`python train.py` makes the demonstration's model, `python -m pytest -m real` downloads
SmolLM2-135M-Instruct.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from bench.engines import compare_engines  # noqa: E402

from nanovlm import UserError, cli  # noqa: E402
from nanovlm.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from nanovlm.evals import benchmarks, runner  # noqa: E402
from nanovlm.inference.optimize import optimize  # noqa: E402


def answers_per_s(checkpoint, questions, batch_size, max_tokens):
    """Returns (answers per second, the answers)."""
    start, outputs = time.time(), []
    options = {"batch_size": batch_size, "max_tokens": max_tokens}
    for pairs in runner.answer_questions(checkpoint, questions, **options):
        outputs += pairs
    speed = len(questions) / (time.time() - start)
    return speed, [output.answer for _, output in sorted(outputs)]


def measure_questions(model, questions, images, count, batch, max_tokens, rounds):
    """Print answers per second one by one and in batches: medians over the rounds."""
    loaded = benchmarks.load_questions("exact", questions, images=images)
    loaded = loaded[:: max(1, len(loaded) // count)][:count]
    checkpoint, speeds, same = load_checkpoint(model), [], 0
    optimize(checkpoint.model)
    for _ in range(rounds):
        single, single_answers = answers_per_s(checkpoint, loaded, 1, max_tokens)
        batched, batched_answers = answers_per_s(checkpoint, loaded, batch, max_tokens)
        speeds.append((single, batched))
        same = sum(a == b for a, b in zip(single_answers, batched_answers, strict=True))
    ratio = statistics.median(batched / single for single, batched in speeds)
    single, batched = map(statistics.median, zip(*speeds, strict=True))
    print(
        f"{len(loaded)} questions: {single:,.1f} answers/s one by one, {batched:,.1f} in batches "
        f"of {batch}, {ratio:.1f} times as many; {same} of {len(loaded)} answers are the same"
    )


def sample(
    *,
    decoder: str = "data/real/smollm2",  # the language model, a Hugging Face folder
    dtype: str = "bfloat16",  # of its numbers: bfloat16, float16 or float32
    threads: int = torch.get_num_threads(),  # of each process
    tokens: int = 64,  # generated in a round
    model: str = "out/demo/sft",  # the model that answers questions
    questions: str = "data/demo/fridge/questions.jsonl",  # its questions
    images: str = "data/demo/fridge/images",  # folder of their images
    count: int = 192,  # questions, of all kinds
    batch: int = 16,  # questions in a batch
    max_tokens: int = 64,  # the longest answer
    rounds: int = 5,  # of each measurement
):
    """Measure both; print what is missing."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype={dtype} is not one of bfloat16, float16, float32")
    torch.set_num_threads(threads)
    if Path(decoder).is_dir():
        compare_engines(decoder, getattr(torch, dtype), threads, tokens, rounds)
    else:
        print(f"generation is not measured: there is no {decoder}")
    if Path(model).is_dir():
        measure_questions(model, questions, images, count, batch, max_tokens, rounds)
    else:
        print(f"questions are not measured: there is no {model}")


if __name__ == "__main__":
    cli.run_script(sample)
