"""Config: where a value comes from, what is refused and with which words, and the texts that people read."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, call
from golden_rules import always, knobs
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, UserError, load_config, record_env, resolve

FIELDS = {field.name.upper(): field for field in dataclasses.fields(Config)}
# records/<name>/run is what a run wrote
PRESETS = sorted(path for path in (ROOT / "records").glob("**/record.env") if path.parent.name != "run")
KINDS = ("bool", "int", "float", "str", *train_gpt.LISTS)


def write_preset(folder: Path, text: str) -> str:
    """A preset folder with this record.env; its path, as PRESET wants it."""
    folder.mkdir(exist_ok=True)
    (folder / "record.env").write_text(text, encoding="utf-8")
    return str(folder)


def rows(table: str) -> list[list[str]]:
    """Rows of a table, which end with a semicolon, as cells, which are separated by ->."""
    return [[cell.strip() for cell in row.split("->")] for row in table.split(";")]


def problems(environ: dict[str, str]) -> list[str]:
    """The lines with which an environment is refused."""
    with pytest.raises(UserError) as refused:
        resolve(environ)
    return str(refused.value).splitlines()


# Where a value comes from


def test_default_then_base_then_preset_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_preset(tmp_path / "base", "MATRIX_LR=0.5\nSEED=7\nEMA_DECAY=0.9\nMLP_MULT=4.0  # the default\n")
    preset = write_preset(tmp_path / "p", "# why\nBASE=base  # reason\nSEED=8\nEMA_DECAY=0.9965  # the default\n")
    cfg, origin = resolve({"PRESET": preset, "BETA1": "0.5", "HOME": "/"})
    assert (cfg.seed, cfg.matrix_lr, cfg.beta1, cfg.scalar_lr) == (8, 0.5, 0.5, Config().scalar_lr)
    assert origin == {"MATRIX_LR": "base", "SEED": preset, "BETA1": "environment"}
    assert cfg.ema_decay == Config().ema_decay, "a preset may go back to the default"
    assert resolve({"PRESET": preset, "SEED": "9"})[1]["SEED"] == "environment"
    back = {"PRESET": preset, "SEED": str(Config().seed), "MATRIX_LR": str(Config().matrix_lr)}
    assert resolve(back) == (Config(), {}), "and so may the environment"
    own = {"SEED": "8", "EMA_DECAY": "0.9965"}
    assert train_gpt.read_preset(preset) == train_gpt.read_preset(str(tmp_path / "base")) | own
    monkeypatch.chdir(tmp_path)
    assert resolve({"PRESET": "p"})[0].matrix_lr == 0.5
    assert record_env(cfg) == "SEED=8\nMATRIX_LR=0.5\nBETA1=0.5\n"


def test_base_is_refused_where_it_would_not_be_seen(tmp_path: Path) -> None:
    base = write_preset(tmp_path / "base", "SEED=7\n")
    preset = write_preset(tmp_path / "p", f"BASE={base}\nSEED=8\n")
    for text, words in (
        (f"BASE={preset}\n", f"BASE={preset} has a BASE itself; only one level"),
        ("BASE=nowhere\n", "BASE=nowhere: no record.env there"),
        (f"SEED=1\nBASE={base}\n", f"record.env:2: BASE={base} must be the first line"),
        (f"BASE={base}\nBASE={base}\n", "record.env:2: BASE is set twice"),
    ):
        assert words in problems({"PRESET": write_preset(tmp_path / "bad", text)})[0]
    assert problems({"BASE": base}) == ["BASE is not a knob here; say PRESET (BASE is the first line of a preset)"]
    write_preset(tmp_path / "base", "NOT_A_KNOB=1\n")
    assert problems({"PRESET": preset})[0].startswith("NOT_A_KNOB")


def test_defaults_are_a_run_that_can_start_and_nobody_changes() -> None:
    assert Config().problems() == [] and resolve({}) == (Config(), {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 2


def test_presets_as_people_and_editors_write_them(tmp_path: Path) -> None:
    """Comments; a byte-order mark and CRLF are read; other encodings are one line that names the file."""
    text = "# SEED=1\n\n   \nSEED=2  # SEED=3\nRUN_ID=a#b # a hash inside a word is no comment\nBETA1=0.5\t# tab\n"
    assert train_gpt.read_preset(write_preset(tmp_path / "p", text)) == {"SEED": "2", "RUN_ID": "a#b", "BETA1": "0.5"}
    path, text = tmp_path / "record.env", "ITERATIONS=9  # r\u00e9sum\u00e9\nSEED=3\n"
    for data in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode()):
        path.write_bytes(data)
        assert train_gpt.parse_preset(path) == {"ITERATIONS": "9", "SEED": "3"}
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(train_gpt.UserError, match="record.env is not UTF-8 .*; save it as UTF-8"):
            train_gpt.parse_preset(path)


def test_bad_preset_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, where in (
        ("SEED=1\nSEED\n", "record.env:2: expected KEY=VALUE, got 'SEED'"),
        ("seed=1\n", "record.env:1: expected KEY=VALUE, got 'seed=1'"),
        ("export SEED=1\n", "record.env:1: expected KEY=VALUE"),
        ("SEED=1\n# x\nSEED=2\n", "record.env:3: SEED is set twice"),
        ("PRESET=elsewhere\n", "PRESET is not a knob"),
        ("ZZZ=1\n", "ZZZ is not a knob; `python train_gpt.py --help` lists them"),
    ):
        (line,) = problems({"PRESET": write_preset(tmp_path / "p", text)})
        assert where in line
    monkeypatch.chdir(tmp_path)
    assert "none in records/" in problems({"PRESET": "records/nope"})[0]
    (tmp_path / "records").mkdir()
    write_preset(tmp_path / "records" / "here", "")
    assert "known presets: records/here" in problems({"PRESET": "records/nope"})[0]


# Names


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p", "NOT_A_KNOB=1\nNUM_LAYERS=many\n")
    found = problems({"PRESET": preset, "TTT_LORA_RNK": "4", "MATRIX_LR": "-1", "EVAL": "best", "EMA_ENABLED": "1"})
    for start in ("NOT_A_KNOB", "NUM_LAYERS='many'", "TTT_LORA_RNK", "MATRIX_LR=-1", "EVAL=best", "EMA_ENABLED"):
        assert sum(line.startswith(start) for line in found) == 1, start
    assert len(found) == 6


def test_misspelt_and_renamed_knobs_say_what_to_write(tmp_path: Path) -> None:
    assert problems({"TTT_LORA_RNK": "4"}) == ["TTT_LORA_RNK is not a knob; did you mean TTT_LORA_RANK?"]
    assert "did you mean ITERATIONS?" in problems({"ITERATION": "4"})[0]
    published = "SLOT_ENABLED TTT_FREEZE_BLOCKS TTT_GDN_INCLUDE TTT_K_LORA TTT_O_LORA TTT_MLP_LORA HADAMARD_VO_ROTATE"
    assert {*published.split()} <= train_gpt.RENAMED.keys()
    for name, advice in train_gpt.RENAMED.items():
        told = [f"{name} is not a knob here; say {advice}"]
        assert problems({name: "1"}) == told
        assert name == "BASE" or problems({"PRESET": write_preset(tmp_path / "p", f"{name}=1\n")}) == told
        advised = re.match(r"([A-Z_]+)=(\S+)", advice)
        if advised:
            load_config({advised[1]: advised[2]})


def test_variables_of_shells_launchers_and_libraries_pass() -> None:
    names = (
        "PATH HOME SHELL LANG PWD USER TERM TMPDIR HOSTNAME PYTHONPATH VIRTUAL_ENV RANK LOCAL_RANK WORLD_SIZE "
        "LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID OMP_NUM_THREADS "
        "CUDA_VISIBLE_DEVICES NCCL_DEBUG HF_HOME HF_TOKEN TOKENIZERS_PARALLELISM TORCHINDUCTOR_CACHE_DIR "
        "PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR DATA_DIR MODEL_NAME SLURM_JOB_ID XDG_CACHE_HOME ZZZ"
    )
    assert resolve(dict.fromkeys(names.split(), "1")) == (Config(), {})


# Values


TYPED = """
    SEED -> 12 -> 12; ITERATIONS -> 20_000 -> 20000; MATRIX_LR -> 1e-3 -> 0.001; MATRIX_LR -> 1 -> 1.0;
    SMEAR_BOS_MASK -> 0 -> False; SMEAR_BOS_MASK -> 1 -> True; AVERAGE -> none -> (); AVERAGE -> -> ();
    STAGES -> quantize, eval -> ('quantize', 'eval'); VE_LAYERS -> 5, 9,10 -> (5, 9, 10); VE_LAYERS -> none -> ();
    EVAL -> plain -> 'plain'; TTT_CHUNK_SIZE -> 256:8, 48 -> (UpTo(limit=256.0, value=8), UpTo(limit=inf, value=48))
