"""Speed of data/prepare.py by number of worker processes.

    python tests/bench/bench_prepare.py FILE --tokenizer MODEL [--jobs 1 2 4] [--repeat 3]

Prints MB of UTF-8 text per second, start of the workers included; the best of the repetitions counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

from prepare import Options, prepare


def measure(source: Path, model: Path, jobs: int) -> tuple[float, int]:
    """(seconds, UTF-8 bytes) of one preparation."""
    with tempfile.TemporaryDirectory() as folder:
        options = Options((source,), Path(folder), model, val_docs=1, drop_overlap=True, jobs=jobs)
        start = time.perf_counter()
        manifest = prepare(options)
        seconds = time.perf_counter() - start
    return seconds, sum(counts["raw_bytes"] for counts in manifest["splits"].values())


def main() -> None:
    """Measure and print one line per number of jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    for jobs in args.jobs:
        seconds, size = min(measure(args.file, args.tokenizer, jobs) for _ in range(args.repeat))
        print(f"{args.file.name}: {jobs} jobs, {size / 1e6:.1f} MB in {seconds:.2f} s, {size / 1e6 / seconds:.2f} MB/s")


if __name__ == "__main__":
    main()
