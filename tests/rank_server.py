"""A process that has imported the program and forks a copy of itself for each rank of each run that is asked for.

Importing torch takes longer than the tiny runs of the tests. A line on standard input is JSON: [arguments, the ranks'
environments, the file that takes their output and errors]; the answer is a line with the ranks' exit codes.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback

import torch
import torch._dynamo  # noqa: F401  (or the first step of every rank imports it)

import train_gpt
from records.black_box import Ranks

TIME_LIMIT = 600  # seconds: ranks that wait for each other for ever


def run_rank(argv: list[str], output: str, environ: dict[str, str]) -> None:
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


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        argv, environments, output = json.loads(line)
        ranks = Ranks(functools.partial(run_rank, argv, output), environments)
        while not ranks.ended(*os.wait()):
            pass
        print(json.dumps(ranks.codes), file=answers, flush=True)
