"""The steps of sampling as pictures, for a GIF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional as F

from ..images import to_pil
from ..maskgit import MaskGit
from ..structures import SampleStep


class Film:
    """The unmasking of one batch: decodes what a callback sees.

    What is still masked is grey in the base stage, and the base's picture in the second.

    Args:
        stages: of the cascade, in their order.
        rows: which pictures of the batch to keep.
    """

    def __init__(self, stages: Sequence[MaskGit], rows: Sequence[int]):
        self.stages, self.rows = iter(stages), list(rows)
        self.size = stages[-1].image_size
        self.last = torch.full((len(rows), 3, 1, 1), 0.5, device=stages[0].device)
        self.frames: list[list[Image.Image]] = []

    def add(self, step: SampleStep) -> None:
        """Another frame; a first step begins the next stage."""
        ids, mask = step.ids[self.rows], step.mask[self.rows]
        if step.step == 1:
            self.stage = next(self.stages)
            size = self.stage.image_size
            self.below = F.interpolate(self.last, (size, size), mode="bilinear")
            # a code at random would shine through to the cells around it
            self.below_ids = self.stage.vae.encode_to_ids(self.below).flatten(1)
        pixels = self.stage.decode(torch.where(mask, self.below_ids, ids))
        side = self.stage.fmap_size
        covered = F.interpolate(mask.view(-1, 1, side, side).float(), pixels.shape[-2:]) > 0
        self.last = torch.where(covered, self.below, pixels)
        self.frames.append(to_pil(F.interpolate(self.last, (self.size, self.size))))

    def strips(self) -> list[list[Image.Image]]:
        """The frames of each picture."""
        return [list(strip) for strip in zip(*self.frames, strict=True)]
