"""Files written whole or not at all, digests of tensors and files, and whether the hub is there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .arguments import as_path, shown


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; it takes the name ``path`` once the block is done.

    Whoever reads ``path`` sees the old file or the new one, never half of one: the new one is on
    the disk before it takes the name, and an error in the block leaves the old one.

    Args:
        path: where to; its folder is made. The temporary path has the same name and ending.

    Raises:
        OSError: naming ``path``, also where the one who writes, a full disk say, names no file.
    """
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, since some libraries write next to the path they are given.
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(exist_ok=True)
        temporary = folder / path.name
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and folder.name not in str(error.filename):
            raise  # about another file
        if error.errno is None:  # some libraries say it in words alone
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output(name: str, value: object, ending: str | None = None, folder: bool = False) -> Path:
    """A place for a result, checked before the work: nothing is written, and no folder made.

    Args:
        name: of the argument, for messages.
        value: the path; ``~`` is the home folder.
        ending: that a file must have, such as ".png", in capitals or not.
        folder: whether it is to be a folder of files, and not a file.

    Raises:
        ValueError: another ending, a folder in the place of a file or a file in that of a folder,
            a place that cannot be written.
    """
    path = as_path(value, name)
    if ending is not None and path.suffix.lower() != ending:
        raise ValueError(f"{name} {shown(str(path))} must end in {ending}")
    if not folder and path.is_dir():
        raise ValueError(f"{name} {shown(str(path))} is a folder: give the name of a file")
    place = path if folder else path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{name} {shown(str(path))}: {shown(str(place))} is no folder")
    try:
        with tempfile.TemporaryFile(dir=place):  # the only way to know
            pass
    except OSError as error:
        raise ValueError(
            f"{name} {shown(str(path))}: nothing can be written in {shown(str(place))} "
            f"({error.strerror})"
        ) from error
    return path


def cache_folder() -> Path:
    """Where this package keeps what it can make again; not made here."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "muse-maskgit-pytorch"


def digest_state(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """SHA-256 of names, types, shapes and values, whatever the order and the device.

    Args:
        state: names and tensors.
        prefix: text that the digest begins with, for what is not in the tensors.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def digest_pixels(images: Tensor) -> str:
    """A short name of the values of images or masks: 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(_raw(images)).hexdigest()[:16]


def digest_text(text: str) -> str:
    """A short name of a text: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(as_path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    # flattened first, since a scalar cannot be viewed as bytes
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def without_hub(name: str) -> bool:
    """Whether what the Hugging Face hub calls ``name`` can come from this machine alone.

    It is a path, or the hub is out of reach: asked here, since huggingface_hub tries on for 24
    seconds, for each file anew.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever client the library uses
        return True
    return False
