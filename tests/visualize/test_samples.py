"""What `show` and `check` print is what training will read."""

import json

import numpy as np
import pytest
from conftest import write_set
from PIL import Image
from test_dataset import FINGERPRINT, TILE, TOKENS, make_image, make_samples, write

import prepare
from nanovlm import IMAGE_TOKEN_ID, UserError
from nanovlm.data import dataset, tokenizer
from nanovlm.visualize import curves, samples

WORDS = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])


@pytest.fixture
def told(tmp_path):
    """A set of one sample with two pictures, of 2 tiles and of 1, and its tokenizer."""
    g, special = np.random.default_rng(0), WORDS.special
    ids = [
        special["<s>"],
        special["[INST]"],
        IMAGE_TOKEN_ID,
        *b"or ",
        IMAGE_TOKEN_ID,
        *b"?\n",
        special["[/INST]"],
        *"né".encode(),
        special["</s>"],
    ]
    trained = [0] * (len(ids) - 4) + [1] * 4
    pictures = [make_image(g, 2), make_image(g, 1)]
    write_set(tmp_path / "set", FINGERPRINT, [("one", ids, trained, pictures)])
    WORDS.save(tmp_path / "set")
    return tmp_path / "set", pictures


def test_a_sample_is_shown_token_by_token_pictures_as_their_counts(told, capsys, tmp_path):
    folder, pictures = told
    prepare.show(data=str(folder), sample="one", out=str(tmp_path / "tiles.png"))
    assert capsys.readouterr().out == (
        "one: 24 tokens, 4 of them labels, images: 2\n"
        " no loss  <s>|[INST]|<image 1: 2 tiles, 8 tokens>|o|r| |<image 2: 1 tile, 4 tokens>|?|"
        "\\n|[/INST]\n"
        "   label  n|\\\\xc3|\\\\xa9|</s>\n"
    )
    sheet = np.asarray(Image.open(tmp_path / "tiles.png"))
    for n, tile_CYX in enumerate(np.concatenate([picture.tiles for picture in pictures])):
        left = n * (TILE + samples.GAP)
        assert np.array_equal(sheet[:, left : left + TILE], tile_CYX.transpose(1, 2, 0))


def test_a_sample_that_is_not_there_is_told_with_one_that_is(told):
    with pytest.raises(UserError, match="holds no sample 'onne', but 'one'"):
        prepare.show(data=str(told[0]), sample="onne")


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(sample="one", out="tiles"), "an --out that ends in .png: .*--out=tiles"),
        (dict(sample="one", data=""), "show needs --data"),
    ],
)
def test_nothing_is_shown_that_could_not_be_written(told, capsys, settings, said):
    with pytest.raises(UserError, match=said):
        prepare.show(**{"data": str(told[0]), **settings})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(seq_len=0), "--seq_len=0 at"),
        (dict(tokens_per_s=-5.0), "--tokens_per_s=-5.0 at"),
        (dict(data=""), "--data"),
    ],
)
def test_settings_of_check_that_cannot_be_are_told(told, settings, said):
    with pytest.raises(UserError, match=said):
        prepare.check(**{"data": str(told[0]), **settings})


def test_a_set_of_which_all_is_held_out_is_told(tmp_path):
    samples = make_samples(200)
    held = [sample for sample in samples if dataset.is_validation(sample[0])]
    write(tmp_path / "held", held)
    write(tmp_path / "all", samples)
    for text in (f"{tmp_path}/held", f"{tmp_path}/all:0.5,{tmp_path}/held:0.5"):
        with pytest.raises(
            UserError,
            match=f"held: all {len(held)} samples are held out for validation, none is left",
        ):
            prepare.check(data=text)


