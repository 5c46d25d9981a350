"""All benchmarks, written once for all test files and processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from llava_sp.shapes.benchmarks import Settings, write_all


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Where all benchmarks stand: read only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    with FileLock(base / "shapes_benchmarks.lock"):
        write_all(
            base / "shapes_benchmarks", Settings(questions=60), log=lambda text: None
        )  # once: later calls find it
    return base / "shapes_benchmarks"


@pytest.fixture(scope="session")
def graphs(world) -> dict[str, dict]:
    """The scene behind every image: its path below `world` -> the graph."""
    return json.loads((world / "scenes.json").read_text())
