"""Download the published shard sets of the contest from the Hugging Face hub, and check them.

    python data/download.py caseops --out DIR [--train-shards N]
    python data/download.py caseops --out DIR --verify-only

    sp1024    1,024 BPE pieces; the contest's own set       62,021,632 validation targets
    sp8192    8,192 BPE pieces                              40,540,160 validation targets
    caseops   8,192 BPE pieces after the CaseOps transform  47,851,520 validation targets, 151,074,499 bytes

All files end up flat in DIR: shards, the byte sidecar where the set has one, the tokenizer, and a manifest.json. The
validation split and the tokenizer come first and must give the canonical counts above; only then the training shards
are fetched. Every file is compared with the hub's size and SHA-256; every shard with its own header and vocabulary.
A broken connection is continued where it broke; a run that was ended resumes file by file (a shard has 200 MB), because
the hub client does not keep parts of a file from one run to the next.

Not tested against the real hub: this was written and tested where the hub cannot be reached, against a local
stand-in of its file listing and download addresses. The repository names and layouts are those that the contest's
download script and published records use; the files are found by the end of their path, so a moved folder does no harm.
"""

from __future__ import annotations

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
from prepare import BOS, MANIFEST_NAME, open_shard, sha256_file, write_json

HUB_ERRORS = (OSError, HTTPError, HfHubHTTPError, HFValidationError, EntryNotFoundError)
STAGING_NAME = ".hub"  # partial files, until they are complete


class DownloadError(ValueError):
    """What went wrong, in the one line that the user sees."""


@dataclass(frozen=True)
class ShardSet:
    """Where a published set lies and what it must contain."""

    repo: str  # a dataset repository
    folder: str  # regular expression for the folder of the shards
    tokenizer: str  # regular expression for the name of the model
    vocab_size: int
    targets: int  # canonical number of scored validation tokens
    target_bytes: int | None = None  # canonical sum of the byte sidecar over these targets; None: no sidecar
    seq_len: int = 2048  # validation is cut to a multiple of it

    def local_name(self, path: str) -> str | None:
        """The name in DIR of a file of the repository, or None for a file that is not part of the set."""
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
    """One file of the set on the hub."""

    path: str
    name: str  # in DIR
    size: int
    sha256: str | None  # the hub knows it for large files


# +---------------------------------------------------------------------------+
# | CHECKS                                                                    |
# +---------------------------------------------------------------------------+


def check_shard(path: Path, vocab_size: int | None) -> np.ndarray:
    """Open a shard and compare header, size and, unless it is a sidecar, its ids. DownloadError says what is wrong."""
    try:
        tokens = open_shard(path)
    except ValueError as error:
        raise DownloadError(str(error)) from error
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise DownloadError(f"{path}: token {int(tokens.max())} in a vocabulary of {vocab_size}; not of this set")
    return tokens


def shard_paths(out: Path, kind: str) -> list[Path]:
    """The shards of one kind (train, val, val_bytes) in a directory, which must be numbered without a gap."""
    paths = sorted(path for path in out.glob(f"fineweb_{kind}_*.bin") if re.search(rf"{kind}_\d{{6}}\.bin$", path.name))
    for index, path in enumerate(paths):
        if path.name != f"fineweb_{kind}_{index:06d}.bin":
            raise DownloadError(f"{out}: fineweb_{kind}_{index:06d}.bin is missing, but {path.name} is there")
    return paths


def check_validation(out: Path, wanted: ShardSet) -> dict[str, int]:
    """Compare the validation split with the canonical counts and return them.

    Targets are all tokens but the first, cut to a multiple of `seq_len`; the bytes are those of the targets, that is
    of the sidecar shifted by one.
    """
    paths = shard_paths(out, "val")
    if not paths:
        raise DownloadError(f"{out}: no validation shard (fineweb_val_000000.bin)")
    shards = [check_shard(path, wanted.vocab_size) for path in paths]
    if shards[0][0] != BOS:
        raise DownloadError(f"{paths[0]}: starts with token {shards[0][0]}, not with BOS ({BOS})")
    targets = (sum(map(len, shards)) - 1) // wanted.seq_len * wanted.seq_len
    if targets != wanted.targets:
        raise DownloadError(f"{out}: {targets:,} validation targets; the canonical set has {wanted.targets:,}")
    counts = {"targets": targets}
    if wanted.target_bytes is not None:
        sidecars = [check_shard(path, None) for path in shard_paths(out, "val_bytes")]
        if [len(sidecar) for sidecar in sidecars] != [len(shard) for shard in shards]:
            raise DownloadError(f"{out}: byte sidecars and validation shards differ in number or length")
        scored = np.concatenate(sidecars)[1 : targets + 1]
        counts["target_bytes"] = int(scored.sum(dtype=np.int64))
        if counts["target_bytes"] != wanted.target_bytes:
            raise DownloadError(
                f"{out}: the sidecar counts {counts['target_bytes']:,} bytes for the targets; "
                f"canonical are {wanted.target_bytes:,}"
            )
    return counts


def check_tokenizer_name(out: Path, wanted: ShardSet) -> Path:
    """The one tokenizer of the set in a directory."""
    models = sorted(out.glob("*.model"))
    if len(models) != 1 or wanted.local_name(models[0].name) is None:
        names = ", ".join(model.name for model in models) or "none"
        raise DownloadError(f"{out}: exactly one tokenizer of the set has to be there; found {names}")
    return models[0]


