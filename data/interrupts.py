"""Ctrl-C while a script still imports: numpy, torch and pyarrow take seconds, and would each print a traceback."""

from __future__ import annotations

import os
import signal


def quiet_until_main(line: str = "interrupted before it began") -> None:
    """Let Ctrl-C end the process at once, with one line; to be called before the long imports, by scripts only.

    A shell starts the background jobs of a script with Ctrl-C ignored; both functions leave it so.
    """

    def stop(number: int, frame: object) -> None:
        # nothing was begun, so nothing is lost
        os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)


def main_begins() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which main() handles."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
