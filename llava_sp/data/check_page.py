"""The findings of `llava_sp.data.check` as one HTML file: figures, histogram of lengths, what is bad."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from llava_sp.common.html import page, table

BINS, SHOWN = 64, 200
STYLE = "svg { width:100%; height:auto; } svg rect { fill:currentColor; opacity:.75; } svg text { fill:currentColor; font-size:13px; }"


def check_page(title: str, text: str, tokens: Sequence[int], limit: int, bad: Sequence[dict[str, Any]]) -> str:
    """The page; `text` are the findings in words, one a line."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in text.splitlines() if not line.startswith("  "))
    body = f'<h1>{escape(title)}</h1><div class="card">{lines}</div>'
    if len(tokens):
        body += f'<h2>Tokens per sample</h2><div class="card">{histogram(tokens, limit)}</div>'
    if bad:
        rows = [(entry["file"], entry["index"], entry["reason"]) for entry in bad[:SHOWN]]
        more = f"<p>and {len(bad) - SHOWN} more</p>" if len(bad) > SHOWN else ""
        listed = table(["file", "record", "reason"], rows)
        body += f'<h2>Bad samples</h2><div class="card scroll">{listed}{more}</div>'
    return page(title, body, STYLE)


def histogram(tokens: Sequence[int], limit: int) -> str:
    """Samples by length in tokens, as SVG; each bar has its numbers as a tooltip."""
    values = np.asarray(tokens)
    counts, edges = np.histogram(values, bins=min(BINS, int(np.ptp(values)) + 1))
    width, height, base = 1000, 260, 230
    step = width / len(counts)
    bars = []
    for place, (number, low, high) in enumerate(zip(counts.tolist(), edges[:-1], edges[1:], strict=True)):
        tall = (base - 20) * number / counts.max()
        note = f"<title>{int(np.ceil(low))} to {int(high)} tokens: {number:,} samples</title>"
        bars.append(
            f'<rect x="{place * step:.1f}" y="{base - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}">{note}</rect>'
        )
    ends = f'<text x="0" y="{height - 8}">{values.min():,}</text>'
    ends += f'<text x="{width}" y="{height - 8}" text-anchor="end">{values.max():,} (limit {limit:,})</text>'
    most = f'<text x="0" y="14">{counts.max():,} samples</text>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="histogram">{"".join(bars)}{ends}{most}</svg>'
