"""Token ids and text embeddings of a whole data set, computed once and kept on disk.

Tokenizers and text encoder are frozen, so a masked transformer can train from their outputs: the
loss is the same, and a step costs the transformer alone. `encoding` writes a cache, here it is
read: a folder of shards, and a ``manifest.json`` that says what they hold and of what they were
made.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from ..arguments import as_path, plain, printable, shown, whole
from ..files import digest_text, replacing
from ..geometry import Size
from ..maskgit import MaskGit
from ..structures import Batch, TextEmbeds
from ..vqgan_vae import ImageTokenizer
from .order import Sample, drawn, draws
from .pixels import View
from .shards import CacheError, Shard, open_shard
from .source import BROKEN

FORMAT, VERSION = "muse token cache", 1
MANIFEST = "manifest.json"
DECODING = "reduced"  # of large JPEGs (`images.read_reduced`); "whole" before a plan said so
SPLIT_SEED = 0  # of the places in a split that are stored


@dataclass(frozen=True)
class IdSet:
    """The ids that one tokenizer gives the images at one size.

    Attributes:
        tokenizer: `ImageTokenizer.id_name`.
        image_size: side of the square in pixels.
        tokens: ids of an image.
        codes: size of the codebook.
    """

    tokenizer: str
    image_size: int
    tokens: int
    codes: int

    @classmethod
    def of(cls, vae: ImageTokenizer, image_size: int) -> IdSet:
        tokens = vae.fmap_size(image_size) ** 2
        return cls(vae.id_name(), image_size, tokens, vae.codebook_size)

    @classmethod
    def all_of(cls, maskgit: MaskGit) -> list[IdSet]:
        """What a model learns from: the ids of its images, then those of the low resolution."""
        found = [cls.of(maskgit.vae, maskgit.image_size)]
        if maskgit.cond_vae is not None and maskgit.cond_image_size is not None:
            found.append(cls.of(maskgit.cond_vae, maskgit.cond_image_size))
        return found

    def __str__(self) -> str:
        return f"{self.tokenizer} at {self.image_size} px"


@dataclass(frozen=True)
class Texts:
    """What reads the captions.

    Attributes:
        encoder: its name, or the names of classes in its place.
        max_text_len: tokens of a caption that are read.
        width: E of its states.
        precision: in which the encoder computes.
    """

    encoder: str | list[str]
    max_text_len: int
    width: int
    precision: str = "float32"

    @classmethod
    def of(cls, maskgit: MaskGit) -> Texts:
        maskgit.check_encoder()
        model = maskgit.transformer
        classes = model.classes is not None
        precision = "float32" if classes else maskgit.text_compute.precision
        return cls(plain(model.text_encoder), model.max_text_len, model.text_embed_dim, precision)

    def __str__(self) -> str:
        name = f"{len(self.encoder)} classes" if isinstance(self.encoder, list) else self.encoder
        low = "" if self.precision == "float32" else f", in {printable(self.precision, 20)}"
        return f"{printable(name, 200)} ({self.max_text_len} tokens, {self.width} wide{low})"


@dataclass(frozen=True)
class Plan:
    """What decides the content of a cache. Two caches with the same plan hold the same.

    Attributes:
        images: their number.
        crops: random crops of each image; 0: the centre alone.
        view: of the crops, as `View`.
        ids: the tokenizers and sizes.
        texts: the text encoder.
        source: fingerprint of keys and captions (`ImageDataset.summary`).
        cond_source: what the low-resolution images come from; None: the images scaled down.
        rows: images of each shard but the last.
        decoding: how pictures become pixels.
        masks: what each token counts in the loss is stored.
    """

    images: int
    crops: int
    view: dict[str, Any]
    ids: list[IdSet]
    texts: Texts
    source: str
    cond_source: str | None
    rows: int
    decoding: str = DECODING
    masks: bool = False

    @property
    def views(self) -> int:
        """Crops that are stored of each image."""
        return max(1, self.crops)

    @property
    def shards(self) -> int:
        return -(-self.images // self.rows)

    @property
    def digest(self) -> str:
        return digest_text(json.dumps(self.tree(), sort_keys=True))

    def tree(self) -> dict[str, Any]:
        """As a manifest says it; what older ones did not say is left out where it is as there."""
        older = {"decoding": "whole", "masks": False, "precision": "float32"}

        def said(entries: dict[str, Any]) -> dict[str, Any]:
            return {name: v for name, v in entries.items() if name not in older or v != older[name]}

        return said(asdict(self)) | {"texts": said(asdict(self.texts))}

    @classmethod
    def read(cls, tree: dict[str, Any]) -> Plan:
        """From what a manifest says; a type or value that is none of ours is a `ValueError`."""
        for name, low in {"images": 1, "crops": 0, "rows": 1}.items():
            whole(name, tree[name], low)
        ids = [IdSet(**entry) for entry in tree["ids"]]
        for entry in ids:
            for name in ("image_size", "tokens", "codes"):
                whole(name, getattr(entry, name), 1)
        texts = Texts(**tree["texts"])
        whole("width", texts.width, 1)
        cls.view_of(tree["view"])
        read: dict[str, Any] = {"decoding": "whole", **tree, "ids": ids, "texts": texts}
        return cls(**read)

    @staticmethod
    def view_of(tree: dict[str, Any]) -> View:
        low, high = tree["crop_scale"]
        pairs = [[whole("buckets", side, 1) for side in pair] for pair in tree.get("buckets", ())]
        buckets = tuple((height, width) for height, width in pairs)
        return View(**tree | {"crop_scale": (low, high), "buckets": buckets})

    @staticmethod
    def tree_of(view: View) -> dict[str, Any]:
        """A view as the manifest says it; without buckets as before there were any."""
        tree = json.loads(json.dumps(asdict(view)))
        return {name: value for name, value in tree.items() if name != "buckets" or value}

    def differences(self, other: Plan) -> str:
        """What is other than in another plan, with both values."""
        return "; ".join(
            f"{name} was {_in_words(was)} and is {_in_words(now)}"
            for (name, was), now in zip(vars(other).items(), vars(self).values(), strict=True)
            if was != now
        )


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return str(value) if isinstance(value, Texts) else shown(value, 200)


@dataclass(frozen=True)
class Manifest:
    """The ``manifest.json`` of a cache.

    Attributes:
        plan: what decides its content.
        summary: of the images that it was made of (`ImageDataset.summary`).
        sides: of the largest crops of some of them, as they were stored, in pixels.
        shards: of each its images, how many of these are broken, and its bytes; None: it is not
            finished.
    """

    plan: Plan
    summary: dict[str, Any]
    sides: list[int]
    shards: list[list[int]] | None = None

    def write(self, folder: Path) -> None:
        tree = {"format": FORMAT, "version": VERSION, **asdict(self), "plan": self.plan.tree()}
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            CacheError: there is none, or it is damaged or of a newer version.
        """
        path = folder / MANIFEST
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise CacheError(f"{path} is not of a token cache")
            if whole("version", tree["version"], 1) > VERSION:
                raise CacheError(
                    f"{path} has format version {tree['version']}, this package reads up to "
                    f"{VERSION}: upgrade muse-maskgit-pytorch"
                )
            plan = Plan.read(tree["plan"])
            shards = tree["shards"]
            if shards is not None:
                shards = [[whole("shards", n, 0) for n in entry] for entry in shards]
                if [count for count, _, _ in shards] != _counts(plan):
                    raise ValueError("its shards do not hold its images")
            names = ("source", "items", "fingerprint", "left_out")
            summary = {name: tree["summary"][name] for name in names}
            return cls(plan, summary, list(tree["sides"]), shards)
        except OSError as error:
            raise CacheError(
                f"{shown(str(folder), 400)} holds no token cache ({MANIFEST}: {error.strerror}): "
                "make one with muse cache"
            ) from error
        except CacheError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _counts(plan: Plan) -> list[int]:
    """Images of each shard."""
    firsts = range(0, plan.images, plan.rows)
    return [min(plan.rows, plan.images - first) for first in firsts]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


