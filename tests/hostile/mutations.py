"""Ways to spoil a file or a command line. A mutation is plain data: what failed can be saved as a command, and repeated."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as set_seed
from hypothesis import strategies as st

# Values that a key should not have; by name, as a saved mutation holds them.
VALUES: dict[str, Any] = {
    "null": None, "true": True, "false": False, "zero": 0, "one": 1, "minus one": -1, "minus five": -5, "half": 0.5,
    "million": 10**6, "2**31": 2**31, "2**63": 2**63, "5000 digits": 10**4999, "nan": math.nan, "inf": math.inf, "1e308": 1e308,
    "no text": "", "text": "x", "digit": "1", "surrogate": "a\ud800b", "nul": "a\0b", "upwards": "../../x", "long": "a" * 5000,
    "list": [], "list of null": [None], "two numbers": [1, 2], "mapping": {}, "other mapping": {"x": 1},
}  # fmt: skip
WORDS: dict[str, str] = {
    **{word: word for word in ("-1", "0", "nan", "inf", "1.5", "99999999999999999999", "null", "[]", "{}", "a,b", "--", "--unknown", "é")},
    "nothing": "", "no file": "no-such-file", "surrogate": "\udcff", "nul": "a\0b", "long": "a" * 5000,
}  # fmt: skip
DOCUMENTS = (".json", ".jsonl", ".yaml", ".safetensors")
UNKNOWN_KEY = "no_such_key"
SHOWN = 6  # of a list, or of a mapping of more than 60 keys: the first ones are tried


@dataclass(frozen=True)
class Mutation:
    """`target` is a file of the case's folder, `action` what happens to it, `at` where, `value` the name of a hostile value.

    For a document (JSON, JSONL, YAML, the header of safetensors) `at` is a path of keys; for bytes, a share of the size; for a command
    line (no target), the index of a word.
    """

    target: str
    action: str
    at: tuple[Any, ...] = ()
    value: str = ""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Mutation:
        fields = json.loads(text)
        return cls(**fields | {"at": tuple(fields["at"])})

    @property
    def keys(self) -> list[str]:
        """Those of the value that is spoilt, the innermost last."""
        return [key for key in self.at if isinstance(key, str)] + [UNKNOWN_KEY] * (self.action == "add")


# ---- documents


@contextmanager
def _any_number_of_digits() -> Iterator[None]:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


def read_document(file: Path) -> Any:
    """Raises `ValueError` for a file that is none."""
    with _any_number_of_digits():
        try:
            return _parse(file)
        except (yaml.YAMLError, struct.error, RecursionError, OSError) as error:
            raise ValueError(str(error)) from error


def _parse(file: Path) -> Any:
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + size])
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


def write_document(file: Path, document: Any) -> None:
    with _any_number_of_digits():
        if file.suffix == ".safetensors":
            data = file.read_bytes()
            (size,) = struct.unpack("<Q", data[:8])
            header = json.dumps(document).encode()
            content = struct.pack("<Q", len(header)) + header + data[8 + size :]
        elif file.suffix == ".jsonl":
            content = "".join(json.dumps(line) + "\n" for line in document).encode()
        elif file.suffix == ".yaml":
            content = yaml.safe_dump(document, sort_keys=False).encode()
        else:
            content = json.dumps(document, indent=1).encode()
    file.write_bytes(content)


def paths(document: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value; of long lists and mappings, the first ones."""
    if isinstance(document, dict):
        keys = list(document)[: None if len(document) <= 60 else SHOWN]
    else:
        keys = list(range(min(SHOWN, len(document)))) if isinstance(document, list) else []
    for key in keys:
        yield (*before, key)
        yield from paths(document[key], (*before, key))


