"""Spatial feature extraction as matrix products against the same as convolutions, at the paper's widths.

    python benchmarks/projector.py [--batch 1 4 16] [--dtype float32 bfloat16] [--variant cropping pooling] [--repeats 5]

Both run in this process on the same weights: "product" is `llava_sp.model.projector`, "conv2d" calls
`torch.nn.functional.conv2d` with kernel k on each k x k window. Measured for the extractor alone (the six scales) and for
the whole projector (with integrator and patch MLP), forward and forward + backward: median time, and the peak of memory
in use above what the weights take. Prints a table, writes JSON to `benchmarks/results/`. Random weights, 24 x 24 x 1024
patches, extractor width 512, language width 4096; needs about 12 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from frame import RESULTS, default_device, machine, peak_and_seconds, seconds

VARIANTS = ("cropping", "pooling")
KINDS = ("extractor", "projector")
PASSES = ("forward", "forward+backward")
SLOW_SECONDS = 10


def build(variant: str, kind: str, dtype: torch.dtype, device: str):
    from transformers import CLIPVisionConfig, LlamaConfig

    from llava_sp import LlavaSPConfig
    from llava_sp.model.projector import SpatialProjector

    vision = CLIPVisionConfig(hidden_size=1024, image_size=336, patch_size=14, num_attention_heads=16)
    config = LlavaSPConfig(vision_config=vision, text_config=LlamaConfig(), spatial_variant=variant)
    projector = SpatialProjector(config)
    torch.manual_seed(0)
    projector.reset_parameters()
    assert projector.spatial is not None
    module = projector.spatial.extractor if kind == "extractor" else projector
    return module.to(device, dtype)


def convolve(self, windows: torch.Tensor) -> torch.Tensor:
    """What WindowProjection.forward replaces: conv2d over each window, [..., W, W, C] -> [..., K]."""
    leading = windows.shape[:-3]
    images = windows.flatten(0, -4).permute(0, 3, 1, 2).contiguous()
    return F.conv2d(images, self.weight).flatten(1).unflatten(0, leading)


def convolve_grid(self, features_BSK: torch.Tensor, patches_BGGC: torch.Tensor) -> torch.Tensor:
    """The integrator with its context as one strided convolution of the grid, as the original computes it."""
    context = F.conv2d(patches_BGGC.permute(0, 3, 1, 2).contiguous(), self.context.weight, stride=self.stride)
    context = context.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(self.query(features_BSK), self.key(context), self.value(context))


def use_convolutions() -> None:
    from llava_sp.model.projector import DetailFeatureIntegrator, WindowProjection

    WindowProjection.forward = convolve  # type: ignore[method-assign]
    DetailFeatureIntegrator.forward = convolve_grid  # type: ignore[method-assign]


def one_pass(module, patches: torch.Tensor, backward: bool) -> None:
    if not backward:
        with torch.inference_mode():
            module(patches)
        return
    module(patches).float().square().mean().backward()
    for parameter in module.parameters():
        parameter.grad = None


def run_case(case: dict) -> dict:
    """All passes of one (method, variant, kind, dtype, batch), in a process of its own so that peaks are its own."""
    if case["method"] == "conv2d":
        use_convolutions()
    dtype, device = getattr(torch, case["dtype"]), case["device"]
    module = build(case["variant"], case["kind"], dtype, device)
    shape = (case["batch"], 24, 24, 1024) if case["kind"] == "extractor" else (case["batch"], 576, 1024)
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    rows = {}
    for name in PASSES:
        backward = name != "forward"
        peak, first = peak_and_seconds(partial(one_pass, module, patches, backward), device)
        # The first pass warms up; where it took long, it is the measurement.
        slow = device == "cpu" and first > SLOW_SECONDS
        again = partial(one_pass, module, patches, backward)
        times = [first] if slow else [seconds(again, device) for _ in range(case["repeats"])]
        rows[name] = {"ms": 1e3 * statistics.median(times), "runs": len(times), "peak_mib": peak / 2**20}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/projector_<device>.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(json.loads(arguments.case))))
        return

    output = arguments.output or RESULTS / f"projector_{arguments.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    print(
        f"{'part':10} {'variant':9} {'dtype':9} {'batch':>5} {'pass':17} {'conv2d':>11} {'product':>11} {'faster':>8} {'peak MiB':>15}"
    )
    for kind in arguments.kind:
        for variant in arguments.variant:
            for dtype in arguments.dtype:
                for batch in arguments.batch:
                    rows += compare(kind, variant, dtype, batch, arguments)
                    # After every case: the convolutions take minutes, and what was measured is kept.
                    output.write_text(json.dumps({"machine": machine(arguments.device), "rows": rows}, indent=1) + "\n")
    print(f"written to {output}")


def compare(kind: str, variant: str, dtype: str, batch: int, arguments) -> list[dict]:
    case = {"kind": kind, "variant": variant, "dtype": dtype, "batch": batch}
    results = {}
    for method in ("conv2d", "product"):
        text = json.dumps(case | {"method": method, "repeats": arguments.repeats, "device": arguments.device})
        command = [sys.executable, __file__, "--case", text]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[method] = json.loads(output.splitlines()[-1])
    rows = []
    for name in PASSES:
        old, new = results["conv2d"][name], results["product"][name]
        rows.append(case | {"pass": name, "conv2d": old, "product": new, "speedup": old["ms"] / new["ms"]})
        print(
            f"{kind:10} {variant:9} {dtype:9} {batch:5} {name:17} {old['ms']:8.1f} ms {new['ms']:8.1f} ms "
            f"{old['ms'] / new['ms']:7.1f}x {old['peak_mib']:6.0f} -> {new['peak_mib']:5.0f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
