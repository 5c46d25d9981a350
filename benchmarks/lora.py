"""What LoRA costs over the frozen base, on one decoder layer at the real width of 7B, and what can be saved exactly.

    python benchmarks/lora.py                         r 128 on seven projections, 256 tokens, forward and backward
    python benchmarks/lora.py --device cuda --tokens 4096 --dtype bfloat16

Rows: the frozen layer (backward to its input only), PEFT as a run uses it, without dropout, and each saving on top of that. In
bfloat16 LoRA's weights are float32 under autocast, as in a run without DeepSpeed, and bfloat16 in the last two rows, as in a run with it.
Every repeat measures all rows, one after the other; ratios are of pairs within a repeat. "saved" are the bytes kept for the
backward pass. "difference" is that of gradients from the row `no dropout` of the same weights, relative to the largest.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frame import own_seconds, write_results

from llava_sp.common.command import command_parser, count, run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # that share an input
COMPARED = ("+ casts shared", "+ A in one", "16 bit")  # rows that compute what `no dropout` computes
SIZES = {"7b": (4096, 11008, 32), "tiny": (64, 172, 4)}  # hidden, intermediate, heads


class Layer:
    """A decoder layer with random frozen weights, and what it is called with."""

    def __init__(self, size: str, dtype: torch.dtype, device: str, layers: int = 1):
        import torch
        from transformers import LlamaConfig, LlamaModel

        hidden, intermediate, heads = SIZES[size]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            vocab_size=8,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.model = LlamaModel(config).to(dtype).requires_grad_(False)
        self.hidden, self.dtype, self.device = hidden, dtype, device

    def inputs(self, tokens: int, batch: int = 1, requires_grad: bool = False) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, tokens, self.hidden, generator=generator).to(self.device, self.dtype)
        return x.requires_grad_(requires_grad)

    def __call__(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found = self.model(inputs_embeds=x, attention_mask=attention_mask, use_cache=False)
        return found.last_hidden_state


def lora_layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def with_lora(layer: Layer, rank: int, dropout: float, dtype: torch.dtype) -> Layer:
    """PEFT's LoRA on the seven projections, with weights of `dtype`; B is not zero, so that gradients reach A."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for names in INPUTS for name in names]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=names), layer.model
    )
    torch.manual_seed(2)
    for module in lora_layers(layer.model):
        for part in (module.lora_A["default"], module.lora_B["default"]):
            torch.nn.init.normal_(part.weight, std=0.02)
            part.to(layer.device, dtype).requires_grad_(True)
    layer.model.train()
    return layer


def share_casts(layer: Layer) -> Layer:
    """PEFT's own switch: no cast to float32 of an input that autocast casts back."""
    for module in lora_layers(layer.model):
        module.cast_input_dtype_enabled = False
    return layer


