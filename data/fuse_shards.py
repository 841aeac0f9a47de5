"""Fuse the pairs of finished CaseOps shards, prepared or downloaded: fused data without the documents.

    python data/fuse_shards.py DIR --out DIR

Writes the same number of shards with fewer tokens, the byte sidecar with the same sum, the tokenizer, and the manifest
of DIR with "fused_pairs" (see pair_fusion.py). A pair that two shards share is fused in the second.
"""

from __future__ import annotations

from interrupts import main_begins, quiet_until_main

if __name__ == "__main__":
    quiet_until_main()

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import prepare
from overlap import allowed_overlap, measure_overlap
from pair_fusion import FUSED_PAIRS, FusedCaseOps, PairFusion

import train_gpt
from train_gpt import UserError, list_shards, read_shard

STALE = ("sha256", "canonical", "train_tokens")  # what download.py's manifest says of other files and counts


def fuse_split(folder: Path, out: Path, split: str, fusion: PairFusion) -> dict[str, list[dict]]:
    """Write a split's shards and, if it has them, its byte sidecars; return the manifest's rows by kind."""
    kinds = [kind for kind in (split, f"{split}_bytes") if any(folder.glob(f"fineweb_{kind}_0*.bin"))]
    names = {kind: list_shards(str(folder), kind) for kind in kinds}
    if len(set(map(len, names.values()))) > 1:
        raise UserError(f"{folder}: byte sidecars and {split} shards differ in number; prepare or download them again")
    made: dict[str, list[dict]] = {kind: [] for kind in kinds}
    held = [np.zeros(0, np.uint16)] * len(kinds)
    for paths in zip(*names.values(), strict=True):
        rows = [np.concatenate((row, read_shard(path))) for row, path in zip(held, paths, strict=True)]
        if len(set(map(len, rows))) > 1:
            raise UserError(f"{paths[1]}: not as long as {paths[0].name}; prepare or download both again")
        # A space at the end waits for the next shard, which may begin with its operator.
        waits = paths[0] != names[split][-1] and rows[0][-1:].tolist() == [fusion.first]
        stop = len(rows[0]) - waits
        held = [row[stop:] for row in rows]
        for kind, path, row in zip(kinds, paths, fusion.fuse(*(row[:stop] for row in rows)), strict=False):
            file = prepare.ShardFile(out / path.name)
            file.append(row)
            made[kind].append(file.finish())
    return made


def fuse_folder(folder: Path, out: Path) -> dict:
    """Write the fused data of a folder into another one; return its manifest.

    UserError for data that does not fit. Whatever stops it, the output directory is then as empty as before.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; use another --out")
    prepare.check_hashes(folder)
    model = train_gpt.find_tokenizer(train_gpt.Config(data_path=str(folder)))
    if model is None:
        raise UserError(f"{folder} has no *.model; copy the tokenizer that made the shards into it")
    manifest = prepare.read_object(folder / prepare.MANIFEST_NAME)
    _, counts, caseops = prepare.audit_bytes(folder, model, manifest)
    if not caseops:
        raise UserError(f"{folder}: {model.name} is for plain text, which has no pairs to fuse; give CaseOps data")
    out.mkdir(parents=True, exist_ok=True)
    with train_gpt.locked(out, "another --out"):
        try:
            return write_fused(folder, out, model, manifest, int(counts.sum(dtype=np.int64)))
        except BaseException:
            # it was empty: nothing here is older than this run, and the same command can begin again
            for path in set(out.iterdir()) - {out / "lock"}:
                path.unlink()
            raise


def write_fused(folder: Path, out: Path, model: Path, manifest: dict, sidecar_bytes: int) -> dict:
    """Write fused shards, tokenizer and manifest; return the manifest, made of the folder's own."""
    processor = prepare.load_tokenizer(str(model))
    fusion, made = PairFusion.of(processor), {}
    for split in ("val", "train"):
        made |= fuse_split(folder, out, split, fusion)
    shutil.copyfile(model, out / model.name)
    # The audit holds the new sidecar against this sum.
    manifest = (
        {"byte_audit": {"sidecar_bytes": sidecar_bytes}}
        | {key: value for key, value in manifest.items() if key not in STALE}
        | {
            "tool": "data/fuse_shards.py",
            "tokenizer": prepare.file_row(out / model.name) | {"vocab_size": processor.get_piece_size()},
            FUSED_PAIRS: fusion.rows(processor),
            "shards": made["val"] + made.get("train", []),
            "sidecars": made.get("val_bytes", []),
        }
    )
    if isinstance(manifest.get("settings"), dict):
        manifest["settings"] |= {"transform": FusedCaseOps.name}
    for split, counts in manifest.get("splits", {}).items():
        counts["tokens"] = sum(row["tokens"] for row in made[split])
    if "overlap" in manifest:
        manifest["overlap"] = measure_overlap(out) | {"limit": allowed_overlap(manifest)}
    prepare.write_json(out / prepare.MANIFEST_NAME, manifest)
    return manifest


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status: 0, 2 for a mistake by the user, 130 after Ctrl-C."""
    prepare.print_anywhere()
    parser = argparse.ArgumentParser("fuse_shards.py", description=fuse_folder.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="finished CaseOps data: shards, tokenizer, sidecar")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty or a new directory")
    arguments = parser.parse_args(argv)
    try:
        manifest = fuse_folder(arguments.folder, arguments.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run again", file=sys.stderr)
        return 130
    tokens = sum(row["tokens"] for row in manifest["shards"])
    print(f"{len(manifest['shards'])} shards, {tokens:,} tokens; check them with: prepare.py audit {arguments.out}")
    return 0


if __name__ == "__main__":
    main_begins()
    sys.exit(main(sys.argv[1:]))
