"""What `data.check_data` found, as one HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import printable
from ..images import image_grid
from .page import bars, embedded, write_page

ROWS = 20  # of a list that are shown
GROUPS, MEMBERS = 12, 5  # of pictures that look alike
SHEET, CELL = 24, 160  # pictures of all kinds, and their side in pixels
MAX_BYTES = 1_500_000


def write_data_page(
    path: Path, report: Mapping[str, Any], lines: Sequence[str], picture: Callable[[str], Any]
) -> Path:
    """Write the page.

    Args:
        path: of the file.
        report: the fields of a `data.check.DataReport`.
        lines: what it says in words, first what is wrong.
        picture: gives the picture of a key and its caption, or None.
    """
    body = (
        f"<header><h1>data</h1><p>{escape(report['source'])}</p></header>"
        f"{_tiles(report)}{_words(lines)}"
        f"{_sheet(report, picture)}{_histograms(report)}"
        f"{_groups('Pictures that look alike', report['alike'], picture)}"
        f"{_groups('The same picture several times', report['same'], picture)}"
        f"{_lists(report)}"
    )
    return write_page(path, f"data: {report['source']}", body)


def contact_sheet(keys: Sequence[str], picture: Callable[[str], Any]) -> Image.Image | None:
    """Some of the pictures with their captions; None: none of them can be read."""
    chosen = [keys[i * len(keys) // SHEET] for i in range(SHEET)] if len(keys) > SHEET else keys
    found = [pair for pair in map(picture, chosen) if pair is not None]
    if not found:
        return None
    images, captions = zip(*found, strict=True)
    return image_grid([_cell(image) for image in images], 8, [c[:120] for c in captions])


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = {
        "images": report["images"],
        "cannot be read": len(report["broken"]),
        "left out": sum(map(len, report["left_out"].values())),
        "captions": report["captions"],
        "without a caption": len(report["without"]) + len(report["empty"]),
        "groups that look alike": len(report["alike"]),
        "groups of the same file": len(report["same"]),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{n:,}</dd></div>" for name, n in tiles.items())
    return f"<dl class=tiles>{cells}</dl>"


def _words(lines: Sequence[str]) -> str:
    kind = "bad" if lines else "good"
    rows = "".join(f"<tr><td>{escape(line)}" for line in lines)
    found = f"<table>{rows}</table>" if lines else "<p>Nothing was found to be wrong.</p>"
    return f"<section class='health {kind}'><h2>What was found</h2>{found}</section>"


def _sheet(report: Mapping[str, Any], picture: Callable[[str], Any]) -> str:
    sheet = contact_sheet(report["keys"], picture)
    if sheet is None:
        return ""
    return f"<h2>Pictures</h2><figure class=last>{embedded(sheet, 1400, MAX_BYTES)}</figure>"


def _groups(title: str, groups: Sequence[Sequence[str]], picture: Callable[[str], Any]) -> str:
    figures = ""
    for group in groups[:GROUPS]:
        found = [pair for pair in map(picture, group[:MEMBERS]) if pair is not None]
        if found:
            sheet = image_grid([_cell(image) for image, _ in found], MEMBERS)
            names = printable(", ".join(group[:MEMBERS])) + ", ..." * (len(group) > MEMBERS)
            figures += (
                f"<figure>{embedded(sheet, 900, MAX_BYTES // 6)}"
                f"<figcaption>{escape(names)}</figcaption></figure>"
            )
    if not figures:
        return ""
    more = f": {GROUPS} of {len(groups):,} groups" if len(groups) > GROUPS else ""
    return f"<h2>{title}{more}</h2><div class=earlier>{figures}</div>"


def _cell(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((CELL, CELL))
    return image


def _histograms(report: Mapping[str, Any]) -> str:
    sides = Counter(_power(min(size)) for size in report["sizes"])
    shapes = Counter(_shape(width / height) for width, height in report["sizes"])
    lengths = Counter(_power(n) for n in report["lengths"])
    charts = bars("Shorter sides", "pixels", sides) + bars("Shapes", "width : height", shapes)
    return f"<div class=charts>{charts}{bars('Captions', report['unit'], lengths)}</div>"


def _power(number: int) -> tuple[float, str]:
    """The power of two below a number, for sorting, and the range that it begins."""
    low = 2 ** int(math.log2(number)) if number > 0 else 0
    return low, "0" if not low else "1" if low == 1 else f"{low:,} to {2 * low - 1:,}"


def _shape(ratio: float) -> tuple[float, str]:
    """The nearest of some well-known shapes."""
    known = {"1:2": 0.5, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 0.75, "1:1": 1.0}
    known |= {"4:3": 4 / 3, "3:2": 1.5, "16:9": 16 / 9, "2:1": 2.0}
    if not 0.45 < ratio < 2.2:
        return (0.0, "taller") if ratio < 1 else (9.0, "wider")
    name = min(known, key=lambda n: abs(math.log(known[n] / ratio)))
    return known[name], name


def _lists(report: Mapping[str, Any]) -> str:
    """What is too long for a sentence."""
    tables = {
        "Cannot be read": list(report["broken"].items()),
        "Captions of several images": [(text, f"{n:,}") for text, n in report["repeated"]],
        "Captions that are too long": [(k, f"{n} tokens") for k, n in report["too_long"]],
        "Without a caption": [(key, "") for key in report["without"] + report["empty"]],
        "Smaller than image_size": [(key, "") for key in report["small"]],
        "Of one colour": [(key, "") for key in report["flat"]],
        **{
            f"Left out: {why}": [(n, "") for n in names]
            for why, names in report["left_out"].items()
        },
    }
    out = ""
    for title, pairs in tables.items():
        rows = "".join(
            f"<tr><th>{escape(printable(a, 200))}<td>{escape(printable(str(b), 300))}"
            for a, b in pairs[:ROWS]
        )
        more = f"<p>{len(pairs) - ROWS:,} more are in check.json.</p>" if len(pairs) > ROWS else ""
        if rows:
            out += (
                f"<details><summary>{escape(title)}: {len(pairs):,}</summary>"
                f"<table>{rows}</table>{more}</details>"
            )
    return f"<h2>Names</h2><div class=made>{out}</div>" if out else ""
