#!/usr/bin/env bash
# Train LLaVA-SP in both stages and score it on the embedded default, on a laptop, in minutes:
#   bash scripts/quickstart.sh [--variants cropping] [--seeds 0 1 2] [--output DIR] ...
# Makes its environment (.venv) first; can be run again, and from any directory. Arguments go to
# python -m llava_sp.shapes.quickstart; without --output everything goes to runs/quickstart of the repository.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"
setup_env shapes
case " $* " in
  *" --output"*) ;;
  *) set -- --output "$root/runs/quickstart" "$@" ;;
esac
exec python -m llava_sp.shapes.quickstart "$@"
