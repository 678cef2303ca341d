"""Several ranks: losses, gradients and weights do not depend on how a model is distributed, and
a run resumes on any number of ranks.

One launch of this file does all that two ranks do, and another all that four do: most of the time
of a launch is the import of torch.
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
    assert_same_run_to_rounding,
    command_arguments,
    launch,
    log_of,
    make_home,
    peak_bytes,
    settings,
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
from nanovlm.training import memory, recipes, resume, validation

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
DATASETS = ["data", "every", "none"]  # every third sample has a image, every one, none
CASES = [
    (parallel, freeze, name)
    for parallel in ("ddp", "fsdp")
    for freeze in FREEZINGS
    for name in DATASETS
]


def train_two_steps(
    home,
    rank=0,
    world=1,
    parallel="none",
    freeze=(),
    name="data",
    model="model",
    micro_batch_size=2,
    activation_checkpointing="none",
    dtype=torch.float32,
    hsdp_shard_size=0,
    **other,
):
    """Two steps of five sequences: losses, gradients, their norms, the weights afterwards, and the
    bytes that all ranks hold in sum.

    Of two ranks, one has three of the five sequences, the other two: in the second of its
    micro-batches it has none.
    """
    vlm = load_checkpoint(home / model, dtype=None).model.train()
    peak_lrs = {part: 1e-2 for part in recipes.PARTS if part not in freeze}
    for part in freeze:
        getattr(vlm, part).requires_grad_(False)
    distributed.checkpoint_activations(
        distributed.transformer_blocks(vlm, activation_checkpointing)
    )
    distributed.compile_blocks(distributed.transformer_blocks(vlm) if other.get("compile") else ())
    wrapped, autocast = distributed.wrap_model(
        vlm, parallel, CPU, dtype, hsdp_shard_size, other.get("cpu_offload", False)
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
    results = {"loss": [], "norm": [], "gradients": {}}
    for step in (1, 2):
        loss = train.compute_gradients(
            wrapped, next(loader), CPU, autocast, SimpleNamespace(received=0)
        ).loss
        grads = {parameter: p.grad for parameter, p in vlm.named_parameters() if p.grad is not None}
        results["gradients"] |= {
            f"{step} {parameter}": distributed.full_tensor(grad).clone()
            for parameter, grad in grads.items()
        }
        results["norm"] += distributed.clip_grad_norm(vlm, peak_lrs, 1.0).values()
        results["loss"].append(loss)
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
    results["weights"] = {
        parameter: distributed.full_tensor(x).clone()
        for parameter, x in saved_parameters(vlm).items()
    }
    results["held"] = dict(
        zip(("weights", "gradients", "moments"), distributed.all_reduce_sum(held, CPU), strict=True)
    )
    return results


def gradient_norms(home, rank, world, parallel):
    """The gradient norm of each rank after a micro-batch that is not the last of its step, and
    after the last; None without gradients."""
    vlm = load_checkpoint(home / "model", dtype=None).model.train()
    wrapped, _ = distributed.wrap_model(vlm, parallel, CPU, torch.float32)
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
        with distributed.sync_gradients_if(last, wrapped):
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
    results = {case: train_two_steps(home, rank, world, *case) for case in CASES}
    for parallel in ("ddp", "fsdp"):
        results[parallel, "tied"] = train_two_steps(home, rank, world, parallel, model="tied")
        results[parallel, "all again"] = train_two_steps(
            home, rank, world, parallel, activation_checkpointing="all"
        )
        results[parallel, "micro 1"] = train_two_steps(
            home, rank, world, parallel, micro_batch_size=1
        )
        results[parallel, "micro 5"] = train_two_steps(
            home, rank, world, parallel, micro_batch_size=5
        )
        results[parallel, "bfloat16"] = train_two_steps(
            home, rank, world, parallel, dtype=torch.bfloat16
        )
    results["cpu_offload"] = train_two_steps(home, rank, world, "fsdp", cpu_offload=True)
    results["compiled"] = [
        (
            train_two_steps(
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
            torch._dynamo.utils.counters["stats"]["unique_graphs"],
        )
        for name in DATASETS
    ]
    results["before the last"] = {
        parallel: gradient_norms(home, rank, world, parallel) for parallel in ("ddp", "fsdp")
    }
    results["choice"] = [
        distributed.choose_parallelism(methods, needed, CPU)
        for methods, needed in [("auto", 10), ("auto", 2**60), ("ddp", 2**60), ("fsdp", 10)]
    ]
    results["memory"] = {
        accumulates: estimated_and_measured_memory(accumulates) for accumulates in (False, True)
    }
    results["fsdp"] = run(home, "fsdp", parallel="fsdp", keep_checkpoints=9)
    resume_from(home, "fsdp", 3, "fsdp to fsdp", parallel="fsdp")
    resume_from(home, "fsdp", 3, "fsdp to ddp", parallel="ddp", keep_checkpoints=9)
    resume_from(
        home, "fsdp to ddp", 6, "ddp to fsdp", parallel="fsdp", activation_checkpointing="decoder"
    )
    if rank == 0:
        copy_without_safetensors(home)
    for source, parallel in itertools.product(STARTS, ("ddp", "fsdp")):
        run(home, f"{source}, then {parallel} on 2", **next_stage(home, source), parallel=parallel)
    for parallel in ("ddp", "fsdp"):
        run(
            home,
            f"{parallel} with an evaluation",
            parallel=parallel,
            eval_questions=str(home / "questions.jsonl"),
            eval_every=5,
        )
    run(home, "out of patience on 2", parallel="fsdp", **PATIENCE)
    results["finished"] = run(home, "out of patience on 2", resume=True, **PATIENCE)
    results["full"], results["infinite"] = (
        failing(home, full_on_rank_1),
        failing(home, infinite_on_rank_1),
    )
    return results


def four(home, rank, world):
    results = {
        "hsdp": train_two_steps(home, rank, world, "fsdp", hsdp_shard_size=2),
        "fsdp": train_two_steps(home, rank, world, "fsdp", micro_batch_size=1),
    }
    resume_from(
        home, "fsdp", 3, "two to four", parallel="fsdp", hsdp_shard_size=2, steps=None, epochs=1.2
    )  # 1.2 epochs of 33 sequences are 8 steps of 5
    resume_from(home, "fsdp to ddp", 6, "ddp to four", parallel="fsdp", hsdp_shard_size=2)
    deep = load_checkpoint(home / "deep", dtype=None).model  # its numbers are in its file
    whole = sum(p.nbytes for p in deep.parameters())
    results["loading"] = (
        whole,
        distributed.all_gather_object(
            peak_bytes(lambda: distributed.wrap_model(deep, "fsdp", CPU, torch.float32))
        ),
    )
    return results


# With this learning rate, val_loss rises after step 6.
PATIENCE = dict(lr=0.1, steps=20, validate_every=2, patience=1, save_every=100)


def killed(home, rank, world):
    """A rank is killed while it writes its shard of the second save."""
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
    """A run of all ranks that ends without an error. Returns what this rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.train(**settings(home, out, **chosen))
    return printed.getvalue()


