#!/usr/bin/env bash
# What has to be clean before a commit: format, lint, types. Run by .ci/run and by pre-commit.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"
setup_env dev
cd "$root"
ruff format --check .
ruff check .
mypy
