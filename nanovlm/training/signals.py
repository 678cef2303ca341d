"""Ctrl-C and SIGTERM: the step is finished and saved, then the program ends."""

import os
import signal
import sys


class Stopper:
    """Ctrl-C and SIGTERM set `asked` to their number; the loop finishes its step and saves. A second Ctrl-C stops at once."""

    def __init__(self, rank):
        self.asked, self.rank = 0, rank

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        if self.rank == 0:
            hurry = (
                ", if torchrun waits for it: its --shutdown-timeout, or 30 s"
                if "TORCHELASTIC_RUN_ID" in os.environ
                else ""
            )
            print(f"\nfinishing this step, then saving{hurry}", file=sys.stderr, flush=True)

    def leave(self, command):
        """End the program as a signal would, once everything is saved: 130 for Ctrl-C, 143 for SIGTERM (another rank's, if not ours)."""
        if self.rank == 0:
            print(f"stopped and saved; to go on:\n{command}", file=sys.stderr, flush=True)
        sys.exit(128 + (self.asked or signal.SIGTERM))

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
