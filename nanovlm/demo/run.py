"""The demonstration: a model learns to see on two CPU cores, in minutes, and nothing is downloaded.

It draws a small world (fridge.py), trains a language model on text about it and a vision encoder that this language model can read, and then
takes the real road with the two: stitch, align (pretrain), fine-tune (sft), evaluate. Each step is one that a user can type himself, and is
skipped if an earlier run has finished it.
"""

import json
import shutil
import time
from pathlib import Path

from .. import distributed
from ..checkpoints import random_init
from ..checkpoints.checkpoint import list_checkpoints, load_checkpoint
from ..checkpoints.stitch import stitch_folders
from ..evals import benchmarks, runner
from ..preprocess.build import prepare_dataset
from ..preprocess.readers import read_texts
from . import fridge

WORLD = dict(scenes=8000, text=12000, exam=500, seed=0)
POLICY = {
    "tile": 64,
    "patch": 8,
    "shuffle": 2,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "draft": True,
}
SIZES = dict(
    vision={"tile": 64, "patch": 8, "width": 128, "layers": 4, "heads": 4, "ffn": 512},
    decoder={"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 384},
)


def exam(model, questions, blank=False):
    """[(kind, questions, share exactly right)] of the fridge world's exam, the last over all."""
    checkpoint = load_checkpoint(model, distributed.pick_device("auto"))
    return [
        line[:3]
        for line in runner.evaluate(
            checkpoint, questions, benchmark="exact", batch=100, blank=blank, max_tokens=64
        )
    ]


def run(train):
    """train: train.py's own."""
    began = time.time()

    def once(made, why, do, *arguments, **settings):
        done = Path(made).exists()
        print(f"\n== {why}{' (done before)' if done else ''}", flush=True)
        return None if done else do(*arguments, **settings)

    def stage(name, why, **settings):
        print(f"\n== {why}", flush=True)
        train(
            stage=name,
            resume=bool(list_checkpoints(f"out/{name}")),
            validate_every=200,
            log_every=50,
            **settings,
        )

    once(
        "data/fridge/exam.jsonl",
        "Draw fridges, and write down what is in them.",
        fridge.write_world,
        out="data/fridge",
        **WORLD,
    )
    once(
        "out/newborn",
        "Learn a tokenizer from those words. The newborn's eye and brain are random.",
        random_init.create_model,
        read_texts(["data/fridge/text.json"]),
        out="out/newborn",
        vocabulary=512,
        chat_template="mistral",
        image_config=POLICY,
        seed=0,
        **SIZES,
    )
    for name in ("text", "captions", "chats"):
        once(
            f"data/{name}",
            f"Cut and tokenise {name} once, so that training only reads.",
            prepare_dataset,
            model="out/newborn",
            source=[f"data/fridge/{name}.json"],
            images="data/fridge/images",
            out=f"data/{name}",
            row=2048,
        )
    stage("brain", "A brain learns to talk about fridges that it is told of. It is blind.")
    stage(
        "eye",
        "An eye learns to see what that brain can read: the brain stands still, only the eye and a projector train.",
    )
    once(
        "out/stitched",
        "Now the real road. Stitch the two as if we had found them, with a projector that knows nothing.",
        stitch_folders,
        vision="out/eye",
        decoder="out/brain",
        out="out/stitched",
        seed=0,
    )
    questions = benchmarks.load_questions("exact", "data/fridge/exam.jsonl", images="data/fridge/images")
    readings = [q for q in questions if q["kind"] == "reading"]
    before = exam("out/stitched", readings)[-1][2]
    stage(
        "pretrain",
        "Align: only the projector trains, until the brain can read the eye.",
        steps=250,
        batch=5,
        row=320,
        lr=2e-3,
        floor=1e-4,
    )
    after = exam("out/pretrain", readings)[-1][2]
    print(f"fridges read without a mistake: {before:.1%} before, {after:.1%} after")
    stage(
        "sft",
        "Fine-tune: projector and brain learn to answer all kinds of questions.",
        steps=1050,
        batch=12,
        row=320,
        lr=7e-4,
        floor=2e-5,
    )

    print(f"\n== The exam: {len(readings)} fridges that it has never seen.", flush=True)
    marks, blank = (exam("out/sft", questions, blank=grey) for grey in (False, True))
    for (kind, count, share), (_, _, guessed) in zip(marks, blank, strict=True):
        print(
            f"{kind:10} {count:5} questions   {share:6.1%} right   {guessed:6.1%} with a blank picture"
        )
    scores = {
        "scenes": len(readings),
        "before pretrain": before,
        "after pretrain": after,
        "sft": marks,
        "blank": blank,
    }
    Path("out/exam.json").write_text(json.dumps(scores))
    shutil.copy("data/fridge/fridge.jpg", "fridge.jpg")
    print(
        f"\nThe whole road took {time.time() - began:.0f} s. Now ask it: python sample.py --image fridge.jpg"
    )
