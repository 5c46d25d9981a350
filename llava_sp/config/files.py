"""Reading configurations, whatever their keys: YAML with `base:` and `${VARIABLES}`, command-line words, types."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from llava_sp.common.files import read_text
from llava_sp.common.schema import Spec, expect, fits, one_of

VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def read_yaml(path: Path, spec: Spec) -> Any:
    """The content of a YAML file that fits `spec` (see `common.schema`). Raises `ValueError` with the file, and line or key."""
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return expect({} if content is None else content, spec, path)


def read_with_bases(path: str | os.PathLike) -> list[tuple[Path, dict[str, Any]]]:
    """The file and the files it builds on, as (file, its keys), the most basic one first.

    Raises `ValueError` for a missing file, a file that is not a mapping, an unset variable, circular bases.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    file, named_by = Path(path).expanduser().resolve(), "command line"
    while True:
        if not file.is_file():
            raise ValueError(f"{named_by}: there is no configuration file {file}")
        if any(file == seen for seen, _ in chain):
            raise ValueError(f"{named_by}: the bases of a configuration are circular ({file})")
        content = read_yaml(file, {"base?": (str, None)})
        keys = {str(key): _expand(value, file, str(key)) for key, value in content.items()}
        chain.insert(0, (file, keys))
        base = keys.pop("base", None)
        if base is None:
            return chain
        file, named_by = (file.parent / Path(base).expanduser()).resolve(), f"{file}: base"


def _expand(value: Any, file: Path, key: str) -> Any:
    """`value` with its variables replaced, in nested values too."""
    if isinstance(value, dict):
        return {name: _expand(item, file, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, file, key) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = str(file.parent) if name == "config_dir" else os.environ.get(name) or default
        if found is None:
            raise ValueError(f"{file}: {key} = {value!r} needs the environment variable {name}, which is not set")
        return found

    text = VARIABLE.sub(replace, value)
    if VARIABLE.fullmatch(value):  # the whole value is one variable: it may be a number, a truth value or null
        plain = yaml.safe_load(text) if text else None
        return text if isinstance(plain, (dict, list)) else plain
    return text


def split_command_line(words: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b`, `--flag` -> {key: value}. `null` gives None."""
    found: dict[str, list[str]] = {}
    key: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            found[key] = [value] if equals else []
        elif key is None:
            raise ValueError(f"command line: expected --key value, found {word!r}")
        else:
            found[key].append(word)
    one = {key: None if values == ["null"] else values[0] for key, values in found.items() if len(values) == 1}
    return {key: one.get(key, values or True) for key, values in found.items()}


def typed(values: Mapping[str, Any], specs: Mapping[str, Spec], origin: Mapping[str, str]) -> dict[str, Any]:
    """The values, converted to the types of their specs. Raises `ValueError` naming origin, key and value.

    A text may be a number, a truth value, an object: all words of the command line are texts, and YAML reads 1e-3 as
    one. A number may be given for a text, one item for a list.
    """
    found = {}
    for key, value in values.items():
        items = [_plain(item) for item in value] if isinstance(value, list) else _plain(value)
        readings = [value, items, [value], [items], bool(items) if items in (0, 1) else value]
        if isinstance(value, (bool, int, float)):
            readings.append(str(value))
        found[key] = next((reading for reading in readings if fits(reading, specs[key])), value)
        expect({key: found[key]}, {key: specs[key]}, origin[key])
    return found


def _plain(word: Any) -> Any:
    """The value of a text: a number, or as YAML parses it."""
    if not isinstance(word, str):
        return word
    for read in (int, float, yaml.safe_load):
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return read(word)
    return word


def specs_of(hints: Mapping[str, Any]) -> dict[str, Spec]:
    """The schema of each type annotation."""
    return {key: _spec_of(hint) for key, hint in hints.items()}


def _spec_of(hint: Any) -> Spec:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return one_of(*arguments)
    if origin in (typing.Union, types.UnionType):
        enums = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in arguments)
        kinds = [kind for kind in arguments if not (enums and kind is str)]  # a text must be one of the Enum's values
        return tuple(map(_spec_of, kinds))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return one_of(*(member.value for member in hint))
    if origin is list:
        return [_spec_of(arguments[0])]
    return None if hint is type(None) else origin or hint


def nearest(key: str, known: Iterable[str]) -> str:
    """The valid key that `key` resembles most."""
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
