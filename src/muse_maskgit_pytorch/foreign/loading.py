"""Any tokenizer by its name, this package's or another project's."""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint import FORMAT, CheckpointError, _build, _classes, find_file, load_tree
from ..vqgan_vae import ImageTokenizer
from .names import PARTS, UNDERSTOOD, family_of, geometry, renamed, stated_arguments
from .network import Family, ForeignVQGAN

# What a folder or a hub repository may call its weights, the first that is there is read.
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.safetensors",
    "pytorch_model.bin",
    "last.ckpt",
    "checkpoints/last.ckpt",
)


@torch.inference_mode(False)
def load_tokenizer(
    name: str | PathLike, device: torch.device | str | None = None
) -> ImageTokenizer:
    """Load an image tokenizer of this package or of another project, in eval mode.

    Args:
        name: one of

            - a ``.safetensors`` of this package: a tokenizer, or a MaskGit, whose tokenizer it is;
            - the same of a Muse, with its stage: ``path:base`` or ``path:superres``;
            - the name of a shipped model, with its stage: ``emoji:base``;
            - a folder: diffusers' ``VQModel``, taming's or MaskGIT-VQGAN's, perhaps with the
              part of it that is meant: ``path:vqvae``;
            - the file with the weights in such a folder, its configuration next to it;
            - a repository on the Hugging Face hub with any of these, perhaps with a subfolder or
              a file: ``amused/amused-256:vqvae``.
        device: where to put it, the CPU by default.

    Raises:
        CheckpointError: not found, damaged, or nothing that this package understands.
    """
    path, part = _find(str(name))
    tokenizer = _load_own(path, part) if _is_own(path) else _load_foreign(path, part)
    return tokenizer.to(device).eval()


def _find(name: str) -> tuple[Path, str | None]:
    """The file with the weights, and what of the name is left to choose a part of it."""
    whole = Path(name).exists() or ":" not in name
    stem, part = (name, "") if whole else name.rsplit(":", 1)
    folder = Path(stem, part)
    if Path(stem).is_dir():
        if folder.is_file():
            return folder, None
        found = [folder / weights for weights in WEIGHTS if (folder / weights).is_file()]
        found = found or sorted(folder.glob("*.ckpt"))[:2]
        if len(found) == 1 or (found and found[0].suffix != ".ckpt"):
            return found[0], None
        parts = sorted(f"{stem}:{p.parent.name}" for p in folder.glob("*/config.json"))
        raise CheckpointError(
            f"{folder} has no weights of a tokenizer, or several: name the file or the part"
            f"{f' ({parts})' if parts else ''}; {UNDERSTOOD}"
        )
    hub = not stem.startswith((".", "/", "~")) and stem.count("/") == 1
    if hub and not Path(stem).exists() and not stem.endswith((".safetensors", ".ckpt", ".bin")):
        return _download(stem, part)
    return find_file(stem), part or None


