"""Ranks: the same losses, gradients and weights however a model lies over them, and a run that goes on however it lay before.

Everything that two ranks do is done in one launch of this file, and what four do in another, since most of a launch is waiting for torch.
"""

import contextlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_batch, make_samples
from safetensors.torch import load_file
from test_train import (
    TWO_RANKS,
    launch,
    log_of,
    make_home,
    peak_bytes,
    settings,
    words_of,
    write_questions,
    write_set,
)

import sample
import train
from nanovlm import UserError, distributed
from nanovlm.checkpoints import sharded
from nanovlm.checkpoints.checkpoint import (
    build_model,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    saved_parameters,
)
from nanovlm.data import dataset, packing
from nanovlm.models.vlm import VLM
from nanovlm.training import memory, recipes, resume

CPU = torch.device("cpu")
DEEP = {
    "vision": dict(tile=12, patch=3, width=80, layers=6, heads=5, intermediate_size=200),
    "shuffle": 2,
    "decoder": dict(
        vocab_size=800, width=96, layers=12, heads=6, kv_heads=2, intermediate_size=250
    ),
}
FREEZINGS = [
    (),
    ("vision",),
    ("decoder",),
    ("vision", "decoder"),
    ("vision", "projector"),
]  # none, and those of sft, vision, pretrain and decoder
SETS = ["data", "every", "none"]  # every third sample has a picture, every one, none
MANY = [(how, freeze, name) for how in ("ddp", "fsdp") for freeze in FREEZINGS for name in SETS]


def learn(
    home,
    rank=0,
    world=1,
    how="none",
    freeze=(),
    name="data",
    model="model",
    micro_batch_size=2,
    activation_checkpointing="none",
    dtype=torch.float32,
    hsdp_shard_size=0,
    **other,
):
    """Two steps of five rows: losses, gradients, their norms, the weights they lead to, and the bytes that all ranks hold together.

    Of five rows one of two ranks has three, the other two: in the second of its micro-batches it has none.
    """
    vlm = load_checkpoint(home / model, dtype=None).model.train()
    peak_lrs = {part: 1e-2 for part in recipes.PARTS if part not in freeze}
    for part in freeze:
        getattr(vlm, part).requires_grad_(False)
    distributed.checkpoint_activations(
        distributed.transformer_blocks(vlm, activation_checkpointing)
    )
    distributed.compile_blocks(distributed.transformer_blocks(vlm) if other.get("compile") else ())
    wrapped, mixed = distributed.wrap_model(
        vlm, how, CPU, dtype, hsdp_shard_size, other.get("cpu_offload", False)
    )
    optimizer = train.make_optimizer(vlm, peak_lrs, 0.1, (0.9, 0.95))
    loader = packing.PackedDataLoader(
        dataset.PreparedDataset(home / name),
        seq_len=22,
        global_batch_size=5,
        micro_batch_size=micro_batch_size,
        seed=0,
        rank=rank,
        world_size=world,
    )
    did = {"loss": [], "norm": [], "gradients": {}}
    for step in (1, 2):
        loss = train.compute_gradients(
            wrapped, next(loader), CPU, mixed, SimpleNamespace(received=0)
        ).loss
        grads = {parameter: p.grad for parameter, p in vlm.named_parameters() if p.grad is not None}
        did["gradients"] |= {
            f"{step} {parameter}": distributed.full_tensor(grad).clone()
            for parameter, grad in grads.items()
        }
        did["norm"] += distributed.clip_grad_norm(vlm, peak_lrs, 1.0).values()
        did["loss"].append(loss)
        train.set_learning_rates(
            optimizer, step, SimpleNamespace(steps=9, warmup_ratio=0, min_lr=0, lr=1)
        )
        optimizer.step()
        held = [
            sum(distributed.local_tensor(x).nbytes for x in some)
            for some in (
                vlm.parameters(),
                grads.values(),
                resume.optimizer_state(vlm, optimizer).values(),
            )
        ]
        optimizer.zero_grad()
    did["weights"] = {
        parameter: distributed.full_tensor(x).clone()
        for parameter, x in saved_parameters(vlm).items()
    }
    did["held"] = dict(
        zip(("weights", "gradients", "moments"), distributed.all_reduce_sum(held, CPU), strict=True)
    )
    return did


