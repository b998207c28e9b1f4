"""Scenes without end: pictures composed from sprites, captions, and every fact they state.

Scene number i of a split and a seed is the same everywhere. A picture shows what its caption says:
places are proposed at random, and the first that satisfies all facts is taken.

    data = Scenes("data/sprites.safetensors", "train", size=128)
    data[0]  # {"image": PIL image, "text": str, "facts": [...]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from captions import Caption, Writer
from PIL import Image
from sprites import STYLES, Sprites, Subject, is_tone_heldout

T = TypeVar("T")

SPLITS = ("train", "seen", "style", "background", "relation", "count", "tone", "form")
WHITE = "white"
COLOURS = {
    WHITE: (255, 255, 255),
    "black": (24, 24, 28),
    "grey": (158, 160, 164),
    "red": (214, 68, 66),
    "orange": (244, 150, 64),
    "yellow": (252, 218, 94),
    "green": (110, 190, 104),
    "blue": (58, 112, 214),
    "light blue": (150, 208, 244),
    "dark blue": (28, 42, 92),
    "purple": (138, 92, 190),
    "pink": (250, 160, 200),
    "brown": (136, 94, 62),
}
GRADIENTS = (
    "blue to pink",
    "yellow to orange",
    "purple to orange",
    "white to light blue",
    "green to yellow",
)
BACKGROUNDS = (*COLOURS, *GRADIENTS)
RELATIONS = ("left of", "above", "in front of")
CANVAS = 256  # pixels of a side on which everything is placed and drawn
MARGIN, GAP = 4, 6  # pixels from the edge, and between things that are beside each other
PROPOSALS, ROUNDS, TRIES = 256, 6, 20_000
CONTRAST = 64  # levels of 255 by which most of a thing differs from its background
# The longer side of a thing as a share of the picture's: alone on white, and by how many there are.
PLAIN = (0.80, 0.90)
LENGTHS = {
    1: {"small": (0.20, 0.25), "medium": (0.36, 0.46), "big": (0.62, 0.78)},
    2: {"small": (0.19, 0.23), "medium": (0.32, 0.38), "big": (0.47, 0.54)},
    3: {"small": (0.18, 0.21), "medium": (0.29, 0.34)},
}


@dataclass(frozen=True)
class Group:
    """One or several of the same subject.

    Attributes:
        name: the subject's.
        plural: of the name.
        tone: their skin tone, if they have one: it is always stated.
        count: how many, 1 to 4.
        size: "small", "medium" or "big".
        says_size: whether the caption states it; "medium" is never stated.
    """

    name: str
    plural: str
    tone: str | None
    count: int
    size: str
    says_size: bool


@dataclass(frozen=True)
class Thing:
    """Something in the picture.

    Attributes:
        group: number of its group.
        box: left, top, right and bottom as shares of the side, in [0,1].
    """

    group: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and what its caption says of it.

    Attributes:
        groups: 1 to 4 of them.
        relation: how the first of two groups stands to the second, one of `RELATIONS`, or None.
        style: one of `STYLES`.
        background: one of `BACKGROUNDS`.
        says_style: whether the caption states the style.
        says_background: likewise; where it does not, the background is white.
        caption: the sentence.
        things: in the order in which they are drawn.
    """

    groups: tuple[Group, ...]
    relation: str | None
    style: str
    background: str
    says_style: bool
    says_background: bool
    caption: Caption
    things: tuple[Thing, ...]

    @property
    def text(self) -> str:
        """The caption's text."""
        return self.caption.text

    def facts(self) -> list[dict[str, Any]]:
        """Everything that the caption states, one fact each.

        Returns:
            dicts with "fact", one of "subject", "count", "size", "tone", "relation", "style" and
            "background"; "subject", a name, where it is about one; and "value". A relation is
            stated of the subject to the one named "other". Counts are stated of two and more.
        """
        facts: list[dict[str, Any]] = []
        for group in self.groups:
            facts.append({"fact": "subject", "subject": group.name, "value": True})
            if group.count > 1:
                facts.append({"fact": "count", "subject": group.name, "value": group.count})
            if group.says_size:
                facts.append({"fact": "size", "subject": group.name, "value": group.size})
            if group.tone:
                facts.append({"fact": "tone", "subject": group.name, "value": group.tone})
        if self.relation:
            first, second = (group.name for group in self.groups)
            facts.append(
                {"fact": "relation", "subject": first, "value": self.relation, "other": second}
            )
        if self.says_style:
            facts.append({"fact": "style", "value": self.style})
        if self.says_background:
            facts.append({"fact": "background", "value": self.background})
        return facts