# What a stage can start from: a checkpoint that was never trained, or the end of a run.
STARTS = {
    "none": "model",
    "ddp": "fsdp to ddp",
    "fsdp": "fsdp",
    "sharded only": "sharded only",
    "resumed": "fsdp to fsdp",
}


def copy_without_safetensors(home):
    """The last step of the FSDP run without model.safetensors, as an earlier step is."""
    shutil.copytree(home / "fsdp" / "step-000008", home / "sharded only" / "step-000008")
    (home / "sharded only" / "step-000008" / "model.safetensors").unlink()


def next_stage(home, source):
    return dict(model=str(home / STARTS[source]), steps=2, log_every=1, validate_every=1, seed=4)


def resume_from(home, out, step, to, **chosen):
    """A run that resumes, in a folder of its own, from a step of another run."""
    distributed.on_rank_0(copy_step, home / out, step, home / to)
    return run(home, to, resume=True, **chosen)


def copy_step(out, step, to):
    shutil.copytree(out / f"step-{step:06d}", to / f"step-{step:06d}")
    shutil.copy(out / "log.jsonl", to)


def failing(home, break_it):
    """A run whose second save fails on one rank. Returns what each rank raises, and the files."""
    with break_it(), contextlib.redirect_stdout(io.StringIO()):
        try:
            train.train(**settings(home, break_it.__name__, parallel="fsdp"))
            error = None
        except (UserError, SystemExit) as end:
            error = type(end).__name__, str(end)
    return distributed.all_gather_object(error), sorted(
        path.name for path in (home / break_it.__name__).iterdir()
    )


