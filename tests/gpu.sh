#!/usr/bin/env bash
# What only a GPU can show, in one command of at most BUDGET seconds. A part that fails stops nothing; results so far are
# in $OUT/summary.txt, which is also printed at the end, and $OUT/logs.tgz.
#   bash tests/gpu.sh
#   OUT=DIR         where results go (default /tmp/gpu_out); LOGS=DIR: where logs and runs go (default $OUT/logs); what
#                   an earlier run left in them is removed
#   BUDGET=480      seconds for everything; about 105 GiB of memory are used at once, so give a card of 80 GB fewer parts
#   DATA_PATH=DIR   shards of the contest's layout, for the run from training to the verified artifact (else left out)
#   TRAIN_S=45      seconds of that training
#   BEFORE=DIR      another checkout: its training step and evaluations are measured in the same run
#   PARTS="..."     which parts, by default all: tests eager pack step run recompute carry sdpa kernels paths before_step
#                   before_recompute before_carry step_heads step_1895 step_1182 doctor; run goes with step, pack with
#                   eager; step_heads: without the kernels of the heads; doctor wants all packages of requirements.txt
#   PY=python3      a Python with the packages of requirements.txt and a CUDA build of torch; nothing is installed
set -u
# a path that the user gives is meant from where the user stands
for name in OUT LOGS DATA_PATH BEFORE; do
  value=${!name:-}
  if [[ -n "$value" && "$value" != /* ]]; then printf -v "$name" %s "$PWD/$value"; fi
done
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
START=$(date +%s)
OUT=${OUT:-/tmp/gpu_out} BUDGET=${BUDGET:-480} TRAIN_S=${TRAIN_S:-45} PY=${PY:-python3} BEFORE=${BEFORE:-}
PARTS=${PARTS:-tests eager pack step run recompute carry sdpa kernels paths before_step before_recompute before_carry step_heads step_1895 step_1182 doctor}
LOGS=${LOGS:-$OUT/logs} DATA_PATH=${DATA_PATH:-}
if [[ -z "$BEFORE" ]]; then PARTS=$(tr ' ' '\n' <<<"$PARTS" | grep -v '^before_' | tr '\n' ' '); fi
mkdir -p "$OUT" "$LOGS"
# an earlier run's marks would end every wait at once, and its numbers would pass for this one's
rm -rf "$LOGS"/*.done "$LOGS"/*.log "$LOGS"/{summary,eager,run} "$OUT"/{summary.txt,logs.tgz}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export PYTHONPATH="$ROOT:$ROOT/data:$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-6}"

records=records/track_10min_16mb
caseops=$records/2026-04-29_CaseOps_PhasedTTT_PR1934
carry=$records/2026-11-25_CarryTTT
trellis=$records/2026-11-25_TCQ_rANS
# one micro-batch a step, as a rank of eight has it
rank_of_eight="TRAIN_BATCH_TOKENS=98304 BATCH_SLICES=1 VAL_BATCH_TOKENS=65536"
bench=tests/bench

left() { echo $((BUDGET - ($(date +%s) - START))); }
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
say() { printf '%4d s  %s\n' $(($(date +%s) - START)) "$*" | tee -a "$LOGS/summary"; }
# what comes back even if this script is killed
keep() {
  {
    cat "$LOGS/summary"
    grep -hE '^(attention|fused|carry|warm-up|training stopped|calibration|artifact|pre_quant|quantized|final|verif|WARNING|step [0-9]*0 )' "$LOGS"/*.log | cut -c1-200
    for log in "$LOGS"/*.log; do
      if grep -q '^{' "$log"; then echo "== $(basename "$log" .log)" && grep -h '^{' "$log" | cut -c1-1000; fi
    done
  } >"$OUT/summary.txt" 2>/dev/null
  tar czf "$OUT/logs.tgz" --exclude='*.pt' --exclude='*.bin' --exclude='*.pyz' -C "$(dirname "$LOGS")" "$(basename "$LOGS")" 2>/dev/null
}
# part NAME [KNOB=VALUE...] COMMAND...: in the background, with a log of its own
part() {
  local name=$1
  shift
  if ! wanted "$name"; then return 0; fi
  (
    begun=$(date +%s)
    timeout -k 5 "$(left)" env "$@" >"$LOGS/$name.log" 2>&1 &
    # the end of this shell alone would leave the command running
    trap "kill $!" TERM
    wait $!
    code=$?
    say "$name: exit $code after $(($(date +%s) - begun)) s"
    if ((code != 0)); then
      grep -hE '^[A-Za-z_.]*(Error|Exception)\b|^E   |^error:|^(FAILED|ERROR) ' "$LOGS/$name.log" | sort -u | tail -12 | cut -c1-260 | tee -a "$LOGS/summary"
    fi
    touch "$LOGS/$name.done"
  ) &
}
# wait for some parts, or until the budget is nearly spent
await() {
  for name in "$@"; do
    while wanted "$name" && [[ ! -e $LOGS/$name.done ]] && (($(left) > 8)); do sleep 0.5; done
  done
  keep
}
# the words of a command: step NAME PRESET, ttt NAME PRESET DOCUMENTS
step() { echo PRESET="$2" $rank_of_eight COMPRESSOR=brotli "$PY" "$bench/bench_gpu.py" step --steps 10 --attention fa2 --profile "$LOGS/$1"; }
ttt() { echo COMPRESSOR=brotli PRESET="$2" EVAL=doc_lora "$PY" "$bench/bench_ttt.py" --docs "$3" --variants EVAL=doc_lora --profile "$LOGS/$1"; }

"$PY" -c 'import torch, triton, numpy; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__, torch.cuda.get_device_properties(0))' 2>&1 | tee -a "$LOGS/summary"

# everything that compiles does so side by side; what is timed takes the device alone (bench.alone)
then_run=() run=()
if [[ -n "$DATA_PATH" ]]; then
  run=(DATA_PATH="$DATA_PATH" MAX_WALLCLOCK_SECONDS=$TRAIN_S GPTQ_RESERVE_SECONDS=6 WARMUP_STEPS=3 TRAIN_LOG_EVERY=50
    GPTQ_CALIBRATION_BATCHES=8 STAGES=train,quantize,eval EVAL=plain)
  if wanted run; then then_run=(--then-run); fi
else
  PARTS=${PARTS/eager/} PARTS=${PARTS/pack/}
fi
# shellcheck disable=SC2046,SC2086  (the commands are lists of words)
{
  # all stages of another record without compilation, while the others compile; 5 bits: short runs compress badly
  part eager PRESET="$trellis" $rank_of_eight ${run[@]+"${run[@]}"} ARTIFACT_DIR="$LOGS/eager" TRAIN_BATCH_TOKENS=32768 \
    MATRIX_BITS=5 COMPILE=off MAX_WALLCLOCK_SECONDS=25 "$PY" train_gpt.py
  part step ${run[@]+"${run[@]}"} ARTIFACT_DIR="$LOGS/run" $(step step "$caseops") ${then_run[@]+"${then_run[@]}"}
  part recompute $(ttt recompute "$caseops" 256)
  part carry $(ttt carry "$carry" 512)
  part sdpa "$PY" "$bench/bench_gpu.py" sdpa --steps 5
  await eager sdpa
  part tests "$PY" -m pytest -q -m gpu -n 4 --dist worksteal -p no:cacheprovider --durations=8 tests
  part pack bash -c "'$PY' pack_artifact.py pack '$LOGS/eager' &&
    '$PY' pack_artifact.py verify '$LOGS/eager/artifact.pyz' --run '$LOGS/eager' --data '$DATA_PATH'"
  await step
  if [[ -n "$BEFORE" ]]; then part before_step BENCH_PROGRAM="$BEFORE" $(step before_step "$caseops"); fi
  await recompute carry
  part kernels "$PY" "$bench/bench_gpu.py" kernels --steps 10
  part paths PRESET="$caseops" $rank_of_eight COMPRESSOR=brotli "$PY" "$bench/bench_gpu.py" calibrate head hints --steps 10
  if [[ -n "$BEFORE" ]]; then part before_carry BENCH_PROGRAM="$BEFORE" $(ttt before_carry "$carry" 512); fi
  await before_step
  if [[ -n "$BEFORE" ]]; then part before_recompute BENCH_PROGRAM="$BEFORE" $(ttt before_recompute "$caseops" 256); fi
  part step_heads FUSED_ROTARY_ENABLED=0 FUSED_XSA_ENABLED=0 $(step step_heads "$caseops")
  part step_1895 $(step step_1895 "$records/2026-04-28_GDN_Hybrid_PR1895")
  part step_1182 $(step step_1182 "$records/2026-03-31_XSA7_Ngram_TTT_PR1182")
  await tests kernels paths pack step_heads step_1895 step_1182 before_carry before_recompute
  # bandwidth and matmuls against the card's figures: alone
  part doctor "$PY" records/doctor.py
  await doctor
}
say "done, $(left) s left"
# what this script started and nothing else
kill $(jobs -p) 2>/dev/null
wait
keep
cat "$OUT/summary.txt"
