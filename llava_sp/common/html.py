"""A report as one self-contained HTML file: page, style, tables, embedded images."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

# Light and dark; cards, tables, lists of figures. A report appends its own rules.
STYLE = """
:root { --ink:#1b2130; --soft:#5b6475; --paper:#f8f9fb; --card:#fff; --line:#e0e4ec; --bad:#b3261e; --good:#0b7a4b; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8ebf2; --soft:#9ba5b7; --paper:#12151b; --card:#1a1f28;
  --line:#2d3440; --bad:#ff8a80; --good:#5fd39b; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif; }
main { max-width:1160px; margin:0 auto; padding:40px 24px 64px; }
h1 { font-size:26px; margin:0 0 8px; overflow-wrap:anywhere; } h2 { font-size:20px; margin:44px 0 4px; }
p { margin:0 0 8px; } p,li { color:var(--soft); max-width:90ch; }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th,td { padding:7px 12px; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap; }
thead th { color:var(--soft); font-weight:600; } tbody tr:last-child td { border-bottom:0; }
figure { margin:0; } figure img { display:block; width:100%; border-radius:6px; }
dl { display:grid; grid-template-columns:auto 1fr; gap:2px 14px; margin:0; } dt { color:var(--soft); }
dd { margin:0; overflow-wrap:anywhere; }
footer { margin-top:44px; color:var(--soft); font-size:14px; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """The file's content; `body` is HTML, `style` is CSS appended to `STYLE`."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def table(header: Iterable[Any], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def image(content: bytes, kind: str, alt: str) -> str:
    """An embedded image file; `kind` is "png" or "jpeg"."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'
