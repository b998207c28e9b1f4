"""Trainers: losses, averaged weights, data order, checkpoints, resume, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from muse_maskgit_pytorch import (
    CheckpointError,
    ImageFolder,
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    TextEmbeds,
    TokenCache,
    TokenCritic,
    VQGanVAE,
    VQGanVAETrainer,
)
from muse_maskgit_pytorch.checkpoint import load_tree, save_tree
from muse_maskgit_pytorch.training import gan
from muse_maskgit_pytorch.training import loop as training
from muse_maskgit_pytorch.training import vae_trainer as vae_training
from muse_maskgit_pytorch.training.ema import EMA
from muse_maskgit_pytorch.training.guard import Diverged, Guard
from muse_maskgit_pytorch.training.loop import MAX_RESTARTS, Trainer
from muse_maskgit_pytorch.training.optimizers import (
    adamw,
    decayed,
    load_named_state,
    named_state,
    trained,
)
from muse_maskgit_pytorch.training.perceptual import PerceptualLoss
from muse_maskgit_pytorch.watching.health import Health
from muse_maskgit_pytorch.watching.log import Log

CAPTIONS = ["one", "two owls", "three red kites", "four", "five plums in a bowl", "six", "seven"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven captioned images of 16 px."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


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


# Averaged weights --------------------------------------------------------------------------------


def test_ema_follows_its_formula():
    weight, counter = torch.zeros(3), torch.tensor(0)
    ema = EMA({"weight": weight, "counter": counter}, {"weight"}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 20):
        weight.fill_(float(step))
        counter.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.average["weight"], expected)
        assert ema.average["counter"] == step
    assert torch.equal(weight, torch.full((3,), 19.0))


def test_ema_decay_is_obeyed():
    """With decay 0 the average is the weight itself, near 1 it hardly moves."""
    ends = {}
    for decay in (0.0, 0.999):
        weight = torch.zeros(1)
        ema = EMA({"weight": weight}, {"weight"}, decay)
        weight.fill_(1.0)
        ema.update(10**6)
        ends[decay] = ema.average["weight"].item()
    assert ends[0.0] == 1
    assert ends[0.999] == pytest.approx(0.001)


def test_ema_is_applied_within_the_block_alone():
    weight = torch.ones(2)
    ema = EMA({"weight": weight}, {"weight"}, 0.9)
    weight.fill_(5.0)

    def fail():
        with ema.applied():
            assert torch.equal(weight, torch.ones(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(weight, torch.full((2,), 5.0))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_ema_refuses(decay: float):
    with pytest.raises(ValueError, match="ema_decay"):
        EMA({}, (), decay)


# Adversarial and perceptual parts ----------------------------------------------------------------


def test_the_switch_of_the_gradient_penalty_has_an_effect(images: Path, tmp_path: Path):
    states = []
    for weight in (0.0, 10.0):
        results = tmp_path / f"penalty {weight}"
        torch.manual_seed(5)
        trainer = vae_trainer(
            images, results, gan_weight=0.1, gan_start=0, gradient_penalty_weight=weight
        )
        trainer.train()
        assert ("gradient_penalty" in metrics(results)[0]) == (weight > 0)
        assert trainer.discriminator is not None
        states.append(trainer.discriminator.state_dict())
    assert any(not torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_discriminator_learns_to_tell_real_from_fake(images: Path, tmp_path: Path):
    """Of the tokenizer one bias alone moves, as an optimizer needs something."""
    trainer = vae_trainer(
        images,
        tmp_path / "r",
        gan_weight=0.1,
        gan_adaptive=False,
        gan_start=0,
        num_train_steps=30,
        lr=2e-3,
    )
    trainer.vae.requires_grad_(False)
    trainer.vae.get_parameter("encoder.0.bias").requires_grad_(True)
    trainer.train()
    scores = [line["discriminator"] for line in metrics(tmp_path / "r") if "discriminator" in line]
    assert scores[-1] < 0.6 * scores[0]


def test_perceptual_network_is_frozen_normalised_and_in_eval_mode(resnet: str):
    loss = PerceptualLoss(resnet)
    loss.train()
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    seen: list[Tensor] = []
    loss.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    targets = torch.rand(2, 3, 32, 32)
    value = loss(images, targets)
    wanted = [(x - 0.5) / 0.25 for x in (targets, images)]  # what the model's own file says
    assert all(torch.allclose(a, b) for a, b in zip(seen, wanted, strict=True))
    value.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert value > 0


def test_perceptual_distance_of_equal_images_is_zero(resnet: str):
    images = torch.rand(2, 3, 32, 32)
    assert PerceptualLoss(resnet)(images, images.clone()) == 0


def test_perceptual_model_without_preprocessing_takes_imagenets(resnet: str, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(resnet).iterdir():
        if file.name != "preprocessor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    assert PerceptualLoss(str(bare)).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_perceptual_model_that_cannot_be_had(images: Path, tmp_path: Path):
    name = "nobody/nothing"
    with pytest.raises(ValueError, match="perceptual_weight=0") as caught:
        vae_trainer(images, tmp_path / "r", perceptual_weight=0.1, perceptual_model=name)
    message = str(caught.value)
    assert name in message
    assert "perceptual_model" in message
    assert "\n" not in message


def test_perceptual_network_stays_out_of_files(images: Path, tmp_path: Path, resnet: str):
    results = tmp_path / "r"
    trainer = vae_trainer(images, results, perceptual_weight=0.1, perceptual_model=resnet)
    assert trainer.perceptual is not None
    before = {k: v.clone() for k, v in trainer.perceptual.state_dict().items()}
    trainer.train()
    assert_same(dict(trainer.perceptual.state_dict()), before)
    tree, _ = load_tree(next(results.glob("*checkpoint*")))
    assert tree["modules"].keys() == {"vae"}
    assert tree["modules"]["vae"].keys() == trainer.vae.state_dict().keys()
    assert "perceptual" in metrics(results)[0]


@pytest.mark.parametrize("kind", ["vq", "simvq", "lfq", "bsq"])
def test_quantizer_loss_counts_without_the_gan(images: Path, tmp_path: Path, kind: str):
    """And moves the encoder: with both other terms off its weights still change."""
    results = tmp_path / "r"
    vae = make_vae(quantizer=kind)
    before = first_weight(vae).clone()
    vae_trainer(images, results, vae, recon_weight=0.0, weight_decay=0).train()
    line, weights = metrics(results)[0], vae.quantizer.weights
    terms = weights if kind in ("lfq", "bsq") else ["commitment"]
    assert all(line[name] != 0 for name in terms)
    assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in terms))
    assert not torch.equal(before, first_weight(vae))


def test_each_network_is_clipped_by_its_own_gradients(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = vae_trainer(
        images, tmp_path / "r", gan_weight=0.1, gan_start=0, max_grad_norm=0.01, weight_decay=0
    )
    original, seen = trainer.optimizer_step, []

    def spy(name: str) -> Tensor:
        modules = trainer.modules()
        (other,) = modules.keys() - {name}
        assert all(p.grad is None for p in modules[other].parameters())
        grads = [p.grad for p in modules[name].parameters() if p.grad is not None]
        own = torch.stack([g.norm() for g in grads]).norm()
        norm = original(name)
        assert torch.allclose(norm, own)
        seen.append(name)
        return norm

    monkeypatch.setattr(trainer, "optimizer_step", spy)
    trainer.train()
    assert seen == ["vae", "discriminator"] * 2


def test_gan_starts_when_it_is_told(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results, gan_weight=0.1, gan_start=2, num_train_steps=4).train()
    lines = logged(results)
    assert ["generator" in line for line in lines] == [False, False, True, True]


GAN: dict[str, Any] = dict(gan_weight=0.1, gan_start=0)


def test_gan_weight_rises_over_its_ramp(images: Path, tmp_path: Path):
    """The log says what the adversarial term weighs, and that is what it weighs in the loss."""
    settings: dict[str, Any] = dict(gan_weight=0.4, gan_start=2, gan_ramp=4, num_train_steps=8)
    settings |= dict(gan_adaptive=False)
    vae = make_vae(quantizer="fsq")
    vae_trainer(images, tmp_path / "r", vae, recon_weight=3.0, **settings).train()
    lines = logged(tmp_path / "r")
    weights = [line.get("gan_weight") for line in lines]
    assert weights[:2] == [None, None]
    assert weights[2:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    for line in lines[2:]:
        terms = 3 * line["recon"] + line["gan_weight"] * line["generator"]
        assert line["loss"] == pytest.approx(terms, rel=1e-4)
    assert all(line["discriminator_grad_norm"] > 0 for line in lines[2:])  # it learns at once
    vae_trainer(images, tmp_path / "no ramp", gan_ramp=0, gan_adaptive=False, **GAN).train()
    assert metrics(tmp_path / "no ramp")[0]["gan_weight"] == pytest.approx(0.1)


def test_adaptive_weight_is_logged(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ratios = []

    def spy(*arguments: Any) -> Tensor:
        ratios.append(gan.balance(*arguments))
        return ratios[-1]

    monkeypatch.setattr(vae_training, "balance", spy)
    settings: dict[str, Any] = dict(gan_adaptive=True, gan_ramp=2, grad_accum_every=2)
    vae_trainer(images, tmp_path / "r", **GAN, **settings).train()
    pairs = [(ratios[0] + ratios[1]) / 2, (ratios[2] + ratios[3]) / 2]
    wanted = [0.1 * ramp * float(ratio) for ramp, ratio in zip((0.5, 1.0), pairs, strict=True)]
    assert [line["gan_weight"] for line in logged(tmp_path / "r")] == pytest.approx(wanted)
    assert len({float(ratio) for ratio in ratios}) == 4


def test_adaptive_weight_makes_both_gradients_equal(images: Path, tmp_path: Path):
    trainer = vae_trainer(
        images, tmp_path / "r", gan_weight=1.0, gan_start=0, gan_adaptive=True, gan_ramp=0
    )
    trainer._prepare()
    batch = torch.stack([trainer.dataset[i]["image"] for i in range(4)])
    recon, terms = trainer._generator_terms(batch, trainer.discriminator)
    last = trainer.vae.decoder[-1].get_parameter("weight")
    parts = (terms["recon"], terms["gan_weight"] * terms["generator"])
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm().item() for x in parts]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    assert not terms["gan_weight"].requires_grad
    assert recon.shape == batch.shape


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_lecam_obeys_its_switch(images: Path, tmp_path: Path, weight: float):
    settings: dict[str, Any] = dict(lecam_weight=weight, num_train_steps=3)
    trainer = vae_trainer(images, tmp_path / "r", **GAN, **settings)
    trainer.train()
    lines = logged(tmp_path / "r")
    assert trainer.discriminator is not None
    assert ["lecam" in line for line in lines] == [weight > 0] * 3
    assert bool(trainer.discriminator.anchors.abs().sum() > 0) is (weight > 0)
    for line in lines:
        whole = line["discriminator"] + weight * line.get("lecam", 0)
        assert line["discriminator_loss"] == pytest.approx(whole, rel=1e-4)


def test_the_discriminators_learning_rate(images: Path, tmp_path: Path):
    for own, wanted in ((None, [0.5e-3, 1e-3]), (4e-3, [2e-3, 4e-3]), (0.0, [0, 0])):
        results = tmp_path / str(own)
        trainer = vae_trainer(images, results, **GAN, discriminator_lr=own)
        original, used = trainer.train_step, []

        def spy(batches: Any, trainer=trainer, original=original, used=used) -> Any:
            used.append([o.param_groups[0]["lr"] for o in trainer.optimizers.values()])
            return original(batches)

        trainer.train_step = spy  # type: ignore[method-assign]
        trainer.train()
        assert [vae for vae, _ in used] == pytest.approx([0.5e-3, 1e-3])  # warm-up
        assert [discriminator for _, discriminator in used] == pytest.approx(wanted)


def test_every_term_has_its_name_in_the_log(images: Path, tmp_path: Path, resnet: str):
    settings: dict[str, Any] = dict(perceptual_weight=0.1, perceptual_model=resnet)
    settings |= dict(gradient_penalty_weight=1.0, gan_start=1, gan_weight=0.1, max_grad_norm=1.0)
    vae = make_vae(quantizer="bsq")
    vae_trainer(images, tmp_path / "r", vae, valid_fraction=0.3, **settings).train()
    first, second, last = metrics(tmp_path / "r")
    always = {
        "stage", "step", "loss", "recon", "perceptual", "commitment", "entropy", "diversity",
        "psnr", "grad_norm", "codebook_usage", "codebook_perplexity", "skipped_steps", "restarts",
        "lr", "steps_per_s",
    }  # fmt: skip
    adversarial = {
        "generator", "gan_weight", "discriminator", "discriminator_accuracy", "lecam",
        "gradient_penalty", "discriminator_loss", "discriminator_grad_norm",
    }  # fmt: skip
    assert first.keys() == always
    assert second.keys() == always | adversarial
    assert last.keys() == {"stage", "step", "valid_psnr", "valid_mse"}
    terms = second["recon"] + 0.1 * second["perceptual"]
    terms += second["gan_weight"] * second["generator"]
    terms += sum(w * second[name] for name, w in vae.quantizer.weights.items())
    assert second["loss"] == pytest.approx(terms, rel=1e-4)
    terms = second["discriminator"] + 0.001 * second["lecam"] + second["gradient_penalty"]
    assert second["discriminator_loss"] == pytest.approx(terms, rel=1e-4)


def test_kinds_of_perceptual_term(images: Path, tmp_path: Path, resnet: str):
    values = []
    for kind in ("logits", "lpips"):
        settings: dict[str, Any] = dict(perceptual_weight=0.1, perceptual_model=resnet)
        trainer = vae_trainer(images, tmp_path / kind, perceptual_kind=kind, **settings)
        assert isinstance(trainer.perceptual, PerceptualLoss)
        assert trainer.perceptual.kind == kind
        trainer.train()
        values.append(metrics(tmp_path / kind)[0]["perceptual"])
    assert values[0] != values[1]
    with pytest.raises(ValueError, match=r"perceptual_kind must be one of .*lpips.*, not 'ssim'"):
        vae_trainer(images, tmp_path / "r", perceptual_kind="ssim", **settings)


# A decoder alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["vq", "simvq", "fsq"])
def test_a_decoder_trains_alone(images: Path, tmp_path: Path, quantizer: str):
    """And neither encoder nor codes move, not even those that are moving averages."""
    vae = make_vae(quantizer=quantizer)
    vae.train()(torch.rand(8, 3, 16, 16))
    vae = vae.eval().requires_grad_(False)  # as a model that uses it holds it
    larger = vae.with_decoder(None, 2)
    settings: dict[str, Any] = dict(decoder_only=True, latent_noise=0.1, num_train_steps=4)
    trainer = vae_trainer(images, tmp_path / "r", larger, **GAN, **settings)
    trainer.train()
    before = dict(vae.id_state())
    assert_same(dict(larger.id_state()), before)
    assert larger.same_ids(vae)
    for name in ("vae", "vae-ema"):
        saved = VQGanVAE.from_pretrained(tmp_path / "r" / f"{name}.safetensors")
        assert_same(dict(saved.id_state()), before)
        assert saved.config["decoder_res_blocks"] == 2
    assert all(name.startswith("decoder.") for name in last_checkpoint(tmp_path / "r")["ema"])
    start = vae.with_decoder(None, 2).decoder.state_dict()
    matrices = [k for k, v in larger.decoder.named_parameters() if v.ndim > 1]
    moved = [k for k in matrices if not torch.equal(larger.decoder.state_dict()[k], start[k])]
    assert moved == matrices


def test_a_tokenizer_in_use_can_be_trained_too(images: Path, tmp_path: Path):
    """It comes frozen, which is refused; a decoder's training leaves the rest trainable."""
    vae = make_vae().requires_grad_(False)
    for decoder_only in (False, True):
        with pytest.raises(ValueError, match=r"vae.requires_grad_\(True\)"):
            vae_trainer(images, tmp_path / "frozen", vae, decoder_only=decoder_only)
    vae.requires_grad_(True)
    vae_trainer(images, tmp_path / "decoder", vae, decoder_only=True).train()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    vae_trainer(images, tmp_path / "whole", vae).train()
    moved = {k.split(".")[0] for k, v in vae.state_dict().items() if (v != before[k]).any()}
    assert moved == {"encoder", "quantizer", "decoder"}


