"""The exam: questions are put to a model a batch at a time, shared over any number of ranks; answers are written as they come, and marked.

answers.jsonl   a line for each question: id, kind, pictures, the right answers and what else the score needs, the prompt as rendered, the answer,
                its tokens and whether it was cut off (as long as answers may be, and not ended), the score (null: none could be given);
                in the questions' order once all are there
answers.json    what was asked of which model, by what command and versions, which is enough to repeat it; and the table
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
from . import benchmarks, metrics, report

MAX_SEQUENCE = (
    1 << 20
)  # tokens of prompt and answer together; the cache takes memory for all of them before the first is read
HASH_BLOCK = 4096  # places of a file of weights at which so many bytes are read to know it again: of 5 GB, one every MB
RESULT_FIELDS = {
    "id": str | int,
    "kind": str,
    "prompt": str,
    "answer": str,
    "answers": list,
    "tokens": int,
    "cut": bool,
}  # of a line that is read again


class Answer(NamedTuple):
    """An answer."""

    text: str
    tokens: int
    cut: bool  # it is as long as answers may be, and has not ended
    prompt: str  # what it answers, as the model's template renders it, <image> for each picture


# ---- asking ----


def encode_prompt(checkpoint, turns, pictures):
    """The ids of a conversation that waits for its answer, every picture expanded; pictures: images.Picture each."""
    ids, trained = chat_template.render_conversation(turns, checkpoint.tokenizer, checkpoint.chat_template)
    ids, _, pictures = chat_template.add_tile_tags(
        ids, trained, pictures, checkpoint.tokenizer, checkpoint.image_config
    )
    return dataset.expand_image_tokens(ids, [len(picture.places) for picture in pictures]).tolist()


def render_prompt(checkpoint, turns):
    """The same in letters, <image> for each picture."""
    ids, _ = chat_template.render_conversation(turns, checkpoint.tokenizer, checkpoint.chat_template)
    parts = [
        (is_image, list(part))
        for is_image, part in itertools.groupby(ids, lambda i: i == IMAGE_TOKEN_ID)
    ]
    return "".join(
        "<image>" * len(part) if is_image else checkpoint.tokenizer.decode(part)
        for is_image, part in parts
    )


def generate_answers(checkpoint, asked, *, blank=False, mixed=None, **choices):
    """What a model Said to each (text with an <image> for each picture, [images.Picture]), all of them at once.

    blank: every picture is grey instead; mixed: a context to call the model in; choices: of VLM.generate. A model that lies in parts is called by
    all ranks equally often: until the last of all their answers has ended.
    """
    model, end = checkpoint.model, chat_template.end_token_id(checkpoint.tokenizer, checkpoint.chat_template)
    turns = [[("user", text)] for text, _ in asked]
    prompts = [
        encode_prompt(checkpoint, turn, pictures)
        for turn, (_, pictures) in zip(turns, asked, strict=True)
    ]
    seen = packing.collate_images(
        [picture for _, pictures in asked for picture in pictures], checkpoint.image_config
    )
    if blank:
        seen["tiles_NCYX"].fill_(128)
    together, said = distributed.is_sharded(model), [[] for _ in asked]
    with mixed or contextlib.nullcontext(), distributed.unsharded(model):
        for step in generate(model, prompts, **seen, stop=set() if together else {end}, **choices):
            for ids, i in zip(said, step, strict=True):
                ids += [i] if not ids or ids[-1] != end else []
            if (
                together
                and not distributed.all_reduce_sum(
                    [sum(ids[-1] != end for ids in said)], model.mean_C11.device
                )[0]
            ):
                break
    texts = [checkpoint.tokenizer.decode([i for i in ids if i != end]) for ids in said]
    return [
        Answer(text, len(ids), ids[-1] != end, render_prompt(checkpoint, turn))
        for text, ids, turn in zip(texts, said, turns, strict=True)
    ]


def read_image_size(ref):
    """(width, height) of a picture as its file begins: nearly always what it has once it is opened, and enough to sort by."""
    content, name = (None, ref.path) if isinstance(ref, image_refs.File) else image_refs.load(ref)
    with (
        image_files.blaming(name, content and len(content)),
        Image.open(
            io.BytesIO(content) if content else name, formats=image_files.FORMATS
        ) as picture,
    ):
        image_files.check_size(*picture.size)
        return picture.size


def prompt_lengths(checkpoint, questions):
    """How many tokens each question's prompt takes."""
    sizes, policy = {}, checkpoint.image_config

    def length(question):
        for ref in question["image"]:
            sizes[ref] = sizes.get(ref) or (
                (1, 1) if policy["fit"] in image_processing.FITS else read_image_size(ref)
            )
        pictures = [image_processing.plan_image(sizes[ref], policy) for ref in question["image"]]
        return len(encode_prompt(checkpoint, [("user", question["question"])], pictures))

    return list(map(length, questions))


