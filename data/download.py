"""Download the contest's published shard sets from the Hugging Face hub, and check them.

    python data/download.py caseops --out DIR [--train-shards N]
    python data/download.py caseops --out DIR --verify-only

    sp1024    1,024 BPE pieces; the contest's own set       62,021,632 validation targets
    sp8192    8,192 BPE pieces                              40,540,160 validation targets
    caseops   8,192 BPE pieces after the CaseOps transform  47,851,520 validation targets, 151,074,499 bytes

All files end up flat in DIR: shards, the byte sidecar if the set has one, the tokenizer, and a manifest.json. The
validation split and the tokenizer come first and must give the canonical counts above; only then are the training
shards downloaded. Every file is compared with the hub's size and SHA-256 before it gets its name in DIR, every shard
with its header and vocabulary. --verify-only compares all of it again offline, the hashes with those in manifest.json.
After a broken connection the download continues where it stopped. After an interrupted run it resumes with the next
incomplete file (a shard has 200 MB), because the hub client does not keep partial files between runs.

Not tested against the real hub: this was written and tested where the hub cannot be reached, against a local stand-in
for its file listing and download addresses. Repository names and layouts are those of the contest's download script and
of published records. Files are found by the end of their path, so a moved folder does no harm.
"""

from __future__ import annotations

from interrupts import main_begins, quiet_until_main

if __name__ == "__main__":
    quiet_until_main()

import argparse
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from prepare import MANIFEST_NAME, check_hashes, file_row, print_anywhere, sha256_file, write_json

from train_gpt import BOS_ID, UserError, check_ids, list_shards, read_shard

HUB_ERRORS = (OSError, HTTPError, HfHubHTTPError, HFValidationError, EntryNotFoundError)
STAGING_NAME = ".hub"  # holds files until they are complete


@dataclass(frozen=True)
class ShardSet:
    """Where a published set is and what it must contain."""

    repo: str  # a dataset repository
    folder: str  # regular expression for the shards' folder
    tokenizer: str  # regular expression for the model's name
    vocab_size: int
    targets: int  # canonical number of scored validation tokens
    target_bytes: int | None = None  # canonical sum of the byte sidecar over these targets; None: no sidecar
    seq_len: int = 2048  # the number of targets is cut to a multiple of this

    def local_name(self, path: str) -> str | None:
        """Return the name in DIR for a path in the repository, or None if the file is not part of the set."""
        kinds = "train|val|val_bytes" if self.target_bytes is not None else "train|val"
        shard = re.search(rf"(?:^|/){self.folder}/(fineweb_(?:{kinds})_\d{{6}}\.bin)$", path)
        model = re.search(rf"(?:^|/)({self.tokenizer}\.model)$", path)
        found = shard or model
        return found[1] if found else None


SHARD_SETS: dict[str, ShardSet] = {
    "sp1024": ShardSet("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe", 1024, 62_021_632),
    "sp8192": ShardSet("kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe", 8192, 40_540_160),
    "caseops": ShardSet(
        "romeerp/parameter-golf-caseops-v1",
        "[^/]*caseops[^/]*",
        "fineweb_8192_bpe[^/]*caseops[^/]*",
        8192,
        targets=47_851_520,
        target_bytes=151_074_499,
    ),
}


class Remote(NamedTuple):
    """One file on the hub."""

    path: str
    name: str  # in DIR
    size: int
    sha256: str | None  # the hub knows it for large files


# +---------------------------------------------------------------------------+
# | CHECKS                                                                    |
# +---------------------------------------------------------------------------+


def open_shards(out: Path, kind: str, vocab_size: int | None) -> list[np.ndarray]:
    """Open the shards of a kind (train, val, val_bytes) and check headers, sizes, numbers and, given a vocabulary, ids.

    Training shards may be absent, because --train-shards 0 downloads none.
    """
    paths = list_shards(str(out), kind) if kind != "train" or any(out.glob("fineweb_train_*.bin")) else []
    if paths and paths[0].name != f"fineweb_{kind}_000000.bin":
        raise UserError(f"{out}: fineweb_{kind}_000000.bin is missing, but {paths[0].name} is there; download again")
    shards = [read_shard(path) for path in paths]
    if vocab_size is not None:
        for path, tokens in zip(paths, shards, strict=True):
            check_ids(tokens, vocab_size, path)
    return shards