"""
MISTYPED = """
    SEED=1.5 SEED= ITERATIONS=many MATRIX_LR=fast SMEAR_BOS_MASK=true SMEAR_BOS_MASK=yes LOADER=shuffle
    STAGES=train,test ATTN_EXTRAS=xsa,sinks TTT_LORA_SITES=q,o TTT_LR=-1 VE_LAYERS=9,last VE_LAYERS=9,9 AVERAGE=ema,ema
    TTT_CHUNK_SIZE=0 TTT_CHUNK_SIZE=a:8 TTT_CHUNK_SIZE=8,8
"""


def test_text_becomes_the_annotated_type() -> None:
    for name, text, value in rows(TYPED):
        assert repr(getattr(load_config({name: text}), name.lower())) == value, (name, text)


def test_wrong_value_is_one_line_with_name_and_value() -> None:
    for pair in MISTYPED.split():
        name, text = pair.split("=")
        (line,) = problems({name: text})
        assert line.startswith(f"{name}=") and all(part in line for part in text.split(",")), pair
    floats = [field for field in FIELDS.values() if field.type == "float"]
    for text in ("nan", "inf", "-inf"):
        assert floats and not [f.name for f in floats if not train_gpt.bound_problems(f, float(text))]
        assert problems({"MATRIX_LR": text})[0].startswith(f"MATRIX_LR={text}")


def just_outside(field: dataclasses.Field) -> list[object]:
    """Values past each bound of a knob, by the smallest step of its type."""
    number, step = (int, 1) if field.type == "int" else (float, 1e-6)
    bounds = re.findall(r"([<>]=?) ([\d.]+)", field.metadata["allowed"])
    return [number(float(limit) + {">": 0, ">=": -step, "<=": step}[sign]) for sign, limit in bounds]


def test_values_past_a_bound_are_refused_and_choices_accepted() -> None:
    refused = 0
    for name, field in FIELDS.items():
        allowed = field.metadata["allowed"]
        for value in just_outside(field):
            text = f"{name}={train_gpt.format_knob(value)}"
            assert any(line.startswith(f"{text} must be {allowed}") for line in problems({name: text.split("=")[1]}))
            refused += 1
        for choice in allowed.split("|") if "|" in allowed else ():
            value = train_gpt.parse_knob(field, choice)
            assert train_gpt.bound_problems(field, value) == [] and train_gpt.format_knob(value) == choice, name
        assert not allowed or just_outside(field) or "|" in allowed, f"{name}: {allowed!r} allows everything"
    assert refused > 100


# Pairs of values

# one environment for each row of ILLEGAL, in its order, and a word of its message (default: the first pair)
ILLEGAL_EXAMPLES = """
    MODEL_DIM=516; NUM_KV_HEADS=3 NUM_HEADS=8; ROPE_DIMS=15; LOOP_START=5 LOOP_END=4 -> LOOP_START=5..LOOP_END=4;
    MIXERS=G*2_A*8 -> MIXERS='G*2 A*8' must name a mixer; GDN_QK_HEADS=3; GATE_WINDOW=513;
    ATTN_EXTRAS=value_embed VE_LAYERS=3,11 -> VE_LAYERS=(3, 11); ROPE_REFERENCE_LEN=1024 ROPE_DIMS=2;
    TRAIN_BATCH_TOKENS=2049 BATCH_SLICES=2 TRAIN_SEQ_LEN=2; TRAIN_BATCH_TOKENS=8192 -> TRAIN_SEQ_LEN=2048;
    TRAIN_SEQ_SCHEDULE=1024@0.5 LOADER=stream -> LOADER=packed_docs; LOOP_MIX=1,1,1 -> n + 1 numbers;
    VAL_BATCH_TOKENS=8192 -> EVAL_SEQ_LEN=2048; EVAL_STRIDE=2049;
    TTT_CHUNK_SIZE=2049 -> EVAL_SEQ_LEN=2048, and; GPTQ_RESERVE_SECONDS=600;
    AWQ_LITE_ENABLED=1 MATRIX_QUANT=rowwise EMBED_QUANT=rowwise; AWQ_LITE_BITS=6 AWQ_LITE_ENABLED=1;
    SCALE_STEP=1e-9 -> SCALE_STEP=1e-09; STAGES=train,eval -> STAGES must be train;
    EVAL=slot SLOT_CAUSAL=0 -> ALLOW_NONCAUSAL=1; TTT_CHUNK_TOKENS=2047 EVAL=chunk_sgd;
    GLOBAL_TTT_CHUNK_TOKENS=7 EVAL=phased_lora -> BATCH_SLICES=8;
    MATRIX_BITS_OVERRIDES=attn.o.weight -> attn.o.weight:7; ROTATE=hadamard_vo MODEL_DIM=384 -> power of two;
    ARTIFACT_BYTES=15000000 -> set FISHER_SCALES; TUNE_STEPS=8 REPAIR=lqer -> REPAIR=none;
    FISHER_SCALES=0.5 ROTATE=hadamard_vo;
    ATTN_EXTRAS=value_embed ROTATE=hadamard_vo; TTT_CONTEXT=carry TTT_CHUNK_SIZE=1025 -> half of TTT_EVAL_SEQ_LEN=2048;
    TTT_CONTEXT=carry TTT_WARM_START_A=1 -> TTT_WARM_START_A=0; TTT_CONTEXT=carry MIXERS=G*2_A*9 -> MIXERS without G;
    ATTN_EXTRAS=sink TTT_CONTEXT=carry; TCQ_STATES=5;
    MATRIX_QUANT=gptq_tcq MATRIX_BITS=8 COMPRESSOR=rans -> are at most 7;
    MATRIX_QUANT=gptq_tcq -> COMPRESSOR=brotli; MILESTONES=20001 ITERATIONS=20000 -> MILESTONES=(20001,);
    TTT_LORA_SITES= -> TTT_LORA_SITES is empty;
    TTT_TRAINABLE= -> TTT_TRAINABLE is empty
