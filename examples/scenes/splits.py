"""Scenes for the command line: `--data examples/scenes/splits.py:train`.

The sprites are data/sprites.safetensors, or what the variable SPRITES names.
"""

from __future__ import annotations

import os

from scenes import Scenes

SPRITES = os.environ.get("SPRITES", "data/sprites.safetensors")


def train() -> Scenes:
    """A million scenes to train on, of 128 px."""
    return Scenes(SPRITES, "train", size=128)


def train64() -> Scenes:
    """The same scenes of 64 px."""
    return Scenes(SPRITES, "train", size=64)


def seen() -> Scenes:
    """A thousand other scenes of the same kinds, of 128 px."""
    return Scenes(SPRITES, "seen", size=128, length=1000)


def seen64() -> Scenes:
    """The same of 64 px."""
    return Scenes(SPRITES, "seen", size=64, length=1000)
