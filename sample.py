"""Ask a model about pictures:

    python sample.py --image fridge.jpg                                       what is in the fridge?
    python sample.py --model=out/sft --image a.jpg --image b.jpg --prompt "What was taken out?"
    python sample.py --image fridge.jpg --chat=true                           a conversation in the terminal
    echo "Is there any milk?" | python sample.py --image fridge.jpg
    python sample.py --questions=data/fridge/exam.jsonl --images=data/fridge/images     the whole exam, marked
    python sample.py --model=llava-hf/llava-v1.6-mistral-7b-hf --image a.jpg --prompt "What is this?"

Only the answer goes to standard output.
"""
import json
import sys
import time
from pathlib import Path

import torch

from nanovlm import Mistake, chat, cli, data, disk, evaluate, images, packing, parallel, weights

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST = 1 << 20  # tokens of prompt and answer together; the cache takes memory for all of them before the first is read


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def place_pictures(text, pictures):
    """What a user says, with an <image> for each picture: where the text has them, else all in front of it."""
    typed = text.count("<image>")
    if typed not in (0, pictures):
        raise Mistake(f"the question says <image> {typed} times, the pictures given with it are {pictures}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python hands on bytes that are no text
        raise Mistake(f"the question is not text in {sys.stdin.encoding if sys.stdin else 'UTF-8'}: {text[:80]!r}")
    return text if typed else "<image>\n" * pictures + text


def prompt_ids(checkpoint, turns, pictures):
    """The ids of a conversation that waits for its answer, every picture expanded; pictures: images.Picture each."""
    ids, trained = chat.render(turns, checkpoint.tokenizer, checkpoint.template)
    ids, _, pictures = chat.tag_pictures(ids, trained, pictures, checkpoint.tokenizer, checkpoint.policy)
    return data.expand(ids, [len(picture.places) for picture in pictures]).tolist()


def load_pictures(paths, policy):
    return [images.load(path, policy) for path in paths]


def check_length(checkpoint, ids, max_tokens):
    """Refuse what no memory holds; warn of a prompt longer than all that the model was trained on."""
    if len(ids) + max_tokens > LONGEST:
        raise Mistake(f"{len(ids):,} tokens of prompt and --max_tokens={max_tokens} make more than {LONGEST:,}")
    path = Path(checkpoint.card["folder"]) / "training.json"
    row = disk.read_json(path)["row"] if path.is_file() else len(ids)
    if len(ids) > row:
        say(f"the prompt takes {len(ids):,} tokens, the model was trained on rows of {row:,}: do not expect much")


def stream(checkpoint, turns, pictures, **choices):
    """The answer to a conversation, a piece of text for each token and a last one for what was held back; ends at the end token."""
    text, ids = checkpoint.tokenizer.stream(), prompt_ids(checkpoint, turns, pictures)
    check_length(checkpoint, ids, choices["max_tokens"])
    stop = {chat.end_id(checkpoint.tokenizer, checkpoint.template)}
    for (next_id,) in checkpoint.model.generate([ids], **packing.join(pictures, checkpoint.policy), stop=stop, **choices):
        if next_id not in stop:
            yield text.push(next_id)
    yield text.flush()


def answer_all(checkpoint, questions, batch=100, blank=False, **choices):
    """The answers to many (text, pictures) questions, in their order, a batch at a time; blank: with grey pictures instead of theirs."""
    stop, answers = {chat.end_id(checkpoint.tokenizer, checkpoint.template)}, {}
    asked = [prompt_ids(checkpoint, [("user", place_pictures(text, len(pictures)))], pictures) for text, pictures in questions]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))  # prompts of one length need no padding
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        seen = packing.join([picture for i in members for picture in questions[i][1]], checkpoint.policy)
        if blank:
            seen["tiles_NCYX"].fill_(128)
        said = zip(*checkpoint.model.generate([asked[i] for i in members], **seen, stop=stop, **choices), strict=True)
        for i, ids in zip(members, said, strict=True):
            answers[i] = checkpoint.tokenizer.decode([x for x in ids if x is not None and x not in stop])
    return [answers[i] for i in range(len(questions))]


def examine(checkpoint, questions, folder, benchmark="exact", **how):
    """Answer questions (as evaluate.read_questions gives them) about pictures in `folder`, and mark them: the answers, and a score for each."""
    pictures = {path: images.load(Path(folder) / path, checkpoint.policy) for q in questions for path in q["image"]}
    answers = answer_all(checkpoint, [(q["question"], [pictures[path] for path in q["image"]]) for q in questions], **how)
    return answers, [evaluate.MARKS[benchmark](a, q["answers"]) for a, q in zip(answers, questions, strict=True)]


def show_marks(checkpoint, questions, folder, benchmark, out, **how):
    """A table of the marks of an exam, and where `out` names a file, every answer in it as a JSON line."""
    began = time.time()
    answers, scores = examine(checkpoint, questions, folder, benchmark, **how)
    for kind, count, share in evaluate.table(questions, scores):
        print(f"{kind:10} {count:5} questions   {share:6.1%} right")
    if out:
        lines = [{**q, "answer": a, "score": score} for q, a, score in zip(questions, answers, scores, strict=True)]
        Path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    say(f"{len(answers) / (time.time() - began):.0f} answers/s")


