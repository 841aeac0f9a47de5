"""Seconds for the canonical mask of a tokenizer, and for the hints of a stream as long as the contest's.

    python tests/bench/bench_priors.py DATA_PATH [--targets 47900000] [--vocab-size 8192]

The training text of DATA_PATH, repeated from its beginning if it is short, stands for the validation stream.
"""

from __future__ import annotations

import resource

import bench
import numpy as np
import sentencepiece as spm
import torch

import train_gpt


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("data")
    parser.add_argument("--targets", type=int, default=47_900_000)
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args()
    cfg = train_gpt.Config(data_path=args.data, vocab_size=args.vocab_size)
    bench.head("what", "seconds", "of a processor", "found")
    model = train_gpt.find_tokenizer(cfg)
    if model is not None:
        processor = spm.SentencePieceProcessor(model_file=str(model))
        before = bench.processor_seconds()
        mask, seconds = bench.timed(train_gpt.canonical_mask, processor)
        spent = bench.processor_seconds() - before
        bench.row("canonical mask", seconds, spent, f"{np.unpackbits(mask).sum():,} pairs")
    tokens, device = train_gpt.read_shard(train_gpt.list_shards(args.data, "train")[0]), "cuda" if bench.CUDA else "cpu"
    stream = torch.from_numpy(np.resize(tokens, args.targets + 1).astype(np.int64)).to(device)
    for name, (find, _) in train_gpt.HINTS.items():

        def found(find: object = find) -> int:
            return int((find(cfg, stream, stream == train_gpt.BOS_ID) > 0).sum())

        before = bench.processor_seconds()
        count, seconds = bench.timed(found)
        spent = bench.processor_seconds() - before
        bench.row(f"{name}, {args.targets:,} targets", seconds, spent, f"{count:,} hints")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bench.say(peak_gib=torch.cuda.max_memory_allocated() / 2**30 if bench.CUDA else peak)


if __name__ == "__main__":
    main()
