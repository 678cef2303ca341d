"""Ask a vision-language model about images:

    python sample.py --image fridge.jpg
    python sample.py --image fridge.jpg --chat=true
    python sample.py --model=out/sft --image a.jpg --image b.jpg --prompt "What was taken out?"
    python sample.py --model=llava-hf/llava-v1.6-mistral-7b-hf --image a.jpg
    echo "Is there any milk?" | python sample.py --image fridge.jpg

Only the answer goes to standard output. If no question is typed or piped, an image is asked
"What is in the fridge?".

Evaluate it on a benchmark, your own questions or a public one:

    python sample.py --questions=data/demo/fridge/questions.jsonl --images=data/demo/fridge/images
    torchrun --nproc_per_node=8 sample.py --benchmark=mmmu --questions=MMMU --out=mmmu.jsonl
    python sample.py --score=mmmu.jsonl
"""

import itertools
import os
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

# ---- settings ----


def sample(
    *,
    # --- model and question
    model: str = "",  # a checkpoint, run or LLaVA, or owner/name; empty: out/sft, else out/demo/sft
    image: list[str] = [],  # an image file; may be repeated
    prompt: str = "",  # the question, <image> for each image; empty: standard input, else a default
    chat: bool = False,  # a conversation: answer the prompt, then each line of standard input
    # --- benchmark
    benchmark: str = "",  # how to read, ask and score the questions, such as mmmu; empty: exact
    questions: str = "",  # the benchmark's questions: a file, folder or zip, as published, or JSONL
    annotations: str = "",  # the benchmark's reference answers, if they are in a separate file
    images: str = "",  # folder or zip of the benchmark's images; empty: beside the questions
    out: str = "",  # write or resume the answers, a .jsonl file; the scores go to the .json
    score: str = "",  # score the answers in this file again, without a model
    report: str = "",  # write an HTML page of images, questions, answers and scores
    submission: str = "",  # write the answers as coco, vqav2, docvqa or infovqa want them submitted
    batch: int = 16,  # questions of a benchmark that are answered at once
    # --- generation
    temperature: float = 0.0,  # 0: greedy, the likeliest token; 1: sample from the model's softmax
    top_p: float = 1.0,  # sample from the fewest tokens that hold this much of the probability
    top_k: int = 0,  # sample from this many likeliest tokens; 0: from all
    max_tokens: int = 256,  # the longest answer, in tokens
    seed: int = 0,  # of sampling, and of the bootstrap for a benchmark's confidence intervals
    # --- device
    device: str = "auto",  # auto, cpu, cuda, cuda:1 (or another GPU's number) or mps
    dtype: str = "auto",  # of the weights: float32, bfloat16, float16; auto: as in the checkpoint
    kernels: str = "auto",  # auto: Triton kernels on GPUs that can run them; torch: plain PyTorch
):
    """Answer a question about images, or about text alone; or evaluate a model on a benchmark."""
    settings = SimpleNamespace(**locals())
    check_rules(settings)
    if not (model or score):
        settings.model = model = default_model()
    dispatch.choice = kernels
    generation = dict(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed
    )
    if questions or score:
        return run_evaluation(settings, generation)
    question = "" if chat else read_question(prompt, len(image))
    checkpoint = load_checkpoint(model, distributed.pick_device(device), WEIGHT_DTYPES[dtype])
    optimize(checkpoint.model)
    loaded = load_images(image, checkpoint.image_config)
    if chat:
        chat_in_terminal(checkpoint, loaded, prompt, **generation)
    else:
        generate_and_print(checkpoint, [("user", question)], loaded, **generation)


# ---- rules that the settings must meet ----

WEIGHT_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ALLOWED_VALUES = {"dtype": WEIGHT_DTYPES, "kernels": ("auto", "torch")}
RANGES = {  # a smaller temperature or top_p gives infinity or a probability of 0 in float32
    "temperature": ("0 or from 0.001 to 1000", lambda x: x == 0 or 0.001 <= x <= 1000),
    "top_p": ("from 0.001 to 1", lambda x: 0.001 <= x <= 1),
    "top_k": ("at least 0 and below 2^31", lambda x: 0 <= x < 2**31),
    "max_tokens": (f"from 1 to {MAX_SEQUENCE:,}", lambda x: 1 <= x <= MAX_SEQUENCE),
    "seed": ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63),
    "batch": ("at least 1", lambda x: x >= 1),
}
NEEDS = [  # (settings, at least one of which must be given with them)
    ("benchmark annotations images out report submission batch", "questions score"),
    ("annotations images report", "questions"),
]
EXCLUDES = [("questions score", "image chat")]
UNUSED = [  # (settings, that change nothing if this holds, in words)
    (
        "model batch temperature top_p top_k max_tokens dtype kernels",
        lambda s: s.score,
        "if answers are scored again",
    ),
    ("prompt", lambda s: s.score and not s.questions, "if answers are scored again"),
    ("top_p top_k", lambda s: s.temperature == 0, "at --temperature=0"),
    ("seed", lambda s: s.temperature == 0 and not (s.questions or s.score), "at --temperature=0"),
]