@contextlib.contextmanager
def full_on_rank_1():
    """From the second save on, the disk of rank 1 is full."""
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
def infinite_on_rank_1():
    """A weight in the shard of rank 1 is infinite when it is to be saved."""
    save = resume.Saver.save

    def save_infinite(self, *arguments):
        if distributed.dist.get_rank() == 1:
            distributed.local_tensor(self.checkpoint.model.decoder.norm.weight.detach())[-1] = (
                torch.inf
            )
        save(self, *arguments)

    resume.Saver.save = save_infinite
    yield
    resume.Saver.save = save


def estimated_and_measured_memory(accumulates):
    """Bytes of this rank at the peak of a step under FSDP: (as estimated, as measured)."""
    torch.manual_seed(0)
    model = VLM(**DEEP).train()
    model.vision.requires_grad_(False)
    sequence = make_batch([make_samples(lengths=(40, 61), images=(1, 2))])
    chosen = SimpleNamespace(
        micro_batch_size=6,
        global_batch_size=24 if accumulates else 12,
        activation_checkpointing="none",
        hsdp_shard_size=0,
        cpu_offload=False,
    )
    estimated = memory.estimate_memory(chosen, model, sequence, CPU, torch.float32, "fsdp", 2)
    distributed.wrap_model(model, "fsdp", CPU, torch.float32)
    optimizer = train.make_optimizer(model, {"projector": 1, "decoder": 1}, 0.1, (0.9, 0.95))
    batches = [({name: torch.cat([x] * 6) for name, x in sequence.items()}, [])] * (1 + accumulates)

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
    """Run a function of this file on so many ranks."""
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
    """Returns what the function returned on rank 0."""
    done = ranks(home, count, do)
    assert done.returncode == 0, done.stderr
    return torch.load(home / f"{do}.pt", weights_only=False)


@pytest.fixture(scope="module")
def two_ranks(home):
    return found(home, 2, "two")


@pytest.fixture(scope="module")
def four_ranks(home, two_ranks):
    return found(home, 4, "four")


def assert_alike(a, b, rtol=1e-4):
    """Losses, gradients, their norms and the weights afterwards are equal to rounding.

    The bias of a key is not compared: it adds the same number to all scores of a query, so its
    gradient is rounding, and Adam makes a step of it.
    """
    assert a["loss"] == pytest.approx(b["loss"], rel=rtol) and a["norm"] == pytest.approx(
        b["norm"], rel=rtol, abs=1e-12
    )
    torch.testing.assert_close(a["gradients"], b["gradients"], rtol=1e-3, atol=1e-5)
    for results in (a, b):
        assert all(
            x.dtype == torch.float32
            for kind in ("weights", "gradients")
            for x in results[kind].values()
        )
    a, b = (
        {name: x for name, x in results["weights"].items() if "k_proj.bias" not in name}
        for results in (a, b)
    )
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_datasets_have_images_where_the_cases_need_them(home):
    """In `data` a step has a rank without images beside one with images, and a rank with fewer
    micro-batches than the other."""
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