class TokenCache(Dataset[Batch]):
    """What `MaskGit.losses` needs of each image, read from a cache on disk.

    Indexing with a list of rows of one bucket (as a DataLoader does) gives a `Batch`; texts are
    padded to the longest of that batch. Of several crops and captions of an image, one each is
    drawn by the sample's place in the training order; where it has none, the first are taken. A
    broken image is answered with the next readable one of its size, as in `ImageDataset`; where
    none of a size is readable, that size is left out.

    Args:
        folder: of the cache.
        maskgit: the model that is to learn from it: it must have the tokenizers, the sizes and the
            text encoder that the cache was made with.
        seed: of what is drawn.

    Attributes:
        view: how the images were cropped, at the model's size.

    Raises:
        CacheError: missing, unfinished, damaged, of a newer version, or made for another model; a
            shard that is missing or cut off.
    """

    def __init__(self, folder: Any, maskgit: MaskGit, seed: int = 0):
        self.folder, self.seed = as_path(folder, "cache"), seed
        self.manifest = Manifest.read(self.folder)
        self.plan = plan = self.manifest.plan
        self._check_shards()
        self._names = [self._name_of(each) for each in IdSet.all_of(maskgit)]
        self._shares = self._names[0].replace("ids", "shares") if plan.masks else None
        texts = Texts.of(maskgit)
        if plan.texts != texts:
            raise CacheError(
                f"the cache {folder} was made with another text encoder, {plan.texts}, than this "
                f"model has, {texts}: make it anew with muse cache"
            )
        self.view = Plan.view_of(plan.view).scaled(maskgit.image_size)
        self._digest = plan.digest
        self._bucket = np.zeros(plan.images, np.uint16)  # of each image, its place in view.sizes
        if self.view.buckets:
            self._bucket = self._gathered("buckets")
            if self._bucket.max() >= len(self.view.sizes):
                raise CacheError(f"{self.folder} is damaged: it has images of no size of its own")
        grids = [[maskgit.geometry.grid(size) for size in self.view.sizes]]
        if maskgit.cond_image_size is not None:
            grids.append([maskgit.geometry.cond_grid(size) for size in self.view.sizes])
        self._grids = grids[0]
        self._tokens = [[math.prod(grid) for grid in each] for each in grids]
        self._keep(np.arange(plan.images))

    def _name_of(self, wanted: IdSet) -> str:
        """The array of the ids that a model needs."""
        for number, ids in enumerate(self.plan.ids):
            if ids == wanted:
                return f"ids{number}"
        held = " and ".join(map(str, self.plan.ids))
        raise CacheError(
            f"the cache {self.folder} has ids of {held}, but this model needs those of {wanted}: "
            "make it anew with muse cache"
        )

    def _check_shards(self) -> None:
        shards = self.manifest.shards
        if shards is None:
            there = sum(shard_path(self.folder, n).exists() for n in range(self.plan.shards))
            raise CacheError(
                f"the cache {self.folder} is not finished, {there} of {self.plan.shards} shards "
                "are there: call muse cache again as before, it goes on"
            )
        for number, (*_, size) in enumerate(shards):
            path = shard_path(self.folder, number)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
                raise CacheError(
                    f"{path} {problem}: call muse cache again as before, it makes what is missing"
                )

    # The set ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._wanted)

    def select(self, rows: Sequence[int] | np.ndarray) -> Self:
        """The same cache with only these rows, which stand in for one another if broken."""
        part = copy.copy(self)
        part._keep(self._wanted[np.asarray(rows, dtype=int)])
        return part

    def _keep(self, rows: np.ndarray) -> None:
        self._wanted = self._rows = rows
        if len(rows) and self._broken():
            readable, buckets = self._gathered("readable")[rows] > 0, self._bucket[rows]
            if not readable.any():
                raise CacheError(f"the cache {self.folder} has no readable image in a part of it")
            # of a size of which no image can be read there is nothing to train on
            keep = np.isin(buckets, buckets[readable])
            self._wanted, readable, buckets = rows[keep], readable[keep], buckets[keep]
            self._rows = self._wanted.copy()
            for bucket in np.unique(buckets):
                here = np.flatnonzero(buckets == bucket)
                good = here[readable[here]]
                after = np.searchsorted(good, here)
                self._rows[here] = self._wanted[good[after % len(good)]]

    @property
    def buckets(self) -> dict[Size, Sequence[int]]:
        """See `ImageDataset.buckets`."""
        return self.view.grouped(self._bucket[self._wanted])

    def _broken(self) -> int:
        return sum(count for _, count, _ in self.manifest.shards or ())

    def places(self, seed: int) -> np.ndarray:
        """Where each item stands in a split, see `ImageDataset.places`.

        Raises:
            ValueError: another seed than that of the places that are stored.
        """
        if seed != SPLIT_SEED:
            raise ValueError(f"a token cache knows the split of seed {SPLIT_SEED} alone")
        return self._gathered("places")[self._wanted]

    def summary(self) -> dict[str, Any]:
        """See `ImageDataset.summary`: of the images that the cache was made of."""
        summary = self.manifest.summary
        left_out = dict(summary["left_out"])
        if broken := self._broken():
            left_out[BROKEN] = left_out.get(BROKEN, 0) + broken
        return {**summary, "left_out": left_out}

    def sides(self) -> list[int]:
        """See `ImageDataset.sides`."""
        return self.manifest.sides

    def nbytes(self) -> int:
        """Of all shards."""
        return sum(size for *_, size in self.manifest.shards or ())

    def _gathered(self, name: str) -> np.ndarray:
        """One number of each image, of all shards."""
        return np.concatenate([self._shard(n).read(name) for n in range(self.plan.shards)])

    def _shard(self, number: int) -> Shard:
        assert self.manifest.shards is not None
        size = self.manifest.shards[number][2]
        return open_shard(shard_path(self.folder, number), self._digest, size)

    # Its items -------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        ids: list[list[np.ndarray]] = [[] for _ in self._names]
        texts: list[np.ndarray] = []
        shares: list[np.ndarray] = []
        for row in rows:
            shard, at = self._found(row)
            crop = 0
            if self.plan.crops and isinstance(row, Sample):
                crop = math.floor(draws(self.seed, row.position, 1)[0] * self.plan.crops)
            bucket = int(self._bucket[self._rows[row]])
            for name, tokens, each in zip(self._names, self._tokens, ids, strict=True):
                each.append(shard.read(name, at, at + 1)[0, crop, : tokens[bucket]])
            if self._shares is not None:
                tokens = self._tokens[0][bucket]
                shares.append(shard.read(self._shares, at, at + 1)[0, crop, :tokens])
            text = self._text(shard, at, row)
            start, stop = shard.read("text_starts", text, text + 2)
            texts.append(shard.read("texts", start, stop))
        lengths = np.array([len(text) for text in texts])
        embeds = np.zeros((len(texts), lengths.max(), self.plan.texts.width), dtype=np.float32)
        for padded, text in zip(embeds, texts, strict=True):
            padded[: len(text)] = text
        mask = np.arange(lengths.max()) < lengths[:, None]
        image, *low = [torch.from_numpy(np.stack(each).astype(np.int64)) for each in ids]
        return Batch(
            ids=image,
            cond_ids=low[0] if low else None,
            text_embeds=TextEmbeds(torch.from_numpy(embeds), torch.from_numpy(mask)),
            image_size=self.view.sizes[bucket],
            loss_mask=torch.from_numpy(np.stack(shares)).reshape(-1, 1, *self._grids[bucket])
            if shares
            else None,
        )

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The captions of items, as they come with these rows."""
        found = []
        for row in rows:
            shard, at = self._found(row)
            text = self._text(shard, at, row)
            start, stop = shard.read("caption_starts", text, text + 2)
            found.append(shard.read("captions", start, stop).tobytes().decode())
        return found

    def _found(self, row: int) -> tuple[Shard, int]:
        """The shard of an item, and its place there."""
        number, at = divmod(int(self._rows[row]), self.plan.rows)
        return self._shard(number), at

    def _text(self, shard: Shard, at: int, row: int) -> int:
        """Which of a shard's texts an item comes with."""
        first, after = (int(number) for number in shard.read("first_texts", at, at + 2))
        position = row.position if isinstance(row, Sample) else None
        return first + (drawn(after - first, self.seed, position) if after - first > 1 else 0)
