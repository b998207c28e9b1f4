"""How fast a run goes: images, use of the machine, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..inference.precision import products

COUNTED = 100  # the step of a sitting whose operations are counted first: short runs pay nothing
AGAIN = 1000  # steps until they are counted again, since an adversary may have begun


class Pace:
    """The pace of a run's steps.

    Args:
        images: of one step, of all processes together.
        step, total: steps done before this sitting, and of the run.
        device: that computes.
        precision: "no", "fp16" or "bf16", of the products.
        counting: whether operations can be counted: not those of compiled code.
    """

    def __init__(
        self, images: int, step: int, total: int, device: torch.device, precision: str,
        counting: bool = True,
    ):  # fmt: skip
        self.images, self.total, self.device, self.precision = images, total, device, precision
        self.counting = counting
        self._began = step, time.monotonic()
        self.operations = 0  # of one step of this process
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: of some, the operations are counted."""
        self._steps += 1
        if not self.counting or self._steps % AGAIN != COUNTED:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.operations = counter.get_total_flops()

    def figures(self, step: int, steps_per_s: float) -> dict[str, float]:
        """Figures of a line of the log.

        Returns:
            ``images_per_s``; ``hours_left``, with as much time for looks and checkpoints as there
            has been in this sitting; and once operations have been counted
            ``gemm_share``: those of all products of a step, for each second of it, over what the
            machine achieves in large matrix products alone (`inference.precision.products`).
        """
        first, began = self._began
        each = (time.monotonic() - began) / max(1, step - first)
        left = (self.total - step) * each / 3600
        found = {"images_per_s": self.images * steps_per_s, "hours_left": left}
        if self.operations:
            achieved = products(self.device)
            kind = "plain" if self.precision == "no" else "bfloat16"
            ceiling = achieved.get(f"{kind}, blocks", achieved["plain, blocks"])
            found["gemm_share"] = self.operations * steps_per_s / (ceiling * 1e9)
        return found
