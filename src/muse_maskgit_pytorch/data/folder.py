"""A folder of images, with or without captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from ..images import check_image, read_image
from .dataset import ImageDataset, warn
from .pixels import View
from .source import Item, Source, WithCondImages

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class Folder:
    """All images below a folder, in the order of their relative paths: a `Source`.

    Captions come from a `metadata.csv` or `metadata.jsonl` (columns `file_name`, relative to that
    file, and `text`), and for an image that these do not name from `NAME.txt` next to `NAME.png`.

    Args:
        folder: searched with its subfolders for png, jpg, webp, bmp, gif and tiff files.
        captions: give the caption with every image; images without one are left out, counted and
            named in one warning.
        verify: read every header at construction, and leave out what is not an image.

    Attributes:
        names: paths relative to `folder`, with forward slashes, sorted; also the keys.
        texts: captions in the same order, or None.
        broken: names of the images that were left out because their header cannot be read.

    Raises:
        ValueError: the folder is missing or holds no readable image, captions are asked for and
            there are none, or a metadata file is malformed.
    """

    def __init__(
        self, folder: str | PathLike[str], captions: bool = False, verify: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.broken: list[str] = []
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise ValueError(f"{self} {problem}")
        paths = (p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in paths)
        if not self.names:
            raise ValueError(f"{self} holds no images ({' '.join(sorted(SUFFIXES))})")
        self.texts = self._captioned() if captions else None
        if verify:
            self._leave_out_broken()

    @property
    def keys(self) -> list[str]:
        return self.names

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return f"image folder {str(self.folder)!r}"

    def item(self, index: int) -> Item:
        image = read_image(self.folder / self.names[index])
        return Item(image, None if self.texts is None else self.texts[index])

    def _leave_out_broken(self) -> None:
        self.broken = [name for name in self.names if not self._has_header(name)]
        if not self.broken:
            return
        count = f"{len(self.broken)} of {len(self.names)}"
        warn(f"left out {count} images that cannot be read", self.broken)
        gone = set(self.broken)
        rows = [row for row, name in enumerate(self.names) if name not in gone]
        self.names = [self.names[row] for row in rows]
        if self.texts is not None:
            self.texts = [self.texts[row] for row in rows]
        if not self.names:
            raise ValueError(f"{self} holds no image that can be read")

    def _has_header(self, name: str) -> bool:
        try:
            check_image(self.folder / name)
        except ValueError:
            return False
        return True

    def _captioned(self) -> list[str]:
        """Narrow `names` to the images that have a caption, and give the captions."""
        found = {name: text for file in _metadata_files(self.folder) for name, text in _rows(file)}
        texts = [found.get(path := self.folder / name) or _text_for(path) for name in self.names]
        bare = [name for name, text in zip(self.names, texts, strict=True) if not text]
        if len(bare) == len(self.names):
            raise ValueError(
                f"none of the {len(bare)} images in {str(self.folder)!r} has a caption: write a "
                "metadata.csv with the columns file_name,text there, or NAME.txt next to NAME.png"
            )
        if bare:
            warn(f"left out {len(bare)} of {len(texts)} images that have no caption", bare)
        self.names = [name for name, text in zip(self.names, texts, strict=True) if text]
        return [text for text in texts if text]


class ImageFolder(ImageDataset):
    """A `Folder` as a dataset: all its images as squares, see `ImageDataset`.

    Args:
        folder: searched with its subfolders for png, jpg, webp, bmp, gif and tiff files.
        image_size: side S of the square that every image is scaled and cropped to, in pixels;
            smaller images are enlarged.
        captions: give the caption with every image; images without one are left out, counted and
            named in one warning.
        verify: read every header at construction, and leave out what is not an image.
        cache: read all images at construction and keep them as bytes: 3 * S * S bytes each
            (3,655 images of 64 px: 45 MB). Broken ones are then all found at once.

    Attributes:
        names: paths relative to `folder`, with forward slashes, sorted.
        texts: captions in the same order, or None.
        broken: names of the images that could not be read.

    Raises:
        ValueError: as `Folder`, or image_size is not positive.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        image_size: int,
        captions: bool = False,
        verify: bool = True,
        cache: bool = False,
    ) -> None:
        self.folder, self.image_size = Path(folder), image_size
        view = View(image_size)  # complains before anything is read
        source = Folder(folder, captions, verify and not cache)
        self._texts = source.texts
        super().__init__(source, view, captions, cache=cache)
        self.broken += source.broken

    @property
    def names(self) -> list[str]:
        return self.keys

    @property
    def texts(self) -> list[str] | None:
        return None if self._texts is None else [self._texts[row] for row in self._rows]


def open_source(
    data: Source | None,
    folder: str | None,
    captions: bool = False,
    cond_folder: str | None = None,
) -> Source:
    """The trainers' choice between a source and its short form, a folder.

    Raises:
        ValueError: both or neither are given, or as `Folder` and `WithCondImages`.
    """
    if (data is None) == (folder is None):
        given = "neither folder nor data is" if data is None else "both folder and data are"
        raise ValueError(
            f"{given} given: name a folder of images, or give a source of your own "
            "(muse_maskgit_pytorch.data.Source)"
        )
    source = Folder(folder, captions) if data is None else data  # type: ignore[arg-type]
    return source if cond_folder is None else WithCondImages(source, Folder(cond_folder))


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


def _text_for(path: Path) -> str:
    try:
        return " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return ""
