"""Ask a model about pictures:

    python sample.py --image fridge.jpg                                       what is in the fridge?
    python sample.py --model=out/sft --image a.jpg --image b.jpg --prompt "What was taken out?"
    python sample.py --image fridge.jpg --chat=true                           a conversation in the terminal
    echo "Is there any milk?" | python sample.py --image fridge.jpg
    python sample.py --questions=data/fridge/exam.jsonl --images=data/fridge/images --out=answers.jsonl      the whole exam, marked
    torchrun --nproc_per_node=8 sample.py --benchmark=mmmu --questions=MMMU --out=mmmu.jsonl --report=mmmu.html     a public one
    python sample.py --model=llava-hf/llava-v1.6-mistral-7b-hf --image a.jpg --prompt "What is this?"

Only the answer goes to standard output.
"""

import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from nanovlm import UserError, cli, distributed, files
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.data import chat_template, image_processing, packing
from nanovlm.evals import benchmarks, runner
from nanovlm.evals.runner import MAX_SEQUENCE, check_prompt_lengths, encode_prompt
from nanovlm.inference.generate import generate
from nanovlm.inference.optimize import optimize
from nanovlm.kernels import dispatch

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BATCH = 16  # questions of an exam at once
MARKING = (
    "benchmark",
    "questions",
    "annotations",
    "images",
    "out",
    "score",
    "report",
    "submission",
    "seed",
    "device",
)  # what marking again heeds


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def place_images(text, pictures):
    """What a user says, with an <image> for each picture: where the text has them, else all in front of it."""
    typed = text.count("<image>")
    if typed not in (0, pictures):
        raise UserError(
            f"the question says <image> {typed} times, the pictures given with it are {pictures}"
        )
    if any(
        "\ud800" <= letter <= "\udfff" for letter in text
    ):  # how Python hands on bytes that are no text
        raise UserError(
            f"the question is not text in {sys.stdin.encoding if sys.stdin else 'UTF-8'}: {text[:80]!r}"
        )
    return text if typed else "<image>\n" * pictures + text


def load_images(paths, policy):
    return [image_processing.load_image(path, policy) for path in paths]


def stream_answer(checkpoint, turns, pictures, **choices):
    """The answer to a conversation, a piece of text for each token and a last one for what was held back; ends at the end token."""
    text, ids = checkpoint.tokenizer.stream(), encode_prompt(checkpoint, turns, pictures)
    check_prompt_lengths(checkpoint, [len(ids)], choices["max_tokens"])
    stop = {chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template)}
    for (next_id,) in generate(checkpoint.model, 
        [ids], **packing.collate_images(pictures, checkpoint.image_config), stop=stop, **choices
    ):
        if next_id not in stop:
            yield text.push(next_id)
    yield text.flush()


def print_answer(checkpoint, turns, pictures, **choices):
    """Print the answer to a conversation as it comes; return the whole of it."""
    began, parts = time.time(), []
    for part in stream_answer(checkpoint, turns, pictures, **choices):
        parts.append(part)
        print(part, end="", flush=True)
    print(flush=True)
    count = len(parts) - 1  # the last is no token's
    cut = f", cut off at --max_tokens={count}" if count == choices["max_tokens"] else ""
    say(f"{count} tokens in {time.time() - began:.2f} s{cut}")
    return "".join(parts)


def read_question(prompt, pictures):
    """What is asked: what was typed, else what is piped in, else, of a picture, the demonstration's question."""
    if not prompt.strip() and sys.stdin and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt.strip() and not pictures:
        raise UserError(
            "there is nothing to answer: give a --prompt, an --image, or --chat=true for a conversation"
        )
    return place_images(prompt.strip() or "What is in the fridge?", pictures)


def read_lines(first):
    """What a user says: `first` if it is not empty, then line after line of standard input until that ends."""
    while True:
        if first.strip():
            yield first.strip()
        print("> ", end="", file=sys.stderr, flush=True)
        first = sys.stdin.readline() if sys.stdin else ""
        if not first:
            return say()


def chat_in_terminal(checkpoint, pictures, prompt, **choices):
    """A conversation in the terminal, an answer to each line; the pictures belong to the first."""
    turns = []
    for line in read_lines(prompt):
        try:
            asked = place_images(line, 0 if turns else len(pictures))
        except UserError as mistake:
            say(f"error: {mistake}")
            continue
        turns.append(("user", asked))
        turns.append(("assistant", print_answer(checkpoint, turns, pictures, **choices)))


