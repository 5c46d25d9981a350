"""Time of a forward pass at a length, and padded to a multiple: kernels are chosen by divisibility.

    python benchmarks/lengths.py                            decoder layers at the width of 7B, random weights, on a CPU
    python benchmarks/lengths.py --device cuda --backward   on a GPU, with the backward pass

Prompts are padded on the left with an attention mask, as for generation. Each repeat measures a length as it is and all its
multiples, one after the other; a ratio is the median of those within the repeats, below 1 where padding gains.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from frame import own_seconds, write_results
from lora import SIZES, Layer

from llava_sp.common.command import command_parser, count, run_command

MULTIPLES = (1, 8, 16, 64, 128)


def padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def passes(layer: Layer, length: int, options: Namespace) -> dict[int, Any]:
    """A pass of `length` tokens by the multiple that it is padded to; equal lengths are one pass."""
    import torch

    found: dict[int, Any] = {}
    for multiple in MULTIPLES:
        whole = padded(length, multiple)
        x = layer.inputs(whole, options.batch, requires_grad=options.backward)
        mask = torch.ones(options.batch, whole, dtype=torch.long, device=options.device)
        mask[:, : whole - length] = 0

        def one(x: Any = x, mask: Any = mask) -> None:
            with torch.set_grad_enabled(options.backward):
                result = layer(x, mask)
                if options.backward:
                    result.float().sum().backward()

        found[multiple] = one
    return found


def measure(options: Namespace, dtype: str) -> list[dict[str, Any]]:
    import torch

    layer = Layer(options.size, getattr(torch, dtype), options.device, options.layers)
    rows = []
    for length in options.lengths:
        ways = passes(layer, length, options)
        times: dict[int, list[float]] = {multiple: [] for multiple in MULTIPLES}
        for turn in range(options.repeats + 1):
            for multiple, one in ways.items():
                spent = own_seconds(one, options.device)
                if turn:  # the first one warms up
                    times[multiple].append(spent)
        rows.append(
            {
                "dtype": dtype,
                "length": length,
                "ms": {str(multiple): 1e3 * statistics.median(times[multiple]) for multiple in MULTIPLES},
                "ratio": {
                    str(multiple): statistics.median(a / b for a, b in zip(times[multiple], times[1]))
                    for multiple in MULTIPLES
                },
            }
        )
        ratios = " ".join(f"{rows[-1]['ratio'][str(multiple)]:8.3f}" for multiple in MULTIPLES[1:])
        print(f"{dtype:9} {length:7} {rows[-1]['ms']['1']:9.1f} {ratios}", flush=True)
    return rows


def main() -> int:
    parser = command_parser("", __doc__, usage="python benchmarks/lengths.py [options]")
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--lengths", type=count, nargs="+", default=[646, 648, 701, 1023])
    parser.add_argument("--layers", type=count, default=1)
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    parser.add_argument("--backward", action="store_true", help="as in training, to the layer's input")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/lengths_<device>.json")
    options = parser.parse_args()
    return run_command(lambda: report(options), traceback=options.traceback)


def report(options: Namespace) -> None:
    """Measure, print the table and write the JSON."""
    print(f"{'dtype':9} {'length':>7} {'ms':>9} " + " ".join(f"{f'/ {multiple}':>8}" for multiple in MULTIPLES[1:]))
    rows = [row for dtype in options.dtype for row in measure(options, dtype)]
    write_results("lengths", options, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
