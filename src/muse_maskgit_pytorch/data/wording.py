"""What becomes of a caption of tags on its way to the model: drawn anew each time an item comes."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import real, whole
from .order import draws

BEFORE = 5  # numbers of a position that a `View` and the choice of a caption use


@dataclass(frozen=True)
class Wording:
    """Tags with commas between them: their order and dropout, by the seed and the position alone.

    Whole captions are dropped by the model's ``cond_drop_prob``: to it an empty one is no text.

    Attributes:
        shuffle_tags: they come in any order.
        tag_dropout: share of them that is left out, in [0,1); of a caption one stays.
        keep_tags: so many of the first tags stay, and stay where they are.
        seed: of both.

    Raises:
        ValueError: a value outside of its range.
    """

    shuffle_tags: bool = False
    tag_dropout: float = 0.0
    keep_tags: int = 0
    seed: int = 0

    def __post_init__(self):
        if real("tag_dropout", self.tag_dropout, 0) >= 1:
            raise ValueError(f"tag_dropout must be in [0, 1), not {self.tag_dropout}")
        if whole("keep_tags", self.keep_tags, 0) and not self:
            raise ValueError(
                "keep_tags needs shuffle_tags or tag_dropout: set one, or leave it out"
            )

    def __bool__(self) -> bool:
        return bool(self.tag_dropout or self.shuffle_tags)

    def __call__(self, text: str, position: int | None) -> str:
        """The caption as it comes at a position of the training order; None: as it is."""
        if position is None or not self:
            return text
        tags = [tag for part in text.split(",") if (tag := part.strip())]
        drawn = draws(self.seed, position, BEFORE + 2 * len(tags))[BEFORE:]
        keys, coins = drawn[: len(tags)], drawn[len(tags) :]
        rest = list(range(min(self.keep_tags, len(tags)), len(tags)))
        if self.shuffle_tags:
            rest.sort(key=keys.__getitem__)
        left = [place for place in rest if coins[place] >= self.tag_dropout]
        if not left and not self.keep_tags:
            left = rest[:1]
        return ", ".join([*tags[: self.keep_tags], *(tags[place] for place in left)])
