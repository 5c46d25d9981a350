#!/usr/bin/env bash
""":"
# Stage 1 (pretraining of the projector), by default the 7B run with the cropping variant. Three ways to the same run:
#   deepspeed scripts/pretrain.sh
#   deepspeed --num_gpus 2 scripts/pretrain.sh --max_steps 10
#   bash scripts/pretrain.sh --config configs/pretrain_13b_pooling.yaml
# The file is valid bash and valid Python: the deepspeed launcher runs its script with Python, for which these lines are a
# string. bash takes the two characters after the first quotes for its command that does nothing, and goes on here:
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then export PATH="$root/.venv/bin:$PATH"; fi
case " $* " in *" --help "* | *" -h "* | *" --plan "*) exec python3 "$0" "$@" ;; esac  # the launcher would look for GPUs first
if command -v deepspeed >/dev/null; then exec deepspeed "$0" "$@"; fi
exec python3 "$0" "$@"
: <<'# end'
":"""

import importlib.util
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    if importlib.util.find_spec("llava_sp") is None:
        sys.exit(f"error: {sys.executable} has no llava_sp: run `pip install -e {root}`, or activate the environment that has it")
    from llava_sp.train.__main__ import main

    sys.exit(main(default_config=root / "configs" / "pretrain_7b_cropping.yaml"))
# end
