"""The report of a whole evaluation: one HTML file that needs nothing beside it.

The table beside published figures; for each benchmark the figures by category as bars, and the questions that went worst,
with their images.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava_sp.common import html
from llava_sp.common.files import write_atomic
from llava_sp.eval.base import Item
from llava_sp.eval.report.table import Row, Table
from llava_sp.eval.run.output import Outcome
from llava_sp.inference import open_image

WORST = 6
THUMBNAIL = 320  # pixels, the longer side
MOST_CATEGORIES = 40
TEXT_LIMIT = 400

STYLE = """
:root { --bar:#2563a8; --track:#e8edf4; }
@media (prefers-color-scheme: dark) { :root { --bar:#6cb2ff; --track:#262d39; } }
h3 { font-size:15px; margin:20px 0 8px; color:var(--soft); font-weight:600; } ul { padding-left:20px; }
th:nth-child(-n+2),td:nth-child(-n+2) { text-align:left; } td:nth-child(4) { font-weight:700; }
td:nth-child(n+5) { color:var(--soft); }
.bars { display:grid; grid-template-columns:minmax(90px,max-content) 1fr auto; gap:6px 14px; align-items:center; }
.bars span { overflow-wrap:anywhere; } .bars small { color:var(--soft); font-variant-numeric:tabular-nums; text-align:right; }
.track { background:var(--track); border-radius:4px; height:14px; } .track i { display:block; height:100%;
  background:var(--bar); border-radius:4px; }
.worst { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(260px,100%),1fr)); gap:16px; }
figure img { max-height:240px; object-fit:contain; } .bad { color:var(--bad); }
figcaption b { display:block; margin:12px 0 8px; font-weight:600; white-space:pre-line; overflow-wrap:anywhere; }
"""


def write_report(folder: Path, table: Table) -> Path:
    """Writes `folder`/report.html and returns its path."""
    sections = "".join(_section(row, row.outcome) for row in table.rows if row.outcome)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    made = " · ".join(f"{key} {value}" for key, value in table.provenance.items() if isinstance(value, str))
    figures = html.table(table.header, map(table.cells, table.rows))
    body = f'<h1>{escape(table.model)}</h1><div class="card scroll">{figures}</div><ul>{notes}</ul>{sections}'
    path = folder / "report.html"
    title = f"{Path(table.model).name}: evaluation"
    write_atomic(path, html.page(title, f"{body}<footer>{escape(made)}</footer>", STYLE))
    return path


def _section(row: Row, outcome: Outcome) -> str:
    score = "no score" if row.score is None else f"{row.score:g}"
    about = f"{row.benchmark.title}: {score} on {row.count} {outcome.scores.counted}, protocol {outcome.benchmark.protocol}."
    others = [f"{name} {value:g}" for name, value in outcome.result.get("scored_as", {}).items() if value is not None]
    if len(others) > 1:
        about += f" The same answers by the scoring rule of each protocol: {', '.join(others)}."
    return f'<h2 id="{row.benchmark.name}">{row.benchmark.name}</h2><p>{escape(about)}</p>{_bars(outcome)}{_worst(outcome)}'


def _bars(outcome: Outcome) -> str:
    categories = list(outcome.scores.categories.items())
    if not categories:
        return ""
    bars = "".join(
        f"<span>{escape(str(name))}</span>"
        f'<div class="track"><i style="width:{100 * max(0.0, min(1.0, c.score / c.highest)):.1f}%"></i></div>'
        f"<small>{c.score:.1f} ({c.count})</small>"
        for name, c in categories[:MOST_CATEGORIES]
    )
    more = len(categories) - MOST_CATEGORIES
    rest = f"<p>{more} more categories are in metrics.json.</p>" if more > 0 else ""
    return f'<h3>By category</h3><div class="card bars">{bars}</div>{rest}'


def _worst(outcome: Outcome) -> str:
    chosen = worst_items(outcome.scores.per_item)
    if not chosen:
        return ""
    cards = "".join(_card(outcome.items[i], outcome.scores.per_item[i]) for i in chosen)
    return f'<h3>Worst answers</h3><div class="worst">{cards}</div>'


def worst_items(per_item: Sequence[dict[str, Any]], count: int = WORST) -> list[int]:
    """Positions of the lowest scores below full marks, from as many categories and images as possible."""
    scored = [i for i, record in enumerate(per_item) if record.get("score") is not None and record["score"] < 100]
    seen: Counter = Counter()
    ranked = []
    for i in sorted(scored, key=lambda i: per_item[i]["score"]):
        kinds = [(name, str(per_item[i][name])) for name in ("image", "category") if per_item[i].get(name) is not None]
        ranked.append((per_item[i]["score"], [seen[kind] for kind in kinds], i))
        seen.update(kinds)
    return [i for _, _, i in sorted(ranked)[:count]]


def _card(item: Item, record: dict[str, Any]) -> str:
    images = "".join(_thumbnail(image, item) for image in item.images[:1])
    answer = record.get("answer")
    shown = {"answer": "(nothing)" if answer in (None, "") else answer, "truth": _references(record)}
    if record.get("text") not in (None, answer):
        shown["raw"] = record["text"]
    shown |= {key: record[key] for key in ("category",) if record.get(key) is not None}
    rows = "".join(
        f"<dt>{key}</dt><dd{' class=bad' if key == 'answer' else ''}>{escape(_cut(value))}</dd>"
        for key, value in shown.items()
        if value not in (None, "")
    )
    question = escape(_cut(record.get("question") or item.text))
    return f'<figure class="card">{images}<figcaption><b>{question}</b><dl>{rows}</dl></figcaption></figure>'


def _references(record: dict[str, Any]) -> str:
    """The accepted answers, each once, the most frequent first."""
    references = record.get("references")
    if not isinstance(references, list):
        return "" if references is None else str(references)
    return ", ".join(sorted({str(r) for r in references}, key=lambda r: -[str(x) for x in references].count(r)))


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " ..."


def _thumbnail(source: Path | bytes, item: Item) -> str:
    """The image, made small; what is wrong with it, where it was damaged since it was answered."""
    try:
        image = open_image(source, f"question {item.id}")
    except ValueError as error:
        return f"<p>{escape(str(error))}</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return html.image(stream.getvalue(), "jpeg", f"image of question {item.id}")
