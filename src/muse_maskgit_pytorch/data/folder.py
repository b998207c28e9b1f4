"""A folder of images, with or without captions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from ..arguments import as_path, shown
from ..images import check_image, header_size, suffixes
from .captions import Tables, read_texts
from .dataset import ImageDataset
from .listing import Listing, counted
from .opening import open_named
from .pixels import View
from .rows import Filter, Kept, Rows
from .source import BROKEN, Item, WithCondImages, few, warn
from .stream import RowStream


class Folder:
    """All images below a folder, in the order of their relative paths: a `Source`.

    Folders behind links are searched too, each once. What begins with a dot, what file managers
    and archives leave behind, and the pictures of training runs are no part of the data.

    Captions come from a `metadata.csv`, `.jsonl` or `.parquet` (columns `file_name`, relative to
    that file, and `text`), and for an image that these do not name from `NAME.txt` or
    `NAME.caption` next to `NAME.png`. They are UTF-8, or what their bytes show or most resemble.

    `NAME-masklabel.png` next to an image is the mask of its loss (`Item.loss_mask`), as in
    OneTrainer.

    Args:
        folder: searched with its subfolders for png, jpg, webp, avif, bmp, gif, tiff, jp2, ppm and
            qoi files.
        captions: give the caption with every image; images without one are left out, counted and
            named in one warning.
        verify: read every header at construction, and leave out what is not an image.
        results_folder: of a training run; left out where it lies inside the folder.
        classes: names of classes: an image without a caption, in a folder that has the name of
            one, is of that class, which is its caption.
        text_column: of the tables, where the captions stand.
        with_values: keep all columns of the tables, for a `Filter`.

    Attributes:
        names: paths relative to `folder`, with forward slashes, sorted; also the keys.
        texts: captions in the same order, or None.
        masks: files of the masks, by the image's name.
        left_out: names of the images that are no part of it, by the reason why; warnings count
            and name them too.

    Raises:
        ValueError: the folder is missing or holds no readable image, captions are asked for and
            there are none, or a metadata file is malformed.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        captions: bool = False,
        verify: bool = True,
        results_folder: str | PathLike[str] | None = None,
        classes: Sequence[str] = (),
        text_column: str = "text",
        with_values: bool = False,
    ) -> None:
        self.folder = as_path(folder, "folder")
        self._values: Mapping[str, Mapping[str, Any]] = {}
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise ValueError(f"{self} {problem}")
        found = Listing.of(self.folder, None if results_folder is None else as_path(results_folder))
        self.names, self.left_out = found.images, found.left_out
        self.texts: list[str] | None = None
        for reason, names in self.left_out.items():
            warn(f"left out {len(names)} that {reason}", names)
        if not self.names:
            others = ", ".join(counted(found.endings)) or "nothing else either"
            raise ValueError(
                f"{self} holds no images ({' '.join(sorted(suffixes()))}); it has {others}"
            )
        stems = {name: PurePosixPath(name).with_suffix("").as_posix() for name in self.names}
        self.masks = {name: found.masks[s] for name, s in stems.items() if s in found.masks}
        if captions:
            self._caption(found, stems, classes, text_column, with_values)
        if verify:
            broken = {name for name in self.names if not self._has_header(name)}
            self._leave_out(BROKEN, broken)
            if not self.names:
                raise ValueError(f"{self} holds no image that can be read")

    @property
    def keys(self) -> list[str]:
        return self.names

    @property
    def broken(self) -> list[str]:
        """Names of the images that were left out because their header cannot be read."""
        return self.left_out.get(BROKEN, [])

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return f"image folder {shown(str(self.folder), 400)}"

    def item(self, index: int) -> Item:
        name = self.names[index]
        mask = self.masks.get(name)
        return Item(
            self.folder / name,
            None if self.texts is None else self.texts[index],
            loss_mask=None if mask is None else self.folder / mask,
        )

    def facts(self, index: int) -> tuple[Mapping[str, Any], tuple[int, int]]:
        """What a `Filter` judges an item by: its row in the tables, and its size."""
        name = self.names[index]
        return self._values.get(name, {}), header_size(self.folder / name)

    def _has_header(self, name: str) -> bool:
        try:
            check_image(self.folder / name)
        except ValueError:
            return False
        return True

    def _leave_out(self, reason: str, gone: Collection[str]) -> None:
        """Drop images, and say so."""
        if not gone:
            return
        left = [row for row, name in enumerate(self.names) if name not in gone]
        self.left_out[reason] = [name for name in self.names if name in gone]
        warn(
            f"left out {len(gone)} of {len(self.names)} images that {reason}", self.left_out[reason]
        )
        self.names = [self.names[row] for row in left]
        if self.texts is not None:
            self.texts = [self.texts[row] for row in left]

    def _caption(
        self,
        found: Listing,
        stems: Mapping[str, str],
        classes: Sequence[str],
        column: str,
        with_values: bool,
    ) -> None:
        """Give the images their captions, and leave out those that have none."""
        tables = Tables(self.folder, found.tables, self.names, column, with_values)
        self._values = tables.values
        beside = {
            name: found.texts[stem]
            for name, stem in stems.items()
            if stem in found.texts and not tables.texts.get(name)
        }
        read, failed = read_texts(self.folder, sorted(set(beside.values())))
        texts = tables.texts | {name: read.get(file, "") for name, file in beside.items()}
        for name in self.names:
            if not texts.get(name) and (parent := PurePosixPath(name).parent.name) in classes:
                texts[name] = parent
        complaints = list(tables.complaints())
        if failed:
            reasons = [f"{file} ({why})" for file, why in failed.items()]
            complaints.append(f"cannot read {len(failed)} of the caption files: {few(reasons)}")
        if not any(texts.values()):
            raise ValueError(
                f"none of the {len(self.names)} images in {shown(str(self.folder), 400)} has a "
                "caption: "
                + (
                    "; ".join(complaints)
                    or "write a metadata.csv with the columns file_name,text there, or NAME.txt "
                    "next to NAME.png"
                    + (f", or a folder for each class: {few(classes)}" if classes else "")
                )
            )
        for complaint in complaints:
            warn(complaint)
        self.texts = [texts.get(name) or "" for name in self.names]
        self._leave_out("have no caption", {name for name in self.names if not texts.get(name)})


