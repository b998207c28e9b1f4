"""One HTML page that needs no other file: pictures are embedded, and there is no script."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from ..arguments import printable
from ..files import replacing
from .run_file import leaves

BINS = 12  # of a histogram


def write_page(path: Path, title: str, body: str) -> Path:
    """Write a page, atomically.

    Args:
        path: of the file.
        title: of the page.
        body: its HTML.

    Returns:
        the path.
    """
    style = files("muse_maskgit_pytorch.watching").joinpath("report.css").read_text("utf-8")
    page = PAGE.substitute(title=escape(title), style=style, body=body)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def table(title: str, values: Mapping[str, Any]) -> str:
    """Names and values of any nesting, closed up below a title where there is one."""
    rows = "".join(
        f"<tr><th>{escape(printable(name))}<td>{escape(printable(str(value), 500))}"
        for name, value in leaves(dict(values)).items()
    )
    table = f"<table>{rows}</table>"
    return f"<details><summary>{escape(title)}</summary>{table}</details>" if title else table


def bars(title: str, unit: str, counts: Mapping[tuple[float, str], int]) -> str:
    """A histogram; "" without counts.

    Args:
        title: of the chart.
        unit: of what is counted.
        counts: by where a bar stands and what it is called.
    """
    if not counts:
        return ""
    most = max(counts.values())
    rows = "".join(
        f"<tr><th>{label}<td class=bar><i style='width:{100 * counts[low, label] / most:.1f}%'></i>"
        f"<td>{counts[low, label]:,}"
        for low, label in sorted(counts)
    )
    head = f"<figcaption><h3>{title}</h3><small>{unit}</small></figcaption>"
    return f"<figure class=chart>{head}<table class=bars>{rows}</table></figure>"


def binned(values: Sequence[float]) -> Counter[tuple[float, str]]:
    """How many values lie in each of some equal parts of their range."""
    low, high = min(values), max(values)
    width = (high - low) / BINS
    if not width:
        return Counter({(low, f"{low:.3g}"): len(values)})
    edges = [low + number * width for number in range(BINS + 1)]
    counts = Counter({(a, f"{a:.3g} to {b:.3g}"): 0 for a, b in pairwise(edges)})
    parts = list(counts)
    for value in values:
        counts[parts[min(BINS - 1, int((value - low) / width))]] += 1
    return counts


def embedded(image: Image.Image, max_width: int, max_bytes: int) -> str:
    """An <img> with the picture in it, made smaller where it is too large."""
    if image.width > max_width:
        image = image.resize((max_width, max(1, round(image.height * max_width / image.width))))
    data, kind = _encode(image, "PNG"), "png"
    if len(data) > max_bytes:
        data, kind = _encode(image, "JPEG"), "jpeg"
    while len(data) > max_bytes and min(image.size) > 1:
        image = image.reduce(2)
        data = _encode(image, "JPEG")
    width, height = image.size
    scale = max(1, 1080 // width)  # small ones by a whole factor, pixel by pixel
    return (
        f"<img width={width * scale} height={height * scale} alt='' "
        f"src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
    )


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    return buffer.getvalue()


PAGE = Template("""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
<main>$body</main>
</html>
""")
