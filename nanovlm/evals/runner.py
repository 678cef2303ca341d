"""Evaluation: a model answers a benchmark's questions, in batches, on any number of ranks.

answers.jsonl  a line per question, written as soon as it is answered: id, kind, images, references,
               what else the metric needs, the rendered prompt, the answer, its number of tokens,
               whether it was cut off at --max_tokens, and the score (null: it cannot be parsed).
               The lines are in the questions' order once all are answered.
answers.json   the settings, the model's history, the command and the versions, which are enough to
               repeat the evaluation; and the table of scores
"""

import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .. import IMAGE_TOKEN_ID, UserError, distributed, files
from ..data import chat_template, dataset, image_files, image_processing, image_refs, packing
from ..inference.generate import generate
from ..training.recipes import read_saved_settings
from . import benchmarks, metrics, report

MAX_SEQUENCE = 1 << 20  # tokens of prompt and answer: the KV cache is allocated for all of them
HASH_BLOCK = 4096  # of a weights file, so many blocks of so many bytes are hashed
RESULT_FIELDS = {  # of a line of answers.jsonl, with their types
    "id": str | int,
    "kind": str,
    "prompt": str,
    "answer": str,
    "answers": list,
    "tokens": int,
    "cut": bool,
}


class Answer(NamedTuple):
    """A generated answer."""

    text: str
    tokens: int
    cut: bool  # it has max_tokens tokens and no end token
    prompt: str  # the rendered prompt, with <image> for each image


# ---- prompts ----


def encode_prompt(checkpoint, turns, images):
    """Returns the ids of a conversation that ends before an answer, its image tokens expanded.

    images: a ProcessedImage each.
    """
    ids, loss_mask = chat_template.render_conversation(
        turns, checkpoint.tokenizer, checkpoint.chat_template
    )
    ids, _, images = chat_template.add_tile_tags(
        ids, loss_mask, images, checkpoint.tokenizer, checkpoint.image_config
    )
    return dataset.expand_image_tokens(ids, [len(image.feature_index) for image in images]).tolist()


def render_prompt(checkpoint, turns):
    """Returns the same conversation as text, with <image> for each image."""
    ids, _ = chat_template.render_conversation(
        turns, checkpoint.tokenizer, checkpoint.chat_template
    )
    text = ""
    for is_image, part in itertools.groupby(ids, lambda i: i == IMAGE_TOKEN_ID):
        part = list(part)
        text += "<image>" * len(part) if is_image else checkpoint.tokenizer.decode(part)
    return text


def load_question_image(ref, image_config):
    content, name = image_refs.load_image_bytes(ref)
    return image_processing.load_image(content, image_config, name=name)


def read_image_size(ref):
    """Returns (width, height) from the start of an image's file, without decoding it.

    It is nearly always the size of the loaded image, which is enough to sort by.
    """
    content = None
    if isinstance(ref, image_refs.ImageFile):
        name = ref.path
    else:
        content, name = image_refs.load_image_bytes(ref)
    file = io.BytesIO(content) if content else name
    with (
        image_files.image_errors(name, content and len(content)),
        Image.open(file, formats=image_files.IMAGE_FORMATS) as image,
    ):
        image_files.check_image_size(*image.size)
        return image.size


def prompt_lengths(checkpoint, questions):
    """Returns the number of tokens of each question's prompt."""
    sizes, image_config = {}, checkpoint.image_config
    has_one_tile = image_config["fit"] in image_processing.FITS  # whatever the size of the image
    lengths = []
    for question in questions:
        for ref in question["image"]:
            if ref not in sizes:
                sizes[ref] = (1, 1) if has_one_tile else read_image_size(ref)
        refs = question["image"]
        images = [image_processing.plan_image(sizes[ref], image_config) for ref in refs]
        lengths.append(len(encode_prompt(checkpoint, [("user", question["question"])], images)))
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
        prompts = f"{count:,} of {len(lengths):,} prompts take up to"
        if len(lengths) == 1:
            prompts = "the prompt takes"
        print(
            f"{prompts} {longest:,} tokens, but the model was trained on sequences of {seq_len:,}: "
            "the answers may be poor",
            file=sys.stderr,
            flush=True,
        )


