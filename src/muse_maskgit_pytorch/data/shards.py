"""Arrays in safetensors files, of which single rows are read where they lie.

A shard is never read whole, nor mapped: rows come by positional reads. So a process holds no more
of it than the batch at hand, its peak memory says what it needs, processes share what the system
keeps of the file, and one that is cut off while it is in use is an error, where a mapped one would
end the process (SIGBUS).
"""

from __future__ import annotations

import functools
import json
import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..files import replacing
from ..strings import shown

MAX_HEADER = 2**20  # bytes; ours has a few hundred
OPEN = 256  # shards that a process keeps open
TYPES = {
    "U8": "u1",
    "U16": "<u2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


class CacheError(ValueError):
    """A token cache that is missing, damaged, unfinished, or made for something else."""


def write_shard(path: Path, arrays: Mapping[str, np.ndarray], plan: str) -> None:
    """Write arrays to a file, whole or not at all.

    Args:
        path: where to.
        arrays: by name.
        plan: digest of what decides the content of the cache that this is a part of.

    Raises:
        CacheError: the disk is full, or the folder gone.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save(dict(arrays), {"plan": plan}))
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror or error}): make room and run the same "
            "again, it goes on after the shards that are finished"
        ) from error


class Shard:
    """An open file of `write_shard`.

    Args:
        path: of the file.
        plan: as it was written with.

    Attributes:
        size: bytes that the file has.

    Raises:
        CacheError: missing, cut off, damaged, or of another plan.
    """

    def __init__(self, path: Path, plan: str):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CacheError(f"{path} cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > MAX_HEADER:
            raise CacheError(f"{path} is damaged: it is no safetensors file")
        self._start = 8 + length
        try:
            header = json.loads(self._bytes(8, length))
            found = header.pop("__metadata__", {}).get("plan")
            self._arrays = {name: _described(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged: its header cannot be read") from error
        if found != plan:
            raise CacheError(f"{path} is a part of another cache than its manifest.json describes")
        end = max((begin + size for *_, begin, size in self._arrays.values()), default=0)
        if self.size != self._start + end:
            raise CacheError(
                f"{path} is cut off or damaged: it has {self.size:,} bytes and should have "
                f"{self._start + end:,}"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array, a copy of one's own.

        Args:
            name: of the array.
            start: the first row.
            stop: the row after the last; None: to the end.

        Raises:
            CacheError: no such array or rows, or the file has been cut off.
        """
        kind, (rows, *shape), begin, _ = self._arrays.get(name, (np.dtype("u1"), (0,), 0, 0))
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise CacheError(f"{self.path} is damaged: it has no rows {start} to {stop} of {name}")
        row = kind.itemsize * math.prod(shape)
        raw = self._bytes(self._start + begin + start * row, (stop - start) * row)
        return np.frombuffer(raw, kind).reshape(stop - start, *shape)

    def _bytes(self, start: int, count: int) -> bytearray:
        found = bytearray()
        while len(found) < count:  # one read gives at most 2 GB
            missing = count - len(found)
            if hasattr(os, "pread"):
                more = os.pread(self._file, missing, start + len(found))
            else:  # Windows, where no other process shares the place in an open file
                os.lseek(self._file, start + len(found), os.SEEK_SET)
                more = os.read(self._file, missing)
            if not more:
                raise CacheError(f"{self.path} is cut off: it ends at byte {self.size:,}")
            found += more
        return found


@functools.lru_cache(maxsize=OPEN)
def open_shard(path: Path, plan: str, size: int) -> Shard:
    """A shard of so many bytes, which stays open for a while.

    Raises:
        CacheError: as `Shard`, or of another size.
    """
    shard = Shard(path, plan)
    if shard.size != size:
        raise CacheError(f"{path} has {shard.size:,} bytes, and {size:,} when it was written")
    return shard


def _described(entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape, first byte and bytes of an array, from its entry in the header."""
    kind, shape = np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not shape or math.prod(shape) * kind.itemsize != end - begin or not 0 <= begin <= end:
        raise ValueError(f"{shown(entry)} describes no array")
    return kind, shape, begin, end - begin