def _edit(document: Any, mutation: Mutation) -> None:
    *before, last = mutation.at
    holder = document
    for key in before:
        holder = holder[key]
    if mutation.action == "delete":
        del holder[last]
    elif mutation.action == "set":
        holder[last] = VALUES[mutation.value]
    elif isinstance(holder, dict):
        holder[UNKNOWN_KEY] = VALUES[mutation.value]
    else:
        holder.append(VALUES[mutation.value])


# ---- bytes


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(byte ^ 0x40 for byte in data[at : at + 1]) + data[at + 1 :]


BYTES: dict[str, Callable[[bytes, int], bytes]] = {
    "empty": lambda data, at: b"",
    "cut": lambda data, at: data[:at],
    "zeros": lambda data, at: data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :],
    "all zeros": lambda data, at: bytes(len(data)),
    "flip": _flip,
    "append": lambda data, at: data + b"\x01garbage at the end\xff",
    "insert": lambda data, at: data[:at] + b"\xff\xfe\x00" + data[at:],
    "utf-16": lambda data, at: data.decode("latin-1").encode("utf-16"),
    "latin-1": lambda data, at: data[:at] + "é".encode("latin-1") + data[at:],
    "prose": lambda data, at: b"404: Not Found",
    "nested": lambda data, at: b"[" * 100_000 + b"]" * 100_000,
}


def spoil(folder: Path, mutation: Mutation) -> None:
    """Carry out the mutation of a file."""
    file = folder / mutation.target
    if mutation.action in ("set", "delete", "add"):
        document = read_document(file)
        _edit(document, mutation)
        write_document(file, document)
    elif mutation.action == "remove":
        file.unlink()
    elif mutation.action == "folder":
        file.unlink()
        file.mkdir()
    else:
        data = file.read_bytes()
        at = min(int(mutation.at[0] * len(data)), max(0, len(data) - 1))
        file.write_bytes(BYTES[mutation.action](data, at))


def spoil_words(words: Sequence[str], mutation: Mutation) -> list[str]:
    """The command line after a mutation."""
    at, word = mutation.at[0], WORDS.get(mutation.value, "")
    replaced = {"drop": [], "double": [words[at]] * 2, "replace": [word], "before": [word, words[at]]}
    return [*words[:at], *replaced[mutation.action], *words[at + 1 :]]


# ---- what hypothesis draws


@cache
def _paths_of(file: Path) -> tuple[tuple[Any, ...], ...]:
    """The paths in a file that does not change."""
    try:
        return tuple(paths(read_document(file))) if file.suffix in DOCUMENTS else ()
    except ValueError:  # LLaVA's label files are lines under the name .json
        return ()


@st.composite
def of_files(draw, folder: Path, files: Sequence[str]) -> Mutation:
    target = draw(st.sampled_from(list(files)))
    places = _paths_of(folder / target)
    if places and draw(st.integers(0, 3)):
        action = draw(st.sampled_from(("set", "set", "set", "delete", "add")))
        value = "" if action == "delete" else draw(st.sampled_from(list(VALUES)))
        return Mutation(target, action, draw(st.sampled_from(places)), value)
    action = draw(st.sampled_from((*BYTES, "remove", "folder")))
    return Mutation(target, action, (round(draw(st.floats(0, 1)), 4),) if action in BYTES else ())


@st.composite
def of_words(draw, words: Sequence[str]) -> Mutation:
    action = draw(st.sampled_from(("drop", "double", "replace", "replace", "replace", "before")))
    value = draw(st.sampled_from(list(WORDS))) if action in ("replace", "before") else ""
    return Mutation("", action, (draw(st.integers(0, len(words) - 1)),), value)


def drawn(strategy: st.SearchStrategy[Mutation], count: int, seed: int | None = None) -> list[Mutation]:
    """Up to `count` different mutations; without a seed, always the same ones."""
    found: dict[Mutation, None] = {}

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=seed is None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(mutation: Mutation) -> None:
        found[mutation] = None

    if seed is not None:
        collect = set_seed(seed)(collect)
    collect()
    return list(found)
