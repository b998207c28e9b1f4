"""Where things may stand: many places are proposed at random, and those that fit are told apart.

Everything is in pixels of a canvas of 256; a proposal is the left upper corners of N things. Each
thing stands in the middle of a square whose corners are on a grid of 32 pixels, at 128 px two
tokens of 8: so the same thing is the same few tokens wherever it stands, and also to a transformer
that reads squares of 2 x 2 tokens. With places and sizes of any pixel, a small model learns how a
thing is cut into tokens, and little else (docs/log.md).
"""

from __future__ import annotations

import numpy as np

CANVAS, STEP = 256, 32
INSET, GAP = 4, 6  # of a thing in its square, and between things that are beside each other
PROPOSALS = 256
# The side of the squares in steps: one for each size, so that a subject has few forms. A thing of
# full size is alone, in the middle of the picture.
LENGTHS = {"small": 2, "medium": 3, "big": 4, "full": 7}


def propose(generator: np.random.Generator, lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Corners inside the canvas, `PROPOSALS` of them: float (K,N,2).

    Args:
        generator: where they are drawn from.
        lengths: sides of the squares in steps, (N,).
        sizes: width and height of the things, (N,2).
    """
    room = (CANVAS // STEP - lengths)[:, None]
    places = np.floor(generator.random((PROPOSALS, *sizes.shape)) * (room + 1))
    return STEP * places + np.floor((STEP * lengths[:, None] - sizes) / 2)


def apart(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which proposals keep all things apart: bool (K,)."""
    good = np.ones(len(corners), bool)
    ends = corners + sizes + GAP
    for i in range(len(sizes)):
        for j in range(i):
            good &= ((ends[:, i] <= corners[:, j]) | (ends[:, j] <= corners[:, i])).any(1)
    return good


def related(
    corners: np.ndarray, sizes: np.ndarray, members: np.ndarray, relation: str
) -> np.ndarray:
    """In which proposals group 0 stands to group 1 as it should: bool (K,).

    Args:
        corners: the proposals.
        sizes: of the things.
        members: the group of each thing, (N,).
        relation: "left of", "above" or "in front of". To be left of something is to be farther left
            with all of its width, and at least twice as far as above or below. In front is what
            overlaps and is lower, as it stands nearer.
    """
    ends, centres = corners + sizes, corners + sizes / 2
    if relation == "in front of":
        shared = np.minimum(ends[:, 0], ends[:, 1]) - np.maximum(corners[:, 0], corners[:, 1])
        hidden = shared.clip(0).prod(1) / sizes.prod(1)[:, None]  # of the first, of the second
        lower = centres[:, 0, 1] > centres[:, 1, 1] + GAP
        return (hidden.max(0) > 0.3) & (hidden[1] < 0.6) & lower
    along = 0 if relation == "left of" else 1
    first, second = members == 0, members == 1
    beside = ends[:, first, along].max(1) + GAP <= corners[:, second, along].min(1)
    offset = np.abs(centres[:, second].mean(1) - centres[:, first].mean(1))
    return beside & (2 * offset[:, 1 - along] <= offset[:, along])