class ImageFolder(ImageDataset):
    """A `Folder` as a dataset: all its images as squares, see `ImageDataset`.

    Args:
        folder: searched with its subfolders, see `Folder`.
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
        self.folder, self.image_size = as_path(folder, "folder"), image_size
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
    data: Any,
    folder: str | None,
    captions: bool = False,
    cond_folder: str | None = None,
    results_folder: Path | None = None,
    classes: Sequence[str] = (),
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    streaming: bool = False,
    min_size: int = 0,
    where: Mapping[str, Sequence[float]] | None = None,
) -> Any:
    """The one door for data: a `Source`, or a `RowStream` of what has no length.

    Args:
        data: a source, anything with ``__len__`` and ``__getitem__``, an iterable, or a name
            (`open_named`).
        folder: the short form of ``data`` for a folder of images.
        captions: whether they are needed.
        cond_folder: low-resolution images, see `WithCondImages`.
        results_folder: the pictures there are the run's own, and no data.
        classes: captions may be their names, see `Folder`.
        image_column: name of the image's column.
        text_column: of the caption's.
        streaming: see `open_named`.
        min_size: see `Filter`; so is ``where``.
        where: ranges of columns.

    Raises:
        ValueError: both or neither of folder and data are given, what is no data, or as the
            classes that are named here.
    """
    if (data is None) == (folder is None):
        given = "neither folder nor data is" if data is None else "both folder and data are"
        raise ValueError(
            f"{given} given: name a folder of images, or give a source of your own "
            "(muse_maskgit_pytorch.data.Source)"
        )
    keep = Filter(min_size, where)
    named, name = isinstance(data, str | PathLike), str(data)
    if streaming and not named:
        raise ValueError("streaming is for data that are named by a text: leave it out")
    if named:
        data = open_named(name, streaming)
    if data is None or isinstance(data, Path):
        if streaming:
            raise ValueError(
                f"{data} is a plain folder, which is not streamed: leave streaming out"
            )
        if image_column is not None:
            raise ValueError("image_column is for data with columns: leave it out with a folder")
        data = Folder(
            data or as_path(folder, "folder"), captions, True, results_folder, classes,
            text_column or "text", bool(where),
        )  # fmt: skip
    elif not (hasattr(data, "keys") and hasattr(data, "item")):
        columns = image_column, text_column, captions, classes
        if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            data = Rows(data, *columns)
        elif hasattr(data, "__iter__"):
            if cond_folder is not None:
                raise ValueError(
                    "cond_folder cannot be matched with a stream: give each row a cond_image"
                )
            return RowStream(data, *columns, keep, name if named else None)
        else:
            raise ValueError(
                f"data must be a source, a list or stream of dicts, or a name, not {shown(data)}"
            )
    if cond_folder is not None:
        data = WithCondImages(data, Folder(cond_folder))
    return Kept(data, keep) if keep else data
