"""What `evaluation.evaluate` found of a generator, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import printable
from ..images import image_grid
from .page import bars, binned, embedded, table, write_page

SHOWN, RANKED = 16, 8  # prompts of all kinds; the best, and the worst
SHEET, CELL = 1120, 192  # width of a sheet and largest side of a picture on it, in pixels
OF_A_PROMPT = 4  # pictures that are shown
MAX_BYTES = 1_500_000
TILES = ("fid", "kid", "cmmd", "precision", "recall", "recall_at_1", "clip_score", "all_right")


def write_eval_page(
    path: Path, result: Mapping[str, Any], row: Callable[[int], tuple[Any, list[Any]]]
) -> Path:
    """Write the page.

    Args:
        path: of the file.
        result: what ``figures.json`` holds.
        row: of a prompt by its number the true picture, or None, and the drawn ones.
    """
    setup, prompts = result["setup"], result["prompts"]
    body = (
        f"<header><h1>{escape(setup['part'])}</h1>"
        f"<p>{escape(printable(str(result['data'])))}, {len(prompts):,} prompts, "
        f"{setup['seeds']} picture{'s' * (setup['seeds'] > 1)} of each</p></header>"
        f"{_tiles(result['metrics'])}{_words(result['left_out'])}{_tables(result['metrics'])}"
        f"{_sheets(prompts, result['scores'], row)}{_spreads(prompts)}"
        f"<h2>How it was made</h2><div class=made>{table('Setup', setup)}</div>"
    )
    return write_page(path, f"{setup['part']}: {result['data']}", body)


def _tiles(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The best-known figures in large, those of the first networks that have them."""
    cells = ""
    for name in TILES:
        for network, figures in metrics.items():
            if name in figures:
                value, between = figures[name]["value"], _between(figures[name]["interval"])
                label = escape(printable(f"{_title(name)}, {_short(network)}"))
                cells += f"<div><dt>{label}</dt><dd>{value:.4g}<small>{between}</small></dd></div>"
                break
    return f"<dl class=tiles>{cells}</dl>"


def _words(left_out: Sequence[str]) -> str:
    if not left_out:
        return ""
    rows = "".join(f"<tr><td>{escape(printable(line, 500))}" for line in left_out)
    return f"<section class='health bad'><h2>Left out</h2><table>{rows}</table></section>"


def _tables(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    out = ""
    for network, figures in metrics.items():
        true = any(m["truth"] is not None for m in figures.values())
        head = f"<tr><th><th>value<th>95 % interval{'<th>true images' * true}<th>pictures<th>"
        rows = ""
        for name, m in figures.items():
            truth = "" if m["truth"] is None else f"{m['truth']:.4g}"
            rows += (
                f"<tr><th>{escape(_title(name))}<td>{m['value']:.5g}<td>{_between(m['interval'])}"
                f"{f'<td>{truth}' * true}<td>{m['images']:,}<td>{escape(m['note'])}"
            )
        out += f"<h2>{escape(printable(network))}</h2><table class=figures>{head}{rows}</table>"
    return out


def _sheets(
    prompts: Sequence[Mapping[str, Any]],
    scores: Sequence[str],
    row: Callable[[int], tuple[Any, list[Any]]],
) -> str:
    """Truth beside generation: of all kinds, and the best and the worst by the first score."""
    count = len(prompts)
    some = [i * count // SHOWN for i in range(SHOWN)] if count > SHOWN else list(range(count))
    out = _sheet("Pictures", "", prompts, some, row)
    if scores and count > 1:
        by = scores[0]
        order = sorted(range(count), key=lambda number: prompts[number][by])
        ranked = min(RANKED, count // 2)
        for title, rows in {"Worst": order[:ranked], "Best": order[::-1][:ranked]}.items():
            out += _sheet(f"{title} prompts", f" by {by}", prompts, rows, row, by)
    return out


def _sheet(
    title: str,
    by: str,
    prompts: Sequence[Mapping[str, Any]],
    rows: Sequence[int],
    row: Callable[[int], tuple[Any, list[Any]]],
    score: str | None = None,
) -> str:
    strips: list[Image.Image] = []
    labels: list[str] = []
    true = False
    for number in rows:
        truth, drawn = row(number)
        true = truth is not None
        group = [_cell(image) for image in [*([truth] if true else []), *drawn[:OF_A_PROMPT]]]
        strips.append(image_grid(group, len(group)))
        value = "" if score is None else f"{prompts[number][score]:.3g}: "
        labels.append(value + prompts[number]["text"][:200])
    sheet = image_grid(strips, max(2, round(SHEET / strips[0].width)), labels, padding=8)
    what = "The true picture, and the drawn ones beside it" if true else "Drawn pictures"
    name = f"<h2>{title}<small>{escape(printable(by, 200))}</small></h2>"
    image = embedded(sheet, 1400, MAX_BYTES)
    return f"{name}<figure class=last>{image}<figcaption>{what}.</figcaption></figure>"


def _cell(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((CELL, CELL))
    return image


def _spreads(prompts: Sequence[Mapping[str, Any]]) -> str:
    """How the scores of prompts are distributed."""
    names = [name for name in prompts[0] if name not in ("key", "text")]
    charts = "".join(
        bars(printable(name, 120), "prompts by score", binned([p[name] for p in prompts]))
        for name in names
    )
    return f"<h2>Distributions</h2><div class=charts>{charts}</div>" if charts else ""


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _title(name: str) -> str:
    known = {"fid": "FID", "kid": "KID", "cmmd": "CMMD", "clip_score": "CLIPScore"}
    return known.get(name, name.replace("_", " "))


def _short(network: str) -> str:
    return network.rstrip("/").rpartition("/")[2]
