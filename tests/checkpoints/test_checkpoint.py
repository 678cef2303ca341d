"""A checkpoint is complete or refused; saving and loading change nothing in it."""

import errno
import json

import pytest
import torch
from conftest import DECODER, VISION, make_batch, make_samples, make_vlm
from safetensors.torch import load_file, save_file

from nanovlm import UserError
from nanovlm.checkpoints import sharded, stitch
from nanovlm.checkpoints.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_checkpoint_info,
    read_json,
    read_tensors,
    remove_unfinished,
    save_checkpoint,
    saved_parameters,
)
from nanovlm.data import tokenizer
from nanovlm.training import resume

IMAGE_CONFIG = {
    "tile": 12,
    "patch": 3,
    "shuffle": 2,
    "fit": "pad",
    "resample": "bilinear",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.3, 0.2, 0.1],
}


@pytest.fixture(scope="module")
def words():
    return tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])


def make_checkpoint(words, seed=0, image_config=IMAGE_CONFIG, template="mistral", **decoder):
    decoder = {"vocab_size": words.vocab_size, **decoder}
    model = make_vlm(seed, decoder=decoder, mean=image_config["mean"], std=image_config["std"])
    shapes = {"vision": VISION, "decoder": DECODER | decoder, "shuffle": 2}
    return Checkpoint(model, words, shapes, image_config, template, {"random_init": f"seed {seed}"})


def save_step(checkpoint, out, step):
    """Save a step of a run that trains only the projector's last bias."""
    bias = checkpoint.model.requires_grad_(False).projector.linear_2.bias.requires_grad_(True)
    optimizer, bias.grad = torch.optim.AdamW([bias]), torch.ones_like(bias)
    optimizer.step()
    resume.Saver(checkpoint, optimizer, out, {}, keep_checkpoints=1).save(step, as_one_file=True)


def same_tensors(a, b):
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_is_loaded(words, tmp_path, tied):
    saved = make_checkpoint(words, tied=tied)
    save_checkpoint(saved, tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a")
    same_tensors(loaded.model.state_dict(), saved.model.state_dict())
    assert (loaded.model.decoder.lm_head.weight is loaded.model.decoder.embed_tokens.weight) == tied
    assert ("decoder.lm_head.weight" in load_file(tmp_path / "a" / "model.safetensors")) != tied
    assert (loaded.shapes, loaded.image_config, loaded.chat_template) == (
        saved.shapes,
        saved.image_config,
        saved.chat_template,
    )
    assert loaded.fingerprint() == saved.fingerprint() and loaded.history == {
        "random_init": "seed 0",
        "folder": str(tmp_path / "a"),
    }
    batch = make_batch([make_samples()])
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch), saved.model(**batch))


def test_missing_unused_and_misshapen_tensors_are_all_named(words, tmp_path):
    save_checkpoint(make_checkpoint(words), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["vision.positions"]
    tensors["decoder.extra"] = torch.zeros(2)
    tensors["projector.linear_1.weight"] = tensors["projector.linear_1.weight"].T.contiguous()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "a")
    assert str(error.value) == (
        f"{tmp_path / 'a' / 'model.safetensors'}: vision.positions is missing; decoder.extra in "
        "model.safetensors is not used; projector.linear_1.weight in model.safetensors is [80, 24], "
        "the model expects [24, 80]"
    )


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_with_nan_or_infinity_is_named(words, tmp_path, number):
    save_checkpoint(make_checkpoint(words), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["vision.layers.1.up_proj.bias"][3] = number
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16, None):
        with pytest.raises(
            UserError,
            match="vision.layers.1.up_proj.bias in model.safetensors holds a NaN or infinite value",
        ):
            load_checkpoint(tmp_path / "a", dtype=dtype)


def test_load_checkpoint_info_reads_all_but_the_weights(words, tmp_path):
    save_checkpoint(make_checkpoint(words), tmp_path / "run" / "step-000003")
    loaded = load_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "step-000003" / "model.safetensors").unlink()
    info = load_checkpoint_info(tmp_path / "run")
    assert (
        info.model is None
        and info.fingerprint() == loaded.fingerprint() == make_checkpoint(words).fingerprint()
    )
    assert (info.shapes, info.image_config, info.chat_template, info.history) == (
        loaded.shapes,
        loaded.image_config,
        loaded.chat_template,
        loaded.history,
    )
    assert info.tokenizer.encode("a b") == words.encode("a b")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(words, tmp_path):
    checkpoint = make_checkpoint(words, vocab_size=words.vocab_size - 1)
    save_checkpoint(checkpoint, tmp_path / "a")
    with pytest.raises(
        UserError,
        match="nanovlm.json: the vocabulary is 259, its folder's tokenizer knows 260 tokens: "
        r"'</s>' \(259\) has no embedding; remove it from the tokenizer's files, or save the model",
    ):
        load_checkpoint(tmp_path / "a")


