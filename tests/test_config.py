"""Config: where a value comes from, what is refused and with which words, and the texts that people read."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, UserError, load_config, record_env, resolve

FIELDS = {field.name.upper(): field for field in dataclasses.fields(Config)}
# records/<name>/run is what a run wrote
RECORDS = sorted(path for path in (ROOT / "records").glob("**/record.env") if path.parent.name != "run")
KINDS = ("bool", "int", "float", "str", "tuple[str, ...]", "tuple[int, ...]")


def write_preset(folder: Path, text: str) -> str:
    """A preset folder with this record.env; its path, as PRESET wants it."""
    folder.mkdir(exist_ok=True)
    (folder / "record.env").write_text(text, encoding="utf-8")
    return str(folder)


def problems(environ: dict[str, str]) -> list[str]:
    """The lines with which an environment is refused."""
    with pytest.raises(UserError) as refused:
        resolve(environ)
    return str(refused.value).splitlines()


# Where a value comes from


def test_default_then_preset_then_environment(tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p", "MATRIX_LR=0.5  # reason\nSEED=7  # reason\nMLP_MULT=4.0  # the default\n")
    cfg, origin = resolve({"PRESET": preset, "SEED": "8", "BETA1": "0.5", "HOME": "/"})
    assert (cfg.matrix_lr, cfg.seed, cfg.beta1, cfg.scalar_lr) == (0.5, 8, 0.5, Config().scalar_lr)
    assert origin == {"MATRIX_LR": preset, "SEED": "environment", "BETA1": "environment"}


def test_environment_can_go_back_to_the_default(tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p", "SEED=7\n")
    cfg, origin = resolve({"PRESET": preset, "SEED": str(Config().seed)})
    assert cfg == Config() and origin == {}


def test_defaults_are_a_run_that_can_start() -> None:
    assert Config().problems() == [] and resolve({}) == (Config(), {})


def test_preset_comments_blanks_and_values_with_hash(tmp_path: Path) -> None:
    text = "# SEED=1\n\n   \nSEED=2  # SEED=3\nRUN_ID=a#b # a hash inside a word is no comment\nBETA1=0.5\t# tab\n"
    assert train_gpt.read_preset(write_preset(tmp_path / "p", text)) == {"SEED": "2", "RUN_ID": "a#b", "BETA1": "0.5"}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("SEED=1\nSEED\n", "record.env:2: expected KEY=VALUE, got 'SEED'"),
        ("seed=1\n", "record.env:1: expected KEY=VALUE, got 'seed=1'"),
        ("export SEED=1\n", "record.env:1: expected KEY=VALUE"),
        ("SEED=1\n# x\nSEED=2\n", "record.env:3: SEED is set twice"),
    ],
)
def test_bad_preset_line_is_named_by_its_number(tmp_path: Path, text: str, where: str) -> None:
    assert any(where in line for line in problems({"PRESET": write_preset(tmp_path / "p", text)}))


def test_missing_preset_lists_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "none below records/" in problems({"PRESET": "records/nope"})[0]
    (tmp_path / "records").mkdir()
    write_preset(tmp_path / "records" / "here", "")
    assert "known presets: records/here" in problems({"PRESET": "records/nope"})[0]


# Names


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "p", "NOT_A_KNOB=1\nNUM_LAYERS=many\n")
    told = problems({"PRESET": preset, "TTT_LORA_RNK": "4", "MATRIX_LR": "-1", "EVAL": "best", "EMA_ENABLED": "1"})
    for start in ("NOT_A_KNOB", "NUM_LAYERS='many'", "TTT_LORA_RNK", "MATRIX_LR=-1", "EVAL='best'", "EMA_ENABLED"):
        assert sum(line.startswith(start) for line in told) == 1, start
    assert len(told) == 6


def test_misspelt_name_names_the_knob() -> None:
    assert problems({"TTT_LORA_RNK": "4"}) == ["TTT_LORA_RNK is not a knob; did you mean TTT_LORA_RANK?"]
    assert "did you mean ITERATIONS?" in problems({"ITERATION": "4"})[0]


@pytest.mark.parametrize("name", train_gpt.RENAMED)
def test_renamed_knob_says_what_to_write_now(name: str, tmp_path: Path) -> None:
    for environ in ({name: "1"}, {"PRESET": write_preset(tmp_path / "p", f"{name}=1\n")}):
        assert problems(environ) == [f"{name} is not a knob here; say {train_gpt.RENAMED[name]}"]


def test_advice_for_renamed_knobs_is_itself_right() -> None:
    for said in train_gpt.RENAMED.values():
        advised = re.match(r"([A-Z_]+)=(\S+)", said)
        if advised:
            load_config({advised[1]: advised[2]})


def test_unknown_key_is_an_error_in_a_preset_alone(tmp_path: Path) -> None:
    told = problems({"PRESET": write_preset(tmp_path / "p", "ZZZ=1\n")})
    assert told == ["ZZZ is not a knob; `python train_gpt.py --help` lists them"]
    assert load_config({"ZZZ": "1"}) == Config()


def test_preset_cannot_name_another_preset(tmp_path: Path) -> None:
    inner = write_preset(tmp_path / "inner", "SEED=7\n")
    outer = write_preset(tmp_path / "outer", f"PRESET={inner}\n")
    assert len(problems({"PRESET": outer})) == 1, "it would be ignored in silence"


def test_variables_of_shells_launchers_and_libraries_pass() -> None:
    names = (
        "PATH HOME SHELL LANG PWD USER TERM TMPDIR HOSTNAME PYTHONPATH VIRTUAL_ENV RANK LOCAL_RANK WORLD_SIZE "
        "LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID OMP_NUM_THREADS "
        "CUDA_VISIBLE_DEVICES NCCL_DEBUG HF_HOME HF_TOKEN TOKENIZERS_PARALLELISM TORCHINDUCTOR_CACHE_DIR "
        "PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR DATA_DIR MODEL_NAME SLURM_JOB_ID XDG_CACHE_HOME"
    )
    assert resolve(dict.fromkeys(names.split(), "1")) == (Config(), {})


# Values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("SEED", "12", 12),
        ("ITERATIONS", "20_000", 20_000),
        ("MATRIX_LR", "1e-3", 1e-3),
        ("MATRIX_LR", "1", 1.0),
        ("SMEAR_BOS_MASK", "0", False),
        ("SMEAR_BOS_MASK", "1", True),
        ("AVERAGE", "none", ()),
        ("AVERAGE", "", ()),
        ("STAGES", "quantize, eval", ("quantize", "eval")),
        ("VE_LAYERS", "5, 9,10", (5, 9, 10)),
        ("VE_LAYERS", "none", ()),
        ("EVAL", "plain", "plain"),
    ],
)
def test_text_becomes_the_annotated_type(name: str, text: str, value: object) -> None:
    got = getattr(load_config({name: text}), name.lower())
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SEED", "1.5"),
        ("SEED", ""),
        ("ITERATIONS", "many"),
        ("MATRIX_LR", "fast"),
        ("SMEAR_BOS_MASK", "true"),
        ("SMEAR_BOS_MASK", "yes"),
        ("LOADER", "shuffle"),
        ("STAGES", "train,test"),
        ("ATTN_EXTRAS", "xsa,sinks"),
        ("VE_LAYERS", "9,last"),
        ("VE_LAYERS", "9,9"),
        ("AVERAGE", "ema,ema"),
    ],
)
def test_wrong_value_is_one_line_with_name_and_value(name: str, text: str) -> None:
    (line,) = problems({name: text})
    assert line.startswith(f"{name}=") and all(part in line for part in text.split(","))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_no_number_that_is_not_finite(text: str) -> None:
    floats = [field for field in FIELDS.values() if field.type == "float"]
    assert floats and not [f.name for f in floats if not train_gpt.bound_problems(f, float(text))]
    assert problems({"MATRIX_LR": text})[0].startswith(f"MATRIX_LR={text}")


def just_outside(field: dataclasses.Field) -> list[object]:
    """Values past each bound of a knob, by the smallest step of its type."""
    m, step = field.metadata, 1 if field.type == "int" else 1e-6
    outside = [m["ge"] - step] if m["ge"] is not None else []
    outside += [m["gt"]] if m["gt"] is not None else []
    outside += [m["le"] + step] if m["le"] is not None else []
    return [int(v) if field.type == "int" else float(v) for v in outside]


BOUNDED = [(name, value) for name, field in FIELDS.items() for value in just_outside(field)]


@pytest.mark.parametrize(("name", "value"), BOUNDED)
def test_value_past_its_bound_is_refused(name: str, value: object) -> None:
    assert any(line.startswith(f"{name}={value} must be") for line in problems({name: train_gpt.format_knob(value)}))


@pytest.mark.parametrize(
    ("name", "choice"), [(name, c) for name, field in FIELDS.items() for c in field.metadata["choices"]]
)
def test_every_choice_is_accepted_by_its_knob(name: str, choice: str) -> None:
    field = FIELDS[name]
    value = train_gpt.parse_knob(field, choice)
    assert train_gpt.bound_problems(field, value) == [] and train_gpt.format_knob(value) == choice


# Pairs of values

ILLEGAL_EXAMPLES = (  # one environment for each row of ILLEGAL, in its order, and a word of its message
    ({"MODEL_DIM": "516"}, "MODEL_DIM=516"),
    ({"NUM_HEADS": "8", "NUM_KV_HEADS": "3"}, "NUM_KV_HEADS=3"),
    ({"ROPE_DIMS": "15"}, "ROPE_DIMS=15"),
    ({"LOOP_START": "5", "LOOP_END": "4"}, "LOOP_START=5..LOOP_END=4"),
    ({"MIXERS": "G*2 A*8"}, "MIXERS='G*2 A*8' does not give NUM_LAYERS=11"),
    ({"GDN_QK_HEADS": "3"}, "GDN_QK_HEADS=3"),
    ({"GATE_WINDOW": "513"}, "GATE_WINDOW=513"),
    ({"ATTN_EXTRAS": "value_embed", "VE_LAYERS": "3,11"}, "VE_LAYERS=(3, 11)"),
    ({"ROPE_REFERENCE_LEN": "1024", "ROPE_DIMS": "2"}, "ROPE_REFERENCE_LEN=1024"),
    ({"TRAIN_BATCH_TOKENS": "2049", "BATCH_SLICES": "2", "TRAIN_SEQ_LEN": "2"}, "TRAIN_BATCH_TOKENS=2049"),
    ({"TRAIN_BATCH_TOKENS": "8192"}, "TRAIN_SEQ_LEN=2048"),
    ({"VAL_BATCH_TOKENS": "8192"}, "EVAL_SEQ_LEN=2048"),
    ({"EVAL_STRIDE": "2049"}, "EVAL_STRIDE=2049"),
    ({"TTT_CHUNK_SIZE": "2049"}, "TTT_CHUNK_SIZE=2049"),
    ({"GPTQ_RESERVE_SECONDS": "600"}, "GPTQ_RESERVE_SECONDS=600"),
    ({"AWQ_LITE_ENABLED": "1", "MATRIX_QUANT": "rowwise", "EMBED_QUANT": "rowwise"}, "AWQ_LITE_ENABLED=1"),
    ({"AWQ_LITE_ENABLED": "1", "AWQ_LITE_BITS": "6"}, "AWQ_LITE_BITS=6"),
    ({"SCALE_STEP": "1e-9"}, "SCALE_STEP=1e-09"),
    ({"STAGES": "train,eval"}, "STAGES must be a suffix"),
    ({"EVAL": "slot", "SLOT_CAUSAL": "0"}, "ALLOW_NONCAUSAL=1"),
    ({"EVAL": "chunk_sgd", "TTT_CHUNK_TOKENS": "2047"}, "TTT_CHUNK_TOKENS=2047"),
    ({"MATRIX_BITS_OVERRIDES": "attn.o.weight"}, "attn.o.weight:7"),
    ({"ROTATE": "hadamard_vo", "MODEL_DIM": "384"}, "power of two"),
    ({"ROTATE": "hadamard_vo", "ATTN_EXTRAS": "value_embed"}, "ATTN_EXTRAS=value_embed"),
    ({"TTT_CONTEXT": "carry", "TTT_CHUNK_SIZE": "1025"}, "half of TTT_EVAL_SEQ_LEN=2048"),
    ({"TTT_CONTEXT": "carry", "TTT_WARM_START_A": "1"}, "TTT_WARM_START_A=0"),
    ({"TTT_CONTEXT": "carry", "MIXERS": "G*2 A*9"}, "MIXERS without G"),
    ({"TTT_CONTEXT": "carry", "ATTN_EXTRAS": "sink"}, "ATTN_EXTRAS=sink"),
    ({"TCQ_STATES": "5"}, "TCQ_STATES=5"),
    ({"MATRIX_QUANT": "gptq_tcq", "MATRIX_BITS": "8", "COMPRESSOR": "rans"}, "may be at most 7"),
    ({"MATRIX_QUANT": "gptq_tcq"}, "COMPRESSOR=brotli"),
    ({"TTT_LORA_SITES": ""}, "TTT_LORA_SITES is empty"),
    ({"TTT_TRAINABLE": ""}, "TTT_TRAINABLE is empty"),
)


def test_every_illegal_pair_has_an_example() -> None:
    assert len(ILLEGAL_EXAMPLES) == len(train_gpt.ILLEGAL)


@pytest.mark.parametrize("index", range(len(ILLEGAL_EXAMPLES)))
def test_illegal_pair_is_refused_by_its_own_row(index: int) -> None:
    environ, word = ILLEGAL_EXAMPLES[index]
    (line,) = problems(environ)
    assert word in line
    values = {name.lower(): train_gpt.parse_knob(FIELDS[name], text) for name, text in environ.items()}
    hits = [i for i, (predicate, _) in enumerate(train_gpt.ILLEGAL) if predicate(Config(**values))]
    assert hits == [index]


@pytest.mark.parametrize(
    "environ",
    [
        {"LOOP_START": "5", "LOOP_END": "4", "NUM_LOOPS": "0"},
        {"LOOP_START": "10", "LOOP_END": "10"},
        {"ROPE_DIMS": "64"},
        {"ROPE_DIMS": "0"},
        {"MAX_WALLCLOCK_SECONDS": "0", "GPTQ_RESERVE_SECONDS": "600"},
        {"VAL_BATCH_TOKENS": "16384"},
        {"EVAL_STRIDE": "2048"},
        *({"STAGES": stages} for stages in ("train,quantize,eval", "quantize,eval", "eval")),
    ],
)
def test_values_on_the_legal_side_pass(environ: dict[str, str]) -> None:
    load_config(environ)


@pytest.mark.parametrize(("environ", "bad"), [({"ROPE_DIMS": "66"}, True), ({"LOOP_END": "11"}, True)])
def test_second_half_of_a_predicate_is_reached(environ: dict[str, str], bad: bool) -> None:
    assert bool(problems(environ)) is bad


@pytest.mark.parametrize("stages", ["train", "train,quantize", "eval,quantize", "none", ""])
def test_only_suffixes_of_the_stages(stages: str) -> None:
    assert "STAGES must be a suffix" in problems({"STAGES": stages})[0]


# record.env of a run


FORMED = {  # knobs whose text has a form of its own, and texts of it that are legal
    "matrix_bits_overrides": ((), ("mlp:7",), ("attn.o.weight:7", "blocks.[2-9].*:5")),
}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Legal configurations with some knobs changed, none of them local to a machine."""
    values = {}
    for field in dataclasses.fields(Config):
        m, low = field.metadata, field.metadata["ge"] if field.metadata["ge"] is not None else field.metadata["gt"]
        if field.name in train_gpt.LOCAL_KNOBS or not draw(st.booleans()):
            continue
        if field.type == "bool":
            values[field.name] = draw(st.booleans())
        elif field.name in FORMED:
            values[field.name] = draw(st.sampled_from(FORMED[field.name]))
        elif field.type.startswith("tuple"):
            integers = field.type == "tuple[int, ...]"
            some = range(11) if integers else m["choices"] or ("mlp", "skips")
            values[field.name] = tuple(draw(st.lists(st.sampled_from(some), unique=True)))
        elif field.type == "str":
            values[field.name] = draw(st.sampled_from(m["choices"] or ("", "G*2 A*8 G")))
        elif field.type == "float":
            top = m["le"] if m["le"] is not None else 1e6
            values[field.name] = draw(st.floats((low or 0.0) + 1e-9, top))
        else:
            values[field.name] = draw(st.integers(int(low or 0) + 1, int(m["le"] or 4096)))
    cfg = Config(**values)
    while cfg.problems():  # mend by dropping what a legal pair needs
        values.pop(next(iter(values)))
        cfg = Config(**values)
    return cfg


