"""Where data may lie, by one text: files that the datasets library reads, or a folder of images."""

from __future__ import annotations

import difflib
import glob
import importlib
import math
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from ..arguments import as_path, is_function, shown

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
OWN = re.compile(r"(.+)\.py:([A-Za-z_]\w*)")
HUB = re.compile(r"[\w.-]+/[\w.-]+")
READERS = {".parquet": "parquet", ".tar": "webdataset"}


def library() -> Any:
    """The datasets library.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "these data need the datasets library: pip install 'muse-maskgit-pytorch[data]'"
        ) from error
    return datasets


def open_named(what: str, streaming: bool = False) -> Any:
    """Open data by their name.

    Args:
        what: a Parquet file or WebDataset tar, several of them as a glob (``shards/*.tar``), with
            braces (``{000..031}.tar``) or as their folder; a folder of `datasets.save_to_disk`; a
            folder of images; a data set on the hub, ``owner/name``, of which the split "train" is
            read; or ``FILE.py:NAME``, an object of one's own in a Python file, or a function
            without arguments that makes it: the file is run.
        streaming: read as the training goes on, instead of preparing all first.

    Returns:
        the object, a `datasets.Dataset` or `IterableDataset`, or the path of a plain folder.

    Raises:
        ValueError: there is nothing of that name, or a file is damaged.
        ImportError: it takes the datasets library, which is not installed.
    """
    if OWN.fullmatch(str(what)):
        if streaming:
            raise ValueError(f"streaming is not for {what}, an object of your own: leave it out")
        return own_object("data", str(what))
    path = as_path(what, "data")
    if path.is_dir() and _is_saved(path):
        return _from_disk(path, streaming)
    if names := files_of(what):
        if lost := [name for name in names if not Path(name).is_file()]:
            raise ValueError(f"data {shown(what, 400)}: there is no file {shown(lost[0], 400)}")
        return _from_files(names, streaming)
    if path.exists() or not HUB.fullmatch(str(what)):
        return path  # `Folder` says what is wrong with it
    datasets = library()
    try:
        return datasets.load_dataset(str(what), split="train", streaming=streaming)
    except Exception as error:  # of the network, the hub or the files
        raise ValueError(
            f"data {shown(what, 400)} is no file or folder, and cannot be had from the hub: "
            f"{_line(error)}"
        ) from error


def own_object(option: str, what: str) -> Any:
    """What a Python file of one's own calls so; its folder is on the path from here on.

    Processes that load data find it by its name too.

    Args:
        option: that names it, for messages.
        what: ``FILE.py:NAME``; a function or class without arguments is called. The file is run.

    Raises:
        ValueError: there is no such file, or nothing of that name in it.
    """
    own = OWN.fullmatch(what)
    if own is None:
        raise ValueError(f"{option} must be FILE.py:NAME, not {shown(what, 400)}")
    file, name = Path(f"{own[1]}.py"), own[2]
    if not file.is_file():
        raise ValueError(f"{option}: there is no file {shown(str(file), 400)}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module(file.stem)
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise ValueError(
            f"{option}: {file.name} has the name of another module, {module.__name__}: rename it"
        )
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{option}: {shown(str(file), 400)} has nothing called {name}{hint}")
    found = getattr(module, name)
    return found() if isinstance(found, type) or is_function(found) else found


def files_of(what: str) -> list[str]:
    """The Parquet files or tars that a name stands for; none where it is something else."""
    path = as_path(what, "data")
    if path.is_dir():
        found = sorted(path.iterdir()) if not _is_saved(path) else []
        found = [file for file in found if file.suffix.lower() in READERS]
        return [str(file) for file in found if file.name != "metadata.parquet"]
    if path.suffix.lower() not in READERS:
        return []
    return [file for name in _expanded(str(path)) for file in sorted(glob.glob(name)) or [name]]


def _is_saved(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _from_disk(path: Path, streaming: bool) -> Any:
    try:
        data = library().load_from_disk(str(path))
        data = data["train"] if isinstance(data, dict) else data
    except KeyError:
        raise ValueError(f"data {shown(str(path), 400)} has no split 'train'") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {shown(str(path), 400)}: {_line(error)}") from error
    return data.to_iterable_dataset(num_shards=min(64, len(data))) if streaming else data


def _from_files(names: list[str], streaming: bool) -> Any:
    kinds = {Path(name).suffix.lower() for name in names}
    if len(kinds) > 1:
        raise ValueError(f"data hold files of several kinds, {sorted(kinds)}: name one, as *.tar")
    kind = READERS[kinds.pop()]
    datasets = library()
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming)
    except Exception as error:
        raise ValueError(damage(names) or f"cannot read {few_of(names)}: {_line(error)}") from error


def damage(names: list[str], seconds: float = math.inf) -> str:
    """Which of some files cannot be read to the end, and why; empty if none is found in time."""
    began = time.monotonic()
    for name in names:
        if time.monotonic() - began > seconds:
            break
        try:
            if name.endswith(".parquet"):
                import pyarrow.parquet

                with pyarrow.parquet.ParquetFile(name) as file:
                    for _ in file.iter_batches(64):
                        pass
            else:
                with tarfile.open(name) as tar:
                    for member in tar:
                        file = tar.extractfile(member)
                        if file is not None and len(file.read()) < member.size:
                            raise tarfile.ReadError("it is cut off")
        except Exception as error:
            return f"cannot read {shown(name, 400)}: {_line(error)}"
    return ""


def few_of(names: list[str]) -> str:
    return shown(names[0], 400) + (f" and {len(names) - 1} others" if len(names) > 1 else "")


def _expanded(name: str) -> list[str]:
    """The names that braces stand for: {a,b} and {000..012}."""
    found = BRACES.search(name)
    if found is None:
        return [name]
    if span := RANGE.fullmatch(found[1]):
        first, last = span.groups()
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        parts = found[1].split(",")
    before, after = name[: found.start()], name[found.end() :]
    return [rest for part in parts for rest in _expanded(f"{before}{part}{after}")]


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
