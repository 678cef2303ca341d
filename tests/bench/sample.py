"""How fast a model answers an exam, 16 questions at once beside one by one. The demonstration's is at hand once `python train.py` has run:

    python tests/bench/sample.py
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from nanovlm import cli, evaluate, papers, weights  # noqa: E402


def answers_per_s(checkpoint, questions, batch, max_tokens):
    """And the answers."""
    began = time.time()
    said = sorted(pair for pairs in evaluate.answers(checkpoint, questions, batch=batch, max_tokens=max_tokens) for pair in pairs)
    return len(questions) / (time.time() - began), [one.text for _, one in said]


def sample(*,
    model: str = "out/sft",                        # the model that answers
    questions: str = "data/fridge/exam.jsonl",     # its exam
    images: str = "data/fridge/images",            # with these pictures
    count: int = 192,                              # so many of the questions, from all parts of the exam
    batch: int = 16,                               # at once
    max_tokens: int = 64,                          # the longest answer
    rounds: int = 5,                               # one by one and at once, in turns
):
    """Print answers a second of both, each the median over the rounds, and the median of the rounds' ratios."""
    asked = papers.read("exact", questions, images=images)
    asked = asked[:: max(1, len(asked) // count)][:count]
    checkpoint, speeds, same = weights.load(model), [], 0
    for _ in range(rounds):
        (alone, ones), (together, many) = (answers_per_s(checkpoint, asked, size, max_tokens) for size in (1, batch))
        speeds.append((alone, together))
        same = sum(a == b for a, b in zip(ones, many, strict=True))
    ratio = statistics.median(together / alone for alone, together in speeds)
    alone, together = map(statistics.median, zip(*speeds, strict=True))
    print(f"{len(asked)} questions: {alone:,.1f} answers/s one by one, {together:,.1f} in batches of {batch}, {ratio:.1f} times as many; "
          f"{same} of {len(asked)} the same answers")


if __name__ == "__main__":
    cli.run(sample)
