"""A folder of images, with or without captions, as a dataset: the start of every training walk."""

from __future__ import annotations

import copy
import csv
import json
import warnings
from collections.abc import Iterator, Sequence
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..images import check_image, read_image, to_tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class ImageFolder(Dataset[dict[str, Any]]):
    """All images below a folder, in the order of their relative paths, as squares.

    An item is `{"image": float (3,S,S) in [0,1]}`, with captions also `"text": str`. Captions come
    from a `metadata.csv` or `metadata.jsonl` (columns `file_name`, relative to that file, and
    `text`), for an image that these do not name from `NAME.txt` beside `NAME.png`. Images smaller
    than `image_size` are scaled up.

    A broken image never ends a run. One whose header cannot be read is left out from the start.
    One found broken later (a file cut short) is named in a warning once and from then on answered
    with the next readable item, so every index stays valid and the answer is the same in every
    epoch. `broken` lists their names; with `DataLoader` workers each worker keeps its own list.

    Args:
        folder: searched with its subfolders for png, jpg, webp, bmp, gif and tiff files.
        image_size: side S of the square that every image is scaled and cropped to, in pixels.
        captions: give the caption with every image; images without one are left out, counted and
            named in one warning.
        verify: read every header at construction.
        cache: read all images at construction and keep them as bytes: 3 * S * S bytes each
            (3,655 images of 64 px: 45 MB). Broken ones are then all found at once.

    Attributes:
        names: paths relative to `folder`, with forward slashes, sorted.
        texts: captions in the same order, or None.
        broken: names of the images that could not be read.

    Raises:
        ValueError: the folder is missing or holds no readable image, captions are asked for and
            there are none, a metadata file is malformed, or image_size is not positive.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        image_size: int,
        captions: bool = False,
        verify: bool = True,
        cache: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.image_size = image_size
        self.broken: list[str] = []
        self._pixels: Tensor | None = None
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise ValueError(f"image folder {str(folder)!r} {problem}")

        paths = (p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in paths)
        if not self.names:
            endings = " ".join(sorted(SUFFIXES))
            raise ValueError(f"image folder {str(folder)!r} holds no images ({endings})")
        self.texts = self._captioned() if captions else None
        if cache:
            self._fill_cache()
        elif verify:
            self._keep([i for i, name in enumerate(self.names) if self._has_header(name)])
        if self.broken:
            count = f"{len(self.broken)} of {len(self.names) + len(self.broken)}"
            _warn(f"left out {count} images that cannot be read", self.broken)
        if not self.names:
            raise ValueError(f"image folder {str(folder)!r} holds no image that can be read")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give one item; for a broken image the next readable one, starting over at the end.

        Raises:
            IndexError: no such item.
            ValueError: no image at all can be read any more.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        for step in range(len(self)):
            row = (index + step) % len(self)
            if (image := self._image(row)) is not None:
                return {"image": image} | ({"text": self.texts[row]} if self.texts else {})
        raise ValueError(f"image folder {str(self.folder)!r} holds no image that can be read")

    def select(self, rows: Sequence[int]) -> ImageFolder:
        """Give the same dataset with only these rows, which stand in for one another if broken."""
        part = copy.copy(self)
        part._keep(rows)
        return part

    def _keep(self, rows: Sequence[int]) -> None:
        self.names = [self.names[row] for row in rows]
        if self.texts is not None:
            self.texts = [self.texts[row] for row in rows]
        if self._pixels is not None:
            self._pixels = self._pixels[list(rows)]

    def _image(self, row: int) -> Tensor | None:
        if self._pixels is not None:
            return self._pixels[row].float() / 255
        name = self.names[row]
        if name in self.broken:
            return None
        try:
            return to_tensor(read_image(self.folder / name), self.image_size)
        except ValueError as error:
            self.broken.append(name)
            _warn(f"{error}; the next readable one takes its place", [])
            return None

    def _has_header(self, name: str) -> bool:
        try:
            check_image(self.folder / name)
        except ValueError:
            self.broken.append(name)
            return False
        return True

    def _fill_cache(self) -> None:
        size = self.image_size
        pixels = torch.empty(len(self.names), 3, size, size, dtype=torch.uint8)
        rows = []
        for row, name in enumerate(self.names):
            try:
                image = to_tensor(read_image(self.folder / name), size)
            except ValueError:
                self.broken.append(name)
            else:
                pixels[row] = (image * 255).round().to(torch.uint8)
                rows.append(row)
        if self.broken:
            self._keep(rows)
            pixels = pixels[rows]
        self._pixels = pixels

    def _captioned(self) -> list[str]:
        """Narrow `names` to the images that have a caption, and give the captions."""
        found = {name: text for file in _metadata_files(self.folder) for name, text in _rows(file)}
        texts = [found.get(path := self.folder / name) or _text_beside(path) for name in self.names]
        bare = [name for name, text in zip(self.names, texts, strict=True) if not text]
        if len(bare) == len(self.names):
            raise ValueError(
                f"none of the {len(bare)} images in {str(self.folder)!r} has a caption: write a "
                "metadata.csv with the columns file_name,text there, or NAME.txt beside NAME.png"
            )
        if bare:
            _warn(f"left out {len(bare)} of {len(texts)} images that have no caption", bare)
        self.names = [name for name, text in zip(self.names, texts, strict=True) if text]
        return [text for text in texts if text]


def split(
    dataset: ImageFolder, valid_fraction: float, seed: int = 0
) -> tuple[ImageFolder, ImageFolder]:
    """Split a folder into training and validation images by a hash of their relative paths.

    An image's side depends on its own path and the seed alone, so adding or removing others never
    moves it. The one exception: where the fraction leaves a side empty, the image whose hash
    comes nearest goes there, so that a set of two or more images always has both. A single image
    is for training.

    Args:
        dataset: the whole.
        valid_fraction: expected share of the validation images, in [0,1); 0 gives none.
        seed: another seed, another split.

    Returns:
        training and validation images.

    Raises:
        ValueError: valid_fraction outside [0,1).
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction must be in [0,1), got {valid_fraction}")
    digests = [sha256(f"{seed}/{name}".encode()).digest() for name in dataset.names]
    places = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
    valid = {row for row, place in enumerate(places) if place < valid_fraction}
    if valid_fraction > 0 and len(places) > 1:
        if not valid:
            valid = {places.index(min(places))}
        elif len(valid) == len(places):
            valid.remove(places.index(max(places)))
    elif len(places) == 1:
        valid = set()  # a single image trains
    train = [row for row in range(len(places)) if row not in valid]
    return dataset.select(train), dataset.select(sorted(valid))


def _metadata_files(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("metadata.csv"), *folder.rglob("metadata.jsonl")])


def _rows(file: Path) -> Iterator[tuple[Path, str]]:
    """Read (image path, caption) pairs out of one metadata file."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            is_csv = file.suffix == ".csv"
            rows = csv.DictReader(lines) if is_csv else (json.loads(x) for x in lines if x.strip())
            for row in rows:
                yield file.parent / row["file_name"], " ".join((row["text"] or "").split())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} needs file_name and text in every row") from error
    except (ValueError, csv.Error) as error:  # also bad JSON and bad UTF-8
        raise ValueError(f"cannot read {str(file)!r}: {error}") from error


def _text_beside(path: Path) -> str:
    try:
        return " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return ""


def _warn(message: str, names: Sequence[str]) -> None:
    """Warn once, naming at most ten files."""
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    warnings.warn(f"{message}: {shown}" if names else message, stacklevel=3)
