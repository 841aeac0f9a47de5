"""Programs run as their users run them: from an empty directory, as __main__, and judged by the files they leave.

Importing torch takes longer than a toy evaluation, so most runs are forked from a server, this file as a script,
which has imported torch and nothing of this project: a forked run executes the program's source as __main__, with an
environment, a directory and standard streams of its own. `BlackBox.launch` starts a Python of its own instead.
Threads may order runs at the same time; as many as there are processors are under way.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import itertools
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if __name__ == "__main__":
    # what the toy size imports late, and every forked run would import again
    import brotli  # noqa: F401
    import numpy.ma
    import sentencepiece  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TIME_LIMIT = 3600  # seconds for one run: a full-size artifact on a few cores takes minutes
# What a run inherits: the machine, and nothing that names a module, a proxy, a home or a knob.
MACHINE = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "VIRTUAL_ENV",
    "SYSTEMROOT",
)


class Outcome(NamedTuple):
    """What a run left: exit status, standard output and errors, its directory, its run folder."""

    code: int
    output: str
    room: Path
    folder: Path

    def last_line(self) -> str:
        """Return the last line of the output, where an error says what it is."""
        lines = self.output.strip().splitlines()
        return lines[-1][:200] if lines else "no output"

    def rows(self, prefix: str = "") -> np.ndarray:
        """Return all rows of SCORES, (N, 4) float64: position, nats, step, rank. Empty if there are none.

        prefix: the value of SCORES without its folder, "" for any.
        """
        parts = []
        for path in sorted(self.room.glob(f"{glob.escape(prefix) or '*'}.[0-9]*.npy")):
            with contextlib.suppress(ValueError, OSError, EOFError):
                rows = np.load(path, allow_pickle=False)
                if rows.ndim == 2 and rows.shape[1] == 3 and rows.dtype == np.float64:
                    rank = path.name.split(".")[-2]
                    parts.append(np.column_stack([rows, np.full(len(rows), int(rank) if rank.isdecimal() else -1)]))
        return np.concatenate(parts) if parts else np.empty((0, 4))


class Server:
    """The process that forks runs. room: a new folder. Use as a context; it needs seconds until the first run."""

    def __init__(self, room: Path) -> None:
        self.room, self.stack = room, contextlib.ExitStack()
        self.lock, self.free = threading.Lock(), threading.BoundedSemaphore(PROCESSORS)
        self.numbers, self.waiting = itertools.count(), {}
        self.launched: list[subprocess.Popen] = []  # runs with a Python of their own

    def __enter__(self) -> Server:
        self.process = self.start()
        return self

    def __exit__(self, *_: object) -> None:
        # it may still import torch, and after an error or Ctrl-C runs may be under way
        for process in (self.process, *self.launched):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self.stack.close()

    def start(self) -> subprocess.Popen:
        """Start the process, with pipes."""
        for name in ("home", "tmp"):
            (self.room / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # a group of its own: Ctrl-C in a terminal is for the judge alone
        found = subprocess.Popen(command, env=machine(self.room), cwd=self.room, start_new_session=True, **pipes)
        self.stack.callback(found.wait)
        self.stack.callback(found.stdin.close)
        threading.Thread(target=self.hand_out, args=(found,), daemon=True).start()
        return found

    def hand_out(self, process: subprocess.Popen) -> None:
        """Give each answer to whom it is for, and None to all who wait when the process ends."""
        for line in process.stdout:
            number, codes = json.loads(line)
            self.waiting[number].put(codes)
        for place in list(self.waiting.values()):
            place.put(None)

    def run(self, order: list[Any]) -> list[int | None]:
        """Return the exit codes of [script, directory, the ranks' environments, output]."""
        with self.free:
            with self.lock:
                number, place = next(self.numbers), queue.SimpleQueue()
                self.waiting[number] = place
                with contextlib.suppress(BrokenPipeError):  # then no answer comes, and that is said below
                    print(json.dumps([number, *order]), file=self.process.stdin, flush=True)
            codes = None
            while codes is None:
                with contextlib.suppress(queue.Empty):
                    codes = place.get(timeout=1)
                if codes is None and self.process.poll() is not None:
                    raise OSError("the process that forks runs has died; is this Python without torch?")
            return codes


class BlackBox:
    """Runs of one submission. files: what lies in each run's directory, name -> bytes; env: knobs of every run.

    room: a folder for the runs.
    """

    def __init__(
        self, server: Server, room: Path, script: str, files: Mapping[str, bytes], env: Mapping[str, str]
    ) -> None:
        self.server, self.room, self.script, self.files, self.env = server, room, script, dict(files), dict(env)
        room.mkdir(parents=True, exist_ok=True)

    def prepare(self, knobs: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
        """Make an empty directory with the submission's files; return it with the environment of a run there."""
        place = Path(tempfile.mkdtemp(prefix="run_", dir=self.room))
        for name in ("home", "tmp"):
            (place / name).mkdir(parents=True)
        for name, data in self.files.items():
            (place / name).write_bytes(data)
        own = {"PRESET": str(place), "ARTIFACT_DIR": str(place / "out"), "SCORES": str(place / "scores")}
        return place, machine(place) | own | self.env | knobs

    def launch(self, *args: str, **knobs: str) -> Outcome:
        """Run the program by a Python of its own."""
        place, env = self.prepare(knobs)
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, self.script, *args]
        with self.server.free, subprocess.Popen(command, env=env, cwd=place, start_new_session=True, **streams) as run:
            self.server.launched.append(run)
            try:
                output, _ = run.communicate(timeout=TIME_LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                return Outcome(-1, f"no end after {TIME_LIMIT} s", place, place / "out")
        return Outcome(run.returncode, output.decode("utf-8", "replace"), place, Path(env["ARTIFACT_DIR"]))

    def fork(self, ranks: int = 1, **knobs: str) -> Outcome:
        """Run the program on some ranks, each forked from the server."""
        place, env = self.prepare(knobs)
        places = [{}]
        if ranks > 1:
            shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        output = place / "output"
        order = [str(place / self.script), str(place), [env | own for own in places], str(output)]
        codes = self.server.run(order)
        text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
        return Outcome(next((code for code in codes if code), 0), text, place, Path(env["ARTIFACT_DIR"]))


def machine(place: Path) -> dict[str, str]:
    """Return the environment of a run in a directory: the machine's, a home and a TMPDIR of its own, one thread."""
    env = {name: os.environ[name] for name in MACHINE if name in os.environ}
    env |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "XDG_CACHE_HOME": str(place / "home" / "cache")}
    # glibc would hand each large buffer back to the system and fetch it again: half of a toy run's time
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


# The server


def run_rank(code: types.CodeType, script: str, place: str, output: str, environ: dict[str, str]) -> None:
    """The forked child: the program as __main__, then exit."""
    status: Any = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.alarm(TIME_LIMIT)
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(place)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        torch.set_num_threads(1)
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__file__ = script
        sys.argv, sys.orig_argv = [script], [sys.executable, script]
        sys.path.insert(0, str(Path(script).parent))
        exec(code, module.__dict__)
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:  # whatever it is, it must reach the judge and end this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


class Ranks:
    """Forked children, one for each rank, that call run(its environment), which must not return."""

    def __init__(self, run: Callable[[dict[str, str]], None], environs: list[dict[str, str]]) -> None:
        self.children = {}
        self.codes: list[int | None] = [0] * len(environs)  # None: killed, because another rank failed
        for rank, environ in enumerate(environs):
            pid = os.fork()
            if pid == 0:
                run(environ)
            self.children[pid] = rank

    def ended(self, pid: int, status: int) -> bool:
        """Note how a child ended; return whether it was the last. When one fails, the others, which would wait for it,
        are killed."""
        rank = self.children.pop(pid)
        if self.codes[rank] is not None:
            self.codes[rank] = os.waitstatus_to_exitcode(status)
        for other, waiting in self.children.items() if status != 0 else ():
            self.codes[waiting] = None
            os.kill(other, signal.SIGKILL)
        return not self.children


def lines_and_deaths() -> Iterator[str | None]:
    """Yield each line of standard input, and None whenever a child may have ended."""
    died, deaths = os.pipe()
    os.set_blocking(deaths, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(deaths)
    begun = b""
    while True:
        ready, _, _ = select.select([0, died], [], [])
        if died in ready:
            os.read(died, 512)
            yield None
        if 0 in ready:
            data = os.read(0, 2**16)
            if not data:
                return
            *lines, begun = (begun + data).split(b"\n")
            yield from map(bytes.decode, lines)


def serve() -> None:
    """Answer each line of standard input, [number, script, directory, the ranks' environments, output], with
    [number, exit codes], when that run has ended: runs go on side by side."""
    answers, running = os.dup(1), []
    known: dict[bytes, types.CodeType] = {}
    for line in lines_and_deaths():
        while line is None and running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            number, ranks = next(run for run in running if pid in run[1].children)
            if ranks.ended(pid, status):
                running.remove((number, ranks))
                os.write(answers, f"{json.dumps([number, ranks.codes])}\n".encode())
        if line is None:
            continue
        number, script, place, environs, output = json.loads(line)
        source = Path(script).read_bytes()
        try:
            if source not in known:
                # Triton reads the functions of a program from its file, and those of runs are deleted
                kept = Path.cwd() / f"{len(known)}.py"
                kept.write_bytes(source)
                known[source] = compile(source, kept, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            Path(output).write_text(f"{script}: {error}\n", encoding="utf-8")
            os.write(answers, f"{json.dumps([number, [1]])}\n".encode())
            continue
        running.append((number, Ranks(functools.partial(run_rank, known[source], script, place, output), environs)))


if __name__ == "__main__":
    serve()
