"""Format and content of a checkpoint folder and whether it would load, from headers, settings and tokenizers."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from llava_sp.checkpoints.opening.backbones import read_vocabulary
from llava_sp.checkpoints.opening.ends import never_stops
from llava_sp.checkpoints.opening.fit import Comparison, compare
from llava_sp.checkpoints.opening.foreign import check_language_model, has_tokenizer
from llava_sp.checkpoints.opening.full import recorded_config
from llava_sp.checkpoints.opening.processors import make_processor, open_processor, recorded_aspect_ratio
from llava_sp.checkpoints.reading.formats import (
    OURS,
    Checkpoint,
    UnknownFormat,
    recognise,
)
from llava_sp.checkpoints.reading.manifest import MERGE_RECORD, MERGED, hold_to_sha256
from llava_sp.checkpoints.reading.names import HEAD, LANGUAGE, LORA, ORIGINAL_GRID, PROJECTOR, TOWER
from llava_sp.checkpoints.reading.places import base_folder
from llava_sp.checkpoints.reading.settings import read_all_settings
from llava_sp.checkpoints.reading.tensor_files import stored_tensors, weight_files
from llava_sp.common.files import is_missing_folder, read_json
from llava_sp.model.backbone_configs import is_original, language_config, vision_config
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

PLACEHOLDERS = {"language_model": "LANGUAGE_MODEL", "vision_tower": "VISION_TOWER"}
UNREAD = "not read; checked on opening"
UNCHANGED = "those that were saved, by their sha256"
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
_LISTS = ("files", "missing", "unexpected", "wrong_shape", "empty", "problems", "warnings", "needs", "call")
PARTS = {
    "language model": (LANGUAGE, HEAD),
    "vision tower": (TOWER,),
    "patch MLP": (f"{PROJECTOR}linear_",),
    "spatial branch": (f"{PROJECTOR}spatial.",),
}


@dataclass
class Backbone:
    """Where a language model or a vision tower comes from.

    Attributes:
        recorded: hub id or path, as the checkpoint records it, or None.
        status: "within" the checkpoint, "there" (a folder on this machine), "cached" (the hub's cache), "hub" (would be
            downloaded), "missing" (a path that does not exist, or nothing recorded).
        folder: where its files are, for "within", "there" and "cached".
        problem: why it cannot be used.
    """

    recorded: str | None
    status: str
    folder: Path | None = None
    problem: str | None = None
    fingerprint: str | None = None


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """The report on `path`, as the command prints it with `--json`.

    Raises:
        FileNotFoundError: `path` does not exist.
        UnknownFormat: it is not a checkpoint that `LlavaSPForCausalLM.from_pretrained` supports.
    """
    report: dict[str, Any] = {"path": str(path), **dict.fromkeys(_KEYS), **{name: [] for name in _LISTS}}
    report |= {"values": UNREAD, "loads": False}
    try:
        found = recognise(path)
    except (UnknownFormat, FileNotFoundError):
        raise
    except (ValueError, OSError) as error:
        return report | {"problems": [str(error)]}
    bases = _language(found), _tower(found)
    config, comparison, problems, warnings = _problems(found, *bases)
    given = [keyword for keyword, one in zip(PLACEHOLDERS, bases) if one.status == "missing"]
    return report | {
        "format": found.format,
        "spatial": _spatial(found, config),
        "language_model": vars(bases[0]),
        "vision_tower": vars(bases[1]),
        "conversation_template": _template(found),
        "parts": _parts(found),
        "lora": _lora(found),
        "bytes": sum(file.stat().st_size for file in found.files),
        "files": [str(file) for file in found.files],
        "run": (found.manifest or {}).get("run") or None,
        "merged_from": _merged(found),
        **vars(comparison),
        "values": UNCHANGED if found.manifest and not problems else UNREAD,
        "problems": problems,
        "warnings": warnings,
        "loads": not problems,
        "needs": given,
        "call": _calls(path, found, given, bases),
    }


def _problems(
    found: Checkpoint, language: Backbone, tower: Backbone
) -> tuple[LlavaSPConfig | None, Comparison, list[str], list[str]]:
    """The configuration that opening would use, the tensors that differ from it, every error of opening, and warnings."""
    problems = [
        f"its {what}: {backbone.problem}"
        for what, backbone in (("language model", language), ("vision tower", tower))
        if backbone.problem is not None
    ]
    config, comparison = None, compare(found, None)
    warnings: list[str] = []
    try:
        config = _config(found, language, tower)
        comparison = compare(found, config)
        for tensor in {tensor.file: tensor for tensor in found.tensors.values()}.values():
            hold_to_sha256(tensor.file, tensor.sha256)
        if not problems:
            problems, warnings = _try_processor(found, language, tower)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        problems.append(f"its configuration: {error}")
    return config, comparison, problems + comparison.lines(), warnings


# ---- the backbones


def _language(found: Checkpoint) -> Backbone:
    if found.holds_language_model:
        recorded = found.language_model if found.format == "llava_sp" else None
        return Backbone(recorded, "within", found.folder, fingerprint=found.config.get("language_model_fingerprint"))
    return _place(found, found.language_model, found.config.get("language_model_fingerprint"))


def _tower(found: Checkpoint) -> Backbone:
    fingerprint = found.config.get("vision_tower_fingerprint")
    if found.holds_vision_tower:
        recorded = found.vision_tower if found.format == "llava_sp" else None
        return Backbone(recorded, "within", found.folder, fingerprint=fingerprint)
    return _place(found, found.vision_tower, fingerprint)


def _place(found: Checkpoint, recorded: str | None, fingerprint: str | None) -> Backbone:
    """Where opening would look: the path itself, relative to the checkpoint, on the hub."""
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
    """A problem of its files or their headers; whether the model is complete is checked on opening."""
    try:
        read_all_settings(folder)
        for file in weight_files(folder):
            stored_tensors(file)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _cached(name: str) -> Path | None:
    """The folder of a hub model in the cache, if configuration and weights are complete; never queries the hub."""
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    try:
        weight_files(Path(config).parent)
    except ValueError:  # only a configuration, or only some shards
        return None
    return Path(config).parent


# ---- the expected model


def _config(found: Checkpoint, language: Backbone, tower: Backbone) -> LlavaSPConfig | None:
    """The configuration of the model that opening would build; None if too little is known of its backbones."""
    if found.format == "llava_sp":
        return recorded_config(found)
    text, vision = _text_config(found, language), _vision_config(found, tower)
    if found.format == "llava_sp_adapter":  # it has the shapes, but opening reads those of its bases
        return recorded_config(found)
    if text is None or vision is None:
        return None
    return LlavaSPConfig(
        text_config=text, vision_config=vision, vision_feature_layer=found.feature_layer, **found.spatial
    )


def _text_config(found: Checkpoint, language: Backbone) -> PreTrainedConfig | None:
    """The language model's: of the base if available, else the checkpoint's copy, else with only its width."""
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


def _try_processor(found: Checkpoint, language: Backbone, tower: Backbone) -> tuple[list[str], list[str]]:
    """Problems of tokenizers and image settings, built as on opening, as far as they are on this machine, and warnings."""
    processor: LlavaSPProcessor | None = None
    bases = {"language_model": language.folder, "vision_tower": tower.folder}
    try:
        if found.is_original:
            recorded_aspect_ratio(found)
        if found.format not in OURS and has_tokenizer(found):
            read_vocabulary(found.folder)
        if found.format != "llava_sp" and language.folder is not None:
            _, *ids, _ = read_vocabulary(language.folder)
            if found.format not in OURS:
                check_language_model(found, language_config(language.folder), tuple(ids))
        if found.format in OURS and _has_processor(found):
            processor = open_processor(LlavaSPProcessor, found)
        elif found.format not in OURS and None not in bases.values():
            own = {"language_model": found.holds_language_model, "vision_tower": found.holds_vision_tower}
            given: dict[str, Any] = {keyword: folder for keyword, folder in bases.items() if not own[keyword]}
            processor = make_processor(LlavaSPProcessor, found, **given, local_files_only=True)
    except (ValueError, OSError) as error:
        return [f"its processor: {error}"], []
    with contextlib.suppress(ValueError, OSError):  # a template that cannot train
        warning = processor and never_stops(processor, language.folder or found.folder, local_files_only=True)
        return [], [warning] if warning else []
    return [], []


def _has_processor(found: Checkpoint) -> bool:
    return (found.folder / "processor_config.json").is_file()


# ---- the report


def _spatial(found: Checkpoint, config: LlavaSPConfig | None) -> dict[str, Any]:
    """Variant and layout; the grid (None where not known) comes from the tower, or from the largest scale."""
    settings = dict(found.spatial)
    if config is None:
        return {"spatial_variant": settings.pop("spatial_variant", None), **settings, "grid_size": None}
    layout = ["spatial_fusion", "spatial_scales", "spatial_width", "spatial_projection_bias"]
    layout = [] if config.spatial_variant == "none" else [*layout, "fusion_kernel", "fusion_stride"]
    names = ("spatial_variant", *layout, "num_spatial_tokens", "num_patch_tokens", "grid_size")
    return {name: getattr(config, name) for name in names}


def _template(found: Checkpoint) -> dict[str, Any]:
    """The template in our processor's files; other code records none, where LLaVA-1.5's is used."""
    settings: dict[str, Any] = {}
    if found.format in OURS and _has_processor(found):
        with contextlib.suppress(ValueError, OSError):  # reported as a separate problem
            settings = read_json(found.folder / "processor_config.json", dict)
    ratio = settings.get("image_aspect_ratio") or found.config.get("image_aspect_ratio")
    return {"recorded": settings.get("conversation_template"), "image_aspect_ratio": ratio}


def _parts(found: Checkpoint) -> dict[str, dict[str, Any]]:
    groups = {
        part: [t for n, t in found.tensors.items() if n.startswith(prefixes) and LORA not in n]
        for part, prefixes in PARTS.items()
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


def _merged(found: Checkpoint) -> dict[str, Any] | None:
    file = found.folder / MERGE_RECORD
    try:
        return read_json(file, MERGED) if file.is_file() else None
    except (ValueError, OSError):
        return {"unreadable": f"{file.name} is not a valid record of a merge"}


def _calls(path: str | os.PathLike, found: Checkpoint, given: list[str], bases: tuple[Backbone, Backbone]) -> list[str]:
    """The lines of Python that open model and processor."""
    keywords = "".join(f', {keyword}="{PLACEHOLDERS[keyword]}"' for keyword in given)
    place = json.dumps(str(path), ensure_ascii=False)
    processor = f"LlavaSPProcessor.from_pretrained({place}{keywords})"
    if found.format in OURS and not _has_processor(found):
        processor = f"LlavaSPProcessor.from_backbones({', '.join(['model.config', *_bases_to_name(found, bases)])})"
    return [f"model = LlavaSPForCausalLM.from_pretrained({place}{keywords})", f"processor = {processor}"]


def _bases_to_name(found: Checkpoint, bases: tuple[Backbone, Backbone]) -> list[str]:
    """Keywords for the backbones of a full checkpoint of ours, if these can no longer be found."""
    if found.format != "llava_sp":
        return []  # the opened model records the ones it was opened on
    lost = [_place(found, backbone.recorded, None).status == "missing" for backbone in bases]
    words = {"language_model": PLACEHOLDERS["language_model"], "vision_tower": PLACEHOLDERS["vision_tower"]}
    return [f'{keyword}="{word}"' for (keyword, word), gone in zip(words.items(), lost) if gone]
