"""Files: safetensors for tensors, JSON in its header for everything else. Never a pickle.

`save_tree` / `load_tree` store any nesting of dicts, lists, numbers, strings and tensors in one
file, written to a temporary name and renamed, so that a reader sees the old file or the new one
whole. `Saveable` is the base class of every model: it remembers its constructor's arguments, so
that a saved model can be rebuilt without a config.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from importlib import import_module, resources
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .arguments import as_path, fitting, printable, shown, with_names, without_functions
from .files import check_output, digest_state, replacing
from .hub import (
    at_revision,
    card,
    check_repository,
    hub_file,
    is_repository,
    not_on_hub,
    signed_in,
    upload,
)
from .licenses import license_of
from .weights import (
    ENDINGS,
    Allowance,
    CheckpointError,
    check_weights,
    is_finite,
    is_safetensors,
    read_torch,
    reading,
    safetensors_file,
    sketching,
    unfilled,
)

FORMAT = "muse_maskgit_pytorch"
VERSION = 1
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # of a model's folder
SHIPPED = resources.files(FORMAT) / "pretrained"
FORMER = {"emoji": "scenes"}  # shipped models that were, and those in their place
_LOADINGS = itertools.count()
_NOTED: list[Path] = []  # the first file that was saved under another ending
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a file's weights
# Kinds that a saved model may hold although the model's own module does not import theirs.
ELSEWHERE = dict.fromkeys(("ForeignVQGAN", "AmusedTransformer", "MeissonicTransformer"), ".foreign")


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
        _in_order(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # save_file makes it readable for the owner alone
    return Path(path)


def _in_order(path: Path) -> None:
    """Sort the texts of a file's header, which safetensors leaves in random order.

    So the same model is the same file, bit for bit.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # spaces may follow it
            file.seek(8)
            file.write(text.ljust(size))


@torch.inference_mode(False)
def load_tree(path: str | os.PathLike, kind: str | None = None) -> tuple[dict[str, Any], str]:
    """Read a file of `save_tree`; return the tree (tensors on the CPU) and its kind.

    The tensors are ordinary ones even inside `torch.inference_mode`: they can be trained.

    Raises:
        CheckpointError: missing, damaged, not ours, of a newer version, or not of ``kind``.
    """
    path = as_path(path)
    with reading(path), safetensors_file(path) as file:
        found = _kind(path, file)
        if kind is not None and found != kind:
            raise CheckpointError(f"{path} holds a {found}, not a {kind}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tree = _rebuilt(path, json.loads(file.metadata()["tree"]), tensors)
        if not isinstance(tree, dict):
            raise CheckpointError(f"{path} is damaged: it holds no names")
        return tree, found


def kind_of(path: str | os.PathLike) -> str:
    """What a file of `save_tree` holds, by its header alone.

    Raises:
        CheckpointError: missing, damaged, not ours, or of a newer version.
    """
    path = as_path(path)
    with reading(path), safetensors_file(path) as file:
        return _kind(path, file)


def stated_by(path: str | os.PathLike) -> dict[str, Any]:
    """What the header of a model's file says of it: format, version, kind and config.

    Raises:
        CheckpointError: as `kind_of`, or the file holds no model.
    """
    path = as_path(path)
    with reading(path), safetensors_file(path) as file:
        kind, header = _kind(path, file), file.metadata()
        config = dict(json.loads(header["tree"])["dict"]).get("config")
        if config is None:
            raise CheckpointError(f"{path} holds a {kind}, and no model")
        version = int(header["version"])
        return dict(format=FORMAT, version=version, kind=kind, config=_rebuilt(path, config, {}))


def _kind(path: Path, file: Any) -> str:
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not one of this package")
    version = header.get("version", "")
    if not (version.isascii() and version.isdigit() and len(version) < 9 and int(version) > 0):
        raise CheckpointError(f"{path} is damaged: its format version is {shown(version)}")
    if int(version) > VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this package reads up to {VERSION}: upgrade "
            "muse-maskgit-pytorch"
        )
    if "kind" not in header or "tree" not in header:
        raise CheckpointError(f"{path} is damaged: its header lacks what the file holds")
    return printable(header["kind"], 60)


