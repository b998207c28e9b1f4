"""The adversarial part of the tokenizer's training: a patch discriminator and its losses.

The paper names an adversarial loss of weight 0.1 but not its form. Hinge is VQGAN's, and the
discriminator is in the manner of MaskBit's (Weber et al. 2024, 3.1): 3x3 convolutions, group norm,
blurred downsampling, and LeCam regularisation for small data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GanLoss = Literal["hinge", "non_saturating"]


class BlurPool(nn.Module):
    """Halves the resolution after a fixed binomial blur, so that no frequency folds (Zhang 2019).

    Without it a stride shows the discriminator a grid, and the generator learns to draw it.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        # three averages of two pixels make the kernel (1, 3, 3, 1) / 8, faster than a convolution
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 2, 1), 2, 1), 2)


class Discriminator(nn.Module):
    """PatchGAN: one realness score for each patch of the image.

    Args:
        dim: channels of the first layer, doubled at each halving of the resolution.
        layers: how often the resolution is halved.

    Attributes:
        anchors: moving averages of the scores of real and of generated patches, for LeCam.
    """

    anchors: Tensor

    def __init__(self, dim: int = 64, layers: int = 3):
        super().__init__()
        widths = [dim * min(2**i, 8) for i in range(layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(3, dim, 3, padding=1), nn.LeakyReLU(0.2)]
        for a, b in pairwise(widths):
            net += [nn.Conv2d(a, b, 3, padding=1), BlurPool()]
            net += [nn.GroupNorm(math.gcd(min(32, b // 4), b), b), nn.LeakyReLU(0.2)]
        net += [nn.Conv2d(widths[-1], 1, 3, padding=1)]
        self.net = nn.Sequential(*net)
        self.register_buffer("anchors", torch.zeros(2))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        return self.net(images.to(self.anchors.dtype) * 2 - 1)


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Float[Tensor, ""]:
    """What the discriminator lowers.

    "hinge": real patches above 1, generated ones below -1 (1 where it knows nothing).
    "non_saturating": logistic loss (log 2 where it knows nothing; Goodfellow et al. 2014).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake: Tensor, kind: GanLoss) -> Float[Tensor, ""]:
    """What the tokenizer lowers: generated patches as real as can be."""
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


def accuracy(real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    """Share of patches that the discriminator judges rightly, in [0, 1]; 0.5 is guessing."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2


def lecam(real: Tensor, fake: Tensor, anchors: Float[Tensor, "2"]) -> Float[Tensor, ""]:
    """LeCam (Tseng et al. 2021, eq. 3): each kind of patch near the other kind's average score.

    Args:
        real: scores of real patches.
        fake: scores of generated patches.
        anchors: moving averages of both, see `move_anchors`.
    """
    to_fake = F.relu(real.float() - anchors[1]).square().mean()
    to_real = F.relu(anchors[0] - fake.float()).square().mean()
    return to_fake + to_real


@torch.no_grad()
def move_anchors(anchors: Float[Tensor, "2"], means: Float[Tensor, "2"], decay: float) -> None:
    """Take the mean scores of a batch (of all processes) into LeCam's moving averages."""
    anchors.lerp_(means.to(anchors.dtype), 1 - decay)


def gradient_penalty(real_images: Tensor, real_scores: Tensor) -> Float[Tensor, ""]:
    """R1 (Mescheder et al. 2018): squared gradient of the scores at real images."""
    (gradient,) = torch.autograd.grad(real_scores.float().sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def balance(
    images: Tensor,
    recon: Tensor,
    adversarial: Tensor,
    last: nn.Parameter,
    mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """VQGAN's adaptive weight (Esser et al. 2021, eq. 7), in [0, 1e4], without gradient.

    Ratio of the gradients of the reconstruction and of the adversarial loss with respect to the
    decoder's last layer: with it both pull equally hard, whatever their scales.

    Args:
        images: what the decoder made.
        recon: the gradient of the reconstruction loss with respect to them.
        adversarial: that of the adversarial loss.
        last: weight of the decoder's last layer.
        mean: averages a gradient over the processes, so that all their images decide.
        scale: of the gradients on their way back, where half precision would lose them.
    """
    norms = [
        mean(torch.autograd.grad(images, last, pull * scale, retain_graph=True)[0].float()).norm()
        / scale
        for pull in (recon, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
