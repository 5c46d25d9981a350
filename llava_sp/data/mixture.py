"""Training data: annotation files with their image folders, each with a weight.

A mixture file is a YAML list; paths are relative to it, `~` and `$VARIABLES` are replaced:

    - annotations: llava_v1_5_mix665k.json
      images: .
    - {annotations: charts.jsonl, images: charts, weight: 0.5}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sp.common.schema import Check, expect_all, only
from llava_sp.config.files import read_yaml

PATH = Check(lambda path: isinstance(path, (str, os.PathLike)) and path != "", "a path")
ENTRY = only(
    {
        "annotations": PATH,
        "images?": (PATH, None),
        "weight?": Check(lambda weight: 0 < weight <= 1000, "a number above 0, at most 1,000", float),
    }
)


@dataclass(frozen=True)
class Source:
    """One annotation file.

    Attributes:
        annotations: LLaVA JSON or JSONL.
        images: the folder that its image names are relative to; the annotations' own folder if not given.
        weight: how often each record is seen in an epoch. 2 is twice; 0.5 is half of the records, drawn by the
            dataset's seed and the same in every epoch; 1.5 is all of them plus such a half.
    """

    annotations: Path
    images: Path
    weight: float = 1.0


def load_mixture(mixture: str | os.PathLike | Sequence[Source | Mapping[str, Any]]) -> list[Source]:
    """The sources of a mixture: a YAML file, or a list of sources or of their keys (paths as they are).

    Whether annotations and images exist is not checked. Raises `ValueError` for a file that is missing or not YAML,
    or whose content does not fit `ENTRY`.
    """
    entries: Any = mixture
    folder, name = Path(), "the mixture"
    if isinstance(mixture, (str, os.PathLike)):
        path = Path(mixture)
        entries, folder, name = read_yaml(path, list), path.parent, str(path)
    plain = [vars(entry) if isinstance(entry, Source) else entry for entry in entries]
    sources = []
    for entry in expect_all(plain, ENTRY, name, "entry"):
        annotations = _path(folder, entry["annotations"])
        images = _path(folder, entry["images"]) if entry.get("images") else annotations.parent
        sources.append(Source(annotations, images, float(entry.get("weight", 1.0))))
    return sources


def _path(folder: Path, text: str | os.PathLike) -> Path:
    return folder / os.path.expanduser(os.path.expandvars(os.fspath(text)))
