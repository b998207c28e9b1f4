"""What must not be destroyed, and how a run ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from muse_maskgit_pytorch import (
    CheckpointError,
)
from muse_maskgit_pytorch.checkpoint import load_tree, save_tree
from muse_maskgit_pytorch.training.guard import Diverged
from tests.runs import (
    first_weight,
    last_checkpoint,
    logged,
    metrics,
    snapshot,
    vae_trainer,
)


def test_resuming_removes_checkpoints_of_its_own_alone(images: Path, tmp_path: Path):
    """The list of written files is data of a file that may be anybody's."""
    results = tmp_path / "r"
    vae_trainer(images, results, num_train_steps=1).train()
    path = results / "vae-checkpoint-00000001.safetensors"
    victims = [tmp_path / "elsewhere.txt", results / "notes.txt"]
    victims.append(tmp_path / "vae-checkpoint-00000000.safetensors")
    for victim in victims:
        victim.write_text("mine")
    tree, _ = load_tree(path, kind="VQGanVAETrainer checkpoint")
    tree["written"] = [str(victims[0]), "notes.txt", f"../{victims[2].name}", path.name]
    save_tree(path, tree, kind="VQGanVAETrainer checkpoint")
    vae_trainer(images, results, num_train_steps=3, resume=True, keep_checkpoints=1).train()
    assert all(victim.exists() for victim in victims)
    assert not path.exists()


def test_weights_that_are_not_finite_are_never_saved(images: Path, tmp_path: Path):
    """Fewer bad steps before the end than the guard needs to go back."""
    results = tmp_path / "r"
    vae_trainer(images, results, num_train_steps=2).train()
    before = {k: v for k, v in snapshot(results).items() if k.endswith(".safetensors")}
    trainer = vae_trainer(images, results, num_train_steps=4, resume=True)
    train_step = trainer.train_step

    def spoiled(batches: Any) -> Any:
        if trainer.step == 2:
            first_weight(trainer.vae).fill_(math.nan)
        return train_step(batches)

    trainer.train_step = spoiled  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="weights are not finite at step 4, and are not saved"):
        trainer.train()
    assert {k: v for k, v in snapshot(results).items() if k.endswith(".safetensors")} == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "recon_weight", "max_minutes", "weight_decay"])
def test_settings_that_are_not_finite(images: Path, tmp_path: Path, name: str, value: float):
    changes: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be"):
        vae_trainer(images, tmp_path / "r", **changes)


def test_any_failure_saves_what_is_done(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9)
    train_step = trainer.train_step

    def failing(batches: Any) -> Any:
        if trainer.step == 3:
            raise RuntimeError("out of memory")
        return train_step(batches)

    trainer.train_step = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 3


def test_one_trainer_at_a_time_in_a_folder(images: Path, tmp_path: Path):
    trainer, results = vae_trainer(images, tmp_path / "r"), tmp_path / "r"
    train_step = trainer.train_step

    def second(batches: Any) -> Any:
        with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on "):
            vae_trainer(images, results, resume=True).train()
        return train_step(batches)

    trainer.train_step = second  # type: ignore[method-assign]
    trainer.train()
    assert not (results / ".lock").exists()
    (results / ".lock").write_text("process 1 on a machine that went down")
    vae_trainer(images, results, resume=True, num_train_steps=3).train()


LIFE = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup round the tests would have it ignored
from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer
vae = VQGanVAE(dim=8, codebook_size=16, layers=2, num_res_blocks=1, quantizer="vq")
trainer = VQGanVAETrainer(vae, folder=sys.argv[1], image_size=16, batch_size=2, num_train_steps=6,
    perceptual_weight=0, gan_weight=0, results_folder=sys.argv[2], sample_every=0, log_every=1)
step = trainer.train_step
def watched(batches):
    if trainer.step == 3 and sys.argv[3] == "hangup":
        os.kill(os.getpid(), signal.SIGHUP)
    return step(batches)
trainer.train_step = watched
trainer.train()
"""


@pytest.mark.parametrize(
    "ending, code, step",
    [("| true; exit ${PIPESTATUS[0]}", 0, 6), ("2>&- >&-", 0, 6), ("hangup", 1, 4)],
)
def test_the_terminal_goes_away(images: Path, tmp_path: Path, ending: str, code: int, step: int):
    """A closed pipe and missing streams change nothing; a hang-up saves."""
    redirection = "" if ending == "hangup" else f"2>&1 {ending}"
    command = f'"$0" -c "$1" "$2" "$3" "$4" {redirection}'
    arguments = [sys.executable, LIFE, str(images), str(tmp_path / "r"), ending]
    run = subprocess.run(["bash", "-c", command, *arguments], capture_output=True, timeout=120)
    assert (run.returncode == 0) is (code == 0), run.stderr
    assert last_checkpoint(tmp_path / "r")["step"] == step


def test_the_data_go_on_where_they_were_with_another_batch_size(images: Path, tmp_path: Path):
    """Samples are counted, not steps."""
    results, seen = tmp_path / "r", []
    vae_trainer(images, results, num_train_steps=3, batch_size=2).train()
    assert last_checkpoint(results)["samples"] == 6
    trainer = vae_trainer(
        images, results, num_train_steps=4, batch_size=1, grad_accum_every=3, resume=True
    )
    make_batches = trainer._batches
    trainer._batches = lambda data: seen.append(trainer.samples) or make_batches(data)  # type: ignore
    trainer.train()
    assert seen == [6]
    assert last_checkpoint(results)["samples"] == 9


def test_accelerates_environment_does_not_divide_gradients(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    norms = []
    for value in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
        AcceleratorState._reset_state(reset_partial_state=True)
        vae_trainer(images, tmp_path / value, num_train_steps=1).train()
        norms.append(logged(tmp_path / value)[0]["grad_norm"])
    assert norms[0] == norms[1]


def test_the_last_step_is_validated_drawn_and_saved_once(images: Path, tmp_path: Path):
    every: dict[str, Any] = dict(num_train_steps=2, sample_every=1, save_every=1)
    trainer = vae_trainer(images, tmp_path / "r", valid_fraction=0.3, **every)
    drawn, draw = [], trainer.draw
    trainer.draw = lambda path: drawn.append(path.name) or draw(path)  # type: ignore
    trainer.train()
    assert drawn == ["vae-00000001.png", "vae-00000002.png"]
    assert sum("valid_psnr" in line for line in metrics(tmp_path / "r")) == 2


def test_a_place_that_cannot_be_written_is_refused_before_any_work(images: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "r", Path("/proc/r")):
        with pytest.raises(ValueError, match=r"results_folder .*(is no folder|can be written)"):
            vae_trainer(tmp_path / "no images", folder)
    vae_trainer(images, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()  # a constructor makes no folder
