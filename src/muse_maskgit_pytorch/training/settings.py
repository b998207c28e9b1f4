"""Checks of the trainers' numeric settings."""

from __future__ import annotations

import math


def at_least(least: int, **settings: float) -> None:
    """Check that settings are finite and not below ``least`` (0 or 1).

    Raises:
        ValueError: one of them is not; says which.
    """
    for name, value in settings.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {value}")
        if value < least:
            limit = f"be at least {least}, not" if least else "not be negative, but is"
            raise ValueError(f"{name} must {limit} {value}")
