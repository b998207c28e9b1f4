"""The steps of sampling as pictures, for a GIF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional as F

from ..images import to_pil
from ..maskgit import ImageSize, MaskGit
from ..structures import SampleStep


class Film:
    """The unmasking of one batch: decodes what a callback sees.

    What is still masked is grey in the base stage, and the base's picture in the second.

    Args:
        stages: of the cascade, in their order.
        rows: which pictures of the batch to keep.
        image_size: of the last stage, if not the trained one.
    """

    def __init__(
        self, stages: Sequence[MaskGit], rows: Sequence[int], image_size: ImageSize | None = None
    ):
        sizes = [stages[-1].pixels(image_size)]
        if len(stages) > 1:
            sizes.insert(0, stages[-1].cond_pixels(image_size))
        self.stages, self.rows = iter(zip(stages, sizes, strict=True)), list(rows)
        self.size = sizes[-1]
        self.last = torch.full((len(rows), 3, 1, 1), 0.5, device=stages[0].device)
        self.frames: list[list[Image.Image]] = []

    def add(self, step: SampleStep) -> None:
        """Another frame; a first step begins the next stage."""
        ids, mask = step.ids[self.rows], step.mask[self.rows]
        if step.step == 1:
            self.stage, self.stage_size = next(self.stages)
            self.below = F.interpolate(self.last, self.stage_size, mode="bilinear")
            # a code at random would shine through to the cells around it
            self.below_ids = self.stage.vae.encode_to_ids(self.below).flatten(1)
        pixels = self.stage.decode(torch.where(mask, self.below_ids, ids), self.stage_size)
        cells = mask.view(-1, 1, *self.stage.grid(self.stage_size)).float()
        covered = F.interpolate(cells, pixels.shape[-2:]) > 0
        self.last = torch.where(covered, self.below, pixels)
        self.frames.append(to_pil(F.interpolate(self.last, self.size)))

    def strips(self) -> list[list[Image.Image]]:
        """The frames of each picture."""
        return [list(strip) for strip in zip(*self.frames, strict=True)]
