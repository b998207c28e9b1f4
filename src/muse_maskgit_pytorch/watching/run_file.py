"""How a run was made: ``NAME-run.json`` beside its results, for people and for a resume.

Written before the first step. It states everything that the run's numbers depend on (settings,
model, data, device, versions), so that a resume can say what is other than before.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..arguments import plain, shown
from ..devices import fast_precisions
from ..files import replacing

PACKAGES = ("muse-maskgit-pytorch", "torch", "numpy", "pillow", "accelerate", "transformers")
# What decides how often one looks, what is kept and how fast it goes, but no step.
IDLE = {
    "log_every", "sample_every", "save_every", "keep_checkpoints", "max_valid", "num_samples",
    "sample_prompts", "num_workers", "cache_images", "data source", "data left_out",
}  # fmt: skip
# Arguments of a trainer that the description has in another place, or that say where it stands.
ELSEWHERE = {
    "self", "__class__", "common", "model", "vae", "maskgit", "data", "folder", "cond_folder",
    "cache", "results_folder", "resume",
}  # fmt: skip


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's settings from the `locals()` its constructor begins with."""
    return {name: plain(value) for name, value in arguments.items() if name not in ELSEWHERE}


def versions() -> dict[str, str]:
    """The releases that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_device(device: torch.device, processes: int) -> dict[str, Any]:
    """What the run is computed on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    name = f"{device.type} ({gpu or platform.machine()})"
    return {
        "kind": name,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "fast precisions": fast_precisions(device),
    }


def leaves(tree: Any, above: str = "", skip: Collection[str] = ()) -> dict[str, Any]:
    """The values of nested dicts by their paths, ``vae.dim``; without the parts named ``skip``."""
    if not isinstance(tree, dict):
        return {above: tree}
    return {
        name: value
        for key, part in tree.items()
        if key not in skip
        for name, value in leaves(part, f"{above}.{key}".strip("."), skip).items()
    }


class RunFile:
    """The description of one stage's run, and of the sittings in which it was trained.

    Args:
        folder: the run's results folder.
        stage: its name.
    """

    def __init__(self, folder: Path, stage: str):
        self.path = folder / f"{stage}-run.json"

    def read(self) -> dict[str, Any]:
        """What was written last; nothing where there is no such file, or none that is whole."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, description: Mapping[str, Any], step: int, before: Mapping[str, Any]) -> None:
        """Write a description, with the sittings so far and a new one that begins at ``step``.

        Args:
            description: of the sitting that begins.
            step: steps done.
            before: the description that is replaced, of which the sittings are kept.
        """
        began = datetime.now(UTC).isoformat(timespec="seconds")
        sitting = {"step": step, "began": began, "changed": differences(before, description)}
        sittings = before.get("sittings")
        sittings = [*(sittings if isinstance(sittings, list) else []), sitting]
        text = json.dumps({**description, "sittings": sittings}, indent=2, default=str)
        with replacing(self.path) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What both descriptions have, and have otherwise: name -> the value before and now.

    What one of them lacks (another release) is not compared, nor what is refused elsewhere: the
    model.
    """
    found = {}
    for part in ("settings", "data", "device", "versions"):
        was, is_now = before.get(part), now.get(part)
        if not (isinstance(was, dict) and isinstance(is_now, dict)):
            continue
        is_now = json.loads(json.dumps(is_now, default=str))  # as it will be read
        for name in was.keys() & is_now.keys():
            if was[name] != is_now[name]:
                label = name if part in ("settings", "versions") else f"{part} {name}"
                found[label] = [was[name], is_now[name]]
    return dict(sorted(found.items()))


def changes_in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, bool]:
    """What is other than before, with both values, and whether the run is exact all the same.

    Exact is a run whose steps to come are, bit for bit, those it would have had unbroken.

    Returns:
        one sentence, "" where nothing has changed; and whether no step depends on the changes.
    """
    changes = differences(before, now)
    constant = now.get("settings", {}).get("lr_schedule") == "constant"
    idle = IDLE | ({"num_train_steps"} if constant else set())  # a cosine ends there
    exact = changes.keys() <= idle
    values = [f"{name} was {shown(a)} and is {shown(b)}" for name, (a, b) in changes.items()]
    means = (
        "no step depends on this, and the run stays exact"
        if exact
        else "from here on it is not, bit for bit, the run that it would have been without this"
    )
    return (
        f"going on otherwise than before: {', '.join(values)}; {means}" if values else ""
    ), exact
