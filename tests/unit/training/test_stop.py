"""Ctrl-C: answered at once, and nothing is lost by it."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import MaskGit, VQGanVAETrainer
from tests.runs import (
    GAN,
    assert_same,
    checkpoints,
    interrupt,
    last_state,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    vae_trainer,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_is_answered_at_once(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    trainer, said = vae_trainer(images, tmp_path / "r", num_train_steps=9), []
    train_step = trainer.train_step

    def pressed(batches: Any) -> Any:
        if trainer.step == 1:
            capfd.readouterr()
            press()
            said.append(capfd.readouterr().err)
        return train_step(batches)

    trainer.train_step = pressed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert said == ["\nstopping after this step; again to stop now and lose it\n"]
    assert checkpoints(tmp_path / "r") == [2]


def twice(trainer: VQGanVAETrainer, step: int) -> None:
    """Press twice within the step, before its gradients are used."""
    backward = trainer.backward

    def pressed(loss: Any) -> None:
        backward(loss)
        if trainer.step == step - 1:
            press()
            press()

    trainer.backward = pressed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_a_second_one_costs_one_step(images: Path, tmp_path: Path, quantizer: str):
    """All the steps before it are saved, and the resumed run is the unbroken one."""

    def trainer(name: str, seed: int = 0, **changes: Any) -> VQGanVAETrainer:
        vae = make_vae(seed, quantizer=quantizer)
        return vae_trainer(images, tmp_path / name, vae, num_train_steps=5, **GAN, **changes)

    trainer("unbroken").train()
    before = [signal.getsignal(number) for number in SIGNALS]
    twice(trainer("broken"), step=4)
    assert checkpoints(tmp_path / "broken") == [3]
    assert (tmp_path / "broken" / "vae-ema.safetensors").exists()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))


def test_a_step_that_changes_weights_is_finished(images: Path, tmp_path: Path):
    """Half of it would be saved as if it were none of it."""
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=5, **GAN)
    step = trainer.optimizer_step

    def pressed(name: str) -> Any:
        norm = step(name)
        if trainer.step == 2 and name == "vae":  # the discriminator's turn is still to come
            press()
            press()
            press()
        return norm

    trainer.optimizer_step = pressed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints(tmp_path / "r") == [3]


@pytest.mark.parametrize("where", ["validate", "draw"])
def test_a_second_one_while_looking_leaves_the_weights_whole(
    images: Path, tmp_path: Path, where: str
):
    """The averaged weights stand in the model then, and must not be taken for its own."""

    def trainer(name: str, seed: int = 0, **changes: Any) -> VQGanVAETrainer:
        settings: dict[str, Any] = dict(num_train_steps=4, sample_every=2, valid_fraction=0.3)
        return vae_trainer(images, tmp_path / name, make_vae(seed), **settings, **changes)

    trainer("unbroken").train()
    broken = trainer("broken")

    def pressed(*arguments: Any) -> Any:
        press()
        press()

    setattr(broken, where, pressed)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert checkpoints(tmp_path / "broken") == [2]
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))


def test_while_data_are_encoded(
    images: Path, tmp_path: Path, t5: str, capfd: pytest.CaptureFixture
):
    maskgit = make_maskgit(t5)
    trainer = maskgit_trainer(images, tmp_path / "r", maskgit, num_train_steps=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskGit, "embed_texts", lambda *a, **k: press())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert "nothing is lost" in capfd.readouterr().err
    assert not (tmp_path / "r" / ".lock").exists()
    assert checkpoints(tmp_path / "r") == []


def test_processes_that_load_data_leave_it_to_the_run(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    """A terminal sends Ctrl-C to all of them, a scheduler SIGTERM; they end when the run does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a pool, of which each process gets a thread before it can say a word
    torch.set_num_threads(threads)
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9, num_workers=1)
    batches, step, loading = trainer._batches, trainer.train_step, []

    def spied(data: Any) -> Any:
        loading.append(batches(data))
        return loading[0]

    def signalled(made: Any) -> Any:
        if trainer.step == 1:  # it loads by now
            for number in SIGNALS:
                subprocess.run(["kill", f"-{number}", str(loading[0]._workers[0].pid)], check=True)
        return step(made)

    trainer._batches, trainer.train_step = spied, signalled  # type: ignore[method-assign]
    interrupt(trainer, step=3)
    assert checkpoints(tmp_path / "r") == [3]
    assert capfd.readouterr().err.count("stopping") == 1
    (worker,) = loading[0]._workers
    assert worker.is_alive()  # nobody has let go of it
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_step_that_fails_halfway_says_that_it_is_not_exact(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for half in (True, False):
        trainer = vae_trainer(images, tmp_path / str(half), num_train_steps=5, **GAN)

        def failing(name: str, trainer=trainer, half=half, step=trainer.optimizer_step) -> Any:
            if trainer.step == 2 and name == "discriminator" and half:
                raise torch.OutOfMemoryError("too large")
            return step(name)

        def failing_before(loss: Any, trainer=trainer, backward=trainer.backward) -> None:
            if trainer.step == 2:
                raise torch.OutOfMemoryError("too large")
            backward(loss)

        if half:
            trainer.optimizer_step = failing  # type: ignore[method-assign]
        else:
            trainer.backward = failing_before  # type: ignore[method-assign]
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
        assert checkpoints(tmp_path / str(half)) == [2]
        assert ("no longer exact" in capsys.readouterr().out) is half
