"""Evaluation: a model answers a benchmark's questions, in batches, on any number of ranks.

answers.jsonl  a line per question, written as soon as it is answered: id, kind, images, references,
               what else the score needs, the rendered prompt, the answer, its number of tokens,
               whether it was cut off at --max_tokens and, with --logprobs, its mean_logprob. Once
               all are answered, the lines are in the questions' order and have their scores (null:
               it cannot be parsed).
answers.json   the settings, the model's history, the command and the versions, which are enough to
               repeat the evaluation; and the table of scores
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from .. import IMAGE_TOKEN_ID, UserError, cli, distributed, files
from ..data import chat_template, image_files, image_processing, image_refs, packing
from ..inference.generate import generate
from ..training.recipes import read_saved_settings
from . import report
from .benchmarks import benchmark_metrics, format_submission, score_results

MAX_SEQUENCE = 1 << 20  # tokens of prompt and answer: the KV cache is allocated for all of them


class Output(NamedTuple):
    """What the model generated for a prompt."""

    prompt: str  # the rendered prompt, with <image> for each image
    answer: str
    tokens: int
    cut: bool  # it has max_tokens tokens and no end token
    mean_logprob: float | None = None  # of its tokens, with the end token; None: not computed


# ---- prompts ----


def render_prompt(checkpoint, turns):
    """Returns a conversation as text, with <image> for each image."""
    ids, _ = chat_template.render_conversation(
        turns, checkpoint.tokenizer, checkpoint.chat_template
    )
    text = ""
    for is_image, part in itertools.groupby(ids, lambda i: i == IMAGE_TOKEN_ID):
        part = list(part)
        text += "<image>" * len(part) if is_image else checkpoint.tokenizer.decode(part)
    return text


def load_prompt(question, image_config):
    """Returns (text, [ProcessedImage]) of a question."""
    images = []
    for ref in question["image"]:
        content, name = image_refs.load_image_bytes(ref)
        images.append(image_processing.load_image(content, image_config, name=name))
    return question["question"], images


def read_image_size(ref):
    """Returns (width, height) of an image without decoding it.

    It is nearly always the size of the loaded image, which is enough to sort by.
    """
    content, name = image_refs.load_image_bytes(ref)
    with image_files.image_errors(name):
        return image_files.open_image(content, lambda image: image.size)


def prompt_lengths(checkpoint, questions):
    """Returns the number of tokens of each question's prompt."""
    sizes, image_config = {}, checkpoint.image_config
    has_one_tile = image_config["fit"] in image_processing.FITS  # whatever the size of the image
    lengths = []
    for question in questions:
        images = []
        for ref in question["image"]:
            if ref not in sizes:
                sizes[ref] = (1, 1) if has_one_tile else read_image_size(ref)
            images.append(image_processing.plan_image(sizes[ref], image_config))
        turns = [("user", question["question"])]
        lengths.append(len(chat_template.encode_prompt(checkpoint, turns, images)))
    return lengths


def check_prompt_lengths(checkpoint, lengths, max_tokens):
    """Raises UserError for prompts too long for any memory; warns of prompts longer than those that
    the model was trained on."""
    longest = max(lengths, default=0)
    if longest + max_tokens > MAX_SEQUENCE:
        raise UserError(
            f"{longest:,} tokens of prompt and --max_tokens={max_tokens} are more than "
            f"{MAX_SEQUENCE:,} together"
        )
    path = Path(checkpoint.history["folder"]) / "training.json"
    seq_len = read_saved_settings(path)["seq_len"] if path.is_file() else longest
    if longest > seq_len:
        count = sum(length > seq_len for length in lengths)
        cli.print_status(
            f"the longest prompt takes {longest:,} tokens, but the model was trained on sequences "
            f"of {seq_len:,}: {count:,} of {len(lengths):,} answers may be poor"
        )


# ---- answers ----


