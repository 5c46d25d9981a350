"""The recorded runs of the official scorers, and the files they were run on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def write_files(folder: Path, files: dict[str, dict]) -> Path:
    """Writes recorded files `{relative path: {kind, data}}` as they would be downloaded; returns the folder."""
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file["kind"] == "json":
            path.write_text(json.dumps(file["data"]), encoding="utf-8")
        elif file["kind"] == "jsonl":
            path.write_text("".join(json.dumps(line) + "\n" for line in file["data"]), encoding="utf-8")
        else:
            path.write_bytes(file["data"].encode())
    return folder


@pytest.fixture
def official(golden, tmp_path) -> Callable[[str], tuple[dict, Path]]:
    """`official(name)`: what `tests/golden/eval/NAME.json` records, and a folder with its files."""

    def read(name: str) -> tuple[dict, Path]:
        recorded = json.loads((golden / "eval" / f"{name}.json").read_text(encoding="utf-8"))
        return recorded, write_files(tmp_path / "data", recorded.get("files", {}))

    return read


@pytest.fixture
def recorded(request, golden) -> dict:
    """What was recorded of the benchmark that the test module names in `RECORDING`."""
    return json.loads((golden / "eval" / f"{request.module.RECORDING}.json").read_text(encoding="utf-8"))


@pytest.fixture
def data(request, official) -> Path:
    """A folder with the files of the module's recording."""
    return official(request.module.RECORDING)[1]


@pytest.fixture
def answers(data) -> Path:
    """The recorded answers file."""
    return next(
        data / "answers" / name for name in ("merge.jsonl", "model.jsonl") if (data / "answers" / name).exists()
    )


@pytest.fixture
def official_error(golden, tmp_path) -> Callable[[str, str], tuple[dict, Path]]:
    """`official_error(name, case)`: an error case of the recording, and a folder with its files."""

    def read(name: str, case: str) -> tuple[dict, Path]:
        recorded = json.loads((golden / "eval" / f"{name}.json").read_text(encoding="utf-8"))
        found = next(entry for entry in recorded["error_cases"] if entry["name"] == case)
        return found, write_files(tmp_path / case, found["files"])

    return read


@pytest.fixture
def recorded_prompts(golden) -> dict:
    """Prompts and arguments of `generate` that LLaVA's own scripts gave, by benchmark."""
    return json.loads((golden / "eval" / "prompts.json").read_text(encoding="utf-8"))["expected"]
