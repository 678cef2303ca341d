"""Ask a vision-language model about images:

    python sample.py --image fridge.jpg
    python sample.py --image fridge.jpg --chat=true
    python sample.py --image fridge.jpg --attention_map=attention.html
    python sample.py --model=out/sft --image a.jpg --image b.jpg --prompt "What was taken out?"
    python sample.py --model=llava-hf/llava-v1.6-mistral-7b-hf --image a.jpg
    echo "Is there any milk?" | python sample.py --image fridge.jpg
    python sample.py --serve=8000

Only the answer goes to standard output. If no question is typed or piped, it is "Describe this
image." or, for the demonstration's model, "What is in the fridge?". --serve is a chat page and
OpenAI's API (nanovlm/server/README.md).

Evaluate it on a benchmark, your own questions or a public one:

    python sample.py --questions=data/demo/fridge/questions.jsonl --images=data/demo/fridge/images
    torchrun --nproc_per_node=8 sample.py --benchmark=mmmu --questions=MMMU --out=mmmu.jsonl
    python sample.py --score=mmmu.jsonl
"""

import signal

if __name__ == "__main__":
    # Ctrl-C prints nothing while torch is imported, which takes seconds. cli.run_script ends that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch

from nanovlm import UserError, cli, distributed
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.data import chat_template, image_processing, packing
from nanovlm.data.turns import LONE_SURROGATE
from nanovlm.evals import benchmarks, runner
from nanovlm.evals.runner import MAX_SEQUENCE
from nanovlm.files import size_rules
from nanovlm.inference.generate import generate
from nanovlm.inference.optimize import optimize
from nanovlm.kernels import dispatch
from nanovlm.server.server import serve_chat
from nanovlm.visualize.attention_map import record_answer, write_image, write_page

# ---- settings ----


def sample(
    *,
    # --- model and question
    model: str = "",  # a checkpoint, run, VLM folder or owner/name; unset: out/sft or out/demo/sft
    image: list[str] = [],  # an image file; may be repeated
    prompt: str = "",  # question, with <image>s; unset: standard input, or "Describe this image."
    chat: bool = False,  # a conversation: answer the prompt, then each line of standard input
    attention_map: str = "",  # write where it looked: a page (.html) or an image (.png)
    logit_lens: bool = False,  # on that page: what each image token would say next, by layer
    # --- server
    serve: int = 0,  # a port: serve a chat page and an OpenAI-compatible API there
    host: str = "127.0.0.1",  # 127.0.0.1: for this machine alone; 0.0.0.0: for all that reach it
    api_key: str = "",  # the key that each request must send
    # --- benchmark
    benchmark: str = "",  # how to read, ask and score the questions, such as mmmu; unset: exact
    questions: str = "",  # the benchmark's questions: a file or folder, as published, or JSONL
    annotations: str = "",  # the benchmark's reference answers, if they are in a separate file
    images: str = "",  # folder or zip of the benchmark's images; unset: beside the questions
    allow_outside_images: bool = False,  # read images outside it, too: you trust the questions
    out: str = "",  # write or resume the answers, a .jsonl file; the scores go to the .json
    score: str = "",  # score the answers in this file again, without a model
    report: str = "",  # write an HTML page of images, questions, answers and scores
    submission: str = "",  # write the answers as coco, vqav2, docvqa or infovqa want them submitted
    batch_size: int = 16,  # questions of a benchmark that are answered at once
    # --- generation
    temperature: float = 0.0,  # 0: greedy, the likeliest token; 1: sample from the model's softmax
    top_p: float = 1.0,  # sample from the fewest tokens that hold this much of the probability
    top_k: int = 0,  # sample from this many likeliest tokens; 0: from all
    max_tokens: int = 256,  # the longest answer, in tokens
    logprobs: bool = False,  # print each token's probability, or keep the mean of each answer
    seed: int = 0,  # of sampling, and of the bootstrap for a benchmark's confidence intervals
    # --- device
    device: str = "auto",  # auto, cpu, cuda, cuda:1 (or another GPU's number) or mps
    dtype: str = "auto",  # of the weights: float32, bfloat16, float16; auto: as in the checkpoint
    kernels: str = "auto",  # auto: Triton kernels on GPUs that can run them; torch: plain PyTorch
):
    """Answer a question about images, or about text alone; or evaluate a model on a benchmark."""
    settings = SimpleNamespace(**locals())
    cli.check_rules(cli.changed_settings(sample, vars(settings)), RULES, settings)
    if not (model or score):
        settings.model = model = default_model()
    dispatch.choice = kernels
    generation = dict(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed
    )
    if logprobs:  # else an evaluation has the settings of earlier versions, and resumes theirs
        generation["logprobs"] = True
    if questions or score:
        return run_evaluation(settings, generation)
    question = "" if chat or serve else read_question(prompt, len(image), model)
    checkpoint = load_model(model, distributed.pick_device(device), dtype)
    if serve:
        return serve_chat(
            host,
            serve,
            checkpoint=checkpoint,
            name=model,
            stream_answer=stream_answer,
            generation=generation,
            rules=GENERATION_RULES,
            api_key=api_key,
        )
    loaded = [image_processing.load_image(path, checkpoint.image_config) for path in image]
    if chat:
        return chat_in_terminal(checkpoint, loaded, prompt, **generation)
    turns = [("user", question)]
    if attention_map:
        return print_recorded(checkpoint, turns, loaded, attention_map, logit_lens, **generation)
    generate_and_print(checkpoint, turns, loaded, **generation)


