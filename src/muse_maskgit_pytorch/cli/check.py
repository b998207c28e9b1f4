"""`muse data check`: what is in a data set, and what is wrong with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..arguments import printable
from ..data.check import DataReport, check_data
from ..data.folder import open_source
from ..data.source import few
from ..files import check_output, replacing
from ..images import read_image
from ..text import TextEncoderError, get_text_encoder
from ..watching.data_page import contact_sheet, write_data_page
from .parser import Parser


def check(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    out = None if config.out is None else check_output("out", config.out, folder=True)
    if config.streaming and config.limit is None:
        raise ValueError("--streaming has no end: say how many to look at, --limit 10000")
    source, no_captions = _open(config)
    tokens, limit, no_tokens = _tokenizer(config.t5_name, config.max_text_len)
    report = check_data(
        source, config.image_size, count_tokens=tokens, token_limit=limit, limit=config.limit,
        num_workers=config.num_workers,
        progress=lambda seen, total: iter(tqdm(seen, "looking", total, unit="image")),
    )  # fmt: skip
    if not report.images:
        reasons = [f"{key} ({why})" for key, why in report.broken.items()]
        raise ValueError(f"{report.source} holds no image that can be read: {few(reasons)}")
    wrong = [*([no_captions] if no_captions else []), *faults(report)]
    print("\n".join([*facts(report), *([no_tokens] if no_tokens else [])]))
    print("\n".join(f"- {line}" for line in wrong) or "nothing was found to be wrong")
    if out is not None:
        print(_write(out, source, report, wrong))


def facts(report: DataReport) -> Iterator[str]:
    """What a data set holds, in a few lines."""
    yield f"{report.source}: {report.images:,} images"
    kinds = ", ".join(f"{kind or 'no ending'} {n:,}" for kind, n in report.kinds.items())
    yield f"kinds: {kinds}"
    sides = sorted(min(size) for size in report.sizes)
    shapes = sorted(width / height for width, height in report.sizes)
    yield f"shorter sides: {_spread(sides)} px; width to height: {_spread(shapes)}"
    if report.captions:
        limit = f", of which {report.limit} are read" if report.limit else ""
        yield (
            f"captions: {report.captions:,}; {report.unit}: {_spread(sorted(report.lengths))}"
            f"{limit}"
        )


def faults(report: DataReport) -> Iterator[str]:
    """What is wrong with it, or may be, one sentence each."""
    broken = [f"{key} ({why})" for key, why in report.broken.items()]
    if broken:
        yield f"{len(broken):,} cannot be read: {few(broken)}"
    for why, names in report.left_out.items():
        yield f"{len(names):,} are left out, that {why}: {few(names)}"
    lists = {
        "have no caption": report.without if report.captions else [],
        "have an empty caption, which is no text to the model": report.empty,
        f"are smaller than image_size {report.image_size} and would be enlarged": report.small,
        "are of one colour": report.flat,
    }
    for what, keys in lists.items():
        if keys:
            yield f"{len(keys):,} {what}: {few(keys)}"
    if report.repeated:
        images = sum(count for _, count in report.repeated)
        top = [f"{printable(text, 60)!r} ({count:,})" for text, count in report.repeated[:3]]
        yield (
            f"{len(report.repeated):,} captions stand for several images, {images:,} in all: "
            f"{', '.join(top)}"
        )
    if report.too_long:
        long = [f"{key} ({n})" for key, n in report.too_long]
        yield (
            f"{len(long):,} captions have more than the {report.limit} tokens that are read; the "
            f"rest is cut: {few(long)}"
        )
    for what, groups in {
        "are the same file several times": report.same,
        "look alike (one scaled or compressed from another, or small changes)": report.alike,
    }.items():
        if groups:
            shown = [" = ".join(group[:3]) for group in groups]
            yield (
                f"{sum(map(len, groups)):,} images in {len(groups):,} groups {what}: {few(shown)}"
            )


def _spread(values: list[Any]) -> str:
    """The least, the median and the largest."""
    ends = values[0], values[len(values) // 2], values[-1]
    low, middle, high = (f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in ends)
    return low if low == high else f"{low} to {high}, median {middle}"


def _open(config: Any) -> tuple[Any, str | None]:
    """The source, and what to say where it has no captions."""
    reading = dict(
        image_column=config.image_column, text_column=config.text_column,
        streaming=config.streaming, min_size=config.min_size,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it stands in the report
        try:
            return open_source(config.source, None, True, **reading), None
        except ValueError as error:
            reading["text_column"] = None
            try:
                return open_source(config.source, None, False, **reading), str(error)
            except ValueError:
                raise error from None


def _tokenizer(
    name: str, max_text_len: int
) -> tuple[Callable[[list[str]], list[int]] | None, int | None, str | None]:
    """What counts tokens, how many are read, and what to say where neither is known."""
    if name == "none":
        return None, None, None
    try:
        encoder: Any = get_text_encoder(name, max_text_len)
    except (TextEncoderError, ImportError) as error:
        return None, None, f"words were counted and not tokens: {error}"

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in encoder.tokenizer(texts, verbose=False)["input_ids"]]

    return count, encoder.max_text_len, None


def _write(out: Path, source: Any, report: DataReport, wrong: list[str]) -> Path:
    """The figures, a contact sheet and the page."""
    rows = {key: row for row, key in enumerate(getattr(source, "keys", ()))}
    gone = {*report.broken, *(name for names in report.left_out.values() for name in names)}
    keys = [key for key in rows if key not in gone]

    def picture(key: str) -> tuple[Any, str] | None:
        try:
            item = source.item(rows[key])
            text = item.text if isinstance(item.text, str) else next(iter(item.text or ()), "")
            return read_image(item.image), str(text)
        except (KeyError, ValueError):
            return None

    out.mkdir(parents=True, exist_ok=True)
    values = asdict(report)
    with replacing(out / "check.json") as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sheet = contact_sheet(keys, picture)
    if sheet is not None:
        with replacing(out / "sheet.png") as temporary:
            sheet.save(temporary, format="PNG")
    return write_data_page(out / "check.html", values | {"keys": keys}, wrong, picture)
