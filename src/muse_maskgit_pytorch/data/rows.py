"""Rows of anybody's data set, dicts with an image and what it shows, as items."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..arguments import real, shown, whole
from ..images import Picture, header_size, to_pil
from .source import Item, Source, facts_of, few, warn

# What a column is called where it is not named; of those that there are, the first.
IMAGES = ("image", "jpg", "jpeg", "png", "webp")
TEXTS = ("text", "caption", "txt")
SMALL = "are smaller than min_size"
OUTSIDE = "are outside of where"


@dataclass(frozen=True)
class Filter:
    """Which items to train on.

    Attributes:
        min_size: least shorter side of the picture, in pixels.
        where: by column, the lowest and the highest number to keep.

    Raises:
        ValueError: values that are no sizes or ranges.
    """

    min_size: int = 0
    where: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self):
        whole("min_size", self.min_size, 0)
        if not isinstance(self.where, Mapping | None):
            raise ValueError(f"where must be {{column: [low, high]}}, not {shown(self.where)}")
        for column, ends in (self.where or {}).items():
            if not isinstance(ends, list | tuple) or len(ends) != 2:
                raise ValueError(f"where[{column!r}] must be [low, high], not {shown(ends)}")
            low, high = (real(f"where[{column!r}]", end) for end in ends)
            if low > high:
                raise ValueError(f"where[{column!r}] must rise, not {shown(ends)}")

    def __bool__(self) -> bool:
        return bool(self.min_size or self.where)

    def objection(self, values: Mapping[str, Any], size: tuple[int, int] | None) -> str | None:
        """Why an item is left out, if it is. A number that is missing is in no range."""
        if self.where and not values:  # of a folder's image that no table names
            return OUTSIDE
        for column, (low, high) in (self.where or {}).items():
            try:
                if not low <= float(values[column]) <= high:
                    return OUTSIDE
            except (TypeError, ValueError):
                return OUTSIDE
            except KeyError:
                raise missing(column, values, "where") from None
        return SMALL if size is not None and min(size) < self.min_size else None


@dataclass(frozen=True)
class Columns:
    """How the rows of a data set are to be read.

    Attributes:
        image: column of the image: a PIL image, a float tensor (3,H,W) in [0,1], encoded bytes,
            or a dict with "bytes" or "path".
        text: column of its caption, of several, or of a class; None: there is none.
        labels: names of the classes that whole numbers stand for.
        name: of the data set, in messages.
        cond: whether the rows have low-resolution images of their own ("cond_image").
    """

    image: str
    text: str | None
    labels: Sequence[str]
    name: str
    cond: bool = False

    @classmethod
    def of(
        cls,
        row: Any,
        name: str,
        image: str | None = None,
        text: str | None = None,
        captions: bool = True,
        labels: Sequence[str] = (),
    ) -> Columns:
        """Find the columns in a first row.

        Args:
            row: the first row.
            name: of the data set, for messages.
            image: column that must be there; None: the first of `IMAGES`.
            text: likewise, the first of `TEXTS`, or "label" where there are ``labels``.
            captions: whether a text, or embeddings of one, are needed.
            labels: names of classes.

        Raises:
            ValueError: a column is not there; the nearest is named. A row that is no dict.
        """
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{name} yields {shown(row)}: its items must be dicts with an image and a text"
            )
        found, cond = _column(row, image, IMAGES, "image_column", name), "cond_image" in row
        if not captions or (text is None and "text_embeds" in row):
            return cls(found, None, labels, name, cond)
        known = (*TEXTS, "label") if labels else TEXTS
        return cls(found, _column(row, text, known, "text_column", name), labels, name, cond)

    def item(self, row: Mapping[str, Any], key: str) -> Item:
        """The item of a row.

        Raises:
            ValueError: it has no picture.
        """
        what = f"image {key} of {self.name}"
        if not isinstance(row, Mapping) or self.image not in row:
            raise ValueError(f"item {key} of {self.name} has no {self.image}")
        cond, counted = row.get("cond_image"), row.get("loss_mask")
        return Item(
            as_picture(row[self.image], what),
            self._text(row),
            None if cond is None else as_picture(cond, f"low-resolution {what}"),
            row.get("text_embeds"),
            row.get("text_mask"),
            None if counted is None else as_picture(counted, f"loss_mask of {what}"),
        )

    def size(self, row: Mapping[str, Any]) -> tuple[int, int] | None:
        """Width and height of a row's picture, from its header; None if it cannot be read."""
        value = row[self.image]
        if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
            value = value.get("bytes") or value["path"]
        if isinstance(value, Tensor):
            return value.shape[-1], value.shape[-2]
        try:
            return header_size(io.BytesIO(value) if isinstance(value, bytes) else value)
        except ValueError:  # reading the picture will say what it is
            return None

    def _text(self, row: Mapping[str, Any]) -> Any:
        text = None if self.text is None else row.get(self.text)
        if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < len(self.labels):
            return self.labels[text]
        return text


