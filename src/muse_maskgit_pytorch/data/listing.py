"""What lies in a data folder: images, what may say what they show, and what is no part of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..images import suffixes

TEXTS = (".txt", ".caption")  # of two files beside one image, the first ending counts
MASK = "-masklabel"  # of an image's mask of its loss, NAME-masklabel.png beside NAME.jpg
ALONE = "are masks without their image"
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Folders that file managers, synchronisation and archives make. As what begins with a dot, they
# hold copies, thumbnails and rubbish.
SYSTEM = frozenset(
    {"@eadir", "__macosx", "__pycache__", "#recycle", "$recycle.bin", "lost+found"}
    | {"system volume information"}
)
RUN = "were drawn by a training run"
# Pictures that are passed over, and so may be missed.
UNREAD = frozenset({".arw", ".avif", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".hdr"})
UNREAD |= {".heic", ".heif", ".ico", ".jp2", ".jxl", ".jxr", ".nef", ".orf", ".pcx", ".pdf"}
UNREAD |= {".psd", ".raf", ".raw", ".rw2", ".sgi", ".svg", ".tga", ".wmf", ".xcf"}


@dataclass
class Listing:
    """Paths relative to the folder, with forward slashes.

    Attributes:
        images: names of the images, sorted.
        masks: images that are the mask of another, by its name without its suffix.
        texts: files that may be an image's caption, by the image's name without its suffix.
        tables: metadata files, sorted.
        endings: how many files have each ending, all but the images.
        left_out: by reason, names of what looks like an image and is none of the data.
    """

    images: list[str] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, results_folder: Path | None = None) -> Listing:
        """Search a folder and all folders below it, each once, also those behind links.

        Names of links are tried last, so that a folder has its own name wherever it has one.

        Args:
            folder: where to search.
            results_folder: of a run; left out where it lies inside.
        """
        found, readable, results = cls(), suffixes(), _identity(results_folder)
        seen: set[tuple[int, int] | None] = set()
        folders, links = [("", "")], []  # each with the reason to leave it out, if any
        while folders or links:
            name, why = folders.pop() if folders else links.pop(0)
            if (identity := _identity(folder / name)) in seen:
                continue
            seen.add(identity)
            if identity == results and name:
                why = why or RUN
            try:
                entries = sorted(os.scandir(folder / name), key=lambda entry: entry.name)
            except OSError:
                found._leave_out("are folders that cannot be read", name)
                continue
            is_run = any(entry.name == "metrics.jsonl" for entry in entries)
            for entry in entries:
                path, reason = f"{name}/{entry.name}".lstrip("/"), why
                if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                    reason = why or "are hidden, or in a folder that is hidden or the system's"
                elif is_run and entry.name == "samples":
                    reason = why or RUN
                link = entry.is_symlink()  # to nothing, or in a circle, it is neither of the two
                if os.path.isfile(entry) if link else entry.is_file():
                    found._take(path, reason, readable)
                elif os.path.isdir(entry) if link else entry.is_dir():
                    (links if link else folders).append((path, reason))
        found.images.sort()
        stems = {_stem(path) for path in found.images}
        for stem in found.masks.keys() - stems:
            found._leave_out(ALONE, found.masks.pop(stem))
        found.tables.sort()
        for names in found.left_out.values():
            names.sort()
        return found

    def _take(self, path: str, why: str, readable: frozenset[str]) -> None:
        """Put a file where it belongs."""
        name = PurePosixPath(path)
        suffix = name.suffix.lower()
        if suffix in readable:
            if why:
                self._leave_out(why, path)
            elif name.stem.endswith(MASK):
                self.masks.setdefault(_stem(path).removesuffix(MASK), path)
            else:
                self.images.append(path)
        elif not why:
            self.endings[suffix] += 1
            if name.name.lower() in TABLES:
                self.tables.append(path)
            elif suffix in TEXTS:
                stem = _stem(path)
                other = self.texts.get(stem)
                if other is None or _rank(path) < _rank(other):
                    self.texts[stem] = path
            elif suffix in UNREAD:
                self._leave_out("are in formats that are not read", path)

    def _leave_out(self, why: str, path: str) -> None:
        self.left_out.setdefault(why, []).append(path)


def counted(endings: Counter[str]) -> Iterator[str]:
    """The commonest endings with their counts, for a message."""
    for ending, count in endings.most_common(5):
        yield f"{count} {ending or 'without an ending'}"


def _stem(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix()


def _rank(path: str) -> tuple[int, str]:
    return TEXTS.index(PurePosixPath(path).suffix.lower()), path


def _identity(path: Path | None) -> tuple[int, int] | None:
    """The same for all names of a folder; None if there is none."""
    try:
        stat = None if path is None else os.stat(path)
    except OSError:
        stat = None
    return None if stat is None else (stat.st_dev, stat.st_ino)
