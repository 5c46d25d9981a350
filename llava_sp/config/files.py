"""Reading configurations, whatever their keys: YAML with `base:` and `${VARIABLES}`, command-line words, types."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from llava_sp.common.files import read_text
from llava_sp.common.schema import NUMBER, TEXT, Check, Spec, expect, fits, one_of

# For a type without further limits.
_PLAIN = {
    str: TEXT,
    int: Check(lambda number: abs(number) < 10**9, "a whole number", int),
    float: NUMBER,
}
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, as YAML requires."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        first = {key.value: key for key in reversed(names)}
        twice = [key for key in names if first[key.value] is not key]
        if twice:
            raise ComposerError(None, None, f"the key {twice[0].value} is there twice", twice[0].start_mark)
        return node


def parse_yaml(text: str, where: object) -> Any:
    """What a YAML text means. Raises `ValueError` on one line: no YAML, nested too deeply, or more than a million values,
    which some aliases of aliases are."""
    try:
        value = yaml.load(text, _Loader)
        if _size(value, {}) > 1_000_000:
            raise ValueError("it stands for more than a million values")
    except Exception as error:  # PyYAML does not catch errors of int() etc.: KeyError for `!!bool x`
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where} is not valid YAML: {' '.join(problem.split())}{place}") from error
    return value


def _size(value: Any, known: dict[int, float]) -> float:
    """How many values there are, those of an alias at each place; infinity for one that contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        known[id(value)] = 1 + sum(
            _size(item, known) for item in (value.values() if isinstance(value, dict) else value)
        )
    return known[id(value)]


def read_yaml(path: Path, spec: Spec) -> Any:
    """The content of a YAML file that fits `spec` (see `common.schema`). Raises `ValueError` with the file, and line or key."""
    content = parse_yaml(read_text(path), path)
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
        content = read_yaml(file, {"base?": (TEXT, None)})
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
        plain = _plain(text)
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
        if isinstance(value, float) or (type(value) is int and value.bit_length() < 256):
            readings.append(str(value))
        found[key] = next((reading for reading in readings if fits(reading, specs[key])), value)
        expect({key: found[key]}, {key: specs[key]}, origin[key])
    return found


def _plain(word: Any) -> Any:
    """The value of a text: a number, or as YAML parses it."""
    if not isinstance(word, str):
        return word
    for read in (int, float, partial(parse_yaml, where="")):
        with contextlib.suppress(ValueError):
            return read(word)
    return word


def specs_of(hints: Mapping[str, Any]) -> dict[str, Spec]:
    """The schema of each type annotation."""
    return {key: _spec_of(hint) for key, hint in hints.items()}


def _spec_of(hint: Any) -> Spec:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return arguments[1]
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
    if origin is dict:
        return {str: _spec_of(arguments[1])}
    return None if hint is type(None) else _PLAIN.get(hint) or hint


def nearest(key: str, known: Iterable[str]) -> str:
    """The valid key that `key` resembles most."""
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
