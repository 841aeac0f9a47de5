"""Bytes that each lever of the frontier adds to the packed program.

    python tests/bench/bench_code.py

Takes out of the program what has a lever's names (functions, classes, constants, knobs, and statements, branches and
entries of tables that mention them), packs what is left (minified, brotli) and compares. The rest would not run, and
what a lever has in common with others stays, so the numbers are near, not exact. Prints Markdown, then one JSON line.
"""

from __future__ import annotations

import ast
import copy

import bench

import pack_artifact

RANS_ENCODER = "rans_frame rans_rows rans_prior MAGNITUDE_VARIANCE DRIFT_BITS rans_encode"
LEVERS = {
    "CANONICAL_MASK": "canonical_mask canonical_check checked_mask canonical MASKED_WHEN masked_when banned",
    "HINTS=copy": "find_copies copied fit_copies copy_weights",
    "HINTS=tilt": "find_tilts tilted tilt_order tilt_threshold tilt_boost",
    "TTT_CHUNK_SIZE tables, spans": "UpTo up_to",
    "EVAL_BUDGET_SECONDS": "eval_budget_seconds unadapted rest_steps late until_late is_late deadline EVAL_RESERVE",
    "TRAIN_SEQ_SCHEDULE": "train_seq_schedule seq_change_warmup_steps expect_change span",
    "LOOP_MIX": "loop_mix beta alphas",
    "FISHER_SCALES": "FisherTap fisher_scales fisher_gains pivots SENSITIVITY FISHER_TOKENS SENSITIVITY_FLOOR gains",
    "ARTIFACT_BYTES": "artifact_bytes filled",
    "GPTAQ_BATCHES": "Gptaq gptaq gptaq_batches DriftTap",
    "TUNE_STEPS": "tuned rescaled tune_steps tune_lr",
    "trellis": "viterbi encode_tcq trellis TCQ_CODES TCQ_ERROR tcq_states tcq_chunk_rows subsets follow",
    "COMPRESSOR=rans": f"{RANS_ENCODER} rans_model rans_matrix rans_tables rans_decode rans_unframe RANS_BITS "
    "RANS_HEAD RANS_ONE ROW_CLASSES",
    "... of it, the encoder": RANS_ENCODER,
    "carried keys and values": "KVCache CarryLora carried_steps kv_cache",
}


class Without(ast.NodeTransformer):
    """Takes out what has one of some names."""

    def __init__(self, words: str) -> None:
        self.names = set(words.split())

    def mentions(self, node: ast.AST | None) -> bool:
        """Whether a node has one of the names anywhere in it."""
        found = (getattr(n, key, None) for n in ast.walk(node or ast.Pass()) for key in ("id", "attr", "arg", "name"))
        return not self.names.isdisjoint(filter(None, found))

    def visit(self, node: ast.AST) -> ast.AST | None:
        """The node without them, or None if all of it goes."""
        compound = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.With, ast.Try, ast.If))
        if isinstance(node, ast.stmt):
            # a table loses entries, everything else goes
            is_table = isinstance(getattr(node, "value", None), (ast.Dict, ast.Tuple, ast.List))
            mentioned = not compound and not is_table and self.mentions(node)
            if getattr(node, "name", None) in self.names or mentioned:
                return None
            if isinstance(node, ast.If) and self.mentions(node.test):
                return None
        if isinstance(node, ast.Dict):
            kept = [pair for pair in zip(node.keys, node.values, strict=True) if not any(map(self.mentions, pair))]
            node.keys, node.values = [key for key, _ in kept], [value for _, value in kept]
        if isinstance(node, (ast.Tuple, ast.List)):
            node.elts = [item for item in node.elts if not self.mentions(item)]
        node = self.generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]
        return node


def packed(tree: ast.Module) -> int:
    """Bytes of a program as packed."""
    return len(pack_artifact.compress(pack_artifact.minify(ast.unparse(ast.fix_missing_locations(tree))).encode()))


def main() -> None:
    """Each lever against the whole."""
    bench.arguments(__doc__).parse_args()
    tree = ast.parse((bench.ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    whole = packed(copy.deepcopy(tree))
    found = {name: whole - packed(Without(words).visit(copy.deepcopy(tree))) for name, words in LEVERS.items()}
    bench.table(f"the packed program has {whole:,} bytes", ("lever", "of them"), found.items())
    bench.say(program=whole, levers=found)


if __name__ == "__main__":
    main()