DEFAULT_MODELS = ("out/sft", "out/demo/sft")  # your own, else the demonstration's


def default_model():
    """Returns the model to use without --model, and prints it."""
    for model in DEFAULT_MODELS:
        if Path(model).exists():
            if os.environ.get("RANK", "0") == "0":
                cli.print_status(f"--model={model}")
            return model
    raise UserError(
        f"there is no {' or '.join(DEFAULT_MODELS)}: give a --model, or run `python train.py`, "
        f"the demonstration, which makes {DEFAULT_MODELS[-1]}"
    )


def check_rules(settings):
    """Raises UserError for settings out of range, in conflict, without effect, or without a file.

    The tables above hold the rules.
    """
    values = vars(settings)
    changed = cli.changed_settings(sample, values)
    check_ranges({name: values[name] for name in RANGES})
    for name, choices in ALLOWED_VALUES.items():
        if values[name] not in choices:
            raise UserError(f"--{name}={values[name]} is none of {', '.join(choices)}")
    model = settings.model
    if model and not (settings.score or Path(model).exists() or files.is_repo_id(model)):
        raise UserError(f"no such model: {model}; `python train.py` makes {DEFAULT_MODELS[-1]}")
    for names, needed in NEEDS:
        typed = [name for name in names.split() if name in changed]
        if typed and not any(values[name] for name in needed.split()):
            raise UserError(f"--{typed[0]} needs --{needed.replace(' ', ' or --')}")
    for names, others in EXCLUDES:
        name = next((name for name in names.split() if values[name]), None)
        other = next((name for name in others.split() if values[name]), None)
        if name and other:
            raise UserError(f"--{name} and --{other} do not go together")
    check_files(settings)
    for names, condition, text in UNUSED:
        for name in names.split():
            if name in changed and condition(settings):
                raise UserError(f"--{name}={cli.format_value(values[name])} changes nothing {text}")


def check_ranges(values):
    """Raises one UserError that names every value out of its range."""
    wrong = []
    for name, value in values.items():
        allowed, is_allowed = RANGES[name]
        if not is_allowed(value):
            wrong.append(f"--{name}={value} must be {allowed}")
    if wrong:
        raise UserError("; ".join(wrong))


def check_files(settings):
    """Raises UserError for a file that cannot be written, or that would overwrite another one."""
    inputs = ("questions", "annotations", "images", "score")
    outputs = ("out", "report", "submission")
    paths = {f"--{name}": getattr(settings, name) for name in (*inputs, *outputs)}
    for name in outputs:
        if (path := paths[f"--{name}"]) and not Path(path).parent.is_dir():
            raise UserError(f"--{name}={path}: there is no folder {Path(path).parent}")
    if settings.out.endswith(".json"):
        raise UserError(
            f"--out={settings.out}: the scores take this name; use another for the answers, "
            f"such as {settings.out}l"
        )
    for name in ("score", "out"):
        if path := getattr(settings, name):
            paths[f"the scores beside --{name}"] = runner.metadata_path(path)
    named = [(name, path) for name, path in paths.items() if path]
    for (one, path), (other, same) in itertools.combinations(named, 2):
        both_read = {one, other} <= {f"--{name}" for name in inputs}
        if Path(path).resolve() == Path(same).resolve() and not both_read:
            raise UserError(f"{other} and {one} are one file, {path}: choose another")
    if settings.report:
        check_overwrite("report", settings.report, b"<!doctype html>")


def check_overwrite(name, path, start):
    """Raises UserError if the file of a setting exists and does not begin with `start`."""
    if runner.has_content(path) and not (
        Path(path).is_file() and Path(path).read_bytes().startswith(start)
    ):
        raise UserError(f"--{name}={path} exists and is something else: choose another file")


# ---- one question, or a conversation ----


def read_question(prompt, image_count):
    """Returns the prompt, or else standard input if it is piped, or else a default for images."""
    if not prompt.strip() and sys.stdin and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt.strip() and not image_count:
        raise UserError(
            "there is no question: give a --prompt, an --image, or --chat=true for a conversation"
        )
    return place_images(prompt.strip() or "What is in the fridge?", image_count)


def place_images(text, image_count):
    """Returns the text with one <image> per image; puts them in front if the text has none."""
    placed = text.count("<image>")
    if placed not in (0, image_count):
        raise UserError(f"the question has {placed} <image>, but {image_count} images are given")
    # Python decodes the bytes of standard input that are no text as lone surrogates.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        encoding = sys.stdin.encoding if sys.stdin else "UTF-8"
        raise UserError(f"the question is not text in {encoding}: {text[:80]!r}")
    return text if placed else "<image>\n" * image_count + text