def before_the_last(home, rank, world, how):
    """The norm of the gradient that each rank holds after a micro-batch which is not the step's last; None where it holds none yet."""
    vlm = load_checkpoint(home / "model", dtype=None).model.train()
    wrapped, _ = distributed.wrap_model(vlm, how, CPU, torch.float32)
    batches = next(
        packing.PackedDataLoader(
            dataset.PreparedDataset(home / "every"),
            seq_len=22,
            global_batch_size=5,
            micro_batch_size=2,
            seed=0,
            rank=rank,
            world_size=world,
        )
    )
    norms = []
    for last, (batch, _) in zip((False, True), batches, strict=True):
        with distributed.no_sync(wrapped, last):
            wrapped(**batch).backward()
        grads = [distributed.full_tensor(p.grad) for p in vlm.parameters() if p.grad is not None]
        norms.append(
            distributed.all_gather_object(
                torch.nn.utils.get_total_norm(grads).item() if grads else None
            )
        )
    return norms


# ---- what ranks do ----


def two(home, rank, world):
    did = {case: learn(home, rank, world, *case) for case in MANY}
    for how in ("ddp", "fsdp"):
        did[how, "tied"] = learn(home, rank, world, how, model="tied")
        did[how, "all again"] = learn(home, rank, world, how, activation_checkpointing="all")
        did[how, "micro 1"] = learn(home, rank, world, how, micro_batch_size=1)
        did[how, "micro 5"] = learn(home, rank, world, how, micro_batch_size=5)
        did[how, "bfloat16"] = learn(home, rank, world, how, dtype=torch.bfloat16)
    did["cpu_offload"] = learn(home, rank, world, "fsdp", cpu_offload=True)
    did["compiled"] = [
        (
            learn(
                home,
                rank,
                world,
                "fsdp",
                (),
                name,
                micro_batch_size=5,
                activation_checkpointing="decoder",
                compile=True,
            ),
            distributed.count_compiled_graphs(),
        )
        for name in SETS
    ]
    did["before the last"] = {
        how: before_the_last(home, rank, world, how) for how in ("ddp", "fsdp")
    }
    did["choice"] = [
        distributed.choose_parallelism(asked, needed, CPU)
        for asked, needed in [("auto", 10), ("auto", 2**60), ("ddp", 2**60), ("fsdp", 10)]
    ]
    did["memory"] = {accumulates: estimated_and_taken(accumulates) for accumulates in (False, True)}
    did["fsdp"] = run(home, "fsdp", parallel="fsdp", keep_checkpoints=9)
    go_on_from(home, "fsdp", 3, "fsdp to fsdp", parallel="fsdp")
    go_on_from(home, "fsdp", 3, "fsdp to ddp", parallel="ddp", keep_checkpoints=9)
    go_on_from(
        home, "fsdp to ddp", 6, "ddp to fsdp", parallel="fsdp", activation_checkpointing="decoder"
    )
    if rank == 0:
        sharded_alone(home)
    for source, how in itertools.product(STARTS, ("ddp", "fsdp")):
        run(home, f"{source}, then {how} on 2", **next_stage(home, source), parallel=how)
    for how in ("ddp", "fsdp"):
        run(
            home,
            f"{how} with an evaluation",
            parallel=how,
            eval_questions=str(home / "questions.jsonl"),
            eval_every=5,
        )
    did["full"], did["odd"] = failing(home, full_on_rank_1), failing(home, odd_on_rank_1)
    return did


def four(home, rank, world):
    did = {
        "hsdp": learn(home, rank, world, "fsdp", hsdp_shard_size=2),
        "fsdp": learn(home, rank, world, "fsdp", micro_batch_size=1),
    }
    go_on_from(home, "fsdp", 3, "two to four", parallel="fsdp", hsdp_shard_size=2)
    go_on_from(home, "fsdp to ddp", 6, "ddp to four", parallel="fsdp", hsdp_shard_size=2)
    deep = load_checkpoint(home / "deep", dtype=None).model  # its numbers are in its file
    whole = sum(p.nbytes for p in deep.parameters())
    did["loading"] = (
        whole,
        distributed.all_gather_object(
            peak_bytes(lambda: distributed.wrap_model(deep, "fsdp", CPU, torch.float32))
        ),
    )
    return did


