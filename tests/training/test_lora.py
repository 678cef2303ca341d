"""LoRA and frozen weights: what does not train stays as it is, to the bit and in its dtype.

One launch of this file does all that two ranks do.
"""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_vlm
from safetensors.torch import load_file
from test_train import assert_same_run_to_rounding, launch, log_of, make_home, settings, state_of

import prepare
import sample
import train
from nanovlm import UserError, distributed
from nanovlm.checkpoints.checkpoint import (
    build_like_files,
    list_checkpoints,
    load_checkpoint,
    load_checkpoint_info,
    save_checkpoint,
    saved_parameters,
)
from nanovlm.checkpoints.lora import LoRALinear, add_lora, merged_weights
from nanovlm.inference.generate import generate
from nanovlm.training import recipes, resume

LORA = dict(lora_rank=3, lora_target="both", freeze="vision", keep_checkpoints=9, validate_every=99)
PROMPT = [97, 98, 99]


def low_precision(home):
    """Writes `bfloat16`, the model with vision encoder and decoder in bfloat16, and `widened`, the
    same numbers in float32."""
    checkpoint = load_checkpoint(home / "model")
    for part in (checkpoint.model.vision, checkpoint.model.decoder):
        part.to(torch.bfloat16)
    save_checkpoint(checkpoint, home / "bfloat16")
    checkpoint.model.float()
    save_checkpoint(checkpoint, home / "widened")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("lora"))
    low_precision(home)
    train.train(**settings(home, "lora", **LORA))
    return home


@pytest.fixture(scope="module")
def two_ranks(home):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = launch([*torchrun, __file__, str(home)], {}, timeout=300)
    assert done.returncode == 0, done.stderr


def run_on_two_ranks(home):
    for parallel in ("ddp", "fsdp"):
        chosen = dict(parallel=parallel, activation_checkpointing="all")
        train.train(**settings(home, f"lora {parallel}", **LORA, **chosen))
    frozen = dict(freeze="vision,decoder", parallel="fsdp", dtype="bfloat16", steps=2)
    train.train(**settings(home, "frozen fsdp", **frozen, model=str(home / "bfloat16")))


def resume_from_step_3(home, source, to, **chosen):
    for name in ("step-000003", "log.jsonl"):
        copy = shutil.copy if name == "log.jsonl" else shutil.copytree
        (home / to).mkdir(exist_ok=True)
        copy(home / source / name, home / to / name)
    train.train(**settings(home, to, resume=True, **chosen))


# ---- the layer ----