def verify(out: Path, wanted: ShardSet) -> dict:
    """Check all that lies in a directory against the canonical set, without the network; return counts and files."""
    if not out.is_dir():
        raise DownloadError(f"{out}: no such directory")
    counts = check_validation(out, wanted)
    train = [len(check_shard(path, wanted.vocab_size)) for path in shard_paths(out, "train")]
    return {
        "canonical": counts,
        "train_shards": len(train),
        "train_tokens": sum(train),
        "tokenizer": check_tokenizer_name(out, wanted).name,
    }


# +---------------------------------------------------------------------------+
# | HUB                                                                       |
# +---------------------------------------------------------------------------+


def list_remote(api: HfApi, wanted: ShardSet, revision: str) -> list[Remote]:
    """The files of the set in its repository. DownloadError if they are absent or ambiguous."""
    found: dict[str, Remote] = {}
    for entry in api.list_repo_tree(wanted.repo, recursive=True, repo_type="dataset", revision=revision):
        name = wanted.local_name(entry.path) if isinstance(entry, RepoFile) else None
        if name is None:
            continue
        if name in found:
            raise DownloadError(f"{wanted.repo} holds {name} twice: {found[name].path} and {entry.path}")
        found[name] = Remote(entry.path, name, entry.size, entry.lfs.sha256 if entry.lfs else None)
    for pattern in ("fineweb_val_000000.bin", ".model"):
        if not any(name.endswith(pattern) for name in found):
            raise DownloadError(f"{wanted.repo} holds no {pattern} of this set; was it moved?")
    return [found[name] for name in sorted(found)]


def choose(files: list[Remote], train_shards: int, repo: str) -> tuple[list[Remote], list[Remote]]:
    """(tokenizer and validation files, the first training shards)."""
    train = [file for file in files if "_train_" in file.name]
    if train_shards > len(train):
        raise DownloadError(f"--train-shards {train_shards}: {repo} has {len(train)} training shards")
    return [file for file in files if file not in train], train[:train_shards]


def fetch(file: Remote, out: Path, wanted: ShardSet, source: dict[str, str]) -> str:
    """Bring one file into DIR unless it is there, check size and hash, and return its SHA-256.

    It arrives in the staging folder; the name in DIR is given to complete files only.
    """
    path = out / file.name
    if not path.is_file():
        local = out / STAGING_NAME
        staged = Path(hf_hub_download(wanted.repo, file.path, repo_type="dataset", local_dir=local, **source))
        if staged.stat().st_size != file.size:
            size = staged.stat().st_size
            staged.unlink()
            raise DownloadError(f"{file.name}: got {size:,} bytes, the hub has {file.size:,}; run again")
        staged.replace(path)
    size, digest = path.stat().st_size, sha256_file(path)
    if size != file.size:
        raise DownloadError(f"{path}: {size:,} bytes, the hub has {file.size:,}; remove it and run again")
    if file.sha256 is not None and digest != file.sha256:
        raise DownloadError(f"{path}: SHA-256 {digest}, the hub has {file.sha256}; remove it and run again")
    return digest


def check_space(files: list[Remote], out: Path) -> None:
    """DownloadError if the files that are not there yet do not fit on the disk."""
    needed = sum(file.size for file in files if not (out / file.name).is_file())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DownloadError(f"{out}: {free:,} bytes free for {needed:,}; fewer --train-shards or another --out")


def download(wanted: ShardSet, out: Path, train_shards: int, endpoint: str | None, revision: str = "main") -> dict:
    """Download and check a set; returns what manifest.json says. DownloadError for all that goes wrong.

    Tokenizer and validation come first, so a set that is not the canonical one is found before the long download.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        api = HfApi(endpoint=endpoint)
        # Pin the commit: a push during a download of hours must not mix two versions.
        commit = api.dataset_info(wanted.repo, revision=revision).sha
        first, train = choose(list_remote(api, wanted, commit), train_shards, wanted.repo)
        source = {"revision": commit} if endpoint is None else {"revision": commit, "endpoint": endpoint}
        check_space(first + train, out)
        digests = {}
        for file in first:
            digests[file.name] = fetch(file, out, wanted, source)
        check_validation(out, wanted)
        for index, file in enumerate(train, 1):
            print(f"training shard {index} of {len(train)}", file=sys.stderr)
            digests[file.name] = fetch(file, out, wanted, source)
            check_shard(out / file.name, wanted.vocab_size)
    except HUB_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DownloadError(f"{wanted.repo}: {reason}; what is complete is kept, run again to resume") from error
    manifest = {"repository": wanted.repo, "revision": commit, **verify(out, wanted), "sha256": digests}
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
    """The command line; returns the exit code: 0, 2 for anything wrong, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    wanted = SHARD_SETS[args.set]
    try:
        if args.train_shards < 0:
            raise DownloadError(f"--train-shards {args.train_shards}: at least 0")
        if args.verify_only:
            result = verify(args.out, wanted)
        else:
            result = download(wanted, args.out, args.train_shards, args.endpoint, args.revision)
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    for name, count in result["canonical"].items():
        print(f"validation {name}: {count:,} (canonical)")
    print(f"{result['train_shards']} training shards, {result['train_tokens']:,} tokens; {result['tokenizer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