def killed(home, rank, world):
    """A rank dies while it writes its part of the second save."""
    write, calls = sharded.write_tensors, []

    def write_half(tensors, path, header):
        calls.append(path)
        if len(calls) == 2 and rank == 1:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(tensors, path, header)

    sharded.write_tensors = write_half
    run(home, "killed", parallel="fsdp")


def run(home, out, **chosen):
    """A run of all ranks, which is to end well; what this rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.train(**settings(home, out, **chosen))
    return said.getvalue()


# What a stage can start from: a checkpoint that was never trained, or the end of a run.
STARTS = {
    "none": "model",
    "ddp": "fsdp to ddp",
    "fsdp": "fsdp",
    "sharded only": "sharded only",
    "resumed": "fsdp to fsdp",
}


def sharded_alone(home):
    """The last step of the FSDP run as an earlier step is: without model.safetensors."""
    shutil.copytree(home / "fsdp" / "step-000008", home / "sharded only" / "step-000008")
    (home / "sharded only" / "step-000008" / "model.safetensors").unlink()


def next_stage(home, source):
    return dict(model=str(home / STARTS[source]), steps=2, log_every=1, validate_every=1, seed=4)


def go_on_from(home, out, step, to, **chosen):
    """A run that goes on, in a folder of its own, from a step that another has left."""
    distributed.on_rank_0(copy_step, home / out, step, home / to)
    return run(home, to, resume=True, **chosen)


def copy_step(out, step, to):
    shutil.copytree(out / f"step-{step:06d}", to / f"step-{step:06d}")
    shutil.copy(out / "log.jsonl", to)


def failing(home, break_it):
    """How each rank leaves a run whose second save fails on one of them: what it raises, and the steps that are left."""
    with break_it(), contextlib.redirect_stdout(io.StringIO()):
        try:
            train.train(**settings(home, break_it.__name__, parallel="fsdp"))
            said = None
        except (UserError, SystemExit) as end:
            said = type(end).__name__, str(end)
    return distributed.all_gather_object(said), sorted(
        path.name for path in (home / break_it.__name__).iterdir()
    )


@contextlib.contextmanager
def full_on_rank_1():
    """From the second save on, a disk is full."""
    write, calls = sharded.write_tensors, []

    def write_until_full(tensors, path, header):
        calls.append(path)
        if len(calls) > 1 and distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        write(tensors, path, header)

    sharded.write_tensors = write_until_full
    yield
    sharded.write_tensors = write


@contextlib.contextmanager
def odd_on_rank_1():
    """A number of a rank's part is none any more when it is to be saved."""
    save = resume.Saver.save

    def save_odd(self, *arguments):
        if distributed.dist.get_rank() == 1:
            distributed.local_tensor(self.checkpoint.model.decoder.norm.weight.detach())[-1] = (
                torch.inf
            )
        save(self, *arguments)

    resume.Saver.save = save_odd
    yield
    resume.Saver.save = save


def estimated_and_taken(accumulates):
    """Bytes of this rank at the height of a step under FSDP, as memory.memory has them and as they are."""
    torch.manual_seed(0)
    model = VLM(**DEEP).train()
    model.vision.requires_grad_(False)
    row = make_batch([make_samples(lengths=(40, 61), images=(1, 2))])
    settings = SimpleNamespace(
        micro_batch_size=6,
        global_batch_size=24 if accumulates else 12,
        activation_checkpointing="none",
        hsdp_shard_size=0,
        cpu_offload=False,
    )
    estimated = memory.estimate_memory(settings, model, row, CPU, torch.float32, "fsdp", 2)
    distributed.wrap_model(model, "fsdp", CPU, torch.float32)
    optimizer = train.make_optimizer(model, {"projector": 1, "decoder": 1}, 0.1, (0.9, 0.95))
    batches = [({name: torch.cat([x] * 6) for name, x in row.items()}, [])] * (1 + accumulates)

    def step():
        train.compute_gradients(
            model, batches, CPU, contextlib.nullcontext(), SimpleNamespace(received=0)
        )
        optimizer.step()

    step()
    optimizer.zero_grad()
    held = sum(
        distributed.local_tensor(x).nbytes
        for x in [*model.parameters(), *resume.optimizer_state(model, optimizer).values()]
    )
    return sum(estimated.values()), held + peak_bytes(step)


