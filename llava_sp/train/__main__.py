"""Train from a configuration.

    python -m llava_sp.train --config configs/finetune_lora_7b_cropping.yaml --max_steps 10
    deepspeed scripts/finetune_lora.sh --max_steps 10
    torchrun --nproc-per-node 8 -m llava_sp.train --config ...

Keys are the fields of llava_sp/config/arguments.py and of transformers.TrainingArguments, and the spatial_* and fusion_* of
LlavaSPConfig; configs/ holds the shipped runs. The same command again resumes the run; a finished run is only reported.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_sp.common.command import command_parser, run_command
from llava_sp.common.processes import Processes


def main(words: Sequence[str] | None = None, default_config: Path | None = None) -> int:
    """Entry point of the scripts and of `python -m llava_sp.train`. Returns the exit status."""
    parser = command_parser("llava_sp.train", __doc__, usage="%(prog)s [--config FILE.yaml] [--key value ...]")
    otherwise = f"; default {default_config}" if default_config else ""
    parser.add_argument(
        "--config", type=Path, default=default_config, required=not default_config, help=f"YAML{otherwise}"
    )
    options, overrides = parser.parse_known_args(words)
    try:
        here = Processes.from_environment()
    except ValueError as error:
        parser.error(str(error))
    level = logging.INFO if here.is_main else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level)
    logging.getLogger("llava_sp").setLevel(level)

    def action() -> None:
        from llava_sp.train.run import train

        train(options.config, overrides)

    words_at_end = "interrupted; the same command resumes from the newest checkpoint"
    return run_command(action, traceback=options.traceback, processes=here, on_interrupt=words_at_end)


if __name__ == "__main__":
    sys.exit(main())
