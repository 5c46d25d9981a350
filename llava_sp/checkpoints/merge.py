"""Merge LoRA into its base: an adapter checkpoint becomes an ordinary full one that needs no base and no PEFT.

    python -m llava_sp.checkpoints.merge ADAPTER --to DST [--language-model B] [--vision-tower V] [--dtype bfloat16]

ADAPTER is whatever `LlavaSPForCausalLM.from_pretrained` opens with LoRA attached. The model is in memory once: opened,
merged layer by layer in place, written in shards, let go, opened again from the disk, and compared. DST appears, by a
rename, when all of that is done; `merged.json` in it, written last, says what was merged and how well it was proven.

Each layer is merged by PEFT in float32 and then rounded once. PEFT by itself rounds twice in 16 bit: LoRA's product, and
its sum with the weight.

The proof has two parts, since 16-bit logits differ by rounding alone, which a small LoRA would drown in.

    logits   of a fixed picture and text, at all text positions, largest difference against largest logit. Allowed: 1e-4 in
             float32, where only the order of sums differs; 16 steps of the type in 16 bit (bfloat16 0.125, float16
             0.016), as both models round every activation of every layer, each in its own way. This shows that all is
             there and in its place.
    layers   every merged layer's answer to a fixed vector, in float32. How much of LoRA's share is in it must be 1, within
             0.01 and six standard deviations of what rounding the weights can do: 0 where it was not merged, 2 where
             twice. Rounding averages out over a layer's outputs, so this is far sharper than logits in 16 bit.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import peft
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from llava_sp.checkpoints.opening.adapter import checkpoint_hash
from llava_sp.checkpoints.opening.foreign import needs_processor
from llava_sp.checkpoints.reading.formats import LORA, recognise
from llava_sp.checkpoints.reading.places import fetch
from llava_sp.checkpoints.reading.tensor_files import read_json
from llava_sp.common.folders import check_new, new_folder, readable
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

RECORD = "merged.json"
FORMAT = 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLE_TEXT = (
    "<image>\nThe picture shows a red square on a ground that turns from blue to green. How many squares are there, what "
    "colour are they, and what is to the left of the largest one? Answer in one sentence."
)
_LOGITS_FLOAT32, _LOGITS_STEPS = 1e-4, 16
_SHARE_SLACK, _SHARE_DEVIATIONS, _SHARE_UNKNOWN = 0.01, 6, 0.5


@dataclass
class Probe:
    """A layer's answer to a fixed vector before merging, [out_features] in float32: the base's, and what LoRA adds."""

    base: Tensor
    lora: Tensor


def merge(
    adapter: str | os.PathLike,
    to: str | os.PathLike,
    *,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    device: str = "cpu",
) -> dict:
    """Write `adapter`, merged into its base models, to the new folder `to`. Returns what `merged.json` says.

    Args:
        adapter: a folder or a hub id that `LlavaSPForCausalLM.from_pretrained` opens with LoRA attached.
        language_model, vision_tower: in place of those that the adapter records.
        dtype: of the result; "auto" is the adapter's own.
        max_shard_size: of one file with weights, such as "5GB".
        device: where the model is while it is merged and compared.

    Raises:
        ValueError: there is nothing to merge, or it is merged already; `to` is not empty or lies in a folder that is read;
            LoRA or the merged weights are not finite; the merged model does not pass the proof.
        OSError: the disk is full, or `to` cannot be written. In all cases `to` is as it was, and nothing lies beside it.
    """
    start = time.monotonic()
    if not re.fullmatch(r"\d+[KMGT]B", max_shard_size):
        raise ValueError(f"max_shard_size is {max_shard_size!r}; give a number and KB, MB, GB or TB, such as 5GB")
    source, target = fetch(adapter), Path(to).resolve()
    _check_source(source)
    _check_target(target, source)
    given = {"language_model": language_model, "vision_tower": vision_tower}
    given = {name: value for name, value in given.items() if value is not None}
    if device != "cpu":
        given["device_map"] = device
    model = LlavaSPForCausalLM.from_pretrained(source, dtype=dtype, **given)
    record = _describe(model, source)
    _check_target(target, record["language_model"]["path"], record["vision_tower"]["path"])
    processor = _processor(source, model)
    sample = proof_sample(processor).to(device)
    with new_folder(target, _needed_bytes(model)) as stage:
        before = text_logits(model, sample)
        probes = merge_layers(model)
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        processor.save_pretrained(stage)
        del model  # before the merged one is opened: there is memory for one
        gc.collect()
        record["proof"] = prove(stage, sample, before, probes, record["dtype"], device)
        record["weights"] = {"fingerprint": checkpoint_hash(stage), "files": _weight_bytes(stage)}
        record["seconds"] = round(time.monotonic() - start, 1)
        (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


# ---- merging


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every layer with LoRA by its name in the model. Raises ValueError where LoRA is on something else than a Linear."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        if not isinstance(layer, LoraLinear):
            raise ValueError(f"{name} is a {type(layer).__module__}.{type(layer).__name__}; only linear LoRA is merged")
    return layers


@torch.inference_mode()
def merge_layers(model: LlavaSPForCausalLM) -> dict[str, Probe]:
    """Merge LoRA in place and take it off; returns what each layer answered before, for `prove`.

    One layer at a time is in float32.

    Raises:
        ValueError: a merged weight is not finite in the model's type; the layer is named.
    """
    probes = {}
    for name in tqdm(list(lora_layers(model)), desc="merging", unit="layer"):
        layer = model.get_submodule(name)  # not from a dict of all, which would keep each one's float32
        dtype = layer.get_base_layer().weight.dtype
        layer.float()
        vector = _probe_vector(layer.in_features, layer.get_base_layer().weight.device)
        base = layer.get_base_layer()(vector)
        probes[name] = Probe(base.cpu(), (layer(vector) - base).cpu())
        layer.merge()
        merged = layer.get_base_layer().to(dtype)
        if not torch.isfinite(merged.weight).all():
            raise ValueError(f"{name}: the merged weight holds NaN or infinity in {_name(dtype)}; nothing was written")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, merged)
    del model.peft_config
    model._hf_peft_config_loaded = False
    return probes


def _probe_vector(size: int, device: torch.device) -> Tensor:
    """Signs, [size], always the same."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).float().to(device)