def check_validation(out: Path, wanted: ShardSet) -> dict[str, int]:
    """Compare the validation split with the canonical counts and return them."""
    shards = open_shards(out, "val", wanted.vocab_size)
    if shards[0][:1].tolist() != [BOS_ID]:
        raise UserError(f"{out}: validation starts with token {shards[0][:1].tolist()}, not with BOS ({BOS_ID})")
    # Every token but the first is a target.
    targets = (sum(map(len, shards)) - 1) // wanted.seq_len * wanted.seq_len
    if targets != wanted.targets:
        raise UserError(f"{out}: {targets:,} validation targets; the canonical set has {wanted.targets:,}")
    counts = {"targets": targets}
    if wanted.target_bytes is not None:
        sidecars = open_shards(out, "val_bytes", None)
        if list(map(len, sidecars)) != list(map(len, shards)):
            raise UserError(f"{out}: byte sidecars and validation shards differ in number or length")
        scored = np.concatenate(sidecars)[1 : targets + 1]
        counts["target_bytes"] = int(scored.sum(dtype=np.int64))
        if counts["target_bytes"] != wanted.target_bytes:
            raise UserError(
                f"{out}: the sidecar counts {counts['target_bytes']:,} bytes for the targets; "
                f"the canonical set has {wanted.target_bytes:,}"
            )
    return counts


def check_tokenizer_name(out: Path, wanted: ShardSet) -> Path:
    """Return the only tokenizer in a directory; UserError unless it is the set's."""
    models = sorted(out.glob("*.model"))
    if len(models) != 1 or wanted.local_name(models[0].name) is None:
        names = ", ".join(model.name for model in models) or "none"
        raise UserError(f"{out}: must hold exactly one tokenizer, the set's; found {names}")
    return models[0]


def verify(out: Path, wanted: ShardSet) -> dict:
    """Check a directory against the canonical set, without the network; return its counts and its tokenizer."""
    if not out.is_dir():
        raise UserError(f"{out}: no such directory")
    counts = check_validation(out, wanted)
    train = [len(tokens) for tokens in open_shards(out, "train", wanted.vocab_size)]
    return {
        "canonical": counts,
        "train_shards": len(train),
        "train_tokens": sum(train),
        "tokenizer": check_tokenizer_name(out, wanted).name,
    }


def verify_offline(out: Path, wanted: ShardSet) -> dict:
    """Do what `verify` does, and compare the SHA-256 of every file with manifest.json; add their number as `hashed`."""
    result = verify(out, wanted)  # first: it also says what the set has to hold
    return result | {"hashed": check_hashes(out)}


def describe(out: Path, digests: dict[str, str]) -> dict[str, list[dict]]:
    """Return the manifest's rows of shards and sidecars, in the form that data/prepare.py writes."""
    rows = {
        kind: [
            file_row(path, digests.get(path.name)) | {"tokens": len(read_shard(path))}
            for path in list_shards(str(out), kind)
        ]
        for kind in ("val", "train", "val_bytes")
        if any(out.glob(f"fineweb_{kind}_0*.bin"))
    }
    return {"shards": rows.get("val", []) + rows.get("train", []), "sidecars": rows.get("val_bytes", [])}


# +---------------------------------------------------------------------------+
# | HUB                                                                       |
# +---------------------------------------------------------------------------+


def list_remote(api: HfApi, wanted: ShardSet, revision: str) -> list[Remote]:
    """List the set's files in its repository. UserError if one is absent or ambiguous."""
    found: dict[str, Remote] = {}
    for entry in api.list_repo_tree(wanted.repo, recursive=True, repo_type="dataset", revision=revision):
        name = wanted.local_name(entry.path) if isinstance(entry, RepoFile) else None
        if name is None:
            continue
        if name in found:
            raise UserError(f"{wanted.repo} holds {name} twice: {found[name].path} and {entry.path}")
        found[name] = Remote(entry.path, name, entry.size, entry.lfs.sha256 if entry.lfs else None)
    for pattern in ("fineweb_val_000000.bin", ".model"):
        if not any(name.endswith(pattern) for name in found):
            raise UserError(f"{wanted.repo} holds no {pattern} of this set; was it moved?")
    return [found[name] for name in sorted(found)]


def choose(files: list[Remote], train_shards: int, repo: str) -> tuple[list[Remote], list[Remote]]:
    """Return (tokenizer and validation files, the first training shards)."""
    train = [file for file in files if "_train_" in file.name]
    if train_shards > len(train):
        raise UserError(f"--train-shards {train_shards}: {repo} has {len(train)} training shards")
    return [file for file in files if file not in train], train[:train_shards]


