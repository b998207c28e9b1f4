"""The adversarial part of the tokenizer's training: a patch discriminator and its losses.

The paper names an adversarial loss of weight 0.1 but not its form; the hinge form is VQGAN's.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Discriminator(nn.Module):
    """PatchGAN: one realness score for each patch of the image.

    Args:
        dim: channels of the first layer, doubled at each halving of the resolution.
        layers: how often the resolution is halved.
    """

    def __init__(self, dim: int = 64, layers: int = 3):
        super().__init__()
        widths = [dim * min(2**i, 8) for i in range(layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(3, dim, 3, padding=1), nn.LeakyReLU(0.2)]
        for a, b in pairwise(widths):
            net += [nn.Conv2d(a, b, 4, stride=2, padding=1)]
            net += [nn.GroupNorm(math.gcd(min(32, b // 4), b), b), nn.LeakyReLU(0.2)]
        net += [nn.Conv2d(widths[-1], 1, 3, padding=1)]
        self.net = nn.Sequential(*net)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        return self.net(images * 2 - 1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    """Hinge: real patches above 1, generated ones below -1."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def generator_loss(fake: Tensor) -> Float[Tensor, ""]:
    """Hinge, the generator's side: generated patches as high as can be."""
    return -fake.float().mean()


def gradient_penalty(real_images: Tensor, real_scores: Tensor) -> Float[Tensor, ""]:
    """R1 (Mescheder et al. 2018): squared gradient of the scores at real images."""
    (gradient,) = torch.autograd.grad(real_scores.float().sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
