"""Writing a token cache: each process encodes its share of the shards, and goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..arguments import shown, whole
from ..files import check_output
from ..images import resize
from ..maskgit import MaskGit
from ..vqgan_vae import ImageTokenizer
from .cache import MANIFEST, SPLIT_SEED, IdSet, Manifest, Plan, Texts, shard_path
from .dataset import ImageDataset
from .pixels import View
from .shards import CacheError, Shard, write_shard
from .source import encoded, has_cond, has_masks, place
from .workers import leave_signals_to_the_run, starting_processes

BATCH = 64  # images encoded at a time; the images of a shard are a multiple of it
SHARD_BYTES = 2**28  # of a shard whose texts have `TYPICAL` tokens an image
TYPICAL = 64
SHARDS = 64  # that a small set is divided into, so that many processes have a share each

Part = dict[str, Any]  # what a batch becomes: lists and arrays by name


def write_cache(
    folder: Any,
    models: Sequence[MaskGit] | MaskGit,
    dataset: ImageDataset,
    *,
    crops: int = 0,
    batch_size: int = BATCH,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] | None = print,
    renew: bool = False,
    rows: int | None = None,
) -> bool:
    """Encode a data set into a folder of shards, from which `TokenCache` reads.

    Every process of ``world`` encodes its own shards. Those that are there already stay, and the
    process that finds them all there finishes the manifest; so none has to wait for the others.

    Args:
        folder: new, empty, or begun by the same call.
        models: stages that are to learn from it. Equal tokenizers at equal sizes are encoded once.
        dataset: all images at the models' (larger) size, with captions; for super-resolution with
            low-resolution images (``cond_size``), which are else made from the crops.
        crops: random crops to keep of each image, as the dataset's view draws them; 0: the centre.
        batch_size: images encoded at a time.
        num_workers: processes that read images.
        rank: this process.
        world: number of processes.
        say: is told what it takes and took; None also hides the progress.
        renew: write over a cache of something else.
        rows: images of each shard. If None, so many that it takes about 256 MB at most.

    Returns:
        whether the cache is finished: False while other processes are at work.

    Raises:
        CacheError: the folder holds something else, or the cache of something else; the disk is
            full; no image can be read.
        ValueError: models that differ in what reads the captions, or have more than two sizes;
            crops that the view does not draw.
    """
    path = check_output("out", folder, folder=True)
    batch_size = whole("batch_size", batch_size, 1)
    encoder = _Encoder([models] if isinstance(models, MaskGit) else list(models), dataset, crops)
    summary = dataset.summary()
    plan = encoder.plan(rows, summary["fingerprint"])
    manifest = Manifest(plan, summary, dataset.sides())
    _begin(path, manifest, renew)
    missing = [n for n in range(rank, plan.shards, world) if _shard(path, n, plan) is None]
    ends = {n: min((n + 1) * plan.rows, plan.images) for n in missing}
    batches = [
        (n, range(first, min(first + batch_size, ends[n])))
        for n in missing
        for first in range(n * plan.rows, ends[n], batch_size)
    ]
    loader = DataLoader(
        _Views(dataset, crops),
        batch_sampler=(list(batch) for _, batch in batches),
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_run,
        collate_fn=list,
    )
    images, began = sum(len(batch) for _, batch in batches), time.monotonic()
    quiet = say is None or not images
    with starting_processes():
        items = iter(loader)
    with tqdm(total=images, desc="encoding", unit="image", disable=quiet) as progress:
        for number, group in groupby(zip(batches, items, strict=True), lambda pair: pair[0][0]):
            parts: list[Part] = []
            for (_, batch), examples in group:
                parts.append(encoder.encode(batch, examples))
                progress.update(len(batch))
                if say is not None and batch is batches[0][1]:
                    size = sum(array.nbytes for array in _joined(parts).values())
                    total = size / len(batch) * plan.images
                    say(f"token cache: {plan.images:,} images take about {total / 1e6:.2g} MB")
            write_shard(shard_path(path, number), _joined(parts), plan.digest)
    if say is not None and images:
        seconds = time.monotonic() - began
        say(f"encoded {images:,} images in {seconds:.0f} s, {images / seconds:.3g} a second")
    return _finish(path, manifest)


def _begin(folder: Path, manifest: Manifest, renew: bool) -> None:
    """See to it that the folder is that of this cache: the manifest comes before all shards."""
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    entries = [name for name in entries if not name.startswith(".")]
    if MANIFEST in entries and not renew:
        found = Manifest.read(folder).plan
        if found != manifest.plan:
            raise CacheError(
                f"{shown(str(folder), 400)} holds another cache: {manifest.plan.differences(found)}"
                "; choose another folder, or delete this one"
            )
        return
    if entries and not renew:
        raise CacheError(
            f"{shown(str(folder), 400)} holds something else, {shown(sorted(entries)[0])} say: "
            "choose a new or an empty folder"
        )
    if not (renew and MANIFEST in entries and _same(folder, manifest.plan)):
        manifest.write(folder)


def _same(folder: Path, plan: Plan) -> bool:
    try:
        return Manifest.read(folder).plan == plan
    except CacheError:
        return False


def _finish(folder: Path, manifest: Manifest) -> bool:
    """Write the table of all shards, if they are there."""
    table = []
    for number in range(manifest.plan.shards):
        shard = _shard(folder, number, manifest.plan)
        if shard is None:
            return False
        readable = shard.read("readable")
        table.append([len(readable), int(len(readable) - readable.sum()), shard.size])
    if all(broken == images for images, broken, _ in table):
        raise CacheError(f"{manifest.summary['source']} holds no image that can be read")
    Manifest(manifest.plan, manifest.summary, manifest.sides, table).write(folder)
    return True


def _shard(folder: Path, number: int, plan: Plan) -> Shard | None:
    """A shard that is finished."""
    try:
        return Shard(shard_path(folder, number), plan.digest)
    except CacheError:
        return None


class _Views(Dataset[Any]):
    """The items of a dataset, each in all of its crops; None for a broken one."""

    def __init__(self, dataset: ImageDataset, crops: int):
        self.dataset, self.crops = dataset, crops

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        crops = range(index * self.crops, (index + 1) * self.crops)
        return self.dataset.views(index, crops or [None])


class _Encoder:
    """Tokenizers and text encoder of the models."""

    def __init__(self, models: Sequence[MaskGit], dataset: ImageDataset, crops: int):
        if not models:
            raise ValueError("models is empty: name at least one stage")
        self.dataset, self.crops = dataset, whole("crops", crops, 0)
        self.model, self.texts = models[0], Texts.of(models[0])
        for other in map(Texts.of, models):
            if other != self.texts:
                raise ValueError(
                    f"the models read captions differently, by {self.texts} and by {other}: make "
                    "a cache for each"
                )
        self.masks = dataset.masks and has_masks(dataset.source)
        found: dict[IdSet, ImageTokenizer] = {}
        for model in models:
            tokenizers = filter(None, [model.vae, model.cond_vae])
            found |= zip(IdSet.all_of(model), tokenizers, strict=True)
        # whatever the order of the models
        self.tokenizers = dict(sorted(found.items(), key=lambda entry: str(entry[0])))
        sizes = sorted({ids.image_size for ids in self.tokenizers}, reverse=True)
        if len(sizes) > 2 or sizes[0] != dataset.view.size:
            raise ValueError(
                f"the models take images of {' and '.join(map(str, sizes))} px, and the data are "
                f"of {dataset.view.size} px: a cache holds one size and one low resolution"
            )
        self.low = sizes[1] if len(sizes) > 1 else None
        if dataset.cond_size not in ((None,) if crops else (None, self.low)):
            raise ValueError(
                f"low-resolution images of {dataset.cond_size} px do not fit: the models' are of "
                f"{self.low} px, and with crops they are made from these"
            )
        if crops and self.low is not None and has_cond(dataset.source):
            raise ValueError(
                f"{dataset.source} has low-resolution images of its own (cond_image), which do not "
                "fit random crops: leave them out, and the crops are scaled down"
            )
        if crops and not dataset.view.is_random:
            raise ValueError(f"crops={crops}, but the view shows the centre alone: crop='random'")

    def plan(self, rows: int | None, source: str) -> Plan:
        """What is about to be written.

        Args:
            rows: images of each shard.
            source: fingerprint of the data.
        """
        images, view = len(self.dataset), self.dataset.view
        view = view if self.crops else View(view.size, buckets=view.buckets)
        cond = getattr(self.dataset.source, "cond", None) if self.low else None
        row = sum(4 * max(1, self.crops) * ids.tokens for ids in self.tokenizers)
        row *= 2 if self.masks else 1
        row += 2 * TYPICAL * self.texts.width
        rows = rows or max(1, min(SHARD_BYTES // row, images // SHARDS) // BATCH) * BATCH
        return Plan(
            images=images,
            crops=self.crops,
            view=Plan.tree_of(view),  # as it will be read
            ids=list(self.tokenizers),
            texts=self.texts,
            source=source,
            cond_source=None if cond is None else str(cond),
            rows=rows,
            masks=self.masks,
        )

    @torch.no_grad()
    def encode(self, rows: Sequence[int], items: Sequence[dict[str, Any] | None]) -> Part:
        """What becomes of some items; of a broken one no text.

        Raises:
            ValueError: an item has a mask, where none was to be expected.
        """
        pairs = zip(rows, items, strict=True)
        given = [self._blank(row) if item is None else item for row, item in pairs]
        texts = [item.get("text", "") for item in given]
        texts = [[text] if isinstance(text, str) else list(text) for text in texts]
        keys = [self.dataset.keys[row] for row in rows]
        masked = [key for key, item in zip(keys, given, strict=True) if "loss_mask" in item]
        if masked and not self.masks:
            raise ValueError(
                f"item {masked[0]!r} of {self.dataset.source} has a loss_mask and the first item "
                "none: give the source an attribute masks, the keys of those that have one, or set "
                "cache_tokens=False"
            )
        return {
            "ids": [self._ids(ids, rows, given) for ids in self.tokenizers],
            "shares": [self._counted(ids, rows, given) for ids in self.tokenizers if self.masks],
            "texts": self._embeds([text for each in texts for text in each], len(rows)),
            "counts": [len(each) for each in texts],
            "captions": [encoded(text) for each in texts for text in each],
            "keys": [encoded(key) for key in keys],
            "places": [place(key, SPLIT_SEED) for key in keys],
            "readable": [item is not None for item in items],
            "buckets": self.dataset.bucket[list(rows)],
        }

    def _blank(self, row: int) -> dict[str, Any]:
        """What stands for a broken item."""
        height, width = self.dataset.size(row)
        blank = {"image": torch.zeros(max(1, self.crops), 3, height, width), "text": []}
        if (low := self.dataset.cond_size) is not None:
            size = self.dataset.view.scaled(low).sizes[self.dataset.bucket[row]]
            blank["cond_image"] = torch.zeros(3, *size)
        return blank

    def _ids(self, ids: IdSet, rows: Sequence[int], items: Sequence[dict[str, Any]]) -> np.ndarray:
        """(B, K, N), one crop of all images of a size at a time; shorter ones end with zeros."""
        vae, low = self.tokenizers[ids], ids.image_size == self.low
        sizes = self.dataset.view.scaled(ids.image_size).sizes
        most = max(height * width for height, width in sizes) // vae.factor**2
        kind = np.uint16 if ids.codes <= 2**16 else np.int32
        found = np.zeros((len(items), max(1, self.crops), most), kind)
        buckets = self.dataset.bucket[list(rows)]
        for bucket in np.unique(buckets):
            at = np.flatnonzero(buckets == bucket).tolist()
            for crop in range(max(1, self.crops)):
                if low and "cond_image" in items[0]:
                    images = torch.stack([items[i]["cond_image"] for i in at])
                else:
                    images = torch.stack([items[i]["image"][crop] for i in at])
                    images = resize(images, sizes[bucket]) if low else images
                encoded = vae.encode_to_ids(images.to(vae.device)).flatten(1).cpu().numpy()
                found[at, crop, : encoded.shape[1]] = encoded
        return found

    def _counted(
        self, ids: IdSet, rows: Sequence[int], items: Sequence[dict[str, Any]]
    ) -> np.ndarray:
        """What the tokens count in the loss, in the order of `_ids`: all of 1 without a mask."""
        factor = self.tokenizers[ids].factor
        sizes = self.dataset.view.scaled(ids.image_size).sizes
        most = max(height * width for height, width in sizes) // factor**2
        found = np.ones((len(items), max(1, self.crops), most), np.float32)
        for counted, row, item in zip(found, rows, items, strict=True):
            if "loss_mask" in item:
                height, width = sizes[self.dataset.bucket[row]]
                grid = height // factor, width // factor
                shares = F.adaptive_avg_pool2d(item["loss_mask"], grid).flatten(1)
                counted[:, : shares.shape[1]] = shares.numpy()
        return found

    def _embeds(self, texts: Sequence[str], batch: int) -> list[np.ndarray]:
        """The states of captions, so many at a time, in half precision and without padding."""
        found: list[np.ndarray] = []
        for first in range(0, len(texts), batch):
            text = self.model.embed_texts(texts[first : first + batch], long="cut")
            rows = zip(text.embeds.half().cpu(), text.mask.cpu(), strict=True)
            found += [embeds[mask].numpy() for embeds, mask in rows]
        return found


def _joined(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """The arrays of a shard; ragged ones as all their rows, and where each begins."""
    lists = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    texts, arrays = lists["texts"], {}
    for name in ("ids", "shares"):
        several = zip(*(part[name] for part in parts), strict=True)
        arrays |= {f"{name}{number}": np.concatenate(each) for number, each in enumerate(several)}
    return arrays | {
        "texts": np.concatenate(texts) if texts else np.zeros((0, 1), np.float16),
        "text_starts": _starts(texts),
        "first_texts": np.cumsum([0, *lists["counts"]]),
        "captions": np.frombuffer(b"".join(lists["captions"]), np.uint8),
        "caption_starts": _starts(lists["captions"]),
        "keys": np.frombuffer(b"".join(lists["keys"]), np.uint8),
        "key_starts": _starts(lists["keys"]),
        "places": np.array(lists["places"]),
        "readable": np.array(lists["readable"], np.uint8),
        "buckets": np.array(lists["buckets"], np.uint16),
    }


def _starts(rows: Sequence[Any]) -> np.ndarray:
    return np.cumsum([0, *map(len, rows)])