@pytest.mark.parametrize(("parallel", "freeze", "name"), CASES)
def test_two_ranks_are_one_process_for_any_frozen_part_and_images(
    home, two_ranks, parallel, freeze, name
):
    alone, both = train_two_steps(home, freeze=freeze, name=name), two_ranks[parallel, freeze, name]
    assert_alike(both, alone)
    trained = {
        f"{step} {parameter}"
        for step in (1, 2)
        for parameter in alone["weights"]
        if parameter.split(".")[0] not in freeze
    }
    assert both["gradients"].keys() == trained
    copies = 1 if parallel == "fsdp" else 2
    assert (
        both["held"]["weights"] == copies * alone["held"]["weights"]
    )  # all ranks together hold every number once; with DDP each holds it
    assert (
        both["held"]["gradients"]
        == alone["held"]["gradients"] * copies
        == 4
        * copies
        * sum(
            x.numel()
            for parameter, x in alone["weights"].items()
            if parameter.split(".")[0] not in freeze
        )
    ), "frozen parts have none"
    counters = 4 * len(trained) // 2  # AdamW's count of steps, of every parameter and on every rank
    assert both["held"]["moments"] == 2 * both["held"]["gradients"] + 2 * counters


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_activation_checkpointing_tied_heads_and_micro_batches_change_nothing(
    home, two_ranks, parallel
):
    assert_alike(two_ranks[parallel, "tied"], train_two_steps(home, model="tied"))
    alone = train_two_steps(home)
    for case in ("all again", "micro 1", "micro 5"):
        assert_alike(two_ranks[parallel, case], alone)
    for which in ("decoder", "all"):
        assert_alike(train_two_steps(home, activation_checkpointing=which), alone, rtol=1e-6)


def test_cpu_offload_changes_nothing(home, two_ranks):
    assert_alike(two_ranks["cpu_offload"], two_ranks["fsdp", (), "data"], rtol=1e-6)


def test_compiled_blocks_equal_eager_ones_and_do_not_recompile(home, two_ranks):
    for name, (compiled, _) in zip(DATASETS, two_ranks["compiled"], strict=True):
        assert_alike(compiled, two_ranks["fsdp", (), name])
    _, some, same = (graphs for _, graphs in two_ranks["compiled"])
    assert 0 < some == same


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_only_matrix_products_are_in_bfloat16(home, two_ranks, parallel):
    rough, exact = two_ranks[parallel, "bfloat16"], train_two_steps(home)
    assert (
        rough["loss"] == pytest.approx(exact["loss"], rel=0.02) and rough["loss"] != exact["loss"]
    )
    assert (
        rough["held"]["weights"] * (2 if parallel == "fsdp" else 1) == 2 * exact["held"]["weights"]
    )  # float32 masters
    assert all(
        x.dtype == torch.float32 for x in [*rough["weights"].values(), *rough["gradients"].values()]
    )
    changed = [
        name for name, x in rough["weights"].items() if not torch.equal(x, x.bfloat16().float())
    ]
    assert set(changed) == set(rough["weights"])


def test_gradients_are_averaged_once_per_step(two_ranks):
    (one, other), (both, same) = two_ranks["before the last"]["ddp"]
    assert one != other and both == same
    assert two_ranks["before the last"]["fsdp"] == [
        [None, None],
        [pytest.approx(both, rel=1e-4)] * 2,
    ]


def test_four_ranks_with_hsdp_are_one_process(home, four_ranks):
    alone = train_two_steps(home)
    for case in ("fsdp", "hsdp"):
        assert_alike(four_ranks[case], alone)
    assert four_ranks["hsdp"]["held"]["weights"] == 2 * four_ranks["fsdp"]["held"]["weights"]


def test_ddp_is_chosen_if_the_model_fits_else_fsdp(two_ranks):
    (small, _), (large, why), *methods = two_ranks["choice"]
    assert (
        (small, large) == ("ddp", "fsdp")
        and "1073741824.00 GiB on each rank" in why
        and methods == [("ddp", "as requested"), ("fsdp", "as requested")]
    )
    assert distributed.choose_parallelism("auto", 2**60, CPU) == ("none", "one process")
    with pytest.raises(UserError, match="--parallel=fsdp is for several processes"):
        distributed.choose_parallelism("fsdp", 1, CPU)


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_estimated_memory_of_a_shard_is_the_measured_memory(two_ranks, accumulates):
    estimated, taken = two_ranks["memory"][accumulates]
    assert estimated == pytest.approx(taken, rel=0.15)


def test_no_rank_holds_a_whole_model_while_it_loads_its_shard(four_ranks):
    """Except for what is gathered at once: the embeddings, head and projector of this model."""
    whole, peaks = four_ranks["loading"]
    at_once = 4 * sum(
        p.numel() for name, p in VLM(**DEEP).named_parameters() if "layers" not in name
    )
    assert whole / 4 < max(peaks) < whole / 4 + at_once < whole / 2