class Rows:
    """Rows that can be asked for by number, as a `Source`.

    Args:
        data: with ``__len__`` and ``__getitem__``, which gives dicts. A `datasets.Dataset` is one.
        image_column: name of the image's column; by default the first of `IMAGES` that there is.
        text_column: of the caption's; by default the first of `TEXTS`.
        captions: whether items have captions.
        classes: names of classes, whose numbers may stand in the place of captions.

    Attributes:
        embeds: whether the rows have embeddings of their own ("text_embeds") instead of captions.
        masks: the keys, if the rows have masks of their loss ("loss_mask").

    Raises:
        ValueError: there are no rows, or no such column.
    """

    def __init__(
        self,
        data: Any,
        image_column: str | None = None,
        text_column: str | None = None,
        captions: bool = False,
        classes: Sequence[str] = (),
    ):
        name, size = name_of(data), len(data)
        if not size:
            raise ValueError(f"{name} yields nothing: it has no items")
        data = undecoded(data)
        labels = labels_of(data, text_column) or classes
        first = data[0]
        self.columns = Columns.of(first, name, image_column, text_column, captions, labels)
        self.embeds = captions and self.columns.text is None
        self.data, self.keys = data, [str(row) for row in range(size)]
        self.masks = self.keys if "loss_mask" in first else []

    def __len__(self) -> int:
        return len(self.keys)

    def __str__(self) -> str:
        return self.columns.name

    def item(self, index: int) -> Item:
        return self.columns.item(self.data[index], self.keys[index])

    def facts(self, index: int) -> tuple[Mapping[str, Any], tuple[int, int] | None]:
        """What a `Filter` judges an item by: its row, and its size where it can be read."""
        row = self.data[index]
        return row, self.columns.size(row)


