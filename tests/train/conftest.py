"""Fixtures of the training tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tests.train.runs import LAUNCHER_VARIABLES


@contextlib.contextmanager
def no_launcher() -> Iterator[None]:
    """One thread, and no launcher's variables: neither from outside nor left behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for key in LAUNCHER_VARIABLES:
            patch.setenv(key, "")
            patch.delenv(key)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_process():
    with no_launcher():
        yield
