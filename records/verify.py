#!/usr/bin/env python3
"""The judge: is a score legal, and do its size, its byte count and its claims hold?

    python records/verify.py records/track_10min_16mb/<record>              a preset, trained at toy size first
    python records/verify.py logs/<RUN_ID> [--data DATA_PATH]               a finished run
    python records/verify.py logs/<RUN_ID>/artifact.pyz --data DATA_PATH    a packed file, judged by its own program
    python records/verify.py FOLDER                                         another team's record, read and never run
    python records/verify.py --all                                          every record; writes each verdict.json

The program is a black box. It runs as its users run it (records/black_box.py): as __main__, alone in an empty
directory, with a home of its own and without PYTHONPATH or proxies, on data folders that the judge writes. Each run
leaves every score by its position (SCORES), and the judge reads nothing else. The questions (C1 to C4 are the
contest's conditions, issue 1017):
  alone     Does the program run without anything that is not submitted, and give the same scores however it is started,
            with and without the training shards? Do other validation shards leave the trained weights as they are?
  sums      Positions against the judge's own reading of the shards: each target once (C4), none missing. val_loss,
            val_bpb, tokens and bytes again from SCORES and shards, against result.json and the log, to the last digit.
  C1, C3    Streams in which everything after a place differs: scores before it must be equal to the last bit, so no
            score knows what comes later, and none comes after an update on its own chunk. "Before" is an earlier step,
            or further left in the same row; steps must follow the text. A stream of 32 to 168 targets is cut at
            every place, in order: the first that fails is the first leak. Longer streams, and one under the record's
            own numbers, are cut in some steps. Other byte counts must change no score.
  C2        Hundreds of documents with one beginning and each id of the vocabulary at one place, for every place of two
            chunks (of a long one its ends and middle; with more than 2,048 ids, for one place after the first update,
            and for the first where documents have rows of their own): the probabilities must sum to 1 there, and what
            comes before must be scored alike in all of them.
  ranks     The same scores from two ranks and from eight, from other batch sizes where a preset does not depend on
            them, and the same sums from a run that nobody asks for SCORES.
  bytes: the denominator again from the ids, through tokenizer and CaseOps decoder. split: documents that training and
  validation share. budget, disk, claims: papers, knobs, logs and files against one another (records/claims.py).

What a black box cannot see: a program that behaves only on larger data, models or GPUs than these, under other knobs,
or on this judge's machine, or that remembers earlier runs outside its directory; a leak into a place of the longer
streams that was not cut (--probes 0 cuts in every step), such as a fault in every fortieth chunk of weights that adapt
over the stream; a leak by a yes-or-no of the next token is seen at each place with even odds; tricks with the lengths
of documents, which the judge never changes between runs; the best of several whole passes that a program makes inside
and tells as one (C1 often sees it, since what comes later then chooses the pass); more than its files say about a
full-size run, whose SCORES are added again, not recomputed. The judge trusts the checkout that it lies in: judge a
stranger's program from a clean one, with --source or as an artifact.

Verdict per check: pass, FAIL, n/a (nothing to ask), unknown (asked, not answered). The last line of the output is
`VERDICT {json}`. Exit status: 0 if nothing failed or stayed unknown, 1 otherwise, 2 for a wrong input.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

INTERRUPTED = "error: interrupted; no verdict was written"

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from interrupts import main_begins, quiet_until_main  # noqa: E402

if __name__ == "__main__":
    quiet_until_main(INTERRUPTED)

from records.black_box import Server  # noqa: E402


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` up."""

    def parse(word: str) -> int:
        value = int(word) if word.lstrip("-").isdecimal() else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{word} is not a whole number from {least} up")
        return value

    return parse


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status, with --all the worst one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", type=Path, nargs="?", metavar="TARGET", help="record, run, packed file, or another team's folder")
    add("--all", action="store_true", help="judge every record of every track, and write verdict.json")
    add("--data", type=Path, metavar="DATA_PATH", help="shards (default: DATA_PATH, else the log's)")
    add("--source", type=Path, metavar="FILE", help="program (default: the train_gpt.py here; packed files have one)")
    add("--documents", type=at_least(2), metavar="N", help="documents for C1 and C3 (default 5; at full size 3)")
    add("--probes", type=at_least(0), metavar="N", help="places for C1, 0: all (default 3; short streams: all)")
    add("--out", type=Path, metavar="FILE", help="also write the verdict there (records: verdict.json)")
    args = parser.parse_args(argv)
    if args.all == (args.target is not None):
        parser.error("give one record folder, run folder or packed file, or --all")
    if args.all and args.out:
        parser.error("--all writes each verdict.json; leave out --out")
    if args.out and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        parser.error(f"--out {args.out}: give a file in a folder that exists and can be written to")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as room, Server(Path(room)) as server:
            # the server imports torch at the same time
            from records import judge  # noqa: PLC0415

            if not args.all:
                return judge.judge_target(args, server)
            states = []
            for path in sorted((ROOT / "records").glob("track_*/*/record.env")):
                args.target, args.out = path.parent, path.with_name("verdict.json")
                states.append(judge.judge_target(args, server))
            return max(states)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


if __name__ == "__main__":
    main_begins()
    sys.exit(main(sys.argv[1:]))