"""  # the other half of some predicates
SECOND_HALVES = """ROPE_DIMS=66; LOOP_END=11; TTT_CONTEXT=carry TTT_CHUNK_SIZE=7; TTT_CONTEXT=carry ROPE_DTYPE=bf16;
    MATRIX_QUANT=gptq_tcq COMPRESSOR=rans MATRIX_BITS_OVERRIDES=q:8; EMBED_QUANT=gptq_tcq COMPRESSOR=rans EMBED_BITS=8;
    EMBED_QUANT=gptq_tcq; EVAL=slot TTT_CHUNK_TOKENS=2047; MILESTONES=0,5"""
LEGAL_EXAMPLES = """
    LOOP_START=5 LOOP_END=4 NUM_LOOPS=0; LOOP_START=10 LOOP_END=10; ROPE_DIMS=64; ROPE_DIMS=0; EVAL_STRIDE=2048;
    MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=600; VAL_BATCH_TOKENS=16384;
    STAGES=train,quantize,eval; STAGES=quantize,eval; STAGES=eval; MATRIX_QUANT=gptq_tcq COMPRESSOR=rans;
    TTT_CHUNK_SIZE=7; TTT_CHUNK_SIZE=1025; TTT_WARM_START_A=1; MIXERS=G*11; ATTN_EXTRAS=sink; ROPE_DTYPE=bf16;
    EVAL=slot SLOT_CAUSAL=0 ALLOW_NONCAUSAL=1; EVAL=chunk_sgd TTT_CHUNK_TOKENS=2047 TTT_EPOCHS=0