# ---- a frozen part is not there ----


def test_a_frozen_part_keeps_nothing_for_the_backward_pass(home):
    """A frozen vision encoder keeps nothing. A frozen decoder keeps what the gradients of its
    inputs need, and nothing for its weights.
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
    """Returns the tensors that autograd saves while `run` runs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run()
    return kept


def saved_by(part, run, *arguments):
    """Returns how many tensors are saved while a part of the model runs."""
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


def assert_same_to_rounding(a, b, after=0):
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


def test_a_sharded_run_equals_one_process(home, two_ranks, capsys):
    assert_same_to_rounding(home / "fsdp", home / "whole")
    printed = two_ranks["fsdp"]
    assert "parallel: fsdp, as requested" in printed and printed.count("    answer  ") == 4
    samples = dataset.PreparedDataset(home / "data")
    sequences = validation.pack_validation_set(samples, settings(home, "")["seq_len"])
    autocast = torch.autocast("cpu", enabled=False)
    validation.validate(load_checkpoint(home / "fsdp"), samples, sequences, autocast)
    assert capsys.readouterr().out in printed
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


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_evaluation_is_shared_by_all_ranks_each_question_once(home, two_ranks, parallel):
    scores = {
        line["step"]: line["eval_score"]
        for line in log_of(home / f"{parallel} with an evaluation")
        if "eval_score" in line
    }
    assert scores.keys() == {5, 8} and scores[8] == pytest.approx(2 / 3)


def test_a_sharded_step_loads_as_a_checkpoint(home, two_ranks):
    step = home / "fsdp" / "step-000008"
    gathered = load_checkpoint(step).model.state_dict()
    shutil.copytree(step, home / "in parts alone")
    (home / "in parts alone" / "model.safetensors").unlink()
    torch.testing.assert_close(
        load_checkpoint(home / "in parts alone").model.state_dict(), gathered, rtol=0, atol=0
    )


def damage_shards(parts, damage):
    """Damage a sharded folder in one way."""
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
            rewrite(parts, lambda tensors: tensors.update({"model.other": torch.ones(3)}))
        case "another shape":
            rewrite(parts, lambda tensors: tensors.update({norm: torch.ones(5)}))
        case "another dtype":
            rewrite(parts, lambda tensors: tensors.update({norm: torch.ones(24).double()}))


def rewrite(parts, change):
    """Write changed tensors, each as one piece, in place of what two ranks wrote."""
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
        ("a tensor too many", "sharded: other is saved, but the model has none"),
        (
            "another shape",
            r"decoder.norm.weight is \[5\] torch.float32, the model has \[24\] torch.float32",
        ),
        (
            "another dtype",
            r"decoder.norm.weight is \[24\] torch.float64, the model has \[24\] torch.float32",
        ),
    ],
)
def test_an_incomplete_sharded_checkpoint_is_refused(home, two_ranks, tmp_path, damage, message):
    """Both sample.py and a stage that starts from it refuse it."""
    shutil.copytree(home / "sharded only", tmp_path / "model")
    damage_shards(tmp_path / "model" / "step-000008" / "sharded", damage)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        train.train(**settings(home, "from a broken one", model=str(tmp_path / "model")))


def test_a_stage_starts_with_the_last_weights_of_any_run(home, two_ranks):
    """On one rank and on two, with DDP or FSDP, the losses are the same. After runs that end with
    the same weights, they are equal to the bit."""
    for source in STARTS:
        train.train(**settings(home, f"{source}, then one", **next_stage(home, source)))
        alone = log_of(home / f"{source}, then one")
        assert len(alone) == 2 and all(
            math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in alone
        )
        for parallel in ("ddp", "fsdp"):
            for line, same in zip(
                log_of(home / f"{source}, then {parallel} on 2"), alone, strict=True
            ):
                assert line == pytest.approx(same, rel=1e-4)
    for parallel in ("one", "ddp on 2", "fsdp on 2"):
        untrained, ddp, *sharded_runs = (
            log_of(home / f"{source}, then {parallel}") for source in STARTS
        )
        assert sharded_runs[0] == sharded_runs[1] == sharded_runs[2]
        assert (
            ddp[0] == pytest.approx(sharded_runs[0][0], rel=1e-3)
            and untrained[0]["loss"] > 1.1 * ddp[0]["loss"]
        )