# ---- the proof


def proof_sample(processor: LlavaSPProcessor):
    """A fixed picture (a red square on a blue-green gradient, 480 x 320) and text, as model inputs of batch 1."""
    pixels = numpy.zeros((320, 480, 3), dtype=numpy.uint8)
    pixels[..., 1] = numpy.linspace(0, 255, 480)
    pixels[..., 2] = 255 - pixels[..., 1]
    pixels[80:200, 120:240] = (255, 0, 0)
    return processor(images=Image.fromarray(pixels), text=SAMPLE_TEXT)


@torch.inference_mode()
def text_logits(model: LlavaSPForCausalLM, sample) -> Tensor:
    """Logits at the positions that are text, [positions, vocabulary], float32, on the CPU.

    Raises:
        ValueError: they are not finite.
    """
    positions = (sample["input_ids"][0] != model.config.image_token_id).nonzero()[:, 0]
    logits = model(**sample, logits_to_keep=positions).logits[0].float().cpu()
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"logits hold NaN or infinity: weights are broken, or {_name(model.dtype)} is too narrow for them"
        )
    return logits


@torch.inference_mode()
def prove(stage: Path, sample, before: Tensor, probes: dict[str, Probe], dtype: str, device: str = "cpu") -> dict:
    """Open the merged checkpoint as its user will and compare it with what the unmerged model answered.

    Args:
        stage: the merged checkpoint. before: `text_logits` of the unmerged model. probes: from `merge_layers`.

    Returns:
        The figures for the record.

    Raises:
        ValueError: it is not the same model; the message has the figures.
    """
    placed = {} if device == "cpu" else {"device_map": device}
    merged = LlavaSPForCausalLM.from_pretrained(stage, **placed)
    if _name(merged.dtype) != dtype:
        raise ValueError(f"the merged checkpoint opens in {_name(merged.dtype)}, not in {dtype}; nothing was written")
    return {"logits": _compare_logits(before, text_logits(merged, sample), dtype), "layers": _find_lora(merged, probes)}


def _compare_logits(before: Tensor, after: Tensor, dtype: str) -> dict:
    words = before > torch.finfo(getattr(torch, dtype)).min  # the others are silenced, see LlavaSPForCausalLM.silence
    difference = (after - before)[words].abs().max().item()
    relative = difference / before[words].abs().max().item()
    allowed = _LOGITS_FLOAT32 if dtype == "float32" else _LOGITS_STEPS * torch.finfo(getattr(torch, dtype)).eps
    if not relative <= allowed:
        raise ValueError(
            f"the merged model is not the unmerged one: its logits differ by {difference:.3g}, {relative:.2g} of the "
            f"largest, where {dtype} allows {allowed:.2g}; nothing was written"
        )
    return {
        "tokens": len(before),
        "largest_difference": difference,
        "largest_relative_difference": relative,
        "allowed_relative_difference": allowed,
        "same_next_token": int((before.argmax(-1) == after.argmax(-1)).sum()),
    }