# The loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
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
            {k: v for k, v in line.items() if k not in ("stage", "steps_per_s")}
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
            for name, value in line.items()
            if name != "stage"
        )


def test_a_time_limit_ends_the_run_and_saves(images: Path, tmp_path: Path):
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


# Checkpoints -------------------------------------------------------------------------------------


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


def last_checkpoint(results: Path) -> dict[str, Any]:
    return load_tree(sorted(results.glob("*checkpoint*"))[-1])[0]


def last_state(results: Path) -> dict[str, Any]:
    """The newest checkpoint without the names of those before it."""
    return {name: value for name, value in last_checkpoint(results).items() if name != "written"}


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_an_interrupted_tokenizer_run_ends_as_an_unbroken_one(
    images: Path, tmp_path: Path, resnet: str, quantizer: str
):
    def trainer(name: str, seed: int, **changes: Any) -> VQGanVAETrainer:
        vae = make_vae(seed, quantizer=quantizer)
        return vae_trainer(
            images, tmp_path / name, vae, num_train_steps=6, gan_weight=0.1, gan_start=1,
            gradient_penalty_weight=1.0, perceptual_weight=0.1, perceptual_model=resnet, **changes,
        )  # fmt: skip

    trainer("unbroken", 0).train()
    torch.manual_seed(0)
    interrupt(trainer("broken", 0), step=3)
    assert last_checkpoint(tmp_path / "broken")["step"] == 3
    assert not (tmp_path / "broken" / "vae.safetensors").exists()
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))
    assert_same(
        load_tree(tmp_path / "broken" / "vae-ema.safetensors")[0]["state"],
        load_tree(tmp_path / "unbroken" / "vae-ema.safetensors")[0]["state"],
    )


