"""Says what a folder of weights is, what is in it, and whether it would load, with the line that loads it.

    python -m llava_sp.checkpoints.inspect PATH [--json]

PATH is a folder, or the file of a first stage's projector. Headers are read and no tensors, so a large checkpoint takes
no longer than a small one; names and shapes are compared with those of a model on the meta device, tokenizers and image
settings are made as on opening. Values (NaN, memory that was never initialised, a base's fingerprint, whether a base holds
all of its model) are checked on opening. Nothing is downloaded.

Exit status: 0 it would load, 1 it would not (the report says why), 2 no checkpoint is there at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from llava_sp.checkpoints.opening.adapter import MANIFEST, describe
from llava_sp.checkpoints.opening.backbones import read_vocabulary
from llava_sp.checkpoints.opening.fit import OURS, Comparison, compare
from llava_sp.checkpoints.opening.foreign import (
    check_language_settings,
    check_tokenizers,
    full_config,
    has_tokenizer,
    open_processor,
)
from llava_sp.checkpoints.reading.formats import (
    FORMATS,
    HEAD,
    LANGUAGE,
    LORA,
    ORIGINAL_GRID,
    PROJECTOR,
    TOWER,
    Checkpoint,
    UnknownFormat,
    check_generation_config,
    feature_layer,
    lora_config,
    our_config,
    recognise,
    recorded_dtype,
)
from llava_sp.checkpoints.reading.places import base_folder
from llava_sp.checkpoints.reading.tensor_files import read_json, stored_tensors, weight_files
from llava_sp.model.backbone_configs import is_original, language_config, vision_config
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.opening import is_missing_folder
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

PLACEHOLDERS = {"language_model": "LANGUAGE_MODEL", "vision_tower": "VISION_TOWER"}
UNREAD = "not read; checked on opening"
_MERGE_RECORD = "merged.json"
# The report's keys: None, or an empty list, where nothing was recognised.
_KEYS = (
    "format",
    "spatial",
    "language_model",
    "vision_tower",
    "conversation_template",
    "parts",
    "lora",
    "bytes",
    "run",
    "merged_from",
)
_LISTS = ("files", "missing", "unexpected", "wrong_shape", "empty", "problems", "needs", "call")
_SHOWN = 6  # lines of a kind of problem in the text; all are in the JSON
_PARTS = {
    "language model": (LANGUAGE, HEAD),
    "vision tower": (TOWER,),
    "patch MLP": (f"{PROJECTOR}linear_",),
    "spatial branch": (f"{PROJECTOR}spatial.",),
}


@dataclass
class Backbone:
    """Where a language model or a vision tower comes from.

    Attributes:
        recorded: hub id or path, as the checkpoint has it; None where it has none.
        status: "within" the checkpoint, "there" (a folder on this machine), "cached" (the hub's cache), "hub" (would be
            downloaded), "missing" (a path that is not there, or nothing recorded).
        folder: where its files are, for "within", "there" and "cached".
        problem: why what is there cannot be used.
    """

    recorded: str | None
    status: str
    folder: Path | None = None
    problem: str | None = None
    fingerprint: str | None = None


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """What stands at `path`, as the command prints with `--json`.

    Raises:
        FileNotFoundError: nothing stands there.
        UnknownFormat: it is no checkpoint that `LlavaSPForCausalLM.from_pretrained` knows.
    """
    report: dict[str, Any] = {"path": str(path), **dict.fromkeys(_KEYS), **{name: [] for name in _LISTS}}
    report |= {"values": UNREAD, "loads": False}
    try:
        found = recognise(path)
    except (UnknownFormat, FileNotFoundError):
        raise
    except (ValueError, OSError) as error:
        return report | {"problems": [str(error)]}
    problems: list[str] = []
    language, tower = _language(found), _tower(found)
    for what, backbone in (("language model", language), ("vision tower", tower)):
        if backbone.problem is not None:
            problems.append(f"its {what}: {backbone.problem}")
    config, comparison = None, compare(found, None)
    try:
        config = _config(found, language, tower)
        problems += _settings_problems(found)
        if not problems:
            problems += _processor_problems(path, found, language, tower)
        comparison = compare(found, config)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        problems.append(f"its configuration: {error}")
    problems += comparison.lines()
    given = [keyword for keyword, one in zip(PLACEHOLDERS, (language, tower)) if one.status == "missing"]
    return report | {
        "format": found.format,
        "spatial": _spatial(found, config),
        "language_model": vars(language),
        "vision_tower": vars(tower),
        "conversation_template": _template(found),
        "parts": _parts(found),
        "lora": _lora(found),
        "bytes": sum(file.stat().st_size for file in found.files),
        "files": [str(file) for file in found.files],
        "run": _run(found),
        "merged_from": _merged(found),
        **vars(comparison),
        "problems": problems,
        "loads": not problems,
        "needs": given,
        "call": _calls(path, found, given, (language, tower)),
    }


# ---- what the checkpoint is made from


def _language(found: Checkpoint) -> Backbone:
    if found.holds_language_model:
        recorded = found.language_model if found.format == "llava_sp" else None
        return Backbone(recorded, "within", found.folder, fingerprint=found.config.get("language_model_fingerprint"))
    return _place(found, found.language_model, found.config.get("language_model_fingerprint"))


def _tower(found: Checkpoint) -> Backbone:
    fingerprint = found.config.get("vision_tower_fingerprint")
    if found.format in ("llava_sp", "llava_hf"):
        recorded = found.vision_tower if found.format == "llava_sp" else None
        return Backbone(recorded, "within", found.folder, fingerprint=fingerprint)
    return _place(found, found.vision_tower, fingerprint)


def _place(found: Checkpoint, recorded: str | None, fingerprint: str | None) -> Backbone:
    """Where opening would look: as it is, relative to the checkpoint, on the hub."""
    if not isinstance(recorded, str):
        return Backbone(None, "missing")
    folder = base_folder(found.folder, recorded)
    if folder is not None:
        return Backbone(recorded, "there", folder, _weights_problem(folder), fingerprint)
    if is_missing_folder(recorded):
        return Backbone(recorded, "missing", fingerprint=fingerprint)
    cached = _cached(recorded)
    if cached is not None:
        return Backbone(recorded, "cached", cached, _weights_problem(cached), fingerprint)
    # A single word may be a model of the hub, but in the original's configurations it is a folder beside its author's.
    return Backbone(recorded, "hub" if "/" in recorded else "missing", fingerprint=fingerprint)


def _weights_problem(folder: Path) -> str | None:
    """Of its files and their headers; whether it holds all of its model shows on opening."""
    try:
        check_generation_config(folder)
        for file in weight_files(folder):
            stored_tensors(file)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _cached(name: str) -> Path | None:
    """The folder of a hub model in the cache, if configuration and weights are all there; never asks the hub."""
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    try:
        weight_files(Path(config).parent)
    except ValueError:  # a configuration alone, or some of the shards
        return None
    return Path(config).parent


# ---- what its configuration asks for


def _config(found: Checkpoint, language: Backbone, tower: Backbone) -> LlavaSPConfig | None:
    """The configuration of the model that opening would make; None where too little is known of its backbones."""
    if found.format in OURS:
        if found.format == "llava_sp_adapter":  # its own tell the shapes, but those of its bases are read on opening
            _text_config(found, language)
            _vision_config(found, tower)
        return our_config(found.folder)
    if found.format == "llava_hf":
        return full_config(found, found.folder, found.folder)
    text, vision = _text_config(found, language), _vision_config(found, tower)
    if text is None or vision is None:
        return None
    if language.folder is not None and language.problem is None:
        check_language_settings(found, text)
    return LlavaSPConfig(
        text_config=text, vision_config=vision, vision_feature_layer=feature_layer(found), **found.spatial
    )


def _text_config(found: Checkpoint, language: Backbone) -> PreTrainedConfig | None:
    """The language model's, of the base if it is there, else as the checkpoint copied it, else of its width alone."""
    if language.folder is not None and language.problem is None:
        return language_config(language.folder)
    if is_original(found.config) and "hidden_size" in found.config:
        return language_config(found.folder)
    width = _side(found, "linear_2.weight", 0)
    return None if width is None else LlamaConfig(hidden_size=width, num_attention_heads=1, num_hidden_layers=0)