# ---- answers ----


def generate_answers(checkpoint, prompts, *, blank_images=False, autocast=None, **generation):
    """Returns the Answer to each of the prompts, (text with <image> for each image, [images]).

    They are generated as one batch. blank_images: all images are grey. autocast: a context for the
    model's calls. generation: of generate. All ranks call a sharded model equally often: until the
    last answer of any rank has ended.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    end = chat_template.end_token_id(tokenizer, checkpoint.chat_template)
    conversations = [[("user", text)] for text, _ in prompts]
    prompt_ids, all_images = [], []
    for turns, (_, images) in zip(conversations, prompts, strict=True):
        prompt_ids.append(encode_prompt(checkpoint, turns, images))
        all_images += images
    inputs = packing.collate_images(all_images, checkpoint.image_config)
    if blank_images:
        inputs["tiles_NCYX"].fill_(128)
    is_sharded = distributed.is_sharded(model)
    stop = set() if is_sharded else {end}
    answers = [[] for _ in prompts]
    with autocast or contextlib.nullcontext(), distributed.unsharded(model):
        for step in generate(model, prompt_ids, **inputs, stop=stop, **generation):
            for ids, next_id in zip(answers, step, strict=True):
                if not ids or ids[-1] != end:
                    ids.append(next_id)
            if is_sharded:
                unfinished = sum(ids[-1] != end for ids in answers)
                if not distributed.all_reduce_sum([unfinished], model.mean_C11.device)[0]:
                    break
    result = []
    for turns, ids in zip(conversations, answers, strict=True):
        text = tokenizer.decode([i for i in ids if i != end])
        result.append(Answer(text, len(ids), ids[-1] != end, render_prompt(checkpoint, turns)))
    return result


def batches_by_length(lengths, batch):
    """Returns the indices of the questions in batches, the shortest prompts first.

    Prompts of similar length need little padding.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def answer_questions(
    checkpoint, questions, rank=0, world=1, *, batch=16, done=(), lengths=None, **options
):
    """Yields, on every rank, the [(index of a question, Answer)] of all ranks, round by round.

    done: indices of questions that are answered already. They count when batches are formed, so
    that a resumed evaluation gives the same answers. The longest prompts come first: if they do not
    fit into memory, this shows at once. lengths: those of the prompts, if known. options: of
    generate_answers.
    """
    done = set(done)
    with distributed.raise_on_all_ranks():
        lengths = lengths or prompt_lengths(checkpoint, questions)
        batches = []
        for members in reversed(batches_by_length(lengths, batch)):
            remaining = [i for i in members if i not in done]
            if remaining:
                batches.append(remaining)
    rounds = [batches[i : i + world] for i in range(0, len(batches), world)]
    # The last round may have no batch for this rank. Under FSDP it then repeats that of another
    # rank, and the answers are dropped: all ranks must call the model.
    own_batches = [ranks[min(rank, len(ranks) - 1)] for ranks in rounds]
    is_idle = [rank >= len(ranks) for ranks in rounds]

    def load(members):
        prompts = []
        for i in members:
            images = [
                load_question_image(ref, checkpoint.image_config) for ref in questions[i]["image"]
            ]
            prompts.append((questions[i]["question"], images))
        return prompts

    with ThreadPoolExecutor(1) as reader:
        loading = reader.submit(load, own_batches[0]) if own_batches else None
        for number, members in enumerate(own_batches):
            with distributed.raise_on_all_ranks():
                prompts = loading.result()
            if number + 1 < len(own_batches):
                loading = reader.submit(load, own_batches[number + 1])
            answers = []
            if not is_idle[number] or distributed.is_sharded(checkpoint.model):
                answers = generate_answers(checkpoint, prompts, **options)
            pairs = [] if is_idle[number] else list(zip(members, answers, strict=True))
            yield list(itertools.chain(*distributed.all_gather_object(pairs)))