def generate_answers(
    checkpoint, prompts, *, blank_images=False, autocast=None, logprobs=False, **generation
):
    """Returns the Output for each of the prompts, (text with <image> for each image, [images]).

    They are generated as one batch. blank_images: all images are gray. autocast: a context for the
    model's calls. logprobs: whether an Output has its mean_logprob. generation: of generate. All
    ranks call a sharded model equally often: until the last answer of any rank has ended.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    end = chat_template.end_token_id(tokenizer, checkpoint.chat_template)
    prompt_ids, prompt_texts, all_images = [], [], []
    for text, images in prompts:
        turns = [("user", text)]
        prompt_ids.append(chat_template.encode_prompt(checkpoint, turns, images))
        prompt_texts.append(render_prompt(checkpoint, turns))
        all_images += images
    inputs = packing.collate_images(all_images, checkpoint.image_config)
    if blank_images:
        inputs["tiles_NCYX"].fill_(128)
    is_sharded = distributed.is_sharded(model)
    stop = set() if is_sharded else {end}
    generated, token_logprobs = [[] for _ in prompts], [] if logprobs else None
    with autocast or contextlib.nullcontext(), distributed.unsharded(model):
        for step in generate(
            model, prompt_ids, **inputs, stop=stop, logprobs=token_logprobs, **generation
        ):
            for ids, next_id in zip(generated, step, strict=True):
                if not ids or ids[-1] != end:
                    ids.append(next_id)
            if is_sharded:
                unfinished = sum(ids[-1] != end for ids in generated)
                if not distributed.all_reduce_sum([unfinished], model.mean_C11.device)[0]:
                    break
    outputs = []
    for number, (prompt, ids) in enumerate(zip(prompt_texts, generated, strict=True)):
        answer, mean = tokenizer.decode([i for i in ids if i != end]), None
        if logprobs:
            # rounded: the last digits depend on the size of the batch
            mean = round(fmean(step[number][1] for step in token_logprobs[: len(ids)]), 4)
        outputs.append(Output(prompt, answer, len(ids), ids[-1] != end, mean))
    return outputs


def batches_by_length(lengths, batch_size):
    """Returns the indices of the questions in batches, the shortest prompts first.

    Prompts of similar length need little padding.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def answer_questions(checkpoint, questions, *, batch_size=16, done=(), lengths=None, **options):
    """Yields, on every rank, the [(index of a question, Output)] of all ranks, round by round.

    done: indices of questions that are answered already. They count when batches are formed, so
    that a resumed evaluation gives the same answers. The longest prompts come first: if they do not
    fit into memory, this shows at once. lengths: those of the prompts, if known. options: of
    generate_answers.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    with distributed.raise_on_all_ranks():
        lengths = lengths or prompt_lengths(checkpoint, questions)
    batches = []
    for members in reversed(batches_by_length(lengths, batch_size)):
        remaining = [i for i in members if i not in done]
        if remaining:
            batches.append(remaining)
    # In the last round, a rank without a batch repeats the last one: under FSDP all ranks must call
    # the model.
    last = len(batches) - 1
    own_batches = [batches[min(i + rank, last)] for i in range(0, len(batches), world)]

    def load(members):
        return [load_prompt(questions[i], checkpoint.image_config) for i in members]

    with ThreadPoolExecutor(1) as reader:
        loading = (reader.submit(load, members) for members in own_batches)
        next_prompts = next(loading, None)
        for members in own_batches:
            with distributed.raise_on_all_ranks():
                prompts = next_prompts.result()
            next_prompts = next(loading, None)  # read while these are answered
            outputs = generate_answers(checkpoint, prompts, **options)
            pairs = distributed.all_gather_object(list(zip(members, outputs, strict=True)))
            yield list(dict(itertools.chain(*pairs)).items())  # without the repeated ones


def evaluate(checkpoint, questions, *, benchmark="exact", **options):
    """Returns the table of a benchmark's scores, on every rank.

    It also works during training (see generate_answers). options: of answer_questions.
    """
    outputs = []
    for pairs in answer_questions(checkpoint, questions, **options):
        outputs += pairs
    results = [make_result(questions[i], output) for i, output in sorted(outputs)]
    return report.make_table(score_results(results, benchmark))


# ---- scores ----


def make_result(question, output):
    """Returns a line of answers.jsonl without its score."""
    result = {name: value for name, value in question.items() if name != "question"}
    result["image"] = [
        ref.name if isinstance(ref, image_refs.ImageBytes) else os.path.join(*ref[:2])
        for ref in question["image"]
    ]
    return result | {name: x for name, x in output._asdict().items() if x is not None}


# ---- what identifies an evaluation ----


def evaluation_settings(checkpoint, questions, benchmark, prompt, generation):
    """Returns what must stay the same if an evaluation is resumed.

    The model, the questions and their images are identified by their content, not by their paths.
    """
    content = short_hash([[question["id"], question["question"]] for question in questions])
    hash_once = functools.cache(hash_image)  # several questions may ask about one image
    shown = [list(map(hash_once, question["image"])) for question in questions]
    weights = hash_weights(checkpoint.history["folder"])
    dtype = next(checkpoint.model.parameters()).dtype
    return {
        "model": short_hash([weights, checkpoint.fingerprint()]),
        "dtype": str(dtype).removeprefix("torch."),
        "benchmark": benchmark,
        "questions": f"{len(questions):,} ({content})",
        "images": f"{sum(map(len, shown)):,} ({short_hash(shown)})",
        "prompt": prompt,
        **generation,
    }


def short_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def hash_image(ref):
    content, _ = image_refs.load_image_bytes(ref)
    return hashlib.sha256(content).hexdigest()


def hash_weights(model):
    """Returns the sha256 of each weights file of a model."""
    folder, digests = Path(files.cached_snapshot(model) or model), []
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def package_versions():
    """Returns the versions of what answers depend on; nanovlm's is a hash of its files."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    versions = {"nanovlm": short_hash([path.read_text(encoding="utf-8") for path in sources])}
    versions["python"] = platform.python_version()
    for name in ("torch", "numpy", "pillow", "tiktoken", "safetensors"):
        versions[name] = importlib.metadata.version(name)
    return versions


