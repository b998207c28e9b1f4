"""Any tokenizer by its name, this package's or another project's."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..arguments import as_path, shown, whole
from ..checkpoint import (
    FORMAT,
    MODEL,
    _classes,
    find_file,
    how_to_know,
    kind_of,
    load_tree,
    rebuild,
    state_of,
    take_licenses,
)
from ..files import without_hub
from ..hub import hub_file, is_repository
from ..licenses import license_of
from ..vqgan_vae import ImageTokenizer
from ..weights import (
    CheckpointError,
    check_weights,
    is_safetensors,
    read_torch,
    reading,
    safetensors_file,
    sketching,
)
from .names import PARTS, UNDERSTOOD, family_of, geometry, renamed, stated_arguments
from .network import Family, ForeignVQGAN

# What a folder or a hub repository may call its weights, the first that is there is read.
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "model.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.fp16.bin",
    "last.ckpt",
    "checkpoints/last.ckpt",
)
CONFIG_BYTES = 2**20  # of the largest configuration that is read


@torch.inference_mode(False)
def load_tokenizer(
    name: str | PathLike, device: torch.device | str | None = None
) -> ImageTokenizer:
    """Load an image tokenizer of this package or of another project, in eval mode.

    Args:
        name: one of

            - a ``.safetensors`` of this package: a tokenizer, or a MaskGit, whose tokenizer it is;
            - the same of a Muse, with its stage: ``path:base`` or ``path:superres``;
            - the name of a shipped model, with its stage: ``scenes:base``;
            - a folder of ``save_pretrained``, with a stage where the model has several;
            - another folder: diffusers' ``VQModel``, taming's or MaskGIT-VQGAN's, perhaps with the
              part of it that is meant: ``path:vqvae``;
            - the file with the weights in such a folder, its configuration next to it;
            - a repository on the Hugging Face hub with any of these, perhaps with a subfolder or
              a file: ``amused/amused-256:vqvae``.
        device: where to put it, the CPU by default.

    Raises:
        CheckpointError: not found, damaged, or nothing that this package understands.
    """
    as_path(name, "tokenizer")
    path, part = _find(str(name))
    with reading(path):
        tokenizer = _load_own(path, part) if _is_own(path) else _load_foreign(path, part)
    tokenizer.license = tokenizer.license or license_of(path)
    return tokenizer.to(device).eval()


def _find(name: str) -> tuple[Path, str | None]:
    """The file with the weights, and what of the name is left to choose a part of it."""
    whole = as_path(name).exists() or ":" not in name
    stem, part = (name, "") if whole else name.rsplit(":", 1)
    place = as_path(stem or name)
    folder = place / part
    if place.is_dir():
        if folder.is_file():
            return folder, None
        own = place / MODEL
        if not folder.is_dir() and own.is_file() and _is_own(own):
            return find_file(place), part
        found = [folder / weights for weights in WEIGHTS if (folder / weights).is_file()]
        found = found or sorted(folder.glob("*.ckpt"))[:2]
        if len(found) == 1 or (found and found[0].suffix != ".ckpt"):
            return found[0], None
        parts = sorted(f"{stem}:{p.parent.name}" for p in folder.glob("*/config.json"))
        raise CheckpointError(
            f"{folder} has no weights of a tokenizer, or several: name the file or the part"
            f"{f' ({parts})' if parts else ''}; {UNDERSTOOD}"
        )
    if is_repository(stem) and not place.exists():
        return _download(stem, part)
    return find_file(stem), part or None


def _download(repository: str, part: str) -> tuple[Path, str | None]:
    candidates = [(f"{part}/{weights}".lstrip("/"), None) for weights in WEIGHTS]
    candidates = [(part, None)] if Path(part).suffix else candidates
    local = without_hub(repository)
    for file, rest in [*candidates, ("model.safetensors", part or None)]:
        if (path := hub_file(repository, file, local)) is None:
            continue
        if not _is_own(path):  # what needs its configuration says so
            hub_file(repository, str(Path(file).with_name("config.json")), local)
        return path, rest
    raise CheckpointError(
        f"{repository}{part and ':'}{part} has no weights of a tokenizer on the Hugging Face hub, "
        f"or the hub is out of reach: name the subfolder or the file as owner/name:part; "
        f"{UNDERSTOOD}"
    )


def _is_own(path: Path) -> bool:
    if not is_safetensors(path):
        return False
    with safetensors_file(path) as file:
        return (file.metadata() or {}).get("format") == FORMAT


def _load_own(path: Path, part: str | None) -> ImageTokenizer:
    kind = kind_of(path)
    known: dict[str, Any] = _classes(ImageTokenizer)
    tree, _ = load_tree(path)
    if kind not in ("Muse", "MaskGit", *known):
        homes = tree.get("homes")  # of classes that are not ours
        reason = "not a tokenizer or a model that has one"
        if kind not in _classes() and isinstance(homes, dict) and kind in homes:
            reason = f"which is not known here: {how_to_know(kind, homes)}"
        raise CheckpointError(f"{path} holds a {kind}, {reason}")
    config: Any = tree["config"]
    steps = ["vae"] if kind == "MaskGit" else []
    if kind == "Muse":
        stages = [stage for stage in ("base", "superres") if config.get(stage)]
        if part not in stages:
            raise CheckpointError(
                f"{path} holds a Muse, with a tokenizer in each stage: add :{' or :'.join(stages)}"
            )
        steps = [part, "vae"]
    elif part:
        raise CheckpointError(f"{path} holds a {kind} with one tokenizer: leave out ':{part}'")
    for step in steps:
        kind, config = config[step]["kind"], config[step]["config"]
    prefix = "".join(f"{step}." for step in steps)
    state = state_of(tree["state"], path)
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if kind not in known:
        advice = how_to_know(kind, tree.get("homes"))
        raise CheckpointError(f"{path} has a tokenizer of the unknown kind {shown(kind)}: {advice}")
    made = rebuild(known[kind], {**tree, "config": config, "state": own}, path)
    take_licenses(made, tree, prefix)
    return made


def _read_state(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file; nothing in it is executed."""
    if is_safetensors(path):
        with safetensors_file(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = read_torch(path, inert=True)
    if isinstance(content, dict):
        content = content.get("state_dict", content)  # Lightning's
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict (names and tensors); {UNDERSTOOD}")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _load_foreign(path: Path, part: str | None) -> ForeignVQGAN:
    if part:
        raise CheckpointError(f"{path} holds one tokenizer: leave out ':{part}'")
    read = _read_state(path).items()
    state = state_of({k: v for k, v in read if k.startswith(PARTS)}, path)
    family = family_of(state, path)
    state = renamed(state)
    arguments = geometry(state, path, family)
    if found := _read_config(path, family):
        file, config = found
        with reading(file):
            try:
                stated = stated_arguments(config, family)
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{file}: {error} is missing or not supported in a {family} VQGAN"
                ) from error
        for name, value in stated.items():
            if value != arguments[name]:
                raise CheckpointError(
                    f"{file} says {name} {shown(value)}, the weights in {path.name} have "
                    f"{shown(arguments[name])}: one of the two belongs to another model"
                )
        if family == "diffusers":
            with reading(file):
                arguments["groups"] = whole("norm_num_groups", config.get("norm_num_groups", 32), 1)
            arguments["signed"] = not config.get("lookup_from_codebook", False)
    with sketching(2 * len(state) + 100):
        sketch = ForeignVQGAN(**arguments)
    network = f"a {family} VQGAN with the rest of these weights"
    advice = "the file is incomplete, or another kind of network"
    check_weights(sketch.state_dict(), state, path, network, advice)
    tokenizer = ForeignVQGAN(**arguments)
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
        if file.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"more than {CONFIG_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if family != "taming" else yaml.safe_load(text)
        _check_count(content)
        return file, dict(content if family != "taming" else content["model"]["params"])
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not the configuration of a {family} VQGAN "
            f"({type(error).__name__}: {shown(error, 200)})"
        ) from error


def _check_count(content: Any) -> None:
    """Refuse what names the same lists again and again (YAML's aliases): it has no end."""
    waiting, count = [content], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > CONFIG_BYTES:
            raise ValueError("more values than a configuration has")
        if isinstance(node, (dict, list)):
            waiting += node.values() if isinstance(node, dict) else node
