"""Ask a model about pictures:

    python sample.py --image fridge.jpg                                       what is in the fridge?
    python sample.py --model=out/sft --image a.jpg --image b.jpg --prompt "What was taken out?"
    python sample.py --image fridge.jpg --chat=true                           a conversation in the terminal
    echo "Is there any milk?" | python sample.py --image fridge.jpg

Only the answer goes to standard output.
"""
import sys
import time

import torch

from nanovlm import Mistake, chat, cli, data, images, parallel, weights


def prompt_ids(checkpoint, turns, tiles):
    """The ids of a conversation that waits for its answer, every picture expanded; tiles: one tiles_NCYX a picture."""
    ids, _ = chat.render(turns, checkpoint.tokenizer, checkpoint.template)
    return data.expand(ids, [images.picture_tokens(len(t), checkpoint.policy) for t in tiles]).tolist()


def as_tensor(tiles):
    """Tiles of several pictures as one uint8 (N, C, Y, X)."""
    return torch.cat([torch.from_numpy(t) for t in tiles]) if tiles else torch.zeros(0)


def stream(checkpoint, turns, tiles, **choices):
    """The answer to a conversation, piece by piece as it can be shown; ends at the end token."""
    text = checkpoint.tokenizer.stream()
    stop = {chat.end_id(checkpoint.tokenizer, checkpoint.template)}
    for (next_id,) in checkpoint.model.generate([prompt_ids(checkpoint, turns, tiles)], as_tensor(tiles), stop=stop, **choices):
        if next_id not in stop:
            yield text.push(next_id)
    yield text.flush()


def answer_all(checkpoint, questions, batch=100, blank=False, **choices):
    """The answers to many (text, tiles) questions, in their order, a batch at a time; blank: with grey pictures instead of theirs."""
    stop, answers = {chat.end_id(checkpoint.tokenizer, checkpoint.template)}, {}
    asked = [prompt_ids(checkpoint, [("user", "<image>\n" * len(tiles) + text)], tiles) for text, tiles in questions]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))  # prompts of one length need no padding
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        tiles_NCYX = as_tensor([t for i in members for t in questions[i][1]])
        if blank:
            tiles_NCYX = torch.full_like(tiles_NCYX, 128)
        said = zip(*checkpoint.model.generate([asked[i] for i in members], tiles_NCYX, stop=stop, **choices), strict=True)
        for i, ids in zip(members, said, strict=True):
            answers[i] = checkpoint.tokenizer.decode([x for x in ids if x is not None and x not in stop])
    return [answers[i] for i in range(len(questions))]


def converse(checkpoint, tiles, **choices):
    """Questions from the terminal, one a line, until it ends; the pictures belong to the first."""
    turns = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        turns.append(("user", ("<image>\n" * len(tiles) if not turns else "") + line.strip()))
        turns.append(("assistant", show(stream(checkpoint, turns, tiles, **choices))))


def show(parts):
    """Print an answer as it comes; return the whole of it."""
    said = ""
    for part in parts:
        said += part
        print(part, end="", flush=True)
    print()
    return said


def sample(*,
    model: str = "out/sft",       # a checkpoint, or a run's folder: its newest one
    image: list[str] = [],        # a picture; may be repeated
    prompt: str = "",             # the question; empty: standard input if it is piped, else what is in the fridge
    chat: bool = False,           # keep talking
    temperature: float = 0.0,     # 0 takes the likeliest token every time; 1 draws as the model believes
    top_p: float = 1.0,           # draw among the fewest likeliest tokens that hold this much of the probability
    top_k: int = 0,               # draw among this many likeliest tokens; 0: among all
    max_tokens: int = 256,        # the longest answer
    seed: int = 0,                # of the draws
    device: str = "auto",         # auto, cpu, cuda or mps
):
    """Answer a question about pictures, or about nothing but words."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_tokens < 1:
        raise Mistake(f"temperature {temperature} must be at least 0, top_p {top_p} in (0, 1], top_k {top_k} at least 0, max_tokens {max_tokens} at least 1")
    checkpoint = weights.load(model, parallel.pick_device(device))
    tiles = [images.load_tiles(path, checkpoint.policy) for path in image]
    choices = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens, "seed": seed}
    if chat:
        return converse(checkpoint, tiles, **choices)
    if not prompt:
        prompt = "What is in the fridge?" if sys.stdin.isatty() else sys.stdin.read().strip() or "What is in the fridge?"
    began, turns = time.time(), [("user", "<image>\n" * len(tiles) + prompt)]
    said = show(stream(checkpoint, turns, tiles, **choices))
    count = len(checkpoint.tokenizer.encode(said))
    print(f"{count} tokens in {time.time() - began:.2f} s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(sample)