def _vision_config(found: Checkpoint, tower: Backbone) -> PreTrainedConfig | None:
    if tower.folder is not None and tower.problem is None:
        return vision_config(tower.folder)
    width = found.config.get("mm_hidden_size") or _side(found, "linear_1.weight", 1)
    if width is None:
        return None
    grid = max(found.spatial.get("spatial_scales", [ORIGINAL_GRID]))
    return CLIPVisionConfig(
        hidden_size=width, num_attention_heads=1, num_hidden_layers=0, patch_size=1, image_size=grid
    )


def _side(found: Checkpoint, name: str, dim: int) -> int | None:
    tensor = found.tensors.get(PROJECTOR + name)
    return None if tensor is None or len(tensor.shape) <= dim else tensor.shape[dim]


def _settings_problems(found: Checkpoint) -> list[str]:
    """What else opening refuses, besides tensors."""
    try:
        if found.format == "llava_sp_adapter":
            describe(found.folder)
        if found.lora is not None:
            lora_config(found)
        if found.format.startswith("original"):
            recorded_dtype(found)
    except ValueError as error:
        return [str(error)]
    return []


def _processor_problems(path: str | os.PathLike, found: Checkpoint, language: Backbone, tower: Backbone) -> list[str]:
    """Tokenizers and image settings, by making of them what opening does, as far as they are on this machine."""
    bases = {"language_model": language.folder, "vision_tower": tower.folder}
    try:
        if found.format not in OURS and has_tokenizer(found):
            read_vocabulary(found.folder)
        if found.format != "llava_sp" and language.folder is not None:
            read_vocabulary(language.folder)
            if found.format not in OURS:
                check_tokenizers(found, language.folder)
        if found.format in OURS and _has_processor(found):
            LlavaSPProcessor.from_pretrained(found.folder)
        elif found.format not in OURS and None not in bases.values():
            if found.holds_language_model:
                del bases["language_model"]
            open_processor(path, **bases, local_files_only=True)
    except (ValueError, OSError) as error:
        return [f"its processor: {error}"]
    return []


