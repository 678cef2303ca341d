"""The curves of training runs, from their logs."""

from pathlib import Path

from .. import UserError, files

CURVES = ("loss", "validation", "norm", "tokens_per_s")


def read_curves(runs):
    """{run: {curve: ([step], [value])}} from files of JSON lines as train.py writes them, each named by its folder."""
    found = {}
    for path in runs:
        lines = list(files.read_log(path))
        if wrong := next(
            (
                number
                for number, line in enumerate(lines, 1)
                if not isinstance(line, dict) or "step" not in line
            ),
            None,
        ):
            raise UserError(f"{path}, line {wrong} is no line of a training run: it has no step")
        found[str(Path(path).parent)] = {
            name: tuple(
                zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
            )
            for name in CURVES
            if any(name in line for line in lines)
        }
    return found


def draw_curves(runs, out):
    """The curves of several runs in one picture, by matplotlib if the user has it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves are drawn by matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12, 8), layout="constrained")
    if Path(out).suffix[1:].lower() not in (known := figure.canvas.get_supported_filetypes()):
        raise UserError(f"--out={out} ends in none of .{', .'.join(sorted(known))}")
    for axes, name in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        for run, lines in runs.items():
            if name in lines:
                axes.plot(*lines[name], label=run, marker=".")
        axes.set(
            title=name, xlabel="step", yscale="log" if name in ("loss", "validation") else "linear"
        )
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(out)
