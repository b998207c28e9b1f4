"""Scenes: what a picture shows is what is stated, and the splits keep apart what they should."""

import importlib.util
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import captions
import layout
import numpy as np
import pytest
import reading
import scenes
import splits
import torch
from PIL import Image, ImageDraw
from scenes import BACKGROUNDS, COLOURS, SPLITS, Scene, Scenes
from sprites import STYLES, Subject, is_tone_heldout, read_subjects, toned, write_sprites

from muse_maskgit_pytorch import MaskGitTrainer, MaskGitTransformer
from muse_maskgit_pytorch.data.dataset import ImageDataset, split
from muse_maskgit_pytorch.data.rows import Rows
from tests.runs import make_maskgit, metrics

SCRIPT = Path(scenes.__file__).with_name("make_dataset.py")
SHAPES = [(200, 120), (120, 200), (224, 224), (180, 90), (100, 110)]
TONES = ("light", "medium", "dark")


def some_subjects() -> list[Subject]:
    """Some with skin tones, and some that are only drawn alone."""
    rows = read_subjects()
    people = [row for row in rows if row.group == "person" and row.plural][:12]
    animals = [row for row in rows if row.group == "animal" and row.plural][:24]
    return people + animals + [row for row in rows if not row.plural][:8]


def drawing(style: str):
    """Draws ellipses in 3D and rectangles flat, of a colour and a shape for each subject."""

    def draw(characters: str) -> Image.Image:
        number, tone = map(int, characters.split())
        image = Image.new("RGBA", (256, 256))
        width, height = SHAPES[number % len(SHAPES)]
        pen = ImageDraw.Draw(image)
        shape = pen.ellipse if style == "3D" else pen.rectangle
        shape((10, 20, 9 + width, 19 + height), (number * 5, 60 + 60 * tone, 128, 255))
        return image

    return draw


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "sprites.safetensors"
    characters = {}
    for number, subject in enumerate(some_subjects()):
        characters[subject.emoji] = f"{number} 0"
        if subject.group == "person":
            for place, tone in enumerate(TONES):
                characters[toned(subject.emoji, tone)] = f"{number} {place + 1}"
    draw = {style: drawing(style) for style in STYLES}
    write_sprites(path, draw, characters, some_subjects())
    return path


@pytest.fixture(scope="module")
def train(path: Path) -> list[Scene]:
    data = Scenes(path)
    return [data.scene(number) for number in range(1500)]


def boxes_of(scene: Scene, group: int) -> np.ndarray:
    return np.array([thing.box for thing in scene.things if thing.group == group])


def test_everything_is_inside_and_apart(train: list[Scene]):
    for scene in train:
        boxes = np.array([thing.box for thing in scene.things])
        assert boxes.min() > 0
        assert boxes.max() < 1
        assert len(boxes) == sum(group.count for group in scene.groups) <= 4
        for i in range(len(boxes) if scene.relation != "in front of" else 0):
            for j in range(i):
                low = np.maximum(boxes[i, :2], boxes[j, :2])
                high = np.minimum(boxes[i, 2:], boxes[j, 2:])
                assert (high < low).any(), scene


def test_counts_are_of_the_boxes(train: list[Scene]):
    counts = Counter()
    for scene in train:
        for index, group in enumerate(scene.groups):
            assert len(boxes_of(scene, index)) == group.count
            counts[group.count] += 1
    assert set(counts) == {1, 2, 3, 4}


def test_relations_are_of_the_boxes(train: list[Scene]):
    seen = Counter()
    for scene in train:
        if scene.relation is None:
            continue
        seen[scene.relation] += 1
        first, second = boxes_of(scene, 0), boxes_of(scene, 1)
        if scene.relation == "in front of":
            assert [thing.group for thing in scene.things] == [1, 0]  # drawn over it
            shared = np.minimum(first[0], second[0])[2:] - np.maximum(first[0], second[0])[:2]
            assert shared.min() > 0
            continue
        along = 0 if scene.relation == "left of" else 1
        assert first[:, 2 + along].max() < second[:, along].min()
        apart = ((second[:, :2] + second[:, 2:]) - (first[:, :2] + first[:, 2:]).mean(0)).mean(0)
        assert apart[along] > abs(apart[1 - along])
    assert set(seen) == set(scenes.RELATIONS)
    assert min(seen.values()) > 30


