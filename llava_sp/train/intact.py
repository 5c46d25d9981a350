"""Whether a checkpoint is what was written: a list of its files, with sizes and hashes, that is written last."""

from __future__ import annotations

from pathlib import Path

from llava_sp.common.files import read_json, sha256, write_json

FILE_LIST = "files.json"
_LISTED = {"bytes": int, "sha256": str}
_SPEC = {"checkpoint": str, "files": {str: _LISTED}}


def write_file_list(folder: Path) -> None:
    """List every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE_LIST)
    listed = {path.relative_to(folder).as_posix(): _described(path) for path in files}
    write_json(folder / FILE_LIST, {"checkpoint": folder.name, "files": listed})


def damage(folder: Path, *names: str) -> str | None:
    """What is wrong with a checkpoint's files (those of `names`, or all): the file and how; None for an intact one.

    All of it is read.
    """
    try:
        listed = read_json(folder / FILE_LIST, _SPEC)
    except (ValueError, OSError) as error:
        return f"{error} (it was written last, and says what belongs to the checkpoint)"
    if listed["checkpoint"] != folder.name:
        return f"{folder / FILE_LIST} is that of {listed['checkpoint']}"
    for name in names or listed["files"]:
        file, was = folder / name, listed["files"].get(name)
        if was is None or not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != was["bytes"]:
            return f"{file} is {file.stat().st_size:,} bytes long; it was {was['bytes']:,}"
        if sha256(file) != was["sha256"]:
            return f"{file} was altered since it was written (its sha256 is another)"
    return None


def _described(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}
