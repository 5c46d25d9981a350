"""The records of `Scores.per_item`, and what follows from groups of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llava_sp.eval.base import Category, Item

Record = Mapping[str, Any]


def row(item: Item, answer: Any, text: str, score: float | None = None, **more: Any) -> dict[str, Any]:
    """The record of an item: the `answer` that was judged, out of `text`, and `score` from 0 to 100 if there is one."""
    return {
        "question_id": item.id,
        **({} if score is None else {"score": score}),
        "answer": answer,
        "text": text,
        "question": item.metadata.get("question", item.text),
        "image": item.image_name,
        "references": [] if item.reference is None else [item.reference],
        **more,
    }


def grouped(records: Iterable[Record], key: str, order: Iterable[Any] = ()) -> dict[Any, list[Record]]:
    """The records by their `key`, where it is not None or "": names of `order` first, then others, sorted."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        if record[key] not in (None, ""):
            groups.setdefault(record[key], []).append(record)
    names = [name for name in order if name in groups]
    return {name: groups[name] for name in (*names, *sorted(groups.keys() - set(names)))}


def categories(
    groups: Mapping[Any, Sequence[Record]], figure: Callable[[Sequence[Record]], float]
) -> dict[Any, Category]:
    return {name: Category(figure(records), len(records)) for name, records in groups.items()}


def share_right(records: Sequence[Record]) -> float:
    """Percent of records with a score above 0, with the order of operations of LLaVA's scorers; 0 of no records."""
    right = sum(record["score"] > 0 for record in records)
    return round(right / len(records) * 100, 2) if records else 0.0
