"""Captions as people have them: text files beside images, metadata tables, in any encoding."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..arguments import as_text, printable, shown
from .rows import missing
from .source import few, warn

SAMPLE = 2**18  # bytes of text by which an encoding is guessed
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)
_HALVES = (("utf-16-le", _ODD, _EVEN), ("utf-16-be", _EVEN, _ODD))

# Those in which people's files are, of which a few words can be told from one another.
LATIN = ["cp1252", "cp1250", "cp1254", "cp1257"]
ENCODINGS = [*LATIN, "cp1251", "cp1253", "cp1255", "cp1256", "koi8_r"]
ENCODINGS += ["gb18030", "big5", "cp932", "cp949", "euc_jp"]


class Row(NamedTuple):
    """One row of a metadata table."""

    line: int
    file_name: str
    text: str
    values: Mapping[str, Any]


def read_prompts(file: Path | TextIO, name: str) -> list[str]:
    """One prompt on a line; empty lines, and those that begin with #, are left out.

    Args:
        file: text in UTF-8.
        name: what it is called in errors.
    """
    try:
        text = file.read_text(encoding="utf-8-sig") if isinstance(file, Path) else file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a text file in UTF-8: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{name} holds no prompt")
    return prompts


def read_texts(folder: Path, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Read caption files.

    Files that do not say by a mark or by their bytes how they are encoded are taken to be encoded
    alike: a single caption is too short to tell.

    Args:
        folder: in which they lie.
        names: relative to it.

    Returns:
        what could be read, on one line each, and why the others could not.
    """
    texts: dict[str, str] = {}
    failed: dict[str, str] = {}
    unknown: dict[str, bytes] = {}
    for name in names:
        try:
            raw = (folder / name).read_bytes()
        except OSError as error:
            failed[name] = error.strerror or str(error)
            continue
        try:
            text = decode(raw)
        except ValueError as error:
            failed[name] = str(error)
            continue
        if text is None:
            unknown[name] = raw
        else:
            texts[name] = text
    encoding = guess_encoding(unknown.values())
    for name, raw in unknown.items():
        try:
            texts[name] = raw.decode(encoding or "utf-8")
        except UnicodeDecodeError as error:
            failed[name] = f"its encoding is unknown ({error})"
    if encoding and (read := [name for name in unknown if name in texts]):
        warn(
            f"{len(read)} caption files are not UTF-8 and were read as {encoding} (if that is "
            "wrong, save them as UTF-8)",
            read,
        )
    return {name: one_line(text, f"the caption {name!r}") for name, text in texts.items()}, failed


def decode(raw: bytes) -> str | None:
    """Text whose encoding is certain, else None.

    Raises:
        ValueError: a mark that the rest does not keep to, or bytes that are no text.
    """
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            try:
                return raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(f"it is marked as {encoding}, but is not: {error}") from error
    if b"\0" in raw:
        for encoding, zeros, letters in _HALVES:  # every other byte of Latin letters is one
            if raw[zeros].count(0) * 2 > len(raw[zeros]) and 0 not in raw[letters]:
                return raw.decode(encoding, errors="replace")
        raise ValueError("it has NUL bytes: it is no text, or UTF-16 without a mark")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def guess_encoding(raws: Iterable[bytes]) -> str | None:
    """How texts that are not UTF-8 are encoded, all alike; None if no encoding fits them."""
    sample = b"\n".join(raws)[:SAMPLE]
    if not sample:
        return None
    from charset_normalizer import from_bytes

    found = {match.encoding: match for match in from_bytes(sample, cp_isolation=ENCODINGS)}
    best = next(iter(found), None)  # they are sorted
    if best in LATIN:
        # they differ in a few letters: another must be clearly better than the commonest
        common = found.get("cp1252")
        alike = common is None and "cp1252" in found[best].could_be_from_charset
        if alike or (common and found[best].coherence - common.coherence <= 0.05):
            return "cp1252"
    return best


def one_line(text: str, name: str) -> str:
    """A caption as it is trained on: whole characters, single spaces."""
    return " ".join(as_text(text, name).split())