def _rebuilt(path: Path, skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of a skeleton, every node of which is checked."""
    given: set[str] = set()
    allowance = Allowance(path)

    def rebuild(node: Any) -> Any:
        match node:
            case {"tensor": str(name)} if name in tensors:
                tensor = allowance.take(tensors[name])
                if name in given:
                    # stored once, but not one: what changes in place must not change elsewhere
                    return tensor.clone()
                given.add(name)
                return tensor
            case {"dict": list(pairs)}:
                made = {_key(key): rebuild(value) for key, value in pairs}
                if len(made) == len(pairs):
                    return made
            case {"list": list(nodes)}:
                return [rebuild(value) for value in nodes]
            case {"value": None | bool() | int() | float() | str() as value}:
                return value
        raise CheckpointError(f"{path} is damaged: {shown(node)} stands in its tree")

    return rebuild(skeleton)


def _key(key: Any) -> str | int:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise ValueError(f"{shown(key)} is no name")
    return key


class Saveable(nn.Module):
    """A module that remembers its constructor's arguments and can be saved and rebuilt.

    The arguments are checked and converted by the constructor's annotations (`arguments.fitting`),
    so that a number of any library is a number, here and in a file. Modules among them may be
    wrapped (by torch.compile, say): a file has the names and arguments of what is inside.

    Files of earlier releases are brought up to date by `_upgraded` (the arguments), `_retired`
    (arguments that no longer exist) and `_upgrade` (the weights).
    """

    _init_args: dict[str, Any]
    _retired: ClassVar[dict[str, Any]] = {}  # argument -> the value that may be left out
    _stated_always: ClassVar[tuple[str, ...]] = ()  # looked up elsewhere where a file lacks them
    _loaded: int  # which loading or move of weights was the last, of all in this process

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        init: Callable[..., None] = cls.__init__
        if init is nn.Module.__init__:  # of a class without one of its own; it takes anything
            init = _no_arguments
        signature = inspect.signature(init)
        own, *parameters = signature.parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise TypeError(
                    f"{cls.__name__}({parameter}): a model file states arguments by name, so give "
                    "each a name"
                )

        @functools.wraps(init)
        def remembering_init(self, *args, **kwargs):
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}: {error}") from None
            bound.apply_defaults()  # a later version's defaults must not change this model
            given = {k: v for k, v in bound.arguments.items() if k != own.name}
            for parameter in parameters:
                if parameter.kind is parameter.VAR_KEYWORD:
                    given |= given.pop(parameter.name)
            hints = _hints(init)
            for name, value in given.items():
                check_undivided(value, name)
                inner = unwrapped(value)
                fitted = fitting(name, inner, hints.get(name, Any))
                given[name] = value if fitted is inner else fitted
            if "_init_args" not in self.__dict__:  # the outermost class of the hierarchy wins
                object.__setattr__(self, "_init_args", dict(given))
                object.__setattr__(self, "_loaded", next(_LOADINGS))
            init(self, **given)

        type.__setattr__(cls, "__init__", remembering_init)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments this module was made with; modules among them as kind and config."""
        return {name: self._stated(name, value) for name, value in self._init_args.items()}

    def _stated(self, name: str, value: Any) -> Any:
        part = unwrapped(value)
        if not isinstance(part, Saveable):
            return with_names(value)
        # another one may stand in its place now
        now = unwrapped(self._modules.get(name))
        part = now if isinstance(now, Saveable) else part
        return {"kind": type(part).__name__, "config": part.config}

    @classmethod
    def _upgraded(cls, config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments that an earlier release's file means.

        Args:
            config: as saved; the parts inside are up to date.
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

    # Of its weights, by the hub's name for it, such as "mit"; None: not stated. Files hold it.
    license: str | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def task(self) -> str | None:
        """What the model is for, in the hub's words, where it has some."""
        return None

    def check_saveable(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Refuse, before any work, a model that could not be rebuilt from its file.

        Args:
            state: its weights by plain name, where they are divided among processes and have been
                put together.

        Raises:
            ValueError: an argument that a file cannot hold; weights that the arguments do not make
                (of an adapter, say), or that lie on several processes.
        """
        kind, config = type(self).__name__, self.config
        state = plain_state(self) if state is None else state
        for name, value in config.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{name} of this {kind} is {shown(value)}, which a model file cannot hold: "
                    "give it as numbers, strings or lists of them"
                ) from error
        for name, value in state.items():
            if hasattr(value, "full_tensor"):
                raise ValueError(
                    f"{name} of this {kind} is divided among processes: save the model that it was "
                    "made from, or give as state= the weights that torch.distributed.checkpoint."
                    "state_dict.get_model_state_dict gathers (full_state_dict=True)"
                )
        sketch = _sketch(type(self), config, 2 * len(state) + 100)
        if sketch is None:
            return
        made = sketch.state_dict()
        wrong = made.keys() ^ state.keys()
        wrong |= {
            name for name in made.keys() & state.keys() if made[name].shape != state[name].shape
        }
        if wrong:
            raise ValueError(
                f"{min(wrong)} of this {kind} is not as its arguments make it, so its file could "
                "not be read: take out what was put into the model (merge an adapter), then save it"
            )

    def save(
        self,
        path: str | os.PathLike,
        dtype: torch.dtype | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write configuration and weights to one safetensors file, atomically.

        Args:
            path: of any name; ``.safetensors`` is the usual ending.
            dtype: store floating-point weights in this type (``torch.float16`` halves the file).
            state: as in `check_saveable`.

        Raises:
            ValueError: a type that would destroy the weights, or a model that could not be rebuilt
                (`check_saveable`).
        """
        path = as_path(path)
        if dtype not in (None, *FLOATS):
            raise ValueError(f"save: dtype must be one of {FLOATS}, not {shown(dtype)}")
        self.check_saveable(state)
        state = plain_state(self) if state is None else dict(state)
        for name, value in state.items():
            if not is_finite(value):
                raise ValueError(f"save: {name} has values that are not finite")
            if dtype and value.is_floating_point():
                state[name] = value.to(dtype)
                if not is_finite(state[name]):
                    raise ValueError(
                        f"save: {name} has values up to {float(value.abs().max()):.3g}, beyond "
                        f"the range of {dtype}: store it in torch.bfloat16"
                    )
        if path.suffix != ".safetensors" and not _NOTED:
            _NOTED.append(path)
            warnings.warn(
                f"{path.name} is a safetensors file, whatever its name: load goes by the content, "
                "other programs by the ending .safetensors",
                stacklevel=2,
            )
        homes = {
            type(part).__name__: type(part).__module__
            for part in self.modules()
            if isinstance(part, Saveable) and not type(part).__module__.startswith(f"{FORMAT}.")
        }
        tree = {"config": self.config, "state": state} | ({"homes": homes} if homes else {})
        if licenses := {
            name: part.license
            for name, part in self.named_modules()
            if isinstance(part, Saveable) and part.license
        }:
            tree["licenses"] = licenses
        return save_tree(path, tree, kind=type(self).__name__)

    def save_pretrained(
        self, save_directory: str | os.PathLike, dtype: torch.dtype | None = None
    ) -> Path:
        """Write a folder as the Hugging Face hub has it, which `from_pretrained` reads.

        It gets ``model.safetensors``, the same file as of `save`; ``config.json``, what its header
        says, for people; and a short model card, ``README.md``, where there is none yet
        (`card.write_card` writes a longer one). Other files in it stay.

        Args:
            save_directory: the folder; it is made.
            dtype: as in `save`.

        Returns:
            the folder.

        Raises:
            ValueError: as in `save`.
        """
        folder = check_output("save_directory", save_directory, folder=True)
        return self._write_folder(folder, folder.name, dtype)

    def _write_folder(self, folder: Path, name: str, dtype: torch.dtype | None) -> Path:
        """The same, with the name that its card is to have."""
        stated = stated_by(self.save(folder / MODEL, dtype))
        with replacing(folder / CONFIG) as temporary:
            temporary.write_text(f"{json.dumps(stated, indent=2)}\n", encoding="utf-8")
        if not (folder / CARD).exists():
            with replacing(folder / CARD) as temporary:
                temporary.write_text(self.model_card(name, self.license), encoding="utf-8")
        return folder

    def push_to_hub(self, repo_id: str, *, dtype: torch.dtype | None = None, **commit: Any) -> str:
        """Put the folder of `save_pretrained` on the Hugging Face hub.

        Args:
            repo_id: repository, ``owner/name``; it is made if need be.
            dtype: as in `save`.
            **commit: ``commit_message``, ``private``, ``token``, ``branch`` and ``create_pr``, as
                in `hub.upload`.

        Returns:
            the address of the commit.

        Raises:
            ValueError: as in `save`, or no name of a repository.
            OSError: the hub cannot be reached, or refuses.
        """
        check_repository(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            return upload(self._write_folder(Path(folder), repo_id, dtype), repo_id, **commit)

    def model_card(self, name: str, license: str | None = None, body: str = "") -> str:
        """A card for the hub: title, how to load the model, and what follows (`hub.card`).

        Args:
            name: of the repository, or of the folder.
            license: of the weights, by the hub's name for it, such as "mit".
            body: the rest of the card, in Markdown.
        """
        kind, module = type(self).__name__, type(self).__module__
        ours = module.startswith(f"{FORMAT}.")
        home = f"{FORMAT}{ELSEWHERE.get(kind, '')}" if ours else module
        return card(name, kind, home, self.task, license, body)

    @torch.inference_mode(False)
    def load(self, path: str | os.PathLike) -> Self:
        """Load weights into this module, from ``save``'s file or a ``.pt`` state dict.

        The content decides which of the two a file is, not its name.

        Raises:
            CheckpointError: another kind of model, weights of another shape, or none.
        """
        path = as_path(path)
        if is_safetensors(path):
            state = load_tree(path, kind=type(self).__name__)[0].get("state")
        else:
            state = read_torch(path)
            if isinstance(state, dict):
                state = state.get("model", state)
        self._load_state(state_of(state, path), path)
        return self

    def _load_state(self, state: dict[str, Tensor], path: Any) -> None:
        self._upgrade_all(state)
        names = plain_names(self)
        kind = type(self).__name__
        check_weights(
            plain_state(self),
            state,
            path,
            f"this {kind}",
            f"make the model with the arguments it was saved with, or use {kind}.from_pretrained",
        )
        self.load_state_dict({name: state[plain] for name, plain in names.items()})

    def _upgrade_all(self, state: dict[str, Tensor]) -> None:
        plain = _plainly(self)
        for name, module in self.named_modules():
            if isinstance(module, Saveable):
                module._upgrade(state, plain(f"{name}." if name else ""))

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Rebuild a saved model, in eval mode, on the CPU.

        Args:
            name: a file of `save`; a folder of `save_pretrained`; a repository on the Hugging Face
                hub (``owner/name``) with such a folder's files; or the name of a model shipped
                with the package.
            revision: branch, tag or commit of the repository, ``main`` by default; also
                ``owner/name@revision``, wherever a model is named.
            token: of the hub, for a repository that is not public; None: the one of ``hf auth
                login``, or ``HF_TOKEN``.

        Raises:
            CheckpointError: not found, damaged, or of another kind.
            ValueError: a revision of what is no repository.
        """
        with signed_in(token):
            path = find_file(at_revision(name, revision))
        with reading(path):
            tree, _ = load_tree(path, kind=cls.__name__)
            made = rebuild(cls, tree, path).eval()
            take_licenses(made, tree)
            made.license = made.license or license_of(path)
            return made


@torch.inference_mode(False)
def rebuild_any(path: Path) -> Saveable:
    """The model of any kind that a file holds, in eval mode.

    Raises:
        CheckpointError: damaged, or of a kind that is not imported.
    """
    with reading(path):
        tree, kind = load_tree(path)
        if kind in ELSEWHERE:
            import_module(ELSEWHERE[kind], FORMAT)
        if (known := _classes().get(kind)) is None:
            raise CheckpointError(
                f"{path} holds a {kind}, which is not known here: "
                f"{how_to_know(kind, tree.get('homes'))}"
            )
        made = rebuild(known, tree, path).eval()
        take_licenses(made, tree)
        made.license = made.license or license_of(path)
        return made


def take_licenses(model: Saveable, tree: dict[str, Any], prefix: str = "") -> None:
    """Give a model and its parts the licenses that a file's tree states.

    Args:
        model: what was made of the tree.
        tree: it may state anything; what is not understood is left out.
        prefix: of the names, where the model is a part of the file's, such as "base.vae.".
    """
    parts = {f"{prefix}{n}".rstrip("."): part for n, part in model.named_modules()}
    stated = tree.get("licenses")
    for name, license in stated.items() if isinstance(stated, dict) else ():
        if isinstance(part := parts.get(name), Saveable) and isinstance(license, str):
            part.license = printable(license, 80)


def _no_arguments(self: nn.Module) -> None:
    nn.Module.__init__(self)


def rebuild(cls: type[Saveable], tree: dict[str, Any], path: Path) -> Any:
    """The model that a file's tree describes, with its weights.

    It is made without values first and compared with the weights, so that a file cannot ask for
    more than it holds.

    Args:
        cls: its class.
        tree: "config", "state" and perhaps "homes", the modules of classes that are not ours.
        path: of the file, for messages.

    Raises:
        CheckpointError: arguments and weights that fit neither this release nor each other.
    """
    config, state = tree.get("config"), state_of(tree.get("state"), path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it states no arguments")
    config = _brought_up_to_date(cls, config, state)
    homes = tree.get("homes")
    sketch = _sketch(cls, config, 2 * len(state) + 100, homes)
    if sketch is not None:
        sketch._upgrade_all(state)
        check_weights(
            sketch.state_dict(),
            state,
            path,
            f"the {cls.__name__} of its arguments",
            "the file is incomplete, or of another release",
        )
    # a class that reads numbers while it is made needs first values
    with nullcontext() if sketch is None else unfilled():
        model = _build(cls, config, homes)
    model._load_state(state, path)
    return model


def _brought_up_to_date(cls: type[Saveable], config: Any, state: dict[str, Tensor]) -> Any:
    """Arguments as this release means them, with those of the parts inside."""
    if not isinstance(config, dict):
        return config
    config = dict(config)
    for name, part in config.items():
        if isinstance(part, dict) and part.keys() == {"kind", "config"}:
            kind = _classes().get(str(part["kind"]))
            inside = {n[len(name) + 1 :]: t for n, t in state.items() if n.startswith(f"{name}.")}
            if kind is not None:
                config[name] = {
                    **part, "config": _brought_up_to_date(kind, part["config"], inside)
                }  # fmt: skip
    return cls._upgraded(config, state)


def state_of(node: Any, path: Path) -> dict[str, Tensor]:
    """Weights by name, as a file should hold them."""
    if not (isinstance(node, dict) and all(map(torch.is_tensor, node.values()))):
        raise CheckpointError(f"{path} holds no state dict (names and tensors)")
    if not all(isinstance(name, str) for name in node):
        raise CheckpointError(f"{path} holds weights without names")
    allowance = Allowance(path)
    return {name: allowance.take(value) for name, value in node.items()}


def _sketch(cls: type[Saveable], config: Any, limit: int, homes: Any = None) -> Saveable | None:
    """The model of these arguments without values; None if its class cannot be made so."""
    try:
        with sketching(limit):
            return _build(cls, config, homes)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):  # a class of one's own may read numbers while it is made
            raise
        return None


def _build(cls: type[Saveable], config: dict[str, Any], homes: Any = None) -> Any:
    def value(argument: Any) -> Any:
        if isinstance(argument, dict) and argument.keys() == {"kind", "config"}:
            kind = argument["kind"]
            if kind in ELSEWHERE:
                import_module(ELSEWHERE[kind], FORMAT)
            known = _classes()
            if kind not in known:
                raise CheckpointError(
                    f"the saved {cls.__name__} has a part of the unknown kind {shown(kind)}: "
                    f"{how_to_know(kind, homes)}"
                )
            return _build(known[kind], argument["config"], homes)
        return without_functions(argument)

    for name, dropped in cls._retired.items():
        if name in config and config[name] != dropped:
            raise CheckpointError(
                f"the saved {cls.__name__} has {name} {config[name]!r}, which this release no "
                f"longer supports (only {dropped!r}): use the release that saved it"
            )
    for name in cls._stated_always:
        if config.get(name) is None:
            raise CheckpointError(f"the saved {cls.__name__} does not state its {name}")
    kept = {name: argument for name, argument in config.items() if name not in cls._retired}
    try:
        return cls(**{name: value(argument) for name, argument in kept.items()})
    except TypeError as error:
        raise CheckpointError(f"the saved {cls.__name__} has other arguments: {error}") from error


def how_to_know(kind: Any, homes: Any) -> str:
    """What to do about a class that is not imported here.

    Args:
        kind: its name.
        homes: what the file says of where classes are, which may be anything.
    """
    home = homes.get(kind) if isinstance(homes, dict) else None
    module = f"its module, {printable(str(home), 100)}," if home else "its module"
    return f"import {module} before you load it"


# Wrappers ----------------------------------------------------------------------------------------

# Under which name what torch wraps round a module (torch.compile, FSDP, activation checkpointing)
# holds it.
HELD = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Classes of what spreads a module over devices or processes.
SPREADING = {
    "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"
}  # fmt: skip


def _held(module: Any) -> str | None:
    """The name under which a wrapper holds its module; None of any other module."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    if not isinstance(module, nn.Module):
        return None
    return next((name for name in HELD if name in module._modules), None)


def unwrapped(module: Any) -> Any:
    """The module inside of wrappers, which has its class, arguments and names; others unchanged."""
    while (name := _held(module)) is not None:
        module = module._modules[name]
    return module


def check_undivided(module: Any, name: str) -> None:
    """Refuse what is spread over devices or processes where a model or a part of one is wanted.

    Args:
        module: what was given.
        name: of the argument.

    Raises:
        ValueError: naming the part.
    """
    parts = module.named_modules() if isinstance(module, nn.Module) else ()
    for inside, part in parts:
        if SPREADING & {cls.__name__ for cls in type(part).__mro__}:
            raise ValueError(
                f"{f'{name}.{inside}'.strip('.')} is spread over devices by {type(part).__name__}: "
                "give the module itself, or what torch.compile makes of it; a trainer spreads the "
                "whole model"
            )


def _plainly(module: nn.Module) -> Callable[[str], str]:
    """What makes of a name in a module's state the one without wrappers."""
    parts = [
        (f"{name}.{held}.".lstrip("."), held)
        for name, part in module.named_modules(remove_duplicate=False)
        if (held := _held(part)) is not None
    ]
    parts.sort(key=lambda part: -len(part[0]))  # the inner ones first

    def plain(name: str) -> str:
        for prefix, held in parts:
            if name.startswith(prefix):
                name = prefix[: -len(held) - 1] + name[len(prefix) :]
        return name

    return plain


def plain_names(module: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Names in a module's state, by default all, each with what it is without wrappers."""
    plain = _plainly(module)
    return {name: plain(name) for name in (module.state_dict() if names is None else names)}


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state under the names that it has without wrappers."""
    names = plain_names(module)
    return {names[name]: value for name, value in module.state_dict().items()}


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


@functools.cache
def _hints(init: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a constructor's arguments; none where they name what is not imported."""
    try:
        return get_type_hints(inspect.unwrap(init))
    except Exception:
        return {}


def find_file(name: str | os.PathLike) -> Path:
    """Find a saved model by path, by the name of a shipped one, or on the Hugging Face hub.

    A folder, or a repository, is one of `Saveable.save_pretrained`.

    Raises:
        CheckpointError: there is none; says what lies near. Or the file is a training's checkpoint.
    """
    path = as_path(name, "model")
    if path.is_file():
        _refuse_checkpoint(path)
        return path
    if path.is_dir():
        if not (path / MODEL).is_file():
            raise CheckpointError(
                f"{path} has no {MODEL}, which the folder of a saved model has; "
                f"{_near(path / MODEL)}"
            )
        _refuse_checkpoint(path / MODEL)
        _check_config(path / MODEL, path / CONFIG)
        return path / MODEL
    text = str(name)
    shipped = Path(str(SHIPPED)) / f"{FORMER.get(text, text)}.safetensors"
    if shipped.is_file():
        if text in FORMER:
            warnings.warn(
                f"the model {text!r} is no longer shipped: this is {FORMER[text]!r}", stacklevel=2
            )
        return shipped
    if is_repository(text):
        if (found := hub_file(text, MODEL)) is None:
            raise not_on_hub(text, MODEL)
        if (config := hub_file(text, CONFIG)) is not None:
            _check_config(found, config)
        return found
    if "/" in text or text.endswith(ENDINGS):
        raise CheckpointError(f"no such model file: {printable(text, 200)}; {_near(path)}")
    known = sorted(p.stem for p in Path(str(SHIPPED)).glob("*.safetensors"))
    raise CheckpointError(
        f"unknown model {shown(text, 200)}: not a file, and the shipped models are {known}; "
        "a hub repository is written owner/name"
    )


def _check_config(path: Path, config: Path) -> None:
    """Refuse a model file of this package beside the configuration of another model."""
    try:
        stated = json.dumps(stated_by(path), sort_keys=True)
    except CheckpointError:
        return  # whoever reads it says what is wrong with it
    if not config.is_file():
        return
    with reading(config):
        if json.dumps(json.loads(config.read_text("utf-8")), sort_keys=True) != stated:
            raise CheckpointError(
                f"{config} is not what {path} says of itself: one of the two belongs to another "
                "model; fetch both anew, or delete the first, which is for people alone"
            )


def _refuse_checkpoint(path: Path) -> None:
    try:
        kind = kind_of(path)
    except CheckpointError:
        return  # whoever reads it says what is wrong with it
    if kind.endswith(" checkpoint"):
        raise CheckpointError(
            f"{path} is a checkpoint, for a training to go on from, and no model; {_near(path)}"
        )


def _near(path: Path) -> str:
    """What model files lie near a place where there is none, those of like names first."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [
        entry.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for entry in sorted(itertools.islice(folder.glob(pattern), 10_000))
        if entry.suffix in ENDINGS and not {"checkpoint", "snapshot"} & {*entry.name.split("-")}
    ]
    likeness = difflib.SequenceMatcher(b=path.name)

    def unlike(name: str) -> float:
        likeness.set_seq1(name)
        return -likeness.ratio()

    found = ", ".join(printable(name, 100) for name in sorted(names, key=unlike)[:5])
    return f"in {folder} there {f'are {found}' if found else 'is none'}"
