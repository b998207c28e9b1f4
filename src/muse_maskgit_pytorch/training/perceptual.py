"""The perceptual term: how far images are apart in the eyes of a frozen network.

ResNet-50 logits serve tokenizers better than LPIPS (MaskBit, Weber et al. 2024, table 1).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..features import FeatureNet, FeatureNetError, lpips_distance

PerceptualKind = Literal["logits", "lpips"]


class PerceptualLoss(FeatureNet):
    """A frozen network and the distance it sees; the gradient goes to the first images.

    Args:
        name: see `FeatureNet`.
        kind: "logits", mean squared difference of class scores (MaskBit); "lpips", distance of
            the feature maps, see `lpips_distance`.

    Raises:
        ValueError: the weights cannot be had, another kind, or logits of a network without a head.
    """

    def __init__(self, name: str = "microsoft/resnet-50", kind: PerceptualKind = "logits"):
        if kind not in get_args(PerceptualKind):
            raise ValueError(
                f"perceptual_kind must be one of {get_args(PerceptualKind)}, not {kind!r}"
            )
        try:
            super().__init__(name)
        except FeatureNetError as error:
            raise FeatureNetError(
                f"perceptual_model: {error}, or switch the term off with perceptual_weight=0"
            ) from error
        self.kind = kind
        if kind == "logits" and self.net.head is None:
            raise ValueError(
                f"perceptual_model {name!r} has no classification head: take an image classifier "
                "or perceptual_kind=lpips"
            )

    def forward(
        self, images: Float[Tensor, "B 3 H W"], targets: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, ""]:
        """Mean distance of ``images`` from ``targets``, of which no gradient is taken."""
        targets = targets.detach()
        if self.kind == "logits":
            return F.mse_loss(self.logits(targets), self.logits(images))
        return lpips_distance(self.maps(targets), self.maps(images)).mean()