def read_table(file: Path, column: str = "text") -> list[Row]:
    """Read the rows of a metadata file, in their order.

    Args:
        file: CSV with a header, JSON lines, or Parquet.
        column: where the captions stand.

    Raises:
        ValueError: it cannot be read, is malformed, or lacks a column; the message names file and
            line.
    """
    try:
        if file.suffix.lower() == ".parquet":
            return _rows(_parquet_rows(file), column)
        raw = file.read_bytes()
        text = decode(raw)
        if text is None:
            encoding = guess_encoding([raw])
            if encoding is None:
                raise ValueError("its encoding is unknown: save it as UTF-8")
            text = raw.decode(encoding)
            warn(
                f"{shown(str(file), 400)} is not UTF-8 and was read as {encoding} (if that is "
                "wrong, save it as UTF-8)"
            )
        rows = _csv_rows if file.suffix.lower() == ".csv" else _json_rows
        return _rows(rows(text), column)
    except (OSError, ValueError, csv.Error) as error:  # also bad JSON and bad encodings
        raise ValueError(f"cannot read {shown(str(file), 400)}: {error}") from error


def _rows(rows: Iterable[tuple[int, Any]], column: str) -> list[Row]:
    """Rows with their file's name and caption; an empty caption is none."""
    found = []
    for line, values in rows:
        if not isinstance(values, dict):
            raise ValueError(f"line {line} must be an object with file_name and {column}")
        for name in ("file_name", column):
            if name not in values:
                raise ValueError(
                    f"it needs the columns file_name and {column}: "
                    f"{missing(name, values, 'the column', f'line {line}')}"
                )
        name, caption = values["file_name"], values[column]
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise ValueError(
                f"line {line} must be an object with file_name and {column}, both strings"
            )
        text = one_line(caption or "", f"the caption of {shown(name)}")
        found.append(Row(line, name, text, values))
    return found


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(header) < 2:
            raise ValueError(
                "it needs the columns file_name and text, separated by commas: the first line is "
                f"{shown(header)}"
            )
        for row in filter(None, reader):
            if len(row) > len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} fields, but the header {len(header)}: "
                    "put captions with a comma into double quotes"
                )
            row += [""] * (len(header) - len(row))
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "it needs pyarrow: pip install 'muse-maskgit-pytorch[data]', or save it as CSV"
        ) from error
    yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)


class Tables:
    """The metadata tables of a folder, matched with its images.

    Attributes:
        texts: captions by the image's name.
        values: all columns of its row, if they are wanted.
        rows: how many there are.
        lost: rows that name no image, as "file_name (table, line)".
        twice: images that are named more than once; their last row counts.
    """

    def __init__(
        self,
        folder: Path,
        tables: Sequence[str],
        images: Sequence[str],
        column: str = "text",
        with_values: bool = False,
    ):
        self.texts: dict[str, str] = {}
        self.values: dict[str, Mapping[str, Any]] = {}
        self.rows, self.lost, self.twice = 0, [], []
        self._images, known = images, set(images)
        for table in tables:
            above = posixpath.dirname(table)
            for row in read_table(folder / table, column):
                self.rows += 1
                name = _image_of(row.file_name, folder, above, known)
                if name is None:
                    self.lost.append((row.file_name, f"{table}, line {row.line}"))
                    continue
                if name in self.texts:
                    self.twice.append(name)
                self.texts[name] = row.text
                if with_values:
                    self.values[name] = row.values

    def complaints(self) -> Iterator[str]:
        """What a reader should know of the tables, if anything."""
        if self.lost:
            yield (
                f"{len(self.lost)} of {self.rows} rows of metadata name no image: "
                + "; ".join(
                    f"{shown(name)} ({printable(place)}){self._nearest(name)}"
                    for name, place in self.lost[:3]
                )
                + ("; ..." if len(self.lost) > 3 else "")
            )
        if self.twice:
            yield f"metadata name {len(self.twice)} images more than once, the last counts: " + few(
                self.twice
            )

    def _nearest(self, name: str) -> str:
        """The image that was probably meant."""
        stems = {posixpath.splitext(posixpath.basename(i))[0].casefold(): i for i in self._images}
        wanted = posixpath.basename(name.replace("\\", "/")).casefold()
        for stem in (posixpath.splitext(wanted)[0], wanted):
            if near := difflib.get_close_matches(stem, [stem] if stem in stems else stems, n=1):
                return f", the nearest is {shown(stems[near[0]])}"
        return ""


def _image_of(name: str, folder: Path, above: str, known: Collection[str]) -> str | None:
    """The image that a table in the folder ``above`` names by its path, also by Windows' one."""
    for path in (name, name.replace("\\", "/")):
        if posixpath.isabs(path):
            path = posixpath.relpath(path, folder.resolve().as_posix())
        else:
            path = posixpath.join(above, path)
        if (path := posixpath.normpath(path)) in known:
            return path
    return None