def test_the_formula_and_the_first_output():
    """y = W x + b + alpha / rank · B (A x). At first B is 0, and A uniform between ±1 / sqrt(in)."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(20, 7), torch.randn(5, 20)
    with_lora = LoRALinear(layer, 3, 12)
    assert torch.equal(with_lora(x), layer(x)) and with_lora.weight is layer.weight
    assert 0.15 < with_lora.lora_A.weight.abs().max() <= 20**-0.5
    torch.nn.init.normal_(with_lora.lora_B.weight)
    expected = layer(x) + 12 / 3 * (x @ with_lora.lora_A.weight.T) @ with_lora.lora_B.weight.T
    torch.testing.assert_close(with_lora(x), expected)
    tensors = {f"q_proj.{name}": tensor for name, tensor in with_lora.state_dict().items()}
    merged = merged_weights(tensors, 12 / 3)
    assert merged.keys() == {"q_proj.weight", "q_proj.bias"}
    product = torch.nn.functional.linear(x, merged["q_proj.weight"], merged["q_proj.bias"])
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize(
    ("target", "layers"), [("decoder", 3 * 7), ("vision", 2 * 6), ("both", 3 * 7 + 2 * 6)]
)
def test_every_linear_layer_of_the_blocks_has_lora_and_no_other(target, layers):
    model = make_vlm()
    others = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    add_lora(model, rank=2, alpha=4, target=target)
    found = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert len(found) == layers and found < others
    assert all(".layers." in name for name in found)


# ---- a run ----


def test_the_first_loss_is_that_of_the_base_to_the_bit(home):
    assert log_of(home / "lora")[0]["loss"] == log_of(home / "whole")[0]["loss"]


def test_the_base_does_not_change_and_is_not_saved(home, monkeypatch):
    """Twenty steps of AdamW with weight decay; the projector trains whole."""
    models, save = [], resume.Saver.save
    monkeypatch.setattr(
        resume.Saver,
        "save",
        lambda self, *a: [models.append(self.checkpoint.model), save(self, *a)],
    )
    train.train(**settings(home, "twenty", **LORA, steps=20, weight_decay=0.5))
    before = saved_parameters(load_checkpoint(home / "model").model)
    changed = set()
    for name, tensor in saved_parameters(models[-1]).items():
        if not torch.equal(tensor, before.get(name, torch.zeros(()))):
            changed.add(name)
    assert changed == {n for n in changed if ".lora_" in n or n.startswith("projector.")}
    assert len(changed) == 2 * (3 * 7 + 2 * 6) + 4
    saved = load_file(list_checkpoints(home / "twenty")[-1] / "model.safetensors")
    assert saved.keys() == changed


def test_merged_weights_say_what_base_and_lora_say(home, tmp_path):
    """load_checkpoint merges, and so does prepare.py, into a folder that needs no base."""
    apart = load_checkpoint(home / "lora", merge=False).model
    prepare.merge_lora(model=str(home / "lora"), out=str(tmp_path / "merged"))
    merged = load_checkpoint(tmp_path / "merged")
    assert merged.lora is None and not any(".lora_" in n for n in saved_parameters(merged.model))
    for model in (load_checkpoint(home / "lora").model, merged.model):
        ids_BT, positions_BT = torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None]
        logits = []
        for decoder in (apart.decoder, model.decoder):
            hidden_BTD = decoder(decoder.embed_tokens(ids_BT), positions_BT)
            logits.append(decoder.lm_head(hidden_BTD))
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        tiles_NCYX = torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8)
        torch.testing.assert_close(apart.encode_images(tiles_NCYX), model.encode_images(tiles_NCYX))
        answers = []
        for each in (apart, model):
            tokens = generate(each, [PROMPT], torch.zeros(0), stop=set(), max_tokens=20)
            answers.append([next_id for (next_id,) in tokens])
        assert answers[0] == answers[1]


def test_sampling_finds_the_base(home, capsys):
    for model in ("lora", "model"):
        sample.sample(model=str(home / model), prompt="a b", max_tokens=9, device="cpu")
    with_lora, without = capsys.readouterr().out.splitlines()
    assert with_lora != without


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(home):
    resume_from_step_3(home, "lora", "resumed", **LORA)
    assert log_of(home / "lora")[3:] == log_of(home / "resumed")[3:]
    ends = [load_file(home / out / "step-000008/model.safetensors") for out in ("lora", "resumed")]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(home, two_ranks, parallel):
    """With activation checkpointing. A step is one small file, under FSDP as well."""
    for out in (f"lora {parallel}", "lora"):
        last = home / out / "step-000008"
        shutil.copytree(last, home / f"{out}, the end" / last.name)
        shutil.copy(home / out / "log.jsonl", home / f"{out}, the end")
        assert sorted(path.name for path in last.iterdir()) == [
            "model.safetensors",
            "nanovlm.json",
            "tokenizer.json",
            "training.json",
            "training.safetensors",
        ]
    assert_same_run_to_rounding(home / "lora, the end", home / f"lora {parallel}, the end")
    shutil.rmtree(home / "lora, the end")


def test_a_run_of_two_ranks_resumes_in_one_process(home, two_ranks):
    resume_from_step_3(home, "lora fsdp", "two to one", **LORA | {"keep_checkpoints": 1})
    for line, same in zip(log_of(home / "two to one")[3:], log_of(home / "lora")[3:], strict=True):
        assert line == pytest.approx(same, rel=1e-4)


def test_compiled_blocks_and_activation_checkpointing_change_nothing(home, monkeypatch):
    """The compiler's front end captures the layer. Its backend, C++, is not under test here."""
    monkeypatch.setattr(
        distributed.torch.nn.Module,
        "compile",
        lambda block, dynamic: setattr(
            block, "_compiled_call_impl", torch.compile(block._call_impl, backend="aot_eager")
        ),
    )
    monkeypatch.setattr(train, "check_compiler", lambda device: None)
    chosen = LORA | dict(steps=1, lora_target="decoder")
    more = dict(compile=True, activation_checkpointing="all")
    train.train(**settings(home, "compiled", **chosen, **more))
    train.train(**settings(home, "eager", **chosen))
    assert_same_run_to_rounding(home / "compiled", home / "eager")


