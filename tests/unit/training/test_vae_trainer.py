"""The tokenizer's trainer: adversarial and perceptual terms, a decoder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_maskgit_pytorch import (
    VQGanVAE,
)
from muse_maskgit_pytorch.checkpoint import load_tree
from muse_maskgit_pytorch.training import gan
from muse_maskgit_pytorch.training import vae_trainer as vae_training
from muse_maskgit_pytorch.training.gan import generator_loss
from muse_maskgit_pytorch.training.perceptual import PerceptualLoss
from tests.runs import (
    GAN,
    PACE,
    assert_same,
    first_weight,
    last_checkpoint,
    logged,
    make_vae,
    metrics,
    vae_trainer,
)


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
    settings: dict[str, Any] = dict(gan_weight=1.0, gan_start=0, gan_adaptive=True, gan_ramp=0)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **settings)
    trainer._prepare()
    batch = torch.stack([trainer.dataset[i]["image"] for i in range(4)])
    judge = trainer.discriminator
    assert judge is not None
    recon, terms = trainer._generator_terms(batch, judge)
    last = trainer.vae.decoder[-1].get_parameter("weight")
    [together] = torch.autograd.grad(terms["loss"], last)
    again, _ = trainer.vae(batch)  # the long way
    adversarial = terms["gan_weight"] * generator_loss(judge(again), trainer.gan_loss)
    parts = (trainer.recon_weight * F.mse_loss(again, batch), adversarial)
    pulls = [torch.autograd.grad(x, last, retain_graph=True)[0] for x in parts]
    assert pulls[0].norm().item() == pytest.approx(pulls[1].norm().item(), rel=0.01)
    torch.testing.assert_close(together, pulls[0] + pulls[1], atol=1e-6, rtol=1e-4)
    assert terms["loss"].item() == pytest.approx(float(parts[0] + parts[1]), rel=1e-4)
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
        "lr", *PACE,
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
