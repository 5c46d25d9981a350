"""Train from a configuration.

    python -m llava_sp.train --config configs/finetune_lora_7b_cropping.yaml --max_steps 10
    deepspeed scripts/finetune_lora.sh --max_steps 10
    torchrun --nproc-per-node 8 -m llava_sp.train --config ...
    python -m llava_sp.train --config ... --plan --gpu h200 --processes 8    what it will need: memory, steps, hours

Keys are the fields of llava_sp/config/arguments.py and of transformers.TrainingArguments, and the spatial_* and fusion_* of
LlavaSPConfig; configs/ holds the shipped runs. The same command again resumes the run; a finished run is only reported.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava_sp.common.command import at_once, command_parser, run_command, share_of_peak
from llava_sp.common.processes import Processes


def main(words: Sequence[str] | None = None, default_config: Path | None = None) -> int:
    """Entry point of the scripts and of `python -m llava_sp.train`. Returns the exit status."""
    parser = command_parser("llava_sp.train", __doc__, usage="%(prog)s [--config FILE.yaml] [--key value ...]")
    otherwise = f"; default {default_config}" if default_config else ""
    parser.add_argument(
        "--config", type=Path, default=default_config, required=not default_config, help=f"YAML{otherwise}"
    )
    parser.add_argument("--plan", action="store_true", help="print what the run needs, and end; nothing is loaded")
    planning = parser.add_argument_group("with --plan")
    planning.add_argument("--gpu", help="h200, h100, a100-40, 4090-24, ...; default: the one here")
    planning.add_argument("--processes", type=at_once, help="GPUs; default: those of the launcher")
    planning.add_argument("--mfu", type=share_of_peak, help="useful share of the GPU's peak; default 0.4")
    planning.add_argument("--log", type=Path, help="log.jsonl of a run, for the hours at its speed")
    options, overrides = parser.parse_known_args(words)
    given = [f"--{name}" for name in ("gpu", "processes", "mfu", "log") if getattr(options, name) is not None]
    if given and not options.plan:
        parser.error(f"{given[0]} needs --plan")
    try:
        here = Processes.from_environment()
    except ValueError as error:
        parser.error(str(error))
    level = logging.INFO if here.is_main else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level)
    logging.getLogger("llava_sp").setLevel(level)

    def action() -> None:
        if options.plan:
            if here.is_main:
                print_plan(options, overrides, here.world_size)
            return
        from llava_sp.train.run import train

        train(options.config, overrides)

    words_at_end = "interrupted; the same command resumes from the newest checkpoint"
    return run_command(action, traceback=options.traceback, processes=here, on_interrupt=words_at_end)


def print_plan(options: Namespace, overrides: list[str], world_size: int) -> None:
    from llava_sp.train.plan import MFU, plan_of

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # a plan needs no other process
        os.environ.pop(name, None)
    plan = plan_of(options.config, overrides, options.gpu, options.processes or world_size)
    print(plan.text(options.mfu or MFU, options.log))


if __name__ == "__main__":
    sys.exit(main())