def test_lora_of_lora_is_merged_first(home, tmp_path):
    with pytest.raises(UserError, match="holds LoRA, which cannot be the base of another: merge"):
        train.train(**settings(home, "second", model=str(home / "lora"), lora_rank=2))
    prepare.merge_lora(model=str(home / "lora"), out=str(tmp_path / "merged"))
    train.train(**settings(home, "second", model=str(tmp_path / "merged"), lora_rank=2, steps=1))
    train.train(**settings(home, "whole after lora", model=str(home / "lora"), steps=1))
    losses = [log_of(home / out)[0]["loss"] for out in ("second", "whole after lora")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(lora_rank=-1), "--lora_rank=-1 must be at least 0; 0: no LoRA"),
        (dict(lora_alpha=8.0), "--lora_alpha=8.0 must be above 0, and needs --lora_rank"),
        (dict(lora_target="vision"), "--lora_target=vision needs --lora_rank"),
        (
            dict(lora_rank=2, lora_target="head"),
            "--lora_target=head is not one of decoder, vision, b",
        ),
        (
            dict(lora_rank=2, freeze="vision,projector", projector_lr=0.1),
            "--projector_lr=0.1 is for a part that --freeze=vision,projector freezes",
        ),
    ],
)
def test_invalid_settings_are_refused(home, wrong, message):
    with pytest.raises(UserError, match=message):
        train.train(**settings(home, "refused", **wrong))


@pytest.mark.parametrize(
    ("setting", "value"), [("lora_rank", 4), ("lora_alpha", 5.0), ("lora_target", "vision")]
)
def test_a_run_resumes_only_with_its_lora(home, setting, value):
    with pytest.raises(UserError, match=f"--{setting} was .*, now {value}"):
        train.train(**settings(home, "lora", resume=True, **LORA | {setting: value}))
    with pytest.raises(UserError, match="--lora_rank was 0, now 3"):
        train.train(**settings(home, "whole", resume=True, lora_rank=3))


@pytest.mark.parametrize("change", ["moved", "changed"])
def test_a_base_that_moved_or_changed_is_named(home, tmp_path, change):
    shutil.copytree(home / "model", tmp_path / "base")
    train.train(
        **settings(tmp_path, "run", lora_rank=2, steps=1, data=str(home / "data"))
        | {"model": str(tmp_path / "base")}
    )
    if change == "moved":
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        message = r"run/step-000001 is LoRA of the model .*base, which is not there: put it back"
    else:
        checkpoint = load_checkpoint(home / "whole")
        save_checkpoint(checkpoint, tmp_path / "base")
        message = "which has changed: the sha256 of model.safetensors was [0-9a-f]{12}, now it is"
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "run")
    if change == "moved":
        path = tmp_path / "run/step-000001/nanovlm.json"
        path.write_text(
            path.read_text().replace(str(tmp_path / "base"), str(tmp_path / "elsewhere"))
        )
        load_checkpoint(tmp_path / "run")


def test_a_damaged_lora_is_refused(home, tmp_path):
    shutil.copytree(home / "lora/step-000008", tmp_path / "run")
    path, meta = (
        tmp_path / "run/nanovlm.json",
        json.loads((tmp_path / "run/nanovlm.json").read_text()),
    )
    for field, value in [("rank", 0), ("alpha", "2"), ("target", "head"), ("base", 3)]:
        path.write_text(json.dumps(meta | {"lora": meta["lora"] | {field: value}}))
        with pytest.raises(UserError, match="nanovlm.json: a value is of no kind or size"):
            load_checkpoint(tmp_path / "run")
    path.write_text(json.dumps(meta | {"lora": meta["lora"] | {"rank": 2}}))
    with pytest.raises(
        UserError, match=r"lora_A.weight in model.safetensors is \[3, 20\], the model"
    ):
        load_checkpoint(tmp_path / "run")
    without_projector = {**meta["lora"], "trained": ["vision", "decoder"]}
    path.write_text(json.dumps(meta | {"lora": without_projector}))
    with pytest.raises(UserError, match="projector.linear_1.bias in model.safetensors is not used"):
        load_checkpoint(tmp_path / "run")


