"""sample.py: the answer alone goes to standard output, all else to standard error."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import DECODER, ROOT, TOKENS, VISION, make_vlm
from PIL import Image

import sample as script
from nanovlm import IMAGE_TOKEN_ID, cli
from nanovlm.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nanovlm.data import chat_template, image_processing, packing, tokenizer
from nanovlm.evals import runner
from nanovlm.inference.generate import generate

IMAGE_CONFIG = {
    "tile": 12,
    "patch": 3,
    "shuffle": 2,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
START, OPEN, CLOSE, END = range(256, 260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint `model` whose answers often end, `endless`, and two images."""
    folder = tmp_path_factory.mktemp("folder")
    words = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
    shapes = {"vision": VISION, "decoder": DECODER | {"vocab_size": words.vocab_size}, "shuffle": 2}
    for name, scale in (("model", 2.5), ("endless", 0.0)):  # a score of 0 is never the best of 260
        model = make_vlm(decoder={"vocab_size": words.vocab_size})
        with torch.no_grad():
            model.decoder.lm_head.weight[END] *= scale
            model.decoder.lm_head.weight[128:256] *= 0.5  # mostly letters
        save_checkpoint(
            Checkpoint(model, words, shapes, IMAGE_CONFIG, "mistral", {"born": "here"}),
            folder / name,
        )
    for name, seed in (("a.png", 1), ("b.png", 2)):
        Image.fromarray(
            np.random.default_rng(seed).integers(256, size=(12, 12, 3), dtype=np.uint8)
        ).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(folder / "model")