def load_images(paths, image_config):
    return [image_processing.load_image(path, image_config) for path in paths]


def stream_answer(checkpoint, turns, images, **generation):
    """Yields the answer to a conversation, a piece of text per token and one for what remains.

    A character may take several tokens: their pieces are empty until the last one.
    """
    text, ids = checkpoint.tokenizer.stream(), encode_prompt(checkpoint, turns, images)
    check_prompt_lengths(checkpoint, [len(ids)], generation["max_tokens"])
    stop = {chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template)}
    inputs = packing.collate_images(images, checkpoint.image_config)
    for (next_id,) in generate(checkpoint.model, [ids], **inputs, stop=stop, **generation):
        if next_id not in stop:
            yield text.push(next_id)
    yield text.flush()


def generate_and_print(checkpoint, turns, images, **generation):
    """Prints the answer to a conversation while it is generated; returns all of it."""
    start, parts = time.time(), []
    for part in stream_answer(checkpoint, turns, images, **generation):
        parts.append(part)
        print(part, end="", flush=True)
    print(flush=True)
    count = len(parts) - 1  # the last part belongs to no token
    cut = f", cut off at --max_tokens={count}" if count == generation["max_tokens"] else ""
    cli.print_status(f"{count} tokens in {time.time() - start:.2f} s{cut}")
    return "".join(parts)


def read_lines(first):
    """Yields `first` if it is not empty, then each line of standard input."""
    while True:
        if first.strip():
            yield first.strip()
        print("> ", end="", file=sys.stderr, flush=True)
        first = sys.stdin.readline() if sys.stdin else ""
        if not first:
            return cli.print_status()


def chat_in_terminal(checkpoint, images, prompt, **generation):
    """Answers the prompt and each line of standard input; the images belong to the first turn."""
    turns = []
    for line in read_lines(prompt):
        try:
            question = place_images(line, 0 if turns else len(images))
        except UserError as error:
            cli.print_status(f"error: {error}")
            continue
        turns.append(("user", question))
        turns.append(("assistant", generate_and_print(checkpoint, turns, images, **generation)))


# ---- a benchmark ----


def run_evaluation(settings, generation):
    """Answers a benchmark's questions, or scores their answers again; prints and writes both."""
    device = distributed.pick_device(settings.device)
    rank, world = distributed.init_distributed(device)
    metadata, checkpoint, results = {}, None, []
    with distributed.raise_on_all_ranks():
        if settings.score:
            metadata = runner.read_metadata(settings.score)
        benchmark = find_benchmark_name(settings, metadata)
        check_outputs(settings, benchmark, metadata)
        questions = []
        if settings.questions:
            questions = benchmarks.load_questions(
                benchmark,
                settings.questions,
                settings.annotations,
                settings.images,
                settings.prompt,
            )
        if not settings.score:
            checkpoint = load_checkpoint(settings.model, device, WEIGHT_DTYPES[settings.dtype])
        elif rank == 0:
            results = runner.rescore(settings.score, questions, benchmark)
    with runner.lock_output(settings.out, rank):
        if checkpoint:
            optimize(checkpoint.model)
            results, metadata = runner.run_benchmark(
                checkpoint,
                questions,
                rank,
                world,
                benchmark=benchmark,
                prompt=settings.prompt,
                out=settings.out,
                batch=settings.batch,
                **generation,
            )
        if rank == 0:
            runner.summarize(
                results,
                metadata,
                questions,
                benchmark,
                settings.seed,
                out=settings.out,
                page=settings.report,
                submission=settings.submission,
            )


def find_benchmark_name(settings, metadata):
    """Returns --benchmark, or else the one that the answers were scored by, or else exact."""
    if settings.benchmark:
        return settings.benchmark
    if not settings.score:
        return "exact"
    if not metadata:
        raise UserError(
            f"there is no {runner.metadata_path(settings.score)} that names the benchmark of "
            f"{settings.score}: give --benchmark"
        )
    return metadata["settings"]["benchmark"]


def check_outputs(settings, benchmark, metadata):
    """Raises UserError, before the first question, for outputs that could not be written."""
    submission_keys = benchmarks.find_benchmark(benchmark).submission_keys
    if settings.out:
        known = metadata.get("settings", {}) if settings.score else None
        runner.check_output(settings.out, known)
    if settings.submission:
        benchmarks.format_submission(benchmark, [])
        start = f'[{{"{submission_keys[0]}": '.encode()
        check_overwrite("submission", settings.submission, start)


if __name__ == "__main__":
    cli.run_script(sample)