class Kept:
    """The items of a source that a filter keeps.

    Raises:
        ValueError: none is kept, or a column is not there.
    """

    def __init__(self, source: Source, keep: Filter):
        gone: dict[str, list[str]] = {}
        self.source, self.rows, keys = source, [], source.keys
        for row, key in enumerate(keys):
            why = keep.objection(*facts_of(source, row))
            if why is None:
                self.rows.append(row)
            else:
                gone.setdefault(why, []).append(key)
        for why, names in gone.items():
            warn(f"left out {len(names)} of {len(keys)} images that {why}", names)
        if not self.rows:
            counts = ", ".join(f"{len(names)} that {why}" for why, names in gone.items())
            raise ValueError(f"nothing of {source} is left to train on: left out {counts}")
        self.keys = [keys[row] for row in self.rows]
        self.left_out = {**getattr(source, "left_out", {}), **gone}
        texts = getattr(source, "texts", None)
        self.texts = None if texts is None else [texts[row] for row in self.rows]
        self.masks = getattr(source, "masks", None)
        self.embeds = getattr(source, "embeds", False)
        self.cond = getattr(source, "cond", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return str(self.source)

    def facts(self, index: int) -> tuple[Mapping[str, Any], tuple[int, int] | None]:
        return facts_of(self.source, self.rows[index])

    def item(self, index: int) -> Item:
        return self.source.item(self.rows[index])


def as_picture(value: Any, what: str) -> Picture:
    """A picture from whatever a data set keeps it as; bytes and files are not decoded yet.

    Raises:
        ValueError: none of those; damaged.
    """
    if isinstance(value, Mapping):  # as datasets' own, not decoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Tensor):
        if value.ndim != 3 or value.shape[0] != 3 or not value.is_floating_point():
            raise ValueError(
                f"{what} is a tensor {tuple(value.shape)} of {value.dtype}: it must be float "
                "(3,H,W) in [0,1]"
            )
        low, high = (float(end) for end in value.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"{what} has values from {low:.3g} to {high:.3g}: they must be in [0,1]"
            )
        return to_pil(value)[0]
    if not isinstance(value, str | bytes | Image.Image) or not value:
        raise ValueError(
            f"{what} is {shown(value)}: it must be a PIL image, a float tensor (3,H,W), or bytes"
        )
    if isinstance(value, bytes):
        file = io.BytesIO(value)
        file.name = what.removeprefix("image ")  # type: ignore[attr-defined]
        return file
    return value


def captions_of(text: Any, what: str) -> str | list[str]:
    """A caption, or those of several that are not empty.

    Raises:
        ValueError: none, or of another type.
    """
    if isinstance(text, str) and text:
        return text
    if text is None or (isinstance(text, str | Sequence) and not len(text)):
        raise ValueError(f"{what} has no caption: give it a text")
    if not isinstance(text, list | tuple) or not all(isinstance(each, str) for each in text):
        raise ValueError(
            f"the caption of {what} must be a string or a list of strings, not {shown(text)}"
        )
    return captions_of([each for each in text if each], what) if "" in text else list(text)


def embeds_of(item: Item, what: str) -> Tensor:
    """Embeddings of one's own, without what the mask says is no token: float (L,E).

    Raises:
        ValueError: another shape, or nothing is left.
    """
    embeds = torch.as_tensor(item.embeds)
    mask = None if item.mask is None else torch.as_tensor(item.mask).bool()
    if embeds.ndim != 2 or not embeds.is_floating_point():
        raise ValueError(
            f"text_embeds of {what} must be float (L,E), not {tuple(embeds.shape)} {embeds.dtype}"
        )
    if mask is not None and mask.shape != embeds.shape[:1]:
        raise ValueError(
            f"text_mask of {what} is {tuple(mask.shape)}, for {len(embeds)} text_embeds"
        )
    embeds = embeds if mask is None else embeds[mask]
    if not len(embeds):
        raise ValueError(f"text_embeds of {what} have no token")
    return embeds.float()


def missing(column: str, known: Iterable[str], argument: str, name: str = "the data") -> ValueError:
    """What to say of a column that is not there."""
    known = sorted(known)
    near = difflib.get_close_matches(column, known, n=1, cutoff=0.4)
    hint = f", the nearest is {near[0]!r}" if near else ""
    return ValueError(
        f"{argument} {column!r} is no column of {name}{hint}: it has {few(known) or 'none'}"
    )


def name_of(data: Any) -> str:
    """What a data set is called in messages."""
    kind = type(data)
    fingerprint = getattr(data, "_fingerprint", None)  # of a datasets.Dataset
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}" + (
        f" {fingerprint}" if isinstance(fingerprint, str) else ""
    )


def undecoded(data: Any) -> Any:
    """A data set of the datasets library with its images as bytes, which `read_image` decodes."""
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping) or not hasattr(data, "cast_column"):
        return data
    for column, feature in features.items():
        if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
            data = data.cast_column(column, type(feature)(decode=False))
    return data


def labels_of(data: Any, column: str | None) -> Sequence[str]:
    """The names of classes that the datasets library keeps with a column of numbers."""
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping):
        return ()
    columns = (column,) if column is not None else (*TEXTS, "label")
    found = next((features[name] for name in columns if name in features), None)
    names = getattr(found, "names", None)
    return names if isinstance(names, list) else ()


def _column(
    row: Mapping[str, Any], wanted: str | None, known: Sequence[str], argument: str, name: str
) -> str:
    if wanted is None:
        wanted = next((column for column in known if column in row), known[0])
    if wanted not in row:
        raise missing(wanted, row.keys(), argument, name)
    return wanted