def check_file(path: Path, file: Remote) -> str:
    """Return the SHA-256 of a local file. UserError if it has not the hub's size or hash."""
    size = path.stat().st_size
    if size != file.size:
        raise UserError(f"{path}: {size:,} bytes, the hub has {file.size:,}; remove it and run again")
    digest = sha256_file(path)
    if file.sha256 is not None and digest != file.sha256:
        raise UserError(f"{path}: SHA-256 {digest}, the hub has {file.sha256}; remove it and run again")
    return digest


def fetch(file: Remote, out: Path, wanted: ShardSet, source: dict[str, str]) -> str:
    """Download one file into DIR unless it is there, check its size and hash, and return its SHA-256.

    The staging folder receives it; only a file that passed the checks gets its name in DIR.
    """
    path = out / file.name
    if path.is_file():
        return check_file(path, file)
    local = out / STAGING_NAME
    staged = Path(hf_hub_download(wanted.repo, file.path, repo_type="dataset", local_dir=local, **source))
    try:
        digest = check_file(staged, file)
    except UserError as error:
        # The hub client would take the same file from the staging folder again.
        staged.unlink()
        reason = str(error).removeprefix(f"{staged}: ").removesuffix("; remove it and run again")
        raise UserError(f"{file.name}: arrived damaged: {reason}; run again") from error
    staged.replace(path)
    return digest


def check_space(files: list[Remote], out: Path) -> None:
    """UserError if the files still to download do not fit on the disk."""
    needed = sum(file.size for file in files if not (out / file.name).is_file())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"{out}: {free:,} bytes free for {needed:,}; fewer --train-shards or another --out")


def download(wanted: ShardSet, out: Path, train_shards: int, endpoint: str | None, revision: str = "main") -> dict:
    """Download and check a set; return its manifest. UserError for anything that goes wrong."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        api = HfApi(endpoint=endpoint)
        # Pin the commit: a push during hours of downloading must not mix two versions.
        commit = api.dataset_info(wanted.repo, revision=revision).sha
        first, train = choose(list_remote(api, wanted, commit), train_shards, wanted.repo)
        source = {"revision": commit} if endpoint is None else {"revision": commit, "endpoint": endpoint}
        check_space(first + train, out)
        # Tokenizer and validation first, so a wrong set is found before the long part of the download.
        digests = {file.name: fetch(file, out, wanted, source) for file in first}
        check_validation(out, wanted)
        for index, file in enumerate(train, 1):
            print(f"training shard {index} of {len(train)}", file=sys.stderr)
            digests[file.name] = fetch(file, out, wanted, source)
            check_ids(read_shard(out / file.name), wanted.vocab_size, out / file.name)
    except HUB_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{wanted.repo}: {reason}; complete files are kept, run again to resume") from error
    checked = verify(out, wanted)
    manifest = {"repository": wanted.repo, "revision": commit, **checked, "sha256": digests, **describe(out, digests)}
    manifest["tokenizer"] = file_row(out / checked["tokenizer"]) | {"vocab_size": wanted.vocab_size}
    write_json(out / MANIFEST_NAME, manifest)
    shutil.rmtree(out / STAGING_NAME, ignore_errors=True)
    return manifest


# +---------------------------------------------------------------------------+
# | COMMAND LINE                                                              |
# +---------------------------------------------------------------------------+


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "download.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=sorted(SHARD_SETS), help="which set")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for all files")
    parser.add_argument("--train-shards", type=int, default=80, help="training shards (default %(default)s)")
    parser.add_argument("--verify-only", action="store_true", help="check DIR against the canonical counts, offline")
    parser.add_argument("--endpoint", metavar="URL", help="another hub or a mirror (default: the hub)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status: 0, 2 for anything wrong, 130 after Ctrl-C."""
    print_anywhere()
    args = parse_arguments(argv)
    wanted = SHARD_SETS[args.set]
    try:
        if args.train_shards < 0:
            raise UserError(f"--train-shards {args.train_shards}: at least 0")
        if args.verify_only:
            result = verify_offline(args.out, wanted)
        else:
            result = download(wanted, args.out, args.train_shards, args.endpoint, args.revision)
            result |= {"hashed": len(result["sha256"]), "tokenizer": result["tokenizer"]["name"]}
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    for name, count in result["canonical"].items():
        print(f"validation {name}: {count:,} (canonical)")
    hashed = f"{result['hashed']} files have the SHA-256 of {MANIFEST_NAME}"
    print(hashed if result["hashed"] else f"WARNING: no {MANIFEST_NAME}, so hashes are not known: only counts agree")
    print(f"{result['train_shards']} training shards, {result['train_tokens']:,} tokens; {result['tokenizer']}")
    return 0


if __name__ == "__main__":
    main_begins()
    sys.exit(main(sys.argv[1:]))
