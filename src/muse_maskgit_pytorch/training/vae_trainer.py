"""Training of the image tokenizer: reconstruction, perceptual and adversarial terms.

Weights: the paper's 0.05 (perceptual) and 0.1 (adversarial) (A.2, table 5); the adversarial term
is switched on late, as VQGAN and MaskBit do, once there is something worth sharpening.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.folder import ImageFolder, split
from ..images import image_grid
from ..vqgan_vae import VQGanVAE
from .gan import Discriminator, discriminator_loss, generator_loss, gradient_penalty
from .perceptual import PerceptualLoss
from .trainer import Trainer


class VQGanVAETrainer(Trainer):
    """Trains a `VQGanVAE` on a folder of images.

    Args:
        vae: the tokenizer.
        folder: images, searched recursively.
        image_size: side of the square crops, divisible by the tokenizer's factor.
        recon_loss: "l2" or "l1".
        recon_weight: weight of the reconstruction term.
        perceptual_weight: weight of the perceptual term; 0 switches it off.
        perceptual_model: Hugging Face image classifier, by name or path.
        gan_weight: weight of the adversarial term; 0 switches it and the discriminator off.
        gan_start: optimizer step from which the discriminator takes part.
        gradient_penalty_weight: weight of R1 on the discriminator; 0 switches it off.
        discriminator_dim: channels of the discriminator's first layer.
        quantizer_weight: weight of the quantizer's own loss.
        cache_images: keep the decoded images in memory (3 bytes a pixel).
        **common: see `Trainer`.
    """

    name = "vae"

    def __init__(
        self,
        vae: VQGanVAE,
        *,
        folder: str,
        image_size: int,
        recon_loss: Literal["l2", "l1"] = "l2",
        recon_weight: float = 1.0,
        perceptual_weight: float = 0.05,
        perceptual_model: str = "microsoft/resnet-50",
        gan_weight: float = 0.1,
        gan_start: int = 20_000,
        gradient_penalty_weight: float = 0.0,
        discriminator_dim: int = 64,
        quantizer_weight: float = 1.0,
        cache_images: bool = False,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        **common: Any,
    ):
        super().__init__(vae, betas=betas, weight_decay=weight_decay, **common)
        vae.fmap_size(image_size)
        if recon_loss not in ("l2", "l1"):
            raise ValueError(f"recon_loss must be l2 or l1, not {recon_loss!r}")
        if discriminator_dim < 1:
            raise ValueError(f"discriminator_dim must be at least 1, not {discriminator_dim}")
        notnegative = dict(recon_weight=recon_weight, perceptual_weight=perceptual_weight)
        notnegative |= dict(gan_weight=gan_weight, gan_start=gan_start)
        notnegative |= dict(gradient_penalty_weight=gradient_penalty_weight)
        for name, value in (notnegative | dict(quantizer_weight=quantizer_weight)).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        self.vae = vae
        self.folder, self.image_size, self.cache_images = folder, image_size, cache_images
        self.recon_loss, self.recon_weight = recon_loss, recon_weight
        self.gan_weight, self.gan_start = gan_weight, gan_start
        self.gradient_penalty_weight = gradient_penalty_weight
        self.quantizer_weight = quantizer_weight
        self.perceptual_weight = perceptual_weight
        self.dataset = ImageFolder(folder, image_size, cache=cache_images)
        self.perceptual: nn.Module | None = None
        if perceptual_weight > 0:
            self.perceptual = PerceptualLoss(perceptual_model).to(self.device)
        self.discriminator = Discriminator(discriminator_dim) if gan_weight > 0 else None

    def make_datasets(self) -> tuple[Dataset, Dataset | None]:
        train, valid = split(self.dataset, self.valid_fraction)
        return train, valid if len(valid) else None

    def modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"vae": self.vae}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    def _prepare(self) -> None:
        if self.accelerator.num_processes > 1:
            # "vq" codes follow the batches of all processes. VectorQuantize decides that when it
            # is made, which is before the processes have met.
            codebooks: list[Any] = [m for m in self.vae.modules() if hasattr(m, "all_reduce_fn")]
            for codebook in codebooks:
                codebook.all_reduce_fn = torch.distributed.all_reduce
        super()._prepare()

    def train_step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        self.vae.train()
        judge = self.discriminator if self.step >= self.gan_start else None
        totals: dict[str, Tensor] = {}

        def note(terms: dict[str, Tensor]) -> None:
            for name, value in terms.items():
                share = value.detach() / self.grad_accum_every
                totals[name] = totals[name] + share if name in totals else share

        pairs = []
        for micro in range(self.grad_accum_every):
            images = next(batches)["image"].to(self.device, non_blocking=True)
            with self.accumulating(self.wrapped["vae"], micro):
                recon, terms = self._generator_terms(images, judge)
                self.backward(terms["loss"])
            note(terms)
            if judge is not None:
                pairs.append((images, recon.detach()))
        totals["grad_norm"] = self.optimizer_step("vae")

        for micro, (images, recon) in enumerate(pairs):
            with self.accumulating(self.wrapped["discriminator"], micro):
                terms = self._discriminator_terms(images, recon)
                self.backward(terms["discriminator_loss"])
            note(terms)
        if pairs:
            totals["discriminator_grad_norm"] = self.optimizer_step("discriminator")
        return totals

    def _generator_terms(
        self, images: Tensor, judge: Discriminator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, and the terms of the tokenizer's loss; "loss" is their weighted sum."""
        with self.autocast():
            recon, quantized = self.wrapped["vae"](images)
        recon = recon.float()
        difference = F.mse_loss if self.recon_loss == "l2" else F.l1_loss
        terms = {"recon": difference(recon, images), "quantizer": quantized.loss}
        loss = self.recon_weight * terms["recon"] + self.quantizer_weight * terms["quantizer"]
        if self.perceptual is not None:
            with self.autocast():
                terms["perceptual"] = self.perceptual(recon, images)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if judge is not None:
            # it only judges here: its own gradients come from its own step
            judge.requires_grad_(False)
            with self.autocast():
                terms["generator"] = generator_loss(judge(recon))
            judge.requires_grad_(True)
            loss = loss + self.gan_weight * terms["generator"]
        return recon, terms | {"loss": loss, "codebook_usage": quantized.usage}

    def _discriminator_terms(self, images: Tensor, recon: Tensor) -> dict[str, Tensor]:
        """The terms of the discriminator's loss; "discriminator_loss" is their weighted sum."""
        real = images.requires_grad_(self.gradient_penalty_weight > 0)
        with self.autocast():
            # one forward through the wrapper for both, as DistributedDataParallel wants it
            scores = self.wrapped["discriminator"](torch.cat([real, recon]))
        real_scores, fake_scores = scores.chunk(2)
        terms = {"discriminator": discriminator_loss(real_scores, fake_scores)}
        loss = terms["discriminator"]
        if self.gradient_penalty_weight > 0:
            terms["gradient_penalty"] = gradient_penalty(real, real_scores)
            loss = loss + self.gradient_penalty_weight * terms["gradient_penalty"]
        return terms | {"discriminator_loss": loss}

    def validate(self, loader: DataLoader) -> dict[str, float]:
        """PSNR in dB (mean over images) and mean squared error."""
        errors = []
        for batch in loader:
            images = batch["image"].to(self.device)
            recon = self.vae(images)[0].float().clamp(0, 1)
            errors.append((recon - images).square().mean(dim=(1, 2, 3)))
        error = torch.cat(errors)
        return {"psnr": float(-10 * error.log10().mean()), "mse": float(error.mean())}

    def draw(self, path: Path) -> None:
        """Images from all over the set above their reconstructions."""
        count = min(8, len(self.dataset))
        rows = [i * len(self.dataset) // count for i in range(count)]
        images = torch.stack([self.dataset[row]["image"] for row in rows]).to(self.device)
        recon = self.vae(images)[0].float().clamp(0, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(torch.cat([images, recon]).cpu(), columns=len(images)).save(path)