@pytest.mark.parametrize("cached", [True, False])
def test_an_interrupted_transformer_run_ends_as_an_unbroken_one(
    images: Path, tmp_path: Path, t5: str, cached: bool
):
    def trainer(name: str, seed: int, **changes: Any) -> MaskGitTrainer:
        maskgit = make_maskgit(t5, seed, critic=True)
        changes |= dict(cache_tokens=cached, num_train_steps=6, grad_accum_every=2)
        return maskgit_trainer(images, tmp_path / name, maskgit, **changes)

    trainer("unbroken", 0).train()
    interrupt(trainer("broken", 0), step=3)
    trainer("broken", seed=1, resume=True).train()
    whole = last_state(tmp_path / "unbroken")
    assert_same(last_state(tmp_path / "broken"), whole)
    assert whole["step"] == 6
    steps = {float(s["step"]) for s in whole["optimizers"]["model"].values()}
    assert steps == {6.0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves(images: Path, tmp_path: Path, number: int):
    before = signal.getsignal(number)
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9)
    interrupt(trainer, step=2, number=number)
    assert trainer.step == 2
    assert last_checkpoint(tmp_path / "r")["step"] == 2
    assert signal.getsignal(number) is before


def test_resuming_a_finished_run_changes_nothing(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = load_tree(results / "vae.safetensors")[0]
    vae_trainer(images, results, make_vae(1), resume=True).train()
    assert_same(load_tree(results / "vae.safetensors")[0], before)


def test_a_folder_with_a_run_is_refused_and_left_alone(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = snapshot(results)
    with pytest.raises(CheckpointError, match="resume=True") as caught:
        vae_trainer(images, results).train()
    assert "\n" not in str(caught.value)
    assert snapshot(results) == before


@pytest.mark.parametrize(
    "other", [dict(dim=12), dict(quantizer="fsq"), dict(num_res_blocks=2), dict(layers=1)]
)
def test_a_checkpoint_of_another_model_is_refused(
    images: Path, tmp_path: Path, other: dict[str, Any]
):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = snapshot(results)
    vae = make_vae(**other)
    weights = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(CheckpointError, match="another model"):
        vae_trainer(images, results, vae, resume=True).train()
    assert snapshot(results) == before
    assert_same(dict(vae.state_dict()), weights)


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    path = next(results.glob("*checkpoint*"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=path.name):
        vae_trainer(images, results, resume=True).train()


def test_the_run_keeps_its_last_checkpoints_and_removes_nothing_else(images: Path, tmp_path: Path):
    """What it wrote before a resume counts; a checkpoint of another run is not its to delete."""
    results = tmp_path / "r"
    settings: dict[str, Any] = dict(num_train_steps=9, save_every=2, keep_checkpoints=2)
    interrupt(vae_trainer(images, results, **settings), step=5)
    assert checkpoints(results) == [4, 5]
    (results / "mine.safetensors").write_bytes(b"mine")
    (results / "vae-checkpoint-notes.txt").write_text("mine")
    (results / "vae-checkpoint-00000003.safetensors").write_bytes(b"another run's")
    (results / "base-checkpoint-00000002.safetensors").write_bytes(b"another stage's")
    vae_trainer(images, results, resume=True, **settings).train()
    left = sorted(path.name for path in results.iterdir() if path.is_file())
    assert left == [
        "base-checkpoint-00000002.safetensors",
        "metrics.jsonl",
        "mine.safetensors",
        "report.html",
        "vae-checkpoint-00000003.safetensors",
        "vae-checkpoint-00000008.safetensors",
        "vae-checkpoint-00000009.safetensors",
        "vae-checkpoint-notes.txt",
        "vae-ema.safetensors",
        "vae.safetensors",
    ]


def checkpoints(results: Path) -> list[int]:
    """Steps of the checkpoints that lie there."""
    return sorted(int(path.stem[-8:]) for path in results.glob("*checkpoint-*.safetensors"))


def test_saved_weights_load_as_models(images: Path, tmp_path: Path, t5: str):
    vae_results, results = tmp_path / "vae", tmp_path / "base"
    trainer = vae_trainer(images, vae_results)
    trainer.train()
    averaged = VQGanVAE.from_pretrained(vae_results / "vae-ema.safetensors")
    assert_same(dict(averaged.state_dict()), dict(trainer.ema.average))
    raw = VQGanVAE.from_pretrained(vae_results / "vae.safetensors")
    assert_same(dict(raw.state_dict()), dict(trainer.vae.state_dict()))
    assert not torch.equal(first_weight(raw), first_weight(averaged))
    make_vae(3).load(vae_results / "vae-ema.safetensors")

    maskgit = make_maskgit(t5)
    trainer = maskgit_trainer(images, results, maskgit)
    trainer.train()
    averaged = MaskGit.from_pretrained(results / "base-ema.safetensors")
    for name, value in trainer.ema.average.items():
        assert torch.equal(averaged.state_dict()[name], value)
    assert not any(name.startswith("vae.") for name in trainer.ema.average)


# Refusals ----------------------------------------------------------------------------------------


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


# Critics and caches ------------------------------------------------------------------------------


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("part", ["transformer", "critic", "all"])
def test_a_part_trains_alone(images: Path, tmp_path: Path, t5: str, part: str, own_head: bool):
    maskgit = make_maskgit(t5, critic=not own_head, self_token_critic=own_head)
    before = {k: v.clone() for k, v in maskgit.state_dict().items()}
    maskgit_trainer(
        images, tmp_path / "r", maskgit, part=part, num_train_steps=3, warmup_steps=0
    ).train()
    moved = {k.split(".")[0] for k, v in maskgit.state_dict().items() if (v != before[k]).any()}
    assert moved == ({"transformer", "critic"} if part == "all" else {part})


def test_training_leaves_the_tokenizer_alone(images: Path, tmp_path: Path, t5: str):
    """Neither its weights nor the codebook's running means move, and it stays in eval mode."""
    maskgit = make_maskgit(t5)
    before = {k: v.clone() for k, v in maskgit.vae.state_dict().items()}
    maskgit_trainer(images, tmp_path / "r", maskgit, sample_every=1, cache_tokens=False).train()
    assert_same(dict(maskgit.vae.state_dict()), before)
    assert not any(module.training for module in maskgit.vae.modules())


def superres(t5: str) -> MaskGit:
    torch.manual_seed(0)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    maskgit = MaskGit(
        vae=make_vae(1),
        cond_vae=make_vae(2, layers=1),
        transformer=MaskGitTransformer(**size),
        image_size=16,
        cond_image_size=8,
    )
    for module in maskgit.transformer.modules():  # zero at first: then nothing conditions
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return maskgit


@pytest.mark.parametrize("high", [True, False])
def test_cached_tokens_give_the_loss_of_the_images(images: Path, t5: str, high: bool):
    maskgit = superres(t5) if high else make_maskgit(t5)
    dataset = ImageFolder(images, 16, captions=True)
    cache = TokenCache(maskgit, dataset, batch_size=3)
    assert len(cache) == len(dataset)
    rows = [4, 0, 6]
    items = [dataset[row] for row in rows]
    batch = cache.__getitems__(rows)
    losses = []
    for arguments in (
        dict(images_or_ids=batch.ids, text_embeds=batch.text_embeds, cond_ids=batch.cond_ids),
        dict(
            images_or_ids=torch.stack([item["image"] for item in items]),
            texts=[item["text"] for item in items],
        ),
    ):
        torch.manual_seed(3)
        losses.append(maskgit(**arguments).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # texts are kept in half precision


def test_cached_captions_keep_their_order(images: Path, t5: str):
    maskgit = make_maskgit(t5)
    dataset = ImageFolder(images, 16, captions=True)
    cache = TokenCache(maskgit, dataset, batch_size=2)
    for row in range(len(dataset)):
        item, cached = dataset[row], cache[row]
        alone = maskgit.embed_texts([item["text"]])
        assert item["text"] == CAPTIONS[row]
        assert cached.text_embeds is not None
        assert cached.text_embeds.mask.all()
        assert cached.text_embeds.embeds.shape == alone.embeds.shape
        assert torch.allclose(cached.text_embeds.embeds, alone.embeds, atol=2e-3)
        assert cached.ids is not None
        assert torch.equal(cached.ids, maskgit.vae.encode_to_ids(item["image"][None]).flatten(1))


def test_cached_texts_need_not_be_padded_on_the_right(
    images: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    maskgit = make_maskgit(t5)

    def left(texts: list[str], **_: Any) -> TextEmbeds:
        lengths = torch.tensor([len(text) for text in texts])
        at = torch.arange(25) - 25 + lengths[:, None]
        embeds = at.float()[..., None].expand(-1, -1, 16)
        return TextEmbeds(embeds, at >= 0)

    monkeypatch.setattr(maskgit, "embed_texts", left)
    text = TokenCache(maskgit, ImageFolder(images, 16, captions=True))[1].text_embeds
    assert text is not None
    assert text.embeds[0, :, 0].tolist() == list(range(len(CAPTIONS[1])))


def test_a_diverging_run_stops_with_a_sentence_and_keeps_its_checkpoint(
    images: Path, tmp_path: Path
):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=6, save_every=2)
    original = trainer.train_step

    def poisoned(batches: Iterator[Any]) -> dict[str, Tensor]:
        terms = original(batches)
        return terms if trainer.step < 3 else terms | {"loss": torch.tensor(torch.nan)}

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="the loss is nan at step 4: lower lr"):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 2


def test_precisions_may_differ_from_trainer_to_trainer(images: Path, tmp_path: Path, t5: str):
    vae = make_vae()
    forward = vae.forward
    vae_trainer(images, tmp_path / "vae", vae, mixed_precision="bf16").train()
    assert vae.forward == forward  # not wrapped for good
    maskgit_trainer(images, tmp_path / "base", make_maskgit(t5), mixed_precision="no").train()


def test_what_is_frozen_stays_frozen_and_a_part_is_narrowed_for_its_run(
    images: Path, tmp_path: Path, t5: str
):
    model = make_maskgit(t5, critic=True)
    model.transformer.text_proj.requires_grad_(False)  # by the caller, as LoRA does
    before = {name: p.clone() for name, p in model.named_parameters()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}

    def moved() -> set[str]:
        return {
            name.split(".")[0]
            for name, p in model.named_parameters()
            if not torch.equal(p, before[name])
        }

    maskgit_trainer(images, tmp_path / "critic", model, part="critic").train()
    assert moved() == {"critic"}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    maskgit_trainer(images, tmp_path / "all", model).train()
    assert moved() == {"critic", "transformer"}
    assert torch.equal(model.transformer.text_proj.weight, before["transformer.text_proj.weight"])
    model.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train with part='transformer'"):
        maskgit_trainer(images, tmp_path / "none", model, part="transformer")


def test_each_masked_token_of_a_step_counts_alike(
    images: Path, tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    """Micro batches with few masked tokens and with many make the gradient of one large batch."""
    masks = torch.arange(16) < torch.tensor([1, 16, 3, 12])[:, None]
    found = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = make_maskgit(t5, cond_drop_prob=0.0)
        trainer = maskgit_trainer(
            images, tmp_path / f"r{batch_size}", model, batch_size=batch_size,
            grad_accum_every=accumulate, num_train_steps=1, valid_fraction=0,
        )  # fmt: skip
        shares = iter(masks.split(batch_size))
        monkeypatch.setattr(model, "draw_mask", lambda rows, shares=shares: next(shares))
        grads: dict[str, Tensor] = {}

        def keep(name: str, model=model, grads=grads) -> Tensor:
            grads |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return torch.ones(())

        trainer.optimizer_step = keep  # type: ignore[method-assign]
        monkeypatch.setattr(trainer, "save", lambda: None)
        monkeypatch.setattr(trainer, "_look", lambda: None)
        trainer.train()
        [line] = metrics(tmp_path / f"r{batch_size}")
        found.append((line["loss"], grads))
    (loss, whole), *others = found
    assert whole["transformer.to_logits.weight"].abs().max() > 1e-3
    for other, grads in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert grads.keys() == whole.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-7, msg=name)


def test_validation_is_a_mean_over_masked_tokens(images: Path, tmp_path: Path, t5: str):
    figures = []
    for batch_size in (7, 2):
        trainer = maskgit_trainer(
            images, tmp_path / "r", make_maskgit(t5), batch_size=batch_size, cache_tokens=False
        )
        trainer.model.to(trainer.device).eval()
        loader = torch.utils.data.DataLoader(
            trainer.dataset, batch_size=batch_size, collate_fn=trainer.collate
        )
        torch.manual_seed(3)
        with torch.no_grad():
            figures.append(trainer.validate(loader))
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert figures[0]["loss"] == figures[0]["ce"]


def test_the_critics_term_is_in_the_log(images: Path, tmp_path: Path, t5: str):
    maskgit_trainer(images, tmp_path / "r", make_maskgit(t5, critic=True)).train()
    lines = [line for line in metrics(tmp_path / "r") if "loss" in line]
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + line["critic"], rel=1e-5)
    maskgit_trainer(images, tmp_path / "plain", make_maskgit(t5)).train()
    assert all("ce" not in line for line in metrics(tmp_path / "plain"))


def test_no_checkpoint_is_written_over_a_good_one_once_the_loss_is_no_number(
    images: Path, tmp_path: Path
):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9, save_every=1, log_every=50)
    original = trainer.train_step

    def poisoned(batches: Iterator[Any]) -> dict[str, Tensor]:
        terms = original(batches)
        return terms if trainer.step < 4 else terms | {"loss": torch.tensor(torch.nan)}

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 4


def test_a_checkpoint_leaves_the_tokenizers_out(images: Path, tmp_path: Path, t5: str):
    vae = make_vae(123)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    model = MaskGit(
        vae=vae, transformer=MaskGitTransformer(**size), image_size=16, cond_image_size=8
    )
    maskgit_trainer(images, tmp_path / "r", model).train()
    saved = last_checkpoint(tmp_path / "r")["modules"]["model"]
    assert saved
    assert all(name.startswith("transformer.") for name in saved)


def test_resume_takes_the_settings_of_today(images: Path, tmp_path: Path):
    vae_trainer(images, tmp_path / "r", num_train_steps=2).train()
    again = vae_trainer(
        images, tmp_path / "r", num_train_steps=3, resume=True, betas=(0.5, 0.6), weight_decay=0.7
    )
    again.train()
    assert {group["betas"] for group in again.optimizers["vae"].param_groups} == {(0.5, 0.6)}
    assert [g["weight_decay"] for g in again.optimizers["vae"].param_groups] == [0.7, 0.0]


# The guard ---------------------------------------------------------------------------------------


def judged(guard: Guard, *norms: float) -> list[bool]:
    """One step with each of these gradient norms; whether it may be taken."""
    return [(guard.allows("vae", norm), guard.must_return())[0] for norm in norms]


def test_guard_refuses_leaps_above_the_moving_average():
    guard = Guard(max_spike=10, max_skips=5)
    assert all(judged(guard, *[1.0] * Guard.FIRST))
    assert judged(guard, 9.9, 11.5, 1.0) == [True, False, True]  # the average is 1.09 then
    assert guard.skipped == 1
    assert guard.in_a_row == 0
    average = 1.0
    for norm in (9.9, 10 * 1.089, 1.0):  # a leap counts as far as it is allowed
        average = 0.99 * average + 0.01 * norm
    assert guard.state()["_average"] == {"vae": pytest.approx(average)}


def test_guard_trusts_its_average_only_after_some_steps():
    guard = Guard(max_spike=10, max_skips=5)
    assert all(judged(guard, *[1.0] * (Guard.FIRST - 1), 1e6))
    assert judged(guard, 2e6) == [False]  # but then
    assert judged(Guard(10, 5), math.nan, 1.0, math.inf) == [False, True, False]


def test_guard_keeps_numbers_that_are_none_out_of_its_average():
    guard = Guard(max_spike=10, max_skips=500)
    judged(guard, math.nan, *[2.0] * Guard.FIRST)
    before = guard.state()["_average"]
    assert before == {"vae": pytest.approx(2)}
    assert not any(judged(guard, math.nan, math.inf, -math.inf))
    assert guard.state()["_average"] == before


def test_guard_accepts_a_lasting_new_level():
    """Norms 30 times those of before: the average follows, until they are no leap."""
    guard = Guard(max_spike=10, max_skips=500)
    judged(guard, *[1.0] * Guard.FIRST)
    answers = judged(guard, *[30.0] * 100)
    first = answers.index(True)
    assert 5 < first < 20
    assert all(answers[first:])


def test_guard_judges_each_optimizer_by_its_own_norms():
    guard = Guard(max_spike=10, max_skips=2)
    for _ in range(Guard.FIRST):
        assert guard.allows("vae", 1.0)
        assert guard.allows("discriminator", 100.0)
        assert not guard.must_return()
    assert guard.allows("discriminator", 900.0)
    assert not guard.allows("vae", 20.0)
    assert not guard.allows("discriminator", math.nan)
    assert not guard.must_return()
    assert guard.counts() == {"skipped_steps": 1, "restarts": 0}  # one step, both optimizers
    assert not guard.allows("vae", math.nan)
    assert guard.must_return()


def test_guard_counts_what_a_return_costs():
    guard = Guard(max_spike=10, max_skips=3)
    judged(guard, 1.0, math.nan, math.nan)
    assert guard.in_a_row == 2
    history = guard.state() | {"skipped": 3}
    guard.load(Guard(max_spike=10, max_skips=3).state())  # what the checkpoint knew
    guard.returned(history, steps=4)
    assert guard.lr_factor == 0.5
    assert guard.in_a_row == 0
    assert guard.lost_steps == 5  # and the one in which it returned
    assert guard.counts() == {"skipped_steps": 3, "restarts": 1}
    again = Guard(max_spike=7, max_skips=9)
    again.load(guard.state())
    assert vars(again) == vars(guard) | {"max_spike": 7, "max_skips": 9}


def test_a_lasting_new_level_is_accepted_after_some_returns():
    """A checkpoint that forgot the new level would bring the same skips for ever."""
    guard = Guard(max_spike=10, max_skips=5)
    judged(guard, *[1.0] * Guard.FIRST)
    known = guard.state()
    assert not any(judged(guard, *[16.5] * 5))
    while not any(judged(guard, *[16.5] * 5)):
        history = guard.state()
        guard.load(known)
        guard.returned(history, steps=1)
    assert guard.restarts < 3


def test_guard_switched_off():
    assert all(judged(Guard(max_spike=0, max_skips=1), math.nan, math.inf, 1e30))


def poison(trainer: VQGanVAETrainer, factors: dict[int, float]) -> list[int]:
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


def test_bad_steps_are_skipped_and_counted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Guard, "FIRST", 3)
    settings: dict[str, Any] = dict(num_train_steps=8, warmup_steps=0, max_grad_norm=0)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **GAN, **settings)
    poison(trainer, {2: math.nan, 4: 1e6, 6: math.inf})
    original, moved = trainer.train_step, []

    def spy(batches: Iterator[Any]) -> dict[str, Tensor]:
        modules = trainer.modules().values()
        before = [p.detach().clone() for m in modules for p in m.parameters()]
        terms = original(batches)
        after = [p for m in modules for p in m.parameters()]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return terms

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.train()
    assert moved == [True, True, False, True, False, True, False, True]
    lines = logged(tmp_path / "r")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[2]["grad_norm"] is None  # JSON has no NaN
    assert lines[4]["grad_norm"] > 1e3 * lines[3]["grad_norm"]
    assert all(line["restarts"] == 0 for line in lines)


