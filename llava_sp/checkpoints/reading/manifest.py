"""The manifests that we write beside weights.

llava_sp.json lists the content of an adapter checkpoint; it is written last, so an interrupted save has none.
merged.json records what a full checkpoint was merged from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp.common.files import read_json, sha256
from llava_sp.common.schema import Check, expect

MANIFEST = "llava_sp.json"
MERGE_RECORD = "merged.json"
MERGED = {"adapter": {"path": str, "hash": str}, "language_model": {"path": (str, None)}, "date": str}
_BASE = Check(lambda value: len(value) == 2, "a path and a fingerprint", [(str, None)])
_MANIFEST = {
    "files": Check(bool, "the files with tensors", {str: {"bytes": int, "sha256": str}}),
    "language_model": _BASE,
    "vision_tower": _BASE,
    "run?": dict,
}


def describe(folder: Path) -> dict[str, Any]:
    """The manifest of an adapter checkpoint.

    Raises:
        ValueError: it is missing, or a tensor file is missing or not of the recorded length.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: saving was interrupted; use an earlier one or train again")
    manifest = read_json(file, _MANIFEST)
    for name, about in manifest["files"].items():
        tensors = folder / name
        size = tensors.stat().st_size if tensors.is_file() else None
        if size != about["bytes"]:
            raise ValueError(f"{tensors} is {size} bytes long, but {MANIFEST} records {about['bytes']}: cut off")
    return manifest


def hold_to_sha256(file: Path, recorded: str | None) -> None:
    """Raises `ValueError` if a file's hash is not that in the manifest; takes about a second per GiB."""
    right = f"{recorded}, as in {MANIFEST} (if it was changed on purpose, correct it there)"
    same = Check(lambda now: now == recorded, right, str)
    if recorded is not None:
        expect(sha256(file), same, f"{file} is not the file that was saved: its sha256")