def _find_lora(merged: nn.Module, probes: dict[str, Probe]) -> dict:
    """How much of LoRA is found in each merged layer: 1 is right. Layers where rounding hides it are only counted."""
    shares = {}
    for name, probe in probes.items():
        layer = merged.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.float()
        vector = _probe_vector(layer.in_features, layer.weight.device)
        found = F.linear(vector, layer.weight.float(), bias).cpu() - probe.base
        # Each weight is off by half a step of its type at most, float32's sums by some steps of theirs; signs are random.
        step = torch.finfo(layer.weight.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
        noise = step * torch.linalg.vector_norm(layer.weight.float(), dim=1).cpu() * probe.lora
        power = probe.lora.square().sum().item()
        allowed = _SHARE_SLACK + _SHARE_DEVIATIONS * noise.norm().item() / power if power else math.inf
        if allowed > _SHARE_UNKNOWN:
            continue
        shares[name] = found.dot(probe.lora).item() / power
        if not abs(shares[name] - 1) <= allowed:
            raise ValueError(
                f"{name}: {shares[name]:.3f} of LoRA is in the merged weight, where 1 is right and rounding explains "
                f"{allowed:.3f} more or less; nothing was written"
            )
    return {
        "found": len(shares),
        "below_rounding": len(probes) - len(shares),
        "least_share": min(shares.values(), default=None),
        "largest_share": max(shares.values(), default=None),
    }


# ---- what goes in and out


def _check_source(source: Path) -> None:
    """Refuse what has no LoRA before anything large is read."""
    found = recognise(source)
    if found.holds_language_model and (source / RECORD).is_file():
        raise ValueError(f"{source} is merged already, {_merged_from(source)}: there is nothing left to merge")
    if found.holds_language_model:
        raise ValueError(f"{source} is a full checkpoint: it has no LoRA apart from its weights, nothing to merge")
    if not found.lora:
        raise ValueError(f"{source} has a projector and no LoRA (a first stage's checkpoint?): nothing to merge")


def _merged_from(folder: Path) -> str:
    record = read_json(folder / RECORD)
    adapter, base = record.get("adapter"), record.get("language_model")
    if not isinstance(adapter, dict) or not isinstance(base, dict):
        return f"but {folder / RECORD} does not say from what"
    return f"from {adapter.get('path')} ({adapter.get('hash')}) into {base.get('path')} on {record.get('date')}"


def _check_target(target: Path, *sources: str | os.PathLike) -> None:
    if (target / RECORD).is_file():
        raise ValueError(f"{target} holds a model merged {_merged_from(target)}: choose a new folder")
    check_new(target, *sources)


def _describe(model: LlavaSPForCausalLM, source: Path) -> dict:
    """What is merged: the record before there is a proof. Raises ValueError for a model without LoRA."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{source} opens without LoRA: nothing to merge")
    config, lora = model.config, next(iter(model.peft_config.values()))
    processes = sorted({rank for layer in layers.values() for rank in layer.r.values()})
    alphas = sorted({alpha for layer in layers.values() for alpha in layer.lora_alpha.values()})
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "adapter": {"path": str(source.resolve()), "hash": checkpoint_hash(source)},
        "language_model": {
            "path": config.language_model_name_or_path,
            "fingerprint": config.language_model_fingerprint,
        },
        "vision_tower": {"path": config.vision_tower_name_or_path, "fingerprint": config.vision_tower_fingerprint},
        "lora": {
            "layers": len(layers),
            "r": processes[0] if len(processes) == 1 else processes,
            "alpha": alphas[0] if len(alphas) == 1 else alphas,
            "rslora": lora.use_rslora,
            "targets": sorted({name.rpartition(".")[2] for name in layers}),
        },
        "dtype": _name(model.dtype),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def _processor(source: Path, model: LlavaSPForCausalLM) -> LlavaSPProcessor:
    bases = {
        "language_model": model.config.language_model_name_or_path,
        "vision_tower": model.config.vision_tower_name_or_path,
    }
    if (source / "processor_config.json").is_file() or needs_processor(source):
        return LlavaSPProcessor.from_pretrained(source, **bases)
    return LlavaSPProcessor.from_backbones(model.config)  # an adapter saved without one


def _needed_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if LORA not in name)


def _weight_bytes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the command


def report(record: dict, to: str | os.PathLike) -> str:
    """What was merged and how it was proven, in a few lines."""
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


def give_back_freed_tensors() -> None:
    """Have glibc return each freed tensor to the system, for this process from now on.

    It keeps freed blocks below 32 MiB in its heap, and the float32 temporaries leave holes there: at 4 GiB of weights,
    that was 1.1 GiB more at the peak, and all of the first model still resident while the second was opened.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.checkpoints.merge", description="Merge LoRA into its base, proven."
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="checkpoint with LoRA: a folder or a hub id")
    parser.add_argument("--to", required=True, metavar="DST", help="new folder for the full checkpoint")
    parser.add_argument("--language-model", help="language model, in place of the recorded one")
    parser.add_argument("--vision-tower", help="vision tower, in place of the recorded one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the result; auto: the adapter's own")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file with weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to merge: cpu, cuda (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    give_back_freed_tensors()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the staging folder is removed
    try:
        print(report(merge(options["adapter"], **{k: v for k, v in options.items() if k != "adapter"}), options["to"]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
