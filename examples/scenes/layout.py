"""Where things may stand: many places are proposed at random, and those that fit are told apart.

Everything is in pixels of a canvas of 256; a proposal is the left upper corners of N things.
"""

from __future__ import annotations

import numpy as np

CANVAS = 256
MARGIN, GAP = 4, 6  # from the edge, and between things that are beside each other
PROPOSALS = 256
# The longer side of a thing as a share of the canvas, by what there is and by the thing's size. A
# small thing is always smaller than one of no stated size, and this one smaller than a big one.
LENGTHS = {
    "plain": {"big": (0.80, 0.90)},
    "alone": {"small": (0.20, 0.25), "medium": (0.33, 0.40), "big": (0.60, 0.80)},
    "in front": {"small": (0.21, 0.25), "medium": (0.33, 0.40), "big": (0.56, 0.68)},
    "same": {"small": (0.20, 0.25), "medium": (0.32, 0.39), "big": (0.45, 0.49)},
    "pair": {"small": (0.20, 0.25), "medium": (0.32, 0.39), "big": (0.48, 0.57)},
    "several": {"small": (0.19, 0.23), "medium": (0.29, 0.35)},
}


def propose(generator: np.random.Generator, sizes: np.ndarray, middle: bool) -> np.ndarray:
    """Corners inside the canvas, float (K,N,2).

    Args:
        generator: where they are drawn from.
        sizes: width and height of the things, (N,2).
        middle: near the middle, one proposal; else anywhere, `PROPOSALS` of them.
    """
    room = CANVAS - 2 * MARGIN - sizes
    share = generator.random((1 if middle else PROPOSALS, *sizes.shape))
    return np.rint(MARGIN + (0.35 + 0.3 * share if middle else share) * room)


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
