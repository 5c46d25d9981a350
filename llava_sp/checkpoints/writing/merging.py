"""Merging LoRA into its base: an adapter checkpoint becomes an ordinary full one that needs no base and no PEFT."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm

from llava_sp.checkpoints.opening import open_model, open_processor
from llava_sp.checkpoints.opening.processors import is_saved
from llava_sp.checkpoints.reading.fingerprint import checkpoint_hash
from llava_sp.checkpoints.reading.formats import FORMATS, OURS, Checkpoint, recognise
from llava_sp.checkpoints.reading.manifest import MERGE_RECORD, MERGED
from llava_sp.checkpoints.reading.names import LORA
from llava_sp.checkpoints.reading.places import fetch
from llava_sp.checkpoints.writing.proof import Probe, dtype_name, probe_vector, proof_sample, prove, text_logits
from llava_sp.common.files import read_json, write_json
from llava_sp.common.folders import check_new, new_folder
from llava_sp.common.provenance import versions
from llava_sp.common.schema import SIZE, expect
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

FORMAT = 1


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
    """Write `adapter`, merged into its base models, to the new folder `to`. Returns the content of `merged.json`.

    Args:
        adapter: a folder or a hub id that `LlavaSPForCausalLM.from_pretrained` opens with LoRA attached.
        language_model, vision_tower: instead of those that the adapter records.
        dtype: of the result; "auto" is the adapter's own.
        max_shard_size: of one weight file, such as "5GB".
        device: where the model is while it is merged and compared.

    Raises:
        ValueError: there is nothing to merge, or it is merged already; `to` is not empty or is inside a source folder;
            LoRA or the merged weights are not finite; the merged model does not pass the proof.
        OSError: the disk is full, or `to` cannot be written. `to` is then unchanged, and nothing is left beside it.
    """
    start = time.monotonic()
    expect(max_shard_size, SIZE, "max_shard_size")
    source, target = fetch(adapter), Path(to).resolve()
    found = recognise(source)
    _check_new(target, source)
    if found.holds_language_model and (source / MERGE_RECORD).is_file():
        raise ValueError(f"{source} is merged already, {_merged_from(source)}")
    if not found.lora:
        raise ValueError(
            f"{source} ({FORMATS[found.format].title}) has no LoRA apart from its weights: nothing to merge"
        )
    bases = {"language_model": language_model, "vision_tower": vision_tower}
    given: dict[str, Any] = {name: value for name, value in bases.items() if value is not None}
    if device != "cpu":
        given["device_map"] = device
    model = open_model(LlavaSPForCausalLM, found, dtype=dtype, **given)
    record = _describe(model, found)
    _check_new(target, record["language_model"]["path"], record["vision_tower"]["path"])
    processor = _processor(found, model)
    sample = proof_sample(processor).to(device)
    needed = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if LORA not in name)
    with new_folder(target, needed) as stage:
        before = text_logits(model, sample)
        probes = merge_layers(model)
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        processor.save_pretrained(stage)
        del model  # before the merged one is opened: memory is for one
        gc.collect()
        record["proof"] = prove(stage, sample, before, probes, record["dtype"], device)
        files = {file.name: file.stat().st_size for file in sorted(stage.glob("*.safetensors"))}
        record["weights"] = {"fingerprint": checkpoint_hash(stage), "files": files}
        record["seconds"] = round(time.monotonic() - start, 1)
        write_json(stage / MERGE_RECORD, record)
    return record


# ---- merging


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every layer with LoRA by its name in the model. Raises ValueError where LoRA is not on a Linear."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            layers[name] = layer
        elif isinstance(layer, BaseTunerLayer):
            raise ValueError(f"{name} is a {type(layer).__module__}.{type(layer).__name__}; only linear LoRA is merged")
    return layers


@torch.inference_mode()
def merge_layers(model: LlavaSPForCausalLM) -> dict[str, Probe]:
    """Merge LoRA in place and remove it; returns each layer's output before, for `prove`.

    One layer at a time is in float32.

    Raises:
        ValueError: a merged weight is not finite in the model's type; the layer is named.
    """
    probes = {}
    for name in tqdm(list(lora_layers(model)), desc="merging", unit="layer"):
        layer: Any = model.get_submodule(name)  # not from a dict of all, which would keep each one's float32
        dtype = layer.get_base_layer().weight.dtype
        layer.float()
        vector = probe_vector(layer.in_features, layer.get_base_layer().weight.device)
        base = layer.get_base_layer()(vector)
        probes[name] = Probe(base.cpu(), (layer(vector) - base).cpu())
        layer.merge()
        merged = layer.get_base_layer().to(dtype)
        if not torch.isfinite(merged.weight).all():
            raise ValueError(f"{name}: the merged weight holds NaN or infinity in {dtype_name(dtype)}")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, merged)
    del model.peft_config
    model._hf_peft_config_loaded = False
    return probes


def _merged_from(folder: Path) -> str:
    record = read_json(folder / MERGE_RECORD, MERGED)
    adapter, base = record["adapter"], record["language_model"]
    return f"from {adapter['path']} ({adapter['hash']}) into {base['path']} on {record['date']}"


def _check_new(target: Path, *sources: str | os.PathLike) -> None:
    """Raises `ValueError` if `target` holds files, such as those of an earlier merge, or is inside a source."""
    if (target / MERGE_RECORD).is_file():
        raise ValueError(f"{target} holds a model merged {_merged_from(target)}: choose a new folder")
    check_new(target, *sources)


def _describe(model: LlavaSPForCausalLM, found: Checkpoint) -> dict[str, Any]:
    """The record of the merge, without the proof."""
    layers = lora_layers(model).values()
    config = model.config
    lora: Any = next(iter(model.peft_config.values()))
    ranks = sorted({rank for layer in layers for rank in layer.r.values()})
    alphas = sorted({alpha for layer in layers for alpha in layer.lora_alpha.values()})
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "adapter": {"path": str(found.folder.resolve()), "hash": checkpoint_hash(found)},
        "language_model": {
            "path": config.language_model_name_or_path,
            "fingerprint": config.language_model_fingerprint,
        },
        "vision_tower": {"path": config.vision_tower_name_or_path, "fingerprint": config.vision_tower_fingerprint},
        "lora": {
            "layers": len(layers),
            "r": ranks[0] if len(ranks) == 1 else ranks,
            "alpha": alphas[0] if len(alphas) == 1 else alphas,
            "rslora": lora.use_rslora,
            "targets": sorted({name.rpartition(".")[2] for name in lora_layers(model)}),
        },
        "dtype": dtype_name(model.dtype),
        "versions": versions(),
    }


def _processor(found: Checkpoint, model: LlavaSPForCausalLM) -> LlavaSPProcessor:
    if found.format in OURS and not is_saved(found.folder):  # an adapter saved without one
        return LlavaSPProcessor.from_backbones(model.config)
    bases = {
        "language_model": model.config.language_model_name_or_path,
        "vision_tower": model.config.vision_tower_name_or_path,
    }
    return open_processor(LlavaSPProcessor, found, **bases)


def give_back_freed_tensors() -> None:
    """Make glibc return each freed tensor to the system, for the rest of this process.

    It keeps freed blocks below 32 MiB in its heap, and the float32 temporaries leave holes there: at 4 GiB of weights,
    that was 1.1 GiB more at the peak, and all of the first model still resident while the second was opened.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)
