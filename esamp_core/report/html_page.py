"""The report's page: HTML, style and inline SVG in one text, no script and nothing to load.

Series colours come from CSS variables, a light and a dark set; every series is also named in a legend and on hover
(``<title>``), and the numbers stand in a table below each chart, so that colour alone carries nothing.

What a model wrote is text of a stranger: it is escaped, cut where a token or a name has no end, and characters that a
reader would not see, or that change the order of others, are shown as ``\\u202e``.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import write_text
from esamp_core.report.run_file import Curve, PromptSamples, RunFile, SampleText

WIDTH, HEIGHT = 420, 260  # small, so that labels stay readable where the chart shrinks to a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 38
# Eight hues that people with colour-blindness can tell apart; further series repeat them dashed.
LIGHT = ("#2a6fbb", "#d1495b", "#2e8b57", "#b8860b", "#7b52ab", "#00868b", "#c65d00", "#5c6770")
DARK = ("#7db4f0", "#f28b98", "#79cf9f", "#e3bd56", "#bfa0e6", "#5fcfd4", "#f2a35e", "#aab4bd")
DASHES = ("", "7 4", "2 3")
SHADES = 5  # of novelty, by quantile
MOST_TOKEN, MOST_TEXT = 1_000, 100_000  # characters that are shown of a token or a name; of a prompt
# Control characters but tab and line feed, those that embed, override and isolate directions, halves of characters.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2329;--soft:#5c6770;--line:#d9dee3;--card:#f5f7f9;
--good:#17692f;--bad:#8f2230;LIGHT}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e6eaee;--soft:#a3adb6;--line:#38414a;--card:#1d2329;
--good:#83d69b;--bad:#f29aa5;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1100px;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;line-height:1.25;margin:.2em 0}
h2{font-size:1.1rem;margin:1.6em 0 .4em}
p,dl,figcaption{color:var(--soft);margin:.3em 0}
figure{margin:0}
svg{width:100%;max-width:720px;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px}
.axis{stroke:var(--line);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:8px 0;list-style:none;font-size:.9rem}
.legend svg{width:28px;height:10px;display:inline-block;margin-right:6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:3px 10px 3px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
details{margin:.6em 0}
summary{cursor:pointer;padding:6px 0}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:10px}
.sample{background:var(--card);border-radius:8px;padding:10px}
.sample h3{font-size:.85rem;margin:0 0 6px;color:var(--soft);font-weight:600}
.sample span,summary code{unicode-bidi:isolate}
.sample code{font:14px/1.7 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad)}
"""


def escape(text: str, most: int = MOST_TOKEN) -> str:
    """Text for a page or an attribute."""
    cut = f"{text[:most]}... ({len(text)} characters)" if len(text) > most else text
    return html.escape(UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", cut))


def page(run: RunFile) -> str:
    """The whole document."""
    style = STYLE.replace("LIGHT", _colours(LIGHT)).replace("DARK", _colours(DARK))
    style += "".join(f".n{i}{{background:color-mix(in srgb,var(--s6) {i * 14}%,transparent)}}" for i in range(SHADES))
    parts = [f"<h1>{escape(run.title)}</h1>"]
    if run.about:
        parts.append("<p>" + " · ".join(f"{escape(k)} {escape(v)}" for k, v in run.about.items()) + "</p>")
    if any(c.k for c in run.curves):
        parts.append(
            _section(
                "Pass@k", _pass_chart([c for c in run.curves if c.k]), "Bars: 95 % bootstrap intervals over problems."
            )
        )
    if losses := _known_lines((s.sampler, s.loss) for s in run.steps):
        parts.append(_section("Distiller error per step", _chart(losses, "step", "relative squared error"), ""))
    if divergences := _known_lines((s.sampler, s.kl) for s in run.steps):
        parts.append(_section("KL per step", _chart(divergences, "step", "KL, nats"), run.kl_is))
    if run.prompts:
        parts.append("<h2>Samples</h2>")
        scale = _novelty_edges(run.prompts)
        key = "".join(f'<span class="n{i}">&nbsp;{i + 1}&nbsp;</span>' for i in range(SHADES))
        parts.append(f"<p>Tokens are shaded by their novelty, from low to high: {key}. Without novelty: no shade.</p>")
        parts += [_prompt(p, scale, first=i == 0) for i, p in enumerate(run.prompts)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run.title)}</title><style>{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _colours(colours: Sequence[str]) -> str:
    return "".join(f"--s{i}:{c};" for i, c in enumerate(colours))


def _section(title: str, chart: str, caption: str) -> str:
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<h2>{escape(title)}</h2><figure>{chart}{note}</figure>"


class Line(NamedTuple):
    """A series; x grows."""

    name: str
    x: list[int]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def _known_lines(series: Iterable[tuple[str, Sequence[float]]]) -> list[Line]:
    """Numbers per step, from 1; those that are NaN are left out, and series without any other."""
    lines = []
    for name, y in series:
        known = [(x, value) for x, value in enumerate(y, 1) if math.isfinite(value)]
        if known:
            lines.append(Line(name, [x for x, _ in known], [value for _, value in known]))
    return lines


def _stroke(i: int) -> str:
    dash = DASHES[i // len(LIGHT) % len(DASHES)]
    return f'stroke="var(--s{i % len(LIGHT)})"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _pass_chart(curves: Sequence[Curve]) -> str:
    lines = [Line(c.sampler, c.k, c.mean, c.low, c.high) for c in curves]
    return _chart(lines, "k (samples per problem)", "share of problems solved", log_x=True, top=1.0)


def _chart(lines: Sequence[Line], x_title: str, y_title: str, log_x: bool = False, top: float | None = None) -> str:
    """An SVG with a legend, and the numbers as a table."""

    def across(x: float) -> float:
        return math.log2(x) if log_x else float(x)

    xs = sorted({x for line in lines for x in line.x})
    first, last = across(xs[0]), across(xs[-1])
    lowest = min(0.0, *(y for line in lines for y in line.y))
    highest = top or max(0.0, *(y for line in lines for y in line.y)) * 1.05 or (1.0 if lowest == 0 else 0.0)

    def at(x: float, y: float) -> tuple[float, float]:
        place = (across(x) - first) / (last - first) if last > first else 0.5
        height = (y - lowest) / (highest - lowest)
        return LEFT + place * (WIDTH - LEFT - RIGHT), TOP + (1 - height) * (HEIGHT - TOP - BOTTOM)

    body = []
    for i in range(5):
        value = lowest + (highest - lowest) * i / 4
        _, y = at(xs[0], value)
        body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    marks = xs if len(xs) <= 8 else [xs[round(i * (len(xs) - 1) / 6)] for i in range(7)]
    for x in marks:
        place, _ = at(x, lowest)
        body.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_title)}</text>')
    for i, line in enumerate(lines):
        body.append(_series(i, line, at, shift=8 * ((i + 0.5) / len(lines) - 0.5)))
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">'
        f"{''.join(body)}</svg>"
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><line x1="0" x2="28" y1="5" y2="5" stroke-width="3" '
        f"{_stroke(i)}/></svg>{escape(line.name)}</li>"
        for i, line in enumerate(lines)
    )
    return f'<p>{escape(y_title)}</p>{svg}<ul class="legend">{legend}</ul>{_numbers(lines, marks, x_title)}'