# ---- rules that the settings must meet ----

WEIGHT_DTYPES = ("auto", "float32", "bfloat16", "float16")
# (settings, whether a value x is allowed beside settings s, what is wrong if not)
GENERATION_RULES = [  # also of the requests to a server
    # a smaller temperature or top_p gives infinity or a probability of 0 in float32
    ("temperature", lambda x, s: x == 0 or 0.001 <= x <= 1000, "must be 0 or from 0.001 to 1000"),
    ("top_p", lambda x, s: 0.001 <= x <= 1, "must be from 0.001 to 1"),
    ("top_k", lambda x, s: 0 <= x < 2**31, "must be at least 0 and below 2^31"),
    ("max_tokens", lambda x, s: 1 <= x <= MAX_SEQUENCE, f"must be from 1 to {MAX_SEQUENCE:,}"),
    ("seed", lambda x, s: 0 <= x < 2**63, "must be at least 0 and below 2^63"),
]
RULES = [
    *GENERATION_RULES,
    ("serve", lambda x, s: 1 <= x < 2**16, "must be from 1 to 65535"),
    (
        "serve",
        lambda x, s: not (s.image or s.prompt or s.chat or s.questions or s.score or s.logprobs),
        "excludes --image, --prompt, --chat, --questions, --score and --logprobs",
    ),
    ("host api_key", lambda x, s: s.serve, "needs --serve"),
    ("host", lambda x, s: s.api_key, "needs --api_key: all who reach it could use the model"),
    ("batch_size", lambda x, s: x >= 1, "must be at least 1"),
    *size_rules("batch_size"),
    cli.one_of("dtype", *WEIGHT_DTYPES),
    cli.one_of("kernels", "auto", "torch"),
    ("questions score", lambda x, s: not (s.image or s.chat), "excludes --image and --chat"),
    (
        "benchmark annotations images out report submission batch_size",
        lambda x, s: s.questions or s.score,
        "needs --questions or --score",
    ),
    (
        "annotations images allow_outside_images report",
        lambda x, s: s.questions,
        "needs --questions",
    ),
    (
        "model batch_size temperature top_p top_k max_tokens logprobs dtype kernels",
        lambda x, s: not s.score,
        "changes nothing if answers are scored again",
    ),
    (
        "prompt",
        lambda x, s: s.questions or not s.score,
        "changes nothing if answers are scored again",
    ),
    (
        "top_p top_k",
        lambda x, s: s.temperature > 0 or s.serve,  # a request may give a temperature
        "changes nothing at --temperature=0",
    ),
    (
        "seed",
        lambda x, s: s.temperature > 0 or s.questions or s.score or s.serve,
        "changes nothing at --temperature=0",
    ),
    (
        "questions annotations images score out report",
        lambda x, s: not os.path.exists(x) or os.path.isfile(x) or os.path.isdir(x),
        "is a pipe or a device",
    ),
    (
        "attention_map out report submission",
        lambda x, s: os.access(f"{os.path.dirname(os.path.realpath(x))}/.", os.W_OK),
        "is in no existing folder that can be written",
    ),
    (
        "out",  # the scores go to the .json
        lambda x, s: x.endswith(".jsonl") and x != s.score,
        "must end in .jsonl, and not be the file of --score",
    ),
    (
        "attention_map",
        lambda x, s: not (s.chat or s.questions or s.score or s.logprobs or s.serve),
        "excludes --chat, --questions, --score, --logprobs and --serve",
    ),
    (
        "attention_map",
        lambda x, s: x.endswith((".html", ".png")) and is_missing_or_page(x),
        "must end in .html or .png, and be a new file or an older page",
    ),
    (
        "logit_lens",
        lambda x, s: s.image and s.attention_map.endswith(".html"),
        "needs an --image and --attention_map=FILE.html",
    ),
    (
        "report",
        lambda x, s: x.endswith(".html") and is_missing_or_page(x),
        "must end in .html, and be a new file or an older report",
    ),
    (
        "submission",
        lambda x, s: x.endswith(".json") and f"{x}l" != s.out and not Path(x).exists(),
        "must end in .json, and be a new file, not the scores of --out",
    ),
]


