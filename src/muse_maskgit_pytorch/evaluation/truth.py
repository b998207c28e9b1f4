"""What is drawn and what it is compared with: prompts, and the true pictures of captioned data."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import whole
from ..data.dataset import ImageDataset
from ..data.pixels import View
from ..data.source import Source, facts_of, few, place, warn
from ..data.stream import RowStream
from ..files import digest_text
from ..geometry import Geometry, Size

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What pictures are drawn from.

    Attributes:
        text: the caption; empty for a model that takes none.
        key: name of its item in the data, or the number of its line.
        values: its row, by column, without pictures; where the data have columns.
    """

    text: str
    key: str
    values: Mapping[str, Any] = field(default_factory=dict)


def of_texts(texts: Sequence[str]) -> list[Prompt]:
    """Prompts without true pictures."""
    return [Prompt(text, str(number)) for number, text in enumerate(texts, 1)]


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """A short name of prompts in their order."""
    return digest_text(json.dumps([(prompt.key, prompt.text) for prompt in prompts]))


class Truth:
    """True pictures as they would be drawn: at that size, the first ones with their prompts.

    Which ones are taken depends on their keys alone: a larger number takes those of a smaller one
    and others. What cannot be read is left out and named in one warning.

    Args:
        source: captioned pictures; of a stream the first ones are taken.
        geometry: of the stage that draws.
        size: height and width of what it draws.
        samples: prompts to draw; None: all.
        references: pictures to compare with, at least the samples; None: these alone.
        captions: whether the data must have captions; without them prompts are empty.

    Attributes:
        prompts: what to draw.
        digest: a short name of all pixels.

    Raises:
        ValueError: a number below 1, a stream without one, no picture that can be read, an item
            without a caption.
    """

    def __init__(
        self,
        source: Source | RowStream,
        geometry: Geometry,
        size: Size,
        samples: int | None = None,
        references: int | None = None,
        captions: bool = True,
    ):
        for name, number in {"samples": samples, "references": references}.items():
            if number is not None:
                whole(name, number, 1)
        wanted = None if samples is None else max(samples, references or 0)
        if isinstance(source, RowStream):
            if wanted is None:
                raise ValueError("a stream has no end: say how many to take, --samples 1000")
            source = source.first(wanted)
        side = geometry.image_size
        view = View(side, buckets=() if size == (side, side) else (size,))
        self._data = ImageDataset(source, view, captions, geometry.cond_image_size)
        order = sorted(range(len(source)), key=lambda row: place(self._data.keys[row], 0))
        self._rows: list[int] = []
        self.prompts: list[Prompt] = []
        digest = hashlib.sha256()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another one takes its place
            for row in tqdm(order[:wanted], "true images", unit="image", dynamic_ncols=True):
                item = self._data.views(row, [None])
                if item is None:
                    continue
                for name in ("image", "cond_image"):
                    if name in item:
                        digest.update(_bytes(item[name]))
                if samples is None or len(self.prompts) < samples:
                    self.prompts.append(self._prompt(row, item, captions))
                self._rows.append(row)
        if self._data.broken:
            warn(f"left out {len(self._data.broken)} images that cannot be read", self._data.broken)
        if not self._rows:
            raise ValueError(f"{source} holds no image that can be read: {few(self._data.broken)}")
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Pictures to compare with."""
        return len(self._rows)

    def images(self, rows: Sequence[int]) -> Float[Tensor, "B 3 H W"]:
        """True pictures by their numbers, those of the prompts first."""
        return torch.cat([self._item(row)["image"] for row in rows])

    def low(self, rows: Sequence[int]) -> Float[Tensor, "B 3 h w"]:
        """Their low-resolution pictures, for a super-resolution stage."""
        return torch.stack([self._item(row)["cond_image"] for row in rows])

    def _item(self, row: int) -> dict[str, Any]:
        item = self._data.views(self._rows[row], [None])
        if item is None:
            raise ValueError(
                f"{self._data.keys[self._rows[row]]} of {self._data.source} cannot be read any more"
            )
        return item

    def _prompt(self, row: int, item: Mapping[str, Any], captions: bool) -> Prompt:
        key = self._data.keys[row]
        if captions and "text" not in item:
            raise ValueError(
                f"item {key!r} of {self._data.source} has embeddings in place of a caption, from "
                "which nothing can be drawn here: give it a text"
            )
        texts = item.get("text", "")
        text = texts if isinstance(texts, str) else texts[0]
        values = facts_of(self._data.source, row)[0].items()
        return Prompt(text, key, {name: value for name, value in values if _is_plain(value)})


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Things in their order, so many at a time."""
    for at in range(0, len(items), size):
        yield items[at : at + size]


def digest_files(files: Sequence[Path]) -> str:
    """A short name of files' contents in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    """Whether a value of a row is text or numbers, and no picture."""
    if isinstance(value, Mapping):
        return not value.keys() & {"bytes", "path"}
    return value is None or isinstance(value, str | int | float | list | tuple)


def _bytes(images: Tensor) -> memoryview:
    return (images * 255).round().to(torch.uint8).numpy().astype(np.uint8).data