def test_a_run_returns_to_its_last_good_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Two bad steps in a row: then other data, half the learning rate, and a word of it."""
    settings: dict[str, Any] = dict(num_train_steps=8, warmup_steps=0, lr_schedule="constant")
    settings |= dict(save_every=2, max_skips=2, keep_checkpoints=9)
    results = tmp_path / "r"
    trainer = vae_trainer(images, results, make_vae(quantizer="fsq"), **settings)
    seen = poison(trainer, {5: math.nan, 6: math.nan})
    original, states, seeds = trainer.train_step, [], set()

    def spy(batches: Iterator[Any]) -> dict[str, Tensor]:
        seeds.add(torch.initial_seed())
        state = {k: v.clone() for k, v in trainer.vae.state_dict().items()}
        states.append((state, trainer.optimizers["vae"].param_groups[0]["lr"]))
        return original(batches)

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.train()
    # step 6 would be saved, but after a skipped step nobody knows whether the weights are good
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert trainer.step == 8
    assert len(seeds) == 11  # the random numbers of a failed step do not come again either
    assert checkpoints(results) == [2, 4, 6, 8]
    assert_same(states[7][0], states[4][0])  # as they were after step 4
    assert not torch.equal(states[5][0]["encoder.0.weight"], states[4][0]["encoder.0.weight"])
    assert [lr for _, lr in states] == pytest.approx([1e-3] * 7 + [0.5e-3] * 4)
    lines = metrics(results)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    last = [line for line in lines if "loss" in line][-1]
    assert (last["skipped_steps"], last["restarts"]) == (2, 1)
    assert last["lr"] == pytest.approx(0.5e-3)
    warned = [line["warning"] for line in lines if "warning" in line]
    (told,) = [text for text in warned if "back to" in text]
    assert "2 steps in a row were skipped at step 6: back to vae-checkpoint-00000004" in told
    assert f"step 4: {told}" in capsys.readouterr().out
    assert "back to vae-checkpoint-00000004" in (results / "report.html").read_text()


def test_after_a_return_come_the_data_that_follow(images: Path, tmp_path: Path):
    """Those of the position, whatever the step is called."""
    settings: dict[str, Any] = dict(save_every=2, max_skips=1, valid_fraction=0)
    pictures: dict[str, list[Tensor]] = {}
    for name, factors, steps in (("returned", {2: math.nan}, 5), ("straight", {}, 6)):
        vae = make_vae(quantizer="fsq")
        trainer = vae_trainer(images, tmp_path / name, vae, num_train_steps=steps, **settings)
        poison(trainer, factors)
        seen = pictures[name] = []
        vae.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].clone()))
        trainer.train()
    for returned, straight in zip(*(found[:6] for found in pictures.values()), strict=True):
        assert torch.equal(returned, straight)


def test_a_run_that_cannot_return_stops_with_a_sentence(images: Path, tmp_path: Path):
    everywhere = dict.fromkeys(range(3, 99), math.nan)
    trainer = vae_trainer(images, tmp_path / "early", num_train_steps=9, max_skips=3)
    poison(trainer, everywhere)
    with pytest.raises(Diverged, match="3 steps in a row had to be skipped at step 5") as caught:
        trainer.train()
    assert "there is no checkpoint yet: lower lr" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoints(tmp_path / "early") == []

    settings: dict[str, Any] = dict(num_train_steps=9, max_skips=2, save_every=3)
    trainer = vae_trainer(images, tmp_path / "late", **settings)
    poison(trainer, everywhere)
    with pytest.raises(Diverged, match="2 steps in a row had to be skipped at step 4, as before"):
        trainer.train()
    assert trainer.guard.restarts == MAX_RESTARTS
    assert checkpoints(tmp_path / "late") == [3]
    assert last_checkpoint(tmp_path / "late")["guard"]["restarts"] == 0


def test_without_the_guard_a_bad_gradient_ends_the_run(images: Path, tmp_path: Path):
    settings: dict[str, Any] = dict(num_train_steps=6, save_every=2, max_spike=0)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **settings)
    poison(trainer, {3: math.nan})
    with pytest.raises(Diverged, match="not finite at step 4, and are not saved: lower lr"):
        trainer.train()
    assert trainer.guard.counts() == {"skipped_steps": 0, "restarts": 0}
    assert not first_weight(trainer.vae).isfinite().all()
    assert last_checkpoint(tmp_path / "r")["step"] == 2  # of finite weights


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_resume_after_a_return_is_exact(images: Path, tmp_path: Path, quantizer: str):
    def trainer(name: str, seed: int = 0, **changes: Any) -> VQGanVAETrainer:
        settings: dict[str, Any] = dict(num_train_steps=8, save_every=3, max_skips=2)
        settings |= dict(latent_noise=0.1, lecam_weight=0.1)
        vae = make_vae(seed, quantizer=quantizer)
        made = vae_trainer(images, tmp_path / name, vae, **GAN, **settings, **changes)
        poison(made, {4: math.nan, 5: math.nan, 9: math.inf})
        return made

    torch.manual_seed(0)
    trainer("unbroken").train()
    torch.manual_seed(0)
    interrupt(trainer("broken"), step=7)
    kept = last_checkpoint(tmp_path / "broken")
    assert (kept["step"], kept["guard"]["restarts"], kept["guard"]["lost_steps"]) == (7, 1, 3)
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))
    last = logged(tmp_path / "broken")[-1]
    assert (last["skipped_steps"], last["restarts"]) == (3, 1)


def test_half_precisions_scaler_survives_a_skipped_step(images: Path, tmp_path: Path):
    """It must hear of every gradient it has unscaled; a GPU is needed for the rest of fp16."""
    settings: dict[str, Any] = dict(num_train_steps=4, max_skips=9, **GAN)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **settings)
    trainer.parallel.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.parallel.accelerator.native_amp = True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    trainer.guard._seen, trainer.guard._average = {"vae": Guard.FIRST}, {"vae": 1e-9}
    trainer.train()  # every gradient of the tokenizer is a leap, none of the discriminator's
    last = logged(tmp_path / "r")[-1]
    assert last["skipped_steps"] == 4
    assert all(
        math.isfinite(line["discriminator_grad_norm"])
        for line in metrics(tmp_path / "r")
        if "loss" in line
    )


def test_half_precision_does_not_excuse_a_loss_that_is_no_number(images: Path, tmp_path: Path):
    """The scaler takes any gradient that is not finite for an overflow of its own."""
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=4, gan_weight=0, log_every=1)
    trainer.parallel.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.parallel.accelerator.native_amp = True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    poison(trainer, {1: math.nan})
    trainer.train()
    assert logged(tmp_path / "r")[-1]["skipped_steps"] == 1


# What a run leaves behind ------------------------------------------------------------------------


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


def test_a_run_stopped_before_its_first_line_has_no_report(images: Path, tmp_path: Path):
    interrupt(vae_trainer(images, tmp_path / "r", num_train_steps=9, log_every=5), step=2)
    assert last_checkpoint(tmp_path / "r")["step"] == 2
    assert not (tmp_path / "r" / "report.html").exists()


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
    other_heads.transformer._init_args["heads"] = 1  # its shapes would be the same
    with pytest.raises(CheckpointError, match=r"transformer\.config\.heads was 2 and is 1\)"):
        maskgit_trainer(images, tmp_path / "base", other_heads, resume=True).train()
    cooler = make_maskgit(t5, sample_options={"temperature": 0.5})  # no matter of training
    maskgit_trainer(images, tmp_path / "base", cooler, resume=True).train()


# What must not be destroyed, and how a run ends ---------------------------------------------------


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


# Optimizers --------------------------------------------------------------------------------------


def test_what_weight_decay_leaves_alone(t5: str):
    maskgit = make_maskgit(t5)
    maskgit.vae.requires_grad_(False)
    left = {n for n, p in maskgit.named_parameters() if p.requires_grad} - decayed(maskgit)
    kinds = {name.split(".")[-1] for name in left if maskgit.get_parameter(name).ndim > 1}
    assert kinds == {"weight", "row", "column", "null_kv"}
    tables = {n for n in left if n.endswith(".weight") and maskgit.get_parameter(n).ndim > 1}
    assert (
        tables
        == {f"{name}.weight" for name, m in maskgit.named_modules() if isinstance(m, nn.Embedding)}
        & left
    )
    assert all(maskgit.get_parameter(n).ndim > 1 for n in decayed(maskgit))
    assert any("to_logits" in n or "to_q" in n or "ff" in n for n in decayed(maskgit))


def test_optimizer_state_of_older_checkpoints_is_mapped(t5: str):
    """They number the parameters with all matrices first, whatever they are."""
    model = make_maskgit(t5)
    model.vae.requires_grad_(False)
    parameters = trained(model)
    names = [n for n, p in parameters.items() if p.ndim > 1]
    names += [n for n, p in parameters.items() if p.ndim <= 1]
    state = {
        name: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.full_like(parameters[name], i),
            "exp_avg_sq": torch.full_like(parameters[name], i),
        }
        for i, name in enumerate(names)
    }
    old = {"state": dict(enumerate(state.values())), "param_groups": []}
    for saved in (old, state):
        optimizer = adamw(model, 1e-3, (0.9, 0.99), 0.1)
        load_named_state(model, optimizer, saved)
        assert_same(
            dict(sorted(named_state(model, optimizer).items())), dict(sorted(state.items()))
        )
