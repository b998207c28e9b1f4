"""What is said of a run before its first step."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from muse_maskgit_pytorch.watching.start import count_parameters, defeats, summary

SETTINGS: dict[str, Any] = dict(
    num_train_steps=900, batch_size=4, grad_accum_every=4, warmup_steps=90, lr=1e-4,
    mixed_precision="bf16",
)  # fmt: skip


def described(images: int = 3600, **settings: Any) -> dict[str, Any]:
    return {
        "stage": "base",
        "settings": SETTINGS | settings,
        "data": {
            "source": "image folder 'cats'",
            "items": images + 73,
            "held_back": 73,
            "left_out": {"have no caption": 12},
        },
        "device": {"kind": "cuda (A Card)", "processes": 2, "fast precisions": ["bf16"]},
        "parameters": {
            "trained": {"transformer": 12_345_678, "critic": 940},
            "frozen": {"vae": 4_560_000},
        },
    }


def test_the_summary():
    assert summary(described(), 256, [300, 640, 256]) == [
        "base: 3,600 images to train on, 73 held back for validation, of image folder 'cats'",
        "left out: 12 that have no caption",
        "sizes: largest crops of 256 to 640 px, trained at 256",
        "parameters: transformer 12.3 M, critic 940; vae 4.56 M stay as they are",
        "device: cuda (A Card), bfloat16, 2 processes",
        "steps: 900 of 32 images each, 112 to an epoch: 8 epochs in all",
    ]
    assert list(defeats(described(), 256, [300, 640, 256])) == []


def test_what_is_not_is_not_mentioned():
    run = described(mixed_precision="no")
    run["data"]["left_out"], run["parameters"]["frozen"] = {}, {}
    run["device"]["processes"] = 1
    lines = summary(run, 256, [])
    assert not any(line.startswith(("left out", "sizes")) for line in lines)
    assert "parameters: transformer 12.3 M, critic 940" in lines
    assert "device: cuda (A Card), float32" in lines


@pytest.mark.parametrize(
    ("images", "batch", "words"),
    [
        (20, 40, "of 80 images each, 0.25 to an epoch: 3,600 epochs in all"),
        (36_000, 16, "of 32 images each, 1,125 to an epoch: 0.8 epochs in all"),
    ],
)
def test_epochs(images: int, batch: int, words: str):
    run = described(images, batch_size=batch, grad_accum_every=1)
    assert words in summary(run, 256, [])[-1]


def test_a_warm_up_longer_than_the_run_is_named():
    run = described(warmup_steps=1000, num_train_steps=150)
    (warning,) = defeats(run, 256, [])
    assert "warmup_steps=1,000 is longer than the run" in warning
    assert "ends at 15% of lr=0.0001" in warning
    assert "set warmup_steps to 15 " in warning
    assert not list(defeats(described(warmup_steps=150, num_train_steps=150), 256, []))


def test_a_precision_that_the_device_computes_in_software_is_named():
    (warning,) = defeats(described(mixed_precision="fp16"), 256, [])
    assert "float16 in software" in warning
    assert "set mixed_precision=no" in warning
    assert not list(defeats(described(mixed_precision="no"), 256, []))


def test_enlarged_images_are_named():
    (warning,) = defeats(described(), 256, [64, 64, 72, 300])
    assert "3 of 4 looked at are smaller than image_size=256 (typically 64 px)" in warning
    assert not list(defeats(described(), 256, [64, 300, 300]))  # a few
    assert not list(defeats(described(), 256, [256, 256]))


def test_a_learning_rate_of_nothing_is_named():
    (warning,) = defeats(described(lr=0), 256, [])
    assert "nothing is learnt" in warning


def test_parameters_by_part():
    model = nn.ModuleDict({"transformer": nn.Linear(3, 4), "vae": nn.Linear(2, 2, bias=False)})
    model["vae"].requires_grad_(False)
    judge = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    counts = count_parameters({"model": model, "discriminator": judge})
    assert counts == {"trained": {"transformer": 16, "discriminator": 4}, "frozen": {"vae": 4}}
