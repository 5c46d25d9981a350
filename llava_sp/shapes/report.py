"""The quickstart's report: one HTML file that needs nothing beside it. Loss curves, the table, images with answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llava_sp.common import html
from llava_sp.common.files import write_atomic
from llava_sp.shapes.results import STAGES, Result, table

SAMPLES_PER_TYPE = 2
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 260, 44, 30, 10

STYLE = """
:root { --c0:#8a5a00; --c1:#0b62c4; --c2:#a3278f; }
@media (prefers-color-scheme: dark) { :root { --c0:#f0b34a; --c1:#6cb2ff; --c2:#f08ae0; } }
.curves { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:16px; }
.curves h3 { margin:0 0 4px; font-size:15px; } svg { width:100%; height:auto; display:block; }
svg text { fill:var(--soft); font-size:12px; } .grid { stroke:var(--line); }
.legend { display:flex; flex-wrap:wrap; gap:6px 20px; margin:0 0 12px; color:var(--soft); }
.legend i { display:inline-block; width:22px; height:3px; border-radius:2px; vertical-align:middle; margin-right:8px; }
th:first-child,td:first-child { text-align:left; } tbody tr:first-child td { font-weight:700; }
td:last-child,th:last-child { color:var(--soft); font-weight:400; }
.samples { display:grid; grid-template-columns:repeat(auto-fill,minmax(250px,1fr)); gap:16px; }
figure { display:flex; flex-direction:column; } figure img { aspect-ratio:1; }
figcaption { margin-top:12px; } figcaption b { display:block; line-height:1.35; min-height:2.7em; }
dl { margin-top:8px; } .right { color:var(--good); } .wrong { color:var(--bad); }
"""


def write_report(output: Path, results: Sequence[Result], spent: dict[str, float]) -> Path:
    """Write `output`/report.html and return its path; images come from `output`/data/vqav2/val2014.

    `spent` holds `seconds` and `peak_memory_gib` of the whole quickstart.
    """
    variants = list(dict.fromkeys(result.variant for result in results))
    colors = {variant: f"var(--c{i % 3})" for i, variant in enumerate(variants)}
    legend = "".join(f'<span><i style="background:{colors[v]}"></i>{escape(v)}</span>' for v in variants)
    curves = "".join(
        f'<div class="card"><h3>{escape(title)}</h3>{_curves(results, stage, colors)}</div>'
        for stage, title in STAGES.items()
    )
    seeds = len(results) // len(variants)
    over = "" if seeds == 1 else f", mean and standard deviation over {seeds} seeds"
    parts = [
        "<h1>LLaVA-SP on the shapes world</h1>",
        "<p>Each variant was trained in both stages from the same tiny CLIP and Llama, with the same data, steps and seeds, "
        "and scored as VQAv2 is, on scenes and handwriting it never saw. <b>none</b> is LLaVA-1.5; <b>cropping</b> and "
        "<b>pooling</b> put six spatial tokens in front of the patch tokens.</p>",
        f"<h2>Scores{over}</h2>",
        f'<div class="card scroll">{html.table(*table(results))}</div>',
        "<h2>Training loss</h2>",
        f'<div class="legend">{legend}</div><div class="curves">{curves}</div>',
        "<h2>Held-out images, questions and answers</h2>",
        f'<div class="samples">{_samples(output, results)}</div>',
        f"<footer>{len(results)} models trained and scored in {spent['seconds'] / 60:.1f} minutes, at most "
        f"{spent['peak_memory_gib']:.1f} GiB of memory. Tiny models on a made-up world: what differs here need not differ "
        "at 7B.</footer>",
    ]
    path = output / "report.html"
    write_atomic(path, html.page("LLaVA-SP quickstart", "".join(parts), STYLE))
    return path


def _curves(results: Sequence[Result], stage: str, colors: dict[str, str]) -> str:
    """An SVG of the stage's losses: every step thin, a running mean on top; axes with round numbers."""
    series = [(result, result.losses[stage]) for result in results if result.losses[stage]]
    last = max((points[-1][0] for _, points in series), default=1)
    top = _round_up(max((loss for _, points in series for _, loss in points), default=1.0))

    def at(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, top) / top)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for i in range(5):
        value = top * i / 4
        y = at(0, value).split(",")[1]
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for i in range(5):
        step = last * i / 4
        anchor = "end" if i == 4 else "middle"
        label = f"step {step:.0f}" if i == 4 else f"{step:.0f}"
        drawn.append(f'<text x="{at(step, 0).split(",")[0]}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}</text>')
    for result, points in series:
        color = colors[result.variant]
        for values, style in ((points, 'opacity="0.25"'), (_smooth(points), 'stroke-width="2.2"')):
            path = " ".join(at(step, loss) for step, loss in values)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" {style}/>')
    label = escape(f"{STAGES[stage]}: training loss by step")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _smooth(points: Sequence[tuple[int, float]], window: int = 3) -> list[tuple[int, float]]:
    """The mean of the last `window` losses at each step."""
    losses = [loss for _, loss in points]
    recent = [losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses))]
    return [(step, sum(values) / len(values)) for (step, _), values in zip(points, recent)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten."""
    power = 1e-3
    while True:
        for factor in (1, 2, 4, 8):
            if factor * power >= value:
                return factor * power
        power *= 10


def _samples(output: Path, results: Sequence[Result]) -> str:
    """Cards of a few questions of each type, first those on which the models differ, with every variant's answer."""
    shown = list({result.variant: result for result in reversed(results)}.values())[::-1]
    by_type: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(shown[0].items):
        by_type[item["question_type"]].append(index)
    chosen: list[int] = []
    for kind in sorted(by_type):
        differing = [i for i in by_type[kind] if len({result.items[i]["score"] for result in shown}) > 1]
        agreeing = [i for i in by_type[kind] if i not in differing]
        used = {shown[0].items[i]["image"] for i in chosen}
        order = sorted(differing[:1] + agreeing + differing[1:], key=lambda i: shown[0].items[i]["image"] in used)
        chosen += order[:SAMPLES_PER_TYPE]
    return "".join(_card(output, [result.items[i] for result in shown], [r.variant for r in shown]) for i in chosen)


def _card(output: Path, answers: Sequence[dict], variants: Sequence[str]) -> str:
    item = answers[0]
    content = (output / "data" / "vqav2" / "val2014" / item["image"]).read_bytes()
    rows = [f"<dt>truth</dt><dd>{escape(item['references'][0])}</dd>"]
    for variant, answer in zip(variants, answers):
        right = answer["score"] >= 100
        mark, style = ("✓", "right") if right else ("✗", "wrong")
        text = escape(answer["answer"] or "(nothing)")
        rows.append(f'<dt>{escape(variant)}</dt><dd class="{style}">{mark} {text}</dd>')
    return (
        f'<figure class="card">{html.image(content, "jpeg", "a scene of the shapes world")}'
        f"<figcaption><b>{escape(item['question'])}</b><dl>{''.join(rows)}</dl></figcaption></figure>"
    )
