"""Training of the image tokenizer: reconstruction, perceptual and adversarial terms.

Weights: the paper's 0.05 (perceptual) and 0.1 (adversarial) (A.2, table 5); the adversarial term
is switched on late, as VQGAN and MaskBit do, once there is something worth sharpening.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..arguments import one_of, real, whole
from ..data.dataset import ImageDataset, split
from ..data.folder import open_source
from ..data.order import Shares
from ..data.pixels import Crop, View
from ..data.stream import Held, RowStream
from ..images import image_grid
from ..vqgan_vae import VQGanVAE
from ..watching.health import CodeUsage
from ..watching.run_file import settings_of
from .gan import (
    Discriminator,
    GanLoss,
    accuracy,
    balance,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lecam,
    move_anchors,
)
from .guard import Diverged
from .loop import Trainer
from .losses import frozen
from .perceptual import PerceptualLoss

ReconLoss = Literal["l2", "l1"]
ANCHOR_DECAY = 0.99  # of LeCam's moving averages


class VQGanVAETrainer(Trainer):
    """Trains a `VQGanVAE` on images.

    Args:
        vae: the tokenizer.
        folder: images, searched recursively; the short form of ``data=folder``.
        data: where the images come from instead, see `MaskGitTrainer`; no captions are needed.
        image_size: side of the square crops, divisible by the tokenizer's factor.
        crop: "center", or "random": squares of random side and place for the training. They
            depend on the seed and the sample's position alone. Validation and pictures always see
            centre crops.
        crop_scale: smallest and largest side of the random crops, as a share of the image's
            shorter side, each in (0, 1].
        flip: mirror half of the training images, left to right.
        recon_loss: "l2" or "l1".
        recon_weight: weight of the reconstruction term.
        perceptual_weight: weight of the perceptual term; 0 switches it off.
        perceptual_model: Hugging Face image network, by name or path, or "efficientnet-lite0".
        perceptual_kind: "logits" (of a classifier) or "lpips" (features of all its stages).
        gan_weight: weight of the adversarial term; 0 switches it and the discriminator off.
        gan_loss: "hinge" or "non_saturating".
        gan_start: optimizer step from which the discriminator takes part.
        gan_ramp: optimizer steps over which the adversarial term then rises to its weight, so
            that the discriminator learns to see before the tokenizer listens.
        gan_adaptive: multiply the weight by the ratio of the gradients of reconstruction and
            adversarial term at the decoder's last layer (VQGAN). It is on because by itself it
            saved what all the other guards together saved (docs/tokenizer.md); the paper names a
            fixed weight.
        lecam_weight: weight of LeCam regularisation; 0 switches it off.
        gradient_penalty_weight: weight of R1 on the discriminator; 0 switches it off.
        discriminator_dim: channels of the discriminator's first layer.
        discriminator_layers: how often it halves the resolution.
        discriminator_lr: its peak learning rate; that of the tokenizer unless given.
        latent_noise: noise on what the decoder gets, see `VQGanVAE.forward`.
        decoder_only: train the decoder alone; encoder and codebook, and so all ids, stay as they
            are (paper 2.5; see `VQGanVAE.with_decoder`). Parameters that require no gradient are
            never trained.
        cache_images: keep the decoded images in memory: 3 bytes a pixel of the centre crops. With
            random crops the training images are kept whole, their shorter side reduced to
            image_size / crop_scale[0]: with the defaults four times the memory for square images.
        **common: see `Trainer`.
    """

    name = "vae"
    judged_by = ("psnr", 1)
    shown = ("loss", "psnr", "codebook_usage", "grad_norm")
    divisible = False  # small, and read by parts: gan_adaptive asks for a layer's gradient

    def __init__(
        self,
        vae: VQGanVAE,
        *,
        folder: str | None = None,
        data: Any = None,
        image_size: int,
        crop: Crop = "center",
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
        recon_loss: ReconLoss = "l2",
        recon_weight: float = 1.0,
        perceptual_weight: float = 0.05,
        perceptual_model: str = "microsoft/resnet-50",
        perceptual_kind: Literal["logits", "lpips"] = "logits",
        gan_weight: float = 0.1,
        gan_loss: GanLoss = "hinge",
        gan_start: int = 20_000,
        gan_ramp: int = 1_000,
        gan_adaptive: bool = True,
        lecam_weight: float = 0.001,
        gradient_penalty_weight: float = 0.0,
        discriminator_dim: int = 64,
        discriminator_layers: int = 3,
        discriminator_lr: float | None = None,
        latent_noise: float = 0.0,
        decoder_only: bool = False,
        cache_images: bool = False,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        **common: Any,
    ):
        settings = settings_of(locals())
        super().__init__(vae, betas=betas, weight_decay=weight_decay, **common)
        self.settings |= settings
        image_size = whole("image_size", image_size, 1)
        vae.fmap_size(image_size)
        self.recon_loss = one_of("recon_loss", recon_loss, ReconLoss)
        self.recon_weight = real("recon_weight", recon_weight, 0)
        self.perceptual_weight = real("perceptual_weight", perceptual_weight, 0)
        self.gan_weight = gan_weight = real("gan_weight", gan_weight, 0)
        self.gan_loss: GanLoss = one_of("gan_loss", gan_loss, GanLoss)
        self.gan_start = gan_start = whole("gan_start", gan_start, 0)
        self.gan_ramp = whole("gan_ramp", gan_ramp, 0)
        self.gan_adaptive = bool(gan_adaptive)
        self.lecam_weight = real("lecam_weight", lecam_weight, 0)
        self.gradient_penalty_weight = real("gradient_penalty_weight", gradient_penalty_weight, 0)
        discriminator_dim = whole("discriminator_dim", discriminator_dim, 1)
        discriminator_layers = whole("discriminator_layers", discriminator_layers, 1)
        if discriminator_lr is not None:
            discriminator_lr = real("discriminator_lr", discriminator_lr, 0)
        self.discriminator_lr = discriminator_lr
        self.latent_noise = real("latent_noise", latent_noise, 0)
        self.decoder_only = bool(decoder_only)
        if gan_weight > 0 and image_size >> discriminator_layers < 1:
            raise ValueError(
                f"discriminator_layers {discriminator_layers} halve images of {image_size} pixels "
                f"to nothing: use at most {image_size.bit_length() - 1}"
            )
        if gan_weight > 0 and gan_start >= self.num_train_steps:
            warnings.warn(
                f"gan_start {gan_start} comes after the last of {self.num_train_steps} steps: this "
                "run has no adversarial term; set gan_weight=0 to say so, or start it earlier",
                stacklevel=2,
            )
        last = vae.decoder[-1].weight
        if (
            gan_weight > 0
            and gan_adaptive
            and not (isinstance(last, Tensor) and last.requires_grad)
        ):
            raise ValueError(
                "gan_adaptive reads the gradient of the decoder's last layer, which is frozen: set "
                "gan_adaptive=False, or call requires_grad_(True) on it"
            )
        self.vae = vae
        self.image_size, self.cache_images = image_size, cache_images
        self.view = View(image_size, crop, crop_scale, flip, self.seed)
        # random crops need other pixels than the centre crops: `make_datasets` caches those
        cached = cache_images and not self.view.is_random
        source = open_source(data, folder, results_folder=self.results_folder, **self.reading)
        if isinstance(source, RowStream):
            if cache_images:
                raise ValueError(
                    "cache_images needs data with a length, not a stream: leave it out"
                )
            self.dataset = self._take_stream(source, self.view)
        else:
            self.dataset = ImageDataset(source, image_size, cache=cached)
        self.perceptual: nn.Module | None = None
        if self.perceptual_weight > 0:
            self.perceptual = PerceptualLoss(perceptual_model, perceptual_kind).to(self.device)
        self.discriminator: Discriminator | None = None
        if gan_weight > 0:
            self.discriminator = Discriminator(discriminator_dim, discriminator_layers)
        with frozen(self._left_out()):
            if not any(p.requires_grad for p in vae.parameters()):
                raise ValueError(
                    "nothing to train: all parameters of the tokenizer are frozen, as by a MaskGit "
                    "that uses it; call vae.requires_grad_(True) first"
                )
        self._ids: list[Tensor] = []  # of this step's images
        processes = self.parallel.world
        self.usage = CodeUsage(vae.codebook_size, self.device, processes)

    def _left_out(self) -> list[nn.Parameter]:
        """The parameters that ``decoder_only`` leaves as they are."""
        parts = [self.vae.encoder, self.vae.quantizer] if self.decoder_only else []
        return [parameter for part in parts for parameter in part.parameters()]

    def train(self) -> None:
        with frozen(self._left_out()):
            super().train()

    def make_datasets(self) -> tuple[Any, ImageDataset | None]:
        if self.stream:
            assert isinstance(self.dataset, Held)
            return self.stream, self.dataset if self.dataset.held else None
        train, valid = split(self.dataset, self.valid_fraction)
        if self.view.is_random:
            train = train.viewed(self.view, self.cache_images)
        return train, valid if len(valid) else None

    def modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"vae": self.vae}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    def lr_of(self, module: str) -> float:
        own = module == "discriminator" and self.discriminator_lr is not None
        return self.discriminator_lr if own else self.lr  # type: ignore[return-value]

    def health_facts(self) -> dict[str, Any]:
        return {
            "codebook_size": self.vae.codebook_size,
            "quantizer": self.vae.quantizer.kind,
            "idle_loss": 1.0 if self.gan_loss == "hinge" else math.log(2),
        }

    def windows(self) -> dict[str, Any]:
        return super().windows() | {"usage": self.usage}

    def codes_full(self) -> bool:
        return self.usage.full

    def measures(self) -> dict[str, float]:
        return self.usage.measure(self.parallel.reduce)

    def train_step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        self.vae.train()
        # moving averages have no gradient: the codes of a frozen quantizer must not learn either
        self.vae.quantizer.train(any(p.requires_grad for p in self.vae.quantizer.parameters()))
        judge = self.discriminator if self.step >= self.gan_start else None
        totals: dict[str, Tensor] = {}

        def note(terms: dict[str, Tensor]) -> None:
            for name, value in terms.items():
                share = value.detach() / self.grad_accum_every
                totals[name] = totals[name] + share if name in totals else share

        pairs = []
        with self.vae.quantizer.one_batch():
            for micro in range(self.grad_accum_every):
                images = next(batches)["image"].to(self.device, non_blocking=True)
                with self.accumulating(self.wrapped["vae"], micro):
                    recon, terms = self._generator_terms(images, judge)
                    self.backward(terms["loss"])
                note(terms)
                if judge is not None:
                    pairs.append((images, recon.detach()))
            self.changing()  # the codes learn as the block ends
        for ids in self._ids:
            self.usage.see(ids)
        self._ids.clear()
        totals["grad_norm"] = self.optimizer_step("vae")

        means = torch.zeros(2, device=self.device)  # scores of real and of generated patches
        for micro, (images, recon) in enumerate(pairs):
            with self.accumulating(self.wrapped["discriminator"], micro):
                terms, scores = self._discriminator_terms(images, recon)
                self.backward(terms["discriminator_loss"])
            note(terms)
            means += scores / self.grad_accum_every
        if judge is not None:
            totals["discriminator_grad_norm"] = self.optimizer_step("discriminator")
        if judge is not None and self.lecam_weight > 0:
            means = self.parallel.reduce(means, "mean")
            # of a batch with numbers only: the anchors are not the guard's to restore
            means = torch.where(means.isfinite(), means, judge.anchors)
            move_anchors(judge.anchors, means, ANCHOR_DECAY)
        return totals

    def _generator_terms(
        self, images: Tensor, judge: Discriminator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, and the terms of the tokenizer's loss; "loss" is their weighted sum."""
        with self.autocast():
            recon, quantized = self.wrapped["vae"](images, self.latent_noise)
        recon = recon.float()
        difference = F.mse_loss if self.recon_loss == "l2" else F.l1_loss
        terms = {"recon": difference(recon, images)}
        loss = self.recon_weight * terms["recon"]
        if self.perceptual is not None:
            with self.autocast():
                terms["perceptual"] = self.perceptual(recon, images)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if judge is not None:
            # it only judges here: its own gradients come from its own step
            judge.requires_grad_(False)
            with self.autocast():
                terms["generator"] = generator_loss(judge(recon), self.gan_loss)
            judge.requires_grad_(True)
            weight = torch.tensor(self.gan_weight * self._ramp(), device=self.device)
            if self.gan_adaptive:
                last = self.vae.decoder[-1].weight
                assert isinstance(last, nn.Parameter)
                mean = partial(self.parallel.reduce, how="mean")
                scaler = self.parallel.scaler
                scale = 1.0 if scaler is None else scaler.get_scale()
                # through the networks that judge once: what comes out of them is used twice
                ours, theirs = (
                    torch.autograd.grad(term * scale, recon)[0] / scale
                    for term in (loss, terms["generator"])
                )
                weight = weight * balance(recon, ours, theirs, last, mean, scale)
                pull = (recon * (ours + weight * theirs)).sum()
                loss = (loss + weight * terms["generator"]).detach() + (pull - pull.detach())
            else:
                loss = loss + weight * terms["generator"]
            terms["gan_weight"] = weight
        loss = loss + quantized.loss
        self._ids.append(quantized.ids)
        error = (recon.detach().clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
        terms["psnr"] = _psnr(error)
        return recon, terms | quantized.terms | {"loss": loss}

    def _ramp(self) -> float:
        """Share of its weight that the adversarial term has at this step, in (0, 1]."""
        return min(1.0, (self.step - self.gan_start + 1) / max(1, self.gan_ramp))

    def _discriminator_terms(
        self, images: Tensor, recon: Tensor
    ) -> tuple[dict[str, Tensor], Float[Tensor, "2"]]:
        """The terms of the discriminator's loss, "discriminator_loss" their weighted sum.

        And the mean scores of the real and of the generated patches.
        """
        assert self.discriminator is not None
        real = images.requires_grad_(self.gradient_penalty_weight > 0)
        with self.autocast():
            # one forward through the wrapper for both, as DistributedDataParallel wants it
            scores = self.wrapped["discriminator"](torch.cat([real, recon]))
        real_scores, fake_scores = scores.chunk(2)
        terms = {
            "discriminator": discriminator_loss(real_scores, fake_scores, self.gan_loss),
            "discriminator_accuracy": accuracy(real_scores, fake_scores),
        }
        loss = terms["discriminator"]
        if self.lecam_weight > 0:
            terms["lecam"] = lecam(real_scores, fake_scores, self.discriminator.anchors.clone())
            loss = loss + self.lecam_weight * terms["lecam"]
        if self.gradient_penalty_weight > 0:
            terms["gradient_penalty"] = gradient_penalty(real, real_scores)
            loss = loss + self.gradient_penalty_weight * terms["gradient_penalty"]
        means = torch.stack([real_scores.detach().mean(), fake_scores.detach().mean()])
        return terms | {"discriminator_loss": loss}, means.float()

    def validate(self, shares: Shares) -> dict[str, float]:
        """PSNR in dB (mean over images) and mean squared error."""
        sums = {"psnr": 0.0, "mse": 0.0}
        for _, counted, batch in shares:
            images = batch["image"].to(self.device)
            recon = self.vae(images)[0].float().clamp(0, 1)
            error = (recon - images).square().mean(dim=(1, 2, 3))
            sums["psnr"] += float(_psnr(error)) * counted
            sums["mse"] += float(error.mean()) * counted
        return {name: value / shares.count for name, value in self.parallel.sums(sums).items()}

    def draw(self, path: Path) -> dict[str, float]:
        """Images from all over the set above their reconstructions."""
        count = min(8, len(self.dataset))
        rows = [i * len(self.dataset) // count for i in range(count)]
        images = torch.stack([self.dataset[row]["image"] for row in rows])
        own = self.parallel.share(list(range(count)))
        recon = self.vae(images[own].to(self.device))[0].float().clamp(0, 1)
        recon = self.parallel.joined(recon, count).cpu()
        if not recon.isfinite().all():
            raise Diverged(
                f"what the averaged weights draw at step {self.step} is not finite: lower lr, or "
                "use mixed_precision bf16 or no; begin anew, in another results_folder"
            )
        if self.parallel.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            image_grid(torch.cat([images, recon]), columns=count).save(path)
        return {}


def _psnr(error: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB of squared errors, mean over images; at most 100."""
    return -10 * error.clamp(min=1e-10).log10().mean()