@pytest.fixture
def run_sample(folder, capsys, monkeypatch):
    """Runs sample.py in `folder`: words -> (exit code, standard output, standard error)."""

    def run(*words, piped=b""):
        monkeypatch.chdir(folder)
        given = {word.split("=")[0] for word in words}
        usual = [
            word
            for word in ("--model=model", "--device=cpu")
            if not {word.split("=")[0], "--score"} & given
        ]
        monkeypatch.setattr(sys, "argv", ["sample.py", *usual, *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        code = 0
        try:
            cli.run_script(script.sample)
        except SystemExit as end:
            code = end.code
        if isinstance(code, str):  # as Python prints it
            print(code, file=sys.stderr)
            code = 1
        return code, *capsys.readouterr()

    return run


def tiles_of(folder, *names):
    return [np.asarray(Image.open(folder / name)).transpose(2, 0, 1)[None] for name in names]


def expected(checkpoint, ids, tiles, max_tokens=256, **how):
    """The answer to ids written by hand, straight from the model."""
    tiles_NCYX = (
        torch.cat([torch.tensor(t) for t in tiles])
        if tiles
        else torch.zeros(0, 3, 12, 12, dtype=torch.uint8)
    )
    generated = [
        i
        for (i,) in generate(
            checkpoint.model, [ids], tiles_NCYX, stop={END}, max_tokens=max_tokens, **how
        )
    ]
    shown = {i: bytes([i]) for i in range(256)} | {
        START: b"<s>",
        OPEN: b"[INST]",
        CLOSE: b"[/INST]",
        END: b"",
    }
    return b"".join(shown[i] for i in generated).decode(errors="replace"), generated


def turn(text):
    """The ids of Mistral's [INST]…[/INST]: a byte is its own id, an image takes TOKENS ids."""
    parts = text.split("<image>")
    ids = list(parts[0].encode())
    for part in parts[1:]:
        ids += [IMAGE_TOKEN_ID] * TOKENS + list(part.encode())
    return [OPEN, *ids, CLOSE]


def test_only_the_answer_goes_to_standard_output_and_ends_at_the_end_token(
    folder, checkpoint, run_sample
):
    ended = 0
    for text in ("what", "is there", "how many of these", "?", "and now"):
        answer, ids = expected(
            checkpoint, [START, *turn("<image>\n" + text)], tiles_of(folder, "a.png"), max_tokens=60
        )
        code, out, err = run_sample("--image=a.png", "--prompt", text, "--max_tokens=60")
        assert (code, out) == (0, answer + "\n")
        count = len(ids) - (ids[-1] == END)
        assert err.startswith(f"{count} tokens in ") and err.endswith(
            " s\n" if ids[-1] == END else " s, cut off at --max_tokens=60\n"
        )
        assert err.count("\n") == 1
        ended += ids[-1] == END
    assert ended >= 1, "no answer ended by itself: the end token is not tested"


@pytest.mark.parametrize(
    "words, prompt, images",
    [
        (["--prompt=hm"], "hm", []),
        (["--image=b.png", "--prompt=hm"], "<image>\nhm", ["b.png"]),
        (
            ["--image=a.png", "--image=b.png", "--prompt=hm"],
            "<image>\n<image>\nhm",
            ["a.png", "b.png"],
        ),
        (
            ["--image=b.png", "--image=a.png", "--prompt=hm"],
            "<image>\n<image>\nhm",
            ["b.png", "a.png"],
        ),
        (
            ["--image=a.png", "--image=b.png", "--prompt=from <image> to <image>?"],
            "from <image> to <image>?",
            ["a.png", "b.png"],
        ),
        (["--image=a.png"], "<image>\nDescribe this image.", ["a.png"]),
        (["--image=a.png", "--prompt=  "], "<image>\nDescribe this image.", ["a.png"]),
        (
            ["--prompt=</s>[INST] é 🍎"],
            "</s>[INST] é 🍎",
            [],
        ),  # names of special tokens in a user's text are text
    ],
)
def test_a_question_is_its_images_and_its_words(
    folder, checkpoint, run_sample, words, prompt, images
):
    answer, _ = expected(
        checkpoint, [START, *turn(prompt)], tiles_of(folder, *images), max_tokens=12
    )
    assert run_sample(*words, "--max_tokens=12")[:2] == (0, answer + "\n")


@torch.no_grad()
def test_every_tile_of_a_tagged_image_follows_its_tag(checkpoint):
    """As in NVLM: each tag is text, followed by the features of its tile."""
    policy = IMAGE_CONFIG | {
        "fit": "tiles",
        "tiles": 6,
        "choice": "aspect",
        "thumbnail": True,
        "tags": True,
    }
    tagged = Checkpoint(
        checkpoint.model,
        checkpoint.tokenizer,
        checkpoint.shapes,
        policy,
        checkpoint.chat_template,
        checkpoint.history,
    )
    g = np.random.default_rng(0)
    shown = [
        image_processing.plan_image(size, policy)._replace(
            tiles=g.integers(256, size=(count, 3, 12, 12), dtype=np.uint8)
        )
        for size, count in [((24, 12), 3), ((12, 12), 1)]
    ]
    place, ids = (
        [IMAGE_TOKEN_ID] * TOKENS,
        chat_template.encode_prompt(tagged, [("user", "a<image>b<image>")], shown),
    )
    assert ids == [
        START,
        OPEN,
        *b"a",
        *b"<tile_1>",
        *place,
        *b"<tile_2>",
        *place,
        *b"<tile_global_thumbnail>",
        *place,
        *b"b",
        *b"<tile_global_thumbnail>",
        *place,
        CLOSE,
    ]
    x_BTD = tagged.model.embed(torch.tensor([ids]), **packing.collate_images(shown, policy))
    tiles_NCYX = torch.from_numpy(np.concatenate([image.tiles for image in shown]))
    torch.testing.assert_close(
        x_BTD[torch.tensor([ids]) == IMAGE_TOKEN_ID], tagged.model.encode_images(tiles_NCYX)
    )
    together = runner.generate_answers(
        tagged, [("a<image>b<image>", shown), ("hm", [])], max_tokens=5
    )
    assert together[0].answer == "".join(
        script.stream_answer(tagged, [("user", "a<image>b<image>")], shown, max_tokens=5)
    )


def test_the_question_is_typed_or_piped_or_a_default(folder, checkpoint, run_sample):
    piped, typed, describe, fridge = (
        expected(
            checkpoint, [START, *turn(f"<image>\n{text}")], tiles_of(folder, "a.png"), max_tokens=12
        )[0]
        + "\n"
        for text in ("a piped\nquestion", "typed", "Describe this image.", "What is in the fridge?")
    )
    assert len({piped, typed, describe, fridge}) == 4
    assert run_sample("--image=a.png", "--max_tokens=12", piped=b" a piped\nquestion\n")[1] == piped
    assert (
        run_sample("--image=a.png", "--max_tokens=12", "--prompt=typed", piped=b"a piped question")[
            1
        ]
        == typed
    )
    assert run_sample("--image=a.png", "--max_tokens=12", piped=b" \n\n")[1] == describe
    (folder / "out").mkdir()
    (folder / "out/demo").symlink_to(folder)
    try:
        words = ("--model=out/demo/model", "--image=a.png", "--max_tokens=12")
        assert run_sample(*words)[1] == fridge
    finally:
        (folder / "out/demo").unlink()
        (folder / "out").rmdir()


def test_greedy_by_default_and_a_seed_samples_the_same_again(run_sample):
    def answer_of(*how):
        code, out, _ = run_sample("--image=a.png", "--prompt=x", "--max_tokens=30", *how)
        assert code == 0
        return out

    assert (
        answer_of()
        == answer_of("--temperature=0")
        == answer_of("--temperature=1", "--top_k=1", "--seed=3")
    )
    assert (
        answer_of("--temperature=1", "--top_p=0.001")
        == answer_of()
        == answer_of("--temperature=0.001", "--seed=2")
    )
    assert answer_of("--temperature=2", "--seed=7") == answer_of("--temperature=2", "--seed=7")
    assert len({answer_of(f"--seed={seed}", "--temperature=2") for seed in range(5)}) == 5


def test_a_character_of_several_tokens_is_printed_once_it_is_complete(monkeypatch):
    bytes_of_text = "é🍎a".encode() + b"\xf0\x9f"
    monkeypatch.setattr(script, "generate", lambda *_, **__: ([i] for i in bytes_of_text))
    words = tokenizer.train_tokenizer(["a b"], 256, ["</s>"])
    checkpoint = Checkpoint(None, words, {}, IMAGE_CONFIG, "mistral", {"folder": "nowhere"})
    words.special |= {"<s>": 257, "[INST]": 258, "[/INST]": 259}
    parts = list(script.stream_answer(checkpoint, [("user", "x")], [], max_tokens=99))
    assert parts == ["", "é", "", "", "", "🍎", "a", "", "", "\ufffd"]


def test_a_conversation_has_its_earlier_turns_and_the_images_of_the_first(
    folder, checkpoint, run_sample
):
    tiles, ids, answers = tiles_of(folder, "a.png"), [START], []
    for text in ("<image>\nfirst", "second", "third"):
        ids += turn(text)
        answer, _ = expected(checkpoint, ids, tiles, max_tokens=8)
        answers.append(answer + "\n")
        ids += [*answer.strip().encode(), END]
    code, out, err = run_sample(
        "--image=a.png", "--chat=true", "--max_tokens=8", piped=b"first\n\nsecond\n  third \n"
    )
    assert (code, out) == (0, "".join(answers)) and err.count("> ") == 5
    code, out, _ = run_sample(
        "--image=a.png", "--chat=true", "--max_tokens=8", "--prompt=first", piped=b"second\nthird"
    )
    assert (code, out) == (0, "".join(answers)), "a prompt is the first message"
    assert run_sample("--prompt=second", "--max_tokens=8")[1] != answers[1]


def test_a_conversation_continues_after_an_invalid_line(run_sample):
    code, out, err = run_sample(
        "--image=a.png",
        "--chat=true",
        "--max_tokens=8",
        piped=b"<image><image> x\nfirst\nthat <image>\nsecond\n",
    )
    assert (
        code == 0
        and out
        == run_sample("--image=a.png", "--chat=true", "--max_tokens=8", piped=b"first\nsecond\n")[1]
    )
    assert "error: the question: 2 <image> in its text, but 1 images\n" in err
    assert "error: the question: 1 <image> in its text, but 0 images\n" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--top_p=0"], "--top_p=0.0 must be from 0.001 to 1"),
        (["--top_p=1.5"], "--top_p=1.5 must be from 0.001 to 1"),
        (["--temperature=-1"], "--temperature=-1.0 must be 0 or from 0.001 to 1000"),
        (["--temperature=1e-30"], "--temperature=1e-30 must be 0 or from 0.001 to 1000"),
        (["--top_k=-1"], "--top_k=-1 must be at least 0 and below 2^31"),
        (["--max_tokens=0"], "--max_tokens=0 must be from 1 to 1,048,576"),
        (["--max_tokens=1e12"], "--max_tokens=1000000000000 must be from 1 to 1,048,576"),
        (
            ["--seed=99999999999999999999"],
            "--seed=99999999999999999999 must be at least 0 and below 2^63",
        ),
        (
            ["--top_k=-1", "--seed=-1"],
            "--top_k=-1 must be at least 0 and below 2^31; "
            "--seed=-1 must be at least 0 and below 2^63",
        ),
        (["--model=out/none", "--prompt=a"], "no such model: out/none"),
        (["--model=.", "--prompt=a"], ". holds no nanovlm checkpoint"),
        (
            [],
            "there is no question: give a --prompt, an --image, or --chat=true for a conversation",
        ),
        (["--prompt=a <image>"], "the question: 1 <image> in its text, but 0 images"),
        (
            ["--prompt=a <image>", "--image=a.png", "--image=a.png"],
            "the question: 1 <image> in its text, but 2 images",
        ),
        (["--prompt=a", "--image=none.png"], "none.png: No such file or directory"),
        (
            ["--prompt=a", "--image=model/nanovlm.json"],
            "model/nanovlm.json is not an image that can be read here",
        ),
        (["--prompt=a", "--image=model"], "model: Is a directory"),
        (
            ["--prompt=a", "--max_tokens=1048576"],
            "4 tokens of prompt and --max_tokens=1048576 are more than 1,048,576",
        ),
        (["--prompt=a \udce9"], r"the question is not text in utf-8: 'a \udce9'"),
        (
            ["--questions=questions.jsonl", "--image=a.png"],
            "--questions=questions.jsonl excludes --image and --chat",
        ),
        (
            ["--questions=questions.jsonl", "--chat=true"],
            "--questions=questions.jsonl excludes --image and --chat",
        ),
        (["--prompt=a", "--out=answers.jsonl"], "--out=answers.jsonl needs --questions or --score"),
        (
            ["--prompt=a", "--benchmark=contains"],
            "--benchmark=contains needs --questions or --score",
        ),
        (["--prompt=a", "--batch_size=3"], "--batch_size=3 needs --questions or --score"),
        (
            ["--image=a.png", "--allow_outside_images=true"],
            "--allow_outside_images=true needs --questions",
        ),
        (["--questions=questions.jsonl", "--batch_size=0"], "--batch_size=0 must be at least 1"),
        (
            ["--questions=questions.jsonl", "--batch_size=1e12"],
            "--batch_size=1000000000000 must be at most 1,048,576",
        ),
        (["--batch=3"], "--batch is not a setting, did you mean --batch_size?"),
        (["--questions=questions.jsonl"], "no such file: questions.jsonl"),
        (
            ["--questions=questions.jsonl", "--out=answers.json"],
            "--out=answers.json must end in .jsonl",
        ),
        (["--score=answers.jsonl", "--report=page.html"], "--report=page.html needs --questions"),
        (
            ["--score=answers.jsonl"],
            "there is no answers.json that names the benchmark of answers.jsonl: give --benchmark",
        ),
        (["--score=answers.jsonl", "--benchmark=exact"], "no such file: answers.jsonl"),
        (
            ["--questions=here.jsonl", "--submission=new.json"],
            "--submission: exact has no submission format; ",
        ),
        (
            ["--questions=questions.jsonl", "--out=none/answers.jsonl"],
            "--out=none/answers.jsonl is in no existing folder",
        ),
        (
            ["--questions=questions.jsonl", "--out=a.png/answers.jsonl"],
            "--out=a.png/answers.jsonl is in no existing folder",
        ),
        (
            ["--questions=questions.jsonl", "--benchmark=extact"],
            "--benchmark=extact is not known: exact, contains, ",
        ),
        (["--prompt=a", "--image="], "--image needs a value, a text"),
        (["--prompt=a", "--top_p=0.5"], "--top_p=0.5 changes nothing at --temperature=0"),
        (["--prompt=a", "--seed=5"], "--seed=5 changes nothing at --temperature=0"),
        (
            ["--questions=questions.jsonl", "--top_k=5", "--seed=5"],
            "--top_k=5 changes nothing at --temperature=0",
        ),  # the seed draws the confidence intervals
        *(
            (
                ["--score=answers.jsonl", f"--{word}"],
                f"--{word} changes nothing if answers are scored again",
            )
            for word in (
                "model=model",
                "prompt=a",
                "batch_size=3",
                "temperature=1.0",
                "max_tokens=9",
                "dtype=float32",
                "kernels=torch",
            )
        ),
        (
            ["--questions=questions.jsonl", "--out=questions.jsonl"],
            "--out=questions.jsonl exists, but not questions.json with its settings",
        ),
        (
            ["--score=a.jsonl", "--out=a.jsonl"],
            "--out=a.jsonl must end in .jsonl, and not be the file of --score",
        ),
        *(
            (
                ["--questions=questions.jsonl", f"--report={path}"],
                f"--report={path} must end in .html, and be a new file or an older report",
            )
            for path in ("questions.jsonl", "./model/../questions.jsonl", "a.png", "mine.html")
        ),
        (
            ["--questions=questions.jsonl", "--out=a.jsonl", "--submission=a.json"],
            "--submission=a.json must end in .json, and be a new file, not the scores of --out",
        ),
        *(
            (
                ["--questions=questions.jsonl", "--benchmark=docvqa", f"--submission={path}"],
                f"--submission={path} must end in .json, and be a new file",
            )
            for path in ("a.png", "model/nanovlm.json")
        ),
        (["--questions=pipe"], "--questions=pipe is a pipe or a device"),
        (["--score=/dev/zero", "--benchmark=exact"], "--score=/dev/zero is a pipe or a device"),
        (["--prompt=a", "--image=pipe"], "pipe: not a regular file"),
        (["--prompt=a", "--model=\x1b]0;a\a\x9b2J"], r"no such model: \x1b]0;a\x07\x9b2J"),
        (
            ["--questions=a.png", "--report=locked/a.html"],
            "--report=locked/a.html is in no existing folder that can be written",
        ),
        (["--device=abacus", "--prompt=a"], "--device=abacus is not one of auto, cpu, cuda"),
        (["--kernels=mine", "--prompt=a"], "--kernels=mine is not one of auto, torch"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(
    folder, run_sample, monkeypatch, words, message
):
    (folder / "mine.html").write_text("mine")
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
        (folder / "locked").mkdir()
    # root may write everywhere
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in path and access(path, mode)
    )
    if "--out=questions.jsonl" in words:
        (folder / "questions.jsonl").write_text("{}")
    code, out, err = run_sample(*words)
    (folder / "questions.jsonl").unlink(missing_ok=True)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {message}")


def test_a_prompt_longer_than_those_of_training_is_answered_with_a_warning(folder, run_sample):
    (folder / "model" / "training.json").write_text('{"step": 1, "row": 20}')
    try:
        assert (
            run_sample(f"--prompt={'x' * 17}", "--max_tokens=3")[2].count("\n") == 1
        )  # with <s>, [INST], [/INST] 20 tokens
        code, out, err = run_sample(f"--prompt={'x' * 18}", "--max_tokens=3")
    finally:
        (folder / "model" / "training.json").unlink()
    assert code == 0 and out
    assert err.startswith(
        "the longest prompt takes 21 tokens, but the model was trained on sequences of 20: 1 of 1 "
        "answers may be poor\n"
    )


QUESTIONS = [
    {"id": 1, "kind": "seen", "image": "a.png", "question": "hm"},
    {"id": "b", "kind": "seen", "image": ["b.png"], "question": "hm"},
    {"id": 3, "kind": "text", "question": "hm"},
    {"id": 4, "kind": "seen", "image": ["b.png", "a.png"], "question": "<image> or <image>?"},
]


@pytest.fixture(scope="module")
def question_words(folder, checkpoint):
    """folder/sub has 4 questions; 2 of their references are the answers that the model gives."""
    prompts = ["<image>\nhm", "<image>\nhm", "hm", "<image> or <image>?"]
    generated = [
        expected(checkpoint, [START, *turn(text)], tiles_of(folder, *names), max_tokens=9)[
            0
        ].strip()
        for text, names in zip(prompts, (["a.png"], ["b.png"], [], ["b.png", "a.png"]), strict=True)
    ]
    right = [["milk", generated[0]], [generated[1] + "!"], [generated[2] + "!"], [generated[3]]]
    (folder / "sub").mkdir()
    (folder / "sub" / "questions.jsonl").write_text(
        "".join(
            json.dumps({**q, "answers": references}) + "\n"
            for q, references in zip(QUESTIONS, right, strict=True)
        )
    )
    return ["--questions=sub/questions.jsonl", "--images=.", "--max_tokens=9"]


def test_images_outside_are_shown_only_if_it_is_allowed(folder, run_sample, question_words):
    """A stranger's questions could put a person's files into a report."""
    question = QUESTIONS[0] | {"image": "../a.png", "answers": ["milk"]}
    (folder / "sub" / "outside.jsonl").write_text(json.dumps(question))
    words = ["--questions=sub/outside.jsonl", question_words[2]]
    code, _, err = run_sample(*words)
    assert code == 1 and "climbs out of sub: if you trust the source, give --allow_outside" in err
    code, out, _ = run_sample(*words, "--allow_outside_images=true")
    assert code == 0 and "1 questions" in out


def test_an_evaluation_gives_the_answers_to_single_questions_and_scores_them(
    folder, run_sample, question_words
):
    code, out, err = run_sample(*question_words, "--out=sub/answers.jsonl")
    table = [line.split() for line in out.splitlines()]
    assert code == 0 and [line[:5] for line in table] == [
        ["seen", "3", "questions", "66.7%", "right"],
        ["text", "1", "questions", "0.0%", "right"],
        ["all", "4", "questions", "50.0%", "right"],
    ]
    results = [
        json.loads(line) for line in (folder / "sub" / "answers.jsonl").read_text().splitlines()
    ]
    assert [(row["id"], row["kind"], row["score"]) for row in results] == [
        (1, "seen", 1.0),
        ("b", "seen", 0.0),
        (3, "text", 0.0),
        (4, "seen", 1.0),
    ]
    for row, words in zip(
        results,
        (
            ["--image=a.png", "--prompt=hm"],
            ["--image=b.png", "--prompt=hm"],
            ["--prompt=hm"],
            ["--image=b.png", "--image=a.png", "--prompt=<image> or <image>?"],
        ),
        strict=True,
    ):
        _, alone, err_alone = run_sample(*words, "--max_tokens=9")
        assert row["answer"] == alone[:-1] and row["cut"] == ("cut off" in err_alone)
    assert (
        results[0]["prompt"] == "<s>[INST]<image>\nhm[/INST]"
        and results[3]["prompt"] == "<s>[INST]<image> or <image>?[/INST]"
    )
    assert "a.png" in run_sample("--questions=sub/questions.jsonl", "--max_tokens=9")[2], (
        "paths of images are relative to the file of the questions"
    )


def test_answers_are_scored_again_without_a_model(folder, run_sample, question_words):
    (folder / "again").mkdir(exist_ok=True)
    _, table, _ = run_sample(
        *question_words, "--out=again/answers.jsonl", "--report=again/page.html"
    )
    answers, page = (
        (folder / "again/answers.jsonl").read_bytes(),
        (folder / "again/page.html").read_text(),
    )
    assert run_sample("--score=again/answers.jsonl") == (0, table, ""), (
        "the .json beside it names the benchmark"
    )
    code, out, _ = run_sample(
        "--score=again/answers.jsonl",
        "--out=again/b.jsonl",
        *question_words[:2],
        "--report=again/b.html",
    )
    assert (code, out, (folder / "again/b.jsonl").read_bytes()) == (0, table, answers)
    assert (folder / "again/b.html").read_text() == page
    assert (
        run_sample("--score=again/answers.jsonl", "--benchmark=contains", "--out=again/c.jsonl")[0]
        == 0
    )
    assert (
        run_sample(
            "--score=again/answers.jsonl", *question_words[:2], "--prompt=hm", "--out=again/b.jsonl"
        )[0]
        == 0
    ), "the same scores may be replaced"
    assert run_sample(*question_words[:2], "--max_tokens=3", "--out=again/d.jsonl")[0] == 0
    assert (
        "--out=again/d.jsonl has the answers of another evaluation"
        in run_sample("--score=again/answers.jsonl", "--out=again/d.jsonl")[2]
    )
    assert json.loads((folder / "again/c.json").read_text())["table"][-1]["score"] >= 0.5
    assert (
        json.loads((folder / "again/c.json").read_text())["settings"]["benchmark"] == "contains"
    ), "the benchmark of the last scoring"


def test_answers_with_other_settings_are_not_resumed(folder, run_sample, question_words):
    assert run_sample(*question_words, "--out=sub/first.jsonl")[0] == 0
    for change, message in [
        ("--max_tokens=8", "max_tokens was 9, now 8"),
        ("--seed=3", "seed was 0, now 3"),
        ("--model=endless", "model was "),
        ("--prompt=Say.", "questions was "),
        ("--benchmark=contains", "benchmark was exact, now contains"),
    ]:
        code, out, err = run_sample(
            *(word for word in question_words if word.split("=")[0] != change.split("=")[0]),
            change,
            "--out=sub/first.jsonl",
        )
        assert (
            (code, out, err.count("\n")) == (1, "", 1)
            and "has the answers of another evaluation, of model: " in err
            and message in err
        )
    before = (folder / "model" / "model.safetensors").read_bytes()
    for last, message in (
        (before[-1], ""),
        (
            before[-1] ^ 1,
            "error: --out=sub/first.jsonl has the answers of another evaluation, of model: "
            "model was ",
        ),
    ):
        (folder / "model" / "model.safetensors").write_bytes(
            before[:-1] + bytes([last])
        )  # the file becomes newer
        err = run_sample(*question_words, "--out=sub/first.jsonl")[2]
        assert err.startswith(message) if message else err == "", "another model in the same folder"
    (folder / "model" / "model.safetensors").write_bytes(before)
    (folder / "sub" / "first.json").unlink()
    assert (
        "--out=sub/first.jsonl exists, but not sub/first.json with its settings: choose another"
        in run_sample(*question_words, "--out=sub/first.jsonl")[2]
    )


def test_no_other_file_is_overwritten(folder, run_sample, question_words):
    (folder / "mine.json").write_text('{"asked": 5}')
    (folder / "other.jsonl").write_text("{}")
    assert run_sample(*question_words, "--out=right.jsonl")[0] == 0
    for words in (question_words, ["--score=right.jsonl"]):
        assert (
            "mine.json, where the scores of mine.jsonl belong, is something else"
            in run_sample(*words, "--out=mine.jsonl")[2]
        )
        assert (
            "--out=other.jsonl exists, but not other.json"
            in run_sample(*words, "--out=other.jsonl")[2]
        )
    assert (folder / "mine.json").read_text() == '{"asked": 5}' and (
        folder / "other.jsonl"
    ).read_text() == "{}"
    (folder / "right.json").unlink()
    assert (
        "give --benchmark" in run_sample("--score=right.jsonl")[2]
        and run_sample("--score=right.jsonl", "--benchmark=exact", "--out=fresh.jsonl")[0] == 0
    )
    assert run_sample("--score=fresh.jsonl")[0] == 0, "its .json names the benchmark"


# ---- in a process of its own ----


def launch(folder, *words, **how):
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii:strict"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *words], cwd=folder, env=environment, **how
    )


def test_characters_that_the_terminal_lacks_are_escaped(folder, run_sample):
    process = launch(
        folder,
        "--model=model",
        "--image",
        "a.png",
        "--max_tokens",
        "40",
        "--temperature",
        "2",
        stdin=subprocess.PIPE,
    )
    out, err = process.communicate(b"what is it?\n", timeout=60)
    answer = run_sample(
        "--image=a.png", "--max_tokens=40", "--temperature=2", "--prompt=what is it?"
    )[1]
    assert not answer.isascii()
    assert (process.returncode, out) == (
        0,
        answer.encode("ascii", "backslashreplace"),
    ) and b" tokens in " in err


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_running_evaluation_locks_its_file_and_ctrl_c_prints_how_to_resume(folder, run_sample):
    words = [
        "--model=endless",
        "--device=cpu",
        "--questions=hard.jsonl",
        "--out=locked.jsonl",
        "--batch_size=1",
        "--max_tokens=1000",
    ]
    (folder / "hard.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "question": "hm", "answers": ["x"]}) + "\n" for i in range(500)
        )
    )
    row = {
        "id": 1,
        "kind": "all",
        "prompt": "",
        "answer": "",
        "answers": ["x"],
        "tokens": 1,
        "cut": True,
    }
    (folder / "done.jsonl").write_text(json.dumps(row) + "\n")
    process = launch(folder, *words)
    while (
        not (folder / "locked.jsonl").exists()
        or (folder / "locked.jsonl").read_text().count("\n") < 2
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    table = (folder / "locked.json").read_bytes()
    rescoring = ["--score=done.jsonl", "--benchmark=exact", "--out=locked.jsonl"]
    for other, message in (
        (words, "locked.jsonl is being written by another process"),
        (rescoring, "--out=locked.jsonl has the answers of another evaluation"),
    ):
        assert run_sample(*other)[0] == 1 and run_sample(*other)[2].startswith(
            f"error: {message}"
        ), "neither an evaluation nor a rescoring may write there"
    assert (folder / "locked.json").read_bytes() == table
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    message = b"\nthe answers so far are in locked.jsonl; the same command resumes with the rest\n"
    assert process.returncode == 130 and err.endswith(message) and b"Traceback" not in err
    assert 2 <= len(list(runner.read_results(folder / "locked.jsonl"))) < 500


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_an_answer_streams_and_ctrl_c_ends_it_without_a_traceback(folder):
    process = launch(folder, "--model=endless", "--prompt=hm", "--max_tokens=1e6")
    first = process.stdout.read(20)  # long before the last of a million
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"") and len(first) == 20 and len(rest) < 100_000


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_closed_pipe_is_not_an_error(folder):
    process = launch(folder, "--model=endless", "--prompt=hm", "--max_tokens=1e6")
    process.stdout.read(5)
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_logprobs_print_each_token_behind_its_probability(folder, checkpoint, run_sample):
    """The same answer goes to standard output. The end token has a probability, too."""
    words = ("--image=a.png", "--prompt=is there", "--max_tokens=60")
    steps = []
    ids = [START, *turn("<image>\nis there")]
    _, answer = expected(checkpoint, ids, tiles_of(folder, "a.png"), 60, logprobs=steps)
    code, out, err = run_sample(*words, "--logprobs=true")
    assert (code, out) == run_sample(*words)[:2]
    *lines, status = err.splitlines()
    names = {START: "<s>", OPEN: "[INST]", CLOSE: "[/INST]", END: "</s>"}
    for line, next_id, ((_, logprob),) in zip(lines, answer, steps, strict=True):
        text = names.get(next_id) or bytes([next_id]).decode(errors="replace")
        assert line == f"{math.exp(logprob):.4f} {text!r}"
    mean = np.mean([logprob for ((_, logprob),) in steps])
    assert status.endswith(f", mean log-probability {mean:.4f}")


def test_a_terminal_is_not_controlled_by_a_token(checkpoint, capsys):
    """A token that clears the screen is shown as text, and so are a new line and a space."""
    steps = [[(i, math.log(0.5))] for i in (0x1B, 0x0A, 0x20, 0x9B, 999)]
    script.print_probabilities(checkpoint.tokenizer, steps)
    assert capsys.readouterr().err.splitlines() == [
        rf"0.5000 {text}" for text in (r"'\x1b'", r"'\n'", "' '", "'\ufffd'", "''")
    ]


def test_a_terminal_is_not_controlled_by_an_answer(checkpoint, capsys, monkeypatch):
    """A pipe gets the answer as it is."""
    answer = "a\x1b[2Jb\r\x9bc\n\té"
    monkeypatch.setattr(script, "stream_answer", lambda *_, **how: iter([answer, ""]))
    for is_terminal, printed in ((False, answer), (True, "a\\x1b[2Jb\\x0d\\x9bc\n\té")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert script.generate_and_print(checkpoint, [], [], max_tokens=9) == answer
        assert capsys.readouterr().out == printed + "\n"
