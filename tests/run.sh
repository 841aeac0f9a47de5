#!/usr/bin/env bash
# All set-up, the linter and the formatter's check, then the tests. Arguments go to pytest: bash tests/run.sh -k style -x
#   VENV, PYTHON   see records/setup_env.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../records/setup_env.sh"
cd "$ROOT"

echo "ruff check ."
"$PY" -m ruff check . || die "ruff found the problems above; the tests were not run"
echo "ruff format --check ."
"$PY" -m ruff format --check . || die "the files above are not formatted: run \`ruff format .\`; the tests were not run"

marks=()
if [[ "$("$PY" -c 'import torch; print(torch.cuda.is_available())')" != True ]]; then
  marks=(-m "not gpu")
  echo "no CUDA device: tests marked gpu are left out"
fi
# a process for each processor, which take tests off one another's hands at the end (the slow files come last), and one
# thread in each, or their threads wait for each other
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
options=(-q -n auto --dist worksteal ${marks[@]+"${marks[@]}"} "$@")
printf 'pytest'
printf ' %q' "${options[@]}"
echo
exec "$PY" -m pytest "${options[@]}"
