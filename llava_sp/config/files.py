"""Reading configuration files: YAML with `base:` and `${VARIABLES}`, JSON, command-line words. Knows no keys."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

BASE_KEY = "base"
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class UsageError(ValueError):
    """Something the user can put right; its message needs no traceback."""


class FailedHere(UsageError):
    """A UsageError that one process meets while the others may be well, so that it has to be told by that process."""


def read_yaml(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file and the files it builds on, as (file, its keys), the most basic one first.

    Raises UsageError for a missing file, a file that is no mapping, an unset variable, a circle of bases.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    file: Path | None = Path(path).expanduser()
    asked_by = "command line"
    while file is not None:
        file = file.resolve()
        if file in [seen for seen, _ in chain]:
            raise UsageError(f"{asked_by}: the bases of a configuration form a circle ({file}).")
        keys = _read_one(file, asked_by)
        base = keys.pop(BASE_KEY, None)
        chain.append((file, keys))
        asked_by = str(file)
        file = None if base is None else file.parent / Path(base).expanduser()
    return chain[::-1]


def _read_one(file: Path, asked_by: str) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{asked_by}: there is no configuration file {file}.")
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not valid YAML: {error}") from error
    if keys is None:
        return {}
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise UsageError(f"{file} must be a mapping of keys to values.")
    return {key: _expand(value, file, key) for key, value in keys.items()}


def _expand(value: Any, file: Path, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _expand(item, file, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, file, key) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name == "config_dir":
            return str(file.parent)
        if os.environ.get(name):
            return os.environ[name]
        if default is None:
            raise UsageError(f"{file}: {key} = {value!r} needs the environment variable {name}, which is not set.")
        return default

    text = VARIABLE.sub(replace, value)
    if VARIABLE.fullmatch(value):  # the whole value is one variable: it may be a number, a truth value or null
        plain = yaml.safe_load(text) if text else None
        return text if isinstance(plain, (dict, list)) else plain
    return text


def read_json(path: str | Path, asked_by: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"{asked_by}: there is no file {file}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object.")
    return content


def split_command_line(words: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b`, `--flag` -> {key: value}. `null` gives None."""
    values: dict[str, Any] = {}
    key: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            values[key] = [value] if equals else []
        elif key is None:
            raise UsageError(f"command line: expected --key value, found {word!r}.")
        else:
            values[key].append(word)
    return {key: _one_or_many(found) for key, found in values.items()}


def _one_or_many(found: list[str]) -> Any:
    if not found:
        return True
    if len(found) == 1:
        return None if found[0] == "null" else found[0]
    return found


def nearest(key: str, known: Iterable[str]) -> str:
    """The valid key that `key` resembles most."""
    known = sorted(known)
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
