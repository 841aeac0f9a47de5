"""Speed of data preparation: each step on one core, and the whole by number of worker processes.

    python tests/bench/bench_prepare.py FILE --tokenizer MODEL [--caseops] [--jobs 1 2] [--mb 20] [--repeat 3]

Prints MB of original UTF-8 text per second; the best of the repetitions counts. "One core", with --caseops, is the
processor time of one process, so neighbours on the machine matter less; "plain" rows are the character loop and
SentencePiece alone, on a part of the text. "Whole" is wall-clock time of data/prepare.py: start of workers, reading,
hashing and writing included.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import bench
import caseops_reference
from caseops import CaseOps, decode, encode
from prepare import Options, find_source, load_tokenizer, parse_item, prepare, read_items
from word_bpe import WordBPE


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


def megabytes(texts: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def seconds(work: Callable[[str], object], inputs: Iterable[str], repeat: int) -> float:
    """Processor time of the work on all inputs, the best of the repetitions."""
    found = []
    for _ in range(repeat):
        start = time.process_time()
        for text in inputs:
            work(text)
        found.append(time.process_time() - start)
    return min(found)


def bench_one_core(texts: list[str], model: Path, repeat: int) -> None:
    """Every step of CaseOps by itself, each on all texts; the slow comparisons on the first part."""
    part = texts[: max(1, len(texts) // 10)]
    encoded, processor = [encode(text) for text in texts], load_tokenizer(str(model))
    words, transform = WordBPE(processor), CaseOps()
    rows: list[tuple[str, Callable[[str], object], list[str], list[str], int]] = [
        # name, work, its inputs, the original text they come from, repetitions: once where words must be new
        ("transform, plain", caseops_reference.encode, part, part, repeat),
        ("transform", encode, texts, texts, repeat),
        ("inverse transform", decode, encoded, texts, repeat),
        ("tokenisation, plain", processor.encode, encoded[: len(part)], part, repeat),
        ("tokenisation, words new", words.ids, encoded, texts, 1),
        ("tokenisation, words known", words.ids, encoded, texts, repeat),
        ("byte sidecar", lambda text: transform.piece_bytes(text, processor), texts, texts, 1),
    ]
    for name, work, inputs, source, times in rows:
        rate = megabytes(source) / seconds(work, inputs, times)
        print(f"one core   {name:32s} {rate:7.2f} MB/s", flush=True)


def prepare_once(texts: list[str], model: Path, jobs: int, caseops: bool) -> float:
    """Wall-clock seconds of a whole preparation."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "docs.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        val_docs = max(1, len(texts) // 100)
        options = Options((source,), Path(folder, "out"), model, val_docs=val_docs, drop_overlap=True, jobs=jobs)
        return bench.timed(prepare, options, CaseOps() if caseops else None)[1]


def main() -> None:
    """Measure and print one line per step, then one per number of jobs."""
    parser = bench.arguments(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--caseops", action="store_true")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mb", type=float, default=20.0, help="so much of the file (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    texts = read_texts(args.file, 1e6 * args.mb)
    print(f"{args.file.name}: {len(texts):,} documents, {1e6 * megabytes(texts):,.0f} bytes")
    if args.caseops:
        bench_one_core(texts, args.tokenizer, args.repeat)
    for jobs in args.jobs:
        best = min(prepare_once(texts, args.tokenizer, jobs, args.caseops) for _ in range(args.repeat))
        print(f"{jobs} job(s)   whole {megabytes(texts) / best:35.2f} MB/s", flush=True)


if __name__ == "__main__":
    main()