# ---- answers.jsonl and answers.json ----


def metadata_path(out):
    return Path(out).with_suffix(".json")


def read_metadata(out):
    """Returns the content of the answers.json beside an answers.jsonl, {} if there is none.

    Raises UserError if it is something else.
    """
    path = metadata_path(out)
    if not path.exists():
        return {}
    match {"history": {}} | files.read_json(path, kind="answers.json"):
        case {"settings": {"benchmark": str()}, "history": dict()} as metadata:
            return metadata
    raise UserError(
        f"{path}, where the scores of {out} belong, is something else: choose another file for the "
        "answers"
    )


def has_content(path):
    return os.path.exists(path) and os.path.getsize(path) > 0


def check_output(out, settings):
    """Raises UserError if a file has anything but answers of an evaluation with these settings.

    None: with any settings.
    """
    old = read_metadata(out)
    if not has_content(out):
        return
    if not old:
        raise UserError(
            f"--out={out} exists, but not {metadata_path(out)} with its settings: choose another "
            "file"
        )
    changes = []
    settings = old["settings"] if settings is None else settings
    for name in {**old["settings"], **settings}:
        before, now = old["settings"].get(name), settings.get(name)
        if before != now:
            changes.append(f"{name} was {before}, now {now}")
    if changes:
        model = old["history"].get("folder", "a model")
        raise UserError(
            f"--out={out} has the answers of another evaluation, of {model}: {'; '.join(changes)}; "
            "choose another file"
        )


@contextlib.contextmanager
def lock_output(out):
    """Keeps other processes from writing to `out`, by a lock of rank 0.

    After Ctrl-C, it prints how to resume.
    """
    writes = out and distributed.get_rank() == 0
    with contextlib.ExitStack() as locks:
        with distributed.raise_on_all_ranks():
            if writes:
                open(out, "a").close()  # only an existing file can be locked
                locks.enter_context(files.lock_path(out))
        try:
            yield
        except KeyboardInterrupt:
            if writes:
                cli.print_status(
                    f"\nthe answers so far are in {out}; the same command resumes with the rest"
                )
            raise


def read_results(path):
    """Yields the lines of an answers.jsonl. Raises UserError for a line that is something else."""
    seen = set()
    for number, result in enumerate(files.read_log(path), 1):
        match {"mean_logprob": None} | result:
            case {
                "id": str() | int(),
                "kind": str(),
                "prompt": str(),
                "answer": str(),
                "answers": [*references],
                "tokens": int(),
                "cut": bool(),
                "mean_logprob": None | float(),
            } if all(isinstance(reference, str) for reference in references):
                name = str(result["id"])
            case _:
                raise UserError(
                    f"{path}, line {number}: not a line of answers, remove it: {result!r:.80}"
                )
        if name in seen:
            raise UserError(f"{path}, line {number}: question {name} is answered twice")
        seen.add(name)
        yield result


def read_outputs(path, questions):
    """Returns {index of a question: Output} of an answers.jsonl.

    Raises UserError for an answer to another question.
    """
    indices = {str(question["id"]): i for i, question in enumerate(questions)}
    outputs = {}
    for result in read_results(path):
        if str(result["id"]) not in indices:
            raise UserError(
                f"{path} answers question {result['id']}, which is not in --questions: choose "
                "another file"
            )
        output = Output(*map(result.get, Output._fields))
        outputs[indices[str(result["id"])]] = output
    return outputs


