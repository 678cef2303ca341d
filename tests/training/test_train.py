"""Training: the numbers do not depend on how the work is split, and no run loses its checkpoint."""

import gzip
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import DECODER, ROOT, TOKENS, VISION, make_batch, make_samples
from safetensors.torch import load_file

import train
from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError, cli, distributed, files
from nanovlm.checkpoints.checkpoint import (
    Checkpoint,
    build_model,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from nanovlm.checkpoints.lora import add_lora
from nanovlm.data import dataset, image_processing, packing, tokenizer
from nanovlm.evals import benchmarks, runner
from nanovlm.models.vlm import VLM
from nanovlm.training import logger, memory, profiler, recipes, resume, signals, validation

IMAGE_CONFIG = {
    "tile": 12,
    "patch": 3,
    "shuffle": 2,
    "fit": "squash",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
SETTINGS = dict(
    stage="sft",
    freeze="none",
    steps=8,
    global_batch_size=5,
    micro_batch_size=2,
    seq_len=22,
    lr=1e-2,
    min_lr=1e-3,
    warmup_ratio=0.3,
    save_every=3,
    validate_every=4,
    log_every=1,
    device="cpu",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # small models gain nothing from more
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def make_home(home):
    """A folder with a checkpoint `model`, a dataset `data`, and `whole`, an uninterrupted run."""
    words = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
    torch.manual_seed(0)
    shapes = {"vision": VISION, "decoder": DECODER | {"vocab_size": words.vocab_size}, "shuffle": 2}
    checkpoint = Checkpoint(
        build_model(shapes, IMAGE_CONFIG),
        words,
        shapes,
        IMAGE_CONFIG,
        "mistral",
        {"random_init": "seed 0"},
    )
    save_checkpoint(checkpoint, home / "model")
    write_set(home / "data", checkpoint)
    train.train(**settings(home, "whole"))
    return home


def write_set(out, checkpoint, poison=None, held_out=5, count=60, every=3):
    """`count` samples for training and a few held out: random letters, of which the last three have
    labels. Every third sample has an image. poison: the first id of one sample."""
    g, samples, left = np.random.default_rng(1), [], {True: held_out, False: count}
    for i in itertools.count():
        name = f"sample-{i}"
        if not any(left.values()):
            return conftest.write_set(out, checkpoint.fingerprint(), samples[:40], samples[40:])
        if not left[dataset.is_validation(name)]:
            continue
        left[dataset.is_validation(name)] -= 1
        images = [
            image_processing.ProcessedImage(
                g.integers(256, size=(1, 3, 12, 12), dtype=np.uint8), np.arange(TOKENS), (5, 7)
            )
        ] * (every > 0 and i % every == 0)
        letters = g.integers(97, 123, size=g.integers(5, 17)).tolist()
        if not dataset.is_validation(name) and left[False] == 40 and poison:
            letters[0], name = poison, "poisoned"
        samples.append(
            (
                name,
                [IMAGE_TOKEN_ID] * len(images) + letters,
                [0] * (len(images) + len(letters) - 3) + [1] * 3,
                images,
            )
        )


def settings(home, out, **others):
    return {
        **SETTINGS,
        "model": str(home / "model"),
        "data": str(home / "data"),
        "out": str(home / out),
        **others,
    }


def command_arguments(chosen):
    return [f"--{name}={cli.format_value(value)}" for name, value in chosen.items()]


TWO_RANKS = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--standalone",
    str(ROOT / "train.py"),
]


def launch(command, chosen, timeout=100):
    """Run train.py in processes of its own, and wait for them."""
    path = os.pathsep.join(folder for folder in sys.path if folder)  # as pytest has set it
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, *command_arguments(chosen)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment,
    )


def log_of(out):
    """The lines of log.jsonl without the numbers that depend on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("tokens_per_s", "tflops", "data_wait", "eta_s", "hours")
        }
        for line in lines
    ]


def state_of(out):
    """Parameters and optimizer state at the end of a run."""
    (folder,) = list_checkpoints(out)
    return load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")


def assert_same_run(a, b):
    assert log_of(a) == log_of(b)
    torch.testing.assert_close(state_of(a), state_of(b), rtol=0, atol=0)


def assert_same_run_to_rounding(a, b):
    """The bias of a key adds the same number to all scores of a query, which softmax ignores. Its
    gradient is rounding, and Adam makes a step of it: these biases are not compared."""
    for x, y in zip(log_of(a), log_of(b), strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    a, b = (
        {name: x for name, x in state_of(out).items() if "k_proj.bias" not in name}
        for out in (a, b)
    )
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---- the parts of the loop ----


def test_the_learning_rate_has_linear_warmup_and_half_a_cosine():
    def at(step, low=0.1):
        return train.learning_rate(step, steps=100, warmup_steps=10, min_ratio=low)

    assert [at(0), at(4), at(9), at(10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [at(55), at(100)] == pytest.approx([0.55, 0.1])  # half way down, and down
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        if step >= 10:
            assert at(step, low=0) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_recipe_sets_the_settings_that_are_not_given():
    """The table of LLaVA-1.5's own scripts beside Megatron's."""
    empty = {name: default for name, _, default, _ in cli.settings(train.train)}
    names = (
        "lr",
        "min_lr",
        "steps",
        "global_batch_size",
        "seq_len",
        "warmup_ratio",
        "weight_decay",
        "grad_clip",
        "beta1",
        "beta2",
        "freeze",
    )
    for owner, stage, wanted in [
        (
            "megatron",
            "pretrain",
            (1.5e-4, 1e-5, 20000, 256, 1024, 0.01, 0.01, 1.0, 0.9, 0.95, "vision,decoder"),
        ),
        ("megatron", "sft", (1e-6, 1e-7, 20000, 128, 2048, 0.01, 0.1, 0.5, 0.9, 0.95, "vision")),
        (
            "llava",
            "pretrain",
            (1e-3, 0.0, 2181, 256, 2048, 0.03, 0.0, 1.0, 0.9, 0.999, "vision,decoder"),
        ),
        ("llava", "sft", (2e-5, 0.0, 5198, 128, 2048, 0.03, 0.0, 1.0, 0.9, 0.999, "vision")),
    ]:
        run = recipes.load_settings(empty | {"stage": stage, "recipe": owner}, world=1)
        assert tuple(getattr(run, name) for name in names) == wanted
        assert (
            recipes.load_settings(
                empty | {"stage": stage, "recipe": owner, "lr": 0.5, "beta2": 0.8}, world=1
            ).beta2
            == 0.8
        )


def test_matrices_decay_vectors_do_not_and_each_part_has_its_learning_rate(vlm):
    optimizer = train.make_optimizer(vlm, {"projector": 0.3, "decoder": 0.2}, 0.1, (0.8, 0.7))
    name_of = {id(p): name for name, p in vlm.named_parameters()}
    found = {
        name_of[id(p)]: (p.dim(), group)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == {name for name in name_of.values() if not name.startswith("vision")}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for name, (dim, group) in found.items():
        assert group["weight_decay"] == (0.1 if dim > 1 else 0) and group["betas"] == (0.8, 0.7)
        assert group["peak_lr"] == (0.3 if name.startswith("projector") else 0.2)


def test_a_run_is_the_textbook_loop(home):
    """Two steps by hand: mean loss over labelled tokens, gradient clipping, AdamW."""
    chosen = settings(
        home,
        "by-hand",
        steps=2,
        micro_batch_size=5,
        grad_clip=0.5,
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.9,
        projector_lr=3e-2,
        freeze="vision",
    )
    train.train(**chosen)
    model = load_checkpoint(home / "model").model.train()
    groups = [
        {
            "params": [p for p in getattr(model, part).parameters() if (p.dim() > 1) == matrix],
            "lr": lr,
            "weight_decay": 0.2 * matrix,
        }
        for part, lr in [("projector", 3e-2), ("decoder", 1e-2)]
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    loader = packing.PackedDataLoader(
        dataset.PreparedDataset(home / "data"),
        seq_len=22,
        global_batch_size=5,
        micro_batch_size=5,
        seed=0,
    )
    model.vision.requires_grad_(False)
    for line, share in zip(
        log_of(home / "by-hand"), (1, 1), strict=True
    ):  # one step of warm-up, then the top of the cosine
        ((batch, _),) = next(loader)
        loss = model(**batch) / (batch["targets_BT"] != IGNORE_INDEX).sum()
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        assert (line["loss"], line["grad_norm"], line["lr"]) == pytest.approx(
            (loss.item(), norm.item(), 1e-2 * share), rel=1e-4
        )
        parts = [line[f"grad_norm_{part}"] for part in ("projector", "decoder")]
        assert (
            math.hypot(*parts) == pytest.approx(line["grad_norm"], rel=1e-5)
            and "grad_norm_vision" not in line
        )
        for p in (p for p in model.parameters() if p.grad is not None):
            p.grad *= min(1, 0.5 / norm)
        optimizer.step()
        optimizer.zero_grad()
    ours = load_checkpoint(home / "by-hand").model
    torch.testing.assert_close(
        dict(ours.named_parameters()), dict(model.named_parameters()), rtol=1e-3, atol=1e-4
    )  # a step is about 1e-2


def peak_bytes(run):
    """The peak of the memory that `run` allocates, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    events = [
        (e.start_ns(), e.nbytes())
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    return max(itertools.accumulate(size for _, size in sorted(events)))


@pytest.mark.parametrize(
    "peak_lrs, lora",
    [
        ({"vision": 1, "projector": 1, "decoder": 1}, None),
        ({"projector": 1}, None),
        ({"projector": 1, "decoder": 1}, dict(rank=9, alpha=9, target="decoder")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_checkpointing", ["none", "decoder", "all"])
def test_estimated_memory_is_the_memory_taken(peak_lrs, lora, dtype, activation_checkpointing):
    """A frozen decoder comes from its file in bfloat16."""
    torch.manual_seed(0)
    model = VLM(
        vision=dict(tile=24, patch=3, width=80, layers=3, heads=5, intermediate_size=200),
        decoder=dict(
            vocab_size=1500, width=96, layers=4, heads=6, kv_heads=2, intermediate_size=250
        ),
        shuffle=4,
    ).train()
    if lora or "decoder" not in peak_lrs:
        model.decoder.to(torch.bfloat16)
    if lora:
        add_lora(model, **lora)
    recipes.freeze_parts(model, peak_lrs, lora)
    sequence = make_batch([make_samples(lengths=(40, 61), images=(1, 2))])
    sequence["tiles_NCYX"] = sequence["tiles_NCYX"].repeat(1, 1, 2, 2)  # 64 patches, 4 tokens
    batch = {name: torch.cat([x] * 6) for name, x in sequence.items()}
    run = SimpleNamespace(
        micro_batch_size=6, global_batch_size=6, activation_checkpointing=activation_checkpointing
    )
    estimated = memory.estimate_memory(run, model, sequence, torch.device("cpu"), dtype)
    distributed.checkpoint_activations(
        distributed.transformer_blocks(model, activation_checkpointing)
    )
    _, autocast = distributed.wrap_model(model, "none", torch.device("cpu"), dtype)
    optimizer = train.make_optimizer(model, peak_lrs, 0.1, (0.9, 0.95))

    def step():
        train.compute_gradients(
            model, [(batch, [])], torch.device("cpu"), autocast, SimpleNamespace(received=0)
        )
        optimizer.step()

    step()
    optimizer.zero_grad()
    held = sum(p.numel() * (p.itemsize + 8 * p.requires_grad) for p in model.parameters())
    assert estimated["weights"] + estimated["optimizer"] == held
    assert sum(estimated.values()) == pytest.approx(held + peak_bytes(step), rel=0.15)


def test_the_plan_prints_the_learning_rate_of_each_part(home, capsys):
    train.train(**settings(home, "plan", freeze="vision", steps=1, projector_lr=0.02))
    table = {
        words[0]: words[1:]
        for line in capsys.readouterr().out.splitlines()
        if (words := line.split())
    }
    model = load_checkpoint(home / "model").model
    size = {
        part: f"{sum(p.numel() for p in module.parameters()):,}"
        for part, module in model.named_children()
    }
    assert table["vision"] == [size["vision"], "0", "frozen"]
    assert table["projector"] == [size["projector"]] * 2 + ["2.0e-02"] and table["decoder"] == [
        size["decoder"]
    ] * 2 + ["1.0e-02"]


def test_validation_is_the_mean_loss_of_held_out_tokens_with_and_without_images(home):
    checkpoint, samples = load_checkpoint(home / "model"), dataset.PreparedDataset(home / "data")
    found = validation.validation_losses(
        checkpoint.model,
        samples,
        validation.pack_validation_set(samples, 22),
        torch.autocast("cpu", enabled=False),
    )
    for name, hide in [("val_loss", False), ("blank_image_loss", True)]:
        losses = []
        for ids_T, targets_T, images in (samples.read(i) for i in samples.split(validation=True)):
            ids_T, targets_T, tiles = (
                torch.from_numpy(ids_T),
                torch.from_numpy(targets_T),
                packing.collate_images(images, IMAGE_CONFIG)["tiles_NCYX"],
            )
            tiles = torch.full_like(tiles, 128) if hide else tiles
            with torch.no_grad():
                hidden = checkpoint.model.decoder(
                    checkpoint.model.embed(ids_T[None], tiles), torch.arange(len(ids_T))[None]
                )
                logits = checkpoint.model.decoder.lm_head(hidden)[0].double()
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, targets_T, ignore_index=IGNORE_INDEX, reduction="none"
                )[targets_T != IGNORE_INDEX]
            )
        assert found[name] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["val_loss"] != pytest.approx(found["blank_image_loss"], rel=1e-5)
    assert found.keys() == {"val_loss", "blank_image_loss"}  # each sample has one answer


def test_first_turn_loss_is_the_validation_loss_of_samples_that_end_after_their_first_answer(
    home, tmp_path
):
    checkpoint, g, sets = load_checkpoint(home / "model"), np.random.default_rng(3), ([], [])
    names = filter(dataset.is_validation, map(str, itertools.count()))
    for number, answers in enumerate((3, 1, 2, 4)):
        name, loss_mask = next(names), []
        for _ in range(answers):
            loss_mask += [0] * g.integers(1, 5) + [1] * g.integers(1, 4)
        loss_mask += [0] * (number % 2)
        ids = g.integers(97, 123, size=len(loss_mask)).tolist()
        end = (loss_mask + [0]).index(0, loss_mask.index(1))
        sets[0].append((name, ids, loss_mask, []))
        sets[1].append((name, ids[:end], loss_mask[:end], []))
    found = []
    for number, samples in enumerate(sets):
        conftest.write_set(tmp_path / str(number), checkpoint.fingerprint(), samples)
        held_out = dataset.PreparedDataset(tmp_path / str(number))
        sequences = validation.pack_validation_set(held_out, 40)
        autocast = torch.autocast("cpu", enabled=False)
        found.append(validation.validation_losses(checkpoint.model, held_out, sequences, autocast))
    assert len(sequences) < 4  # several samples in a sequence
    assert found[0]["first_turn_loss"] == pytest.approx(found[1]["val_loss"], rel=1e-6)
    assert found[0]["first_turn_loss"] != pytest.approx(found[0]["val_loss"], rel=1e-3)


def test_validation_prints_two_questions_their_references_and_answers(home, capsys):
    checkpoint, samples = load_checkpoint(home / "model"), dataset.PreparedDataset(home / "data")
    validation.validate(
        checkpoint,
        samples,
        validation.pack_validation_set(samples, 22),
        torch.autocast("cpu", enabled=False),
    )
    shown, decode = capsys.readouterr().out.splitlines(), checkpoint.tokenizer.decode
    assert len(shown) == 2 * 4
    special = {IMAGE_TOKEN_ID, *checkpoint.tokenizer.special.values()}
    for i in samples.split(validation=True)[:2]:
        ids_T, targets_T, _ = samples.read(i)
        start = int((targets_T != IGNORE_INDEX).argmax()) + 1
        question = decode([x for x in ids_T[:start].tolist() if x not in special])
        reference = decode(ids_T[start:-1].tolist())
        name, *lines = shown[:4]
        assert name == f"  {samples.names[i]}"
        assert lines[:2] == [f"    question  {question!r}", f"    expected  {reference!r}"]
        assert re.match(r"    answer    ['\"]", lines[2])
        del shown[:4]


# ---- the numbers do not depend on how the work is split ----


def test_accumulated_micro_batches_are_one_batch(home):
    train.train(**settings(home, "micro-5", micro_batch_size=5))
    train.train(**settings(home, "micro-1", micro_batch_size=1))
    assert_same_run_to_rounding(home / "micro-5", home / "micro-1")


def test_two_ranks_are_one_process_even_if_a_rank_has_no_image(home):
    """The vision encoder trains, so that the ranks wait for its gradients."""
    samples = dataset.PreparedDataset(home / "data")
    steps = zip(
        *(
            itertools.islice(iter(lambda x=rank: next(x), None), 8)
            for rank in (
                packing.PackedDataLoader(
                    samples,
                    seq_len=22,
                    global_batch_size=5,
                    micro_batch_size=2,
                    seed=0,
                    rank=r,
                    world_size=2,
                )
                for r in (0, 1)
            )
        ),
        strict=True,
    )
    images = [
        [sum(len(batch["tiles_NCYX"]) for batch, _ in batches) for batches in ranks]
        for ranks in steps
    ]
    assert any(0 in counts and sum(counts) for counts in images), (
        "the test needs a step in which only one rank has images"
    )
    two = launch(TWO_RANKS, settings(home, "two"))
    assert two.returncode == 0, two.stderr
    assert_same_run_to_rounding(home / "whole", home / "two")


def test_bfloat16_products_change_little(home):
    train.train(**settings(home, "bfloat16", dtype="bfloat16"))
    exact, rough = log_of(home / "whole"), log_of(home / "bfloat16")
    assert [line["loss"] for line in rough] == pytest.approx(
        [line["loss"] for line in exact], rel=0.02
    )
    assert rough[-1]["loss"] != exact[-1]["loss"]
    assert all(x.dtype == torch.float32 for x in state_of(home / "bfloat16").values())


def test_validation_and_logging_change_nothing(home):
    train.train(**settings(home, "watched", validate_every=1, log_every=5, save_every=100))
    torch.testing.assert_close(state_of(home / "watched"), state_of(home / "whole"), rtol=0, atol=0)
    assert [line["val_loss"] for line in log_of(home / "watched") if line["step"] in (4, 8)] == [
        line["val_loss"] for line in log_of(home / "whole") if "val_loss" in line
    ]


def write_questions(home, out, right=(0, 2)):
    """Write three questions, the second without an image. The final model of a run answers those in
    `right` as the references do."""
    image_processing.tile_to_image(
        np.random.default_rng(2).integers(256, size=(3, 12, 12), dtype=np.uint8)
    ).save(home / "photo.png")
    lines = [
        {"id": i, "image": ["photo.png"] * (i != 1), "question": text, "answers": ["?"]}
        for i, text in enumerate(("a b", "b a a", "b"))
    ]
    path = home / "questions.jsonl"
    for known in (False, True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if not known:
            answers = runner.answer_questions(
                load_checkpoint(list_checkpoints(home / out)[-1]),
                benchmarks.load_questions("exact", path),
                max_tokens=256,
            )
            for i, answer in (pair for pairs in answers for pair in pairs):
                lines[i]["answers"] = [answer.answer + "!" * (i not in right)]
    return path


def test_evaluation_during_training_changes_nothing_and_scores_as_one_afterwards(home):
    questions = write_questions(home, "whole")
    train.train(**settings(home, "evaluated", eval_questions=str(questions), eval_every=5))
    lines = log_of(home / "evaluated")
    assert [line["step"] for line in lines if "eval_score" in line] == [5, 8] and lines[-1][
        "eval_score"
    ] == pytest.approx(2 / 3)
    torch.testing.assert_close(
        state_of(home / "evaluated"), state_of(home / "whole"), rtol=0, atol=0
    )
    for wrong, message in (
        (dict(eval_questions="no.jsonl"), "no.jsonl"),
        (dict(eval_images="x"), "--eval_images=x changes nothing without --eval_questions=FILE"),
        (dict(eval_every=7), "--eval_every=7 changes nothing"),
        (dict(eval_benchmark="vqa"), "--eval_benchmark=vqa changes nothing"),
    ):
        with pytest.raises((UserError, OSError), match=message):
            train.train(**settings(home, "refused", **wrong))


# ---- signals, crashes and full disks ----


def test_profiling_changes_nothing_and_writes_a_trace(home, capsys):
    train.train(**settings(home, "profiled", profile=True))
    assert log_of(home / "profiled") == log_of(home / "whole")
    torch.testing.assert_close(
        state_of(home / "profiled"), state_of(home / "whole"), rtol=0, atol=0
    )
    with gzip.open(home / "profiled/trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == profiler.TRACED_STEPS
    printed = capsys.readouterr().out
    assert {"vision", "projector", "decoder"} <= set(names)
    assert re.search(r"^ +decoder ", printed, re.MULTILINE) and "trace.json.gz: 3 steps" in printed


def test_the_summary_counts_samples_and_tokens_over_all_stops(home, capsys):
    train.train(**settings(home, "in one go"))
    summary = capsys.readouterr().out.splitlines()[-1]
    samples, tokens, hours, best = re.fullmatch(
        r"(\d+) samples, (\d+) tokens, (\S+) hours, best val_loss (\S+ at step \d)", summary
    ).groups()
    loader = packing.PackedDataLoader(
        dataset.PreparedDataset(home / "data"),
        seq_len=22,
        global_batch_size=5,
        micro_batch_size=5,
        seed=0,
    )
    batches = [next(loader)[0] for _ in range(8)]
    assert int(samples) == sum(len(members) for _, members in batches)
    assert int(tokens) == sum(int((batch["documents_BT"] >= 0).sum()) for batch, _ in batches)
    losses = [
        (line["val_loss"], line["step"])
        for line in log_of(home / "in one go")
        if "val_loss" in line
    ]
    assert best == "{:.4f} at step {}".format(*min(losses))


def test_tensorboard_has_the_numbers_of_the_log(home, monkeypatch):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    train.train(**settings(home, "board", tensorboard=True))
    curves = event_accumulator.EventAccumulator(str(home / "board")).Reload()
    lines = [json.loads(line) for line in (home / "board/log.jsonl").read_text().splitlines()]
    for name in ("loss", "val_loss", "grad_norm_projector"):
        assert [(event.step, event.value) for event in curves.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in lines if name in line
        ]
    monkeypatch.setattr(recipes, "find_spec", {}.get)
    with pytest.raises(
        UserError, match="^--tensorboard=true needs tensorboard: pip install tensorboard$"
    ):
        train.train(**settings(home, "no board", tensorboard=True))
    assert not (home / "no board").exists()


def test_a_missing_compiler_is_reported_before_anything_is_written(home, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-compiler"))
    with pytest.raises(
        UserError,
        match="^--compile=true: torch.compile does not work here: InvalidCxxCompiler: No working C",
    ):
        train.train(**settings(home, "not compiled", compile=True))
    assert not (home / "not compiled").exists()


def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(home, monkeypatch, capsys):
    """SIGTERM arrives during step 5, between two saves. The run prints how to resume it."""
    log_line = logger.Logger.log

    def log_with_signal(log, step, metrics, **numbers):
        log_line(log, step, metrics, **numbers)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logger.Logger, "log", log_with_signal)
    chosen = settings(home, "a stopped run")
    monkeypatch.setattr(sys, "argv", ["train.py", *command_arguments(chosen)])
    with pytest.raises(SystemExit) as end:
        train.train(**chosen)
    assert end.value.code == 128 + signal.SIGTERM
    assert [path.name for path in list_checkpoints(home / "a stopped run")] == ["step-000005"]
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    monkeypatch.undo()
    train.train(**cli.parse_arguments(train.train, command[2:]))
    assert_same_run(home / "whole", home / "a stopped run")


def test_a_second_ctrl_c_does_not_wait(capsys):
    with signals.SignalHandler() as handler:
        os.kill(os.getpid(), signal.SIGINT)
        assert (
            handler.received == signal.SIGINT and "finishing this step" in capsys.readouterr().err
        )
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(home):
    killer = """if 1:
        import os, signal, train
        from nanovlm.checkpoints import checkpoint
        fsync_path, calls = checkpoint.fsync_path, []
        def kill_at_the_second_save(path):
            calls.append(path)
            if sum(str(p).endswith("model.safetensors") for p in calls) == 2:
                with open(calls[0].parent.parent / "log.jsonl", "a") as log:
                    log.write('{"step": 7, "lo')  # a line torn by the kill
                os.kill(os.getpid(), signal.SIGKILL)
            fsync_path(path)
        checkpoint.fsync_path = kill_at_the_second_save
        train.cli.run_script(train.train)
    """
    assert (
        launch([sys.executable, "-c", killer], settings(home, "killed")).returncode
        == -signal.SIGKILL
    )
    left = sorted(path.name for path in (home / "killed").iterdir())
    assert left == ["log.jsonl", "step-000003", "step-000006.tmp"]
    train.train(**settings(home, "killed", resume=True))
    assert_same_run(home / "whole", home / "killed")
    assert sorted(path.name for path in (home / "killed").iterdir()) == ["log.jsonl", "step-000008"]


def test_a_full_disk_leaves_the_last_checkpoint_and_one_message_from_all_ranks(home, monkeypatch):
    """No file may grow over 128 blocks of 512 or 1024 bytes: rank 0 cannot save, and rank 1
    does not wait for it."""
    monkeypatch.setattr(
        logger.Logger,
        "log",
        lambda log, step, *_, **__: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None,
    )
    with pytest.raises(SystemExit) as end:
        train.train(**settings(home, "full"))
    assert end.value.code == 130
    (kept,) = list_checkpoints(home / "full")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    full = launch(
        ["sh", "-c", 'ulimit -f 128 && exec "$@"', "sh", *TWO_RANKS],
        settings(home, "full", resume=True),
    )
    assert full.returncode == 1
    (error,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "step-000006 could not be saved" in error and f"{kept} is complete" in error
    assert "nanovlm" not in full.stderr.replace(str(ROOT), "").partition("Traceback")[2], (
        "a traceback of ours"
    )
    assert [path.name for path in (home / "full").glob("step-*")] == [kept.name]
    assert before == {path.name: path.read_bytes() for path in kept.iterdir()}


def test_a_nan_loss_names_its_step_and_sample_and_changes_nothing(home, monkeypatch):
    poison = 200  # an id that only one sample has, whose embedding is made NaN
    checkpoint = load_checkpoint(home / "model")
    with torch.no_grad():
        checkpoint.model.decoder.embed_tokens.weight[poison] = math.nan
    monkeypatch.setattr(
        train, "load_checkpoint", lambda *_, **__: checkpoint
    )  # what is in a file is never NaN
    monkeypatch.setattr(train, "load_deferred_weights", lambda checkpoint: None)  # it refuses NaN
    write_set(home / "poisoned-data", checkpoint, poison)
    chosen = settings(
        home,
        "nan",
        data=str(home / "poisoned-data"),
        steps=40,
        micro_batch_size=1,
        save_every=1,
        seq_len=21,
        freeze="decoder",
    )
    loader = packing.PackedDataLoader(
        dataset.PreparedDataset(chosen["data"]),
        seq_len=21,
        global_batch_size=5,
        micro_batch_size=1,
        seed=0,
    )
    names = loader.samples.names
    step, sequence = next(
        (step, members)
        for step, batches in enumerate(loader, 1)
        for _, members in batches
        if "poisoned" in [names[i] for i in members]
    )
    assert step > 1
    with pytest.raises(
        UserError,
        match=f"^step {step}: loss nan.* Samples: {', '.join(names[i] for i in sequence)}. "
        "Look at one: python prepare.py show",
    ):
        train.train(**chosen)
    assert [path.name for path in list_checkpoints(home / "nan")] == [f"step-{step - 1:06d}"]
    kept = dataset.PreparedDataset(home / "nan" / f"not-finite-{step:06d}")
    for k, i in enumerate(sequence):
        assert kept.names[k] == names[i]
        assert all(
            np.array_equal(a, b)
            for a, b in zip(kept.read(k)[:2], loader.samples.read(i)[:2], strict=True)
        )


def test_a_finished_run_is_not_resumed(home, capsys):
    before = (home / "whole" / "log.jsonl").read_bytes()
    train.train(**settings(home, "whole", resume=True))
    assert "is finished, at step 8 of 8" in capsys.readouterr().out
    assert (home / "whole" / "log.jsonl").read_bytes() == before


# ---- epochs and patience ----


def test_epochs_are_the_steps_that_the_plan_prints(home, monkeypatch, capsys):
    chosen = settings(home, "epochs", steps=None, epochs=1.5, validate_every=100)
    train.train(**chosen)
    printed = re.search(r"sft: (\d+) steps \(1.5 epochs\) of 5 sequences", capsys.readouterr().out)
    train.train(**settings(home, "its steps", steps=int(printed[1]), validate_every=100))
    assert_same_run(home / "epochs", home / "its steps")
    by_epochs, by_steps = (load_checkpoint(home / out).history for out in ("epochs", "its steps"))
    assert by_epochs["sft"] == by_steps["sft"]
    # a run that dies at step 5 resumes from step 3
    chosen["out"] = str(home / "resumed epochs")
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_finite", lambda done, *_: 1 // (done - 5))
        with pytest.raises(ZeroDivisionError):
            train.train(**chosen)
    train.train(**chosen | {"resume": True})
    assert_same_run(home / "epochs", home / "resumed epochs")
    with pytest.raises(UserError, match=f"--steps was {printed[1]}, now 14"):
        train.train(**chosen | {"resume": True, "epochs": 2.0})


def steps_in(out):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(out)]


@pytest.fixture
def run_with_losses(home, monkeypatch):
    """Train with a validation loss after each step as given, and infinity where there is none."""

    def run(out, losses, **others):
        def made_up(run, checkpoint, samples, validation_set, questions, autocast, done):
            return {"val_loss": losses[done - 1]} if done <= len(losses) else {}

        monkeypatch.setattr(train, "run_validation", made_up)
        chosen = dict(steps=12, global_batch_size=1, validate_every=1, save_every=100)
        train.train(**settings(home, out, **chosen | others))
        return [line["step"] for line in log_of(home / out)]

    return run


# The best is that of step 4; step 5 is as good, which is no improvement.
LOSSES = [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 3.2, 2.0, 2.5, 2.4, 2.3, 2.2]


def test_a_run_out_of_patience_ends_with_its_best_checkpoint(home, run_with_losses, capsys):
    assert run_with_losses("impatient", LOSSES, patience=3) == [1, 2, 3, 4, 5, 6, 7]
    end = capsys.readouterr().out.splitlines()[-3:]
    assert (
        end[0].startswith("sft: step 7 of 12 after") and "best val_loss 3.0000 at step 4" in end[1]
    )
    best = home / "impatient" / "step-000004"
    assert end[2] == f"--patience leaves the checkpoint with the lowest val_loss: {best}"
    assert steps_in(home / "impatient") == [4]
    assert str(load_checkpoint(home / "impatient").history["folder"]) == str(best)
    # It is finished, unless there is more patience. Then it is the run that always had more.
    assert run_with_losses("impatient", LOSSES, patience=3, resume=True)[-1] == 7
    assert "impatient is finished, at step 7 of 12" in capsys.readouterr().out
    run_with_losses("patient", LOSSES, patience=4)
    run_with_losses("impatient", LOSSES, patience=4, resume=True)
    assert steps_in(home / "patient") == [8] and len(log_of(home / "patient")) == 12
    assert_same_run(home / "patient", home / "impatient")


def test_the_best_checkpoint_is_left_at_the_last_step_as_well(home, run_with_losses, capsys):
    many = dict(patience=5, save_every=1, keep_checkpoints=3, steps=6)
    assert len(run_with_losses("all steps", LOSSES, **many)) == 6
    assert steps_in(home / "all steps") == [4]  # of the newest three: 4, 5 and 6
    run_with_losses("all steps", LOSSES, **many, resume=True)
    assert "all steps is finished, at step 6 of 6" in capsys.readouterr().out


def test_a_killed_run_has_the_patience_of_an_uninterrupted_one(home, run_with_losses):
    """It dies at step 6, after a save at step 5, and has to know that step 4 was the best."""
    chosen = dict(patience=3, save_every=5)
    run_with_losses("patience", LOSSES, **chosen)
    with pytest.raises(TypeError):
        run_with_losses("killed", [*LOSSES[:5], None], **chosen)
    assert steps_in(home / "killed") == [4, 5]
    run_with_losses("killed", LOSSES, **chosen, resume=True)
    assert_same_run(home / "patience", home / "killed")


def test_without_patience_the_newest_checkpoint_stays(home, run_with_losses):
    assert len(run_with_losses("endless", LOSSES)) == 12 and steps_in(home / "endless") == [12]


def test_the_best_checkpoint_is_that_of_a_run_without_patience(home):
    """With this learning rate the loss on the held-out samples rises after step 6."""
    chosen = dict(steps=20, lr=0.1, seed=0)
    train.train(**settings(home, "rising", **chosen, validate_every=2, patience=1, save_every=100))
    losses = {line["step"]: line.get("val_loss", math.inf) for line in log_of(home / "rising")}
    (best,) = steps_in(home / "rising")
    assert best == min(losses, key=losses.get) == max(losses) - 2 < 18
    every = dict(save_every=best, keep_checkpoints=9, validate_every=100)
    train.train(**settings(home, "all of it", **chosen, **every))
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = (home / out / f"step-{best:06d}" / name for out in ("rising", "all of it"))
        torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=0, atol=0)


def test_patience_needs_a_validation_loss(home):
    checkpoint = load_checkpoint(home / "model")
    write_set(home / "none held out", checkpoint, held_out=0, count=9)
    sample = ("sample-33", [97] * 7, [0] * 7, [])
    conftest.write_set(
        home / "no labels", checkpoint.fingerprint(), [sample, ("other", [98] * 5, [1] * 5, [])]
    )
    assert dataset.is_validation("sample-33")
    for name in ("none held out", "no labels"):
        with pytest.raises(
            UserError, match=f"^--patience=2 needs a val_loss: no held-out sample of .*{name} has"
        ):
            train.train(**settings(home, "refused", data=str(home / name), patience=2))


# ---- what is refused ----

REFUSED = [
    (
        dict(micro_batch_size=0, global_batch_size=-1, seq_len=0),
        "--seq_len=0 must be at least 1; --global_batch_size=-1 must be at least 1, a sequence "
        "for each rank; --micro_batch_size=0 must be at least 1",
    ),
    (
        dict(steps=0, save_every=0, log_every=0, validate_every=0),
        "--steps=0 .*--log_every=0 .*--save_every=0 .*--validate_every=0 must",
    ),
    (
        dict(lr=0, grad_clip=-1.0, projector_lr=0),
        "--lr=0 must be above 0; --projector_lr=0 .*--grad_clip=-1.0 must",
    ),
    (
        dict(steps=10**12, global_batch_size=10**12, seq_len=10**12),
        "--seq_len=10{12} must be at most 1,048,576; --steps=10{12} must be at most 1,073,741,824; "
        "--global_batch_size=10{12} must be at most 1,048,576",
    ),
    (dict(min_lr=0.02), "--min_lr=0.02 must be between 0 and --lr=0.01"),
    (
        dict(warmup_ratio=1.0, beta1=-0.1, beta2=1),
        "--warmup_ratio=1.0 .*--beta1=-0.1 .*--beta2=1 must",
    ),
    (dict(epochs=2.0), "--epochs=2.0 excludes --steps=8"),
    (dict(steps=None, epochs=0.0, patience=-1), "--epochs=0.0 must .*--patience=-1 must be at"),
    (dict(weight_decay=-0.1, seed=-1), "--seed=-1 must be at least 0; --weight_decay=-0.1 must"),
    (dict(dtype="float16"), "--dtype=float16 is not one of auto"),
    (dict(device="tpu"), "--device=tpu is not one of auto"),
    (dict(device="cuda:99"), "GPU 99.* finds 0 GPUs"),
    (dict(freeze="vision,head"), "'head' is not one of vision, projector, decoder"),
    (dict(freeze="vision,projector,decoder"), "leaves nothing to train"),
    (
        dict(freeze="vision", vision_lr=0.1),
        "--vision_lr=0.1 is for a part that --freeze=vision freezes",
    ),
    (dict(cpu_offload=True), "--cpu_offload=true needs --parallel=fsdp"),
    (dict(kernels="mine"), "--kernels=mine is not one of auto, torch"),
    (dict(stage="stf"), "--stage=stf is not known"),
    (
        dict(recipe="lava"),
        "--stage=sft is not known to --recipe=lava: megatron has decoder, vision",
    ),
    (
        dict(recipe="llava", stage="vision"),
        "--stage=vision is not known to --recipe=llava: .*; llava has pretrain, sft",
    ),
    (dict(data="no/data"), "no/data is not a prepared data"),
    (dict(model="no/model"), "no such model: no/model"),
    (dict(seq_len=12), r"sample sample-\d+ takes 20 tokens, more than --seq_len=12"),
    (dict(resume=True), "--resume=true, but .*refused holds no checkpoint of a run"),
    (
        dict(stage=""),
        "--seq_len=22, --steps=8.*: the demonstration takes no settings; give a --stage",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_invalid_settings_are_refused_before_anything_is_written(home, wrong, message):
    if wrong.get("device") == "cuda:99" and torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    with pytest.raises(UserError, match=message) as error:
        train.train(**settings(home, "refused", **wrong))
    assert "\n" not in str(error.value) and not (home / "refused").exists()


OTHERS = dict(
    stage="vision",
    model="elsewhere",
    steps=9,
    global_batch_size=6,
    seq_len=23,
    freeze="vision",
    lr=2e-2,
    vision_lr=1e-2,
    projector_lr=1e-2,
    decoder_lr=1e-2,
    min_lr=2e-3,
    warmup_ratio=0.4,
    weight_decay=0.2,
    grad_clip=2.0,
    beta1=0.8,
    beta2=0.9,
    seed=1,
    dtype="float32",
    lora_rank=2,
    lora_alpha=3.0,
    lora_target="vision",
)


@pytest.mark.parametrize(
    "name", [name for name, *_ in cli.settings(train.train) if name not in recipes.FREE_ON_RESUME]
)
def test_a_run_resumes_only_with_its_settings(home, name):
    with pytest.raises(UserError, match=rf"--{name} was .*, now {OTHERS[name]}"):
        rank = {"lora_rank": 2} if name.startswith("lora") else {}
        train.train(**settings(home, "whole", resume=True, **rank | {name: OTHERS[name]}))


def test_a_held_out_sample_must_fit_into_a_sequence_as_well(home):
    samples = [
        (name, [97] * length, [1] * length, [])
        for name, length in [("sample-33", 23), ("short", 7)]
    ]
    conftest.write_set(home / "long", load_checkpoint(home / "model").fingerprint(), samples)
    assert dataset.is_validation("sample-33")
    with pytest.raises(UserError, match="sample sample-33 takes 23 tokens, more than --seq_len=22"):
        train.train(**settings(home, "refused", data=str(home / "long")))


def test_a_run_resumes_only_with_its_data_in_any_folder(home, capsys):
    os.symlink(home / "data", home / "moved")
    train.train(**settings(home, "whole", resume=True, data=str(home / "moved")))
    assert "is finished, at step 8 of 8" in capsys.readouterr().out
    write_set(home / "other", load_checkpoint(home / "model"), count=61)
    with pytest.raises(UserError, match=r"--data was 65 samples of .*, now 66 samples of"):
        train.train(**settings(home, "whole", resume=True, data=str(home / "other")))


def test_an_earlier_run_is_moved_aside_and_other_folders_are_left_alone(home, capsys):
    train.train(**settings(home, "again", steps=1))
    train.train(**settings(home, "again", steps=2))
    assert [line["step"] for line in log_of(home / "again.1")] == [1] and [
        line["step"] for line in log_of(home / "again")
    ] == [1, 2]
    with pytest.raises(UserError, match="data exists already and is not a run"):
        train.train(**settings(home, "data"))
    with pytest.raises(UserError, match="is inside --out"):
        train.train(**settings(home, "again", model=str(home / "again")))


def test_a_folder_belongs_to_one_run(home):
    """While a run trains, another one neither moves its folder aside nor resumes from it."""
    train.train(**settings(home, "alive", steps=1))
    before, refused = (
        (home / "alive/log.jsonl").read_bytes(),
        pytest.raises(UserError, match="alive is being written by another process$"),
    )
    with files.lock_path(home / "alive"):
        with refused:
            train.train(**settings(home, "alive", steps=2))
        with refused:
            logger.Logger(home / "alive", 0, 1).__enter__()
    assert (home / "alive/log.jsonl").read_bytes() == before and not (home / "alive.1").exists()


def test_infinite_weights_are_not_saved(home):
    with pytest.raises(
        UserError,
        match=r"^step 1: \S+ is NaN or infinite, so it is not saved; no checkpoint is complete$",
    ):
        train.train(**settings(home, "absurd", lr=1e39, min_lr=0.0, save_every=1))
    assert not list_checkpoints(home / "absurd")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is not JSON"), ("[]", r"is not a JSON object: \[\]"), ("{}", "holds no step")],
)
def test_an_invalid_training_json_is_named(tmp_path, content, message):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(UserError, match=f"training.json {message}"):
        resume.resume_step(tmp_path, {})


def test_stages_chain_by_default(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    for name in ("captions", "chats"):
        os.symlink(home / "data", f"data/{name}")
    train.train(
        stage="pretrain", model=str(home / "model"), steps=1, global_batch_size=1, seq_len=22
    )
    train.train(stage="sft", steps=1, global_batch_size=1, seq_len=22)
    start, end = load_checkpoint("out/pretrain"), load_checkpoint("out/sft")
    assert (
        end.history["sft"] == "1 steps from out/pretrain on data/chats"
        and end.history["pretrain"] == start.history["pretrain"]
    )
    assert torch.equal(end.model.vision.positions, start.model.vision.positions)
    assert not torch.equal(
        end.model.decoder.embed_tokens.weight, start.model.decoder.embed_tokens.weight
    )


def test_the_resume_command_has_the_given_settings(monkeypatch):
    everything = {name: default for name, _, default, _ in cli.settings(train.train)}
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage=sft"])
    assert (
        signals.resume_command(train.train, everything | {"stage": "sft", "out": "out/my run"})
        == "python train.py --stage=sft '--out=out/my run' --resume=true"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (
        signals.resume_command(train.train, everything | {"stage": "sft", "resume": True})
        == "torchrun --nproc_per_node=8 train.py --stage=sft --resume=true"
    )
    machines = {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    for name, value in machines.items():
        monkeypatch.setenv(name, value)
    assert signals.resume_command(train.train, everything | {"stage": "sft"}) == (
        "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 "
        "--master_port=29500 train.py --stage=sft --resume=true"
    )
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert signals.resume_command(train.train, everything | {"stage": "sft"}) == "python train.py"