def check_prompt_lengths(checkpoint, lengths, max_tokens):
    """Refuse what no memory holds; warn of prompts longer than all that the model was trained on."""
    longest, path = max(lengths, default=0), Path(checkpoint.history["folder"]) / "training.json"
    if longest + max_tokens > MAX_SEQUENCE:
        raise UserError(
            f"{longest:,} tokens of prompt and --max_tokens={max_tokens} make more than {MAX_SEQUENCE:,}"
        )
    row = files.read_json(path, "row")["row"] if path.is_file() else longest
    if longest > row:
        long = sum(length > row for length in lengths)
        told = (
            "the prompt takes"
            if len(lengths) == 1
            else f"{long:,} of {len(lengths):,} prompts take up to"
        )
        print(
            f"{told} {longest:,} tokens, the model was trained on rows of {row:,}: do not expect much",
            file=sys.stderr,
            flush=True,
        )


def batches_by_length(lengths, batch):
    """The numbers of the questions, `batch` at a time, the shortest prompts first: neighbours need hardly any padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def answer_questions(checkpoint, questions, rank=0, world=1, *, batch=16, done=(), lengths=None, **how):
    """The answers, as they come: on every rank, round after round, a list of (number of the question, Said) that all ranks gave together.

    done: numbers of questions that were answered before. Batches are those of the whole exam, without them, so that one which goes on gives the
    answers that it would have given. The longest go first: what does not fit into memory is known at once. lengths: of the prompts, where they are
    known. how: as for `answer`.
    """
    known = set(done)
    with distributed.raise_on_all_ranks():
        lengths = lengths or prompt_lengths(checkpoint, questions)
        batches = [
            left
            for members in reversed(batches_by_length(lengths, batch))
            if (left := [i for i in members if i not in known])
        ]
    rounds = [batches[i : i + world] for i in range(0, len(batches), world)]

    def load(members):
        return [
            (
                questions[i]["question"],
                [load_image(ref, checkpoint.image_config) for ref in questions[i]["image"]],
            )
            for i in members
        ]

    mine = [
        some[min(rank, len(some) - 1)] for some in rounds
    ]  # the last may have none for this rank: under FSDP it works in vain with the others
    idle = [rank >= len(some) for some in rounds]
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(load, mine[0]) if mine else None
        for number, members in enumerate(mine):
            with distributed.raise_on_all_ranks():
                asked = coming.result()
            coming = reader.submit(load, mine[number + 1]) if number + 1 < len(mine) else None
            said = (
                generate_answers(checkpoint, asked, **how)
                if not idle[number] or distributed.is_sharded(checkpoint.model)
                else []
            )
            pairs = [] if idle[number] else list(zip(members, said, strict=True))
            yield [pair for some in distributed.all_gather_object(pairs) for pair in some]


def load_image(ref, policy):
    content, name = image_refs.load(ref)
    return image_processing.load_image(content, policy, name=name)


def evaluate(checkpoint, questions, rank=0, world=1, *, benchmark="exact", **how):
    """The table of an exam's marks, on rank 0, None on the others; while a model trains, too (see `answer`). how: as for `answers`."""
    check_questions(questions, benchmark)
    rows = [pair for pairs in answer_questions(checkpoint, questions, rank, world, **how) for pair in pairs]
    if rank == 0:
        return report.table(
            score_results([make_result(questions[i], said) for i, said in sorted(rows)], benchmark)
        )


# ---- marking ----


def make_result(question, said):
    """A line of answers.jsonl, still without its score."""
    kept = {name: value for name, value in question.items() if name != "question"}
    shown = [
        ref.name if isinstance(ref, image_refs.Bytes) else os.path.join(*ref[:2])
        for ref in question["image"]
    ]
    return {
        **kept,
        "image": shown,
        "prompt": said.prompt,
        "answer": said.text,
        "tokens": said.tokens,
        "cut": said.cut,
    }


def score_results(rows, benchmark):
    """Rows with their scores; None where an answer cannot be parsed, or no right one is known."""
    known = [row for row in rows if row["answers"]]
    marks = (
        metrics.score_answers(
            benchmarks.BENCHMARKS[benchmark].score, [row["answer"] for row in known], known
        )
        if known
        else []
    )
    given = iter(marks)
    return [{**row, "score": next(given) if row["answers"] else None} for row in rows]


def check_questions(questions, benchmark):
    """Raise UserError, before anything is asked, for a question that its benchmark's rule could not mark."""
    for question in questions:
        if question["answers"]:
            metrics.check_reference(
                benchmarks.BENCHMARKS[benchmark].score, question, f"question {question['id']}"
            )


# ---- a whole exam, and its files ----