# ---- frozen weights keep their dtype ----

FROZEN = dict(freeze="vision,decoder")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", [FROZEN, {"lora_rank": 3}], ids=["projector", "lora"])
def test_bfloat16_weights_train_as_the_same_numbers_in_float32_to_the_bit(home, chosen, dtype):
    logs = []
    for model in ("bfloat16", "widened"):
        out = f"from {model}"
        shutil.rmtree(home / out, ignore_errors=True)
        train.train(**settings(home, out, **chosen, dtype=dtype, steps=3, model=str(home / model)))
        logs.append(log_of(home / out))
    assert logs[0] == logs[1]


def test_a_frozen_part_is_saved_as_it_came(home):
    train.train(
        **settings(home, "aligned", **FROZEN, dtype="bfloat16", model=str(home / "bfloat16"))
    )
    before = load_file(home / "bfloat16/model.safetensors")
    after = load_file(list_checkpoints(home / "aligned")[-1] / "model.safetensors")
    frozen = {name for name in before if not name.startswith("projector.")}
    assert all(after[name].dtype == torch.bfloat16 for name in frozen)
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert after["projector.linear_1.weight"].dtype == torch.float32


def test_shards_keep_the_dtype_of_frozen_parts(home, two_ranks):
    """A stage may start from such shards, with the decoder in float32 if it trains."""
    last = list_checkpoints(home / "frozen fsdp")[-1]
    whole = load_checkpoint(last, dtype=None).model
    (last / "model.safetensors").unlink()
    for defer in (False, True):
        model = load_checkpoint(last, dtype=None, defer_weights=defer).model
        assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    parts = saved_parameters(load_checkpoint(last, dtype=None).model)
    torch.testing.assert_close(parts, saved_parameters(whole), rtol=0, atol=0)
    train.train(**settings(home, "from shards", model=str(home / "frozen fsdp"), steps=1))
    assert all(p.dtype == torch.float32 for p in state_of(home / "from shards").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_a_parameter_rests(home, dtype):
    """Weights of frozen linear layers in the dtype of their file, if products are in bfloat16."""
    for chosen in (None, dict(rank=2, alpha=4, target="decoder")):
        model = load_checkpoint(home / "bfloat16", dtype=None).model
        if chosen:
            add_lora(model, **chosen)
        recipes.freeze_parts(model, {"projector": 1, **({"decoder": 1} if chosen else {})}, chosen)
        distributed.wrap_model(model, "none", torch.device("cpu"), dtype)
        kept = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
        linear = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
                linear.add(f"{name}.weight")
        assert kept == (linear if dtype == torch.bfloat16 else set())
        assert len(linear) == 3 * 7 + 2 * 6 + 1


def test_an_estimate_knows_lora_and_the_dtypes_of_files(home, capsys):
    model = build_like_files(load_checkpoint_info(home / "bfloat16"))
    assert all(p.is_meta for p in model.parameters())
    for part, dtype in [("decoder", torch.bfloat16), ("projector", torch.float32)]:
        assert {p.dtype for p in getattr(model, part).parameters()} == {dtype}
    prepare.estimate(model=str(home / "bfloat16"), lora_rank=3, seq_len=22, micro_batch_size=1)
    add_lora(model, rank=3, alpha=6, target="decoder")
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    whole = sum(p.numel() for p in model.decoder.parameters())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["decoder", f"{whole:,}", f"{trained:,}", "1.0e-06"] in rows


if __name__ == "__main__":
    distributed.init_distributed(torch.device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()):
        run_on_two_ranks(Path(sys.argv[1]))