# ---- and what they are to have done ----


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("ranks"))
    write_questions(home, "whole")
    checkpoint = load_checkpoint(home / "model")
    write_set(home / "every", checkpoint, every=1)
    write_set(home / "none", checkpoint, every=0)
    shapes = checkpoint.shapes | {"decoder": checkpoint.shapes["decoder"] | {"tied": True}}
    torch.manual_seed(1)
    for name, sizes in [("tied", shapes), ("deep", DEEP)]:
        save_checkpoint(
            checkpoint._replace(shapes=sizes, model=build_model(sizes, checkpoint.image_config)),
            home / name,
        )
    return home


def ranks(home, count, do):
    """What that many processes do in this file's function of that name."""
    torchrun = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={count}",
        "--standalone",
    ]
    return launch([*torchrun, __file__, str(home), do], {}, timeout=500)


def found(home, count, do):
    """What it returned, as rank 0 has it."""
    done = ranks(home, count, do)
    assert done.returncode == 0, done.stderr
    return torch.load(home / f"{do}.pt", weights_only=False)


@pytest.fixture(scope="module")
def of_two(home):
    return found(home, 2, "two")


@pytest.fixture(scope="module")
def of_four(home, of_two):
    return found(home, 4, "four")


def alike(a, b, rtol=1e-4):
    """Losses, gradients, their norms and the weights that they lead to; but for the bias of a key, which adds the same to all scores of a query,
    so that its gradient is nothing but rounding, of which Adam makes steps."""
    assert a["loss"] == pytest.approx(b["loss"], rel=rtol) and a["norm"] == pytest.approx(
        b["norm"], rel=rtol, abs=1e-12
    )
    torch.testing.assert_close(a["gradients"], b["gradients"], rtol=1e-3, atol=1e-5)
    for did in (a, b):
        assert all(
            x.dtype == torch.float32
            for kind in ("weights", "gradients")
            for x in did[kind].values()
        )
    a, b = (
        {name: x for name, x in did["weights"].items() if "k_proj.bias" not in name}
        for did in (a, b)
    )
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_cases_are_what_they_are_said_to_be(home):
    """In `data` a step has a rank without pictures beside one with them, and a rank with fewer micro-batches than the other."""
    for name, wanted in [
        ("data", [True, False]),
        ("every", [True, True]),
        ("none", [False, False]),
    ]:
        loaders = [
            packing.PackedDataLoader(
                dataset.PreparedDataset(home / name),
                seq_len=22,
                global_batch_size=5,
                micro_batch_size=2,
                seed=0,
                rank=rank,
                world_size=2,
            )
            for rank in (0, 1)
        ]
        steps = [[next(loader) for loader in loaders] for _ in range(2)]
        assert wanted in [
            sorted(
                [any(len(batch["tiles_NCYX"]) for batch, _ in step) for step in both], reverse=True
            )
            for both in steps
        ]
        assert all(
            [[len(names) > 0 for _, names in batches] for batches in both]
            == [[True, True], [True, False]]
            for both in steps
        )


@pytest.mark.parametrize(("how", "freeze", "name"), MANY)
def test_two_ranks_are_one_process_whatever_trains_and_whoever_has_pictures(
    home, of_two, how, freeze, name
):
    alone, both = learn(home, freeze=freeze, name=name), of_two[how, freeze, name]
    alike(both, alone)
    trained = {
        f"{step} {parameter}"
        for step in (1, 2)
        for parameter in alone["weights"]
        if parameter.split(".")[0] not in freeze
    }
    assert both["gradients"].keys() == trained
    wholes = 1 if how == "fsdp" else 2
    assert (
        both["held"]["weights"] == wholes * alone["held"]["weights"]
    )  # all ranks together hold every number once; with DDP each holds it
    assert (
        both["held"]["gradients"]
        == alone["held"]["gradients"] * wholes
        == 4
        * wholes
        * sum(
            x.numel()
            for parameter, x in alone["weights"].items()
            if parameter.split(".")[0] not in freeze
        )
    ), "frozen parts have none"
    counters = 4 * len(trained) // 2  # AdamW's count of steps, of every parameter and on every rank
    assert both["held"]["moments"] == 2 * both["held"]["gradients"] + 2 * counters


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_blocks_computed_again_tied_heads_and_other_micro_batches_change_nothing(home, of_two, how):
    alike(of_two[how, "tied"], learn(home, model="tied"))
    alone = learn(home)
    for case in ("all again", "micro 1", "micro 5"):
        alike(of_two[how, case], alone)
    for which in ("decoder", "all"):
        alike(learn(home, activation_checkpointing=which), alone, rtol=1e-6)


