"""Averages chosen after a training: of any length from its snapshots, or over saved models.

Post-hoc averages are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3 and appendix C: a training keeps two averages of other lengths and
stores them now and then; afterwards the stored ones are added with the weights whose sum comes
nearest to the average that is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_path, real, shown
from ..checkpoint import (
    Saveable,
    find_file,
    kind_of,
    plain_names,
    plain_state,
    state_of,
)
from ..maskgit import MaskGit
from ..muse import Muse
from ..vqgan_vae import VQGanVAE
from ..watching.run_file import leaves
from ..weights import CheckpointError, check_weights, reading
from .checkpoints import KEPT, TREE, Checkpoints, Snapshots
from .ema import EMA, gamma_of
from .loop import SAMPLING


def profile_weights(
    kept: Sequence[tuple[int, float]], step: int, length: float
) -> tuple[list[float], float]:
    """With which weights averages that were kept make up another one.

    Least squares over the profiles, in the closed form of the paper's appendix C. Unlike there the
    weights sum to 1 exactly, so that what never changed stays as it is.

    Args:
        kept: step and relative length of each.
        step: at which the average is wanted.
        length: its relative length.

    Returns:
        the weights, and the distance of the profile that they make from the one that is wanted, as
        a share of the latter's norm.
    """
    scaled = [(at / step, gamma_of(of)) for at, of in [*kept, (step, length)]]
    times, gammas = torch.tensor(scaled, dtype=torch.float64).T
    early, late = torch.minimum(times[:, None], times), torch.maximum(times[:, None], times)
    of_late = torch.where(times[:, None] < times, gammas, gammas[:, None])
    products = (
        (gammas[:, None] + 1) * (gammas + 1) * (early / late) ** of_late
        / ((gammas[:, None] + gammas + 1) * late)
    )  # fmt: skip
    count = len(kept)
    matrix = torch.ones(count + 1, count + 1, dtype=torch.float64)  # the last row: they sum to 1
    matrix[:count, :count] = products[:count, :count]
    matrix[count, count] = 0
    wanted = torch.cat([products[:count, count], matrix.new_ones(1)])
    weights = torch.linalg.solve(matrix, wanted)[:count]
    apart = torch.cat([weights, matrix.new_full((1,), -1.0)])
    error = (apart @ products @ apart).clamp(min=0) / products[count, count]
    return weights.tolist(), float(error.sqrt())


def posthoc_average(
    run: str | Path, length: float, stage: str | None = None
) -> tuple[Saveable, float]:
    """A model with the average of a relative length, at a run's last snapshot.

    Args:
        run: results folder of a training with ``posthoc_every``.
        length: sigma_rel, standard deviation of the average's profile as a share of the training:
            above 0 and up to 0.2887, the plain mean of all steps. 0.05 and 0.1 were kept.
        stage: its name, where the folder has several.

    Returns:
        the model, on the CPU, and the distance of its profile from the wanted one (0.01 is 1 %).

    Raises:
        ValueError: a length out of range, or no such stage.
        CheckpointError: no snapshots, damaged ones, or those of another model.
    """
    folder = as_path(run, "run")
    gamma_of(length)
    stage = _stage(folder, stage)
    snapshots = Snapshots(folder, stage)
    found = snapshots.found()
    last = max(found)
    kept = [(step, of) for step in found for of in KEPT]
    weights, error = profile_weights(kept, last, length)
    share = dict(zip(kept, weights, strict=True))
    model = _opened(folder / f"{stage}-ema.safetensors")
    averages, copied = snapshots.read(found[last])
    total = {
        name: torch.zeros_like(value, dtype=torch.float64)
        for name, value in next(iter(averages.values()), {}).items()
    }
    _check(model, total | copied, found[last])
    for step, path in found.items():
        averages, _ = snapshots.read(path)
        if averages.keys() != set(KEPT):
            raise CheckpointError(f"{path} has averages of other lengths than {KEPT}")
        for of, state in averages.items():
            check_weights(total, state, path, f"{found[last].name}", "remove one of the two")
            for name, value in state.items():
                total[name].add_(value, alpha=share[step, of])
    _put(model, total | copied)
    return model, error


def _stage(folder: Path, stage: str | None) -> str:
    """The stage of a run with snapshots, the only one if none is named."""
    names = sorted({p.name.rpartition("-snapshot-")[0] for p in folder.glob("*-snapshot-*")})
    names = [name for name in names if Snapshots(folder, name).found()]
    if not names:
        raise CheckpointError(
            f"{folder} holds no snapshots of a training: train with posthoc_every, or average "
            "model files"
        )
    if stage not in (*names, None) or (stage is None and len(names) > 1):
        raise ValueError(f"stage must be one of {', '.join(names)}, not {shown(stage)}")
    return stage or names[0]


@torch.no_grad()
def offline_average(files: Sequence[str | Path], decay: float | None = 0.7) -> Saveable:
    """The moving average over saved models, as the paper has it (section 3).

    Its decay is 0.7, over weights that lie 5,000 steps apart.

    Args:
        files: models, or checkpoints of a training beside the models that it wrote, the earliest
            first. At least two.
        decay: weight of the average so far, in [0, 1); None: the mean of all.

    Returns:
        the model, on the CPU. What no optimizer moves is that of the last file.

    Raises:
        ValueError: fewer than two files, or a decay out of range.
        CheckpointError: a file of another model than the first.
    """
    paths = [as_path(file, "files") for file in files]
    if len(paths) < 2:
        raise ValueError(f"an average is over at least two files, not {len(paths)}")
    if decay is not None and not 0 <= real("decay", decay) < 1:
        raise ValueError(f"decay must be in [0, 1), not {shown(decay)}")
    model = _read(paths[0])
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parameters = set(plain_names(model, names).values())
    ema = EMA(
        plain_state(model), parameters, lambda place: 1 - 1 / place if decay is None else decay
    )
    own = _compared(model)
    for place, path in enumerate(paths[1:], 2):
        newer = _read(path)
        other = _compared(newer)
        if key := next((k for k in [*own, *other] if own.get(k) != other.get(k)), None):
            raise CheckpointError(
                f"{path} is of another model than {paths[0]} ({key} is {shown(other.get(key))}, "
                f"there {shown(own.get(key))}): average files of one training"
            )
        _put(model, plain_state(newer))
        ema.update(place)
    _put(model, ema.average)
    return model


def _compared(model: Saveable) -> dict[str, Any]:
    """What two models must share: their kind and arguments."""
    return {"kind": type(model).__name__} | leaves(
        json.loads(json.dumps(model.config)), skip=SAMPLING
    )


def _read(path: Path) -> Saveable:
    """The model of a file, or of a checkpoint and the model's file beside it."""
    name, _, step = path.name.partition("-checkpoint-")
    if not step or not path.exists():
        return _opened(path)
    kind = kind_of(path / TREE if path.is_dir() else path)
    tree = Checkpoints(path.parent, name, kind, 1).load(path)
    model = _opened(path.parent / f"{name}.safetensors")
    with reading(path):
        state = state_of(next(iter(tree["modules"].values()), None), path)
    _check(model, state, path)
    _put(model, state)
    return model


def _opened(path: Path) -> Saveable:
    kinds: dict[str, type[Saveable]] = {c.__name__: c for c in (MaskGit, Muse, VQGanVAE)}
    found = find_file(path)
    kind = kind_of(found)
    if kind not in kinds:
        raise CheckpointError(f"{path} holds a {kind}: give one of {', '.join(kinds)}")
    return kinds[kind].from_pretrained(found)


def _check(model: Saveable, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are not some of this model's."""
    own = {name: value for name, value in plain_state(model).items() if name in state}
    kind = type(model).__name__
    check_weights(own, state, path, f"the {kind} beside it", "average files of one training")


def _put(model: Saveable, state: Mapping[str, Tensor]) -> None:
    names = plain_names(model)
    given = {name: state[plain] for name, plain in names.items() if plain in state}
    model.load_state_dict(given, strict=False)