def test_a_mosaic_breaks_into_rows():
    tiles_NCYX = np.arange(5 * 3 * 2 * 7, dtype=np.uint8).reshape(5, 3, 2, 7)
    sheet = np.asarray(samples.concat_tiles(tiles_NCYX, columns=2))
    assert sheet.shape == (3 * 2 + 2 * samples.GAP, 2 * 7 + samples.GAP, 3)
    assert np.array_equal(
        sheet[2 + samples.GAP : 4 + samples.GAP, 7 + samples.GAP :],
        tiles_NCYX[3].transpose(1, 2, 0),
    )


def test_a_report_counts_what_is_there(tmp_path, capsys):
    samples = make_samples(200)
    write(tmp_path / "set", samples[:90], samples[90:])
    prepare.check(data=str(tmp_path / "set"), seq_len=64, tokens_per_s=1000.0)
    said = capsys.readouterr().out
    training = [sample for sample in samples if not dataset.is_validation(sample[0])]
    tiles = sum(len(picture.tiles) for *_, pictures in samples for picture in pictures)
    length = sum(
        len(ids) + sum(len(picture.tiles) * TOKENS - 1 for picture in pictures)
        for _, ids, _, pictures in training
    )
    assert (
        f"200 samples, {200 - len(training)} of them held out" in said
        and f"in {tiles:,} tiles" in said
    )
    assert f"labels: {sum(map(sum, (trained for _, _, trained, _ in samples))):,} tokens" in said
    assert (
        f"an epoch: {len(training)} samples, {length:,} tokens in" in said
        and f"at 1,000 tokens/s: 0:00:{round(length / 1000):02}" in said
    )
    assert said.endswith("all checksums are right\n")


def test_a_row_too_short_and_a_damaged_byte_are_told(tmp_path, capsys):
    write(tmp_path / "set", make_samples(20))
    longest = dataset.PreparedDataset(tmp_path / "set").table[:, dataset.LENGTH].max()
    prepare.check(data=str(tmp_path / "set"), seq_len=int(longest) - 1)
    assert f"do not fit into sequences of {longest - 1:,} tokens" in capsys.readouterr().out
    path = tmp_path / "set/00000/tiles"
    path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    with pytest.raises(
        UserError, match=f"{path}: its bytes have the checksum .*: prepare it again"
    ):
        prepare.check(data=str(tmp_path / "set"))


def log(path, *lines, torn=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return str(path)


def test_the_curves_of_runs_are_drawn_even_of_one_that_is_still_running(tmp_path):
    pytest.importorskip("matplotlib")
    step = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "tokens_per_s": 10.0}
    logs = [
        log(
            tmp_path / "a/log.jsonl",
            step,
            {
                "step": 2,
                "loss": 2.0,
                "norm": 1.0,
                "tokens_per_s": 10.0,
                "validation": 2.5,
            },  # 1c7a388's
            torn='{"step": 3, "lo',
        ),
        log(tmp_path / "b/log.jsonl", {**step, "loss": 4.0}),
    ]
    found = curves.read_curves(logs)
    assert found[str(tmp_path / "a")] == {
        "loss": ([1, 2], [3.0, 2.0]),
        "val_loss": ([2], [2.5]),
        "grad_norm": ([1, 2], [1.0, 1.0]),
        "tokens_per_s": ([1, 2], [10.0, 10.0]),
    }
    prepare.plot(log=logs, out=str(tmp_path / "curves.png"))
    with Image.open(tmp_path / "curves.png") as drawn:
        assert drawn.size[0] > 1000
    for out in ("curves.foo", "curves"):
        with pytest.raises(
            UserError, match=rf"^--out={out} does not end in one of \..*, \.pdf, .*, \.svg, "
        ):
            prepare.plot(log=logs, out=out)


@pytest.mark.parametrize(
    "lines, said",
    [
        (["{"], "line 1: not JSON"),
        (["5"], "line 1 is not from a training run"),
        (['{"loss": 1}'], "line 1 is not from a training run"),
    ],
)
def test_a_file_that_is_no_log_is_told(tmp_path, lines, said):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*lines, '{"step": 1}']))
    with pytest.raises(UserError, match=f"{path}, {said}"):
        curves.read_curves([path])
