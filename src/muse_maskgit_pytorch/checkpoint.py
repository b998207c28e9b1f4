"""Files: safetensors for tensors, JSON in its header for everything else. Never a pickle.

`save_tree` / `load_tree` store any nesting of dicts, lists, numbers, strings and tensors in one
file, written to a temporary name and renamed, so that a reader sees the old file or the new one
whole. `Saveable` is the base class of every model: it remembers its constructor's arguments, so
that a saved model can be rebuilt without a config.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
from collections.abc import Callable, Hashable
from importlib import import_module, resources
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import digest_state, replacing

FORMAT = "muse_maskgit_pytorch"
VERSION = 1
SHIPPED = resources.files(FORMAT) / "pretrained"
_LOADINGS = itertools.count()
# Kinds that a saved model may hold although the model's own module does not import theirs.
ELSEWHERE = {"ForeignVQGAN": ".foreign"}


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another kind or version, or of another geometry."""


def save_tree(path: str | os.PathLike, tree: dict[str, Any], kind: str) -> Path:
    """Write ``tree`` to one safetensors file, atomically.

    Tensors with equal content are stored once (a cascade's two stages share a tokenizer).

    Args:
        path: where to; the folder is made.
        tree: nested dicts (string or integer keys), lists, tuples, numbers, strings, tensors.
        kind: what the file holds, checked when it is loaded.
    """
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}

    def skeleton(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensor = node.detach().cpu().contiguous()
            digest = digest_state({"": tensor})
            if digest not in digests:
                while name in tensors:  # {"a": {"b": ...}, "a.b": ...} make the same name
                    name += "_"
                digests[digest] = name
                # save_file refuses two tensors in one storage, so every one gets its own
                tensors[name] = tensor.clone()
            return {"tensor": digests[digest]}
        if isinstance(node, dict):
            return {"dict": [[k, skeleton(v, f"{name}.{k}".strip("."))] for k, v in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [skeleton(v, f"{name}.{i}".strip(".")) for i, v in enumerate(node)]}
        return {"value": node}

    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": kind,
        "tree": json.dumps(skeleton(tree, "")),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # save_file makes it readable for the owner alone
    return Path(path)


@torch.inference_mode(False)
def load_tree(path: str | os.PathLike, kind: str | None = None) -> tuple[dict[str, Any], str]:
    """Read a file of `save_tree`; return the tree (tensors on the CPU) and its kind.

    The tensors are ordinary ones even inside `torch.inference_mode`: they can be trained.

    Raises:
        CheckpointError: missing, damaged, not ours, of a newer version, or not of ``kind``.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint file: {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a safetensors file, but not one of this package")
            if int(header["version"]) > VERSION:
                raise CheckpointError(
                    f"{path} has format version {header['version']}, this package reads up to "
                    f"{VERSION}: upgrade muse-maskgit-pytorch"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error})") from error
    if kind is not None and header["kind"] != kind:
        raise CheckpointError(f"{path} holds a {header['kind']}, not a {kind}")

    given: set[str] = set()

    def rebuild(node: dict[str, Any]) -> Any:
        if "tensor" in node:
            name = node["tensor"]
            # stored once, but not one tensor: what changes in place must not change elsewhere
            tensor = tensors[name].clone() if name in given else tensors[name]
            given.add(name)
            return tensor
        if "dict" in node:
            return {key: rebuild(value) for key, value in node["dict"]}
        if "list" in node:
            return [rebuild(value) for value in node["list"]]
        return node["value"]

    return rebuild(json.loads(header["tree"])), header["kind"]


class Saveable(nn.Module):
    """A module that remembers its constructor's arguments and can be saved and rebuilt.

    Files of earlier releases are brought up to date by `_upgraded` (the arguments), `_retired`
    (arguments that no longer exist) and `_upgrade` (the weights).
    """

    _init_args: dict[str, Any]
    _retired: ClassVar[dict[str, Any]] = {}  # argument -> the value that may be left out
    _loaded: int  # which loading or move of weights was the last, of all in this process

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        init: Callable[..., None] = cls.__init__
        signature = inspect.signature(init)

        @functools.wraps(init)
        def remembering_init(self, *args, **kwargs):
            if "_init_args" not in self.__dict__:  # the outermost class of the hierarchy wins
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()  # a later version's defaults must not change this model
                given = {k: v for k, v in bound.arguments.items() if k != "self"}
                object.__setattr__(self, "_init_args", given)
                object.__setattr__(self, "_loaded", next(_LOADINGS))
            init(self, *args, **kwargs)

        type.__setattr__(cls, "__init__", remembering_init)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments this module was made with; modules among them as kind and config."""
        return {
            name: {"kind": type(value).__name__, "config": value.config}
            if isinstance(value, Saveable)
            else value
            for name, value in self._init_args.items()
        }

    @classmethod
    def _upgraded(cls, config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments that an earlier release's file means.

        Args:
            config: as saved, with those of the parts inside.
            state: the weights that belong to them.
        """
        return config

    def _upgrade(self, state: dict[str, Tensor], prefix: str) -> None:
        """Add or rename, in place, the weights of this module in an earlier release's file.

        Args:
            state: the whole file's.
            prefix: what this module's names begin with in it.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._loaded = next(_LOADINGS)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._loaded = next(_LOADINGS)  # torch calls this for every module inside, too
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Write configuration and weights to one ``.safetensors`` file, atomically.

        Args:
            path: must end in ``.safetensors``.
            dtype: store floating-point weights in this type (``torch.float16`` halves the file).
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"save: path {str(path)!r} must end in .safetensors")
        state = {
            name: value.to(dtype) if dtype and value.is_floating_point() else value
            for name, value in self.state_dict().items()
        }
        tree = {"config": self.config, "state": state}
        return save_tree(path, tree, kind=type(self).__name__)

    @torch.inference_mode(False)
    def load(self, path: str | os.PathLike) -> Self:
        """Load weights into this module, from ``save``'s file or a ``.pt`` state dict.

        Raises:
            CheckpointError: another kind of model, or weights of another shape.
        """
        if _is_torch_file(path):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(
                    f"{path} cannot be read as a plain state dict ({type(error).__name__}); files "
                    "that hold other Python objects are refused"
                ) from error
            if isinstance(state, dict):
                state = state.get("model", state)
            if not (isinstance(state, dict) and all(map(torch.is_tensor, state.values()))):
                raise CheckpointError(f"{path} holds no state dict (names and tensors)")
        else:
            state = load_tree(path, kind=type(self).__name__)[0]["state"]
        self._load_state(state, path)
        return self

    def _load_state(self, state: dict[str, Tensor], path: Any) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Saveable):
                module._upgrade(state, f"{name}." if name else "")
        own = self.state_dict()
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
        other = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if missing or unknown or other:
            name = sorted(other or missing or unknown)[0]
            facts = (
                f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} here"
                if other
                else f"{name} is {'missing there' if missing else 'unknown here'}"
            )
            raise CheckpointError(
                f"{path} does not fit this {type(self).__name__}: {facts}; make the model with the "
                f"arguments it was saved with, or use {type(self).__name__}.from_pretrained"
            )
        self.load_state_dict(state)

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(cls, name: str | os.PathLike) -> Self:
        """Rebuild a saved model, in eval mode, on the CPU.

        Args:
            name: a file of ``save``; the name of a model shipped with the package; or a
                repository on the Hugging Face hub (``owner/name``) with a ``model.safetensors``.
        """
        path = find_file(name)
        tree, _ = load_tree(path, kind=cls.__name__)
        model = _build(cls, cls._upgraded(tree["config"], tree["state"]))
        model._load_state(tree["state"], path)
        return model.eval()