FILES = [
    "model.safetensors",
    "nanovlm.json",
    "tokenizer.json",
    "training.safetensors",
    "training.json",
]


@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused_by_name(words, tmp_path, name, keep):
    path = tmp_path / "step-000003" / name
    save_step(make_checkpoint(words), tmp_path, 3)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(FILES)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    read = {"training.json": read_json, "training.safetensors": read_tensors}.get(
        name, lambda p: load_checkpoint(p.parent)
    )
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    if name.endswith("safetensors"):
        assert f"{path.stat().st_size:,} bytes" in str(error.value)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_is_named(words, tmp_path, name):
    save_checkpoint(make_checkpoint(words), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(UserError, match=str(tmp_path / "a") if name == "nanovlm.json" else name):
        load_checkpoint(tmp_path / "a")


def test_another_format_version_or_a_missing_key_is_refused(words, tmp_path):
    save_checkpoint(make_checkpoint(words), tmp_path / "a")
    path = tmp_path / "a" / "nanovlm.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"version": 7}))
    with pytest.raises(UserError, match="has format version 7, this nanovlm reads 1 and 2"):
        load_checkpoint(tmp_path / "a")
    path.write_text(
        json.dumps(
            {name: value for name, value in meta.items() if name not in ("image_config", "history")}
        )
    )
    with pytest.raises(UserError, match="nanovlm.json holds no image_config"):
        load_checkpoint(tmp_path / "a")


def test_sharded_weights_take_memory_only_if_they_have_the_models_shapes(
    words, tmp_path, monkeypatch
):
    checkpoint = make_checkpoint(words)
    save_checkpoint(checkpoint, tmp_path)
    state = {f"model.{name}": x for name, x in saved_parameters(checkpoint.model).items()}
    sharded.write_shards(state, tmp_path / "sharded")
    (tmp_path / "model.safetensors").unlink()
    same_tensors(load_checkpoint(tmp_path).model.state_dict(), checkpoint.model.state_dict())
    path = tmp_path / "nanovlm.json"
    meta = json.loads(path.read_text())
    meta["shapes"]["decoder"]["intermediate_size"] = 1 << 20  # a model of 900 MB
    path.write_text(json.dumps(meta))
    monkeypatch.setattr(torch, "full", None)
    for defer_weights in (False, True):
        with pytest.raises(UserError, match=r"is \[36, 24\] .*, the model has \[1048576, 24\]"):
            load_checkpoint(tmp_path, defer_weights=defer_weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so nothing fails")
def test_a_models_gpu_is_made_current_before_a_tensor_is_on_it(words, tmp_path, monkeypatch):
    """Otherwise a CUDA graph is recorded on another GPU than it runs on."""
    save_checkpoint(make_checkpoint(words), tmp_path / "model")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    load_checkpoint(tmp_path / "model", "cpu")
    assert not current
    with pytest.raises((AssertionError, RuntimeError)):  # PyTorch's own, for a missing GPU
        load_checkpoint(tmp_path / "model", torch.device("cuda", 1))
    assert current == [torch.device("cuda", 1)]


def test_the_newest_complete_step_is_the_latest(words, tmp_path):
    checkpoint = make_checkpoint(words)
    with pytest.raises(UserError, match="no such model"):
        latest_checkpoint(tmp_path / "run")
    for step in (5, 40):
        save_checkpoint(checkpoint, tmp_path / "run" / f"step-{step:06d}")
    save_checkpoint(
        checkpoint, tmp_path / "run" / "step-000300.tmp"
    )  # complete except for its name
    (tmp_path / "run" / "step-000400").mkdir()
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-000040"
    assert latest_checkpoint(tmp_path / "run" / "step-000005").name == "step-000005"
    save_step(checkpoint, tmp_path / "run", 41)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-000041"], (
        "older steps and unfinished ones are removed"
    )


def test_a_kill_between_the_two_renames_keeps_the_older_checkpoint(words, tmp_path):
    """finish_folder renames the older folder first. What a kill then leaves, the next save mends."""
    folder, old = tmp_path / "a", tmp_path / "a.old.tmp"
    save_checkpoint(make_checkpoint(words), folder)
    before = (folder / "model.safetensors").read_bytes()
    folder.rename(old)
    (tmp_path / "a.tmp").mkdir()
    remove_unfinished(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("fails", ["write_tensors", "fsync_path"])
def test_a_save_that_fails_keeps_the_older_checkpoint(words, tmp_path, monkeypatch, fails):
    """tests/training/test_train.py sets a file size limit; here each step of the writing fails."""
    old, new = make_checkpoint(words, seed=0), make_checkpoint(words, seed=1)
    save_step(old, tmp_path / "run", 3)
    save_checkpoint(old, tmp_path / "a")
    was = {name: tensor.clone() for name, tensor in old.model.state_dict().items()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"nanovlm.checkpoints.checkpoint.{fails}", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(new, tmp_path / "a")
    with pytest.raises(
        UserError,
        match=r"step-000004 could not be saved \(No space left on device\); .*step-000003 is "
        "complete",
    ):
        save_step(new, tmp_path / "run", 4)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == [
        "a",
        "run",
        "step-000003",
    ]
    for folder in ("a", "run"):
        same_tensors(load_checkpoint(tmp_path / folder).model.state_dict(), was)


def test_saving_over_a_checkpoint_replaces_it(words, tmp_path):
    save_checkpoint(make_checkpoint(words, seed=0), tmp_path / "a")
    (tmp_path / "a" / "training.json").touch()
    new = make_checkpoint(words, seed=1)
    save_checkpoint(new, tmp_path / "a")
    same_tensors(load_checkpoint(tmp_path / "a").model.state_dict(), new.model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not (
        tmp_path / "a" / "training.json"
    ).exists()
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1, (
        "all files have the same permissions"
    )


def step(model, optimizer, seed):
    """An update whose gradients depend on the seed alone."""
    g = torch.Generator().manual_seed(seed)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()


# What commit 1c7a388 called the keys of shapes and the parameters.
VISION_V1 = {"tile": 12, "patch": 3, "width": 20, "layers": 2, "heads": 5, "ffn": 28, "read": -1}
DECODER_V1 = {
    "vocabulary": 260,
    "width": 24,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "ffn": 36,
    "head_size": 8,
    "window": [None, 5, 3],
    "theta": 50.0,
    "scaling": {"rope_type": "linear", "factor": 2.0},
}
PARAMETERS_V1 = {
    "decoder.embed_tokens": "decoder.embed",
    "decoder.lm_head": "decoder.head",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "linear_1": "up",
    "linear_2": "down",
}


def name_in_v1(name):
    for new, old in PARAMETERS_V1.items():
        name = name.replace(f"{new}.", f"{old}.")
    return name


def test_a_folder_of_version_1_loads(words, tmp_path):
    """The JSON files as commit 1c7a388 wrote them, and all weights under their old names."""
    decoder = {
        "vocab_size": 260,
        "sliding_window": [None, 5, 3],
        "rope_theta": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    model = make_vlm(0, decoder=decoder, mean=IMAGE_CONFIG["mean"], std=IMAGE_CONFIG["std"])
    model.requires_grad_(False).projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=0.1)
    step(model, optimizer, 1)
    folder = tmp_path / "run" / "step-000007"
    folder.mkdir(parents=True)
    meta = {
        "version": 1,
        "shapes": {"vision": VISION_V1, "decoder": DECODER_V1, "shuffle": 2},
        "policy": IMAGE_CONFIG,
        "template": "mistral",
        "card": {"newborn": "seed 0", "brain": "9 steps", "eye": "7 steps"},
    }
    (folder / "nanovlm.json").write_text(json.dumps(meta))
    training = {"step": 7, "batch": 12, "row": 320, "floor": 2e-5, "validation": 0.5}
    (folder / "training.json").write_text(json.dumps(training))
    words.save(folder)
    weights = {name_in_v1(name): tensor for name, tensor in model.state_dict().items()}
    assert "decoder.layers.2.gate.weight" in weights and "vision.layers.1.out.bias" in weights
    save_file(weights, folder / "model.safetensors")
    state = resume.optimizer_state(model, optimizer)
    state = {name_in_v1(name): tensor.clone() for name, tensor in state.items()}
    assert "projector.up.weight/exp_avg" in state
    save_file(state, folder / "training.safetensors")
    save_file({"post_layernorm.bias": torch.ones(20)}, folder / "spare.safetensors")

    loaded = load_checkpoint(tmp_path / "run")
    same_tensors(loaded.model.state_dict(), model.state_dict())
    batch = make_batch([make_samples()])
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch), model(**batch))
    assert loaded.image_config == IMAGE_CONFIG and loaded.chat_template == "mistral"
    assert loaded.shapes["vision"] == VISION | {"vision_feature_layer": -1}
    assert loaded.shapes["decoder"] == DECODER | decoder
    assert loaded.unused_vision_tensors.keys() == {"post_layernorm.bias"}
    assert loaded.history == {
        "random_init": "seed 0",
        "decoder": "9 steps",
        "vision": "7 steps",
        "folder": str(folder),
    }
    training = read_json(folder / "training.json", "step")
    assert training["global_batch_size"] == 12 and training["val_loss"] == 0.5
    loaded.model.requires_grad_(False).projector.requires_grad_(True)
    again = torch.optim.AdamW(loaded.model.projector.parameters(), lr=0.1)
    resume.load_optimizer(folder, loaded.model, again)
    same_tensors(
        resume.optimizer_state(loaded.model, again), resume.optimizer_state(model, optimizer)
    )
    save_checkpoint(loaded, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "nanovlm.json").read_text())
    assert written["version"] == 2 and "image_config" in written
    assert load_checkpoint(tmp_path / "new").shapes == loaded.shapes


def test_the_optimizer_resumes_where_it_stopped(words, tmp_path):
    """Three updates are two updates, a checkpoint, and one more."""
    models = [make_checkpoint(words).model for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(model.projector.parameters(), lr=0.1, fused=True) for model in models
    ]
    for model in models:
        model.requires_grad_(False).projector.requires_grad_(True)
    for seed in (1, 2, 3):
        step(models[0], optimizers[0], seed)
    for seed in (1, 2):
        step(models[1], optimizers[1], seed)
    save_file(resume.optimizer_state(models[1], optimizers[1]), tmp_path / "o")
    optimizers[1] = torch.optim.AdamW(models[1].projector.parameters(), lr=0.1, fused=True)
    resume.copy_optimizer_state(models[1], optimizers[1], read_tensors(tmp_path / "o"), "o")
    step(models[1], optimizers[1], 3)
    same_tensors(models[0].state_dict(), models[1].state_dict())


def test_an_optimizer_of_other_parts_is_refused(words):
    model = make_checkpoint(words).model
    model.requires_grad_(False).projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.projector.parameters())
    step(model, optimizer, 1)
    tensors = resume.optimizer_state(model, optimizer)
    model.vision.post_norm.requires_grad_(True)
    with pytest.raises(
        UserError, match="vision.post_norm.bias is trained, but has no optimizer state"
    ):
        resume.copy_optimizer_state(model, optimizer, tensors, "o")
    model.requires_grad_(False).projector.linear_2.requires_grad_(True)
    with pytest.raises(
        UserError, match="projector.linear_1.bias is frozen, but has an optimizer state"
    ):
        resume.copy_optimizer_state(model, optimizer, tensors, "o")


