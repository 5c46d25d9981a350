"""The surfaces by name."""

from __future__ import annotations

from tests.hostile.surfaces import checkpoints, commands, data, evaluation, runs
from tests.hostile.surfaces.base import Surface

SURFACES: dict[str, Surface] = {
    surface.name: surface for module in (checkpoints, data, runs, evaluation, commands) for surface in module.SURFACES
}
