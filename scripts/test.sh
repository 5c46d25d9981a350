#!/usr/bin/env bash
# Makes the environment if there is none, then passes the tests. Arguments go to pytest:
#   bash scripts/test.sh                 the default set: CPU, no network, some minutes
#   bash scripts/test.sh -m slow         what takes longer
#   bash scripts/test.sh -m gpu          what needs a CUDA GPU
#   bash scripts/test.sh tests/model -k cropping
#   bash scripts/test.sh -n 0            in one process (else one for each core, four at most)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"
setup_env dev
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')"
python -c 'import xdist' 2>/dev/null && set -- --numprocesses "$workers" --dist loadfile "$@"
echo "Running the tests"
exec python -m pytest "$@"
