"""The judge of scenes: what it takes for right, and that it learns to see."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import judge as judging
import numpy as np
import pytest
import splits
import torch
from judge import Found, Judge, Reading
from layout import CANVAS, INSET, LENGTHS, STEP
from PIL import Image
from scenes import BACKGROUNDS, Scene, Scenes
from sprites import STYLES, Sprites, Subject, write_sprites

from muse_maskgit_pytorch.images import to_pil

LEFT, RIGHT = (0.1, 0.4, 0.3, 0.6), (0.6, 0.4, 0.8, 0.6)
LOW, HIGH = (0.4, 0.45, 0.7, 0.75), (0.35, 0.2, 0.65, 0.5)


def reading(*things: tuple[str, Any], **more: Any) -> Reading:
    found = tuple(Found(name, more.get("tone"), box) for name, box in things)
    return Reading(found, more.get("style", "3D"), more.get("background", "white"))


def is_right(found: Reading, kind: str, value: Any, **more: Any) -> bool:
    return judging._is_right({"fact": kind, "subject": "owl", "value": value, **more}, found)


def test_facts_of_a_reading():
    owls = reading(("owl", LEFT), ("owl", RIGHT), tone="dark", background="red")
    assert is_right(owls, "subject", True)
    assert not is_right(reading(("cat", LEFT)), "subject", True)
    assert [is_right(owls, "count", n) for n in (2, 3)] == [True, False]
    assert [is_right(owls, "tone", tone) for tone in ("dark", "light")] == [True, False]
    assert [is_right(owls, "style", style) for style in STYLES] == [True, False]
    assert [is_right(owls, "background", b) for b in ("red", "white")] == [True, False]
    assert is_right(owls, "size", "small")
    assert not is_right(owls, "size", "big")
    assert not is_right(reading(), "size", "small")  # nothing is not small


@pytest.mark.parametrize("size", ["small", "medium", "big"])
def test_sizes_are_told_apart_where_they_are_made(size: str):
    side = (STEP * LENGTHS[size] - 2 * INSET) / CANVAS
    for seen in (side - 0.03, side + 0.03):  # the finder's boxes are nearly right
        thing = Found("owl", None, (0.0, 0.0, seen, seen / 2))
        assert judging._size(thing) == size, side


@pytest.mark.parametrize(
    "first, second, relation",
    [(LEFT, RIGHT, "left of"), (HIGH, RIGHT, ""), (LOW, HIGH, "in front of"),
     ((0.4, 0.1, 0.6, 0.3), (0.4, 0.6, 0.6, 0.8), "above")],
)  # fmt: skip
def test_relations_are_of_the_first_to_the_second(first: Any, second: Any, relation: str):
    both = reading(("owl", first), ("cat", second))
    for each in ("left of", "above", "in front of"):
        assert is_right(both, "relation", each, other="cat") == (each == relation), each
    swapped = reading(("owl", second), ("cat", first))
    assert not is_right(swapped, "relation", relation or "above", other="cat")
    assert not is_right(reading(("owl", first)), "relation", relation, other="cat")


# Seeing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    """Six subjects: balls of six colours, and squares of these where they are flat."""
    colours = ["red", "lime", "blue", "yellow", "magenta", "cyan"]
    subjects = [Subject(c, "thing", f"{c} thing", f"{c} things") for c in colours]

    def drawing(style: str) -> Any:
        def draw(colour: str) -> Image.Image:
            image = Image.new("RGBA", (224, 224), colour)
            if style == "3D":
                y, x = np.mgrid[:224, :224] - 111.5
                ball = Image.fromarray((255 * (x**2 + y**2 < 111**2)).astype(np.uint8))
                image.putalpha(ball)
            return image

        return draw

    path = tmp_path_factory.mktemp("sprites") / "sprites.safetensors"
    draw = {style: drawing(style) for style in STYLES}
    write_sprites(path, draw, {c: c for c in colours}, subjects)
    return Sprites(path)


@pytest.fixture(scope="module")
def data(sprites: Sprites) -> Scenes:
    return Scenes(sprites, size=128)


def test_every_background_is_known_at_its_edge(data: Scenes):
    seen = set()
    for number in range(60):
        scene = data.scene(number)
        for size in (64, 256):
            picture = judging._pixels(data.draw(scene, size))
            assert judging._background(picture) == scene.background
        seen.add(scene.background)
    assert len(seen) > len(BACKGROUNDS) / 2


def test_boxes_are_those_that_were_aimed_at(data: Scenes):
    """A finder that is perfect, by its targets."""
    scenes = [data.scene(number) for number in range(40)]
    heat, boxes, rows = judging.targets(scenes)
    maps = torch.full((40, 5, 32, 32), -9.0)
    maps[:, 0] = torch.logit(heat.clamp(0.001, 0.999))
    centre = boxes.view(-1, 2, 2).mean(1) * 32
    cell = centre.long()
    side = (boxes[:, 2:] - boxes[:, :2]).log()
    maps[rows, 1:, cell[:, 1], cell[:, 0]] = torch.cat([centre - cell, side], 1)
    found, of = Judge._boxes(maps)
    for row in range(40):
        ours, theirs = (b[r == row] for b, r in ((found, of), (boxes, rows)))
        assert len(ours) == len(theirs)
        for box in theirs:
            assert (ours - box).abs().amax(1).min() < 1e-5
    perfect = float(judging.find_loss(maps, heat, boxes, rows))
    assert perfect < 0.3 * float(judging.find_loss(maps.roll(3, 3), heat, boxes, rows))


def test_crops_show_what_is_in_the_box():
    """Of any size, centred, with a little of what is around it."""
    image = torch.zeros(2, 3, 128, 128)
    boxes = []
    for left, side in ((5, 20), (30, 40), (60, 64)):
        image[1, :, left : left + side, left : left + side] = 1
        boxes.append([left / 128, left / 128, (left + side) / 128, (left + side) / 128])
    crops = judging.cut_out(image, torch.tensor(boxes), torch.tensor([1, 1, 1]))
    assert crops.shape == (3, 3, 32, 32)
    for crop in crops[:, 0]:
        assert crop[5:27, 5:27].min() > 0.9
    assert crops[0, 0, 0].max() < 0.3
    empty = judging.cut_out(image, torch.tensor(boxes), torch.tensor([0, 0, 0]))
    assert empty.max() == 0


class Few:
    """The same few scenes again and again."""

    def __init__(self, data: Scenes, count: int):
        self.data = data
        self.scenes = [data.scene(number) for number in range(count)]

    def scene(self, number: int) -> Scene:
        return self.scenes[number % len(self.scenes)]

    def draw(self, scene: Scene) -> Image.Image:
        return self.data.draw(scene)


class Mirror:
    """A tokenizer without loss, that remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def encode_to_ids(self, images: torch.Tensor) -> torch.Tensor:
        self.given.append(images)
        return images

    def decode_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids


def test_it_learns_to_see(sprites: Sprites, data: Scenes, tmp_path: Path):
    """A few scenes by heart, all facts of which it then finds right, from a file as well."""
    few: Any = Few(data, 4)
    torch.manual_seed(0)
    judge = Judge([subject.name for subject in sprites.subjects], width=8)
    mirror: Any = Mirror()
    file = tmp_path / "judge.safetensors"
    judging.train(judge, few, file, steps=100, lr=1e-2, batch=4, vae=mirror)
    assert [len(images) for images in mirror.given] == [2] * 100  # half of each batch
    found = judging.accuracy(Judge.load(file), few, 4)
    assert found["subject"] == (1, 4)
    assert found["all"][0] >= 3 / 4

    def emptied(pictures: list[Image.Image]) -> list[Image.Image]:
        return to_pil(torch.ones(len(pictures), 3, 64, 64))

    assert judging.accuracy(judge.eval(), few, 4, emptied)["subject"] == (0, 4)


def test_it_judges_prompts(data: Scenes, monkeypatch: pytest.MonkeyPatch):
    """By their keys, or by what stands in the column of a data set."""
    monkeypatch.setattr(splits, "SPRITES", data.sprites)
    asked = []
    stand_in: Any = SimpleNamespace(facts=lambda pictures, stated: asked.extend(stated))
    given = splits.PromptJudge(stand_in)
    facts = data.scene(7).facts()
    for values in ({}, {"facts": json.dumps(facts)}):
        given.facts([], [SimpleNamespace(key="train 0 7", values=values)])
    assert asked == [facts, facts]
    with pytest.raises(ValueError, match=r"'a photo' is no scene .*make_dataset\.py"):
        given.facts([], [SimpleNamespace(key="a photo", values={})])
