"""The demonstration: a model learns to see on two CPU cores, in minutes, without a download.

It draws images (fridge.py), trains a small language model on text, and a vision encoder in front of
it. With these two it does what real training does: stitch, align (pretrain), fine-tune (sft) and
evaluate. Each step is also a command. Steps that are finished are skipped. All files are in
out/demo and data/demo, but for fridge.jpg, which is for the reader. `train` of train.py is passed
in, as nothing here imports a script.
"""

import json
import shutil
import time
from pathlib import Path

from ..checkpoints.checkpoint import list_checkpoints, load_checkpoint
from ..checkpoints.random_init import create_model
from ..checkpoints.stitch import stitch_folders
from ..distributed import pick_device
from ..evals.benchmarks import load_questions
from ..evals.report import html_page, make_table
from ..evals.runner import run_benchmark
from ..preprocess.build import prepare_dataset
from ..preprocess.readers import read_texts
from .attention_score import attention_score, format_attention_score
from .fridge import write_fridges

FRIDGE = "data/demo/fridge"
IMAGE_CONFIG = {
    "tile": 64,
    "patch": 8,
    "shuffle": 2,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "draft": True,
}
BLOCKS = {"width": 128, "layers": 4, "heads": 4}  # of both the vision encoder and the decoder
SHAPES = {
    "vision": {"tile": 64, "patch": 8, **BLOCKS, "intermediate_size": 512},
    "decoder": {**BLOCKS, "kv_heads": 2, "intermediate_size": 384},
}


def run_step(path, title, function, *arguments, **settings):
    """Call a function that writes `path`, unless the path exists."""
    exists = Path(path).exists()
    print(f"\n== {title}{' (done before)' if exists else ''}", flush=True)
    if not exists:
        function(*arguments, **settings)


def run_stage(train, stage, title, out=None, validate_every=200, **settings):
    """Train a stage, or continue it. train: the function of train.py."""
    print(f"\n== {title}", flush=True)
    settings |= {"out": out or f"out/demo/{stage}", "validate_every": validate_every}
    train(stage=stage, resume=bool(list_checkpoints(settings["out"])), log_every=50, **settings)


def benchmark_results(model, questions, blank_images=False):
    """Returns the questions with their answers and scores."""
    checkpoint = load_checkpoint(model, pick_device("auto"))
    options = dict(batch_size=100, blank_images=blank_images, max_tokens=64)
    return run_benchmark(checkpoint, questions, benchmark="exact", **options)[0]


def score_questions(model, questions, blank_images=False):
    """Returns [(kind, number of questions, share of right answers)]; the last is over all kinds."""
    return [line[:3] for line in make_table(benchmark_results(model, questions, blank_images))]


def load_fridge_questions():
    """Returns all questions about the held-out fridges, and those that read a whole fridge."""
    questions = load_questions("exact", f"{FRIDGE}/questions.jsonl", images=f"{FRIDGE}/images")
    return questions, [q for q in questions if q["kind"] == "reading"]


def prepare_records(name, model, out):
    """Prepare text, captions or chats."""
    run_step(
        out,
        f"Prepare {name} once: tiles and token ids, so that training only reads.",
        prepare_dataset,
        model=model,
        source=[f"{FRIDGE}/{name}.json"],
        images="" if name == "text" else f"{FRIDGE}/images",
        out=out,
        seq_len=2048,
    )


def run_demonstration(train):
    """Run all steps. train: the function of train.py."""
    start = time.time()
    prepare_inputs()
    train_parts(train)
    questions, readings = load_fridge_questions()
    before = score_questions("out/demo/stitched", readings)[-1][2]
    run_stage(
        train,
        "pretrain",
        "Align: train the projector, until the language model can use the image features.",
        model="out/demo/stitched",
        data="data/demo/captions",
        steps=250,
        global_batch_size=5,
        seq_len=320,
        lr=2e-3,
        min_lr=1e-4,
        validate_every=25,
    )
    after = score_questions("out/demo/pretrain", readings)[-1][2]
    print(f"fridges that are read without an error: {before:.1%} before, {after:.1%} after")
    run_stage(
        train,
        "sft",
        "Fine-tune: projector and language model learn to answer all kinds of questions.",
        model="out/demo/pretrain",
        data="data/demo/chats",
        steps=1050,
        global_batch_size=12,
        seq_len=320,
        lr=7e-4,
        min_lr=2e-5,
    )
    print(f"\n== Evaluate on {len(readings)} held-out fridges.", flush=True)
    results = benchmark_results("out/demo/sft", questions)
    table = make_table(results)
    scores = {
        "fridges": len(readings),
        "before_pretrain": before,
        "after_pretrain": after,
        "sft": [line[:3] for line in table],
        "blank_image": score_questions("out/demo/sft", questions, blank_images=True),
    }
    print_scores(scores)
    print(format_attention_score(attention_score("out/demo/sft", f"{FRIDGE}/images")))
    Path("out/demo/scores.json").write_text(json.dumps(scores))
    blank_scores = {kind: score for kind, _, score in scores["blank_image"]}
    page = html_page(results, questions, "exact", "out/demo/sft", table, (), blank_scores)
    Path("out/demo/evaluation.html").write_text(page)
    print("each question and its answer: out/demo/evaluation.html")
    shutil.copy(f"{FRIDGE}/fridge.jpg", "fridge.jpg")
    print(
        f"\nThe demonstration took {time.time() - start:.0f} s. "
        "Now ask the model: python sample.py --image fridge.jpg"
    )


def prepare_inputs():
    """Write the images and texts, a model with random weights, and the prepared data."""
    run_step(
        f"{FRIDGE}/questions.jsonl",
        "Draw fridges, and describe them in words.",
        write_fridges,
        out=FRIDGE,
        scenes=8000,
        text=12000,
        eval_scenes=500,
        seed=0,
    )
    run_step(
        "out/demo/random_init",
        "Learn a tokenizer from the text. Vision encoder and language model are random.",
        create_model,
        read_texts([f"{FRIDGE}/text.json"]),
        out="out/demo/random_init",
        vocab_size=512,
        template="mistral",
        image_config=IMAGE_CONFIG,
        seed=0,
        **SHAPES,
    )
    for name in ("text", "captions", "chats"):
        prepare_records(name, "out/demo/random_init", f"data/demo/{name}")


def train_parts(train):
    """Train a language model and a vision encoder, and stitch them as if they were downloaded."""
    run_stage(
        train, "decoder", "Train a language model on descriptions of fridges, without images."
    )
    run_stage(
        train,
        "vision",
        "Train a vision encoder and a projector in front of this language model, which is frozen.",
    )
    run_step(
        "out/demo/stitched",
        "Now as with real models: stitch the two, with a new projector between them.",
        stitch_folders,
        vision="out/demo/vision",
        decoder="out/demo/decoder",
        out="out/demo/stitched",
        seed=0,
    )


def print_scores(scores):
    for (kind, count, score), (_, _, blank) in zip(
        scores["sft"], scores["blank_image"], strict=True
    ):
        print(
            f"{kind:10} {count:5} questions   {score:6.1%} right   {blank:6.1%} with a blank image"
        )
