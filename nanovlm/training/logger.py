"""The log of a run: lines on the terminal, in log.jsonl and, with --tensorboard, for tensorboard.

A line of log.jsonl holds:

    step                       optimizer steps so far
    loss                       mean over the labelled tokens of this step
    lr                         --lr at this step; a part's own follows the same schedule
    label_fraction             labelled tokens of this step, as a share of all its tokens
    grad_norm                  before clipping; grad_norm_vision, …: of each trained part
    val_loss, blank_image_loss on the held-out samples, with their images and with grey images
    first_turn_loss            on the first answers of the held-out samples, if some have several
    eval_score                 mean score on --eval_questions
    tokens_per_s               of all ranks, since the last line
    tflops                     10^12 operations per second of one rank
    data_wait                  share of the time in which this rank waited for a batch
    eta_s                      seconds to the end of the run
    samples, tokens, hours     so far, over all stops and resumes
"""

import contextlib
import datetime
import json
import math
import time
from pathlib import Path

from .. import UserError
from ..distributed import get_rank, raise_on_all_ranks
from ..files import lock_path, name_file, read_log, write_text


def read_training_log(path):
    """Yields the lines of a log.jsonl. Raises UserError for a line that is something else."""
    for number, line in enumerate(read_log(path), 1):
        for name, value in {"step": None, **line}.items():
            is_number = isinstance(value, float) or (
                isinstance(value, int) and value.bit_length() < 64
            )
            if not is_number and name != "eval_score":  # null without reference answers
                raise UserError(
                    f"{path}, line {number} is not from a training run: its {name} is "
                    f"{value!r:.40}; remove the line, or choose another file"
                )
        yield line


class Logger:
    """Writes the log of a run. A resumed run continues the file; only rank 0 writes.

    While a logger is open, no other process may train in its folder.
    """

    def __init__(self, out, start, steps, tensorboard=False):
        self.path = Path(out) / "log.jsonl"
        self.start, self.steps, self.tensorboard = start, steps, tensorboard
        self.start_time = self.line_time = time.time()
        self.wait_seconds, self.tokens, self.flops = 0.0, 0, 0  # since the last line
        self.totals = {"samples": 0, "tokens": 0, "hours": 0.0}
        self.best = math.inf, 0  # lowest val_loss, and its step; identical on every rank
        self.writer = None
        self.open_files = contextlib.ExitStack()

    @raise_on_all_ranks()
    def __enter__(self):
        if get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.open_files.enter_context(lock_path(self.path.parent))
            if self.tensorboard:
                # Imported here: it takes a second, and not everybody has the package.
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(self.path.parent, purge_step=self.start + 1)
                self.writer = self.open_files.enter_context(writer)
        self.read_earlier_lines()
        return self

    def __exit__(self, *_):
        self.open_files.close()

    def read_earlier_lines(self):
        """Keep the lines up to the step that the run resumes from, and their totals."""
        lines = read_training_log(self.path) if self.path.exists() else []
        lines = [line for line in lines if line["step"] <= self.start]
        if get_rank() == 0:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            self.totals |= {name: line[name] for name in self.totals if name in line}
            self.update_best(line)

    def wait(self, future):
        """Returns the result of a future, and counts the time as waiting for data."""
        start = time.time()
        result = future.result()
        self.wait_seconds += time.time() - start
        return result

    def count_step(self, step, flops):
        """Count a step, as train.compute_gradients returns it, and this rank's operations in it."""
        self.tokens, self.flops = self.tokens + step.tokens, self.flops + flops
        self.totals["samples"] += int(step.samples)
        self.totals["tokens"] += int(step.tokens)

    def update_best(self, line):
        self.best = min(self.best, (line.get("val_loss", math.inf), line["step"]))

    @raise_on_all_ranks()  # if the disk is full, rank 0 cannot write, and all ranks must stop
    def log(self, step, metrics, **numbers):
        """Write one line; metrics: what train.run_validation returned at this step."""
        now = time.time()
        seconds = now - self.line_time
        self.totals["hours"] += seconds / 3600
        line = {
            "step": step,
            **numbers,
            **metrics,
            "tokens_per_s": self.tokens / seconds,
            "tflops": self.flops / seconds / 1e12,
            "data_wait": self.wait_seconds / seconds,
            "eta_s": (now - self.start_time) / (step - self.start) * (self.steps - step),
            **self.totals,
        }
        self.line_time, self.wait_seconds, self.tokens, self.flops = now, 0.0, 0, 0
        self.update_best(line)
        if get_rank() > 0:
            return
        with name_file(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name in line if self.writer else ():
            self.writer.add_scalar(name, line[name], step)
        self.print_line(line, metrics)

    def print_line(self, line, metrics):
        scores = "".join(f" | {name} {value:.4f}" for name, value in metrics.items())
        print(
            f"step {line['step']:5d}/{self.steps} | loss {line['loss']:.4f}{scores} | "
            f"lr {line['lr']:.1e} | grad_norm {line['grad_norm']:.2f} | "
            f"{line['tokens_per_s']:,.0f} tokens/s, {line['tflops']:,.2f} TFLOP/s, "
            f"{line['label_fraction']:.0%} labelled, {line['data_wait']:.0%} data wait | "
            f"{datetime.timedelta(seconds=round(line['eta_s']))} left",
            flush=True,
        )

    def print_summary(self, step, name):
        """Print the totals of a run, over all its stops and resumes."""
        if get_rank() > 0:
            return
        seconds = datetime.timedelta(seconds=round(time.time() - self.start_time))
        val_loss, best_step = self.best
        best = f"{val_loss:.4f} at step {best_step}" if best_step else "none"
        print(
            f"{name}: step {step} of {self.steps} after {seconds}, in {self.path.parent}\n"
            f"{self.totals['samples']:,} samples, {self.totals['tokens']:,} tokens, "
            f"{self.totals['hours']:.2f} hours, best val_loss {best}",
            flush=True,
        )
