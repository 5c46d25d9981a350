#!/usr/bin/env bash
# Makes the environment if there is none, then passes the tests. Arguments go to pytest:
#   bash scripts/test.sh                 the default set: CPU, no network, some minutes
#   bash scripts/test.sh -m slow         what takes longer
#   bash scripts/test.sh -m gpu          what needs a CUDA GPU
#   bash scripts/test.sh tests/model -k cropping
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"
setup_env dev
cd "$root"
echo "Running the tests"
exec python -m pytest "$@"
