"""The steps of sampling as pictures, for a GIF or a preview."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional as F

from .geometry import Size
from .images import to_pil
from .muse import Muse
from .structures import SampleStep


class Film:
    """The unmasking of one batch: decodes what a callback sees.

    Whatever is still masked is grey in the base stage, and shows the base's picture in the second.

    Args:
        model: what draws.
        rows: which pictures of the batch to keep.
        image_size: height and width of the pictures.
    """

    def __init__(self, model: Muse, rows: Sequence[int], image_size: Size):
        sizes = model.sizes(image_size).values()
        self.stages = iter(zip(model.stages.values(), sizes, strict=True))
        self.rows, self.size = list(rows), image_size
        self.last = torch.full((len(rows), 3, 1, 1), 0.5, device=model.device)
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
        cells = mask.view(-1, 1, *self.stage.geometry.grid(self.stage_size)).float()
        covered = F.interpolate(cells, pixels.shape[-2:]) > 0
        self.last = torch.where(covered, self.below, pixels)
        self.frames.append(to_pil(F.interpolate(self.last, self.size)))

    def strips(self) -> list[list[Image.Image]]:
        """The frames of each picture."""
        return [list(strip) for strip in zip(*self.frames, strict=True)]