def test_sampling_and_an_evaluation_read_any_run(home, two_ranks, capsys):
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


def test_a_parameter_that_is_never_loaded_is_nan_and_is_not_trained(home, two_ranks, monkeypatch):
    """Here the reader leaves one tensor out."""
    read = sharded.read_shards
    missing = "model.projector.linear_1.bias"
    monkeypatch.setattr(
        sharded,
        "read_shards",
        lambda state, folder: read({n: x for n, x in state.items() if n != missing}, folder),
    )
    with pytest.raises(
        UserError,
        match="projector.linear_1.bias holds NaN, or was never loaded; "
        "start from another checkpoint",
    ):
        train.train(**settings(home, "from nowhere", model=str(home / "sharded only")))
    assert not (home / "from nowhere" / "log.jsonl").exists()


def test_a_resume_on_as_many_ranks_is_equal_to_the_bit(home, two_ranks):
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


def test_a_resume_with_other_parallelism_is_equal_to_rounding(home, two_ranks):
    for out, after in [("fsdp to ddp", 3), ("ddp to fsdp", 6)]:
        assert_same_to_rounding(home / out, home / "whole", after)
    assert (home / "fsdp to ddp" / "step-000006" / "training.safetensors").is_file()


def test_a_resume_on_four_ranks_and_on_one_is_equal_to_rounding(home, two_ranks, four_ranks):
    assert_same_to_rounding(home / "two to four", home / "whole", after=3)
    assert_same_to_rounding(home / "ddp to four", home / "whole", after=6)
    copy_step(home / "fsdp", 3, home / "two to one")
    train.train(**settings(home, "two to one", resume=True))
    assert_same_to_rounding(home / "two to one", home / "whole", after=3)


def test_two_ranks_run_out_of_patience_at_the_step_of_one_process(home, two_ranks):
    train.train(**settings(home, "out of patience", **PATIENCE))
    for out in ("out of patience", "out of patience on 2"):
        assert [path.name for path in list_checkpoints(home / out)] == ["step-000006"]
        assert log_of(home / out)[-1]["step"] == 8
    assert "is finished, at step 8 of 20" in two_ranks["finished"]
    best = home / "out of patience on 2" / "step-000006"
    assert (best / "model.safetensors").is_file() and load_checkpoint(best).model


def test_a_save_that_fails_on_one_rank_fails_on_all_and_keeps_the_last_one(two_ranks):
    ends, left = two_ranks["full"]
    assert left == ["log.jsonl", "step-000003"]
    kind, message = ends[0]
    assert (
        kind == "UserError"
        and "step-000006 could not be saved (No space left on device); " in message
        and "step-000003 is complete" in message
    )
    assert ends[1] == ("SystemExit", "1")


def test_an_infinite_weight_on_one_rank_is_not_saved_by_any(two_ranks):
    message = (
        "step 3: decoder.norm.weight is NaN or infinite, so it is not saved; "
        "no checkpoint is complete"
    )
    assert two_ranks["infinite"] == ([("UserError", message), ("SystemExit", "1")], ["log.jsonl"])


def test_a_rank_killed_while_it_saves_ends_all_and_the_run_resumes(home, two_ranks):
    end = ranks(home, 2, "killed")
    assert end.returncode and "Signal 9 (SIGKILL)" in end.stderr
    assert sorted(path.name for path in (home / "killed").iterdir()) == [
        "log.jsonl",
        "step-000003",
        "step-000006.tmp",
    ]
    train.train(**settings(home, "killed", resume=True))
    assert_same_to_rounding(home / "killed", home / "whole")
    assert [path.name for path in (home / "killed").glob("step*")] == ["step-000008"]