def _build(cls: type[Saveable], config: dict[str, Any]) -> Any:
    def value(argument: Any) -> Any:
        if isinstance(argument, dict) and argument.keys() == {"kind", "config"}:
            if argument["kind"] in ELSEWHERE:
                import_module(ELSEWHERE[argument["kind"]], FORMAT)
            known = _classes()
            if argument["kind"] not in known:
                raise CheckpointError(
                    f"the saved {cls.__name__} has a part of an unknown kind, {argument['kind']}"
                )
            return _build(known[argument["kind"]], argument["config"])
        return argument

    for name, dropped in cls._retired.items():
        if name in config and config[name] != dropped:
            raise CheckpointError(
                f"the saved {cls.__name__} has {name} {config[name]!r}, which this release no "
                f"longer supports (only {dropped!r}): use the release that saved it"
            )
    kept = {name: argument for name, argument in config.items() if name not in cls._retired}
    try:
        return cls(**{name: value(argument) for name, argument in kept.items()})
    except TypeError as error:
        raise CheckpointError(f"the saved {cls.__name__} has other arguments: {error}") from error


def weights_key(weights: nn.Module | dict[str, Tensor]) -> Hashable:
    """What changes whenever weights do: compared instead of the values, which takes far longer.

    Torch counts the changes of a tensor in place, but not those through ``tensor.data``, and what
    ``half().float()`` makes may stand where the old weights stood, as may those of another model
    that is made after one was deleted: every `Saveable` therefore has the number of its last
    loading or move. Tensors made in `torch.inference_mode` count nothing: their changes in place
    are not seen.

    Args:
        weights: a module, or some of its state.
    """
    loads: tuple[int, ...] = ()
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if isinstance(weights, nn.Module):
        loads = tuple(m._loaded for m in weights.modules() if isinstance(m, Saveable))
    return loads, tuple(
        (name, t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device)
        for name, t in state.items()
    )


def _classes(base: type = Saveable) -> dict[str, type]:
    found = {cls.__name__: cls for cls in base.__subclasses__()}
    for cls in base.__subclasses__():
        found |= _classes(cls)
    return found


def _is_torch_file(path: str | os.PathLike) -> bool:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint file: {path}")
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"  # torch.save writes a zip archive


def find_file(name: str | os.PathLike) -> Path:
    """Find a saved model by path, by the name of a shipped one, or on the Hugging Face hub."""
    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(SHIPPED)) / f"{name}.safetensors"
    if shipped.is_file():
        return shipped
    text = str(name)
    if text.count("/") == 1 and not text.startswith((".", "/")) and not text.endswith("tensors"):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(text, "model.safetensors"))
        except Exception as error:
            raise CheckpointError(
                f"{text} could not be had from the Hugging Face hub ({type(error).__name__}): "
                "check the name and the network, or give the path of a local copy"
            ) from error
    known = sorted(p.stem for p in Path(str(SHIPPED)).glob("*.safetensors"))
    raise CheckpointError(
        f"unknown model {text!r}: not a file, and the shipped models are {known}; "
        "a hub repository is written owner/name"
    )