def test_what_is_behind_is_hidden_a_little(path: Path, train: list[Scene]):
    data = Scenes(path, size=256)
    for scene in [scene for scene in train if scene.relation == "in front of"][:40]:
        empty, behind, both = (
            np.asarray(data.draw(replace(scene, things=scene.things[:count]))).astype(int)
            for count in (0, 1, 2)
        )
        shown = (behind != empty).any(-1)
        hidden = (shown & (both != behind).any(-1)).sum() / shown.sum()
        assert 0.03 < hidden < 0.45


def test_sizes_are_far_apart(train: list[Scene]):
    for scene in train:
        for index, group in enumerate(scene.groups):
            boxes = boxes_of(scene, index)
            sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
            low, high = {
                "small": (0.21, 0.23),
                "medium": (0.33, 0.35),
                "big": (0.46, 0.48),
                "full": (0.8, 0.88),
            }[group.size]
            assert low < sides.min()
            assert sides.max() < high
            assert group.says_size == (group.size in ("small", "big"))


def test_things_stand_on_a_grid(path: Path, train: list[Scene]):
    """So the same thing is the same pixels at the same place in its square, wherever that is."""
    data, seen = Scenes(path, size=256), {}
    for scene in train:
        if scene.relation == "in front of" or " to " in scene.background or scene.is_full:
            continue
        picture = np.asarray(data.draw(scene))
        for thing in scene.things:
            left, top, right, bottom = (256 * edge for edge in thing.box)
            side = (max(right - left, bottom - top) + 2 * layout.INSET) // layout.STEP
            corner = [
                round((low + high - layout.STEP * side) / 2 / layout.STEP)
                for low, high in ((left, right), (top, bottom))
            ]
            x, y = (layout.STEP * place for place in corner)
            assert abs((left + right) / 2 - x - layout.STEP * side / 2) <= 1
            assert abs((top + bottom) / 2 - y - layout.STEP * side / 2) <= 1
            group = scene.groups[thing.group]
            key = group.name, group.tone, scene.style, scene.background, side
            shown = picture[round(top) : round(bottom), round(left) : round(right)]
            place, shown = (left - x, top - y), shown.copy()
            before = seen.setdefault(key, (place, shown))
            assert before[0] == place, key
            assert np.array_equal(before[1], shown), key
    assert len(seen) > 100


def pixel(colour: str) -> tuple[int, int, int]:
    return COLOURS[colour]