@dataclass(frozen=True)
class _Plan:
    """A scene before it has a caption and places."""

    groups: tuple[Group, ...]
    subjects: tuple[Subject, ...]
    relation: str | None
    style: str
    background: str
    says_style: bool
    says_background: bool
    plain: bool


class Dice:
    """Choices for one scene, which depend on a key alone."""

    def __init__(self, key: str):
        number = int.from_bytes(sha256(key.encode()).digest()[:16], "big")
        self.generator = np.random.Generator(np.random.Philox(key=number))

    def one(self, among: Sequence[T]) -> T:
        """One of them, all alike."""
        return among[int(self.generator.random() * len(among))]

    def chance(self, share: float) -> bool:
        """Whether something of this probability happens."""
        return self.generator.random() < share

    def between(self, low: float, high: float) -> float:
        """A number between the two."""
        return low + (high - low) * self.generator.random()


def _place(*parts: Any) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def heldout(scene: Scene | _Plan, subjects: dict[str, Subject]) -> set[str]:
    """The splits that hold out what a scene shows: a few percent of the combinations of each.

    Args:
        scene: its groups, relation, style and background count, not its caption.
        subjects: by name.
    """
    held = set()
    for group in scene.groups:
        if (
            _place("style", group.name) < 0.08
            and scene.style == STYLES[_place("which style", group.name) < 0.5]
        ):
            held.add("style")
        if scene.background != WHITE and _place("background", group.name, scene.background) < 0.04:
            held.add("background")
        if group.count > 1 and _place("count", group.name, group.count) < 0.05:
            held.add("count")
        if group.tone and is_tone_heldout(subjects[group.name].emoji, group.tone):
            held.add("tone")
    if scene.relation:
        first, second = (group.name for group in scene.groups)
        if _place("relation", first, scene.relation, second) < 0.04:
            held.add("relation")
    return held