def check_overwrite(name, path, start):
    """Raise UserError for a file that is there, and does not begin as what the setting `name` would write over it does."""
    if runner.has_content(path) and not (
        Path(path).is_file() and Path(path).read_bytes().startswith(start)
    ):
        raise UserError(f"--{name}={path} is there, and is something else: name another")


def check_files(typed):
    """Raise UserError for a file that would be written over one that another setting names, or over one that is no such file."""
    named = [
        (f"--{name}", path)
        for name in ("questions", "annotations", "images", "score", "out", "report", "submission")
        if (path := getattr(typed, name))
    ]
    named += [
        (f"the table beside --{name}", runner.metadata_path(path))
        for name in ("score", "out")
        if (path := getattr(typed, name))
    ]
    read = {"--questions", "--annotations", "--images", "--score"}
    for (one, path), (other, same) in itertools.combinations(named, 2):
        if Path(path).resolve() == Path(same).resolve() and not {one, other} <= read:
            raise UserError(f"{other} and {one} are one file, {path}: name another")
    if typed.report:
        check_overwrite("report", typed.report, b"<!doctype html>")


def check_exam(typed):
    """Raise UserError for settings that do not go together."""
    given = [
        name
        for name in ("benchmark", "annotations", "images", "out", "report", "submission")
        if getattr(typed, name)
    ]
    if not (typed.questions or typed.score) and (given or typed.batch != BATCH):
        raise UserError(f"--{(given or ['batch'])[0]} is for an exam: give its --questions")
    if (typed.questions or typed.score) and (typed.image or typed.chat):
        raise UserError(
            "--questions brings its own pictures, and is no conversation: --image and --chat do not go with it"
        )
    if typed.score and (typed.report or typed.images or typed.annotations) and not typed.questions:
        raise UserError(
            f"--{'report' if typed.report else 'images' if typed.images else 'annotations'} wants the --questions, too"
        )
    for name in ("out", "report", "submission"):
        if (path := getattr(typed, name)) and not Path(path).parent.is_dir():
            raise UserError(f"--{name}={path}: there is no folder {Path(path).parent}")
    if typed.batch < 1:
        raise UserError(f"--batch={typed.batch} must be at least 1")
    if typed.out and typed.out.endswith(".json"):
        raise UserError(
            f"--out={typed.out}: the table takes that name, give the answers another, such as {typed.out}l"
        )
    check_files(typed)


def check_idle(typed):
    """Raise UserError for a setting that would change nothing."""
    if typed.score:
        cli.refuse_idle(
            sample,
            vars(typed),
            MARKING + ("prompt",) * bool(typed.questions),
            "where answers are marked again",
        )
    elif typed.temperature == 0:
        idle = (
            {"top_p", "top_k"} if typed.questions else {"top_p", "top_k", "seed"}
        )  # an exam's intervals are drawn, too
        cli.refuse_idle(sample, vars(typed), vars(typed).keys() - idle, "at --temperature=0")


def run_evaluation(typed, choices):
    """Sit an exam, or mark its answers again, and tell how it went."""
    device = distributed.pick_device(typed.device)
    rank, world = distributed.init_distributed(device)
    with distributed.raise_on_all_ranks():
        about = runner.read_metadata(typed.score) if typed.score else {"asked": {"benchmark": "exact"}}
        if not (benchmark := typed.benchmark or (about and about["asked"]["benchmark"])):
            raise UserError(
                f"no {runner.metadata_path(typed.score)} says by which rules {typed.score} is to be marked: give --benchmark"
            )
        benchmarks.find_benchmark(benchmark)
        if typed.out:
            runner.check_output(typed.out, about.get("asked", {}) if typed.score else None)
        if typed.submission:
            benchmarks.format_submission(
                benchmark, []
            )  # refused now, not after the exam, where its owner takes none
            check_overwrite(
                "submission",
                typed.submission,
                f'[{{"{benchmarks.find_benchmark(benchmark).submission[0]}": '.encode(),
            )
        questions = (
            benchmarks.load_questions(
                benchmark, typed.questions, typed.annotations, typed.images, typed.prompt
            )
            if typed.questions
            else []
        )
        checkpoint = (
            None if typed.score else load_checkpoint(typed.model, device, DTYPES[typed.dtype])
        )
        rows = (
            runner.rescore(typed.score, questions, benchmark)
            if typed.score and rank == 0
            else []
        )
    with runner.lock_output(typed.out, rank):
        if not typed.score:
            optimize(checkpoint.model)
            how = dict(benchmark=benchmark, prompt=typed.prompt, out=typed.out, batch=typed.batch)
            rows, about = runner.run_benchmark(checkpoint, questions, rank, world, **how, **choices)
        if rank == 0:
            runner.summarize(
                rows,
                about,
                questions,
                benchmark,
                typed.seed,
                out=typed.out,
                page=typed.report,
                submission=typed.submission,
            )


