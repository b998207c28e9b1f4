"""Models by their name, whatever the file holds."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any, Literal, get_args

import torch

from .arguments import as_path
from .checkpoint import CheckpointError, Saveable, find_file, kind_of, rebuild_any
from .devices import pick_device
from .foreign import is_pipeline
from .maskgit import MaskGit
from .muse import Muse

Stage = Literal["base", "superres"]


def open_model(name: str | PathLike[str], device: str | None = None) -> Muse:
    """Load a model that draws, in eval mode: a whole one, or a base stage alone as one.

    Args:
        name: a file, the name of a shipped model, a hub repository, or a folder in diffusers'
            layout (`Muse.from_pretrained`).
        device: such as "cpu" or "cuda:1". If None, a GPU where there is one, else the CPU.

    Raises:
        CheckpointError: the file cannot be found, or holds something else.
        ValueError: a device that cannot be used.
    """
    where: torch.device = pick_device(device)
    if is_pipeline(name):
        return Muse.from_pretrained(name).to(where)
    path = find_file(name)
    kind = kind_of(path)
    if kind == "Muse":
        return Muse.from_pretrained(path).to(where)
    if kind != "MaskGit":
        raise CheckpointError(f"{path} holds a {kind}: give a Muse or a base MaskGit")
    stage = MaskGit.from_pretrained(path)
    if stage.cond_image_size is not None:
        raise CheckpointError(
            f"{path} is a super-resolution stage alone: join it with a base by `muse bundle`"
        )
    made = Muse(stage).eval()
    made.license = stage.license
    return made.to(where)


def open_any(name: str | PathLike[str]) -> Saveable:
    """Load a saved model of any kind, a tokenizer too, in eval mode, on the CPU.

    Args:
        name: as in `open_stage`.

    Raises:
        CheckpointError: the file cannot be found, is damaged, or of a kind that is not imported.
    """
    stem, _, suffix = os.fspath(name).rpartition(":")
    if suffix in get_args(Stage) and stem and not as_path(name).exists():
        return open_stage(name)
    if is_pipeline(name):
        return Muse.from_pretrained(name)
    return rebuild_any(find_file(name))


def open_stage(name: str | PathLike[str], stage: Stage = "base") -> MaskGit:
    """Load one stage, in eval mode, on the CPU: of a whole model, or the one that a file holds.

    Args:
        name: as in `open_model`, or with the stage of a whole model: ``scenes:superres``.
        stage: of a whole model, where the name has none.

    Raises:
        CheckpointError: the file cannot be found, holds something else, or has no such stage.
    """
    stem, _, suffix = os.fspath(name).rpartition(":")
    if suffix in get_args(Stage) and stem and not as_path(name).exists():
        name, stage = stem, suffix  # type: ignore[assignment]
    if is_pipeline(name):
        if stage != "base":
            raise CheckpointError(f"{name} has no stage {stage!r}: it has a base alone")
        return _licensed(Muse.from_pretrained(name), stage)
    path = find_file(name)
    kind = kind_of(path)
    if kind == "MaskGit":
        return MaskGit.from_pretrained(path)
    if kind != "Muse":
        raise CheckpointError(f"{path} holds a {kind}: give a Muse or a MaskGit")
    if (found := _licensed(Muse.from_pretrained(path), stage)) is None:
        raise CheckpointError(f"{path} has no stage {stage!r}: it has a base alone")
    return found


def _licensed(muse: Muse, stage: Stage) -> Any:
    """A stage of a whole model, whose license is then its own."""
    found = muse.stages.get(stage)
    if found is not None:
        found.license = found.license or muse.license
    return found
