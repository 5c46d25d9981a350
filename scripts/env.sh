# Sourced by the other scripts: `setup_env EXTRAS` makes the environment in .venv and installs the package with these extras.
#
# Nothing is done twice: a stamp remembers what was installed from which pyproject.toml and constraints.txt.
#   PYTHON=python3.12 bash scripts/...           another interpreter for a new .venv
#   LLAVA_SP_ENV=current bash scripts/...        use the Python environment that is active, install nothing

setup_env() {
  local extras="$1" root stamp wanted python="${PYTHON:-python3}"
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [ "${LLAVA_SP_ENV:-}" = current ]; then
    echo "Using the active environment: $(command -v python)"
    return
  fi
  if [ ! -x "$root/.venv/bin/python" ]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "$python is older than 3.10, or not there: install CPython 3.10 or newer, or name one with PYTHON=..." >&2
      return 1
    fi
    echo "Making an environment in $root/.venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || { rm -rf "$root/.venv"; return 1; }
  fi
  export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
  stamp="$root/.venv/installed-$extras"
  wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing llava_sp[$extras] and what it needs (PyTorch is several GB the first time)"
    (
      set -o pipefail
      python -m pip install --disable-pip-version-check --constraint "$root/constraints.txt" --editable "$root[$extras]" |
        { grep -v "^Requirement already satisfied" || true; }
    ) || return 1
    echo "$wanted" >"$stamp"
  fi
}