def test_a_schedulers_sigterm_saves_on_all_ranks_within_the_step(home):
    """torchrun sends the signal to its ranks, and each of them finishes its step."""
    chosen = settings(home, "evicted", steps=100_000, save_every=100_000, parallel="fsdp")
    with subprocess.Popen(
        [*TWO_RANKS, *command_arguments(chosen)],
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
        errors = running.communicate(timeout=60)[1]
    assert "stopped and saved; to resume:" in errors, errors
    (step,) = list_checkpoints(home / "evicted")
    last = log_of(home / "evicted")[-1]["step"]
    assert step.name == f"step-{last:06d}" and sharded.read_pieces(step / "sharded")


def test_workers_save_and_end_if_torchrun_is_killed(home):
    """SIGKILL gives torchrun no time to stop its workers; the system sends them SIGTERM."""
    if sys.platform != "linux":
        pytest.skip("only Linux sends it")
    out = home / "torchrun killed"
    chosen = settings(home, out.name, steps=1000, save_every=1000, validate_every=1000)
    torchrun = start([*TWO_RANKS, *command_arguments(chosen)])
    while not (out / "log.jsonl").is_file() or not log_of(out):
        assert torchrun.poll() is None
        time.sleep(0.1)
    torchrun.kill()
    _, errors = torchrun.communicate(timeout=60)  # until the workers have closed their stderr
    assert "stopped and saved; to resume:\ntorchrun --nproc_per_node=2 " in errors
    step = log_of(out)[-1]["step"]
    assert 0 < step < 1000
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", f"step-{step:06d}"]


def start(command, **variables):
    """Start a process; its output is text in pipes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture
def two_machines():
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, which share no more than a cable (veth)."""
    one, other = names = [f"nanovlm-{os.getpid()}-{number}" for number in (1, 2)]
    commands = [
        f"netns add {one}",
        f"netns add {other}",
        f"link add eth0 netns {one} type veth peer name eth0 netns {other}",
    ]
    for number, name in enumerate(names, 1):
        commands += [
            f"-n {name} addr add 10.77.0.{number}/24 dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name} link set lo up",
        ]
    if not shutil.which("ip"):
        pytest.skip("needs the command ip of iproute2")
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"ip {command}: {done.stderr}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_are_one_process(home, two_machines):
    """The commands are those of the training lesson."""
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc_per_node=1"
    torchrun += " --master_addr=10.77.0.1 --master_port=29500"
    running = []
    for rank, name in enumerate(two_machines):
        machine = f"ip netns exec {name} {torchrun} --node_rank={rank}".split()
        script = [str(ROOT / "train.py"), *command_arguments(settings(home, "two machines"))]
        running.append(start([*machine, *script], GLOO_SOCKET_IFNAME="eth0"))
    printed = [machine.communicate(timeout=100) for machine in running]
    assert [machine.returncode for machine in running] == [0, 0], printed
    assert "tokens on 2 × cpu" in printed[0][0]
    assert_same_run_to_rounding(home / "two machines", home / "whole")


def test_ranks_that_cannot_connect_name_the_way_out(monkeypatch):
    def fail(backend):
        raise RuntimeError("Gloo connectFullMesh failed: Connection refused\nframe #0: …")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed.dist, "init_process_group", fail)
    with pytest.raises(UserError, match="refused; on several machines, set GLOO_SOCKET_IFNAME to"):
        distributed.init_distributed(CPU)


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
        (dict(parallel="both"), "--parallel=both is not one of auto, ddp, fsdp"),
        (
            dict(activation_checkpointing="some"),
            "--activation_checkpointing=some is not one of none, decoder, all",
        ),
        (
            dict(hsdp_shard_size=2),
            "--hsdp_shard_size=2 needs --parallel=fsdp, and must divide the 1 ranks",
        ),
        (dict(keep_checkpoints=0), "--keep_checkpoints=0 must be at least 1"),
        (dict(parallel="ddp"), "--parallel=ddp is for several processes: start them with torchrun"),
    ],
)
def test_invalid_parallelism_is_refused(home, wrong, message):
    with pytest.raises(UserError, match=message):
        train.train(**settings(home, "refused", **wrong))
    assert not (home / "refused").exists()


if __name__ == "__main__":
    folder, do = Path(sys.argv[1]), sys.argv[2]
    rank, world = distributed.init_distributed(CPU)
    results = {"two": two, "four": four, "killed": killed}[do](folder, rank, world)
    if rank == 0:
        torch.save(results, folder / f"{do}.pt")
