"""Experiment trackers get what the log has, and never cost a run anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_maskgit_pytorch.training.parallel import Parallel
from muse_maskgit_pytorch.training.trackers import check_trackers
from tests.runs import first_weight, make_vae, metrics, vae_trainer


def events(results: Path) -> Any:
    read = EventAccumulator(str(results / "tensorboard" / "vae"))
    read.Reload()
    return read


def test_tensorboard_has_the_figures_and_pictures_of_a_run_and_its_resume(
    images: Path, tmp_path: Path
):
    for steps in (2, 4):
        vae_trainer(
            images, tmp_path / "run", num_train_steps=steps, sample_every=2, resume=True,
            trackers="tensorboard",
        ).train()  # fmt: skip
    read, lines = events(tmp_path / "run"), metrics(tmp_path / "run")
    logged = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert len(logged) == 4
    assert {e.step: pytest.approx(e.value) for e in read.Scalars("loss")} == logged
    assert {event.step for event in read.Scalars("valid_psnr")} == {2, 4}
    assert {event.step for event in read.Images("vae")} == {2, 4}


class Dying:
    """A tracker that takes two lines and then fails at everything."""

    def __init__(self):
        self.lines: list[int] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        if len(self.lines) == 2:
            raise ConnectionError("the server has gone")
        self.lines.append(step)

    def finish(self) -> None:
        raise ConnectionError("the server has gone")


def test_a_tracker_that_dies_is_named_once_and_changes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dying = Dying()
    weights = []
    for trackers in (None, "tensorboard"):
        vae = make_vae()
        monkeypatch.setattr(Parallel, "tracker", lambda *args: dying)
        vae_trainer(
            images, tmp_path / str(trackers), vae, num_train_steps=4, trackers=trackers
        ).train()
        weights.append(first_weight(vae))
    assert weights[0].equal(weights[1])
    assert dying.lines == [1, 2]
    [warning] = [line["warning"] for line in metrics(tmp_path / "tensorboard") if "warning" in line]
    assert warning.startswith("the tracker tensorboard has failed")
    assert "the server has gone" in warning


def test_one_that_cannot_start_is_left_out(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Parallel, "tracker", fail)
    vae_trainer(images, tmp_path / "run", trackers=["tensorboard"]).train()
    assert any("no network" in line.get("warning", "") for line in metrics(tmp_path / "run"))


def test_unknown_and_missing_trackers_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(ValueError, match="trackers must be one of"):
        check_trackers("tensorbord")
    monkeypatch.setattr("muse_maskgit_pytorch.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        check_trackers(["wandb"])
    assert check_trackers(None) == []