def sample(
    *,
    model: str = "out/sft",  # a checkpoint, a run's folder (its newest one), or a public LLaVA: its folder or owner/name
    image: list[str] = [],  # a picture; may be repeated
    prompt: str = "",  # the question, <image> in it where a picture belongs; empty: standard input if piped, else what is in the fridge
    chat: bool = False,  # keep talking: the prompt, then a question a line
    benchmark: str = "",  # of an exam: how it is read, asked and marked, such as mmmu (README.md names them); empty: exact, or as --score was
    questions: str = "",  # an exam, as its owner publishes it: a file, a folder or a zip; or JSON lines of id, image, question, answers
    annotations: str = "",  # its right answers, where they are in a file of their own
    images: str = "",  # the folder or zip that its pictures are named from; empty: beside the questions
    out: str = "",  # a file for its answers, JSON lines; if some are there, it goes on. The table goes beside it, as .json
    score: str = "",  # such a file, to be marked again without a model; by the right answers in --questions, if given
    report: str = "",  # a page of HTML for its pictures, questions, answers and marks
    submission: str = "",  # a file for its answers as the owner wants them handed in (coco, vqav2, docvqa, infovqa)
    batch: int = BATCH,  # of its questions, answered at once
    temperature: float = 0.0,  # 0 takes the likeliest token every time; 1 draws as the model believes
    top_p: float = 1.0,  # draw among the fewest likeliest tokens that hold this much of the probability
    top_k: int = 0,  # draw among this many likeliest tokens; 0: among all
    max_tokens: int = 256,  # the longest answer
    seed: int = 0,  # of the draws, and of the resampling that an exam's intervals come from
    device: str = "auto",  # auto, cpu, cuda, cuda:1 (or another card's number) or mps
    dtype: str = "auto",  # of the model's numbers: float32, bfloat16 or float16; auto: what its files have, so that 7B take 14 GB, not 28
    kernels: str = "auto",  # auto: our Triton kernels on CUDA cards that can run them; torch: the formulas in PyTorch
):
    """Answer a question about pictures, or about nothing but words."""
    typed = SimpleNamespace(**locals())
    choices = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    check_ranges(choices)
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is none of {', '.join(DTYPES)}")
    if kernels not in ("auto", "torch"):
        raise UserError(f"--kernels={kernels} is none of auto, torch")
    dispatch.choice = kernels
    if not (score or Path(model).exists() or files.is_repo_id(model)):
        raise UserError(
            f"no such model: {model}; `python train.py` makes out/sft, the demonstration's"
        )
    check_exam(typed)
    check_idle(typed)
    if questions or score:
        return run_evaluation(typed, choices)
    asked = "" if chat else read_question(prompt, len(image))
    checkpoint = load_checkpoint(model, distributed.pick_device(device), DTYPES[dtype])
    optimize(checkpoint.model)
    pictures = load_images(image, checkpoint.image_config)
    if chat:
        chat_in_terminal(checkpoint, pictures, prompt, **choices)
    else:
        print_answer(checkpoint, [("user", asked)], pictures, **choices)


def check_ranges(choices):
    """One UserError that names every choice out of its range."""
    rules = {  # where float32 could make a quotient infinite or a share 0, torch would draw from nothing
        "temperature": ("0 or from 0.001 to 1000", lambda x: x == 0 or 0.001 <= x <= 1000),
        "top_p": ("from 0.001 to 1", lambda x: 0.001 <= x <= 1),
        "top_k": ("at least 0 and below 2^31", lambda x: 0 <= x < 2**31),
        "max_tokens": (f"from 1 to {MAX_SEQUENCE:,}", lambda x: 1 <= x <= MAX_SEQUENCE),
        "seed": ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63),
    }
    wrong = [
        f"--{name}={choices[name]} must be {must}"
        for name, (must, holds) in rules.items()
        if not holds(choices[name])
    ]
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    cli.run(sample)
