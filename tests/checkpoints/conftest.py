from __future__ import annotations

import pytest

from tests.checkpoints.kinds import Kind, build


@pytest.fixture(scope="session")
def kinds(golden, tmp_path_factory) -> dict[str, Kind]:
    """A checkpoint of every format; to be copied before it is changed."""
    return build(golden, tmp_path_factory.mktemp("kinds"))
