"""Scenes without end: pictures composed from sprites, captions, and every fact they state.

    data = Scenes("data/sprites.safetensors", "train", size=128)
    data[0]  # {"image": PIL image, "text": str, "facts": [...]}

Scene number i of a split and a seed is the same everywhere. It is planned first (what there is, and
how it stands), then put into words (`captions.py`), then placed (`layout.py`): a picture shows what
its caption says, since a place that does not fit is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from captions import Caption, Writer
from layout import CANVAS, INSET, LENGTHS, STEP, apart, propose, related
from PIL import Image
from sprites import STYLES, Sprites, Subject, is_tone_heldout

from muse_maskgit_pytorch.data.source import Item

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
# From top to bottom.
GRADIENTS = (
    "blue to pink",
    "yellow to orange",
    "purple to orange",
    "white to light blue",
    "green to yellow",
)
BACKGROUNDS = (*COLOURS, *GRADIENTS)
RELATIONS = ("left of", "above", "in front of")
# Counts of the groups of a list, and of two groups in a relation.
LISTS = ((1, 1), (1, 1, 1), (1, 1, 1, 1), (2, 1), (2, 2), (3, 1), (2, 1, 1))
RELATED = ((1, 2), (2, 1), (2, 2))
# Sizes of two things side by side, and of one in front of another.
BESIDE = (
    *(("medium", "medium"),) * 8,
    ("big", "small"), ("small", "big"), ("big", "medium"), ("medium", "big"),
    ("small", "medium"), ("medium", "small"), ("small", "small"),
)  # fmt: skip
IN_FRONT = (*(("medium", "medium"),) * 3, ("small", "big"), ("medium", "big"), ("big", "medium"))
# How many of 20 scenes are of a kind, and in training, where single things on white are soon known.
KINDS = {"plain": 5, "one": 3, "count": 3, "list": 3, "relation": 6}
TRAIN_KINDS = {"plain": 2, "one": 3, "count": 4, "list": 4, "relation": 7}
# Kinds that can have what a split holds out; the others are as in training.
KINDS_OF = {
    "background": ("one", "count", "list", "relation"),
    "relation": ("relation",),
    "count": ("count", "list", "relation"),
}
CONTRAST = 64  # levels of 255 by which most of a thing differs from its background
# Filters for sprites: Hamming is as sharp as bicubic where it averages, in two thirds of the time.
ENLARGED, REDUCED = Image.Resampling.BICUBIC, Image.Resampling.HAMMING
TRIES, ROUNDS = 20_000, 12


@dataclass(frozen=True)
class Group:
    """One or several of the same subject.

    Attributes:
        subject: which.
        tone: their skin tone, if they have one: it is always stated.
        count: how many, 1 to 4.
        size: one of `layout.LENGTHS`.
        says_size: whether the caption states it: if it is "small" or "big".
    """

    subject: Subject
    tone: str | None
    count: int
    size: str
    says_size: bool

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.subject.name


@dataclass(frozen=True)
class Plan:
    """What a picture is to show, and what its caption is to say of it.

    Attributes:
        groups: 1 to 4 of them.
        relation: how the first of two groups stands to the second, one of `RELATIONS`, or None.
        style: one of `STYLES`.
        background: one of `BACKGROUNDS`.
        says_style: whether the caption states the style.
        says_background: likewise; where it does not, the background is white.
    """

    groups: tuple[Group, ...]
    relation: str | None
    style: str
    background: str
    says_style: bool
    says_background: bool

    @property
    def is_full(self) -> bool:
        """Whether it shows a single thing as large as the picture, on white."""
        return self.groups[0].size == "full"

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
class Thing:
    """Something in the picture.

    Attributes:
        group: number of its group.
        box: left, top, right and bottom as shares of the side, in [0,1].
    """

    group: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene(Plan):
    """A plan in words, with a place for everything.

    Attributes:
        caption: the sentence, and how it was made.
        things: in the order in which they are drawn.
    """

    caption: Caption
    things: tuple[Thing, ...]


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


def share_of(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone, here and everywhere."""
    digest = sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def heldout(plan: Plan) -> set[str]:
    """The splits that hold out what is shown: a few percent of the combinations of each kind."""
    held = set()
    for group in plan.groups:
        which = STYLES[share_of("which style", group.name) < 0.5]  # never both of a subject
        if plan.style == which and share_of("style", group.name) < 0.08:
            held.add("style")
        if plan.background != WHITE and share_of("background", group.name, plan.background) < 0.04:
            held.add("background")
        if group.count > 1 and share_of("count", group.name, group.count) < 0.05:
            held.add("count")
        if group.tone and is_tone_heldout(group.subject.emoji, group.tone):
            held.add("tone")
    if plan.relation:
        first, second = (group.name for group in plan.groups)
        if share_of("relation", first, plan.relation, second) < 0.04:
            held.add("relation")
    return held


