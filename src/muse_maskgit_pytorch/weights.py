"""Weights in files that may be anybody's: damaged, hostile, of another project.

Nothing in a file is executed, nothing is believed before it is checked, and a file never makes more
tensors than its own size explains. Whatever goes wrong is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from .arguments import printable

ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # of files that hold weights
# Tensors may take so many times the bytes of their file, since equal ones are stored once.
SHARED, FREE = 16, 64 * 2**20
# What files of torch.save begin with: an archive, before 1.6 a pickle of some protocol.
PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another kind or version, or of another geometry."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong within the block is a `CheckpointError` that names the file."""
    try:
        yield
    except Exception as error:  # what a damaged file makes of a parser or a model is endless
        said = printable(" ".join(str(error).split()), 400)
        if isinstance(error, CheckpointError) and str(path) in str(error):
            raise
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise CheckpointError(f"{path}: {said}") from error
        raise CheckpointError(
            f"{path} is damaged, or holds what cannot be used ({type(error).__name__}: {said})"
        ) from error


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: by its content, whatever its name."""
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint file: {path}")
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


@contextmanager
def safetensors_file(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose tensors are not read yet.

    Raises:
        CheckpointError: missing, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint file: {path}")
    with open(path, "rb") as begin:
        first = begin.read(9)
        if first.startswith(PICKLES) and first[8:] not in (b"", b"{"):
            raise CheckpointError(
                f"{path} is a pickle (of torch.save), and this must be safetensors: make the model "
                "with the arguments that its weights are of, read them with model.load(), which "
                'executes nothing, and write model.save("model.safetensors")'
            )
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safetensors.safe_open(path, "pt"))
        except Exception as error:
            said = printable(str(error), 200)
            raise CheckpointError(
                f"{path} is damaged or not a safetensors file ({said})"
            ) from error
        yield file


class _Inert:
    """What stands for any class that a pickle names: called or built, an empty dict."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def read_torch(path: Path, inert: bool = False) -> Any:
    """What `torch.save` wrote: its tensors and plain values; nothing in it is executed.

    Args:
        path: the file.
        inert: other objects become empty dicts; else they are refused.

    Raises:
        CheckpointError: damaged, or it holds objects that would have to be executed.
    """
    try:
        zipped, unsafe = False, []
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # what torch writes since 1.6
        if zipped:
            _check_zip(path)
        if zipped and inert:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
            if zipped and path.suffix != ".safetensors":  # torch goes by this ending
                # mapped, so that only what is used is read
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}): it is damaged, no "
            "checkpoint, or holds objects that would have to be executed, which is refused"
        ) from error


def _check_zip(path: Path) -> None:
    """Refuse an archive that holds more than its bytes: torch never compresses one."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not plain or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a compressed archive, which torch.save does not write: unpack it, and save "
            "the weights anew"
        )


class Allowance:
    """The bytes of tensors that a file explains.

    A stride of zero declares a tensor of any size, and a tensor that is stored once may be named a
    million times.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        self.left = FREE + SHARED * self.size

    def take(self, tensor: Tensor) -> Tensor:
        """Refuse what is no plain tensor, and the one with which it is too much.

        Raises:
            CheckpointError: naming the size.
        """
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"{self.path} holds a tensor that is no plain one of numbers")
        self.left -= tensor.numel() * tensor.element_size()
        if self.left < 0:
            raise CheckpointError(
                f"{self.path} declares more than {(FREE + SHARED * self.size) // 2**20} MB of "
                f"weights in a file of {self.size / 2**20:.1f} MB: it is damaged or hostile"
            )
        return tensor


def check_weights(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path, model: str, advice: str
) -> None:
    """Refuse weights that do not fit a model, or that are no finite numbers.

    Args:
        own: the model's.
        given: the file's.
        path: of the file.
        model: what they do not fit, for the message.
        advice: what to do then.

    Raises:
        CheckpointError: naming the first weight that does not fit.
    """
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    both = sorted(own.keys() & given.keys())
    other = [name for name in both if own[name].shape != given[name].shape]
    if other or missing or unknown:
        name = min(other or missing or unknown)
        facts = (
            f"{name} is {tuple(given[name].shape)} there and {tuple(own[name].shape)} here"
            if other
            else f"{printable(name, 200)} is {'missing there' if missing else 'unknown here'}"
        )
        raise CheckpointError(f"{path} does not fit {model}: {facts}; {advice}")
    for name in both:
        number = given[name]
        if number.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{path} does not fit {model}: {name} is {number.dtype} there and "
                f"{own[name].dtype} here, and one of the two is a whole number; {advice}"
            )
        if not is_finite(number):
            raise CheckpointError(
                f"{path}: {name} has values that are not finite: the file is damaged, or its "
                "training diverged"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are; of one that is divided, those of this process."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # of eight bits torch cannot say it
        tensor = tensor.float()
    # one pass without a second tensor: only a sum beyond the range needs the closer look
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class unfilled(TorchFunctionMode):
    """Within the block parameters get memory and no first values.

    For a model whose weights are all read from a file: drawing them takes longer than reading
    them, and torch's random numbers stay where they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


class _Shapes(unfilled):
    """Random numbers of a shape alone: torch would import its compiler to draw them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.rand, torch.randn):
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
            func = torch.empty
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def sketching(limit: int) -> Iterator[None]:
    """Within the block modules have shapes and no values, and are of limited number.

    So a model is made of the arguments in a file, and compared with the file's weights, before
    anything is allocated.

    Args:
        limit: number of parameters and buffers.

    Raises:
        CheckpointError: the arguments make more than that.
    """
    here, count = threading.get_ident(), 0

    def see(module: Any, name: str, value: Any) -> None:
        nonlocal count
        if value is None or threading.get_ident() != here:
            return
        count += 1
        if count > limit:
            raise CheckpointError("its arguments make a far larger model than its weights are of")

    hooks = [
        register(see)
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
        )
    ]
    try:
        with torch.device("meta"), _Shapes():
            yield
    finally:
        for hook in hooks:
            hook.remove()
