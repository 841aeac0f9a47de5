"""Every record of the track, end to end at toy size on real text: train, quantise, pack, verify in an empty place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics as TOPICS

import prepare
import pytest

import pack_artifact
import train_gpt

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted(path.parent for path in (ROOT / "records" / "track_10min_16mb").glob("*/record.env"))
TOY = {
    "VOCAB_SIZE": "512",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MLP_MULT": "2.0",
    "ROPE_DIMS": "8",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "TRAIN_SEQ_LEN": "128",
    "EVAL_SEQ_LEN": "128",
    "TRAIN_BATCH_TOKENS": "1024",
    "VAL_BATCH_TOKENS": "2048",
    "BATCH_SLICES": "4",
    "ITERATIONS": "12",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "TRAIN_LOG_EVERY": "4",
    "EMA_DECAY": "0.5",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TTT_LORA_RANK": "4",
    "TTT_LORA_ALPHA": "6",
    "TTT_LORA_LR": "0.003",
    "TTT_EVAL_SEQ_LEN": "96",
    "TTT_BATCH_SIZE": "1",
    "PHASED_TTT_PREFIX_DOCS": "2",
    "PHASED_TTT_NUM_PHASES": "2",
    "GLOBAL_TTT_CHUNK_TOKENS": "256",
    "OMP_NUM_THREADS": "1",
    "DEVICE": "cpu",
    "VE_LAYERS": "1,3",
    "VE_DIM": "16",
    "BIGRAM_VOCAB_SIZE": "128",
    "TRIGRAM_VOCAB_SIZE": "96",
    "TTT_CHUNK_TOKENS": "512",
    "TTT_EPOCHS": "2",
    "EVAL_STRIDE": "64",
    "WARMDOWN_ITERS": "8",
    "SWA_EVERY": "2",
}
OWN_TOY = {"PR1895": {"MIXERS": "G A*2 G", "GDN_HEAD_DIM": "16", "EMBED_TOPK": "200"}}  # mixers are listed by layer
PARAMETERS = {
    "PR1934": 35_945_671,
    "PR1915": 35_945_671,
    "CarryTTT": 35_945_671,
    "PR1182": 27_108_468,
    "PR1150": 25_768_028,
    "PR1895": 35_896_408,
    "rANS": 35_945_671,
}


@pytest.fixture(scope="session")
def caseops_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own documentation as shards, through CaseOps, with the byte sidecar."""
    folder = tmp_path_factory.mktemp("sample")
    texts = [topic for _, topic in sorted(TOPICS.items()) if 800 < len(topic) < 4000]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = ["--docs", str(folder / "docs.jsonl"), "--caseops", "--out", str(out := folder / "shards")]
    assert prepare.main([*argv, "--vocab-size", "512", "--val-docs", "2", "--jobs", "1"]) == 0
    return out


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    """A command of the repository; its output when it fails."""
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_record_runs_packs_and_verifies_at_toy_size(record: Path, caseops_sample: Path, tmp_path: Path) -> None:
    knobs = {f.upper() for f in train_gpt.Config.__dataclass_fields__}
    clean = {k: v for k, v in os.environ.items() if k not in knobs and k != "PRESET"}
    env = clean | TOY | OWN_TOY.get(record.name.split("_")[-1], {})
    env |= {"PRESET": str(record), "DATA_PATH": str(caseops_sample), "ARTIFACT_DIR": str(tmp_path)}
    needs_lrzip = train_gpt.load_config({"PRESET": str(record)}).compressor == "pergroup"
    if needs_lrzip and shutil.which("lrzip") is None:  # a system binary: without it brotli carries the rest of the line
        env["COMPRESSOR"] = "brotli"
    run(["train_gpt.py"], env)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["legal"] and list(result["stages"]) == ["pre_quant", "quantized", "final"]
    assert result["stages"]["final"]["val_bpb"] < result["stages"]["quantized"]["val_bpb"]
    assert pack_artifact.main(["pack", str(tmp_path)]) == 0
    where = ["--run", str(tmp_path), "--data", str(caseops_sample)]
    verified = run(["pack_artifact.py", "verify", str(tmp_path / "artifact.pyz"), *where], clean | {"DEVICE": "cpu"})
    assert '"equal": true' in verified.stdout


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_record_is_explained_and_tells_what_was_run(record: Path) -> None:
    done = run(["train_gpt.py", "--explain"], os.environ | {"PRESET": str(record)})
    count = PARAMETERS[record.name.split("_")[-1]]
    for line in (f"parameters {count}", "optimisers:", "quantisation plan:"):
        assert line in done.stdout
    assert ("route, looping on from 0.35" in done.stdout) == (count == PARAMETERS["PR1934"])
    template = json.loads((record / "submission.json").read_text())
    assert template["val_bpb"] is None and template["seed_results"] == {}, "filled in only with what was really run"
    assert "not run here" in (record / "README.md").read_text()