def evaluate(checkpoint, questions, rank=0, world=1, *, benchmark="exact", **options):
    """Returns the table of a benchmark's scores on rank 0, None on the others.

    It also works during training (see generate_answers). options: of answer_questions.
    """
    check_questions(questions, benchmark)
    answers = []
    for pairs in answer_questions(checkpoint, questions, rank, world, **options):
        answers += pairs
    if rank > 0:
        return None
    results = [make_result(questions[i], answer) for i, answer in sorted(answers)]
    return report.make_table(score_results(results, benchmark))


# ---- scores ----


def make_result(question, answer):
    """Returns a line of answers.jsonl without its score."""
    result = {name: value for name, value in question.items() if name != "question"}
    result["image"] = [
        ref.name if isinstance(ref, image_refs.ImageBytes) else os.path.join(*ref[:2])
        for ref in question["image"]
    ]
    return {
        **result,
        "prompt": answer.prompt,
        "answer": answer.text,
        "tokens": answer.tokens,
        "cut": answer.cut,
    }


def score_results(results, benchmark):
    """Returns the results with their scores.

    None: the answer cannot be parsed, or there are no references.
    """
    metric = benchmarks.BENCHMARKS[benchmark].metric
    known = [result for result in results if result["answers"]]
    scores = []
    if known:
        scores = metrics.score_answers(metric, [result["answer"] for result in known], known)
    scores = iter(scores)
    return [{**result, "score": next(scores) if result["answers"] else None} for result in results]


def check_questions(questions, benchmark):
    """Raises UserError, before anything is generated, for a question that cannot be scored."""
    metric = benchmarks.BENCHMARKS[benchmark].metric
    for question in questions:
        if question["answers"]:
            metrics.check_references(metric, question, f"question {question['id']}")


# ---- what identifies an evaluation ----


def evaluation_settings(checkpoint, questions, benchmark, prompt, generation):
    """Returns what must stay the same if an evaluation is resumed.

    The model and the questions are identified by their content, not by their paths.
    """
    content = short_hash([[question["id"], question["question"]] for question in questions])
    weights = hash_weights(checkpoint.history["folder"])
    dtype = next(checkpoint.model.parameters()).dtype
    return {
        "model": short_hash([weights, checkpoint.fingerprint()]),
        "dtype": str(dtype).removeprefix("torch."),
        "benchmark": benchmark,
        "questions": f"{len(questions):,} ({content})",
        "prompt": prompt,
        **generation,
    }


