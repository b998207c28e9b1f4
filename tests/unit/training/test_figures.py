"""What a run tells of itself while it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from muse_maskgit_pytorch.training.loop import Trainer
from tests.runs import assert_same, interrupt, logged, make_vae, metrics, vae_trainer


def spied(trainer: Trainer, seen: dict[int, dict[str, float]]) -> Trainer:
    """Notes the figures of each of the trainer's steps."""
    original = trainer.train_step

    def step(batches: Any) -> dict[str, Tensor]:
        found = original(batches)
        seen[trainer.step + 1] = {name: float(value) for name, value in found.items()}
        return found

    trainer.train_step = step  # type: ignore[method-assign]
    return trainer


SETTINGS: dict[str, Any] = dict(num_train_steps=8, log_every=3, save_every=5, warmup_steps=0)


def test_the_logged_figures_of_a_run_are_means(images: Path, tmp_path: Path):
    seen: dict[int, dict[str, float]] = {}
    spied(vae_trainer(images, tmp_path / "r", make_vae(), **SETTINGS), seen).train()
    lines = logged(tmp_path / "r")
    assert [line["step"] for line in lines] == [1, 3, 6, 8]  # the first step is shown at once
    for line, steps in zip(lines, ([1], [2, 3], [4, 5, 6], [7, 8]), strict=True):
        for name in ("loss", "psnr", "grad_norm"):
            mean = sum(seen[step][name] for step in steps) / len(steps)
            assert line[name] == pytest.approx(mean, rel=1e-12), (line["step"], name)
    assert len({seen[step]["psnr"] for step in seen}) == 8


def test_an_interrupted_interval_goes_on(images: Path, tmp_path: Path):
    vae_trainer(images, tmp_path / "whole", make_vae(), **SETTINGS).train()
    interrupt(vae_trainer(images, tmp_path / "parts", make_vae(), **SETTINGS), step=5)
    vae_trainer(images, tmp_path / "parts", make_vae(1), resume=True, **SETTINGS).train()
    whole, parts = (
        [{k: v for k, v in line.items() if k in ("step", "loss", "psnr", "grad_norm", "lr")}
         for line in metrics(tmp_path / name)]
        for name in ("whole", "parts")
    )  # fmt: skip
    assert_same(parts, whole)
