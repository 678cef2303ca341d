"""Ctrl-C and SIGTERM: the run finishes its step, saves a checkpoint, and ends."""

import os
import signal
import sys

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

    def exit(self, command):
        """End the process after the save, with exit code 130 for Ctrl-C and 143 for SIGTERM.

        command: the one that resumes the run. If only another rank received a signal, the exit code
        is 143.
        """
        if get_rank() == 0:
            print(f"stopped and saved; to resume:\n{command}", file=sys.stderr, flush=True)
        sys.exit(128 + (self.received or signal.SIGTERM))

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