def test_pictures_show_the_background_and_the_subjects(path: Path, train: list[Scene]):
    data = Scenes(path, size=256)
    for scene in train[:60]:
        picture = np.asarray(data.draw(scene)).astype(int)
        colours = scene.background.split(" to ")
        assert np.abs(picture[0, 0] - pixel(colours[0])).max() <= 2
        assert np.abs(picture[-1, -1] - pixel(colours[-1])).max() <= 2
        for thing in scene.things[-1:]:  # nothing covers it
            left, top, right, bottom = (round(256 * edge) for edge in thing.box)
            group = scene.groups[thing.group]
            number = [subject.name for subject in some_subjects()].index(group.name)
            tone = 0 if group.tone is None else TONES.index(group.tone) + 1
            middle = picture[(top + bottom) // 2, (left + right) // 2]
            assert np.abs(middle - (number * 5, 60 + 60 * tone, 128)).max() <= 2
            # a rectangle reaches into the corners of its box, an ellipse does not
            corner = picture[top + 1, left + 1]
            same = np.abs(corner - middle).max() < 20
            assert same == (scene.style == "flat")


def test_all_sizes_show_the_same(path: Path, train: list[Scene]):
    data = Scenes(path)
    for scene in train[:20]:
        whole = np.asarray(data.draw(scene, 256), float)
        for size in (128, 64):
            step = 256 // size
            mean = whole.reshape(size, step, size, step, 3).mean((1, 3))
            assert np.abs(np.asarray(data.draw(scene, size)) - mean).max() <= 0.51


def test_captions_state_what_is_shown(train: list[Scene]):
    for scene in train:
        text = scene.caption.text.lower()
        for group in scene.groups:
            place(group, text)
            if group.count > 1:
                assert any(word in text for word in captions.NUMBERS[group.count])
            assert (group.tone is None) == (f"with {group.tone} skin" not in text)
            sizes = captions.SIZES[group.size].seen if group.says_size else ()
            assert group.says_size == any(f"{word} " in text for word in sizes)
        for colour in COLOURS:
            stated = f" {colour} background" in text or text.rstrip(".").endswith(f" on {colour}")
            assert not stated or (scene.says_background and colour in scene.background)
        if scene.says_background:
            assert all(colour in text for colour in scene.background.split(" to "))
        else:
            assert scene.background == "white"
        words = captions.STYLES.items()
        styles = {style for style, forms in words if any(form.lower() in text for form in forms)}
        assert styles == ({scene.style} if scene.says_style else set())
        if scene.relation:
            first, second = (place(group, text) for group in scene.groups)
            forms = captions.RELATIONS[scene.relation, first > second].seen
            assert any(f" {form} " in text for form in forms), text


def place(group: scenes.Group, text: str) -> int:
    """Where a caption, in lower case, names a group."""
    name = group.subject.plural if group.count > 1 else group.name
    found = re.search(rf"\b{name.lower()}\b", text)
    assert found, text
    return found.start()


def test_facts_are_what_the_caption_says(path: Path):
    data = Scenes(path)
    for number in range(100):
        scene, row = data.scene(number), data[number]
        facts = row["facts"]
        json.dumps(facts)
        kinds = Counter(fact["fact"] for fact in facts)
        assert kinds["subject"] == len(scene.groups)
        assert kinds["style"] == scene.says_style
        assert kinds["background"] == scene.says_background
        assert kinds["count"] == sum(group.count > 1 for group in scene.groups)
        assert kinds["relation"] == (scene.relation is not None)
        assert row["text"] == scene.caption.text


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("apple", "an"), ("red apple", "a"), ("unicorn", "a"), ("umbrella", "an"),
        ("hourglass", "an"), ("euro banknote", "a"), ("X-ray", "an"), ("old man", "an"),
        ("one-piece swimsuit", "a"), ("house", "a"), ("OK hand sign", "an"),
    ],
)  # fmt: skip
def test_articles(words: str, wanted: str):
    assert captions.article(words) == wanted


def test_the_same_scene_everywhere(path: Path):
    one, two = Scenes(path, seed=3), Scenes(path, seed=3)
    two.draw(two.scene(7))
    numbers = (0, 5, 123_456_789_012)
    assert [one.scene(n) for n in numbers] == [two.scene(n) for n in reversed(numbers)][::-1]
    assert one.draw(one.scene(5)).tobytes() == two.draw(two.scene(5)).tobytes()
    others = (Scenes(path, seed=4), Scenes(path, "seen", seed=3))
    for other in others:
        assert len({str(s.scene(n)) for s in (one, other) for n in range(20)}) == 40


def test_training_holds_nothing_that_is_held_out(train: list[Scene]):
    for scene in train:
        assert scenes.heldout(scene) == set()
        assert not scene.caption.is_heldout
        for group in scene.groups:
            assert not (group.tone and is_tone_heldout(group.subject.emoji, group.tone))


@pytest.mark.parametrize("split", [name for name in SPLITS if name not in ("train", "seen")])
def test_splits_hold_what_they_are_named_after(split: str, path: Path):
    data = Scenes(path, split)
    for number in range(60):
        scene = data.scene(number)
        assert scenes.heldout(scene) == {split} - {"form"}
        assert scene.caption.is_heldout == (split == "form")
        if split in ("style", "background", "relation", "count", "tone"):
            assert split in {fact["fact"] for fact in scene.facts()}


def test_forms_that_are_held_out_are_in_no_training_caption(train: list[Scene]):
    used = {form for scene in train for form in scene.caption.forms}
    assert used.isdisjoint(captions.HELD)
    assert used >= set(captions.SENTENCES[True, True].seen) | set(captions.RELATED.seen)
    assert any(scene.caption.text.endswith(".") for scene in train)
    for words in ("huge", "tiny", "together with", "higher up", "drawn in", "what you see"):
        assert not any(words in scene.caption.text for scene in train)


