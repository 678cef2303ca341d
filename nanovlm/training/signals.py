"""Ctrl-C and SIGTERM: the run finishes its step, saves a checkpoint, and ends."""

import os
import shlex
import signal
import sys

from ..cli import changed_settings, format_value
from ..distributed import get_rank


class SignalHandler:
    """Stores the number of a signal, SIGINT for Ctrl-C or SIGTERM, in `received`.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if get_rank() == 0:
            timeout = ""
            if "TORCHELASTIC_RUN_ID" in os.environ:
                timeout = "; torchrun waits 30 s for it, or its --shutdown-timeout"
            print(f"\nfinishing this step, then saving{timeout}", file=sys.stderr, flush=True)

    def exit(self, script, given):
        """End the process after the save, with exit code 130 for Ctrl-C and 143 for SIGTERM.

        If only another rank received a signal, the exit code is 143. script, given: of
        `resume_command`.
        """
        if get_rank() == 0:
            command = resume_command(script, given)
            print(f"stopped and saved; to resume:\n{command}", file=sys.stderr, flush=True)
        sys.exit(128 + (self.received or signal.SIGTERM))

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def resume_command(script, given):
    """The command that continues this run. Demonstration and experiments continue by themselves."""
    if len(sys.argv) == 1 or sys.argv[1] == "experiment":
        return shlex.join(["python", *sys.argv])
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        torchrun = "torchrun --nproc_per_node={LOCAL_WORLD_SIZE}"
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # several machines, this is the first
            torchrun += (
                " --nnodes={GROUP_WORLD_SIZE} --node_rank=0 --master_addr={MASTER_ADDR}"
                " --master_port={MASTER_PORT}"
            )
        launcher = torchrun.format(**os.environ).split()
    settings = changed_settings(script, given) | {"resume": True}
    arguments = [f"--{name}={format_value(value)}" for name, value in settings.items()]
    return shlex.join([*launcher, sys.argv[0], *arguments])