"""


def test_illegal_pair_is_refused_by_its_own_row() -> None:
    examples = rows(ILLEGAL_EXAMPLES)
    assert len(examples) == len(train_gpt.ILLEGAL)
    for index, (text, *word) in enumerate(examples):
        environ = {name: value.replace("_A", " A") for name, value in knobs(text).items()}
        (line,) = problems(environ)
        assert (*word, text.split()[0])[0] in line, text
        values = {name.lower(): train_gpt.parse_knob(FIELDS[name], text) for name, text in environ.items()}
        hits = [i for i, (predicate, _) in enumerate(train_gpt.ILLEGAL) if predicate(Config(**values))]
        assert hits == [index], text
    for text in SECOND_HALVES.split(";"):
        assert len(problems(knobs(text))) == 1, text
    for stages in ("train", "train,quantize", "eval,quantize", "none", ""):
        assert "STAGES must be" in problems({"STAGES": stages})[0], stages


def test_values_on_the_legal_side_pass() -> None:
    for (text,) in rows(LEGAL_EXAMPLES):
        load_config(knobs(text))


# record.env of a run


FORMED = {  # knobs whose text has a form of its own, and texts of it that are legal
    "ttt_chunk_size": (always(16), (train_gpt.UpTo(256.5, 8), *always(24))),
    "train_seq_schedule": ((), (train_gpt.UpTo(0.125, 1024), train_gpt.UpTo(0.7, 512))),
    "loop_mix": ((), (1.5, 0.0, 0.0, 1e-3, 1.0, -0.25, 0.0, 0.0, 2.0, 0.0, 0.0, 1.0)),
    "matrix_bits_overrides": ((), ("mlp:7",), ("attn.o.weight:7", "blocks.[2-9].*:5")),
}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Legal configurations with some knobs changed, none of them local to a machine."""
    values = {}
    for field in dataclasses.fields(Config):
        allowed = field.metadata["allowed"]
        if field.name in train_gpt.LOCAL_KNOBS or not draw(st.booleans()):
            continue
        choices = tuple(allowed.split("|")) if "|" in allowed else ()
        limits = {sign: float(limit) for sign, limit in re.findall(r"([<>]=?) ([\d.]+)", allowed)}
        low = limits.get(">=", limits.get(">", 0.0))
        if field.type == "bool":
            values[field.name] = draw(st.booleans())
        elif field.name in FORMED:
            values[field.name] = draw(st.sampled_from(FORMED[field.name]))
        elif field.type in ("Words", "tuple[int, ...]"):
            items = range(11) if "int" in field.type else choices or ("mlp", "skips")
            values[field.name] = tuple(draw(st.lists(st.sampled_from(items), unique=True)))
        elif field.type == "str":
            values[field.name] = draw(st.sampled_from(choices or ("", "G*2 A*8 G")))
        elif field.type == "float":
            values[field.name] = draw(st.floats(low + 1e-9, limits.get("<=", 1e6)))
        else:
            values[field.name] = draw(st.integers(int(low) + 1, int(limits.get("<=", 4096))))
    cfg = Config(**values)
    while cfg.problems():  # mend by dropping what a legal pair needs
        values.pop(next(iter(values)))
        cfg = Config(**values)
    return cfg


