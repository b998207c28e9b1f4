"""What a run tells of itself while it goes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from muse_maskgit_pytorch.training.loop import Trainer
from tests.runs import (
    assert_same,
    interrupt,
    logged,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    metrics,
    vae_trainer,
)


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


def test_a_run_says_what_it_is_about_to_do(
    images: Path, tmp_path: Path, t5: str, capsys: pytest.CaptureFixture
):
    """And warns, before the first step, on the terminal, in the log and in the report."""
    settings: dict[str, Any] = dict(warmup_steps=4, grad_accum_every=2)
    trainer = maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), **settings)
    original, said = trainer.train_step, []

    def step(batches: Any) -> dict[str, Tensor]:
        said.append(capsys.readouterr().out)
        return original(batches)

    trainer.train_step = step  # type: ignore[method-assign]
    trainer.train()
    lines = said[0].splitlines()
    assert lines[0].startswith("base: 6 images to train on, 1 held back")
    assert any(line.startswith("parameters: transformer ") for line in lines)
    assert any(re.fullmatch(r"device: cpu \(.+\), float32", line) for line in lines)
    assert any(line.startswith("steps: 2 of 4 images each, 1.5 to") for line in lines)
    assert any(line.startswith("token cache: 7 images take about") for line in lines)
    assert "warmup_steps=4 is longer than the run" in said[0]
    assert "warmup_steps=4" in "".join(line.get("warning", "") for line in metrics(tmp_path / "r"))
    assert "warmup_steps=4" in (tmp_path / "r" / "report.html").read_text()


def test_pictures_smaller_than_the_training_are_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    vae_trainer(images, tmp_path / "r", image_size=32).train()
    assert "smaller than image_size=32 (typically 16 px)" in capsys.readouterr().out