def is_missing_or_page(path):
    return not Path(path).exists() or Path(path).read_bytes().startswith(b"<!doctype html>")


# ---- the model and the question ----

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


def load_model(model, device, dtype):
    """Returns a checkpoint for inference; dtype "auto" keeps the dtypes of its file."""
    checkpoint = load_checkpoint(model, device, None if dtype == "auto" else getattr(torch, dtype))
    optimize(checkpoint.model)
    return checkpoint


def read_question(prompt, image_count, model):
    """Returns the prompt, or else standard input if it is piped, or else a default for images."""
    if not prompt.strip() and sys.stdin and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt.strip() and not image_count:
        raise UserError(
            "there is no question: give a --prompt, an --image, or --chat=true for a conversation"
        )
    is_demonstration = Path(model).is_relative_to("out/demo")
    default = "What is in the fridge?" if is_demonstration else "Describe this image."
    return prepare_question(prompt.strip() or default, image_count)


def prepare_question(text, image_count):
    """Returns a question with one <image> per image. Raises UserError if it cannot be one."""
    # Python decodes the bytes of standard input that are not text as lone surrogates.
    if LONE_SURROGATE.search(text):
        encoding = sys.stdin.encoding if sys.stdin else "UTF-8"
        raise UserError(f"the question is not text in {encoding}: {text[:80]!r}")
    return chat_template.place_images(text, image_count)


# ---- one question, or a conversation ----


def stream_answer(checkpoint, turns, images, **generation):
    """Yields the answer to a conversation, a piece of text per token and one for what remains.

    A character may take several tokens: their pieces are empty until the last one.
    """
    text = checkpoint.tokenizer.stream()
    ids = chat_template.encode_prompt(checkpoint, turns, images)
    runner.check_prompt_lengths(checkpoint, [len(ids)], generation["max_tokens"])
    stop = {chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template)}
    inputs = packing.collate_images(images, checkpoint.image_config)
    for (next_id,) in generate(checkpoint.model, [ids], **inputs, stop=stop, **generation):
        if next_id not in stop:
            yield text.push(next_id)
    yield text.flush()


