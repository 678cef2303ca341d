"""The curves of training runs, from their log.jsonl (see nanovlm/training/logger.py)."""

from pathlib import Path

from .. import UserError
from ..training.logger import read_training_log
from ..training.recipes import PARTS, read_saved_settings

PANELS = (  # the curves of each panel, as log.jsonl names them
    "loss",
    "val_loss blank_image_loss first_turn_loss",
    "grad_norm grad_norm_vision grad_norm_projector grad_norm_decoder",
    "lr lr_vision lr_projector lr_decoder",
    "tokens_per_s",
    "eval_score",
)
LINE_STYLES = ("-", "--", ":", "-.")


def read_curves(paths):
    """Returns {run: {curve: ([step], [value])}}; a run is named by the folder of its log.

    lr_vision, …: of parts with a learning rate of their own, by the settings of the run's newest
    checkpoint.
    """
    runs = {}
    for path in paths:
        folder, curves = Path(path).parent, {}
        for line in read_training_log(path):
            for name, value in line.items():
                if value is not None:  # an eval_score without reference answers
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
        if not curves:
            raise UserError(
                f"{path} holds no line of a run, which writes one every --log_every steps"
            )
        for saved in sorted(folder.glob("step-*[0-9]/training.json"))[-1:]:
            settings = read_saved_settings(saved)
            for part in PARTS:
                if own := settings.get(f"{part}_lr"):
                    steps, values = curves["lr"]
                    curves[f"lr_{part}"] = steps, [lr * own / settings["lr"] for lr in values]
        runs[str(folder)] = curves
    return runs


def plot_curves(runs, out):
    """Plot the curves of several runs into one image file.

    Raises UserError if matplotlib is missing or does not know the file's format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(14, 7.5), dpi=130, layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if Path(out).suffix[1:].lower() not in formats:
        raise UserError(f"--out={out} does not end in one of .{', .'.join(sorted(formats))}")
    grid = figure.subplots(2, 3, sharex=True)
    for axes, names in zip(grid.flat, PANELS, strict=True):
        plot_panel(axes, runs, names.split())
    handles = [figure.axes[0].plot([], [], color=f"C{n}")[0] for n in range(len(runs))]
    figure.legend(handles, runs, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out)


def plot_panel(axes, runs, names):
    """Plot some curves of each run: a color for a run, a line style for a curve."""
    for name, style in zip(names, LINE_STYLES, strict=False):
        for number, curves in enumerate(runs.values()):
            if name in curves:
                marker = "." if len(curves[name][0]) < 50 else ""
                axes.plot(*curves[name], style, color=f"C{number}", marker=marker, alpha=0.8)
        if any(name in curves for curves in runs.values()):
            axes.plot([], [], style, color="gray", label=name)
    if not axes.lines:
        return axes.remove()
    # On a linear axis the first 50 steps, in which a loss falls most, are as wide as a line.
    axes.set(xlabel="step", xscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.xaxis.set_tick_params(labelbottom=True)
    if "loss" in names[0] or "norm" in names[0]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
