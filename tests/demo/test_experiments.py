"""The experiments in a small world: twelve fridges, parts with random weights, two steps a training.

The trainings of an experiment differ in what its table says, and in nothing else.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch

import prepare
import train
from nanovlm import UserError
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.checkpoints.random_init import create_model, parameter_count
from nanovlm.data.dataset import PreparedDataset
from nanovlm.data.packing import PackedDataLoader
from nanovlm.demo import experiments, figures, fridge, run
from nanovlm.preprocess.build import prepare_dataset
from nanovlm.preprocess.readers import read_texts
from nanovlm.training import signals

WIDTH, PATCHES = 24, 64
SHAPES = {
    "vision": dict(tile=16, patch=2, width=WIDTH, layers=1, heads=3, intermediate_size=28),
    "decoder": dict(width=WIDTH, layers=1, heads=6, kv_heads=2, intermediate_size=20),
}
HELD_OUT = [136, 176]  # numbers of fridges whose captions are for validation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the experiments read of a demonstration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        patch.setattr(experiments, "STEPS", 2)
        patch.setattr(train, "plan_memory", lambda *_: None)  # takes as long as the two steps
        images = Path(run.FRIDGE, "images")
        images.mkdir(parents=True)
        numbers = [*range(10), *HELD_OUT]
        captions = [fridge.make_training_sample(n, 0, images)[0] for n in numbers]
        Path(run.FRIDGE, "captions.json").write_text(json.dumps(captions))
        questions = [json.dumps(q) + "\n" for q in fridge.make_eval_sample(0, 0, images)]
        Path(run.FRIDGE, "questions.jsonl").write_text("".join(questions))
        for seed, part in enumerate(("vision", "decoder")):
            create_model(
                read_texts([f"{run.FRIDGE}/captions.json"]),
                out=f"out/demo/{part}",
                vocab_size=400,
                template="mistral",
                image_config=run.IMAGE_CONFIG | {"tile": 16, "patch": 2},
                seed=seed,
                **SHAPES,
            )
        prepare_dataset(
            model="out/demo/vision",
            source=[f"{run.FRIDGE}/captions.json"],
            images=str(images),
            out="data/demo/captions",
            seq_len=2048,
        )
        for path in ("out/demo/scores.json", "data/demo/chats", figures.PHOTO):
            Path(path).touch()  # an experiment wants a finished demonstration
        yield


@pytest.fixture(scope="module")
def ran(world):
    """{experiment: (its results, the settings of its trainings)}."""
    return {name: run_and_record(name) for name in experiments.EXPERIMENTS}


def run_and_record(name):
    calls = []

    def recording_train(**settings):
        calls.append(settings)
        train.train(**settings)

    return experiments.run_experiment(recording_train, name), calls


def test_image_tokens_are_the_patches_by_the_square_of_the_shuffle(ran):
    results, calls = ran["image_tokens"]
    for result, call, shuffle in zip(results, calls, (1, 2, 4, 8), strict=True):
        assert result["image_tokens"] == PATCHES // shuffle**2
        assert PreparedDataset(call["data"]).image_config["shuffle"] == shuffle


def test_each_training_reads_the_same_fridges_in_the_same_order(ran):
    """However many image tokens a fridge has, a sequence has room for two fridges."""
    orders = []
    for call in ran["image_tokens"][1]:
        options = dict(global_batch_size=1, micro_batch_size=1, seed=0)
        samples = PreparedDataset(call["data"])
        loader = PackedDataLoader(samples, seq_len=call["seq_len"], **options)
        orders.append([members.tolist() for members in itertools.islice(loader.sequences, 10)])
    assert all(order == orders[0] for order in orders)
    assert {len(members) for members in orders[0]} == {2}


def test_a_projector_has_two_layers_or_one(ran):
    two_layers, one_layer, *_ = ran["projector"][0]
    patches = WIDTH * 2**2  # numbers in the patches of an image token
    assert two_layers["trained"] == (patches + 1) * WIDTH + (WIDTH + 1) * WIDTH
    assert one_layer["trained"] == patches * WIDTH


def test_without_a_projector_the_mean_of_the_patches_enters_the_decoder(ran):
    model = load_checkpoint("out/demo/experiments/projector/vision_encoder_alone").model
    assert ran["projector"][0][2]["trained"] == parameter_count(model.vision)
    tiles_NCYX = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    pixels_NCYX = (tiles_NCYX / 255 - model.mean_C11) / model.std_C11
    features_NDyx = model.vision(pixels_NCYX).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    mean_NDyx = torch.nn.functional.avg_pool2d(features_NDyx, 2)
    expected = mean_NDyx.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(model.encode_images(tiles_NCYX), expected)


def test_what_is_frozen_does_not_change_by_a_bit(ran):
    start = load_checkpoint("out/demo/vision").model.vision.state_dict()
    decoder = load_checkpoint("out/demo/decoder").model.decoder.state_dict()
    for call in ran["vision_encoder"][1]:
        model = load_checkpoint(call["out"]).model
        assert equal(model.decoder.state_dict(), decoder)
        assert equal(model.vision.state_dict(), start) == ("vision" in call["freeze"])


def equal(state, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_an_interrupted_experiment_goes_on(world, monkeypatch):
    """Finished trainings are skipped; one that was killed begins anew."""
    trials = dict(list(experiments.EXPERIMENTS["vision_encoder"].items())[:2])
    monkeypatch.setitem(experiments.EXPERIMENTS, "vision_encoder", trials)
    monkeypatch.setattr(experiments, "OUT", "out/demo/whole")
    whole, _ = run_and_record("vision_encoder")
    monkeypatch.setattr(experiments, "OUT", "out/demo/interrupted")

    def train_once(**settings):
        if settings["out"].endswith("frozen"):
            return train.train(**settings)
        Path(settings["out"]).mkdir()
        Path(settings["out"], "log.jsonl").write_text('{"step": 1, "val_loss": 9.0}\n')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.run_experiment(train_once, "vision_encoder")
    again, calls = run_and_record("vision_encoder")
    assert [call["resume"] for call in calls] == [True, False]
    for one, other in zip(again, whole, strict=True):
        assert one["val_loss"] == other["val_loss"] and one["grad_norm"] == other["grad_norm"]


def test_a_stopped_training_names_the_command_of_its_experiment(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare.py", "experiment", "--name=projector"])
    command = "python prepare.py experiment --name=projector"
    assert signals.resume_command(train.train, {"stage": "pretrain"}) == command


def test_a_missing_demonstration_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^out/demo/scores.json is missing: run `python train.py`"):
        prepare.experiment(name="projector")
    with pytest.raises(UserError, match="needs --name"):
        prepare.experiment()
    assert not list(tmp_path.iterdir())