def test_all_backgrounds_and_styles_come(train: list[Scene]):
    assert {scene.background for scene in train} == set(BACKGROUNDS)
    assert {scene.style for scene in train} == set(STYLES)


def test_what_hardly_differs_from_the_background_is_not_drawn_on_it(tmp_path: Path):
    names = ("frog", "cow", "fox", "pig", "owl", "bee")
    colours = dict.fromkeys(names, (255, 0, 255)) | {"frog": COLOURS["green"]}

    def draw(characters: str) -> Image.Image:
        return Image.new("RGBA", (90, 90), (*colours[characters], 255))

    subjects = [Subject(name, "animal", name, f"{name}s") for name in names]
    draws, characters = dict.fromkeys(STYLES, draw), dict(zip(names, names, strict=True))
    write_sprites(tmp_path / "sprites", draws, characters, subjects)
    data = Scenes(tmp_path / "sprites")
    shown = [data.scene(number) for number in range(400)]
    green = {group.name for scene in shown if scene.background == "green" for group in scene.groups}
    assert "frog" not in green
    assert len(green) > 2


def test_too_few_subjects(tmp_path: Path):
    subjects = [Subject(name, "animal", name, f"{name}s") for name in ("frog", "cow", "fox")]
    image = Image.new("RGBA", (90, 90), "red")
    draws = dict.fromkeys(STYLES, lambda characters: image)
    names = {subject.name: subject.name for subject in subjects}
    write_sprites(tmp_path / "few", draws, names, subjects)
    with pytest.raises(ValueError, match="few has 3 subjects for scenes, of at least 4"):
        Scenes(tmp_path / "few")
    more = [*subjects, Subject("owl", "animal", "owl", "owls")]
    write_sprites(tmp_path / "more", draws, names | {"owl": "owl"}, more)
    with pytest.raises(ValueError, match="no scene for the split tone"):
        Scenes(tmp_path / "more", "tone").scene(0)


def test_a_trainer_takes_them(path: Path, tmp_path: Path, t5: str):
    MaskGitTrainer(
        make_maskgit(t5), data=Scenes(path, size=64, length=40), results_folder=str(tmp_path),
        batch_size=2, num_train_steps=2, num_workers=2, sample_every=0, cache_tokens=False,
    ).train()  # fmt: skip
    assert np.isfinite([line["loss"] for line in metrics(tmp_path) if "loss" in line]).all()
    item = ImageDataset(Scenes(path, size=64, length=30), 64, captions=True)[3]
    assert item["image"].shape == (3, 64, 64)
    assert item["text"] == Scenes(path).scene(3).caption.text
    with pytest.raises(IndexError, match="scene 30 of 30"):
        Scenes(path, length=30)[30]


