"""Steps that would harm the weights are skipped; a run that cannot go on ends."""

from __future__ import annotations

import math
from typing import Any

from ..arguments import fitting, whole

MAX_RESTARTS = 3  # returns to a checkpoint, before the run is given up
# The largest numbers that a checkpoint may state.
COUNTS = {"skipped": 10**12, "in_a_row": 10**12, "restarts": MAX_RESTARTS, "lost_steps": 10**12}


class Guard:
    """Skips steps whose gradient is not finite or leaps, and counts them.

    All processes see the same gradient norms, so they decide alike without asking one another.

    Args:
        max_spike: skip where the norm is more than this many times its moving average; 0: off.
        max_skips: so many skipped steps in a row mean that the weights are at fault.
    """

    DECAY, FIRST = 0.99, 100  # of the moving average; steps before it is trusted

    def __init__(self, max_spike: float, max_skips: int):
        self.max_spike, self.max_skips = max_spike, max_skips
        self.skipped = self.in_a_row = self.restarts = self.lost_steps = 0
        self._average: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._objected = False

    @property
    def lr_factor(self) -> float:
        return 0.5**self.restarts

    def allows(self, name: str, norm: float) -> bool:
        """Whether the optimizer ``name`` may take a step with a gradient of this norm."""
        if self.max_spike == 0:
            return True
        seen, average = self._seen.get(name, 0), self._average.get(name, norm)
        limit = self.max_spike * average if seen >= self.FIRST else math.inf
        good = math.isfinite(norm) and norm <= limit
        if math.isfinite(norm):
            # a leap counts as far as it is allowed, so that a lasting new level is accepted in time
            self._seen[name] = seen + 1
            self._average[name] = self.DECAY * average + (1 - self.DECAY) * min(norm, limit)
        self._objected |= not good
        return good

    def must_return(self) -> bool:
        """Called once after every step; whether the run must return to its last checkpoint."""
        self.in_a_row = self.in_a_row + 1 if self._objected else 0
        self.skipped += self._objected
        self._objected = False
        return self.in_a_row >= self.max_skips

    def returned(self, history: dict[str, Any], steps: int) -> None:
        """After the return: the history goes on, ``steps`` are lost once more.

        The averages go on too, so that a lasting new level is accepted sooner or later.
        """
        self.load(history)
        self.restarts += 1
        self.lost_steps, self.in_a_row = self.lost_steps + steps + 1, 0

    def counts(self) -> dict[str, float]:
        return {"skipped_steps": self.skipped, "restarts": self.restarts}

    def state(self) -> dict[str, Any]:
        """Everything but the settings."""
        return {k: v for k, v in vars(self).items() if k not in ("max_spike", "max_skips")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, which may come out of anybody's file.

        Raises:
            ValueError: an entry that is none of the guard's, or of another kind.
        """
        kinds = {"_average": dict[str, float], "_seen": dict[str, int], "_objected": bool}
        for name, value in state.items():
            if name in COUNTS:
                whole(name, value, 0, COUNTS[name])
            else:
                fitting(name, value, kinds[name])
        vars(self).update(state)


class Diverged(ValueError):
    """The loss is no longer a number. Nothing is saved over the last good checkpoint."""