def short_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def hash_weights(model):
    """Returns [name, size, hash of a sample of the bytes] of each weights file of a model.

    Training changes bytes everywhere, copying a file none.
    """
    folder, result = Path(files.cached_snapshot(model) or model), []
    paths = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("sharded/*")]
    for path in sorted(paths):
        digest, size = hashlib.sha256(), path.stat().st_size
        with open(path, "rb") as file:
            for offset in range(0, size, max(HASH_BLOCK, size // HASH_BLOCK)):
                file.seek(offset)
                digest.update(file.read(HASH_BLOCK))
        result.append([path.name, size, digest.hexdigest()])
    return result


def package_versions():
    """Returns the versions of what answers depend on; nanovlm's is a hash of its files."""
    package = Path(__file__).parents[1]
    sources = [
        [str(path.relative_to(package)), path.read_text(encoding="utf-8")]
        for path in sorted(package.rglob("*.py"))
    ]
    names = ("numpy", "pillow", "tiktoken", "safetensors")
    return {
        "nanovlm": short_hash(sources),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }


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
    metadata = files.read_json(path, kind="answers.json")
    settings = metadata.get("settings")
    is_metadata = isinstance(settings, dict) and isinstance(settings.get("benchmark"), str)
    if not is_metadata or not isinstance(metadata.get("history", {}), dict):
        raise UserError(
            f"{path}, where the scores of {out} belong, is something else: choose another file for "
            "the answers"
        )
    return metadata


def check_output(out, settings=None):
    """Raises UserError for a file that exists and is not from an evaluation.

    settings: of answers that are scored again. These may overwrite their own scores, no others.
    """
    old = read_metadata(out).get("settings")
    if not old and has_content(out):
        raise UserError(
            f"--out={out} exists, but not {metadata_path(out)} with its settings: choose another "
            "file"
        )
    if old and settings is not None and old | {"benchmark": ""} != settings | {"benchmark": ""}:
        raise UserError(f"--out={out} has the answers of another evaluation: choose another file")


def has_content(path):
    """Whether a path exists and is anything but an empty file."""
    return os.path.lexists(path) and not (Path(path).is_file() and os.path.getsize(path) == 0)


@contextlib.contextmanager
def lock_output(out, rank):
    """Keeps other processes from writing to `out`, by a lock of rank 0.

    After Ctrl-C, it prints how to resume.
    """
    with contextlib.ExitStack() as locks:
        with distributed.raise_on_all_ranks():
            if out and rank == 0:
                open(out, "a").close()  # only an existing file can be locked
                locks.enter_context(files.lock_path(out))
        try:
            yield
        except KeyboardInterrupt:
            if out and rank == 0:
                print(
                    f"\nthe answers so far are in {out}; the same command resumes with the rest",
                    file=sys.stderr,
                    flush=True,
                )
            raise


def resume_answers(out, questions, settings, metadata):
    """Returns {index of a question: Answer} of an interrupted evaluation, and readies `out` for the
    rest."""
    old = read_metadata(out)
    if not has_content(out):
        content = json.dumps({"settings": settings, **metadata}, indent=1)
        files.write_text(metadata_path(out), content)
        return {}
    old_settings, changes = old.get("settings", {}), []
    for name, value in json.loads(json.dumps(settings)).items():
        if old_settings.get(name) != value:
            changes.append(f"{name} was {old_settings.get(name)}, now {value}")
    if changes:
        model = old.get("history", {}).get("folder", "a model")
        raise UserError(
            f"{out} has answers of {model} and cannot be resumed: {'; '.join(changes)}; choose "
            "another --out"
        )
    os.truncate(out, Path(out).read_bytes().rfind(b"\n") + 1)  # the last line may be incomplete
    indices = {str(question["id"]): i for i, question in enumerate(questions)}
    results = list(read_results(out))
    if unknown := [result["id"] for result in results if str(result["id"]) not in indices]:
        raise UserError(
            f"{out} answers question {unknown[0]}, which is not in --questions: choose another "
            "--out"
        )
    return {indices[str(result["id"])]: read_answer(result) for result in results}


def read_results(path):
    """Yields the lines of an answers.jsonl. Raises UserError for a line that is something else."""
    seen = set()
    for number, result in enumerate(files.read_log(path), 1):
        wrong = [
            name
            for name, kind in RESULT_FIELDS.items()
            if not isinstance(result, dict) or not isinstance(result.get(name), kind)
        ]
        if wrong or not all(isinstance(text, str) for text in result["answers"]):
            raise UserError(
                f"{path}, line {number}: not an answer, {', '.join(wrong or ['answers'])} missing "
                f"or of the wrong type: {result!r:.80}"
            )
        if str(result["id"]) in seen:
            raise UserError(f"{path}, line {number}: question {result['id']} is answered twice")
        seen.add(str(result["id"]))
        yield result


def read_answer(result):
    return Answer(result["answer"], result["tokens"], result["cut"], result["prompt"])


def write_results(path, results):
    files.write_text(path, "".join(json.dumps(result) + "\n" for result in results))


# ---- a whole evaluation ----


def run_benchmark(
    checkpoint, questions, rank=0, world=1, *, benchmark, prompt="", out="", batch=16, **generation
):
    """Answers all questions, except those that `out` has answers to, and appends the answers to it.

    Returns (results, metadata) on rank 0, (None, None) on the others.
    """
    settings = evaluation_settings(checkpoint, questions, benchmark, prompt, generation)
    metadata = {
        "command": shlex.join(sys.argv),
        "history": checkpoint.history,
        "ranks": world,
        "batch": batch,
        "device": str(checkpoint.model.mean_C11.device),
        "versions": package_versions(),
    }
    with distributed.raise_on_all_ranks():
        check_questions(questions, benchmark)
        answers = {}
        if out and rank == 0:
            answers = resume_answers(out, questions, settings, metadata)
        lengths = prompt_lengths(checkpoint, questions)
        if rank == 0:
            check_prompt_lengths(checkpoint, lengths, generation["max_tokens"])
    progress = report.EvaluationProgress(len(questions), len(answers))
    done = distributed.all_gather_object(list(answers))[0]
    options = dict(batch=batch, done=done, lengths=lengths, **generation)
    writes = out and rank == 0
    with open(out, "a", encoding="utf-8") if writes else contextlib.nullcontext() as file:
        for pairs in answer_questions(checkpoint, questions, rank, world, **options):
            answers |= pairs
            results = [make_result(questions[i], answer) | {"score": None} for i, answer in pairs]
            if not report.needs_all_answers(benchmark):
                results = score_results(results, benchmark)
            with distributed.raise_on_all_ranks():
                if file:
                    file.write("".join(json.dumps(result) + "\n" for result in results))
                    file.flush()
            if rank == 0:
                progress.update(results, benchmark)
    if rank > 0:
        return None, None
    results = [make_result(question, answers[i]) for i, question in enumerate(questions)]
    results = score_results(results, benchmark)
    if out and not progress.done:  # all were answered before: keep the metadata of then
        return results, read_metadata(out)
    return results, {"settings": settings, **metadata, **progress.speeds()}


def rescore(path, questions, benchmark):
    """Returns the results of an answers.jsonl with new scores.

    The references are those of `questions` if there are any, else those in the file.
    """
    results = list(read_results(path))
    if questions:
        by_id = {str(result["id"]): result for result in results}
        missing = [question["id"] for question in questions if str(question["id"]) not in by_id]
        if missing or len(by_id) > len(questions):
            example = f"; not answered is {missing[0]}" if missing else ""
            raise UserError(
                f"{path} has {len(by_id):,} answers, --questions {len(questions):,} questions"
                f"{example}"
            )
        results = [
            make_result(question, read_answer(by_id[str(question["id"])])) for question in questions
        ]
    if not results:
        raise UserError(f"{path} has no answers")
    return score_results(results, benchmark)


def summarize(results, metadata, questions, benchmark, seed=0, *, out="", page="", submission=""):
    """Prints the table and the metrics that the benchmark's owners report; writes the files."""
    lines = report.make_table(results, seed)
    known = [result for result in results if result["answers"]]
    owner_metrics = {}
    if known:
        answers = [result["answer"] for result in known]
        scores = [result["score"] for result in known]
        owner_metrics = metrics.benchmark_metrics(benchmark, known, answers, scores)
    report.print_table(lines, owner_metrics, benchmark, metadata.get("tokens_per_s"))
    settings = {**metadata.get("settings", {}), "benchmark": benchmark}
    if out:
        table = [line._asdict() for line in lines]
        content = {**metadata, "settings": settings, "table": table, "figures": owner_metrics}
        files.write_text(metadata_path(out), json.dumps(content, indent=1))
        write_results(out, results)  # last: it replaces the locked file, and ends the lock
    if page:
        model = metadata.get("history", {}).get("folder", out)
        files.write_text(page, report.html_page(results, questions, lines, benchmark, model))
    if submission:
        files.write_text(submission, benchmarks.format_submission(benchmark, results))
