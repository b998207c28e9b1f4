"""The whole pipeline on real images: handwritten digits, drawn from their names.

Two tokenizers, base and super-resolution are trained from a folder of captioned images through
the trainers and their files; a plain classifier that knows the real digits reads what Muse draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import (
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    Muse,
    VQGanVAE,
    VQGanVAETrainer,
)
from muse_maskgit_pytorch.text import packaged_copy

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LOW, HIGH = 16, 32  # pixels
CODES = 240
PER_CLASS = 10


def write_digits(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir()
    rows = ["file_name,text"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        grey = Image.fromarray((image * 255 / 16).round().astype(np.uint8))
        grey.resize((HIGH, HIGH), Image.Resampling.BICUBIC).convert("RGB").save(folder / f"{i}.png")
        rows.append(f"{i}.png,a handwritten {NAMES[label]}")
    (folder / "metadata.csv").write_text("\n".join(rows))


def train_tokenizer(folder: Path, results: Path, image_size: int, **size: Any) -> VQGanVAE:
    vae = VQGanVAE(dim=16, codebook_size=CODES, quantizer="fsq", patch_size=image_size // 8, **size)
    VQGanVAETrainer(
        vae,
        folder=str(folder),
        image_size=image_size,
        batch_size=32,
        num_train_steps=300,
        lr=3e-3,
        warmup_steps=20,
        ema_decay=0.98,
        perceptual_weight=0,
        gan_weight=0,
        cache_images=True,
        sample_every=0,
        results_folder=str(results),
    ).train()
    return VQGanVAE.from_pretrained(results / "vae-ema.safetensors")


def train_maskgit(folder: Path, results: Path, steps: int, maskgit: MaskGit) -> MaskGit:
    MaskGitTrainer(
        maskgit,
        folder=str(folder),
        batch_size=32,
        num_train_steps=steps,
        lr=2e-3,
        warmup_steps=50,
        ema_decay=0.99,
        sample_every=0,
        results_folder=str(results),
    ).train()
    name = "superres" if maskgit.cond_image_size else "base"
    return MaskGit.from_pretrained(results / f"{name}-ema.safetensors")


def transformer(seq_len: int) -> MaskGitTransformer:
    size = dict(dim=64, depth=2, dim_head=16, heads=4, ff_mult=3, cond_depth=1)
    return MaskGitTransformer(num_tokens=CODES, seq_len=seq_len, t5_name=MINILM, **size)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_digits_are_recognised(tmp_path: Path):
    datasets = pytest.importorskip("sklearn.datasets")
    svm = pytest.importorskip("sklearn.svm")
    if packaged_copy(MINILM) is None:
        pytest.skip(f"{MINILM} is not installed")
    digits = datasets.load_digits()
    judge = svm.SVC(gamma=0.001).fit(digits.data[1000:], digits.target[1000:])
    assert judge.score(digits.data[:1000], digits.target[:1000]) > 0.9
    torch.manual_seed(0)
    folder = tmp_path / "digits"
    write_digits(folder, digits.images[:1000], digits.target[:1000])

    low = train_tokenizer(folder, tmp_path / "vae16", LOW, layers=1, channel_mults=[2, 3])
    high = train_tokenizer(folder, tmp_path / "vae32", HIGH, layers=0, channel_mults=[3])
    assert (low.fmap_size(LOW), high.fmap_size(HIGH)) == (4, 8)
    base = MaskGit(vae=low, transformer=transformer(16), image_size=LOW)
    base = train_maskgit(folder, tmp_path / "base", 800, base)
    superres = MaskGit(
        vae=high,
        cond_vae=low,
        transformer=transformer(64),
        image_size=HIGH,
        cond_image_size=LOW,
    )
    superres = train_maskgit(folder, tmp_path / "superres", 400, superres)

    wanted = np.repeat(np.arange(10), PER_CLASS)
    muse = Muse(base, superres)
    drawn = muse([f"a handwritten {NAMES[label]}" for label in wanted], seeds=0)
    assert {image.size for image in drawn} == {(HIGH, HIGH)}
    small = [image.convert("L").resize((8, 8), Image.Resampling.BOX) for image in drawn]
    read = judge.predict(np.stack([np.asarray(i, float).ravel() for i in small]) * 16 / 255)
    right = float((read == wanted).mean())
    print(f"{right:.0%} of {len(wanted)} drawn digits are recognised; by chance: 10%")
    assert right >= 0.6
    # and they are not one picture per name
    for label in range(10):
        pictures = {image.tobytes() for image, of in zip(drawn, wanted, strict=True) if of == label}
        assert len(pictures) >= PER_CLASS // 2
