"""Scenes for the command line.

    muse train vae --data examples/scenes/splits.py:train ...
    muse eval base --data examples/scenes/splits.py:seen64 --judge examples/scenes/splits.py:judge

Each split goes by its name, with pictures of 128 px, or of 64 or 256 with that behind it, and then
a number of scenes, few enough to keep their tokens, and a seed, for others: ``train``, ``seen64``,
``train256of5000``, ``train128of40000seed1``. The sprites are data/sprites.safetensors, or what the
variable SPRITES names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from judge import WEIGHTS, Judge
from layout import CANVAS
from PIL import Image
from scenes import SPLITS, Scenes

from muse_maskgit_pytorch.data.source import Item

TILE, TOKEN = 64, 8  # pixels a side
SPRITES = os.environ.get("SPRITES", "data/sprites.safetensors")


def __getattr__(name: str) -> Callable[[], Scenes]:
    """The splits by name, size and number."""
    parts = rf"({'|'.join(SPLITS)})(64|128|256)?(?:of([1-9]\d{{0,8}}))?(?:seed(\d{{1,9}}))?"
    found = re.fullmatch(parts, name)
    if found is None:
        raise AttributeError(name)
    split, size, number, seed = found.groups()
    length = int(number or (1_000_000 if split == "train" else 1000))
    return partial(Scenes, SPRITES, split, int(seed or 0), size=int(size or 128), length=length)


class Tiles(Scenes):
    """For a tokenizer: 64 pixels around a thing, of scenes of 128 px and of 256 px in turns.

    They are cut along the grid on which things stand (`layout`), so tokens lie as in whole scenes.
    """

    def __init__(self) -> None:
        super().__init__(SPRITES, "train")

    def item(self, index: int) -> Item:
        """What a trainer reads."""
        scene, size = self.scene(index), (CANVAS // 2, CANVAS)[index % 2]
        left, top, right, bottom = scene.things[index // 2 % len(scene.things)].box
        x, y = (
            TOKEN * round(min(max(size * middle - TILE / 2, 0), size - TILE) / TOKEN)
            for middle in ((left + right) / 2, (top + bottom) / 2)
        )
        return Item(self.draw(scene, size).crop((x, y, x + TILE, y + TILE)))


class PromptJudge:
    """A `Judge` as `muse eval --judge` asks it: of prompts that are scenes.

    What a prompt states is in its column "facts" (`make_dataset.py`), or follows from its key, by
    which a `Scenes` names it.
    """

    def __init__(self, judge: Judge):
        self.judge = judge
        self._scenes: dict[tuple[str, int], Scenes] = {}

    def facts(self, pictures: Sequence[Image.Image], rows: Sequence[Any]) -> list[dict[str, bool]]:
        """Which kinds of facts are right in each picture.

        Raises:
            ValueError: a prompt that is no scene.
        """
        return self.judge.facts(pictures, [self._stated(row) for row in rows])

    def _stated(self, row: Any) -> list[dict[str, Any]]:
        if "facts" in row.values:
            return json.loads(row.values["facts"])
        try:
            split, seed, number = row.key.split(" ")
            if (split, int(seed)) not in self._scenes:
                self._scenes[split, int(seed)] = Scenes(SPRITES, split, int(seed))
            return self._scenes[split, int(seed)].scene(int(number)).facts()
        except ValueError as error:
            raise ValueError(
                f"{row.key!r} is no scene ({error}): the judge needs --data {__file__}:seen, or a "
                "data set of make_dataset.py"
            ) from error


def judge() -> PromptJudge:
    """The judge, with its own weights or those that the variable JUDGE names."""
    return PromptJudge(Judge.load(os.environ.get("JUDGE", WEIGHTS)))
