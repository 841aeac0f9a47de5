"""The frontier stack: chunks by document length, the evaluation's budget, the length schedule, the recurrence mix.

Published numbers are those of golden/frontier.json; adapters by site are compared in test_ttt.py.
"""

from __future__ import annotations

import golden_rules as rules
import numpy as np
import ttt_rules

import train_gpt
from train_gpt import Config, UpTo

# Chunks by document length


def chunk_table(config: dict) -> tuple[UpTo, ...]:
    """TTT_CHUNK_SIZE of an entry: its table, or else one limit, or else one chunk for all."""
    short = config["steps"] or f"{config['short_doc_len']}:{config['short_chunk']}"
    text = f"{short},{config['chunk']}" if config["enabled"] else str(config["chunk"])
    return tuple(map(UpTo.parse, text.split(",")))


def stream_of(lengths: list[int]) -> train_gpt.ValData:
    """Documents of these lengths, each with the next one's BOS."""
    raw = [length - 1 for length in lengths]
    raw[-1] += 1
    return ttt_rules.golden_stream(raw, ttt_rules.VOCAB)


@rules.parametrize("short_doc_chunks", "frontier")
def test_chunks_by_document_length(golden: rules.Entry) -> None:
    c, want = golden.config, golden.expected
    table = chunk_table(c)
    found = [[length, train_gpt.up_to(table, length)] for length, _ in want["chunk_by_longest_document"]]
    assert found == want["chunk_by_longest_document"]
    lengths = [3 + (37 * i * i + 11 * i) % 2600 for i in range(60)]
    val, knobs = stream_of(lengths), {"ttt_eval_seq_len": c["window"], "ttt_batch_size": c["batch_docs"]}
    cfg, docs = Config(ttt_chunk_size=table, **knobs), train_gpt.val_documents(val.tokens)
    assert [length for _, length in docs] == lengths
    batches = train_gpt.document_batches(docs, c["batch_docs"])
    assert batches == [batch["docs"] for batch in want["batches_in_processing_order"]]
    for batch, expected in zip(batches, want["batches_in_processing_order"], strict=True):
        steps = list(train_gpt.batch_steps(cfg, val, docs, [batch]))
        assert (len(steps), {step.cells.chunk for step in steps}) == (expected["steps"], {expected["chunk"]})
        learnt = [step.cells.documents[step.lesson.rows] for step in steps if step.lesson is not None]
        updates = np.bincount(np.concatenate(learnt), minlength=len(docs))
        assert updates[batch].tolist() == expected["updates_per_doc"]
    windows = want["windows_predictions_chunk_[win_start,win_len,offset,len]"]
    for predictions, chunk, expected in windows:
        last = -(-predictions // chunk) - 1
        some = sorted({0, min(1, last), last})
        assert [list(train_gpt.chunk_window(i, predictions, chunk, c["window"])) for i in some] == expected


def test_a_table_of_chunks_changes_only_documents_that_have_another_chunk() -> None:
    """With a batch per document, as the published rule is by the longest of a batch."""
    cfg, val = ttt_rules.small_config(TTT_BATCH_SIZE=1, TTT_CHUNK_SIZE="8:2,4"), stream_of([5, 30, 8, 9, 3, 17])
    model = ttt_rules.strong_model(cfg)
    found = ttt_rules.scores_of(cfg, model, val)
    for size in (2, 4):
        one = train_gpt.dataclasses.replace(cfg, ttt_chunk_size=rules.always(size))
        alone = ttt_rules.scores_of(one, model, val)
        for start, length in train_gpt.val_documents(val.tokens):
            same = np.array_equal(alone[start + 1 : start + length], found[start + 1 : start + length])
            assert same == (size == (2 if length <= 8 else 4)) or length - 1 <= 2
