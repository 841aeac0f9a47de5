"""A process that has imported the program and forks a copy of itself for each rank of each run that is asked for.

Importing torch takes longer than the tiny runs of the tests. A line on standard input is JSON: [arguments, the ranks'
environments, the file that takes their output and errors]; the answer is a line with the ranks' exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

import torch
import torch._dynamo  # noqa: F401  (or the first step of every rank imports it)

import train_gpt

TIME_LIMIT = 600  # seconds: ranks that wait for each other for ever


def run_rank(argv: list[str], environ: dict[str, str], output: str) -> None:
    """The forked child: main() with an environment and standard streams of its own, then exit."""
    code = 1
    try:
        signal.alarm(TIME_LIMIT)
        os.environ.clear()
        os.environ.update(environ)
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        torch.set_num_threads(1)
        code = train_gpt.main(argv)
    except BaseException:  # whatever it is, it must reach the test and end this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(argv: list[str], environments: list[dict[str, str]], output: str) -> list[int]:
    """Exit codes of the ranks in their order; when one fails, the others, which would wait for it, are killed."""
    children = {}
    for rank, environ in enumerate(environments):
        pid = os.fork()
        if pid == 0:
            run_rank(argv, environ, output)
        children[pid] = rank
    codes = [0] * len(children)
    while children:
        pid, status = os.wait()
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status != 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
    return codes


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), file=answers, flush=True)
