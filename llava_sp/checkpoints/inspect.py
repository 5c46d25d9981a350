"""Reports the format and content of a checkpoint folder, whether it would load, and the lines that load it.

    python -m llava_sp.checkpoints.inspect PATH [--json]

PATH is a folder, or the file of a first stage's projector. Headers are read, not tensors, so a large checkpoint takes
no longer than a small one; of an adapter checkpoint, whose manifest records hashes, the files are hashed (about a second
per GiB). Names and shapes are compared with those of a model on the meta device, tokenizers and image settings are built
as on opening. Values (NaN, memory that was never initialised, a base's fingerprint, a base lacking weights) are checked on
opening. Nothing is downloaded.

Exit status: 0 it would load, 1 it would not (the report gives the reason), 2 not a checkpoint.
"""

from __future__ import annotations

import json
import sys

from llava_sp.common.command import command_parser, run_command


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("llava_sp.checkpoints.inspect", __doc__)
    parser.add_argument("path", metavar="PATH", help="a folder, or the file of a first stage's projector")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)

    def show() -> int:
        from llava_sp.checkpoints.inspection.report import inspect
        from llava_sp.checkpoints.inspection.text import text

        report = inspect(options.path)
        print(json.dumps(report, indent=2, default=str) if options.json else text(report))
        return 0 if report["loads"] else 1

    return run_command(show, traceback=options.traceback)


if __name__ == "__main__":
    sys.exit(main())
