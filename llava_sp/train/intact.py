"""Whether a checkpoint is unchanged: a list of its files, with sizes and hashes, which is written last."""

from __future__ import annotations

from pathlib import Path

from llava_sp.common.files import identity, read_json, sha256, write_json

FILE_LIST = "files.json"
FORMAT = 2  # of a checkpoint's files; to be raised when a run can no longer resume from older ones. 1 had no number
_LISTED = {"bytes": int, "sha256": str}
_SPEC = {"checkpoint": str, "format": int, "files": {str: _LISTED}}


def write_file_list(folder: Path) -> None:
    """List every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE_LIST)
    listed = {path.relative_to(folder).as_posix(): identity(path) for path in files}
    write_json(folder / FILE_LIST, {"checkpoint": folder.name, "format": FORMAT, "files": listed})


def check_format(folder: Path) -> None:
    """Raises `ValueError` for a checkpoint of another version; a damaged one passes, and `damage` names it."""
    try:
        listed = read_json(folder / FILE_LIST, {"checkpoint": str, "format?": int, "files": dict})
    except (ValueError, OSError):
        return
    number = listed.get("format", 1)
    if number != FORMAT:
        raise ValueError(
            f"{folder} was written by {'an earlier' if number < FORMAT else 'a later'} version of llava_sp: "
            f"{folder / FILE_LIST}: format is {number}; this version resumes from format {FORMAT}. Resume with that version, "
            "or choose another output_dir"
        )


def damage(folder: Path, *names: str) -> str | None:
    """The first damaged file of a checkpoint (of `names`, or of all files) and the damage; None if it is intact.

    Reads whole files.
    """
    try:
        listed = read_json(folder / FILE_LIST, _SPEC)
    except (ValueError, OSError) as error:
        return f"{error} (written last; it lists the files of the checkpoint)"
    if listed["checkpoint"] != folder.name:
        return f"{folder / FILE_LIST} belongs to {listed['checkpoint']}"
    for name in names or listed["files"]:
        file, was = folder / name, listed["files"].get(name)
        if was is None or not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != was["bytes"]:
            return f"{file} is {file.stat().st_size:,} bytes long; it was {was['bytes']:,}"
        if sha256(file) != was["sha256"]:
            return f"{file} was changed after it was written (its sha256 differs)"
    return None
