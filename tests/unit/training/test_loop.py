"""The loop: steps, accumulation, precision, what is logged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch.watching.health import Health
from muse_maskgit_pytorch.watching.log import Log
from tests.runs import (
    COMMON,
    GAN,
    PACE,
    assert_same,
    last_checkpoint,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    metrics,
    snapshot,
    vae_trainer,
)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "linear", "cooldown"])
def test_learning_rate(images: Path, tmp_path: Path, schedule: str):
    trainer = vae_trainer(
        images, tmp_path / "r", num_train_steps=110, warmup_steps=10, lr_schedule=schedule
    )
    factors = []
    for trainer.step in range(111):
        factors.append(trainer._lr_factor())
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    if schedule == "constant":
        assert set(factors[10:]) == {1.0}
    elif schedule == "linear":
        assert factors[10:] == pytest.approx([1 - i / 100 for i in range(101)])
    elif schedule == "cooldown":  # over the last fifth
        assert set(factors[10:90]) == {1.0}
        assert factors[90:] == pytest.approx([1 - i / 20 for i in range(21)])
        trainer.step, trainer.max_minutes, trainer._minutes = 30, 10.0, 9.0
        assert trainer._lr_factor() == pytest.approx(0.5)  # by the clock, which is ahead
    else:
        assert factors[60] == pytest.approx(0.505)
        assert factors[35] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
        assert factors[110] == pytest.approx(0.01)
        assert factors[10:] == sorted(factors[10:], reverse=True)


def test_the_optimizer_uses_the_scheduled_rate(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=4, warmup_steps=2, lr=0.5e-3)
    used, original = [], trainer.train_step

    def spy(batches: Iterator[Any]) -> dict[str, Tensor]:
        used.append(trainer.optimizers["vae"].param_groups[0]["lr"])
        return original(batches)

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.train()
    assert used[:3] == pytest.approx([0.25e-3, 0.5e-3, 0.5e-3])
    assert used[3] < used[2]
    logged = [line["lr"] for line in metrics(tmp_path / "r") if "lr" in line]
    assert logged == pytest.approx(used)


def test_weight_decay_is_on_matrices_alone(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", weight_decay=0.1)
    trainer._prepare()
    matrices, rest = trainer.optimizers["vae"].param_groups
    assert matrices["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in rest["params"])


def test_optimizers_list_parameters_in_the_order_of_the_module(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r")
    trainer._prepare()
    names = {id(p): name for name, p in trainer.vae.named_parameters()}
    listed = [names[id(p)] for g in trainer.optimizers["vae"].param_groups for p in g["params"]]
    parameters = list(trainer.vae.named_parameters())
    expected = [n for n, p in parameters if p.ndim > 1] + [n for n, p in parameters if p.ndim <= 1]
    assert listed == expected


def test_accumulated_gradients_are_those_of_the_whole_batch(images: Path, tmp_path: Path):
    """FSQ has no batch statistics, so 2 x 2 images and 4 images are one mean.

    For the discriminator too, with all its terms, over two steps.
    """
    runs = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        results = tmp_path / f"r{accumulate}"
        trainer = vae_trainer(
            images, results, make_vae(quantizer="fsq"), **GAN, gan_ramp=0, lecam_weight=1.0,
            gradient_penalty_weight=1.0, gan_adaptive=False, batch_size=batch_size,
            grad_accum_every=accumulate,
            valid_fraction=0, warmup_steps=0,
        )  # fmt: skip
        original, grads = trainer.optimizer_step, {}

        def spy(name: str, trainer=trainer, original=original, grads=grads) -> Tensor:
            for key, parameter in trainer.modules()[name].named_parameters():
                assert parameter.grad is not None
                grads[f"{trainer.step} {name} {key}"] = parameter.grad.clone()
            return original(name)

        trainer.optimizer_step = spy  # type: ignore[method-assign]
        trainer.train()
        weights = {
            f"{n} {k}": v for n, m in trainer.modules().items() for k, v in m.state_dict().items()
        }
        lines = [
            {k: v for k, v in line.items() if k not in {"stage", *PACE}}
            for line in metrics(results)
        ]
        runs.append((grads, weights, lines))
    (whole, weights, lines), (parts, other_weights, other_lines) = runs
    assert whole.keys() == parts.keys()
    assert {name.split()[1] for name in whole} == {"vae", "discriminator"}
    for name, grad in whole.items():
        torch.testing.assert_close(grad, parts[name], rtol=1e-3, atol=2e-5, msg=name)
    for name, value in weights.items():  # Adam enlarges the rounding of tiny gradients
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=1e-4, msg=name)
    for line, other in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-3)


def test_bf16(images: Path, tmp_path: Path, t5: str, resnet: str):
    trainer = vae_trainer(
        images, tmp_path / "vae", mixed_precision="bf16", gan_weight=0.1, gan_start=0,
        gradient_penalty_weight=1.0, perceptual_weight=0.1, perceptual_model=resnet,
    )  # fmt: skip
    trainer.train()
    assert {p.dtype for p in trainer.vae.parameters()} == {torch.float32}
    maskgit = make_maskgit(t5, critic=True)
    maskgit_trainer(images, tmp_path / "base", maskgit, mixed_precision="bf16").train()
    assert {p.dtype for p in maskgit.parameters()} == {torch.float32}
    for folder in ("vae", "base"):
        lines = metrics(tmp_path / folder)
        assert all(
            math.isfinite(value)
            for line in lines
            for value in line.values()
            if not isinstance(value, str)  # the stage; that this processor has no bfloat16
        )


def test_a_time_limit_ends_the_run_and_saves(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a clock that a busy machine does not delay."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: 0.02 * next(ticks))
    monkeypatch.setattr("muse_maskgit_pytorch.training.loop.time", clock)
    results = tmp_path / "r"
    trainer = vae_trainer(
        images, results, num_train_steps=10**6, warmup_steps=0, max_minutes=0.01, save_every=10**6
    )
    trainer.train()
    assert 0 < trainer.step < 10**6
    assert last_checkpoint(results)["step"] == trainer.step
    assert (results / "vae-ema.safetensors").is_file()
    rates = [line["lr"] for line in metrics(results) if "lr" in line]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * COMMON["lr"]  # it follows the clock


def test_loading_processes_change_nothing(images: Path, tmp_path: Path):
    states = []
    for workers in (0, 1):
        vae = make_vae()
        vae_trainer(images, tmp_path / f"r{workers}", vae, num_workers=workers).train()
        states.append(dict(vae.state_dict()))
    assert_same(states[0], states[1])


def test_metrics_files_and_pictures(images: Path, tmp_path: Path, t5: str):
    results = tmp_path / "r"
    maskgit = make_maskgit(t5)
    maskgit_trainer(
        images, results, maskgit, num_train_steps=5, sample_every=2, valid_fraction=0.3
    ).train()
    lines = metrics(results)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert {line["step"] for line in lines if "valid_loss" in line} == {2, 4, 5}
    pictures = sorted(path.name for path in (results / "samples").iterdir())
    assert pictures == [f"base-0000000{i}.png" for i in (2, 4, 5)]
    with Image.open(results / "samples" / pictures[0]) as picture:
        picture.load()
    assert (results / "base.safetensors").is_file()
    assert not [path for path in results.rglob("*") if "tmp" in path.name]


def test_validation_does_not_touch_the_training(images: Path, tmp_path: Path, t5: str):
    states = []
    for every in (0, 1):
        maskgit = make_maskgit(t5)
        maskgit_trainer(
            images, tmp_path / f"r{every}", maskgit, sample_every=every, valid_fraction=0.3
        ).train()
        states.append(dict(maskgit.state_dict()))
    assert_same(states[0], states[1])


def test_a_perfect_reconstruction_is_still_valid_json(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", valid_fraction=0.3)
    log = Log(trainer.results_folder, "vae", Health("vae"), print)
    log.add(0, {"psnr": math.inf, "loss": math.nan})
    assert metrics(tmp_path / "r")[0]["step"] == 0


def test_one_image_is_enough(images: Path, tmp_path: Path):
    """Nothing is left for validation then."""
    for path in sorted(images.glob("*.png"))[1:]:
        path.unlink()
    vae_trainer(images, tmp_path / "r").train()


def test_the_constructor_writes_nothing(
    images: Path, tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    folders = sorted(tmp_path.rglob("*"))
    vae_trainer(images, Path("./results"))
    maskgit_trainer(images, Path("./results"), make_maskgit(t5)).cuda()
    assert snapshot(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == folders


def test_a_broken_image_does_not_end_the_run(images: Path, tmp_path: Path, t5: str):
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:300])
    (images / "3.png").write_bytes(b"no image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vae_trainer(images, tmp_path / "vae", num_train_steps=6, valid_fraction=0).train()
        maskgit_trainer(images, tmp_path / "base", make_maskgit(t5), num_train_steps=6).train()
    messages = " ".join(str(w.message) for w in caught)
    assert "2.png" in messages
    assert "3.png" in messages
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "vae"))