def _has_processor(found: Checkpoint) -> bool:
    return (found.folder / "processor_config.json").is_file()


# ---- what is told


def _spatial(found: Checkpoint, config: LlavaSPConfig | None) -> dict[str, Any]:
    """Variant and layout; the grid (None where not known) comes from the tower, or from the largest scale."""
    settings = dict(found.spatial)
    if config is None:
        return {"spatial_variant": settings.pop("spatial_variant", None), **settings, "grid_size": None}
    names = ("spatial_variant", "spatial_fusion", "spatial_scales", "spatial_width", "spatial_projection_bias")
    names += ("fusion_kernel", "fusion_stride", "num_spatial_tokens", "num_patch_tokens", "grid_size")
    if config.spatial_variant == "none":
        names = ("spatial_variant", "num_spatial_tokens", "num_patch_tokens", "grid_size")
    return {name: getattr(config, name) for name in names}


def _template(found: Checkpoint) -> dict[str, Any]:
    """What our processor's files record; other code records no template, and LLaVA-1.5's is meant."""
    settings = (_told(found.folder / "processor_config.json") if found.format in OURS else None) or {}
    ratio = settings.get("image_aspect_ratio") or found.config.get("image_aspect_ratio")
    return {"recorded": settings.get("conversation_template"), "image_aspect_ratio": ratio}


def _parts(found: Checkpoint) -> dict[str, dict[str, Any]]:
    groups = {
        part: [t for n, t in found.tensors.items() if n.startswith(prefixes) and LORA not in n]
        for part, prefixes in _PARTS.items()
    }
    groups["LoRA"] = list(found.part("", lora=True).values())
    return {
        part: {
            "parameters": sum(tensor.numel for tensor in tensors),
            "tensors": len(tensors),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        }
        for part, tensors in groups.items()
        if tensors
    }


def _lora(found: Checkpoint) -> dict[str, Any] | None:
    if found.lora is None:
        return None
    targets = found.lora.get("target_modules") or []
    layers = {name.split(LORA)[0] for name in found.part("", lora=True)}
    return {
        "r": found.lora.get("r"),
        "alpha": found.lora.get("lora_alpha"),
        "targets": sorted({layer.rpartition(".")[2] for layer in layers} or [targets]),
        "layers": len(layers),
    }


