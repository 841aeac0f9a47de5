"""Ctrl-C while a script still imports: numpy, torch and pyarrow take seconds, and would each print a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    """End the process at once, with one line. Nothing was begun, so nothing is lost."""
    print("interrupted before it began", file=sys.stderr, flush=True)
    os._exit(128 + number)


def quiet_until_main() -> None:
    """Let Ctrl-C end the process with one line; to be called before the long imports, by scripts only."""
    signal.signal(signal.SIGINT, stop)


def main_begins() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which main() handles."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
