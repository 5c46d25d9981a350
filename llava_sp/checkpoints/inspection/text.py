"""The report of a checkpoint as aligned text."""

from __future__ import annotations

from typing import Any

from llava_sp.checkpoints.inspection.report import PARTS, PLACEHOLDERS
from llava_sp.checkpoints.opening.fit import Comparison, hints
from llava_sp.checkpoints.reading.formats import FORMATS, OURS

_SHOWN = 6  # lines per kind of problem in the text; the JSON has all


def text(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    rows = [] if report["format"] is None else _about(report)
    if report["loads"]:
        needs = " and ".join(f"{keyword}=" for keyword in report["needs"])
        verdict = f"yes, given {needs}" if needs else "yes"
        if any(report[keyword]["status"] == "hub" for keyword in PLACEHOLDERS):
            verdict += ", after a download"
        rows += _rows("loads", [verdict, *report["call"]])
    else:
        rows += _rows("loads", ["no", *_cut(_reasons(report))])
    rows += [("warning", warning) for warning in report["warnings"]]
    return "\n".join([report["path"], *(f"  {label:<15}{value}".rstrip() for label, value in rows)])


def _about(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("format", f"{FORMATS[report['format']].title} ({report['format']})"), *_spatial_rows(report["spatial"])]
    rows += [("base", _backbone_text(report["language_model"], "language_model"))]
    rows += [("tower", _backbone_text(report["vision_tower"], "vision_tower"))]
    rows += [("template", _template_text(report["conversation_template"], report["format"]))]
    for part in (*PARTS, "LoRA"):
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
    """Why it does not load; tensors, which the rows above name, are only counted."""
    lists = Comparison(*(report.get(name, []) for name in vars(Comparison())))
    reasons = [problem for problem in report["problems"] if problem not in lists.lines()]
    counts = [f"{len(entries)} {name.replace('_', ' ')}" for name, entries in vars(lists).items() if entries]
    if counts:
        reasons.append(f"tensors: {', '.join(counts)}")
    return reasons + hints(report["format"], lists)


def _rows(label: str, lines: list[str]) -> list[tuple[str, str]]:
    return [(label, lines[0]), *(("", line) for line in lines[1:])]


def _entry_text(entry: dict[str, Any]) -> str:
    shape = f" {entry['shape']}" if "shape" in entry else ""
    expected = f", expected {entry['expected']}" if "expected" in entry else ""
    return f"{entry['key']}{shape}{expected}  in {entry['file']}"


def _spatial_rows(spatial: dict[str, Any]) -> list[tuple[str, str]]:
    grid, variant = spatial.get("grid_size"), spatial.get("spatial_variant")
    side = "an unknown grid" if grid is None else f"a {grid} x {grid} grid"
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
    where = {
        "there": "there" if str(backbone["folder"]) == recorded else f"there, in {backbone['folder']}",
        "cached": "in the hub's cache",
        "hub": "on the hub, not in the cache",
        "missing": f"not found; pass {keyword}=",
    }
    fingerprint = f" (fingerprint {backbone['fingerprint']})" if backbone["fingerprint"] else ""
    return f"{recorded}{fingerprint}: {where[status]}"


def _template_text(template: dict[str, Any], kind: str) -> str:
    recorded, ratio = template["recorded"], template["image_aspect_ratio"]
    images = {"pad": "; images padded to a square", "crop": "; images cropped to a square"}.get(ratio, "")
    if recorded is not None:
        return recorded + images
    if kind in OURS:
        return "not recorded: no processor files beside the weights; vicuna_v1 by default"
    return f"not recorded by this format; vicuna_v1 is used{images}"


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