def _run(found: Checkpoint) -> dict[str, Any] | None:
    about = _told(found.folder / MANIFEST) if found.format in OURS else None
    return (about or {}).get("run") or None


def _merged(found: Checkpoint) -> dict[str, Any] | None:
    file = found.folder / _MERGE_RECORD
    return (_told(file) or {"unreadable": f"{file.name} is no record of a merge"}) if file.is_file() else None


def _told(file: Path) -> dict[str, Any] | None:
    """A file that is told of and not needed; None where it is not there or cannot be read."""
    try:
        return read_json(file)
    except (ValueError, OSError):
        return None


def _calls(path: str | os.PathLike, found: Checkpoint, given: list[str], bases: tuple[Backbone, Backbone]) -> list[str]:
    """The lines of Python that open model and processor."""
    keywords = "".join(f', {keyword}="{PLACEHOLDERS[keyword]}"' for keyword in given)
    place = json.dumps(str(path), ensure_ascii=False)
    processor = f"LlavaSPProcessor.from_pretrained({place}{keywords})"
    if found.format in OURS and not _has_processor(found):
        processor = f"LlavaSPProcessor.from_backbones({', '.join(['model.config', *_bases_to_name(found, bases)])})"
    return [f"model = LlavaSPForCausalLM.from_pretrained({place}{keywords})", f"processor = {processor}"]


def _bases_to_name(found: Checkpoint, bases: tuple[Backbone, Backbone]) -> list[str]:
    """Keywords for the backbones that a full checkpoint of ours came from, where these are not to be found any more."""
    if found.format != "llava_sp":
        return []  # the opened model records the ones it was opened on
    lost = [_place(found, backbone.recorded, None).status == "missing" for backbone in bases]
    words = {"language_model": PLACEHOLDERS["language_model"], "vision_tower": PLACEHOLDERS["vision_tower"]}
    return [f'{keyword}="{word}"' for (keyword, word), gone in zip(words.items(), lost) if gone]


# ---- the command


def text(report: dict[str, Any]) -> str:
    """The report as an aligned block for reading."""
    rows = [] if report["format"] is None else _about(report)
    if report["loads"]:
        needs = " and ".join(f"{keyword}=" for keyword in report["needs"])
        verdict = f"yes, given {needs}" if needs else "yes"
        if any(report[keyword]["status"] == "hub" for keyword in PLACEHOLDERS):
            verdict += ", after a download"
        rows += _rows("loads", [verdict, *report["call"]])
    else:
        rows += _rows("loads", ["no", *_cut(_reasons(report))])
    return "\n".join([report["path"], *(f"  {label:<15}{value}".rstrip() for label, value in rows)])


def _about(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("format", f"{FORMATS[report['format']]} ({report['format']})"), *_spatial_rows(report["spatial"])]
    rows += [("base", _backbone_text(report["language_model"], "language_model"))]
    rows += [("tower", _backbone_text(report["vision_tower"], "vision_tower"))]
    rows += [("template", _template_text(report["conversation_template"], report["format"]))]
    for part in (*_PARTS, "LoRA"):
        if part in report["parts"]:
            rows.append((part, _part_text(report["parts"][part], report["lora"] if part == "LoRA" else None)))
    files = report["files"]
    rows.append(("size", f"{_bytes(report['bytes'])} in {len(files)} file{'s' if len(files) > 1 else ''} of weights"))
    if report["run"] is not None:
        rows.append(("run", ", ".join(f"{key} {value}" for key, value in report["run"].items() if _is_short(value))))
    if report["merged_from"] is not None:
        rows.append(("merged from", _merged_text(report["merged_from"])))
    for label in ("missing", "unexpected", "wrong_shape", "empty"):
        if report[label] or label in ("missing", "unexpected"):
            rows += _rows(label.replace("_", " "), _cut([_entry_text(one) for one in report[label]]) or ["nothing"])
    return [*rows, ("values", report["values"])]


