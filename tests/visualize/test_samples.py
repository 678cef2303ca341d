"""`prepare.py show` and `check` print what training reads; `plot` draws what it logged."""

import json
import re
import sys

import numpy as np
import pytest
from conftest import write_set
from PIL import Image
from test_dataset import FINGERPRINT, TILE, TOKENS, make_image, make_samples, write

import prepare
from nanovlm import IMAGE_TOKEN_ID, UserError
from nanovlm.data import dataset, tokenizer
from nanovlm.visualize import curves, sample_page

WORDS = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])


@pytest.fixture
def prepared(tmp_path):
    """A prepared dataset of one sample with two images, of 2 tiles and of 1, and its tokenizer."""
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
    loss_mask = [0] * (len(ids) - 4) + [1] * 4
    images = [make_image(g, 2), make_image(g, 1)]
    write_set(tmp_path / "set", FINGERPRINT, [("one", ids, loss_mask, images)])
    WORDS.save(tmp_path / "set")
    return tmp_path / "set", images


def test_a_sample_is_shown_as_tokens_and_its_images_as_counts(prepared, capsys, tmp_path):
    folder, images = prepared
    prepare.show(data=str(folder), sample=["one"], out=str(tmp_path / "tiles.png"))
    assert capsys.readouterr().out == (
        "one: 24 tokens, 4 of them labels, images: 2\n"
        " no loss  <s>|[INST]|<image 1: 2 tiles, 8 tokens>|o|r| |<image 2: 1 tile, 4 tokens>|?|"
        "\\n|[/INST]\n"
        "   label  n|\\\\xc3|\\\\xa9|</s>\n"
    )
    pixels = np.asarray(Image.open(tmp_path / "tiles.png"))
    scale = -(-sample_page.MIN_TILE // TILE)
    small = pixels[scale // 2 :: scale, scale // 2 :: scale]
    windows = np.lib.stride_tricks.sliding_window_view(small, (TILE, TILE), axis=(0, 1))
    for tile_CYX in np.concatenate([image.tiles for image in images]):
        assert (windows == tile_CYX).all((2, 3, 4)).sum() == 1


def test_a_page_shows_every_token_and_colors_those_with_a_loss(prepared, tmp_path):
    folder, _ = prepared
    prepare.show(data=str(folder), sample=["one"], out=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    with_loss = re.findall(r"<b title[^>]*>(.*?)</b>", page)
    assert with_loss == ["n", r"\\xc3", r"\\xa9", "&lt;/s&gt;"]
    without = re.findall(r"<span title[^>]*>(.*?)</span>", page)
    assert without == ["&lt;s&gt;", "[INST]", "o", "r", " ", "?", r"\n", "[/INST]"]
    assert page.count('alt="image token"') == 8 + 4
    assert "1 samples, 24 tokens. The 4 blue ones" in page and "http" not in page
    # The template's last token predicts the first one of the answer.
    assert f"position 19, label: {ord('n')} “n”" in page


def test_a_missing_sample_is_named_with_the_first_ones(prepared):
    with pytest.raises(UserError, match="holds no sample 'onne'; its first ones are one"):
        prepare.show(data=str(prepared[0]), sample=["onne"])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(sample=["one"], out="tiles"), "--out=tiles must end in .png or .html"),
        (dict(sample=["one"], data=""), "show needs --data"),
    ],
)
def test_show_prints_nothing_if_its_settings_are_wrong(prepared, capsys, settings, message):
    with pytest.raises(UserError, match=message):
        prepare.show(**{"data": str(prepared[0]), **settings})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(seq_len=0), "--seq_len=0 must be at"),
        (dict(tokens_per_s=-5.0), "--tokens_per_s=-5.0 must be at"),
        (dict(data=""), "--data"),
    ],
)
def test_invalid_settings_of_check_are_named(prepared, settings, message):
    with pytest.raises(UserError, match=message):
        prepare.check(**{"data": str(prepared[0]), **settings})


def test_a_dataset_that_is_all_held_out_is_named(tmp_path):
    samples = make_samples(200)
    held_out = [sample for sample in samples if dataset.is_validation(sample[0])]
    write(tmp_path / "held", held_out)
    write(tmp_path / "all", samples)
    for text in (f"{tmp_path}/held", f"{tmp_path}/all:0.5,{tmp_path}/held:0.5"):
        with pytest.raises(
            UserError,
            match=f"held: all {len(held_out)} samples are held out for validation, none is left",
        ):
            prepare.check(data=text)


