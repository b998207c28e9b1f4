"""Perceptual distance: squared difference of the logits of a frozen image classifier.

ResNet-50 logits serve tokenizers better than LPIPS (MaskBit, Weber et al. 2024, table 1). Any
Hugging Face image classifier can take its place, by name or path.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """Mean squared difference of classifier logits; frozen, always in eval mode.

    Args:
        name: Hugging Face image classifier, by hub name or local path.

    Raises:
        ValueError: the weights cannot be had.
    """

    def __init__(self, name: str = "microsoft/resnet-50"):
        super().__init__()
        from transformers import AutoModelForImageClassification
        from transformers.utils import cached_file

        try:
            self.net = AutoModelForImageClassification.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"the weights of the perceptual network {name!r} cannot be had "
                f"({type(error).__name__}): give the path of a local copy as perceptual_model, or "
                "switch the term off with perceptual_weight=0"
            ) from error
        self.net.requires_grad_(False)
        self.eval()
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        try:
            with open(str(cached_file(name, "preprocessor_config.json"))) as file:
                preprocessing = json.load(file)
            mean = preprocessing.get("image_mean", mean)
            std = preprocessing.get("image_std", std)
        except OSError:
            pass  # no preprocessing file: ImageNet's constants are nearly every classifier's
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in eval mode: dropout or batch statistics would make the distance noisy."""
        return super().train(False)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], targets: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, ""]:
        def logits(x: Tensor) -> Tensor:
            return self.net((x - self.mean) / self.std).logits.float()

        with torch.no_grad():
            wanted = logits(targets)
        return F.mse_loss(logits(images), wanted)
