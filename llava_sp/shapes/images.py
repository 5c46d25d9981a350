"""Images of scenes on the disk, and the scene behind each of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava_sp.common.files import writing
from llava_sp.shapes.world import Scene, draw

JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}


@dataclass
class Images:
    """The images below a folder; `scenes` is what each of them shows: its path in the folder -> the scene graph."""

    folder: Path
    scenes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, name: str, scene: Scene, image: Image.Image | None = None, **more: Any) -> str:
        """Draw `scene`, or write `image`, which was made of it, to the file `name`: a JPEG, unless it ends in .png.

        `more` is recorded beside the scene.
        """
        path = self.folder / name
        options = {"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", **JPEG}
        with writing(path):
            (draw(scene) if image is None else image).save(path, **options)
        self.record(name, scene, **more)
        return name

    def record(self, name: str, scene: Scene, **more: Any) -> None:
        """What the image `name` shows, where something else draws it."""
        self.scenes[name] = asdict(scene) | more
