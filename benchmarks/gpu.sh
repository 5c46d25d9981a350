#!/usr/bin/env bash
# All that only a CUDA GPU can show, in parts of a few minutes each, on random weights at real size; see gpu.py.
#   bash benchmarks/gpu.sh                          all parts that are not done yet
#   bash benchmarks/gpu.sh --part 3                 one part, again
#   bash benchmarks/gpu.sh --size tiny --device cpu the same code on a CPU, to see that it works
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec python3 "$root/benchmarks/gpu.py" "$@"
