# Sourced by tests/run.sh and by the run.sh of each record: makes or reuses a virtual environment and brings it to requirements.txt.
#   VENV    where it lies (default: .venv in the repository)
#   PYTHON  which interpreter makes it (default: the first of python3, python, python3.14 ... python3.11 that is new enough)
# Afterwards ROOT is the repository, PY the interpreter of the environment. pip's own variables (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL ...) work as usual, for example to take the smaller CPU-only torch from PyTorch's index.

ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
PY="$VENV/bin/python"

die() {
  echo "error: $*" >&2
  exit 2
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the interpreter to build the environment with. One that the user names is never replaced by another.
find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON: no such program"
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); version 3.11 or newer is needed"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found (python3 is $(python3 --version 2>&1 || true)); install one, or name it with PYTHON=/path/to/python3.12"
}

make_venv() {
  local python
  python="$(find_python)" || exit $?
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python has no venv module; install it (Debian and Ubuntu: apt install python3-venv), or name another interpreter with PYTHON="
  echo "environment: making $VENV with $("$python" --version)"
  if ! "$python" -m venv "$VENV"; then
    rm -rf "$VENV" # only ever a directory that this very run has begun
    die "could not make a virtual environment in $VENV (the lines above say why)"
  fi
  echo '*' >"$VENV/.gitignore" # an environment inside the repository must not show up in git under any name
}

# What an installed environment was made from: this requirements.txt, this interpreter.
requirements_stamp() {
  "$PY" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0])' \
    "$ROOT/requirements.txt"
}

install_requirements() {
  local stamp_file="$VENV/.requirements.sha256" stamp
  stamp="$(requirements_stamp)"
  if [[ -f "$stamp_file" && "$(cat "$stamp_file")" == "$stamp" ]]; then
    echo "environment: $VENV is up to date with requirements.txt"
    return
  fi
  "$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip --upgrade ||
    die "$VENV has no pip and none could be put there; remove it and run the command again"
  echo "environment: installing requirements.txt into $VENV (the first time this downloads torch and takes minutes)"
  "$PY" -m pip install --disable-pip-version-check -r "$ROOT/requirements.txt" ||
    die "pip could not install requirements.txt (the lines above say why); nothing else was changed, run the command again"
  echo "$stamp" >"$stamp_file" # last, so that an interrupted installation is taken up again
}

# one start at a time: another would find half an environment here, or remove the one that this one is making
exec 9<"$ROOT/requirements.txt"
if command -v flock >/dev/null && ! flock -n 9; then
  echo "environment: another start is at work on it; waiting"
  flock 9 || true # a file system without locks
fi
if [[ -e "$VENV" && ! -x "$PY" && -n "$(ls -A "$VENV")" ]]; then
  die "$VENV exists but is no virtual environment (no bin/python); remove it or choose another place with VENV="
fi
[[ -x "$PY" ]] || make_venv
is_new_enough "$PY" || die "$VENV holds $("$PY" --version 2>&1); version 3.11 or newer is needed: remove it or choose another place with VENV="
install_requirements
exec 9<&-
