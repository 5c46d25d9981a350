"""Files and ids of official data: where the files are, which split a folder holds, records joined by id."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava_sp.common.files import examples, leads_outside

ID = (int, str)
LLAVA_LINE = {"question_id": ID, "image": str, "text": str}  # of LLaVA's question files

Record = TypeVar("Record")
Row = TypeVar("Row", bound=dict[str, Any])


def find(data: Path, *names: str) -> list[Path]:
    """Files of these names in `data` itself or one folder below, in the order of the names."""
    return [path for name in names for path in [data / name, *sorted(data.glob(f"*/{name}"))] if path.is_file()]


def find_one(data: Path, *names: str, what: str) -> Path:
    """The first file that `find` returns. Raises ValueError naming `what` is missing and all names looked for."""
    found = find(data, *names)
    if not found:
        raise ValueError(f"{data} has no {what}: looked for {', '.join(names)}")
    return found[0]


def find_split(data: Path, names: Mapping[str, Sequence[str]], split: str | None, what: str) -> tuple[str, Path]:
    """The requested split, or the first with a file in `data`, and that file. Raises ValueError like `find_one`."""
    wanted = {name: names[name] for name in (names if split is None else [split])}
    for name, files in wanted.items():
        if found := find(data, *files):
            return name, found[0]
    looked_for = ", ".join(file for files in wanted.values() for file in files)
    raise ValueError(f"{data} has no {f'{split} ' if split else ''}{what}: looked for {looked_for}")


def first_folder(places: Sequence[Path]) -> Path:
    """The first of these that is a folder, else the first one (a later error names it)."""
    return next((place for place in places if place.is_dir()), places[0])


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` below `folder`. Raises ValueError if the name is outside of it."""
    if leads_outside(name):
        raise ValueError(f"{where}: image {name!r} is outside {folder}")
    return folder / name


def by_id(records: Iterable[Row], file: Path, key: str = "question_id") -> dict[Any, Row]:
    """{id: record}. Raises ValueError, with examples and where the first one is, if ids repeat."""
    found: dict[Any, list[tuple[int, Row]]] = defaultdict(list)
    for index, record in enumerate(records):
        found[record[key]].append((index, record))
    twice = [i for i, places in found.items() if len(places) > 1]
    if twice:
        of_first = [f"line {r.number}" if hasattr(r, "number") else f"record {index}" for index, r in found[twice[0]]]
        raise ValueError(
            f"{file}: more than one record with the same {key}: {examples(twice)} ({twice[0]}: {examples(of_first)})"
        )
    return {i: record for i, [(_, record)] in found.items()}


def numbered(ids: Iterable[Any]) -> Iterator[str]:
    """The ids as text, made unique where they repeat: "7", "7#2", "7#3"."""
    seen: Counter[str] = Counter()
    for i in map(str, ids):
        seen[i] += 1
        yield i if seen[i] == 1 else f"{i}#{seen[i]}"


def joined(
    ids: Sequence[Any],
    records: Sequence[Record],
    wanted: Iterable[Any],
    where: object,
    noun: str = "answer",
    questions: object = "the questions",
) -> dict[Any, Record]:
    """{id: record}, in the order of the records. Raises ValueError unless each wanted id, and no other, is there once."""
    trouble = compare_ids(ids, wanted, noun)
    if trouble:
        raise ValueError(f"{where} does not fit {questions}: {trouble}")
    return dict(zip(ids, records))


def compare_ids(found: Iterable[int | str], wanted: Iterable[int | str], noun: str = "answer") -> str:
    """What is wrong with the ids in `found`, with counts and examples; empty if nothing is."""
    counts, wanted = Counter(iter(found)), dict.fromkeys(wanted)
    problems = {
        f"more than one {noun}": [i for i, count in counts.items() if count > 1],
        f"{noun} to a question that is not in the file": [i for i in counts if i not in wanted],
        f"no {noun}": [i for i in wanted if i not in counts],
    }
    return ", ".join(f"{trouble}: {len(ids)} ({examples(ids)})" for trouble, ids in problems.items() if ids)


def verdict(file: Path, answers: Sequence[object], tries: Iterable[tuple[str, str]]) -> str:
    """The result of `validate` for a submission.

    Args:
        tries: ("questions of test", what is wrong if the file answers these, or ""), for each split it may answer.

    Raises:
        ValueError: the file fits none of them.
    """
    problems = []
    for what, trouble in tries:
        if not trouble:
            empty = sum(not answer for answer in answers)
            return f"{file} answers all {len(answers)} {what} once ({empty} of them empty)"
        problems.append(f"{trouble} (as {what})")
    raise ValueError(f"{file}: " + "; ".join(problems))
