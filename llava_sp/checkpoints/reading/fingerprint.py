"""Hashes that identify weights, computed without loading the tensors."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llava_sp.checkpoints.reading.formats import Checkpoint, UnknownFormat, recognise
from llava_sp.checkpoints.reading.places import fetch_config
from llava_sp.checkpoints.reading.tensor_files import tensor_lines, weight_files


def weights_fingerprint(path: str | os.PathLike, **hub_kwargs) -> str:
    """Hash of the name, shape, type and a few values of every weight of a backbone, a folder or a hub id.

    The same for the same weights as safetensors or `.bin`, in any sharding; different for other weights.
    """
    config = fetch_config(path, **hub_kwargs)
    return _hash_of(weight_files(config.parent if config else Path(path)))


def checkpoint_hash(checkpoint: str | os.PathLike | Checkpoint) -> str:
    """16 hex digits that identify the weights of a checkpoint of any format, for provenance."""
    if isinstance(checkpoint, Checkpoint):
        found = checkpoint
    else:
        try:
            found = recognise(checkpoint)
        except UnknownFormat:  # a backbone
            return weights_fingerprint(checkpoint)
    if found.manifest is None:
        return _hash_of(found.files)
    parts = [file["sha256"] for _, file in sorted(found.manifest["files"].items())]
    parts += [str(found.manifest[base][1]) for base in ("language_model", "vision_tower")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _hash_of(files: list[Path]) -> str:
    lines = sorted(line for file in files for line in tensor_lines(file))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
