"""Worker processes that leave Ctrl-C to the process that gives them work, and end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def interrupt_held() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: it would leave a worker half started, which nobody then stops."""
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if noted and handler is not signal.SIG_IGN:
        raise KeyboardInterrupt


def leave_with_parent() -> None:
    """End this worker when the process that gave it work is gone; a killed one cannot tell it to stop."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def started_workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes that leave Ctrl-C to this one, and shut it down in order."""
    # A fork of this process would copy its threads' locks. The server has none; it imports torch once for all workers.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])
    # The server and its workers inherit a blocked SIGINT, and so hear none, not even while they import. The tracker of
    # resources comes first, because its start would unblock the signal.
    multiprocessing.resource_tracker.ensure_running()
    with ProcessPoolExecutor(jobs, mp_context=server, initializer=leave_with_parent) as pool:
        try:
            with interrupt_held():
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                try:
                    pool.submit(os.getpid)  # the first task starts the server and a worker
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