def _series(i: int, line: Line, at: Callable[[float, float], tuple[float, float]], shift: float) -> str:
    """A line, and its intervals as bars that stand ``shift`` pixels aside so that they do not hide each other."""
    points = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<g fill="none" stroke-width="2" {_stroke(i)}><title>{escape(line.name)}</title>']
    parts.append(f'<polyline points="{path}"/>')
    if line.low is not None and line.high is not None:
        for x, low, high in zip(line.x, line.low, line.high, strict=True):
            (across, bottom), (_, top) = at(x, low), at(x, high)
            across += shift
            parts.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>')
    return "".join(parts) + "</g>"


def _numbers(lines: Sequence[Line], xs: Sequence[int], x_title: str) -> str:
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]

    def cell(i: int, x: int) -> str:
        return f"{values[i][x]:.3g}" if x in values[i] else ""

    head = "".join(f"<th>{x}</th>" for x in xs)
    rows = "".join(
        f"<tr><td>{escape(line.name)}</td>{''.join(f'<td>{cell(i, x)}</td>' for x in xs)}</tr>"
        for i, line in enumerate(lines)
    )
    return (
        f'<details><summary>Numbers</summary><div class="scroll"><table><tr><th>{escape(x_title)}</th>{head}</tr>'
        f"{rows}</table></div></details>"
    )


def _novelty_edges(prompts: Sequence[PromptSamples]) -> list[float]:
    """Bounds between the shades: quantiles of what is known and not 0, which stands for "not scored"."""
    values = sorted(v for p in prompts for s in p.samples for v in s.novelty if v and math.isfinite(v))
    return [values[len(values) * i // SHADES] for i in range(1, SHADES)] if values else []


def _prompt(prompt: PromptSamples, edges: Sequence[float], first: bool) -> str:
    cards = "".join(_sample(s, edges) for s in prompt.samples)
    is_open = " open" if first else ""
    return (
        f"<details{is_open}><summary><code>{escape(prompt.prompt, MOST_TEXT)}</code></summary>"
        f'<div class="samples">{cards}</div></details>'
    )


def _sample(sample: SampleText, edges: Sequence[float]) -> str:
    tokens = []
    for token, novelty in zip(sample.tokens, sample.novelty, strict=True):
        shade = sum(novelty >= edge for edge in edges) if novelty else 0  # NaN is above none
        said = f"{novelty:.4g}" if math.isfinite(novelty) else "unknown"
        tokens.append(f'<span class="n{shade}" title="novelty {said}">{escape(token)}</span>')
    mark = {True: '<span class="good">✓ right</span>', False: '<span class="bad">✗ wrong</span>', None: ""}
    head = f"<h3>{escape(sample.sampler)} {mark[sample.correct]}</h3>"
    return f'<article class="sample">{head}<code>{" ".join(tokens)}</code></article>'


def run_report(source: Path, out: Path | None = None) -> Path:
    """Read run.json, write the page beside it or to ``out``, whole or not at all.  Returns its path.

    Raises ArgumentError, in one line.
    """
    run = RunFile.read(source)
    target = source.with_suffix(".html") if out is None else out
    if os.path.realpath(target) == os.path.realpath(source):
        raise ArgumentError(f"--out must be another file than the run, got {target}")
    write_text(target, page(run), "--out")
    return target