def test_offloaded_is_the_same_as_on_the_device(home, of_two):
    alike(of_two["cpu_offload"], of_two["fsdp", (), "data"], rtol=1e-6)


def test_compiled_is_eager_and_other_sizes_are_no_reason_to_compile_again(home, of_two):
    for name, (compiled, _) in zip(SETS, of_two["compiled"], strict=True):
        alike(compiled, of_two["fsdp", (), name])
    _, some, same = (graphs for _, graphs in of_two["compiled"])
    assert 0 < some == same


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_bfloat16_is_of_the_products_alone(home, of_two, how):
    rough, exact = of_two[how, "bfloat16"], learn(home)
    assert (
        rough["loss"] == pytest.approx(exact["loss"], rel=0.02) and rough["loss"] != exact["loss"]
    )
    assert (
        rough["held"]["weights"] * (2 if how == "fsdp" else 1) == 2 * exact["held"]["weights"]
    )  # float32 masters
    assert all(
        x.dtype == torch.float32 for x in [*rough["weights"].values(), *rough["gradients"].values()]
    )
    changed = [
        name for name, x in rough["weights"].items() if not torch.equal(x, x.bfloat16().float())
    ]
    assert set(changed) == set(rough["weights"])


def test_gradients_travel_once_a_step(of_two):
    (one, other), (both, same) = of_two["before the last"]["ddp"]
    assert one != other and both == same
    assert of_two["before the last"]["fsdp"] == [[None, None], [pytest.approx(both, rel=1e-4)] * 2]


def test_four_ranks_in_two_copies_of_two_are_one_process(home, of_four):
    alone = learn(home)
    for case in ("fsdp", "hsdp"):
        alike(of_four[case], alone)
    assert of_four["hsdp"]["held"]["weights"] == 2 * of_four["fsdp"]["held"]["weights"]


def test_the_choice_is_by_what_fits(of_two):
    (small, _), (large, why), *asked = of_two["choice"]
    assert (
        (small, large) == ("ddp", "fsdp")
        and "1073741824.00 GiB on each rank" in why
        and asked == [("ddp", "as requested"), ("fsdp", "as requested")]
    )
    assert distributed.choose_parallelism("auto", 2**60, CPU) == ("none", "one process")
    with pytest.raises(UserError, match="--parallel=fsdp is for several processes"):
        distributed.choose_parallelism("fsdp", 1, CPU)


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_estimated_memory_of_a_shard_is_the_memory_taken(of_two, accumulates):
    estimated, taken = of_two["memory"][accumulates]
    assert estimated == pytest.approx(taken, rel=0.15)


def test_no_rank_ever_holds_a_whole_model_while_it_loads_its_part(of_four):
    """But for what is gathered at once: of this model that is the embeddings, head and projector."""
    whole, peaks = of_four["loading"]
    at_once = 4 * sum(
        p.numel() for name, p in VLM(**DEEP).named_parameters() if "layers" not in name
    )
    assert whole / 4 < max(peaks) < whole / 4 + at_once < whole / 2


# ---- a frozen part is not there ----


def test_a_frozen_part_keeps_nothing_for_the_backward_pass(home):
    """A frozen vision encoder keeps nothing. A frozen decoder keeps what the gradients of its inputs
    need, and nothing for its weights.
    """
    model, samples = (
        load_checkpoint(home / "model").model.train(),
        dataset.PreparedDataset(home / "every"),
    )
    batch = packing.collate(samples, [[0]])[0]
    kept = {}
    for freeze in ((), ("vision",), ("vision", "decoder")):
        for part in recipes.PARTS:
            getattr(model, part).requires_grad_(part not in freeze)
        kept[freeze] = (
            memory.saved_activation_bytes(model, batch, CPU, torch.float32, False),
            saved_by(model.vision, model.encode_images, batch["tiles_NCYX"]),
        )
    assert kept[()][1] > 0 and kept["vision",][1] == kept["vision", "decoder"][1] == 0
    assert kept[()][0] > kept["vision",][0] > kept["vision", "decoder"][0]
    x_D = torch.randn(7, 24, requires_grad=True)
    linear = model.decoder.layers[0].q_proj
    inputs = [x for x in saved(lambda: linear(x_D * 1)) if x.shape == x_D.shape]
    linear.requires_grad_(True)
    assert not inputs and [x for x in saved(lambda: linear(x_D * 1)) if x.shape == x_D.shape]