def _reasons(report: dict[str, Any]) -> list[str]:
    """Why it does not load; tensors, which the rows above name, are counted only."""
    lists = Comparison(*(report.get(name, []) for name in vars(Comparison())))
    reasons = [problem for problem in report["problems"] if problem not in lists.lines()]
    counts = [f"{len(entries)} {name.replace('_', ' ')}" for name, entries in vars(lists).items() if entries]
    if counts:
        reasons.append(f"tensors: {', '.join(counts)}")
    if lists.missing and report["format"] == "original_projector":
        reasons.append("an intermediate checkpoint of the original's first stage is like that; its model.bin holds all")
    return reasons


def _rows(label: str, lines: list[str]) -> list[tuple[str, str]]:
    return [(label, lines[0]), *(("", line) for line in lines[1:])]


def _entry_text(entry: dict[str, Any]) -> str:
    shape = f" {entry['shape']}" if "shape" in entry else ""
    expected = f", expected {entry['expected']}" if "expected" in entry else ""
    return f"{entry['key']}{shape}{expected}  in {entry['file']}"


def _spatial_rows(spatial: dict[str, Any]) -> list[tuple[str, str]]:
    grid, variant = spatial.get("grid_size"), spatial.get("spatial_variant")
    side = "a grid that is not known" if grid is None else f"a {grid} x {grid} grid"
    if variant == "none":
        return [("variant", "none: LLaVA-1.5, without spatial tokens"), ("layout", f"the patches of {side}")]
    fusion = "with" if spatial.get("spatial_fusion") else "without"
    scales = " ".join(map(str, spatial.get("spatial_scales") or ()))
    layout = [f"scales {scales} of {side}", f"width {spatial.get('spatial_width', 'not known')}"]
    layout.append(f"linear {'with' if spatial.get('spatial_projection_bias') else 'without'} bias")
    if grid is not None:
        layout.append(f"{spatial['num_spatial_tokens']} + {spatial['num_patch_tokens']} tokens per image")
    fused = (
        f" (kernel {spatial['fusion_kernel']}, stride {spatial['fusion_stride']})" if fusion == "with" and grid else ""
    )
    return [("variant", f"{variant}, {fusion} integrator{fused}"), ("layout", ", ".join(layout))]


def _backbone_text(backbone: dict[str, Any], keyword: str) -> str:
    recorded, status = backbone["recorded"], backbone["status"]
    if status == "within":
        return "within" if recorded is None else f"within; it was made from {recorded}"
    if recorded is None:
        return f"not recorded; pass {keyword}="
    told = {
        "there": "there" if str(backbone["folder"]) == recorded else f"there, in {backbone['folder']}",
        "cached": "in the hub's cache",
        "hub": "on the hub, not on this machine",
        "missing": f"not there; pass {keyword}=",
    }
    fingerprint = f" (fingerprint {backbone['fingerprint']})" if backbone["fingerprint"] else ""
    return f"{recorded}{fingerprint}: {told[status]}"


def _template_text(template: dict[str, Any], kind: str) -> str:
    recorded, ratio = template["recorded"], template["image_aspect_ratio"]
    images = {"pad": "; images padded to a square", "crop": "; images cropped to a square"}.get(ratio, "")
    if recorded is not None:
        return recorded + images
    if kind in OURS:
        return "not recorded: no processor files beside the weights; vicuna_v1 unless you say otherwise"
    return f"not recorded by this format; vicuna_v1 is meant{images}"


def _part_text(part: dict[str, Any], lora: dict[str, Any] | None) -> str:
    counted = f"{part['parameters']:>15,} parameters, {' and '.join(part['dtypes'])}"
    if lora is None:
        return counted
    return f"{counted}; r {lora['r']}, alpha {lora['alpha']} on {lora['layers']} layers: {' '.join(lora['targets'])}"


def _merged_text(record: dict[str, Any]) -> str:
    if "unreadable" in record:
        return record["unreadable"]
    adapter, base = record.get("adapter", {}), record.get("language_model", {})
    return f"{adapter.get('path')} ({adapter.get('hash')}) in {base.get('path')}, on {record.get('date')}"


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and len(str(value)) <= 40


def _cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[: _SHOWN - 1], f"and {len(lines) - _SHOWN + 1} more"]


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.checkpoints.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a folder, or the file of a first stage's projector")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    try:
        report = inspect(options.path)
    except (UnknownFormat, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2, default=str) if options.json else text(report))
    return 0 if report["loads"] else 1


if __name__ == "__main__":
    sys.exit(main())