@given(cfg=configs())
@settings(deadline=None, max_examples=60, derandomize=True)
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


# The records


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_record_resolves_and_each_line_is_no_default(path: Path) -> None:
    folder = str(path.parent)
    cfg, origin = resolve({"PRESET": folder})
    assert set(origin) == set(train_gpt.read_preset(folder)), "a record lists only what is not default"
    assert train_gpt.count_parameters(cfg) > 0


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_record_gives_a_reason_on_every_line(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines and not [line for line in lines if not re.search(r"\s# .*\w{3}", line)]


# What people read


def test_help_documents_every_knob_with_default_bounds_and_choices() -> None:
    text = train_gpt.help_text()
    for name, field in FIELDS.items():
        entry = re.search(rf"^  {name}=(.*)\n      (.+)$", text, re.MULTILINE)
        assert entry, f"{name} is not in --help"
        assert entry[1] == train_gpt.format_knob(field.default) and field.metadata["doc"] in entry[2]
        assert all(choice in entry[2] for choice in field.metadata["choices"])
        assert all(f"{field.metadata[k]:g}" in entry[2] for k in ("ge", "gt", "le") if field.metadata[k] is not None)
        assert field.metadata["when"] in entry[2]


@pytest.mark.parametrize("name", FIELDS)
def test_knob_has_known_type_group_doc_and_default_inside_bounds(name: str) -> None:
    field = FIELDS[name]
    assert field.type in KINDS and field.metadata["group"] and len(field.metadata["doc"]) > 4
    assert train_gpt.bound_problems(field, field.default) == []
    assert train_gpt.parse_knob(field, train_gpt.format_knob(field.default)) == field.default


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 2


def test_explain_prints_parameters_and_needs_no_data(tmp_path: Path, run_gpt: object) -> None:
    done = run_gpt("--explain", DATA_PATH=tmp_path / "nowhere", ARTIFACT_DIR=tmp_path / "run", SEED=5)
    assert done.returncode == 0 and done.stderr == ""
    (line,) = re.findall(r"^parameters .*$", done.stdout, re.MULTILINE)
    model = train_gpt.GPT(load_config(TINY))
    assert line == f"parameters {sum(p.numel() for p in model.parameters())}"
    assert "  SEED=5  (environment)" in done.stdout
    assert not (tmp_path / "run").exists() and not (tmp_path / "logs").exists()


def test_help_and_unknown_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(["--help"]) == 0 and "ITERATIONS=20000" in capsys.readouterr().out
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
