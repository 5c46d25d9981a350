"""Convert between any supported formats that can hold the model; weights are copied bit for bit.

    python -m llava_sp.checkpoints.convert --from SRC [--language-model B] [--vision-tower V] --to DST [--format FORMAT]

    llava_sp    an adapter checkpoint of ours from a LoRA folder or a first stage's projector, else a full one
    original    for the original code: a LoRA folder from an adapter checkpoint, model.bin (mm_projector.bin without
                spatial tokens) from one without LoRA, else a full model with all its parts
    llava_hf    transformers' LLaVA, for full models without spatial tokens

Without --format: llava_sp, and original for our formats. To `llava_sp` the source is opened on its backbones, so it is
known to open; to `original` tensors are renamed and copied, and no backbone is needed. Embedding rows from the placeholder on,
not vocabulary, are kept: the original code drops them on opening a full model. `original` is for transformers 4.37 and
PEFT 0.4 to 0.8; a model that these cannot hold is not supported.
"""

from __future__ import annotations

import sys

from llava_sp.common.command import command_parser, fitting, run_command
from llava_sp.common.schema import SIZE


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("llava_sp.checkpoints.convert", __doc__)
    parser.add_argument(
        "--from", dest="source", required=True, metavar="SRC", help="a checkpoint: folder, file or hub id"
    )
    parser.add_argument("--to", required=True, metavar="DST", help="new folder")
    parser.add_argument(
        "--format",
        dest="target",
        choices=("llava_sp", "original", "llava_hf"),
        help="default: llava_sp, and original for our formats",
    )
    parser.add_argument("--language-model", help="language model, instead of the recorded one")
    parser.add_argument("--vision-tower", help="vision tower, instead of the recorded one")
    parser.add_argument(
        "--max-shard-size", type=fitting(SIZE), default="5GB", help="of one weight file (default: %(default)s)"
    )
    options = vars(parser.parse_args(arguments))
    traceback = options.pop("traceback")

    def write() -> None:
        from llava_sp.checkpoints.writing.conversion import convert

        print(f"{options['to']}: {convert(**options)}")

    return run_command(write, traceback=traceback, clean_up_on_sigterm=True)


if __name__ == "__main__":
    sys.exit(main())
