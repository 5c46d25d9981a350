"""Fixtures shared by all tests. Nothing here touches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The recorded outputs of the original code (see tests/golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).parent.parent
