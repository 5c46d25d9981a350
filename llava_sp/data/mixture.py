"""What is learned from: annotation files with their image folders, each with a weight.

A mixture file is a YAML list; paths are relative to it, `~` and `$VARIABLES` are replaced:

    - annotations: llava_v1_5_mix665k.json
      images: .
    - {annotations: charts.jsonl, images: charts, weight: 0.5}
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Source:
    """One annotation file.

    Attributes:
        annotations: LLaVA JSON or JSONL.
        images: the folder that its image names are relative to; the annotations' own folder if not given.
        weight: how often each record is seen in an epoch. 2 is twice; 0.5 is a half of the records, drawn by the
            dataset's seed and the same in every epoch; 1.5 is all of them and such a half again.
    """

    annotations: Path
    images: Path
    weight: float = 1.0


def load_mixture(mixture: str | os.PathLike | Sequence[Source | Mapping[str, Any]]) -> list[Source]:
    """The sources of a mixture: a YAML file, or a list of sources or of their keys (paths relative to here then).

    Raises:
        ValueError: as `parse_mixture`, and for annotations that are not there.
    """
    sources = parse_mixture(mixture)
    name = "the mixture" if not isinstance(mixture, (str, os.PathLike)) else str(mixture)
    for index, source in enumerate(sources):
        if not source.annotations.is_file():
            raise ValueError(f"{name}, entry {index}: there is no annotation file {source.annotations}")
    return sources


def parse_mixture(mixture: str | os.PathLike | Sequence[Source | Mapping[str, Any]]) -> list[Source]:
    """As `load_mixture`, without looking whether annotations and images are there.

    Raises:
        ValueError: no such file, no YAML, not a list, an unknown key, a value of the wrong type, a weight that is not a
            positive number.
    """
    if isinstance(mixture, (str, os.PathLike)):
        path = Path(mixture)
        entries, folder, name = _read(path), path.parent, str(path)
    else:
        entries, folder, name = mixture, Path(), "the mixture"
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ValueError(f"{name} must be a list of {{annotations, images, weight}} with at least one entry")
    return [
        entry if isinstance(entry, Source) else _source(entry, folder, f"{name}, entry {index}")
        for index, entry in enumerate(entries)
    ]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no mixture file {path}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _source(entry: Any, folder: Path, place: str) -> Source:
    keys = [field.name for field in fields(Source)]
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place} is {entry!r}; a mapping with the keys {', '.join(keys)} is needed")
    for key in entry:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)
            raise ValueError(f"{place}: unknown key {key!r}; did you mean {close[0]!r}?")
    if not entry.get("annotations"):
        raise ValueError(f"{place} names no annotations file")
    for key in ("annotations", "images"):
        if not isinstance(entry.get(key) or "", (str, os.PathLike)):
            raise ValueError(f"{place}: {key} is {entry[key]!r}; a path is needed")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (0 < weight < math.inf):
        raise ValueError(f"{place}: weight is {weight!r}; a number above 0 is needed")
    annotations = _path(folder, entry["annotations"])
    images = _path(folder, entry["images"]) if entry.get("images") else annotations.parent
    return Source(annotations, images, float(weight))


def _path(folder: Path, text: str | os.PathLike) -> Path:
    return folder / os.path.expanduser(os.path.expandvars(os.fspath(text)))