@given(cfg=configs())
@settings(max_examples=60)
def test_record_env_reads_back_as_the_same_config(cfg: Config) -> None:
    environ = dict(line.split("=", 1) for line in record_env(cfg).splitlines())
    assert resolve(environ)[0] == cfg
    assert set(environ) == {name for name, f in FIELDS.items() if getattr(cfg, f.name) != f.default}


def test_record_env_as_a_preset_and_without_what_is_local(tmp_path: Path) -> None:
    cfg = load_config({**TINY, "AVERAGE": "none", "DATA_PATH": "d", "RUN_ID": "r", "DEVICE": "cpu", "STAGES": "eval"})
    text = record_env(cfg)
    assert "AVERAGE=none\n" in text and not re.search("^(DATA_PATH|RUN_ID|DEVICE|STAGES)=", text, re.MULTILINE)
    again = load_config({"PRESET": write_preset(tmp_path / "p", text)})
    local = {name: getattr(cfg, name) for name in train_gpt.LOCAL_KNOBS}
    assert dataclasses.replace(again, **local) == cfg


def test_records_resolve_and_each_line_differs_from_its_base_and_says_why() -> None:
    for path in PRESETS:
        *base, own = train_gpt.preset_layers(str(path.parent)).values()
        inherited = load_config(base[0] if base else {})
        cfg = load_config({"PRESET": str(path.parent)})
        idle = [key for key in own if getattr(cfg, key.lower()) == getattr(inherited, key.lower())]
        assert own and not idle, f"{path.parent.name} lists what it does not change: {idle}"
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert lines and not [line for line in lines if not re.search(r"\s# .*\w{3}", line)]
        assert sum(p.numel() for p in train_gpt.weights_of(cfg).values()) > 0