def saved(run):
    """The tensors that autograd keeps while `run` runs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run()
    return kept


def saved_by(part, run, *arguments):
    """How many tensors are kept while a part of what runs is called."""
    count, kept = [], []
    hooks = [
        part.register_forward_pre_hook(lambda *_: count.append(len(kept))),
        part.register_forward_hook(lambda *_: count.append(len(kept))),
    ]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run(*arguments)
    for hook in hooks:
        hook.remove()
    return count[1] - count[0]


# ---- a run goes on, however it lay before ----


def lines_after(out, step):
    return [line for line in log_of(out) if line["step"] > step]


def same_to_rounding(a, b, after=0):
    for x, y in zip(lines_after(a, after), lines_after(b, after), strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    a, b = (
        {
            name: x
            for name, x in load_file(out / "step-000008" / "model.safetensors").items()
            if "k_proj.bias" not in name
        }
        for out in (a, b)
    )
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_sharded_run_is_one_process_and_says_the_same_of_itself(home, of_two):
    same_to_rounding(home / "fsdp", home / "whole")
    assert (
        "parallel: fsdp, as requested" in of_two["fsdp"] and of_two["fsdp"].count(": answer ") == 4
    )
    steps = {
        step.name: sorted(path.name for path in step.iterdir())
        for step in list_checkpoints(home / "fsdp")
    }
    parts = ["nanovlm.json", "sharded", "tokenizer.json", "training.json"]
    assert steps == {
        "step-000003": parts,
        "step-000006": parts,
        "step-000008": sorted([*parts, "model.safetensors"]),
    }


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_an_evaluation_is_shared_by_all_ranks_each_question_once(home, of_two, how):
    told = {
        line["step"]: line["eval_score"]
        for line in log_of(home / f"{how} with an evaluation")
        if "eval_score" in line
    }
    assert told.keys() == {5, 8} and told[8] == pytest.approx(2 / 3)


def test_a_sharded_step_is_a_checkpoint_as_any_other(home, of_two):
    step = home / "fsdp" / "step-000008"
    gathered = load_checkpoint(step).model.state_dict()
    shutil.copytree(step, home / "in parts alone")
    (home / "in parts alone" / "model.safetensors").unlink()
    torch.testing.assert_close(
        load_checkpoint(home / "in parts alone").model.state_dict(), gathered, rtol=0, atol=0
    )


def damaged(parts, damage):
    """A sharded folder in one of the ways in which it can be wrong."""
    first, second, norm = (
        parts / "rank-00000.safetensors",
        parts / "rank-00001.safetensors",
        "model.decoder.norm.weight",
    )
    match damage:
        case "cut short":
            second.write_bytes(second.read_bytes()[:-1])
        case "empty":
            second.write_bytes(b"")
        case "last rank is missing":
            second.unlink()
        case "first rank is missing":
            first.unlink()
        case "a rank twice":
            shutil.copy(second, parts / "rank-00002.safetensors")
        case "all ranks are missing":
            first.unlink(), second.unlink()
        case "older":
            (parts / ".metadata").write_bytes(b"")
        case "a tensor is missing":
            rewrite(parts, lambda tensors: tensors.pop(norm))
        case "a tensor too many":
            rewrite(parts, lambda tensors: tensors.update({"model.odd": torch.ones(3)}))
        case "another shape":
            rewrite(parts, lambda tensors: tensors.update({norm: torch.ones(5)}))
        case "another dtype":
            rewrite(parts, lambda tensors: tensors.update({norm: torch.ones(24).half()}))


def rewrite(parts, change):
    """Put another set of tensors, each whole, in place of what two ranks wrote."""
    state = {
        name: torch.empty(pieces[0].shape) for name, pieces in sharded.read_pieces(parts).items()
    }
    sharded.read_shards(state, parts)
    change(state)
    shutil.rmtree(parts)
    sharded.write_shards(state, parts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut short", "rank-00001.safetensors is broken, cut short or not ours"),
        ("empty", "rank-00001.safetensors is broken, cut short or not ours"),
        ("last rank is missing", r"sharded: \d+ rows of .* are there, of shape"),
        ("first rank is missing", r"sharded: rows 0 to \d+ of .* are missing"),
        ("a rank twice", r"sharded: rows \d+ to \d+ of .* are there twice"),
        ("all ranks are missing", r"sharded holds no rank-\*.safetensors"),
        ("older", "sharded was written by an older nanovlm: its .metadata is a pickle"),
        ("a tensor is missing", "sharded: decoder.norm.weight is missing"),
        ("a tensor too many", "sharded: odd is saved, but the model has none"),
        (
            "another shape",
            r"decoder.norm.weight is \[5\] torch.float32, the model has \[24\] torch.float32",
        ),
        (
            "another dtype",
            r"decoder.norm.weight is \[24\] torch.float16, the model has \[24\] torch.float32",
        ),
    ],
)
def test_a_sharded_checkpoint_that_is_not_whole_is_refused(home, of_two, tmp_path, damage, message):
    """By who samples from it, and by a stage that starts from it."""
    shutil.copytree(home / "sharded only", tmp_path / "model")
    damaged(tmp_path / "model" / "step-000008" / "sharded", damage)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        train.train(**settings(home, "from a broken one", model=str(tmp_path / "model")))


def test_a_stage_starts_from_any_run_with_the_weights_that_the_run_ended_with(home, of_two):
    """On one rank and on two, DDP or FSDP: the same losses. Runs that end with the same weights are followed by the same to the bit."""
    for source in STARTS:
        train.train(**settings(home, f"{source}, then one", **next_stage(home, source)))
        alone = log_of(home / f"{source}, then one")
        assert len(alone) == 2 and all(
            math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in alone
        )
        for how in ("ddp", "fsdp"):
            for line, same in zip(log_of(home / f"{source}, then {how} on 2"), alone, strict=True):
                assert line == pytest.approx(same, rel=1e-4)
    for how in ("one", "ddp on 2", "fsdp on 2"):
        untrained, ddp, *sharded_runs = (
            log_of(home / f"{source}, then {how}") for source in STARTS
        )
        assert sharded_runs[0] == sharded_runs[1] == sharded_runs[2]
        assert (
            ddp[0] == pytest.approx(sharded_runs[0][0], rel=1e-3)
            and untrained[0]["loss"] > 1.1 * ddp[0]["loss"]
        )


def test_sampling_and_an_evaluation_read_any_run(home, of_two, capsys):
    answers = {}
    for source in STARTS:
        sample.sample(model=str(home / STARTS[source]), prompt="a b", max_tokens=9, device="cpu")
        sample.sample(
            model=str(home / STARTS[source]), questions=str(home / "questions.jsonl"), device="cpu"
        )
        answers[source] = re.sub(r"[\d,]+ tokens/s", "", capsys.readouterr().out)
    assert (
        answers["fsdp"]
        == answers["sharded only"]
        == answers["resumed"]
        == answers["ddp"]
        != answers["none"]
    )


def test_a_parameter_that_is_never_loaded_is_nan_and_is_not_trained(home, of_two, monkeypatch):
    """However it came about: here the reader leaves one tensor out."""
    read = sharded.read_shards
    missing = "model.projector.up_proj.bias"
    monkeypatch.setattr(
        sharded,
        "read_shards",
        lambda state, folder: read({n: x for n, x in state.items() if n != missing}, folder),
    )
    with pytest.raises(
        UserError,
        match="projector.up_proj.bias holds NaN, or was never loaded; start from another checkpoint",
    ):
        train.train(**settings(home, "from nowhere", model=str(home / "sharded only")))
    assert not (home / "from nowhere" / "log.jsonl").exists()


def test_resumed_on_as_many_ranks_it_is_the_same_to_the_bit(home, of_two):
    a, b = home / "fsdp", home / "fsdp to fsdp"
    assert lines_after(a, 3) == lines_after(b, 3)
    both = []
    for out in (a, b):
        parts = out / "step-000008" / "sharded"
        state = {
            name: torch.empty(pieces[0].shape)
            for name, pieces in sharded.read_pieces(parts).items()
        }
        sharded.read_shards(state, parts)
        both.append(state)
    assert any(name.startswith("optimizer.") for name in both[0])
    torch.testing.assert_close(*both, rtol=0, atol=0)


def test_resumed_wrapped_otherwise_and_back_it_is_the_same_to_rounding(home, of_two):
    for out, after in [("fsdp to ddp", 3), ("ddp to fsdp", 6)]:
        same_to_rounding(home / out, home / "whole", after)
    assert (home / "fsdp to ddp" / "step-000006" / "training.safetensors").is_file()


def test_resumed_on_four_ranks_and_on_one_it_is_the_same_to_rounding(home, of_two, of_four):
    same_to_rounding(home / "two to four", home / "whole", after=3)
    same_to_rounding(home / "ddp to four", home / "whole", after=6)
    copy_step(home / "fsdp", 3, home / "two to one")
    train.train(**settings(home, "two to one", resume=True))
    same_to_rounding(home / "two to one", home / "whole", after=3)


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_one_before(of_two):
    ends, left = of_two["full"]
    assert left == ["log.jsonl", "step-000003"]
    kind, said = ends[0]
    assert (
        kind == "UserError"
        and "step-000006 could not be saved (No space left on device); " in said
        and "step-000003 is complete" in said
    )
    assert ends[1] == ("SystemExit", "1")


def test_an_infinite_weight_on_one_rank_is_saved_by_none(of_two):
    said = "step 3: decoder.norm.weight is NaN or infinite, so it is not saved; no checkpoint is complete"
    assert of_two["odd"] == ([("UserError", said), ("SystemExit", "1")], ["log.jsonl"])


def test_a_rank_killed_while_it_saves_takes_the_others_along_and_the_run_goes_on(home, of_two):
    end = ranks(home, 2, "killed")
    assert end.returncode and "Signal 9 (SIGKILL)" in end.stderr
    assert sorted(path.name for path in (home / "killed").iterdir()) == [
        "log.jsonl",
        "step-000003",
        "step-000006.tmp",
    ]
    train.train(**settings(home, "killed", resume=True))
    same_to_rounding(home / "killed", home / "whole")
    assert [path.name for path in (home / "killed").glob("step*")] == ["step-000008"]


def test_a_schedulers_sigterm_saves_on_all_ranks_within_the_step(home):
    """torchrun hands it on to its ranks, and each of them finishes the step that it is in."""
    chosen = settings(home, "evicted", steps=100_000, save_every=100_000, parallel="fsdp")
    with subprocess.Popen(
        [*TWO_RANKS, *words_of(chosen)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:
        log = home / "evicted" / "log.jsonl"
        while running.poll() is None and not (log.exists() and log.read_text()):
            time.sleep(0.1)
        running.terminate()
        said = running.communicate(timeout=60)[1]
    assert "stopped and saved; to resume:" in said, said
    (step,) = list_checkpoints(home / "evicted")
    last = log_of(home / "evicted")[-1]["step"]
    assert step.name == f"step-{last:06d}" and sharded.read_pieces(step / "sharded")


def test_the_best_step_stays_beside_the_newest(home):
    checkpoint = load_checkpoint(home / "model")
    saved = resume.Saver(
        checkpoint,
        torch.optim.AdamW(checkpoint.model.parameters()),
        home / "kept",
        {},
        keep_checkpoints=2,
    )
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, None, 5.0], 1):
        saved.save(step, False, {} if loss is None else {"val_loss": loss, "blank_image_loss": 9.0})
    assert [step.name for step in list_checkpoints(home / "kept")] == [
        "step-000002",
        "step-000005",
        "step-000006",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(parallel="both"), "--parallel=both is none of auto, ddp, fsdp"),
        (
            dict(activation_checkpointing="some"),
            "--activation_checkpointing=some is none of none, decoder, all",
        ),
        (
            dict(hsdp_shard_size=2),
            "--hsdp_shard_size=2 needs --parallel=fsdp, and must divide the 1 ranks",
        ),
        (dict(keep_checkpoints=0), "--keep_checkpoints=0 must be at least 1"),
        (dict(parallel="ddp"), "--parallel=ddp is for several processes: start them with torchrun"),
    ],
)
def test_nonsense_is_refused(home, wrong, message):
    with pytest.raises(UserError, match=message):
        train.train(**settings(home, "refused", **wrong))
    assert not (home / "refused").exists()


if __name__ == "__main__":
    folder, do = Path(sys.argv[1]), sys.argv[2]
    rank, world = distributed.init_distributed(CPU)
    did = {"two": two, "four": four, "killed": killed}[do](folder, rank, world)
    if rank == 0:
        torch.save(did, folder / f"{do}.pt")