def merge_products(layer: Layer) -> Layer:
    """The products with A of all projections that share an input as one. Without dropout, as each draws its own mask."""
    import torch
    import torch.nn.functional as F

    def forward_of(module: Any, group: list[Any], memory: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        place, rank = group.index(module), module.r["default"]

        def forward(x: Tensor) -> Tensor:
            if memory.get("x") is not x:
                weights = torch.cat([other.lora_A["default"].weight for other in group])
                memory.update(x=x, low=F.linear(x, weights).split(rank, dim=-1))
            low = memory["low"][place]
            if place == len(group) - 1:
                memory.clear()
            return module.base_layer(x) + module.lora_B["default"](low) * module.scaling["default"]

        return forward

    for block in layer.model.layers:
        by_name = {**dict(block.self_attn.named_children()), **dict(block.mlp.named_children())}
        for names in INPUTS:
            if len(names) > 1:
                group, memory = [by_name[name] for name in names], {}
                for module in group:
                    module.forward = forward_of(module, group, memory)
    return layer


def one_pass(layer: Layer, x: Tensor, autocast: bool) -> None:
    import torch

    with torch.autocast(layer.device, torch.bfloat16, enabled=autocast):
        found = layer(x).float()
    # Not its squares: behind the last norm their mean is 1, whatever comes before, and gradients are rounding.
    (found * torch.linspace(-1, 1, found.numel(), device=layer.device).view_as(found)).sum().backward()


def gradients(layer: Layer, x: Tensor, autocast: bool) -> list[Tensor]:
    """Of the input and of LoRA; then removed."""
    one_pass(layer, x, autocast)
    parameters = [p for p in layer.model.parameters() if p.requires_grad]
    found = [x.grad, *(p.grad for p in parameters)]
    x.grad = None
    for parameter in parameters:
        parameter.grad = None
    return [one.float() for one in found if one is not None]


def saved_bytes(layer: Layer, x: Tensor, autocast: bool) -> int:
    """Of the distinct tensors kept for backward, without parameters."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in layer.model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one_pass(layer, x, autocast)
    x.grad = None
    return sum(storage.nbytes() for storage in kept.values())


def variants(size: str, dtype: torch.dtype, device: str, rank: int) -> dict[str, tuple[Layer, bool]]:
    """Layer, and whether it runs under autocast, by the row's name."""
    import torch

    half = dtype != torch.float32

    def lora(dropout: float, kept: torch.dtype = torch.float32) -> Layer:
        return with_lora(Layer(size, dtype, device), rank, dropout, kept)

    rows = {
        "frozen": (Layer(size, dtype, device), half),
        "dropout 0.05": (lora(0.05), half),
        "no dropout": (lora(0.0), half),
        "+ casts shared": (share_casts(lora(0.0)), half),
        "+ A in one": (merge_products(share_casts(lora(0.0))), half),
        "dropout, shared": (share_casts(lora(0.05)), half),
    }
    if half:
        rows["16 bit, dropout"] = (lora(0.05, dtype), False)
        rows["16 bit"] = (lora(0.0, dtype), False)
        return rows
    return {name: row for name, row in rows.items() if "shared" not in name}  # nothing is cast


def measure(options: Namespace, name: str) -> list[dict[str, Any]]:
    import torch

    dtype = getattr(torch, name)
    rows = variants(options.size, dtype, options.device, options.rank)
    inputs = {key: layer.inputs(options.tokens, requires_grad=True) for key, (layer, _) in rows.items()}
    expected = gradients(rows["no dropout"][0], inputs["no dropout"], rows["no dropout"][1])
    times: dict[str, list[float]] = {key: [] for key in rows}
    for turn in range(options.repeats + 1):
        for key, (layer, autocast) in rows.items():
            spent = own_seconds(partial(gradients, layer, inputs[key], autocast), options.device)
            if turn:  # the first one warms up
                times[key].append(spent)
    found = []
    for key, (layer, autocast) in rows.items():
        now = gradients(layer, inputs[key], autocast)
        pairs = zip(now, expected) if key in COMPARED else ()
        apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
        found.append(
            {
                "dtype": name,
                "row": key,
                "ms": 1e3 * statistics.median(times[key]),
                "over_frozen": statistics.median(t / f for t, f in zip(times[key], times["frozen"])),
                "saved_mib": saved_bytes(layer, inputs[key], autocast) / 2**20,
                "difference": max(apart, default=None),
            }
        )
    return found


def main() -> int:
    parser = command_parser("", __doc__, usage="python benchmarks/lora.py [options]")
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--tokens", type=count, default=256)
    parser.add_argument("--rank", type=count, default=128)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/lora_<device>.json")
    options = parser.parse_args()
    return run_command(lambda: report(options), traceback=options.traceback)


def report(options: Namespace) -> None:
    """Measure, print the table and write the JSON."""
    rows: list[dict[str, Any]] = []
    print(f"{'dtype':9} {'row':16} {'ms':>8} {'/ frozen':>8} {'saved MiB':>10} {'difference':>11}")
    for dtype in options.dtype:
        for row in measure(options, dtype):
            rows.append(row)
            apart = "" if row["difference"] is None else f"{row['difference']:.1e}"
            print(
                f"{dtype:9} {row['row']:16} {row['ms']:8.1f} {row['over_frozen']:8.3f} {row['saved_mib']:10.1f} {apart:>11}",
                flush=True,
            )
    write_results("lora", options, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
