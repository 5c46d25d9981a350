#!/usr/bin/env bash
# VQAv2 on all visible GPUs (one process on a laptop), from any directory:
#   bash scripts/eval/vqav2.sh --model M --data D --output O [--split val|test-dev]
# Without arguments: the 7B fine-tuning run and LLaVA's ./playground/data/eval/vqav2, each settable.
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" vqav2 "$@"
