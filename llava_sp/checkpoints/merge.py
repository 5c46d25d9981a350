"""Merge LoRA into its base: an adapter checkpoint becomes a full one that needs neither base nor PEFT.

    python -m llava_sp.checkpoints.merge ADAPTER --to DST [--language-model B] [--vision-tower V] [--dtype bfloat16]

ADAPTER is a checkpoint that `LlavaSPForCausalLM.from_pretrained` opens with LoRA. The model is in memory once: opened,
merged layer by layer in place, written in shards, freed, opened again from the disk, and compared. DST appears, by a
rename, when all of that is done; `merged.json` in it, written last, records what was merged and the proof.

Each layer is merged by PEFT in float32 and then rounded once. PEFT by itself rounds twice in 16 bit: LoRA's product, and
its sum with the weight.

The proof has two parts, since 16-bit logits differ by rounding alone, which hides a small LoRA.

    logits   of a fixed image and text, at all text positions, largest difference against largest logit. Allowed: 1e-4 in
             float32, where only the order of sums differs; 16 steps of the type in 16 bit (bfloat16 0.125, float16
             0.016), as both models round every activation of every layer, differently. This shows that all parts are
             present and in the right position.
    layers   every merged layer's output for a fixed vector, in float32. The share of LoRA in it must be 1, within
             0.01 and six standard deviations of the effect of rounding: 0 means not merged, 2
             twice. Rounding averages out over a layer's outputs, so this is far more sensitive than 16-bit logits.
"""

from __future__ import annotations

import sys
from typing import Any

from llava_sp.common.command import command_parser, fitting, run_command
from llava_sp.common.files import readable
from llava_sp.common.schema import SIZE


def report(record: dict[str, Any], to: str) -> str:
    """What was merged and the figures of the proof, in a few lines."""
    lora, logits, layers = record["lora"], record["proof"]["logits"], record["proof"]["layers"]
    files = record["weights"]["files"]
    lines = [
        f"merged  {lora['layers']} layers, r {lora['r']}, alpha {lora['alpha']}: {', '.join(lora['targets'])}",
        f"logits  at {logits['tokens']} positions differ by {logits['largest_difference']:.2g} at most, "
        f"{logits['largest_relative_difference']:.1e} of the largest ({record['dtype']} allows "
        f"{logits['allowed_relative_difference']:.1e}); same next token at {logits['same_next_token']}",
    ]
    if layers["found"]:
        lines.append(
            f"layers  {layers['found']} hold {layers['least_share']:.4f} to {layers['largest_share']:.4f} of LoRA"
        )
    if layers["below_rounding"]:
        lines.append(f"        in {layers['below_rounding']}, LoRA is smaller than the rounding of {record['dtype']}")
    size = sum(files.values())
    lines.append(f"done    {to}: {readable(size)} in {len(files)} files, {record['seconds']:.0f} s")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("llava_sp.checkpoints.merge", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="checkpoint with LoRA: a folder or a hub id")
    parser.add_argument("--to", required=True, metavar="DST", help="new folder for the full checkpoint")
    parser.add_argument("--language-model", help="language model, instead of the recorded one")
    parser.add_argument("--vision-tower", help="vision tower, instead of the recorded one")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the result; auto: the adapter's own",
    )
    parser.add_argument(
        "--max-shard-size", type=fitting(SIZE), default="5GB", help="of one weight file (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where to merge: cpu, cuda (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    traceback = options.pop("traceback")

    def write() -> None:
        from llava_sp.checkpoints.writing.merging import give_back_freed_tensors, merge

        give_back_freed_tensors()
        print(report(merge(**options), options["to"]))

    return run_command(write, traceback=traceback, clean_up_on_sigterm=True)


if __name__ == "__main__":
    sys.exit(main())