# ---- a whole evaluation ----


def resume_answers(out, questions, metadata):
    """Returns (metadata, {index of a question: Output}) of an interrupted evaluation, and readies
    `out` for the rest; of a new one, it writes the metadata."""
    check_output(out, metadata["settings"])
    if not has_content(out):
        files.write_text(metadata_path(out), json.dumps(metadata, indent=1))
        return metadata, {}
    os.truncate(out, Path(out).read_bytes().rfind(b"\n") + 1)  # the last line may be incomplete
    return read_metadata(out), read_outputs(out, questions)


def run_benchmark(
    checkpoint, questions, *, benchmark, prompt="", out="", batch_size=16, **generation
):
    """Answers all questions, except those that `out` has answers to, and appends the answers to it.

    Returns (results, metadata): the lines of answers.jsonl, and the content of answers.json without
    the table.
    """
    metadata, outputs = {"history": checkpoint.history}, {}
    writes = out and distributed.get_rank() == 0
    with distributed.raise_on_all_ranks():
        if writes:
            metadata |= {
                "settings": evaluation_settings(
                    checkpoint, questions, benchmark, prompt, generation
                ),
                "command": shlex.join(sys.argv),
                "ranks": distributed.get_world_size(),
                "batch": batch_size,
                "device": str(checkpoint.model.mean_C11.device),
                "versions": package_versions(),
            }
            metadata, outputs = resume_answers(out, questions, metadata)
        lengths = prompt_lengths(checkpoint, questions)
        if distributed.get_rank() == 0:
            check_prompt_lengths(checkpoint, lengths, generation["max_tokens"])
    outputs = distributed.all_gather_object(outputs)[0]
    progress = report.EvaluationProgress(len(questions), len(outputs))
    options = dict(batch_size=batch_size, done=set(outputs), lengths=lengths, **generation)
    with (
        files.name_file(out),
        open(out, "a", encoding="utf-8") if writes else contextlib.nullcontext() as file,
    ):
        for pairs in answer_questions(checkpoint, questions, **options):
            outputs |= pairs
            results = [make_result(questions[i], output) | {"score": None} for i, output in pairs]
            with distributed.raise_on_all_ranks():
                if file:
                    file.write(format_lines(results))
                    file.flush()
            progress.update([output for _, output in pairs])
    results = [make_result(question, outputs[i]) for i, question in enumerate(questions)]
    return score_results(results, benchmark), metadata | progress.speeds()


def format_lines(results):
    return "".join(json.dumps(result) + "\n" for result in results)


def rescore(path, questions, benchmark):
    """Returns the results of an answers.jsonl with new scores.

    The references are those of `questions` if there are any, else those in the file.
    """
    results = list(read_results(path))
    if not results:
        raise UserError(f"{path} has no answers")
    if questions:
        outputs = read_outputs(path, questions)
        if missing := [q["id"] for i, q in enumerate(questions) if i not in outputs]:
            raise UserError(
                f"{path} has {len(outputs):,} answers, --questions {len(questions):,} questions; "
                f"not answered is {missing[0]}"
            )
        results = [make_result(question, outputs[i]) for i, question in enumerate(questions)]
    return score_results(results, benchmark)


def summarize(results, metadata, questions, benchmark, seed=0, *, out="", page="", submission=""):
    """Prints the table and the metrics that the benchmark's owners report; writes the files."""
    lines = report.make_table(results, seed)
    known = [result for result in results if result["answers"]]
    owner_metrics = benchmark_metrics(benchmark, known) if known else {}
    owner_metrics |= report.calibration(known)
    table = report.format_table(lines, owner_metrics, benchmark, metadata.get("tokens_per_s"))
    print(table.translate(cli.CONTROL_CHARACTERS))
    if out:
        settings = {**metadata.get("settings", {}), "benchmark": benchmark}
        rows = [line._asdict() for line in lines]
        content = {**metadata, "settings": settings, "table": rows, "figures": owner_metrics}
        files.write_text(metadata_path(out), json.dumps(content, indent=1))
        # last: it replaces the locked file, and ends the lock
        files.write_text(out, format_lines(results))
    if page:
        model = metadata.get("history", {}).get("folder", out)
        notes = table.splitlines()[len(lines) :]
        text = report.html_page(results, questions, benchmark, model, lines, notes)
        files.write_text(page, text)
    if submission:
        files.write_text(submission, format_submission(benchmark, results))