def metadata_path(out):
    return Path(out).with_suffix(".json")


def write_results(path, rows):
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def evaluation_settings(checkpoint, questions, benchmark, prompt, choices):
    """What must stay the same for an exam to go on: the model by what its files hold, wherever they lie, the questions by what they say."""
    asked = short_hash([[question["id"], question["question"]] for question in questions])
    model, dtype = (
        short_hash([hash_weights(checkpoint.history["folder"]), checkpoint.fingerprint()]),
        next(checkpoint.model.parameters()).dtype,
    )
    return {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "benchmark": benchmark,
        "questions": f"{len(questions):,} ({asked})",
        "prompt": prompt,
        **choices,
    }


def short_hash(thing):
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:8]


def hash_weights(model):
    """[name, size, hash of a sample of the bytes] of each file of weights in a model's folder: training changes bytes everywhere, a copy none."""
    folder, found = Path(files.cached_snapshot(model) or model), []
    for path in sorted(
        path for kind in ("*.safetensors", "*.bin", "sharded/*") for path in folder.glob(kind)
    ):
        digest, size = hashlib.sha256(), path.stat().st_size
        with open(path, "rb") as file:
            for place in range(0, size, max(HASH_BLOCK, size // HASH_BLOCK)):
                file.seek(place)
                digest.update(file.read(HASH_BLOCK))
        found.append([path.name, size, digest.hexdigest()])
    return found


def package_versions():
    """Of what answers depend on; ours: a hash of the package's files."""
    ours = short_hash(
        [
            [path.name, path.read_text(encoding="utf-8")]
            for path in sorted(Path(__file__).parent.glob("*.py"))
        ]
    )
    others = {
        name: importlib.metadata.version(name)
        for name in ("numpy", "pillow", "tiktoken", "safetensors")
    }
    return {
        "nanovlm": ours,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **others,
    }


def read_metadata(path):
    """What the JSON beside an answers.jsonl says; nothing if there is none. UserError if it is something else."""
    if not metadata_path(path).exists():
        return {}
    kept = files.read_json(metadata_path(path))
    asked, card = kept.get("asked"), kept.get("card", {})
    if not (
        isinstance(asked, dict)
        and isinstance(asked.get("benchmark"), str)
        and isinstance(card, dict)
    ):
        raise UserError(
            f"{metadata_path(path)}, where the table of {path} belongs, is something else: name other answers"
        )
    return kept


def check_output(path, asked=None):
    """Raise UserError for a file that is there, and that no exam has left; asked: of answers that are marked again, which may go over their own."""
    was = read_metadata(path).get("asked")
    if not was and has_content(path):
        raise UserError(
            f"--out={path} is there, but no {metadata_path(path)} that says what was asked: name another"
        )
    if was and asked is not None and was | {"benchmark": ""} != asked | {"benchmark": ""}:
        raise UserError(f"--out={path} holds answers of another exam: name another")


def has_content(path):
    """Whether there are answers; an empty file has nothing to lose."""
    return os.path.lexists(path) and not (Path(path).is_file() and os.path.getsize(path) == 0)


@contextlib.contextmanager
def lock_output(out, rank):
    """Keep other processes out of a file of answers as long as this one writes there, and tell of it who stops that; rank 0 does, for all."""
    with contextlib.ExitStack() as claims:
        with distributed.raise_on_all_ranks():
            if out and rank == 0:
                open(out, "a").close()  # only what is there can be claimed
                claims.enter_context(files.lock_path(out))
        try:
            yield
        except KeyboardInterrupt:
            if out and rank == 0:
                print(
                    f"\nwhat is answered stays in {out}, and the same command goes on with the rest",
                    file=sys.stderr,
                    flush=True,
                )
            raise


def resume_answers(out, questions, asked, about):
    """{number of a question: Said} of the answers that an exam which was stopped has left in `out`; it is made ready to go on."""
    kept = read_metadata(out)
    if not has_content(out):
        files.write_text(metadata_path(out), json.dumps({"asked": asked, **about}, indent=1))
        return {}
    was = kept.get("asked", {})
    wrong = [
        f"{name} was {was.get(name)}, now {value}"
        for name, value in json.loads(json.dumps(asked)).items()
        if was.get(name) != value
    ]
    if wrong:
        of = kept.get("card", {}).get("folder", "a model")
        raise UserError(
            f"{out}, asked of {of}, cannot go on as another exam: {'; '.join(wrong)}; name another --out"
        )
    os.truncate(out, Path(out).read_bytes().rfind(b"\n") + 1)  # the last line may have been torn
    numbers, rows = (
        {str(question["id"]): i for i, question in enumerate(questions)},
        list(read_results(out)),
    )
    if strange := [row["id"] for row in rows if str(row["id"]) not in numbers]:
        raise UserError(
            f"{out} answers question {strange[0]}, which is none of these: name another --out"
        )
    return {
        numbers[str(row["id"])]: Answer(row["answer"], row["tokens"], row["cut"], row["prompt"])
        for row in rows
    }


def read_results(path):
    """The lines of an answers.jsonl; UserError, naming the line, for what is none."""
    seen = set()
    for number, row in enumerate(files.read_log(path), 1):
        wrong = [
            name
            for name, kind in RESULT_FIELDS.items()
            if not isinstance(row, dict) or not isinstance(row.get(name), kind)
        ]
        if wrong or not all(isinstance(text, str) for text in row["answers"]):
            raise UserError(
                f"{path}, line {number}: no answer to a question, its {', '.join(wrong or ['answers'])} missing or misshapen: {row!r:.80}"
            )
        if str(row["id"]) in seen:
            raise UserError(f"{path}, line {number}: question {row['id']} is answered twice")
        seen.add(str(row["id"]))
        yield row


def run_benchmark(
    checkpoint, questions, rank=0, world=1, *, benchmark, prompt="", out="", batch=16, **choices
):
    """Answer all questions, of which `out` may hold some already, and write the answers there as they come: (rows, on rank 0; what answers.json says
    of them). Other ranks get None for both."""
    asked = evaluation_settings(checkpoint, questions, benchmark, prompt, choices)
    about = {
        "command": shlex.join(sys.argv),
        "card": checkpoint.history,
        "ranks": world,
        "batch": batch,
        "device": str(checkpoint.model.mean_C11.device),
        "versions": package_versions(),
    }
    with distributed.raise_on_all_ranks():
        check_questions(questions, benchmark)
        said = resume_answers(out, questions, asked, about) if out and rank == 0 else {}
        lengths = prompt_lengths(checkpoint, questions)
        if rank == 0:
            check_prompt_lengths(checkpoint, lengths, choices["max_tokens"])
    progress, known = report.Progress(len(questions), len(said)), distributed.all_gather_object(list(said))[0]
    with (
        open(out, "a", encoding="utf-8") if out and rank == 0 else contextlib.nullcontext() as file
    ):
        for pairs in answer_questions(
            checkpoint, questions, rank, world, batch=batch, done=known, lengths=lengths, **choices
        ):
            said |= pairs
            rows = [make_result(questions[i], one) | {"score": None} for i, one in pairs]
            rows = rows if report.is_of_all(benchmark) else score_results(rows, benchmark)
            with distributed.raise_on_all_ranks():
                if file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
                    file.flush()
            if rank == 0:
                progress.tell(rows, benchmark)
    if rank > 0:
        return None, None
    rows = score_results([make_result(question, said[i]) for i, question in enumerate(questions)], benchmark)
    if out and not progress.done:  # all was answered before: how, is known already
        return rows, read_metadata(out)
    return rows, {"asked": asked, **about, **progress.speeds()}


def rescore(path, questions, benchmark):
    """The rows of an answers.jsonl, marked anew, by the right answers that `questions` have, if there are any, else by its own."""
    rows = list(read_results(path))
    if questions:
        found = {str(row["id"]): row for row in rows}
        missing = [question["id"] for question in questions if str(question["id"]) not in found]
        if missing or len(found) > len(questions):
            raise UserError(
                f"{path} has {len(found):,} answers, --questions {len(questions):,} questions"
                f"{f'; not answered is {missing[0]}' if missing else ''}"
            )
        rows = [
            make_result(q, Answer(row["answer"], row["tokens"], row["cut"], row["prompt"]))
            for q in questions
            for row in [found[str(q["id"])]]
        ]
    if not rows:
        raise UserError(f"{path} holds no answers")
    return score_results(rows, benchmark)


def summarize(rows, about, questions, benchmark, seed=0, *, out="", page="", submission=""):
    """Print the table and what else the benchmark is known by, and write the files that were asked for."""
    lines, known = report.table(rows, seed), [row for row in rows if row["answers"]]
    figures = (
        metrics.benchmark_metrics(
            benchmark, known, [row["answer"] for row in known], [row["score"] for row in known]
        )
        if known
        else {}
    )
    report.show(lines, figures, benchmark, about.get("tokens_per_s"))
    about = {**about, "asked": {**about.get("asked", {}), "benchmark": benchmark}}
    if out:
        files.write_text(
            metadata_path(out),
            json.dumps(
                {**about, "table": [line._asdict() for line in lines], "figures": figures}, indent=1
            ),
        )
        write_results(out, rows)  # last, since the file that is held goes with it
    if page:
        files.write_text(
            page,
            report.page(
                rows, questions, lines, benchmark, about.get("card", {}).get("folder", out)
            ),
        )
    if submission:
        files.write_text(submission, benchmarks.format_submission(benchmark, rows))
