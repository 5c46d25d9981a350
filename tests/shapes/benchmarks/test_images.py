"""The images: all there, each as its scene says, none seen in training."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from llava_sp.shapes.world import digit_instances, draw, split_of
from tests.shapes.benchmarks.truth import as_scene, read_table


def test_every_image_shows_its_scene(world, graphs):
    """Each image in the scene file exists, is readable and is the scene drawn again, unless it was changed on purpose."""
    shown = set()
    for name, graph in graphs.items():
        if ".tsv:" in name:
            continue
        with Image.open(world / name) as image:
            pixels = np.asarray(image.convert("RGB")).astype(float)
        shown.add(name)
        if graph.get("quality", "clean") == "clean" and "boxed" not in graph and "offset" not in graph:
            assert np.abs(pixels - np.asarray(draw(as_scene(graph)))).mean() < 4, name
    pictures = {path.relative_to(world).as_posix() for path in world.rglob("*") if path.suffix in (".jpg", ".png", "")}
    assert {path for path in pictures if (world / path).is_file()} == shown


def test_every_scene_is_held_out(graphs):
    allowed = {instance for group in digit_instances("val").values() for instance in group}
    for name, graph in graphs.items():
        scene = as_scene(graph)
        assert split_of(scene.signature()) == "val", name
        assert {thing.instance for thing in scene.things if thing.kind == "digit"} <= allowed, name


def test_images_in_tables(world, graphs):
    sizes = []
    for folder, name in (("mmbench", "mmbench_dev_20230712.tsv"), ("mmbench_cn", "mmbench_dev_cn_20231003.tsv")):
        for row in read_table(world / folder / name, "\t"):
            scene = as_scene(graphs[f"{folder}/{name}:{int(row['index']) % 1_000_000}"])
            with Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True))) as image:
                pixels = np.asarray(image.convert("RGB").resize((96, 96))).astype(float)
            assert np.abs(pixels - np.asarray(draw(scene))).mean() < 6
            sizes.append(len(row["image"]))
    assert max(sizes) > 131_072, "no image is larger than the csv module's default limit, as real ones are"
