"""data/download.py against a local stand-in for the hub: its file listing, download addresses and byte ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download
import huggingface_hub
import numpy as np
import pytest
from download import SHARD_SETS, ShardSet
from prepare import shard_header

from train_gpt import UserError, fingerprint

COMMIT = "c" * 40
ROOT = "datasets/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved/"
TINY = replace(SHARD_SETS["caseops"], targets=24, target_bytes=0, seq_len=8)


def shard(tokens: np.ndarray) -> bytes:
    return shard_header(len(tokens)) + tokens.astype("<u2").tobytes()


def hub_files() -> dict[str, bytes]:
    """A repository with the layout of the published CaseOps set, and files that do not belong to the set."""
    rng = np.random.default_rng(5)
    val = rng.integers(4, 8192, 30)
    val[0] = 1
    tokenizer = "datasets/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved"
    files = {
        ROOT + "fineweb_val_000000.bin": shard(val),
        ROOT + "fineweb_val_bytes_000000.bin": shard(np.arange(30)),
        f"{tokenizer}.model": b"a model",
        f"{tokenizer}.vocab": b"not wanted",
        "datasets/datasets/fineweb10B_sp8192/fineweb_val_000000.bin": b"of another set",
        "datasets/manifest.json": b"{}",
        "README.md": b"hello",
    }
    trained = (shard(rng.integers(1, 8192, 100_000 + index)) for index in range(3))
    return files | {f"{ROOT}fineweb_train_{index:06d}.bin": raw for index, raw in enumerate(trained)}


class Hub(ThreadingHTTPServer):
    """Serves what the hub client asks for: a branch's commit, a commit's tree, HEAD and GET with ranges for files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = hub_files()
        self.gets: list[tuple[str, str | None]] = []  # (file name, Range header)
        self.cut: set[str] = set()  # files whose next answer breaks off half way
        self.gone: set[str] = set()  # files that are listed but not found
        self.damaged: set[str] = set()  # files whose last byte is another when they are sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        return [name for name, _ in self.gets]


class Answer(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, code: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(length or len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def tree(self) -> bytes:
        rows = [{"type": "directory", "path": "datasets", "size": 0, "oid": "0" * 40}]
        for path, raw in self.server.files.items():
            lfs = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 100}
            rows.append({"type": "file", "path": path, "size": len(raw), "oid": "0" * 40, "lfs": lfs})
        return json.dumps(rows).encode()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, repo, is_json = self.path.partition("?")[0], TINY.repo, {"Content-Type": "application/json"}
        if path == f"/api/datasets/{repo}/revision/main":
            self.send(200, json.dumps({"id": repo, "sha": COMMIT}).encode(), is_json)
        elif path == f"/api/datasets/{repo}/tree/{COMMIT}":
            self.send(200, self.tree(), is_json)
        elif path.startswith(f"/datasets/{repo}/resolve/{COMMIT}/"):
            self.send_file(path.split(COMMIT + "/", 1)[1])
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str) -> None:
        raw, short, gets = self.server.files.get(name), name.rpartition("/")[2], self.command == "GET"
        if raw is None or (gets and short in self.server.gone):
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        sent = raw[:-1] + bytes([raw[-1] ^ 1]) if short in self.server.damaged else raw
        headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start, code, stop = int(wanted[1]) if wanted else 0, 206 if wanted else 200, len(raw)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
        if gets:
            self.server.gets.append((short, self.headers.get("Range")))
        if gets and short in self.server.cut:
            self.server.cut.remove(short)
            stop, self.close_connection = len(raw) // 2, True
        self.send(code, sent[start:stop], headers, length=len(raw) - start)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def tiny() -> ShardSet:
    """CaseOps with the counts of the stand-in: 29 targets cut to 24, with the bytes of tokens 1 to 24."""
    return replace(TINY, target_bytes=sum(range(1, 25)))


