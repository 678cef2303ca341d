"""The curves of training runs, from their log.jsonl (see nanovlm/training/logger.py)."""

from pathlib import Path

from .. import UserError
from ..training.logger import read_training_log

CURVES = ("loss", "val_loss", "blank_image_loss", "first_turn_loss", "grad_norm", "tokens_per_s")


def read_curves(paths):
    """Returns {run: {curve: ([step], [value])}}; a run is named by the folder of its log."""
    runs = {}
    for path in paths:
        curves = runs[str(Path(path).parent)] = {name: ([], []) for name in CURVES}
        for line in read_training_log(path):
            for name, (steps, values) in curves.items():
                if name in line:
                    steps.append(line["step"])
                    values.append(line[name])
        if not any(steps for steps, _ in curves.values()):
            raise UserError(
                f"{path} holds no line of a run, which writes one every --log_every steps"
            )
    return runs


def plot_curves(runs, out):
    """Plot the curves of several runs into one image file.

    Raises UserError if matplotlib is missing or does not know the file's format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(18, 8), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if Path(out).suffix[1:].lower() not in formats:
        raise UserError(f"--out={out} does not end in one of .{', .'.join(sorted(formats))}")
    for axes, name in zip(figure.subplots(2, 3).flat, CURVES, strict=True):
        for run, curves in runs.items():
            axes.plot(*curves[name], label=run, marker=".")
        axes.set(title=name, xlabel="step", yscale="log" if "loss" in name else "linear")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(out)