def test_the_summary_counts_samples_tiles_and_tokens(tmp_path, capsys):
    samples = make_samples(200)
    write(tmp_path / "set", samples[:90], samples[90:])
    prepare.check(data=str(tmp_path / "set"), seq_len=64, tokens_per_s=1000.0)
    output = capsys.readouterr().out
    training = [sample for sample in samples if not dataset.is_validation(sample[0])]
    tiles = sum(len(image.tiles) for *_, images in samples for image in images)
    length = sum(
        len(ids) + sum(len(image.tiles) * TOKENS - 1 for image in images)
        for _, ids, _, images in training
    )
    assert (
        f"200 samples, {200 - len(training)} of them held out" in output
        and f"in {tiles:,} tiles" in output
    )
    labels = sum(sum(loss_mask) for _, _, loss_mask, _ in samples)
    assert f"labels: {labels:,} tokens" in output
    assert (
        f"an epoch: {len(training)} samples, {length:,} tokens in" in output
        and f"at 1,000 tokens/s: 0:00:{round(length / 1000):02}" in output
    )
    assert output.endswith("all checksums are right\n")


def test_too_short_a_sequence_and_damaged_bytes_are_named(tmp_path, capsys):
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


def write_log(path, *lines, incomplete=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + incomplete)
    return str(path)


STEP = {"step": 1, "loss": 3.0, "lr": 0.25, "grad_norm": 1.0, "tokens_per_s": 10.0}


@pytest.fixture
def logs(tmp_path):
    """The logs of a run that goes on, of an older version, and of one with a single step."""
    later = {
        "step": 2,
        "loss": 2.0,
        "lr": 0.5,
        "norm": 1.5,
        "validation": 2.5,
        "blank": 4.0,
        "first_turn_loss": 2.75,
        "eval_score": None,
    }
    running = write_log(tmp_path / "a/log.jsonl", STEP, later, incomplete='{"step": 3, "lo')
    (tmp_path / "a/step-000002").mkdir()
    saved = {"step": 2, "seq_len": 8, "lr": 0.5, "vision_lr": 0.05, "decoder_lr": None}
    (tmp_path / "a/step-000002/training.json").write_text(json.dumps(saved))
    return [running, write_log(tmp_path / "b/log.jsonl", STEP | {"loss": 4.0, "eval_score": 0.5})]


def test_the_curves_of_finished_and_running_runs_are_read(logs, tmp_path):
    found = curves.read_curves(logs)[str(tmp_path / "a")]
    assert found == {
        "step": ([1, 2], [1, 2]),
        "loss": ([1, 2], [3.0, 2.0]),
        "lr": ([1, 2], [0.25, 0.5]),
        "lr_vision": ([1, 2], pytest.approx([0.025, 0.05])),  # scales as --lr does
        "grad_norm": ([1, 2], [1.0, 1.5]),
        "tokens_per_s": ([1], [10.0]),
        "val_loss": ([2], [2.5]),
        "blank_image_loss": ([2], [4.0]),
        "first_turn_loss": ([2], [2.75]),
    }


def test_each_curve_is_drawn_in_its_panel_from_the_first_step_on(logs, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []

    def save(figure, out, savefig=figure_module.Figure.savefig):
        figures.append(figure)
        savefig(figure, out)

    monkeypatch.setattr(figure_module.Figure, "savefig", save)
    out = str(tmp_path / "curves.png")
    prepare.plot(log=logs, out=out)
    panels, found = figures[0].axes, curves.read_curves(logs)
    assert len(panels) == len(curves.PANELS)
    for axes, names in zip(panels, map(str.split, curves.PANELS), strict=True):
        drawn = [line for line in axes.lines if len(line.get_xdata())]
        expected = []
        for run in found.values():
            expected += [run[name] for name in names if name in run]
        pairs = [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]
        assert sorted(pairs) == sorted(expected)
        assert axes.get_xscale() == "log" and axes.get_xlim()[0] <= 1
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [name for name in names if any(name in run for run in found.values())]
    runs = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert runs == [str(tmp_path / "a"), str(tmp_path / "b")]
    with Image.open(out) as figure:
        assert figure.width > 1200
    prepare.plot(log=logs[:1], out=out)  # without an eval_score
    assert len(figures[1].axes) == len(curves.PANELS) - 1


def test_a_figure_without_matplotlib_or_of_an_unknown_format_is_refused(logs, monkeypatch):
    pytest.importorskip("matplotlib")
    for out in ("curves.foo", "curves"):
        with pytest.raises(
            UserError, match=rf"^--out={out} does not end in one of \..*, \.pdf, .*, \.svg, "
        ):
            prepare.plot(log=logs, out=out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="^curves need matplotlib: pip install matplotlib$"):
        prepare.plot(log=logs)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{\n", ", line 1: not JSON"),
        ("5\n", ", line 1: not a JSON object"),
        ('{"loss": 1}\n', ", line 1 is not from a training run: its step is None; remove"),
        ('{"step": 1, "loss": "low"}\n', ", line 1 is not .*: its loss is 'low'"),
        ('{"step": 1, "loss": 1%s}\n' % ("0" * 400), ", line 1 is not .*: its loss is 1000"),
        ("", " holds no line of a run"),
        ('{"step": 1, "lo', " holds no line of a run"),
    ],
)
def test_a_file_that_is_not_a_log_is_named(tmp_path, text, message):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}{message}"):
        curves.read_curves([path])