# What people read


def test_help_documents_every_knob_under_its_group() -> None:
    text = train_gpt.help_text()
    for name, field in FIELDS.items():
        entry = re.search(rf"^  {name}=(.*)\n      (.+)$", text, re.MULTILINE)
        assert entry, f"{name} is not in --help"
        assert entry[1] == train_gpt.format_knob(field.default)
        assert all(field.metadata[part] in entry[2] for part in ("doc", "allowed", "when")), name
        assert field.type in KINDS and len(field.metadata["doc"]) > 4, name
        assert train_gpt.bound_problems(field, field.default) == []
        assert train_gpt.parse_knob(field, entry[1]) == field.default
    titles = re.findall(r"^(\w[^\n]*)\n  ([A-Z0-9_]+)=", text, re.MULTILINE)
    assert [(first.lower(), title) for title, first in titles] == list(train_gpt.GROUPS.items())
    assert {*train_gpt.LOCAL_KNOBS} <= {name.lower() for name in FIELDS}


def test_explain_prints_parameters_and_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "DATA_PATH": "nowhere", "ARTIFACT_DIR": "run", "SEED": "5"}
    done = call(env, tmp_path / "run", "--explain")
    assert (done.code, done.err) == (0, "")
    (line,) = re.findall(r"^parameters .*$", done.out, re.MULTILINE)
    model = train_gpt.GPT(load_config(TINY))
    assert line == f"parameters {sum(p.numel() for p in model.parameters())}"
    assert "  SEED=5  (environment)" in done.out
    assert list(tmp_path.iterdir()) == []


def test_help_and_unknown_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ITERATIONS=20000" in train_gpt.help_text()
    assert train_gpt.main(["--trian"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: unknown argument --trian") and err.count("\n") == 1


def test_import_has_no_effect(tmp_path: Path) -> None:
    code = (
        "import os, torch\nbefore = torch.get_rng_state()\nimport train_gpt\n"
        "assert torch.equal(before, torch.get_rng_state()) and not torch.distributed.is_initialized()\n"
        "assert not torch.cuda.is_initialized() and not os.listdir()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SEED": "not a number", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_waits_for_no_torch_and_explain_for_no_compiler(tmp_path: Path) -> None:
    program = str(ROOT / "train_gpt.py")
    for argument, before, after, words in (
        ("--help", "sys.modules['torch'] = sys.modules['numpy'] = None", "pass", "ITERATIONS=20000"),
        ("--explain", "pass", "assert 'torch._dynamo' not in sys.modules", "quantisation plan"),
    ):
        code = f"""
import runpy, sys
{before}
sys.argv = [{program!r}, {argument!r}]
try:
    runpy.run_path({program!r}, run_name="__main__")
except SystemExit as ended:
    assert not ended.code
{after}
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout, f"{argument}: {done.stderr}"
