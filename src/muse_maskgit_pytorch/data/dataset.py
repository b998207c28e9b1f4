"""A source as a dataset of tensors, and its split into training and validation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..arguments import printable
from ..geometry import Size
from ..images import center_crop, header_size, largest_crop, read_reduced, reduction, to_tensor
from .order import Sample, drawn
from .pixels import View
from .rows import captions_of, embeds_of
from .source import BROKEN, Item, Source, check_mask, facts_of, fingerprint, place, warn
from .wording import Wording

if TYPE_CHECKING:
    from .cache import TokenCache


class ImageDataset(Dataset[dict[str, Any]]):
    """The items of a source as tensors: squares, or of the nearest of a view's shapes.

    An item is `{"image": float (3,H,W) in [0,1]}`, with "text": str if there are captions, and
    with "cond_image": float (3,h,w) if a low resolution is asked for. Of several captions one is
    drawn. An item with embeddings of its own has "text_embeds", float (L,E), in place of a text,
    and with ``masks`` one that has a mask of its loss "loss_mask", float (1,H,W) in [0,1].

    A broken item never ends a run. It is named in a warning once and from then on answered with
    the next readable one of its shape, or else of any, cropped to it, so every index stays valid
    and the answer is the same in every epoch. `broken` lists their keys; with `DataLoader` workers
    each worker keeps its own list.

    Args:
        source: where the items come from.
        view: how a picture becomes a tensor; a number S is the centre square of S pixels. Where it
            has several shapes, the pictures' sizes are asked for once, at construction.
        captions: every item must have a text, which is given with it.
        cond_size: side of the low-resolution images, where that of the view's square is its
            ``size``; other shapes are as much lower. They come from the item's own `cond_image`,
            else from its image, scaled exactly as the images of a base of that size.
        cache: prepare all pictures at construction and keep them as bytes: 3 * S * S for each.
            Broken ones are then all found at once. Random crops keep more, see `View.prepare`:
            3 * (S / crop_scale[0])^2 bytes for a square picture that has so many pixels.
        wording: what becomes of captions at a position of the training order.
        masks: give the masks of the loss, of the items that have one.

    Attributes:
        keys: the items' keys, in the order of the source.
        bucket: uint16 (N,), of each item which of the view's sizes it has.
        broken: keys of the items that could not be read.

    Raises:
        ValueError: there are no items, or with ``cache`` none that can be read.
    """

    def __init__(
        self,
        source: Source,
        view: View | int,
        captions: bool = False,
        cond_size: int | None = None,
        cache: bool = False,
        wording: Wording | None = None,
        masks: bool = False,
    ):
        self.wording, self.masks = wording, masks
        self.source, self.captions, self.cond_size = source, captions, cond_size
        self.view = View(view) if isinstance(view, int) else view
        self.broken: list[str] = []
        self.keys = list(source.keys)
        self._rows = list(range(len(source)))
        self.bucket = np.zeros(len(source), np.uint16)
        if self.view.buckets:
            shapes = (facts_of(source, row)[1] for row in self._rows)
            self.bucket[:] = [self.view.nearest(shape) for shape in shapes]
        self._cache: list[dict[str, Any]] | None = None
        if not self.keys:
            raise ValueError(f"{source} holds no images")
        if cache:
            self._fill_cache()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give one item; for a broken one the next readable one, starting over at the end.

        Args:
            index: a `Sample` says at which position of the training order it is drawn, and so
                which random crop and which of several captions it gets; any other integer gets the
                centre crop and the first caption.

        Raises:
            IndexError: no such item.
            ValueError: no image at all can be read any more, or an item has no caption.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        position = index.position if isinstance(index, Sample) else None
        bucket = int(self.bucket[index])
        for row in self._instead(index % len(self)):
            if (item := self.views(row, [position], bucket)) is not None:
                if "text" in item:
                    item["text"] = self._worded(item["text"], position)
                first = {name: item[name][0] for name in ("image", "loss_mask") if name in item}
                return item | first
        raise ValueError(f"{self.source} holds no image that can be read")

    def _instead(self, index: int) -> Iterator[int]:
        """An item, and what may take its place: those that follow, of its bucket first."""
        for same in (True, False):
            for step in range(len(self)):
                row = (index + step) % len(self)
                if (self.bucket[row] == self.bucket[index]) == same:
                    yield row

    def views(
        self, row: int, positions: Sequence[int | None], bucket: int | None = None
    ) -> dict[str, Any] | None:
        """One item as it is seen at several positions of the training order, read once.

        Args:
            row: 0 <= row < len.
            positions: K of them; None: the centre crop.
            bucket: which of the view's sizes it is given, if not its own.

        Returns:
            the item, its "image" (K,3,H,W), with all of its captions; None if it is broken.

        Raises:
            ValueError: the item has no caption.
        """
        bucket = int(self.bucket[row]) if bucket is None else bucket
        if (prepared := self._prepared(row, bucket)) is None:
            return None
        picture = Image.fromarray(prepared["picture"])
        images = torch.stack([self.view.finish(picture, at, bucket) for at in positions])
        rest = {name: value for name, value in prepared.items() if name != "picture"}
        if "loss_mask" in rest:  # the same crops: it has the picture's size
            counted = Image.fromarray(rest["loss_mask"])
            views = [self.view.finish(counted, at, bucket)[:1] for at in positions]
            rest["loss_mask"] = torch.stack(views)
        return {"image": images} | rest

    @property
    def rows(self) -> Sequence[int]:
        """The numbers of the items in their source."""
        return self._rows

    @property
    def buckets(self) -> dict[Size, Sequence[int]]:
        """Numbers of the items by the height and width that they have as tensors."""
        return self.view.grouped(self.bucket)

    def size(self, row: int) -> Size:
        """Height and width of an item as a tensor."""
        return self.view.sizes[self.bucket[row]]

    def places(self, seed: int) -> np.ndarray:
        """Where each item stands in a split: float64 (N,) in [0,1), of its key and the seed."""
        return np.array([place(key, seed) for key in self.keys])

    def summary(self) -> dict[str, Any]:
        """What there is to train on, for a run's record and to notice that it has changed.

        Returns:
            "source", its name; "items", their number; "fingerprint", 16 hexadecimal digits of the
            keys, of the captions where the source has them at hand, and of which items have a
            mask, in their order; "left_out", numbers of images by the reason why.
        """
        texts = getattr(self.source, "texts", None) if self.captions else None
        masks = set(getattr(self.source, "masks", None) or ()) if self.masks else ()
        given = getattr(self.source, "left_out", {})
        left_out = {reason: set(names) for reason, names in given.items()}
        left_out.setdefault(BROKEN, set()).update(self.broken)
        return {
            "source": printable(str(self.source)),
            "items": len(self),
            "fingerprint": fingerprint(
                self.keys,
                [texts[row] for row in self._rows] if texts else (),
                [key for key in self.keys if key in masks],
            ),
            "left_out": {reason: len(names) for reason, names in left_out.items() if names},
        }

    def select(self, rows: Sequence[int] | np.ndarray) -> Self:
        """Give the same dataset with only these rows, which stand in for one another if broken."""
        part = copy.copy(self)
        part._keep(np.asarray(rows, dtype=int).tolist())
        return part

    def sides(self, count: int = 16) -> list[int]:
        """Sides in pixels of the largest crops of about so many pictures from all over the set.

        Of another shape than a square, the side of a square that would be scaled as much.
        """
        found = []
        for row in range(0, len(self), max(1, len(self) // count)):
            with suppress(ValueError):  # it is broken; `__getitem__` says so when it is asked for
                picture = header_size(self.source.item(self._rows[row]).image)
                size = self.size(row)
                found.append(self.view.size * largest_crop(picture, size)[0] // size[1])
        return found

    def viewed(self, view: View, cache: bool = False) -> Self:
        """Give the same items, seen in another way, in the same shapes."""
        other = copy.copy(self)
        other.view, other._cache = view, None
        if cache:
            other._fill_cache()
        return other

    def _worded(self, texts: str | Sequence[str], position: int | None) -> str:
        """The caption of an item at a position of the training order."""
        if not isinstance(texts, str):
            texts = texts[drawn(len(texts), self.view.seed, position)]
        return self.wording(texts, position) if self.wording else texts

    def _keep(self, rows: Sequence[int]) -> None:
        self.keys = [self.keys[row] for row in rows]
        self._rows = [self._rows[row] for row in rows]
        self.bucket = self.bucket[rows]
        if self._cache is not None:
            self._cache = [self._cache[row] for row in rows]

    def _prepared(self, row: int, bucket: int) -> dict[str, Any] | None:
        if self._cache is not None:
            return self._cache[row]
        key = self.keys[row]
        if key in self.broken:
            return None
        try:
            item, pictures = self._decoded(row, bucket)
        except ValueError as error:
            self.broken.append(key)
            warn(f"{error}; the next readable one takes its place")
            return None
        return pictures | self._beside(key, item, bucket)

    def _decoded(self, row: int, bucket: int) -> tuple[Item, dict[str, Any]]:
        """An item, and its pictures as they are kept.

        Raises:
            ValueError: it is broken.
        """
        item = self.source.item(self._rows[row])
        picture = read_reduced(item.image, self.view.wanted(bucket))
        pictures: dict[str, Any] = {"picture": np.asarray(self.view.prepare(picture, bucket))}
        if self.cond_size is not None:
            size, low = self.view.scaled(self.cond_size).sizes[bucket], item.cond_image
            if low is None:  # to the last bit as the images of a base of that size
                same = reduction(item.image, size) == picture.scale
                low = picture if same else item.image
            pictures["cond_image"] = to_tensor(center_crop(low, size))
        return item, pictures

    def _beside(self, key: str, item: Item, bucket: int) -> dict[str, Any]:
        """What stands beside an item's pictures; what is wrong with it ends the run."""
        beside: dict[str, Any] = {}
        what = f"item {key!r} of {self.source}"
        if self.masks and (counted := item.loss_mask) is not None:
            check_mask(item, what)
            beside["loss_mask"] = np.asarray(self.view.prepare(counted, bucket))
        if self.captions and item.embeds is None:
            beside["text"] = captions_of(item.text, what)
        elif self.captions:
            beside["text_embeds"] = embeds_of(item, what)
        return beside

    def _fill_cache(self) -> None:
        cache, rows, broken = [], [], []
        for row, key in enumerate(self.keys):
            try:
                item, pictures = self._decoded(row, int(self.bucket[row]))
            except ValueError:
                broken.append(key)
            else:
                cache.append(pictures | self._beside(key, item, int(self.bucket[row])))
                rows.append(row)
        if broken:
            self.broken += broken
            warn(f"left out {len(broken)} of {len(self)} images that cannot be read", broken)
        if not rows:
            raise ValueError(f"{self.source} holds no image that can be read")
        self._keep(rows)
        self._cache = cache


Set = TypeVar("Set", bound="ImageDataset | TokenCache")


def split(dataset: Set, valid_fraction: float, seed: int = 0) -> tuple[Set, Set]:
    """Split a dataset into training and validation images by a hash of their keys.

    An image's side depends on its own key and the seed alone, so adding or removing others never
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
    places = dataset.places(seed)
    valid = places < valid_fraction
    if len(places) == 1:
        valid[:] = False  # a single image trains
    elif valid_fraction > 0 and len(places):
        if not valid.any():
            valid[places.argmin()] = True
        elif valid.all():
            valid[places.argmax()] = False
    return dataset.select(np.flatnonzero(~valid)), dataset.select(np.flatnonzero(valid))