def answer(checkpoint, turns, pictures, **choices):
    """Print the answer to a conversation as it comes; return the whole of it."""
    began, parts = time.time(), []
    for part in stream(checkpoint, turns, pictures, **choices):
        parts.append(part)
        print(part, end="", flush=True)
    print(flush=True)
    count = len(parts) - 1  # the last is no token's
    cut = f", cut off at --max_tokens={count}" if count == choices["max_tokens"] else ""
    say(f"{count} tokens in {time.time() - began:.2f} s{cut}")
    return "".join(parts)


def question(prompt, pictures):
    """What is asked: what was typed, else what is piped in, else, of a picture, the demonstration's question."""
    if not prompt.strip() and sys.stdin and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt.strip() and not pictures:
        raise Mistake("there is nothing to answer: give a --prompt, an --image, or --chat=true for a conversation")
    return place_pictures(prompt.strip() or "What is in the fridge?", pictures)


def lines(first):
    """What a user says: `first` if it is not empty, then line after line of standard input until that ends."""
    while True:
        if first.strip():
            yield first.strip()
        print("> ", end="", file=sys.stderr, flush=True)
        first = sys.stdin.readline() if sys.stdin else ""
        if not first:
            return say()


def converse(checkpoint, pictures, prompt, **choices):
    """A conversation in the terminal, an answer to each line; the pictures belong to the first."""
    turns = []
    for line in lines(prompt):
        try:
            asked = place_pictures(line, 0 if turns else len(pictures))
        except Mistake as mistake:
            say(f"error: {mistake}")
            continue
        turns.append(("user", asked))
        turns.append(("assistant", answer(checkpoint, turns, pictures, **choices)))


def sample(*,
    model: str = "out/sft",       # a checkpoint, a run's folder (its newest one), or a public LLaVA: its folder or owner/name
    image: list[str] = [],        # a picture; may be repeated
    prompt: str = "",             # the question, <image> in it where a picture belongs; empty: standard input if piped, else what is in the fridge
    chat: bool = False,           # keep talking: the prompt, then a question a line
    questions: str = "",          # an exam: JSON lines of id, image, question, answers, or LLaVA JSON; --prompt takes the questions' place
    images: str = "",             # the folder that the exam's pictures are named from; empty: the exam's own
    benchmark: str = "exact",     # how the exam is marked: exact, or contains, where a right answer may stand among other words
    out: str = "",                # a file for the exam's answers, JSON lines
    temperature: float = 0.0,     # 0 takes the likeliest token every time; 1 draws as the model believes
    top_p: float = 1.0,           # draw among the fewest likeliest tokens that hold this much of the probability
    top_k: int = 0,               # draw among this many likeliest tokens; 0: among all
    max_tokens: int = 256,        # the longest answer
    seed: int = 0,                # of the draws
    device: str = "auto",         # auto, cpu, cuda, cuda:1 (or another card's number) or mps
    dtype: str = "auto",          # of the model's numbers: float32, bfloat16 or float16; auto: what its files have, so that 7B take 14 GB, not 28
):
    """Answer a question about pictures, or about nothing but words."""
    choices = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens, "seed": seed}
    check(choices)
    if dtype not in DTYPES:
        raise Mistake(f"--dtype={dtype} is none of {', '.join(DTYPES)}")
    if not (Path(model).exists() or disk.is_name(model)):
        raise Mistake(f"no such model: {model}; `python train.py` makes out/sft, the demonstration's")
    if questions and (image or chat):
        raise Mistake("--questions brings its own pictures, and is no conversation: --image and --chat do not go with it")
    if not questions and (images or out or benchmark != "exact"):
        raise Mistake("--images, --benchmark and --out are for an exam: give its --questions")
    if out and not Path(out).parent.is_dir():
        raise Mistake(f"--out={out}: there is no folder {Path(out).parent}")
    if questions:
        papers = evaluate.read_questions(questions, benchmark, prompt)
        checkpoint = weights.load(model, parallel.pick_device(device), DTYPES[dtype])
        return show_marks(checkpoint, papers, images or Path(questions).parent, benchmark, out, **choices)
    asked = "" if chat else question(prompt, len(image))
    checkpoint = weights.load(model, parallel.pick_device(device), DTYPES[dtype])
    pictures = load_pictures(image, checkpoint.policy)
    if chat:
        converse(checkpoint, pictures, prompt, **choices)
    else:
        answer(checkpoint, [("user", asked)], pictures, **choices)


def check(choices):
    """One Mistake that names every choice out of its range."""
    rules = {  # where float32 could make a quotient infinite or a share 0, torch would draw from nothing
        "temperature": ("0 or from 0.001 to 1000", lambda x: x == 0 or 0.001 <= x <= 1000),
        "top_p": ("from 0.001 to 1", lambda x: 0.001 <= x <= 1),
        "top_k": ("at least 0 and below 2^31", lambda x: 0 <= x < 2**31),
        "max_tokens": (f"from 1 to {LONGEST:,}", lambda x: 1 <= x <= LONGEST),
        "seed": ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63),
    }
    wrong = [f"--{name}={choices[name]} must be {must}" for name, (must, holds) in rules.items() if not holds(choices[name])]
    if wrong:
        raise Mistake("; ".join(wrong))


if __name__ == "__main__":
    cli.run(sample)
