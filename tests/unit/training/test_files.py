"""What a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import (
    CheckpointError,
    VQGanVAE,
)
from muse_maskgit_pytorch.training import loop as training
from muse_maskgit_pytorch.watching.health import Health
from tests.runs import (
    interrupt,
    logged,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    metrics,
    snapshot,
    vae_trainer,
)


def test_averaged_weights_come_with_the_codebook_as_it_is(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=4)
    trainer.train()
    raw, averaged = (
        VQGanVAE.from_pretrained(tmp_path / "r" / f"{name}.safetensors").state_dict()
        for name in ("vae", "vae-ema")
    )
    parameters = {name for name, _ in trainer.vae.named_parameters()}
    assert raw.keys() - parameters == {f"quantizer.inner.{n}" for n in ("codes", "sums", "counts")}
    for name, value in raw.items():
        assert torch.equal(value, averaged[name]) is (name not in parameters), name


def test_a_report_ends_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    vae_trainer(images, tmp_path / "whole").train()
    interrupt(vae_trainer(images, tmp_path / "stopped", num_train_steps=9), step=2)
    printed = capsys.readouterr().out
    for name in ("whole", "stopped"):
        page = (tmp_path / name / "report.html").read_text()
        assert "<html" in page
        assert "psnr" in page.lower()
        assert f"report: {tmp_path / name / 'report.html'}" in printed


def test_a_run_stopped_at_once_has_a_line_and_a_report(images: Path, tmp_path: Path):
    interrupt(vae_trainer(images, tmp_path / "r", num_train_steps=9, log_every=5), step=1)
    assert [line["step"] for line in logged(tmp_path / "r")] == [1]
    assert (tmp_path / "r" / "report.html").is_file()


def test_warnings_are_printed_and_logged(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    trainer = vae_trainer(images, tmp_path / "r")
    see = Health.see

    class Alarmed(Health):
        def see(self, line: Any, codes_full: bool = True) -> list[str]:
            assert see(self, line, codes_full) == []
            return ["the sky falls"] if line["step"] == 2 and "loss" in line else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Health", Alarmed)
        trainer.train()
    warned = [line for line in metrics(tmp_path / "r") if "warning" in line]
    assert warned == [{"stage": "vae", "step": 2, "warning": "the sky falls"}]
    assert "step 2: the sky falls" in capsys.readouterr().out
    assert "the sky falls" in (tmp_path / "r" / "report.html").read_text()


def test_remains_of_killed_processes_are_swept(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    interrupt(vae_trainer(images, results, num_train_steps=4), step=1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = "vae-checkpoint-00000009.safetensors"
    stale = [
        results / f".{name}.{ended.pid}.tmp",
        results / f".{name}.{os.getpid()}.tmp",  # an earlier life with our number: we write none
        results / f".vae-ema.safetensors.{ended.pid}.tmp",
    ]
    kept = [
        results / f".{name}.{os.getppid()}.tmp",  # of a process that lives
        results / f".{name}.notes.tmp",
        results / f".{name}.{10**30}.tmp",
        results / f".base-checkpoint-00000009.safetensors.{ended.pid}.tmp",  # of another stage
        results / f"{name}.{ended.pid}.tmp",
    ]
    for path in (*stale, *kept):
        path.write_bytes(b"half a file")
    vae_trainer(images, results, num_train_steps=2, resume=True).train()
    assert [path for path in stale if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_a_decoder_is_resumed_on_its_own_tokenizer_only(images: Path, tmp_path: Path):
    """A checkpoint of it holds no encoder: another one of the same shapes would go unseen."""
    vae_trainer(images, tmp_path, make_vae(1), decoder_only=True).train()
    with pytest.raises(CheckpointError, match="other frozen weights"):
        vae_trainer(images, tmp_path, make_vae(2), decoder_only=True, resume=True).train()
    vae_trainer(images, tmp_path, make_vae(1), decoder_only=True, resume=True).train()


def test_a_discriminator_that_does_not_fit_or_never_starts(images: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"discriminator_layers 5 .* use at most 4"):
        vae_trainer(images, tmp_path, gan_weight=0.1, gan_start=0, discriminator_layers=5)
    with pytest.warns(UserWarning, match="gan_start 9 comes after the last of 2 steps"):
        vae_trainer(images, tmp_path, gan_weight=0.1, gan_start=9, num_train_steps=2)


def test_settings_that_no_shape_shows_are_checked(images: Path, tmp_path: Path, t5: str):
    """Resumed with another loss weight or other heads, a run would silently be another."""
    vae_trainer(images, tmp_path / "vae").train()
    before = snapshot(tmp_path / "vae")
    other = make_vae(commitment_weight=0.5)
    with pytest.raises(CheckpointError, match=r"commitment_weight was 0\.25 and is 0\.5") as caught:
        vae_trainer(images, tmp_path / "vae", other, resume=True).train()
    assert "another model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path / "vae") == before
    same = make_vae(commitment_weight=0.25)  # the default, said or not
    vae_trainer(images, tmp_path / "vae", same, resume=True).train()

    maskgit_trainer(images, tmp_path / "base", make_maskgit(t5)).train()
    other_schedule = make_maskgit(t5, noise_schedule="linear")
    with pytest.raises(CheckpointError, match="noise_schedule was cosine and is linear"):
        maskgit_trainer(images, tmp_path / "base", other_schedule, resume=True).train()
    other_heads = make_maskgit(t5)
    resumed = maskgit_trainer(images, tmp_path / "base", other_heads, resume=True)
    other_heads.transformer._init_args["heads"] = 1  # its shapes would be the same
    with pytest.raises(CheckpointError, match=r"transformer\.config\.heads was 2 and is 1\)"):
        resumed.train()
    cooler = make_maskgit(t5, sample_options={"temperature": 0.5})  # no matter of training
    maskgit_trainer(images, tmp_path / "base", cooler, resume=True).train()