class Scenes:
    """Captioned pictures by number: a `Source`, as `MaskGitTrainer(data=...)` takes them.

    Args:
        sprites: a file of `sprites.py`.
        split: "train"; "seen", other scenes of the same kinds; or what training never sees:
            "style", "background", "relation", "count" or "tone" for combinations of subjects with
            these, "form" for sentences.
        seed: another seed, other scenes.
        size: side of the pictures in pixels: 256, 128 or 64. One number is the same scene in all.
        length: how many there are for a training that asks; `scene` has no end.

    Attributes:
        subjects: all of them, in the order of the sprites; those without a plural are drawn alone.

    Raises:
        ValueError: no sprites there or too few, or a split or size that there is not.
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
        self.subjects = self.sprites.subjects
        self._in_scenes = [subject for subject in self.subjects if subject.plural]
        if len(self._in_scenes) < 4:
            few = len(self._in_scenes)
            raise ValueError(f"{self.sprites.path} has {few} subjects for scenes, of at least 4")
        self._kinds = [
            kind
            for kind, count in (TRAIN_KINDS if split == "train" else KINDS).items()
            for _ in range(count)
            if kind in KINDS_OF.get(split, KINDS)
        ]
        self._colours: dict[tuple[str, str, str | None], np.ndarray] = {}  # of a sprite's pixels

    def __len__(self) -> int:
        return self.length

    def __str__(self) -> str:
        return f"scenes ({self.split}, seed {self.seed})"

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.length:
            raise IndexError(f"scene {number} of {self.length}")
        scene = self.scene(number)
        return {"image": self.draw(scene), "text": scene.caption.text, "facts": scene.facts()}

    @property
    def keys(self) -> list[str]:
        """A name for each, the same at all sizes: so is the side of a split that it is on."""
        return [f"{self.split} {self.seed} {number}" for number in range(self.length)]

    def item(self, index: int) -> Item:
        """What a trainer reads."""
        row = self[index]
        return Item(row["image"], row["text"])

    def scene(self, number: int) -> Scene:
        """What scene ``number`` shows; there is no last one.

        Raises:
            ValueError: these sprites have nothing that the split holds out.
        """
        dice = Dice(f"{self.split}/{self.seed}/{number}")
        of_forms = self.split == "form"
        wanted = {self.split} - {"train", "seen", "form"}
        kind = dice.one(self._kinds)
        for _ in range(TRIES):
            plan = self._plan(dice, kind)
            if heldout(plan) != wanted or not self.stands_out(plan):
                continue
            caption = Writer(dice, of_forms).write(plan)
            if caption.is_heldout == of_forms and (things := self._places(dice, plan)):
                return Scene(**vars(plan), caption=caption, things=things)
        raise ValueError(f"{self.sprites.path} has no scene for the split {self.split}")

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
            sprite = self.sprites.image(scene.style, group.subject, group.tone)
            sides = right - left, bottom - top
            sprite = sprite.resize(sides, ENLARGED if sides > sprite.size else REDUCED)
            picture.paste(sprite, (left, top), sprite)
        return picture.reduce(CANVAS // (size or self.size))

    def _plan(self, dice: Dice, kind: str) -> Plan:
        relation, counts = None, (1,)
        if kind == "count":
            counts = (dice.one((2, 3, 4)),)
        elif kind == "list":
            counts = dice.one(LISTS)
        elif kind == "relation":
            relation = dice.one(("left of", "left of", "above", "above", "in front of"))
            one_each = relation == "in front of" or dice.chance(0.7)
            counts = (1, 1) if one_each else dice.one(RELATED)
        sizes = self._sizes(dice, kind, counts, relation)
        groups: list[Group] = []
        for count, size in zip(counts, sizes, strict=True):
            subject = self._subject(dice, kind, groups)
            toned = subject.tones and (self.split == "tone" or dice.chance(0.5))
            tone = dice.one(subject.tones) if toned else None
            groups.append(Group(subject, tone, count, size, size in ("small", "big")))
        background = WHITE
        if kind != "plain" and dice.chance(0.9):
            background = dice.one(GRADIENTS if dice.chance(0.15) else tuple(COLOURS))
        return Plan(
            tuple(groups), relation, dice.one(STYLES), background,
            self.split == "style" or dice.chance(0.65), background != WHITE or dice.chance(0.35),
        )  # fmt: skip

    def _subject(self, dice: Dice, kind: str, others: list[Group]) -> Subject:
        pool = self.subjects if kind == "plain" else self._in_scenes
        if self.split == "tone" and not others:
            pool = [subject for subject in pool if subject.tones] or pool
        while True:
            subject = dice.one(pool)
            if all(subject is not other.subject for other in others):
                return subject

    def _sizes(
        self, dice: Dice, kind: str, counts: tuple[int, ...], relation: str | None
    ) -> Sequence[str]:
        """The size of each group."""
        if kind == "plain":
            return ("full",)
        if kind == "one":
            return (dice.one(("small", "medium", "big")),)
        if relation == "in front of":
            return dice.one(IN_FRONT)
        if counts == (2,):
            return (dice.one(("small", "medium", "medium", "big")),)
        if kind == "count":
            return (dice.one(("small", "medium")),)
        if sum(counts) == 2:
            return dice.one(BESIDE)
        return (dice.one(("small", "medium", "medium")),) * len(counts)

    def stands_out(self, plan: Plan) -> bool:
        """Whether everything differs enough from what is behind it to be seen."""
        colours = [self._colours_of(plan.style, group) for group in plan.groups]
        if plan.relation == "in front of":
            means = [colour.mean(0) for colour in colours]
            if np.abs(means[0] - means[1]).max() < CONTRAST:
                return False
        if plan.is_full:
            return True
        behind = np.array([COLOURS[colour] for colour in plan.background.split(" to ")])
        distances = (np.abs(each - behind[:, None]).max(-1).min(0) for each in colours)
        # of what is white, outlines are enough on white
        least = 0.2 if plan.background == WHITE else 0.6
        return all((distance > CONTRAST).mean() > least for distance in distances)

    def _colours_of(self, style: str, group: Group) -> np.ndarray:
        """Colours of a sprite's visible pixels, some of them: int (K,3)."""
        key = style, group.name, group.tone
        if key not in self._colours:
            sprite = np.asarray(self.sprites.image(style, group.subject, group.tone).reduce(8))
            self._colours[key] = sprite[sprite[..., 3] > 127][:, :3].astype(int)
        return self._colours[key]

    def _places(self, dice: Dice, plan: Plan) -> tuple[Thing, ...] | None:
        """A place for everything, or None where none was found."""
        members = [index for index, group in enumerate(plan.groups) for _ in range(group.count)]
        shapes = []
        for group in plan.groups:
            shape = np.array(self.sprites.size(plan.style, group.subject, group.tone))
            shapes.append(shape / shape.max())
        lengths = np.array([LENGTHS[plan.groups[index].size] for index in members])
        inner = STEP * lengths[:, None] - 2 * INSET
        sizes = np.maximum(2, np.rint(inner * np.array([shapes[index] for index in members])))
        for _ in range(ROUNDS):
            if plan.is_full:
                corners = np.floor((CANVAS - sizes) / 2)[None]
            else:
                corners = propose(dice.generator, lengths, sizes)
            good = np.ones(len(corners), bool)
            if plan.relation != "in front of":
                good &= apart(corners, sizes)
            if plan.relation:
                good &= related(corners, sizes, np.array(members), plan.relation)
            for number in np.flatnonzero(good)[:8]:
                boxes = np.concatenate([corners[number], corners[number] + sizes], 1)
                if plan.relation != "in front of" or 0.06 < self._hidden(plan, boxes) < 0.4:
                    shares = (boxes / CANVAS).tolist()
                    pairs = zip(members, shares, strict=True)
                    # what is in front is drawn last
                    return tuple(Thing(group, tuple(box)) for group, box in pairs)[::-1]
        return None

    def _hidden(self, plan: Plan, boxes: np.ndarray) -> float:
        """The share of the second thing that the first one hides."""
        seen = []
        for group, box in zip(plan.groups, boxes, strict=True):
            layer = Image.new("L", (CANVAS // 4, CANVAS // 4))
            left, top, right, bottom = (int(edge) // 4 for edge in box)
            sprite = self.sprites.image(plan.style, group.subject, group.tone).getchannel("A")
            layer.paste(sprite.resize((right - left, bottom - top)), (left, top))
            seen.append(np.asarray(layer) > 127)
        return float((seen[0] & seen[1]).sum() / max(1, seen[1].sum()))


def _background(name: str) -> Image.Image:
    colours = [COLOURS[colour] for colour in name.split(" to ")]
    if len(colours) == 1:
        return Image.new("RGB", (CANVAS, CANVAS), colours[0])
    share = (np.arange(CANVAS) + 0.5)[:, None, None] / CANVAS
    rows = (1 - share) * np.array(colours[0]) + share * np.array(colours[1])
    return Image.fromarray(np.rint(rows).astype(np.uint8).repeat(CANVAS, 1))
