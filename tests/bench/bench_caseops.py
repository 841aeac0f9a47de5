"""Speed of CaseOps preparation: transform, tokenisation and the whole, in one run.

    python tests/bench/bench_caseops.py FILE --tokenizer MODEL [--jobs 1 2] [--mb 20] [--repeat 3]

Prints MB of original UTF-8 text per second; the best of the repetitions counts. "One core" is the processor time of one
process, so neighbours on the machine matter less; "whole" is wall-clock time of data/prepare.py, start of the workers,
reading, hashing and writing included. "plain" rows: the character loop and SentencePiece alone, on a part of the text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "data"), str(Path(__file__).resolve().parents[1])]

import caseops_reference  # noqa: E402  (tests/ is no package)
from caseops import CaseOps, decode, encode  # noqa: E402  (data/ is no package)
from prepare import Options, find_source, load_tokenizer, parse_item, prepare, read_items  # noqa: E402
from word_bpe import WordBPE  # noqa: E402


def read_texts(path: Path, limit: float) -> list[str]:
    """Documents from the front of a file, `limit` bytes of them."""
    texts, size = [], 0
    for item in read_items([find_source(path)], "text"):
        text, raw = parse_item(item, "text")
        texts.append(text)
        size += len(raw)
        if size >= limit:
            break
    return texts


def rate(work: Callable[[str], object], inputs: Iterable[str], size: int, repeat: int) -> float:
    """MB of original text per second of processor time; `inputs` come from `size` bytes of it."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        for text in inputs:
            work(text)
        best = min(best, time.process_time() - start)
    return size / 1e6 / best


def bench_one_core(texts: list[str], model: Path, repeat: int) -> None:
    """Every step by itself, each on all texts; the slow comparisons on the first part."""
    part = list(itertools.islice(texts, max(1, len(texts) // 10)))
    size, part_size = (sum(len(text.encode()) for text in some) for some in (texts, part))
    encoded, processor = [encode(text) for text in texts], load_tokenizer(str(model))
    few = encoded[: len(part)]
    words, transform = WordBPE(processor), CaseOps()
    rows = [
        ("transform, plain", lambda: rate(caseops_reference.encode, part, part_size, repeat)),
        ("transform", lambda: rate(encode, texts, size, repeat)),
        ("inverse transform", lambda: rate(decode, encoded, size, repeat)),
        ("tokenisation, plain", lambda: rate(processor.encode, few, part_size, repeat)),
        ("tokenisation, words new", lambda: rate(words.ids, encoded, size, 1)),
        ("tokenisation, words known", lambda: rate(words.ids, encoded, size, repeat)),
        (
            "transform + tokenisation, plain",
            lambda: rate(lambda text: processor.encode(caseops_reference.encode(text)), part, part_size, repeat),
        ),
        (
            "transform + tokenisation",
            lambda: rate((lambda fresh: lambda text: fresh.ids(encode(text)))(WordBPE(processor)), texts, size, 1),
        ),
        ("byte sidecar", lambda: rate(lambda text: transform.piece_bytes(text, processor), texts, size, 1)),
    ]
    for name, measure in rows:
        print(f"one core   {name:32s} {measure():7.2f} MB/s", flush=True)


def bench_whole(texts: list[str], model: Path, jobs: int) -> float:
    """MB/s of a whole preparation by wall clock."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "docs.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        val_docs = max(1, len(texts) // 100)
        options = Options((source,), Path(folder, "out"), model, val_docs=val_docs, drop_overlap=True, jobs=jobs)
        start = time.perf_counter()
        prepare(options, CaseOps())
        return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - start)


def main() -> None:
    """Measure and print one line per step, then one per number of jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mb", type=float, default=20.0, help="so much of the file (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    texts = read_texts(args.file, 1e6 * args.mb)
    print(f"{args.file.name}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes")
    bench_one_core(texts, args.tokenizer, args.repeat)
    for jobs in args.jobs:
        print(f"{jobs} job(s)   whole {bench_whole(texts, args.tokenizer, jobs):35.2f} MB/s", flush=True)


if __name__ == "__main__":
    main()