def _download(repository: str, part: str) -> tuple[Path, str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    candidates = [(f"{part}/{weights}".lstrip("/"), None) for weights in WEIGHTS]
    candidates = [(part, None)] if Path(part).suffix else candidates
    for file, rest in [*candidates, ("model.safetensors", part or None)]:
        try:
            path = Path(hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise CheckpointError(
                f"{repository} could not be had from the Hugging Face hub "
                f"({type(error).__name__}): check the name and the network"
            ) from error
        if not _is_own(path):
            config = str(Path(file).with_name("config.json"))
            with contextlib.suppress(EntryNotFoundError):  # what needs it says so
                hf_hub_download(repository, config)
        return path, rest
    raise CheckpointError(
        f"{repository}{part and ':'}{part} has no weights of a tokenizer on the Hugging Face hub, "
        f"or the hub is out of reach: name the subfolder or the file as owner/name:part; "
        f"{UNDERSTOOD}"
    )


def _is_own(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error})") from error


def _load_own(path: Path, part: str | None) -> ImageTokenizer:
    tree, kind = load_tree(path)
    known: dict[str, Any] = _classes(ImageTokenizer)
    if kind not in ("Muse", "MaskGit", *known):
        raise CheckpointError(f"{path} holds a {kind}, not a tokenizer or a model that has one")
    steps = ["vae"] if kind == "MaskGit" else []
    if kind == "Muse":
        stages = [stage for stage in ("base", "superres") if tree["config"].get(stage)]
        if part not in stages:
            raise CheckpointError(
                f"{path} holds a Muse, with a tokenizer in each stage: add :{' or :'.join(stages)}"
            )
        steps = [part, "vae"]
    elif part:
        raise CheckpointError(f"{path} holds a {kind} with one tokenizer: leave out ':{part}'")
    node: dict[str, Any] = {"kind": kind, "config": tree["config"]}
    for step in steps:
        node = node["config"][step]
    prefix = "".join(f"{step}." for step in steps)
    state = {k.removeprefix(prefix): v for k, v in tree["state"].items() if k.startswith(prefix)}
    cls = known[node["kind"]]
    tokenizer = _build(cls, cls._upgraded(node["config"], state))
    tokenizer._load_state(state, path)
    return tokenizer


class _Inert:
    """What stands for any class that a pickle names: called or built, an empty dict."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _read_state(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        unsafe = []
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":  # what torch writes since 1.6
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}): it is damaged, no "
            "checkpoint, or holds objects that would have to be executed, which is refused"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)  # Lightning's
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict (names and tensors); {UNDERSTOOD}")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _load_foreign(path: Path, part: str | None) -> ForeignVQGAN:
    if part:
        raise CheckpointError(f"{path} holds one tokenizer: leave out ':{part}'")
    state = {k: v for k, v in _read_state(path).items() if k.startswith(PARTS)}
    family = family_of(state, path)
    state = renamed(state)
    arguments = geometry(state, path, family)
    if found := _read_config(path, family):
        file, config = found
        try:
            stated = stated_arguments(config, family)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: {error} is missing or not supported in a {family} VQGAN"
            ) from error
        for name, value in stated.items():
            if value != arguments[name]:
                raise CheckpointError(
                    f"{file} says {name} {value}, the weights in {path.name} have "
                    f"{arguments[name]}: one of the two belongs to another model"
                )
        if family == "diffusers":
            arguments["groups"] = config.get("norm_num_groups", 32)
            arguments["signed"] = not config.get("lookup_from_codebook", False)
    try:
        tokenizer = ForeignVQGAN(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = tokenizer.state_dict()
    for name in sorted(own.keys() | state.keys()):
        there, here = (list(d[name].shape) if name in d else "missing" for d in (state, own))
        if there != here:
            raise CheckpointError(
                f"{path}: {name} is {there}, and would be {here} in a {family} VQGAN with the rest "
                "of these weights: the file is incomplete, or another kind of network"
            )
    tokenizer.load_state_dict(state)
    return tokenizer


def _read_config(path: Path, family: Family) -> tuple[Path, dict[str, Any]] | None:
    """The configuration next to the weights; None if there is none and none is needed."""
    names = ["config.json"]
    if family == "taming":
        names = [f"{path.stem}.yaml", "model.yaml", "config.yaml", "configs/model.yaml"]
    files = [path.parent / name for name in names]
    if family == "taming" and path.parent.name == "checkpoints":  # as taming's training leaves it
        configs = path.parent.parent / "configs"
        files += [configs / "model.yaml", *sorted(configs.glob("*-project.yaml"), reverse=True)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if family != "diffusers":
            return None
        raise CheckpointError(
            f"{path.with_name('config.json')} is missing: the weights alone do not say how a "
            "diffusers VQModel normalises; put its config.json next to them"
        )
    try:
        if family != "taming":
            return file, dict(json.loads(file.read_text()))
        return file, dict(yaml.safe_load(file.read_text())["model"]["params"])
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not the configuration of a {family} VQGAN ({type(error).__name__}: {error})"
        ) from error
