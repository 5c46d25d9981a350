#!/usr/bin/env bash
# Runs a benchmark, or all of them, on all visible GPUs, one process each; on a machine without, in one process.
#   bash scripts/eval/launch.sh NAME [arguments of python -m llava_sp.eval.NAME]
#   bash scripts/eval/launch.sh all --data ROOT --model M [arguments of python -m llava_sp.eval --all]
# NPROC=2 sets the number of processes. Relative paths are relative to where you are.
set -euo pipefail
name="${1:?which benchmark? for example: bash scripts/eval/launch.sh vqav2 --model M --data D --output O}"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${LLAVA_SP_ENV:-}" != current ] && [ -x "$root/.venv/bin/python" ]; then export PATH="$root/.venv/bin:$PATH"; fi
python="$(command -v python || command -v python3)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ "$name" = all ]; then set -- llava_sp.eval --all "$@"; else set -- "llava_sp.eval.$name" "$@"; fi
if [ -z "${NPROC:-}" ]; then
  NPROC=1
  if command -v nvidia-smi >/dev/null; then
    NPROC="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
  fi
fi
if [ "$NPROC" -gt 1 ]; then
  exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m "$@"
fi
exec "$python" -m "$@"