class Scenes:
    """Captioned pictures by number, as `MaskGitTrainer(data=...)` takes them.

    Args:
        sprites: a file of `sprites.py`.
        split: "train"; "seen", other scenes of the same kinds; or what training never sees:
            "style", "background", "relation", "count" or "tone" for combinations of subjects with
            these, "form" for sentences.
        seed: another seed, other scenes.
        size: side of the pictures in pixels: 256, 128 or 64. One number is the same scene in all.
        length: how many there are for a training that asks; `scene` has no end.

    Raises:
        ValueError: no sprites there, or a split or size that there is not.
    """

    def __init__(
        self,
        sprites: str | Path | Sprites,
        split: str = "train",
        seed: int = 0,
        size: int = 128,
        length: int = 1_000_000,
    ):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if size not in (CANVAS, CANVAS // 2, CANVAS // 4):
            raise ValueError(f"size must be 256, 128 or 64, not {size!r}")
        self.sprites = sprites if isinstance(sprites, Sprites) else Sprites(sprites)
        self.split, self.seed, self.size, self.length = split, seed, size, length
        self.subjects = {subject.name: subject for subject in self.sprites.subjects}
        self._all = list(self.subjects.values())
        self._colours: dict[tuple[str, str, str | None], np.ndarray] = {}  # of a sprite's pixels
        self._several = [subject for subject in self._all if subject.plural]
        if len(self._several) < 4:
            few = len(self._several)
            raise ValueError(f"{self.sprites.path} has {few} subjects for scenes, of at least 4")

    def __len__(self) -> int:
        return self.length

    def __str__(self) -> str:
        return f"scenes ({self.split}, seed {self.seed})"

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.length:
            raise IndexError(f"scene {number} of {self.length}")
        scene = self.scene(number)
        return {"image": self.draw(scene), "text": scene.text, "facts": scene.facts()}

    def scene(self, number: int) -> Scene:
        """What scene ``number`` shows; there is no last one.

        Raises:
            ValueError: these sprites have nothing that the split holds out.
        """
        dice = Dice(f"{self.split}/{self.seed}/{number}")
        wanted = {self.split} - {"train", "seen", "form"}
        for _ in range(TRIES):
            plan = self._plan(dice)
            if heldout(plan, self.subjects) != wanted or not self._stands_out(plan):
                continue
            caption = Writer(dice, self.split == "form").write(plan)
            if caption.is_heldout != (self.split == "form"):
                continue
            if (things := self._places(dice, plan)) is not None:
                return Scene(
                    plan.groups, plan.relation, plan.style, plan.background, plan.says_style,
                    plan.says_background, caption, things,
                )  # fmt: skip
        raise ValueError(f"{self.sprites.path} has no scene for the split {self.split}")

    # what there is to see

    def _plan(self, dice: Dice) -> _Plan:
        kinds = ["plain"] * 5 + ["one"] * 3 + ["count"] * 3 + ["list"] * 3 + ["relation"] * 6
        if self.split == "relation":
            kinds = ["relation"]
        elif self.split == "count":
            kinds = ["count", "list", "relation"]
        elif self.split == "background":
            kinds = [kind for kind in kinds if kind != "plain"]
        kind = dice.one(kinds)
        relation = None
        if kind in ("plain", "one"):
            counts = (1,)
        elif kind == "count":
            counts = (dice.one((2, 3, 4)),)
        elif kind == "list":
            counts = dice.one(((1, 1), (1, 1, 1), (1, 1, 1, 1), (2, 1), (2, 2), (3, 1), (2, 1, 1)))
        else:
            relation = dice.one(("left of", "left of", "above", "above", "in front of"))
            counts = (1, 1)
            if relation != "in front of" and dice.chance(0.3):
                counts = dice.one(((1, 2), (2, 1), (2, 2)))
        subjects: list[Subject] = []
        for _ in counts:
            pool = self._all if kind == "plain" else self._several
            if self.split == "tone" and not subjects:
                pool = [subject for subject in pool if subject.tones] or pool
            subject = dice.one(pool)
            while subject in subjects:
                subject = dice.one(pool)
            subjects.append(subject)
        sizes = self._sizes(dice, kind, counts)
        groups = []
        for subject, count, size in zip(subjects, counts, sizes, strict=True):
            toned = subject.tones and (self.split == "tone" or dice.chance(0.5))
            tone = dice.one(subject.tones) if toned else None
            says = size != "medium" and kind != "plain"
            groups.append(Group(subject.name, subject.plural, tone, count, size, says))
        background = WHITE
        if kind != "plain" and dice.chance(0.85):
            background = dice.one(GRADIENTS if dice.chance(0.15) else tuple(COLOURS))
        return _Plan(
            tuple(groups),
            tuple(subjects),
            relation,
            dice.one(STYLES),
            background,
            self.split == "style" or dice.chance(0.65),
            background != WHITE or dice.chance(0.35),
            kind == "plain",
        )

    def _sizes(self, dice: Dice, kind: str, counts: tuple[int, ...]) -> list[str]:
        if kind == "plain":
            return ["big"]
        if kind == "one":
            return [dice.one(("small", "medium", "big"))]
        if kind == "count":
            sizes = ("small", "medium", "medium", "big") if counts == (2,) else ("small", "medium")
            return [dice.one(sizes)]
        if len(counts) == 2 and dice.chance(0.45):
            pairs = [("big", "small"), ("small", "big"), ("small", "medium"), ("medium", "small")]
            pairs += [("big", "medium"), ("medium", "big"), ("small", "small")]
            first, second = dice.one(pairs)
            if sum(counts) == 2 or (first, second) == ("small", "small"):
                return [first, second]
        return ["medium"] * len(counts)

    def _stands_out(self, plan: _Plan) -> bool:
        """Whether everything differs enough from a coloured background to be seen."""
        if plan.background == WHITE:
            return True
        behind = np.array([COLOURS[colour] for colour in plan.background.split(" to ")])
        for subject, group in zip(plan.subjects, plan.groups, strict=True):
            key = plan.style, subject.name, group.tone
            if key not in self._colours:
                sprite = np.asarray(self.sprites.image(plan.style, subject, group.tone).reduce(8))
                self._colours[key] = sprite[sprite[..., 3] > 127][:, :3].astype(int)
            apart = np.abs(self._colours[key] - behind[:, None]).max(-1).min(0)
            if (apart > CONTRAST).mean() < 0.6:
                return False
        return True

    # where it is

    def _places(self, dice: Dice, plan: _Plan) -> tuple[Thing, ...] | None:
        members = [index for index, group in enumerate(plan.groups) for _ in range(group.count)]
        shapes = []
        for subject, group in zip(plan.subjects, plan.groups, strict=True):
            shape = np.array(self.sprites.size(plan.style, subject, group.tone))
            shapes.append(shape / shape.max())
        for _ in range(ROUNDS):
            lengths = [_length(dice, group.size, len(members), plan.plain) for group in plan.groups]
            # those of a group are about as large as one another
            longest = [CANVAS * lengths[index] * dice.between(0.96, 1) for index in members]
            sides = [side * shapes[index] for side, index in zip(longest, members, strict=True)]
            sizes = np.maximum(2, np.rint(sides))
            room = CANVAS - 2 * MARGIN - sizes
            if plan.plain:
                jitter = dice.generator.random((1, 1, 2)) * 0.3 + 0.35
                corners = np.rint(MARGIN + jitter * room)
            else:
                random = dice.generator.random((PROPOSALS, len(members), 2))
                corners = np.rint(MARGIN + random * room)
            good = _apart(corners, sizes, members, plan.relation)
            if plan.relation:
                good &= _related(corners, sizes, np.array(members), plan.relation)
            for number in np.flatnonzero(good)[:8]:
                boxes = np.concatenate([corners[number], corners[number] + sizes], 1)
                if plan.relation != "in front of" or 0.1 < self._hidden(plan, boxes) < 0.4:
                    things = [
                        Thing(index, tuple((box / CANVAS).tolist()))
                        for index, box in zip(members, boxes, strict=True)
                    ]
                    # what is in front is drawn last
                    return tuple(things[::-1])
        return None

    def _hidden(self, plan: _Plan, boxes: np.ndarray) -> float:
        """The share of the second thing that the first one hides."""
        alpha = []
        for subject, group, box in zip(plan.subjects, plan.groups, boxes, strict=True):
            layer = Image.new("L", (CANVAS // 4, CANVAS // 4))
            left, top, right, bottom = (int(edge) // 4 for edge in box)
            sprite = self.sprites.image(plan.style, subject, group.tone).getchannel("A")
            layer.paste(sprite.resize((max(1, right - left), max(1, bottom - top))), (left, top))
            alpha.append(np.asarray(layer) > 127)
        return float((alpha[0] & alpha[1]).sum() / max(1, alpha[1].sum()))

    # how it looks

    def draw(self, scene: Scene, size: int | None = None) -> Image.Image:
        """The picture of a scene: "RGB".

        Args:
            scene: of these sprites.
            size: side in pixels: 256, 128 or 64; None: that of the others.
        """
        picture = _background(scene.background)
        for thing in scene.things:
            group = scene.groups[thing.group]
            left, top, right, bottom = (round(CANVAS * edge) for edge in thing.box)
            sprite = self.sprites.image(scene.style, self.subjects[group.name], group.tone)
            sprite = sprite.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
            picture.paste(sprite, (left, top), sprite)
        return picture.reduce(CANVAS // (size or self.size))


def _length(dice: Dice, size: str, things: int, plain: bool) -> float:
    """The longer side of a thing, as a share of the picture's."""
    return dice.between(*(PLAIN if plain else LENGTHS[min(things, 3)][size]))


def _apart(
    corners: np.ndarray, sizes: np.ndarray, members: list[int], relation: str | None
) -> np.ndarray:
    """Which proposals keep all things apart that are not in front of one another: bool (K,)."""
    good = np.ones(len(corners), bool)
    if relation == "in front of":
        return good
    ends = corners + sizes + GAP
    for i in range(len(members)):
        for j in range(i):
            good &= ((ends[:, i] <= corners[:, j]) | (ends[:, j] <= corners[:, i])).any(1)
    return good


def _related(
    corners: np.ndarray, sizes: np.ndarray, members: np.ndarray, relation: str
) -> np.ndarray:
    """In which proposals the first group stands to the second as it should: bool (K,)."""
    ends, centres = corners + sizes, corners + sizes / 2
    if relation == "in front of":
        shared = np.minimum(ends[:, 0], ends[:, 1]) - np.maximum(corners[:, 0], corners[:, 1])
        hidden = shared.clip(0).prod(1) / sizes[1].prod()
        # lower, as what is nearer stands
        return (hidden > 0.1) & (hidden < 0.6) & (centres[:, 0, 1] > centres[:, 1, 1] + 4)
    along = 0 if relation == "left of" else 1
    first, second = members == 0, members == 1
    apart = ends[:, first, along].max(1) + GAP <= corners[:, second, along].min(1)
    offset = np.abs(centres[:, second].mean(1) - centres[:, first].mean(1))
    return apart & (offset[:, 1 - along] <= 0.5 * offset[:, along])


def _background(name: str) -> Image.Image:
    colours = [COLOURS[colour] for colour in name.split(" to ")]
    if len(colours) == 1:
        return Image.new("RGB", (CANVAS, CANVAS), colours[0])
    share = (np.arange(CANVAS) + 0.5)[:, None, None] / CANVAS
    rows = (1 - share) * np.array(colours[0]) + share * np.array(colours[1])
    return Image.fromarray(np.rint(rows).astype(np.uint8).repeat(CANVAS, 1))
