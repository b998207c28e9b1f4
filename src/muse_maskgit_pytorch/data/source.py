"""What training data are to the rest: items that can be asked for by number, and their names.

A source is the door for data of any origin. It gives pictures as they are; `ImageDataset` makes
tensors of them, `split` divides them by their keys, and `Order` says which comes when.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Protocol

from ..arguments import printable
from ..images import Picture, header_size

BROKEN = "cannot be read"  # the reason to leave an image out that every source may have


@dataclass(frozen=True)
class Item:
    """One example, as its source has it.

    Attributes:
        image: a PIL image of any mode and size; or a file or its bytes, which are decoded when it
            is known how many pixels are wanted.
        text: its caption, or several; the masked transformers need one.
        cond_image: its low-resolution image, for super-resolution; None: ``image`` scaled down.
        embeds: what a text encoder of one's own made of the caption, in its place: float (L,E).
        mask: which of these L are tokens, bool (L,); None: all.
        loss_mask: of the image's size: white counts in the loss, black does not; None: all counts.
    """

    image: Picture
    text: str | Sequence[str] | None = None
    cond_image: Picture | None = None
    embeds: Any = None
    mask: Any = None
    loss_mask: Picture | None = None


class Source(Protocol):
    """Training data that can be reached by number, from several processes at once.

    With ``num_workers`` a source is copied to other processes: it must not hold what cannot be
    shared, such as an open file (open it in `item`, once per process).

    It may have three more attributes, for `ImageDataset.summary`: ``texts``, all captions in the
    order of the keys, ``masks``, the keys of those that have a ``loss_mask``, and ``left_out``,
    names of what is no item by the reason why. With a method
    ``facts``, of an item its values by column and its picture's width and height, no picture is
    decoded to learn its shape.
    """

    @property
    def keys(self) -> Sequence[str]:
        """A stable, unique name for each item: it alone decides on which side of a split it is."""
        ...

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item:
        """Read one item, 0 <= index < len.

        Raises:
            ValueError: it is broken, as it is when its picture cannot be decoded; the next
                readable one then takes its place.
        """
        ...


class WithCondImages:
    """A source whose low-resolution images come from a second one, matched by key.

    Keys are compared without their suffix, so that ``cats/1.jpg`` finds ``cats/1.png``.

    Raises:
        ValueError: an image has no low-resolution image, or more than one.
    """

    def __init__(self, source: Source, cond: Source):
        self.source, self.cond = source, cond
        self.keys = source.keys
        self.texts = getattr(source, "texts", None)
        self.masks = getattr(source, "masks", None)
        self.left_out: Mapping[str, Sequence[str]] = getattr(source, "left_out", {})
        self.embeds = getattr(source, "embeds", False)
        names = [_stem(key) for key in cond.keys]
        wanted = [_stem(key) for key in self.keys]
        index = {name: i for i, name in enumerate(names)}
        missing = [key for key, name in zip(self.keys, wanted, strict=True) if name not in index]
        if missing:
            raise ValueError(
                f"{cond} has no low-resolution image for {len(missing)} of {len(self.keys)} "
                f"images: {few(missing)}; the names must agree up to the suffix"
            )
        counts = Counter(names)
        if twice := [name for name in dict.fromkeys(wanted) if counts[name] > 1]:
            raise ValueError(
                f"{cond} has more than one low-resolution image for {few(twice)}: keep one of each"
            )
        self._cond_index = [index[name] for name in wanted]

    def __len__(self) -> int:
        return len(self.source)

    def __str__(self) -> str:
        return str(self.source)

    def facts(self, index: int) -> Any:
        """As of the first source."""
        return facts_of(self.source, index)

    def item(self, index: int) -> Item:
        cond = self.cond.item(self._cond_index[index])
        return replace(self.source.item(index), cond_image=cond.image)


def facts_of(source: Source, index: int) -> tuple[Mapping[str, Any], tuple[int, int] | None]:
    """Values of an item by column, and width and height of its picture; None: it is broken."""
    facts = getattr(source, "facts", None)
    try:
        return facts(index) if facts else ({}, header_size(source.item(index).image))
    except (OSError, SyntaxError, ValueError):  # of Pillow and of sources
        return {}, None


def has_cond(source: Source) -> bool:
    """Whether the first item that can be read has a low-resolution image of its own."""
    for row in range(len(source)):
        with suppress(ValueError):
            return source.item(row).cond_image is not None
    return False


def has_masks(source: Source) -> bool:
    """Whether it says that items have a ``loss_mask``, or the first that can be read has one."""
    if (masks := getattr(source, "masks", None)) is not None:
        return bool(masks)
    for row in range(len(source)):
        with suppress(ValueError):
            return source.item(row).loss_mask is not None
    return False


def check_mask(item: Item, what: str) -> None:
    """Compare the sizes of a picture and of the mask of its loss.

    Raises:
        ValueError: they differ, or one of them cannot be read.
    """
    if item.loss_mask is None:
        return
    sizes = header_size(item.loss_mask), header_size(item.image)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the loss_mask of {what} is {sizes[0]} pixels, its image {sizes[1]}: give both the "
            "same size"
        )


def fingerprint(keys: Sequence[str], texts: Sequence[str] = (), masks: Sequence[str] = ()) -> str:
    """A short name of keys, captions and masked items in their order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (keys, texts, masks) if masks else (keys, texts):
        digest.update(f"{len(part)} ".encode())
        for raw in map(encoded, part):
            digest.update(f"{len(raw)} ".encode() + raw)
    return digest.hexdigest()[:16]


def place(key: str, seed: int) -> float:
    """Where an item stands in a split: a number in [0, 1) that depends on its key and the seed."""
    digest = hashlib.sha256(encoded(f"{seed}/{key}")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def encoded(key: str) -> bytes:
    """The bytes of a key; file names that are not UTF-8 have halves of characters in them."""
    return key.encode("utf-8", "surrogatepass")


def few(names: Sequence[str]) -> str:
    """At most ten names, for a message."""
    return printable(", ".join(names[:10])) + (", ..." if len(names) > 10 else "")


def warn(message: str, names: Sequence[str] = ()) -> None:
    """Warn once, naming at most ten items."""
    warnings.warn(f"{message}: {few(names)}" if names else message, stacklevel=3)


def _stem(key: str) -> str:
    return PurePosixPath(key).with_suffix("").as_posix()
