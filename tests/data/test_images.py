"""Every way in which an image file can be bad has its own message."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from llava_sp.data.annotations import BadSample
from llava_sp.data.images import MAX_PIXELS, decode_image, load_image


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "images"
    (inside / "sub").mkdir(parents=True)
    Image.effect_noise((64, 48), 50).convert("RGB").save(inside / "sub" / "good.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    return inside


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; its data is one empty stream."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_good_image(folder):
    image = load_image(folder, "sub/good.jpg")
    assert image.mode == "RGB" and image.size == (64, 48)
    Image.new("RGBA", (3, 2), (1, 2, 3, 0)).save(folder / "rgba.png")
    assert load_image(folder, "rgba.png").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "sub/../../outside.png", "../../x.jpg", "sub\\..\\..\\outside.png", "sub/../sub/good.jpg"],
)
def test_names_that_lead_out_of_the_folder(folder, name):
    with pytest.raises(BadSample, match="outside the image folder"):
        load_image(folder, name)


def test_absolute_names(folder):
    for name in (str(folder.parent / "outside.png"), str(folder / "sub" / "good.jpg"), "C:\\x.png", "//host/x.png"):
        with pytest.raises(BadSample, match="outside the image folder"):
            load_image(folder, name)


def test_links_are_the_owners_layout(folder):
    """LLaVA's playground/data is a folder of links; they are followed."""
    (folder / "coco").symlink_to(folder.parent, target_is_directory=True)
    assert load_image(folder, "coco/outside.png").size == (9, 9)
    with pytest.raises(BadSample, match="outside the image folder"):
        load_image(folder, "coco/../outside.png")


def test_bad_files(folder):
    whole = (folder / "sub" / "good.jpg").read_bytes()
    contents = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "text.jpg": b"<html>404 Not Found</html>",
        "cut.png": png(64, 64),
        "broken.png": png(64, 64)[:40] + b"\0" * 20,
        "huge.png": png(30000, 30000),
        "large.png": png(MAX_PIXELS // 8000 + 1, 8000),
        "wide.png": png(20000, 4000),
        "thin.png": png(1, 201),
        "bomb.bmp": Image.new("1", (1, 1)).tobytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    expected = {
        "missing.jpg": "missing.jpg cannot be opened: No such file",
        "sub": "sub cannot be opened: Is a directory",
        "sub/good.jpg/x.jpg": "cannot be opened: Not a directory",
        "empty.jpg": r"empty.jpg is empty \(0 bytes\)",
        "cut.jpg": r"cut.jpg is damaged or cut off \(\d+ bytes\)",
        "text.jpg": r"text.jpg is not an image: its 26 bytes begin with b'<html>404",
        "cut.png": "cut.png is damaged or cut off",
        "broken.png": "broken.png is (damaged or cut off|not an image)",
        "huge.png": "huge.png is (30000 x 30000, 900,000,000 pixels|too large), .*89,478,485",
        "large.png": "large.png is 11185 x 8000, 89,480,000; the limit is 89,478,485 pixels",
        "wide.png": "wide.png is 20000 x 4000, 20,000; the limit is 16,384 a side",
        "thin.png": r"thin.png is 1 x 201, 201; the limit is 200 a side \(200 times the other\)",
        "bomb.bmp": "bomb.bmp is not an image",
        "a\0b.png": "outside the image folder",
    }
    for name, message in expected.items():
        with pytest.raises(BadSample, match=message):
            load_image(folder, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(20000, 4000), "one is 20000 x 4000, 20,000; the limit is 16,384 a side"),
        (png(1, 201), "one is 1 x 201, 201; the limit is 200 a side"),
        (png(30000, 30000), "one is .*89,478,485"),
        (b"", "one is empty"),
        (b"<html>", "one is not an image: its 6 bytes begin with b'<html>'"),
    ],
)
def test_bytes_have_the_same_limits(content, message):
    with pytest.raises(BadSample, match=message):
        decode_image(content, "one")