def test_stitching_changes_no_number_and_keeps_the_logits_of_the_decoder(words):
    crop = {**IMAGE_CONFIG, "fit": "crop"}
    vision = make_checkpoint(words, seed=1)
    decoder = make_checkpoint(words, seed=2, template="chatml", image_config=crop)
    vision.history["folder"], decoder.history["folder"] = "a/vision", "a/decoder"
    stitched = stitch.stitch_parts(vision, decoder, seed=3)
    same_tensors(stitched.model.vision.state_dict(), vision.model.vision.state_dict())
    same_tensors(stitched.model.decoder.state_dict(), decoder.model.decoder.state_dict())
    assert (stitched.image_config, stitched.chat_template, stitched.tokenizer) == (
        vision.image_config,
        "chatml",
        words,
    )
    assert stitched.history == {
        "vision": "a/vision",
        "decoder": "a/decoder",
        "projector": "fresh, seed 3",
    }
    ids_BT = torch.randint(words.vocab_size, (2, 9))
    positions_BT, none = torch.arange(9).expand(2, -1), torch.zeros(0, 3, 12, 12, dtype=torch.uint8)
    with torch.no_grad():
        logits = [
            m.decoder.lm_head(m.decoder(m.embed(ids_BT, none), positions_BT))
            for m in (stitched.model, decoder.model)
        ]
    assert torch.equal(*logits)
    fresh = [
        stitch.stitch_parts(vision, decoder, seed).model.projector.linear_1.weight
        for seed in (3, 3, 4)
    ]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert not torch.equal(fresh[0], vision.model.projector.linear_1.weight)