def test_splits_by_name(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(splits, "SPRITES", str(path))
    train, form = splits.train256(), splits.form64()
    assert (train.split, train.size, len(train)) == ("train", 256, 1_000_000)
    assert (form.split, form.size, len(form)) == ("form", 64, 1000)
    assert splits.seen().size == 128
    assert [len(make()) for make in (splits.seen, splits.train, splits.train256of7)] == [
        1000, 1_000_000, 7,
    ]  # fmt: skip
    other = splits.train64of7seed2()
    assert (other.size, len(other), other.seed) == (64, 7, 2)
    assert other.scene(0) == Scenes(path, seed=2).scene(0) != splits.train().scene(0)
    for name in ("train32", "seen640", "seenseed", "other"):
        with pytest.raises(AttributeError, match=name):
            getattr(splits, name)


def test_tiles_are_cut_along_the_tokens(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(splits, "SPRITES", str(path))
    tiles = splits.Tiles()
    for number in range(8):
        scene, size = tiles.scene(number), (128, 256)[number % 2]
        tile = np.asarray(tiles.item(number).image)
        whole = np.asarray(tiles.draw(scene, size))
        empty = np.asarray(tiles.draw(replace(scene, things=()), size))
        sides = [slice(at, at + 64) for at in range(0, size - 63, 8)]
        found = [(y, x) for y in sides for x in sides if np.array_equal(whole[y, x], tile)]
        assert found
        assert all((empty[place] != tile).any() for place in found)  # something stands in it


def test_a_training_knows_its_scenes_at_every_size(path: Path):
    small, large = (ImageDataset(Scenes(path, size=size, length=50), size) for size in (64, 256))
    other = ImageDataset(Scenes(path, seed=1, size=64, length=50), 64)
    assert small.summary() == large.summary() != other.summary()
    assert split(small, 0.2)[1].keys == split(large, 0.2)[1].keys


def test_written_to_parquet(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    from muse_maskgit_pytorch.data.opening import open_named

    script = load_script()
    monkeypatch.setattr(script, "SHARD", 4)
    data = Scenes(path, "seen", seed=1, size=64, length=10)
    folder = script.make_dataset(data, tmp_path)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        f"seed1-64px-{first:08}-{last:08}.parquet" for first, last in ((0, 4), (4, 8), (8, 10))
    ]
    item = ImageDataset(Rows(open_named(str(folder)), captions=True), 64, captions=True)[5]
    truth = ImageDataset(data, 64, captions=True)[5]
    assert item["text"] == truth["text"]
    assert item["image"].equal(truth["image"])
    assert json.loads(open_named(str(folder))[5]["facts"]) == data[5]["facts"]

    # what is there is kept, what is missing is made, and another set is not mixed in
    before = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    script.make_dataset(data, tmp_path)
    assert (files[0].stat().st_mtime_ns, files[1].read_bytes()) == before
    with pytest.raises(ValueError, match="seed1-64px"):
        script.make_dataset(Scenes(path, "seen", seed=2, size=64, length=10), tmp_path)


def test_sheet(path: Path, tmp_path: Path):
    load_script().draw_sheet(Scenes(path), tmp_path / "sheet.png", 9)
    assert Image.open(tmp_path / "sheet.png").width > 8 * 128


def load_script():
    spec = importlib.util.spec_from_file_location("make_scenes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_sprites_and_wrong_arguments(path: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"npm pack.*apt install fonts-noto-color-emoji"):
        Scenes(tmp_path / "none.safetensors")
    (tmp_path / "bad").write_bytes(b"no sprites")
    with pytest.raises(ValueError, match=r"bad holds no sprites.*npm pack"):
        Scenes(tmp_path / "bad")
    with pytest.raises(ValueError, match="split must be one of train, seen"):
        Scenes(path, "test")
    with pytest.raises(ValueError, match="size must be 256, 128 or 64, not 100"):
        Scenes(path, size=100)


def test_the_table_of_subjects():
    rows = read_subjects()
    assert len({row.name for row in rows}) == len({row.emoji for row in rows}) == len(rows)
    plurals = [row.plural for row in rows if row.plural]
    assert len(set(plurals)) == len(plurals) > 500
    by_name = {row.name: row.plural for row in rows}
    assert by_name["fox"] == "foxes"
    assert by_name["man"] == "men"
    assert by_name["mouse"] == "mice"
    assert by_name["pair of scissors"] == "pairs of scissors"
    assert by_name["woman police officer"] == "women police officers"
    emoji = pytest.importorskip("emoji")
    known = {entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()}
    assert {row.emoji for row in rows} <= known


def test_text_layers_learn_what_words_say_and_nothing_else_does(path: Path):
    torch.manual_seed(0)
    network = MaskGitTransformer(
        num_tokens=16, seq_len=16, dim=64, depth=1, heads=2, dim_head=32, text_depth=2,
        t5_name="sentence-transformers/all-MiniLM-L6-v2",
    )  # fmt: skip
    before = {name: value.clone() for name, value in network.state_dict().items()}
    shares = list(reading.teach(network, Scenes(path), steps=60, batch_size=12, lr=4e-3))
    first, last = (
        {kind: np.mean([each[kind] for each in some]) for kind in reading.ANSWERS}
        for some in (shares[:5], shares[-5:])
    )
    assert last["number"] > 0.85 > 0.6 > first["number"]
    assert last["size"] > 0.85 > 0.6 > first["size"]
    for name, value in network.state_dict().items():
        assert name.startswith("text_blocks.") or torch.equal(value, before[name])
