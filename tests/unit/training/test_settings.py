"""Settings that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import (
    make_maskgit,
    maskgit_trainer,
    vae_trainer,
)


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("grad_accum_every", 0),
        ("num_train_steps", 0),
        ("log_every", 0),
        ("save_every", -5),
        ("keep_checkpoints", 0),
        ("sample_every", -1),
        ("warmup_steps", -1),
        ("lr", -1e-3),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("valid_fraction", 1.0),
        ("valid_fraction", -0.1),
        ("ema_decay", 1.0),
        ("max_minutes", -1.0),
        ("max_minutes", 0.0),
        ("num_workers", -1),
        ("lr_schedule", "cosin"),
        ("cooldown_share", 1.5),
        ("optimizer", "adam"),
        ("recon_loss", "huber"),
        ("recon_weight", -1.0),
        ("perceptual_weight", -1.0),
        ("gan_weight", -1.0),
        ("gan_start", -1),
        ("gradient_penalty_weight", -1.0),
        ("gan_ramp", -1),
        ("gan_loss", "wasserstein"),
        ("lecam_weight", -0.1),
        ("discriminator_lr", -1e-4),
        ("discriminator_layers", 0),
        ("latent_noise", -0.1),
        ("max_spike", -1.0),
        ("max_skips", 0),
        ("discriminator_dim", 0),
        ("image_size", 0),
        ("image_size", 18),
    ],
)
def test_what_the_tokenizers_trainer_refuses(images: Path, tmp_path: Path, name: str, value: Any):
    arguments: dict[str, Any] = {"gan_weight": 0.1, name: value}
    with pytest.raises(ValueError, match=name.replace("_", ".")) as caught:
        vae_trainer(images, tmp_path / "r", **arguments)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value", [("num_samples", 0), ("part", "critic"), ("part", "head")])
def test_what_the_transformers_trainer_refuses(
    images: Path, tmp_path: Path, t5: str, name: str, value: Any
):
    with pytest.raises(ValueError, match=name):
        maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), **{name: value})


def test_a_missing_folder_is_refused(tmp_path: Path, t5: str):
    with pytest.raises(ValueError, match="does not exist"):
        vae_trainer(tmp_path / "nowhere", tmp_path / "r")
    with pytest.raises(ValueError, match="does not exist"):
        maskgit_trainer(tmp_path / "nowhere", tmp_path / "r", make_maskgit(t5))


def test_captions_are_needed(images: Path, tmp_path: Path, t5: str):
    for path in images.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match="caption"):
        maskgit_trainer(images, tmp_path / "r", make_maskgit(t5))
