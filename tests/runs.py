"""Small training runs, for the tests of the trainers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import (
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    TokenCritic,
    VQGanVAE,
    VQGanVAETrainer,
)
from muse_maskgit_pytorch.checkpoint import load_tree
from muse_maskgit_pytorch.training.loop import Trainer

CAPTIONS = ["one", "two owls", "three red kites", "four", "five plums in a bowl", "six", "seven"]


def make_vae(seed: int = 0, **changes: Any) -> VQGanVAE:
    torch.manual_seed(seed)
    size: dict[str, Any] = dict(dim=8, vq_codebook_size=16, layers=2, num_res_blocks=1)
    return VQGanVAE(**(size | changes))


def first_weight(vae: VQGanVAE) -> Tensor:
    return vae.state_dict()["encoder.0.weight"]


def make_maskgit(t5: str, seed: int = 0, critic: bool = False, **changes: Any) -> MaskGit:
    vae = make_vae(123)
    torch.manual_seed(seed)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    token_critic = TokenCritic(**size) if critic else None
    transformer = MaskGitTransformer(**size)
    return MaskGit(
        vae=vae, transformer=transformer, image_size=16, token_critic=token_critic, **changes
    )


# Of a log's line: how fast it went, which no two runs have alike.
PACE = {"steps_per_s", "data_wait", "images_per_s", "hours_left"}
COMMON: dict[str, Any] = dict(
    batch_size=2, num_train_steps=2, lr=1e-3, warmup_steps=2, sample_every=0, log_every=1
)


RECONSTRUCTION: dict[str, Any] = dict(perceptual_weight=0, gan_weight=0)


def vae_trainer(
    images: Path, results: Path, vae: VQGanVAE | None = None, **changes: Any
) -> VQGanVAETrainer:
    size: dict[str, Any] = dict(image_size=16, discriminator_dim=8)
    arguments = COMMON | RECONSTRUCTION | size | changes
    vae = make_vae() if vae is None else vae
    return VQGanVAETrainer(vae, folder=str(images), results_folder=str(results), **arguments)


def maskgit_trainer(
    images: Path, results: Path, maskgit: MaskGit, **changes: Any
) -> MaskGitTrainer:
    arguments: dict[str, Any] = {**COMMON, "num_samples": 2, **changes}
    return MaskGitTrainer(maskgit, folder=str(images), results_folder=str(results), **arguments)


def metrics(results: Path) -> list[dict[str, Any]]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    lines = (results / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def logged(results: Path) -> list[dict[str, Any]]:
    """The lines of training steps."""
    return [line for line in metrics(results) if "loss" in line]


def assert_same(a: Any, b: Any, at: str = "") -> None:
    """Equal to the last bit, in any nesting."""
    assert type(a) is type(b), at
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), f"{at}: {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}.{i}")
    else:
        assert a == b, at


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(trainer: Trainer, step: int, number: int = signal.SIGINT) -> None:
    """Train, and press Ctrl-C within this step."""
    original = trainer.train_step

    def pressed(batches: Iterator[Any]) -> dict[str, Tensor]:
        if trainer.step == step - 1:
            signal.raise_signal(number)
        return original(batches)

    trainer.train_step = pressed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def poison(trainer: Trainer, factors: dict[int, float]) -> list[int]:
    """Multiply the gradients made from the batch at these positions of the data.

    Returns:
        the positions that the run comes to, in this order.
    """
    train_step, backward, seen = trainer.train_step, trainer.backward, []

    def step(batches: Iterator[Any]) -> dict[str, Tensor]:
        seen.append(trainer.step + trainer.guard.lost_steps)
        return train_step(batches)

    def spoiled(loss: Tensor) -> None:
        backward(loss * factors.get(seen[-1], 1.0))

    trainer.train_step = step  # type: ignore[method-assign]
    trainer.backward = spoiled  # type: ignore[method-assign]
    return seen


def last_checkpoint(results: Path) -> dict[str, Any]:
    return load_tree(sorted(results.glob("*checkpoint*"))[-1])[0]


def last_state(results: Path) -> dict[str, Any]:
    """The newest checkpoint without the names of those before it."""
    return {name: value for name, value in last_checkpoint(results).items() if name != "written"}


def checkpoints(results: Path) -> list[int]:
    """Steps of the checkpoints that lie there."""
    return sorted(int(path.stem[-8:]) for path in results.glob("*checkpoint-*.safetensors"))


GAN: dict[str, Any] = dict(gan_weight=0.1, gan_start=0)