def generate_and_print(checkpoint, turns, images, logprobs=False, **generation):
    """Prints the answer to a conversation while it is generated; returns all of it."""
    start, parts, steps = time.time(), [], [] if logprobs else None
    for part in stream_answer(checkpoint, turns, images, logprobs=steps, **generation):
        parts.append(part)
        print(for_terminal(part), end="", flush=True)
    print(flush=True)
    mean = print_probabilities(checkpoint.tokenizer, steps) if logprobs else ""
    count = len(parts) - 1  # the last part belongs to no token
    cut = f", cut off at --max_tokens={count}" if count == generation["max_tokens"] else ""
    cli.print_status(f"{count} tokens in {time.time() - start:.2f} s{cut}{mean}")
    return "".join(parts)


def for_terminal(text):
    """Returns an answer with its control characters as text, if a terminal would obey them."""
    is_terminal = sys.stdout and sys.stdout.isatty()
    return text.translate(cli.CONTROL_CHARACTERS) if is_terminal else text


def print_probabilities(tokenizer, steps):
    """Prints each token of an answer behind its probability; returns their mean as text.

    steps: the `logprobs` of generate. It is the model's own probability, whatever the temperature.
    """
    logprobs = []
    for ((next_id, logprob),) in steps:
        text = tokenizer.bytes_of.get(next_id, b"").decode(errors="replace")
        cli.print_status(f"{math.exp(logprob):.4f} {text!r}")
        logprobs.append(logprob)
    return f", mean log-probability {fmean(logprobs):.4f}"


def print_recorded(checkpoint, turns, images, path, with_lens, **generation):
    """Prints the answer to a conversation, and writes where the model looked for it."""
    found = record_answer(checkpoint, turns, images, with_lens, **generation)
    write = write_page if path.endswith(".html") else write_image
    write(found, path)
    print(for_terminal(found.answer))
    cli.print_status(f"{len(found.tokens)} tokens, shown in {path}")


def chat_in_terminal(checkpoint, images, prompt, **generation):
    """Answers the prompt and each line of standard input; the images belong to the first turn."""
    turns, line = [], prompt
    while True:
        if line.strip():
            try:
                question = prepare_question(line.strip(), 0 if turns else len(images))
                new_turns = [*turns, ("user", question)]
                answer = generate_and_print(checkpoint, new_turns, images, **generation)
                turns = [*new_turns, ("assistant", answer.strip())]
            except UserError as error:
                cli.print_status(f"error: {error}")
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin else ""
        if not line:
            return cli.print_status()


# ---- a benchmark ----


def run_evaluation(settings, generation):
    """Answers a benchmark's questions, or scores their answers again; prints and writes both."""
    device = distributed.pick_device(settings.device)
    rank, _ = distributed.init_distributed(device)
    metadata, questions = {}, []
    with distributed.raise_on_all_ranks():
        if settings.score:
            metadata = runner.read_metadata(settings.score)
            if not (settings.benchmark or metadata):
                raise UserError(
                    f"there is no {runner.metadata_path(settings.score)} that names the benchmark "
                    f"of {settings.score}: give --benchmark"
                )
        # the one that the answers were scored by before
        benchmark = metadata.get("settings", {}).get("benchmark", "exact")
        benchmark = settings.benchmark or benchmark
        benchmarks.find_benchmark(benchmark)
        if settings.submission:
            benchmarks.format_submission(benchmark, [])
        if settings.out:
            known = metadata.get("settings", {}) | {"benchmark": benchmark}
            runner.check_output(settings.out, known if settings.score else None)
        if settings.questions:
            questions = benchmarks.load_questions(
                benchmark,
                settings.questions,
                settings.annotations,
                settings.images,
                settings.prompt,
                settings.allow_outside_images,
            )
        if settings.score:
            results = runner.rescore(settings.score, questions, benchmark)
        else:
            checkpoint = load_model(settings.model, device, settings.dtype)
    with runner.lock_output(settings.out):
        if not settings.score:
            results, metadata = runner.run_benchmark(
                checkpoint,
                questions,
                benchmark=benchmark,
                prompt=settings.prompt,
                out=settings.out,
                batch_size=settings.batch_size,
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


if __name__ == "__main__":
    cli.run_script(sample)
