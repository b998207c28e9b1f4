"""Data without an end or a length: rows as they come, shuffled in blocks, with a position.

A place in a stream is the number of samples that one loading process has given. A mark says where
the block of such a place begins, so that a resumed run reads that block again, and no more.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..arguments import printable, whole
from .dataset import ImageDataset
from .opening import damage, files_of
from .order import Sample
from .pixels import View
from .rows import Columns, Filter, labels_of, name_of, undecoded
from .source import Item, Source, place
from .wording import Wording
from .workers import leave_signals_to_the_run, starting_processes

LOOKING = 30  # seconds for the file at fault, while the steps that are done wait to be saved
PICTURES = 8  # that are kept to be looked at, where nothing is held back

Mark = dict[str, Any]  # where a block begins: samples, epoch, rows, block, and the source's own


class StreamError(ValueError):
    """A stream that cannot be read on, or has nothing for one of the processes."""


class RowStream:
    """An iterable of rows that begins anew whenever it is asked to.

    Args:
        data: yields dicts. A `datasets.IterableDataset` is one; what has ``state_dict`` and
            ``load_state_dict`` finds its place by them, anything else by reading up to it.
        image_column: as of `Rows`; so are the others.
        text_column: of the caption's.
        captions: whether items have captions.
        classes: names of classes.
        keep: which rows to use.
        named: the name that it was opened by (`open_named`).

    Raises:
        ValueError: it can be read only once, yields nothing, or lacks a column.
    """

    def __init__(
        self,
        data: Any,
        image_column: str | None = None,
        text_column: str | None = None,
        captions: bool = False,
        classes: Sequence[str] = (),
        keep: Filter | None = None,
        named: str | None = None,
    ):
        name, self.named = name_of(data), named
        if isinstance(data, Iterator):
            raise ValueError(
                f"{name} can be read only once: give an object whose __iter__ begins anew"
            )
        self.data, self.keep = undecoded(data), keep or Filter()
        labels = labels_of(data, text_column) or classes
        with _reading(name, named):
            first = next(iter(self.data), None)
        if first is None:
            raise ValueError(f"{name} yields nothing")
        self.columns = Columns.of(first, name, image_column, text_column, captions, labels)
        self.embeds = captions and self.columns.text is None

    def __str__(self) -> str:
        return self.columns.name

    def wanted(self, row: Mapping[str, Any]) -> bool:
        """Whether the filter keeps a row."""
        if not self.keep:
            return True
        size = self.columns.size(row) if self.keep.min_size else None
        return self.keep.objection(row, size) is None

    def first(self, count: int) -> Source:
        """The first rows that are wanted, in memory; fewer where there are no more."""
        return _Block(self, list(islice(filter(self.wanted, self.data), count)))

    def key(self, row: Mapping[str, Any]) -> str:
        """A name for a row that it has wherever it comes: a digest of its picture."""
        value = row.get(self.columns.image)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().numpy().tobytes()
        elif isinstance(value, Image.Image):
            value = value.tobytes()
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return hashlib.sha256(raw).hexdigest()


class _Reader:
    """One process's share of the rows, pass after pass, with a state.

    Args:
        rows: all of them.
        wanted: whether to train on a row.
        rank: this process of ``world``.
        world: how many train together.
        worker: this loading process of ``workers``.
        workers: how many load for each of them.
    """

    def __init__(
        self,
        rows: RowStream,
        wanted: Callable[[Mapping[str, Any]], bool],
        rank: int,
        world: int,
        worker: int,
        workers: int,
    ):
        self.rows, self.wanted, self.data = rows, wanted, rows.data
        self.epoch = self.seen = 0
        self.index, self.count = rank * workers + worker, world * workers
        self.who = f"process {rank} of {world}, loading process {worker} of {workers}"
        if is_of_datasets(rows.data):  # it divides itself among loading processes
            self.index, self.count = 0, 1
            if world > 1:
                from datasets.distributed import split_dataset_by_node

                self.data = split_dataset_by_node(rows.data, rank, world)
        self._fresh = self.data

    def state(self) -> dict[str, Any]:
        started = self.seen and has_state(self.data)
        inner = copy.deepcopy(self.data.state_dict()) if started else None
        return {"epoch": self.epoch, "seen": self.seen, "inner": inner}

    def blocks(self, size: int, state: dict[str, Any] | None) -> Iterator[tuple[dict, list[Any]]]:
        """Blocks of rows without end, none of two passes, each with the state before it."""
        if state is not None:
            self.epoch = state["epoch"]
        while True:
            self._begin()
            skip = 0
            if state is not None and state["inner"] is not None:
                self.data.load_state_dict(state["inner"])
                self.seen = state["seen"]
            elif state is not None:
                skip = state["seen"]
            fresh, found = state is None or state["seen"] == 0, False
            state = None
            with _reading(str(self.rows), self.rows.named):
                rows = self._pass(skip)
                while True:
                    before = self.state()
                    block = list(islice(rows, size))
                    if not block:
                        break
                    found = True
                    yield before, block
            if fresh and not found:
                raise StreamError(
                    f"{self.rows} has no rows to train on for {self.who}: use fewer processes and "
                    "num_workers, or a filter that keeps more"
                )
            self.epoch += 1

    def _pass(self, skip: int) -> Iterator[Any]:
        for row in self.data:
            self.seen += 1
            if self.seen <= skip or (self.seen - 1) % self.count != self.index:
                continue
            if self.wanted(row):
                yield row

    def _begin(self) -> None:
        """Go to the first row of a pass."""
        self.seen = 0
        if is_of_datasets(self._fresh):
            # an old place would stay with it, and copies and processes share the epoch's number,
            # which decides the order of its files
            self.data = copy.deepcopy(self._fresh)
            self.data.set_epoch(self.epoch)


class Stream(IterableDataset):
    """A `RowStream` as training samples without end.

    Rows are read in blocks, and a block comes in an order drawn from the seed and its number.
    Rows of the validation share, by a digest of the picture, are left out. With ``num_workers``
    and several processes each has rows of its own, and begins anew when it has given them all.

    Args:
        rows: where they come from.
        view: as of `ImageDataset`; so are the next three.
        captions: every item must have a text.
        cond_size: side of the low-resolution images.
        wording: what becomes of captions.
        masks: give the masks of the loss.
        block: rows that are shuffled together; each loading process holds so many, encoded.
        seed: of the order.
    """

    def __init__(
        self,
        rows: RowStream,
        view: View,
        captions: bool = False,
        cond_size: int | None = None,
        wording: Wording | None = None,
        masks: bool = False,
        block: int = 1000,
        seed: int = 0,
    ):
        self.rows, self.view, self.captions, self.cond_size = rows, view, captions, cond_size
        self.wording, self.masks, self.seed = wording, masks, seed
        self.block = whole("shuffle_buffer", block, 1)
        self.share = 0.0
        self.layout = {"batch_size": 1, "rank": 0, "world": 1, "workers": 0}
        self.batches = 0
        self.marks: dict[int, Mark] = {}  # by loading process: of all that has been trained on
        self._workers: int | None = None  # of the run that is resumed
        self._seen: dict[int, Mark] = {}  # of what the step in progress has taken

    # What is held back -----------------------------------------------------------------------

    def held(self, fraction: float, limit: int) -> Held:
        """The first rows of the validation share; without one, a few pictures to look at.

        Args:
            fraction: the share; it is not trained on from now on.
            limit: how many rows to take.
        """
        self.share = fraction
        found = self._first(lambda row: self._is_held(row), limit) if fraction else []
        rows = found or self._first(lambda row: True, PICTURES)
        if not rows:
            raise ValueError(f"nothing of {self.rows} is left to train on: its filter keeps no row")
        view = View(self.view.size, seed=self.view.seed)
        source = _Block(self.rows, rows)
        settings = self.captions, self.cond_size
        return Held(source, view, *settings, masks=self.masks, held=len(found))

    def _first(self, wanted: Callable[[Any], bool], limit: int) -> list[Any]:
        with _reading(str(self.rows), self.rows.named):
            kept = (row for row in self.rows.data if self.rows.wanted(row) and wanted(row))
            return list(islice(kept, limit))

    def _is_held(self, row: Mapping[str, Any]) -> bool:
        return bool(self.share) and place(self.rows.key(row), 0) < self.share

    # Loading ---------------------------------------------------------------------------------

    def batches_from(
        self,
        samples: int,
        collate: Callable[[list[Any]], Any],
        *,
        batch_size: int,
        rank: int,
        world: int,
        workers: int,
        pin_memory: bool = False,
    ) -> Iterator[Any]:
        """Batches from a place on.

        Args:
            samples: that all processes together have had; the marks must be of no later place.
            collate: makes a batch of items.
            batch_size: of each process.
            rank: this process.
            world: number of processes.
            workers: loading processes of each.
            pin_memory: as of `DataLoader`.
        """
        shards = getattr(self.rows.data, "num_shards", None)
        if is_of_datasets(self.rows.data) and isinstance(shards, int):  # each needs a file
            workers = min(workers, max(1, shards // world))
        before = self._workers
        if self.marks and before is not None and max(1, before) != max(1, workers):
            raise ValueError(
                f"this stream was read by {before} loading processes, and now by {workers}: set "
                f"num_workers to {before} to go on where it was"
            )
        self.layout = dict(batch_size=batch_size, rank=rank, world=world, workers=workers)
        self.batches = samples // (batch_size * world)
        self._seen = {}

        def joined(items: list[Any]) -> Any:
            if failed := [item for item in items if isinstance(item, ValueError)]:
                return failed[0]
            return None if items[0] is None else (items[-1][0], collate([i for _, i in items]))

        loader = DataLoader(
            self,
            batch_size=batch_size,
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_run,
            collate_fn=joined,
            pin_memory=pin_memory,
        )
        with starting_processes():
            found = iter(loader)
        return self._marking(found)

    def _marking(self, found: Iterator[Any]) -> Iterator[Any]:
        for each in found:
            if isinstance(each, ValueError):
                raise each
            if each is not None:
                mark, batch = each
                self._seen[mark["worker"]] = mark
                yield batch

    def settle(self) -> None:
        """What has been taken since the last time has been trained on."""
        self.marks |= self._seen

    def state(self) -> str:
        """The marks of this process, as a checkpoint keeps them."""
        return json.dumps({"layout": self.layout, "marks": list(self.marks.values())})

    def load(self, state: str, layout: Mapping[str, int]) -> None:
        """Take the marks of a checkpoint.

        Raises:
            ValueError: they are of another number of processes, or of another batch size.
        """
        saved = json.loads(state)
        names = {"batch_size": "batch_size", "world": "processes"}
        for name, words in names.items():
            if saved["layout"][name] != layout[name]:
                raise ValueError(
                    f"{words} was {saved['layout'][name]} and is {layout[name]}: a stream goes on "
                    "only with as many processes and the batch_size that it was begun with"
                )
        self.marks = {mark["worker"]: mark for mark in saved["marks"]}
        self._workers = saved["layout"]["workers"]

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is None:
            yield from self._samples(0, 1)
            return
        try:
            yield from self._samples(info.id, info.num_workers)
        except ValueError as error:  # raised here, it would come with this process's traceback
            yield from [error] * self.layout["batch_size"]

    def _samples(self, worker: int, workers: int) -> Iterator[Any]:
        size, rank, world = (self.layout[name] for name in ("batch_size", "rank", "world"))
        # batches come from the loading processes in turn, and the next may not be the first one's
        if worker < self.batches % workers:
            yield from [None] * size
        done = (self.batches - worker + workers - 1) // workers * size
        mark: Mark | None = self.marks.get(worker)
        if mark is None or mark["samples"] > done:
            mark = Mark(samples=0, block=0, state=None)
        samples, number = int(mark["samples"]), int(mark["block"])
        reader = _Reader(
            self.rows,
            lambda row: self.rows.wanted(row) and not self._is_held(row),
            rank, world, worker, workers,
        )  # fmt: skip
        for state, rows in reader.blocks(self.block, mark["state"]):
            here = {"worker": worker, "samples": samples, "block": number, "state": state}
            if done < samples + len(rows):
                data = ImageDataset(
                    _Block(self.rows, rows), self.view, self.captions, self.cond_size,
                    wording=self.wording, masks=self.masks,
                )  # fmt: skip
                generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + number)
                order = torch.randperm(len(rows), generator=generator, device="cpu").tolist()
                for at in range(max(0, done - samples), len(rows)):
                    position = ((samples + at) * workers + worker) * world + rank
                    yield here, data[Sample(order[at], position)]
            samples, number = samples + len(rows), number + 1


class Held(ImageDataset):
    """The few items of a stream that are in memory, for validation and pictures.

    Attributes:
        held: how many are held back from training: all or none.
    """

    def __init__(self, *arguments: Any, masks: bool, held: int):
        super().__init__(*arguments, masks=masks)
        self.held = held

    def summary(self) -> dict[str, Any]:
        """As of `ImageDataset`, with no number of items; the fingerprint is of these few."""
        return super().summary() | {"items": None}


class _Block:
    """Rows in memory as a `Source`."""

    def __init__(self, rows: RowStream, given: list[Any]):
        self.columns, self.given = rows.columns, given
        self._key = rows.key

    @property
    def keys(self) -> list[str]:
        return [f"{number} {self._key(row)[:16]}" for number, row in enumerate(self.given)]

    def __len__(self) -> int:
        return len(self.given)

    def __str__(self) -> str:
        return self.columns.name

    def item(self, index: int) -> Item:
        return self.columns.item(self.given[index], str(index))


@contextmanager
def _reading(name: str, named: str | None) -> Iterator[None]:
    """Whatever a stream raises while it is read is a `StreamError` that names it, or its file."""
    try:
        yield
    except Exception as error:
        if type(error) in (ValueError, StreamError):  # of our own; Arrow's are ValueErrors too
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        files = files_of(named) if named and not isinstance(error, FileNotFoundError) else []
        raise StreamError(
            damage(files, LOOKING) or f"{printable(name)} cannot be read on: {said}"
        ) from error


def is_of_datasets(data: Any) -> bool:
    """Whether this is a stream of the datasets library."""
    return type(data).__module__.partition(".")[0] == "datasets"


def has_state(data: Any) -> bool:
    return hasattr(data, "state_dict") and hasattr(data, "load_state_dict")
