#!/usr/bin/env bash
# Every benchmark whose data are below ROOT, on all visible GPUs (one process on a laptop), from any directory:
#   bash scripts/eval/all.sh --data ROOT --model M [--output O] [--only NAME ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" all "$@"
