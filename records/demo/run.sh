#!/usr/bin/env bash
# The main job on the embedded default: sample text -> training -> quantisation -> evaluation -> packed artifact ->
# verification -> table and picture.
#   bash records/demo/run.sh
#   ITERATIONS=50 bash records/demo/run.sh     any knob of train_gpt.py passes through (python train_gpt.py --help); over a
#                                              finished run with other knobs: OVERWRITE=1, or another ARTIFACT_DIR
#   NPROC=2 bash records/demo/run.sh           the same under torchrun with so many processes
#   DATA_PATH=data/sp8192 VOCAB_SIZE=8192 bash ...   other shards than the sample
#   ARTIFACT_DIR=DIR bash ...                  another run directory than records/demo/run
#   VENV, PYTHON                               see records/setup_env.sh
set -euo pipefail
begun=$SECONDS

# A path that the user gives is meant from where the user stands.
for name in DATA_PATH TOKENIZER_PATH MODEL_PATH ARTIFACT_DIR SCORES; do
  value="${!name:-}"
  if [[ -n "$value" && "$value" != /* ]]; then
    export "$name=$PWD/$value"
  fi
done
source "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh"
cd "$ROOT"

record=records/demo
nproc="${NPROC:-1}"
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || die "NPROC=$nproc: give the number of processes, for example NPROC=2"
export PRESET="$record"
export ARTIFACT_DIR="${ARTIFACT_DIR:-$record/run}"
export SCORES="${SCORES:-$ARTIFACT_DIR/scores.after}" # the loss of each token, for the report

# Runs one numbered step, shows its command and its time; the first step that fails ends the job.
step_number=0
step() {
  local title="$1" since=$SECONDS
  shift
  step_number=$((step_number + 1))
  printf '\n== step %d of 5: %s\n   %s\n' "$step_number" "$title" "$*"
  "$@" || {
    local status=$?
    echo "error: step $step_number ($title) failed with exit status $status; what earlier steps wrote is kept" >&2
    exit "$status"
  }
  printf -- '-- step %d took %d s\n' "$step_number" $((SECONDS - since))
}

if [[ -n "${DATA_PATH:-}" ]]; then
  [[ -d "$DATA_PATH" ]] || die "DATA_PATH=$DATA_PATH is no directory"
  step "data" echo "using $DATA_PATH as given"
else
  vocab_size="${VOCAB_SIZE:-$(sed -n 's/^VOCAB_SIZE=\([0-9]*\).*/\1/p' "$record/record.env")}"
  [[ -n "$vocab_size" ]] || die "$record/record.env names no VOCAB_SIZE"
  export DATA_PATH="data/sample${VOCAB_SIZE:+_sp$VOCAB_SIZE}" # a tokenizer of another size gets a directory of its own
  if [[ -f "$DATA_PATH/manifest.json" ]]; then # written last, so the rest is complete
    step "sample data" echo "$DATA_PATH is already there"
  else
    step "sample data from the documentation that Python carries" \
      "$PY" data/prepare.py sample --out "$DATA_PATH" --vocab-size "$vocab_size"
  fi
fi

launcher=("$PY")
if [[ "$nproc" != 1 ]]; then
  launcher=("$PY" -m torch.distributed.run --standalone --nproc_per_node="$nproc")
fi
step "train, quantise, evaluate" "${launcher[@]}" train_gpt.py
step "pack" "$PY" pack_artifact.py pack "$ARTIFACT_DIR"
step "verify the artifact in an empty directory" \
  "$PY" pack_artifact.py verify "$ARTIFACT_DIR/artifact.pyz" --run "$ARTIFACT_DIR" --data "$DATA_PATH" --nproc "$nproc"
step "report" "$PY" "$record/report.py" "$ARTIFACT_DIR"
echo "total: $((SECONDS - begun)) s (installation included); everything is in $ARTIFACT_DIR"