def test_download_and_resume(tmp_path: Path, hub: Hub, tiny: ShardSet) -> None:
    manifest = download.download(tiny, tmp_path, 2, hub.url)
    kinds = "val_000000 val_bytes_000000 train_000000 train_000001".split()
    names = {f"fineweb_{kind}.bin" for kind in kinds}
    names.add("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
    assert {path.name for path in tmp_path.iterdir()} == names | {"manifest.json"}
    for path, raw in hub.files.items():
        name = path.rpartition("/")[2]
        if name in names and path.startswith((ROOT, "datasets/tokenizers")):
            assert (tmp_path / name).read_bytes() == raw
            assert manifest["sha256"][name] == hashlib.sha256(raw).hexdigest()
    assert manifest["canonical"] == {"targets": 24, "target_bytes": 300}
    assert manifest["train_tokens"] == 200_001 and manifest["revision"] == COMMIT
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    # validation and tokenizer before training shards
    assert all("train" not in name for name in hub.fetched()[:3])
    hub.gets.clear()
    download.download(tiny, tmp_path, 3, hub.url)
    assert hub.fetched() == ["fineweb_train_000002.bin"]


def test_what_breaks_off_or_arrives_damaged_is_fetched_again(
    tmp_path: Path, hub: Hub, tiny: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (f"fineweb_train_{index:06d}.bin" for index in range(3))
    # the client keeps whole chunks only, and its chunks of 10 MB are larger than the stand-in's files
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut = {first}
    hub.gone = {second}
    with pytest.raises(UserError, match="run again to resume") as caught:
        download.download(tiny, tmp_path, 3, hub.url)
    assert "\n" not in str(caught.value) and not (tmp_path / "manifest.json").exists()
    assert [wanted for name, wanted in hub.gets if name == first] == [None, "bytes=100000-"], "goes on where it stopped"
    hub.gone.clear()
    hub.gets.clear()
    hub.damaged = {third}
    with pytest.raises(UserError, match=rf"^{third}: arrived damaged: SHA-256 .* run again$"):
        download.download(tiny, tmp_path, 3, hub.url)
    assert hub.fetched() == [second, third] and not (tmp_path / third).exists(), "a name after its hash is known"
    hub.damaged.clear()
    hub.gets.clear()
    manifest = download.download(tiny, tmp_path, 3, hub.url)
    raw = hub.files[ROOT + third]
    assert hub.fetched() == [third] and (tmp_path / third).read_bytes() == raw
    row = {"name": third, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "tokens": 100_002}
    assert manifest["shards"][3] == row | {"fingerprint": fingerprint(tmp_path / third)}
    assert [len(manifest[key]) for key in ("shards", "sidecars")] == [4, 1]
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(b"a model").hexdigest()
    for more, message in ((b"", "remove it and run again"), (b"\1\1", "SHA-256 .* remove it and run again")):
        (tmp_path / third).write_bytes(raw[:-2] + more)
        with pytest.raises(UserError, match=message):
            download.download(tiny, tmp_path, 3, hub.url)


def test_wrong_counts_stop_before_the_training_shards(tmp_path: Path, hub: Hub, tiny: ShardSet) -> None:
    for wrong, message in (
        ({"targets": 32}, "24 validation targets; the canonical set has 32"),
        ({"target_bytes": 276}, "counts 300 bytes for the targets; the canonical set has 276"),
    ):
        with pytest.raises(UserError, match=message):
            download.download(replace(tiny, **wrong), tmp_path, 3, hub.url)
        assert not any("train" in name for name in hub.fetched()), message


def test_hub_without_the_files(tmp_path: Path, hub: Hub, tiny: ShardSet) -> None:
    with pytest.raises(UserError, match="--train-shards 4: .* has 3 training shards"):
        download.download(tiny, tmp_path, 4, hub.url)
    hub.files["moved/caseops_v2/fineweb_val_000000.bin"] = b"a second one"
    with pytest.raises(UserError, match=r"holds fineweb_val_000000\.bin twice"):
        download.download(tiny, tmp_path, 1, hub.url)
    hub.files.clear()
    with pytest.raises(UserError, match=r"holds no fineweb_val_000000\.bin"):
        download.download(tiny, tmp_path, 1, hub.url)
    with pytest.raises(UserError, match="someone/else"):
        download.download(replace(tiny, repo="someone/else"), tmp_path, 1, hub.url)


def test_verify_only_names_what_is_wrong(tmp_path: Path, tiny: ShardSet) -> None:
    files = {name: raw for path, raw in hub_files().items() if (name := tiny.local_name(path))}
    train, val, sidecar = (f"fineweb_{kind}_000000.bin" for kind in ("train", "val", "val_bytes"))
    (model,) = (name for name in files if name.endswith(".model"))
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    for name, raw, message in (
        (train, b"short", rf"{train}: not a shard"),
        (train, shard_header(9) + bytes(4), rf"{train}: .*promises 9 tokens"),
        (train, bytes(1030), rf"{train}: not a shard"),
        (train, shard(np.full(3, 8192)), rf"{train}: token id 8192 is outside"),
        (train, None, rf"{train} is missing"),
        ("fineweb_train_000001.bin", None, r"fineweb_train_000001\.bin is missing"),
        (val, None, r"has no fineweb_val_\*\.bin"),
        (val, shard(np.full(30, 7)), r"starts with token \[7\]"),
        (val, shard(np.zeros(0)), r"starts with token \[\]"),
        (sidecar, shard(np.zeros(29)), "differ in number or length"),
        (sidecar, None, "differ in number or length"),
        (model, None, "exactly one tokenizer, the set's; found none"),
        ("other.model", b"", "exactly one tokenizer, the set's; found .*, other.model"),
    ):
        (tmp_path / name).unlink(missing_ok=True)
        if raw is not None:
            (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=message):
            download.verify(tmp_path, tiny)
        (tmp_path / name).unlink(missing_ok=True)
        if name in files:
            (tmp_path / name).write_bytes(files[name])
        assert download.verify(tmp_path, tiny)["train_tokens"] == 300_003, f"after {message}"


def test_names_of_the_published_layouts() -> None:
    shards = "datasets/datasets/fineweb10B_{}/fineweb_{}_000007.bin"
    for short, folder in (("sp1024", "sp1024"), ("sp8192", "sp8192"), ("caseops", ROOT.split("10B_")[1][:-1])):
        chosen = SHARD_SETS[short]
        for kind in ("train", "val"):
            path = shards.format(folder, kind)
            assert chosen.local_name(path) == chosen.local_name("moved/" + path) == f"fineweb_{kind}_000007.bin"
        others = [other for other in SHARD_SETS.values() if other is not chosen]
        assert not any(other.local_name(shards.format(folder, "val")) for other in others)
    assert SHARD_SETS["sp8192"].local_name("datasets/tokenizers/fineweb_8192_bpe.model") == "fineweb_8192_bpe.model"
    assert SHARD_SETS["caseops"].local_name("datasets/tokenizers/fineweb_8192_bpe.model") is None
    assert SHARD_SETS["sp8192"].local_name(ROOT + "fineweb_val_bytes_000000.bin") is None
    assert not any(chosen.targets % chosen.seq_len for chosen in SHARD_SETS.values())
    assert [chosen.target_bytes for chosen in SHARD_SETS.values()] == [None, None, 151_074_499]


def test_command_line_and_verify_only(
    tmp_path: Path,
    hub: Hub,
    tiny: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    monkeypatch.setitem(SHARD_SETS, "caseops", tiny)
    command, folder = ["caseops", "--out", str(tmp_path / "x")], tmp_path / "x"
    verify = [*command, "--verify-only"]
    assert download.main([*command, "--train-shards", "1", "--endpoint", hub.url]) == 0 == download.main(verify)
    out = capsys.readouterr().out
    assert out.count("validation target_bytes: 300 (canonical)") == 2
    assert "4 files have the SHA-256 of manifest.json" in out
    for name in json.loads((folder / "manifest.json").read_text())["sha256"]:
        raw = (folder / name).read_bytes()
        # the last token is no scored target, so no count changes
        (folder / name).write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
        refused(f"{name}: SHA-256 is", download.main, *verify)
        (folder / name).write_bytes(raw)
    (folder / "manifest.json").unlink()
    assert download.main(verify) == 0 and "WARNING: no manifest.json" in capsys.readouterr().out
    refused("", download.main, *command, "--train-shards", -1)
    refused("", download.main, "caseops", "--out", tmp_path / "nothing", "--verify-only")
    hub.shutdown()
    hub.server_close()
    refused("", download.main, *command, "--endpoint", hub.url)
    with pytest.raises(SystemExit):
        download.main(["--help"])
    assert "Not tested against the real hub" in capsys.readouterr().out
