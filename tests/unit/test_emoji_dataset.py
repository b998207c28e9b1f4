"""The emoji set: its size, its captions, whole glyphs, and what is held out."""

import csv
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont, features

pytest.importorskip("emoji", reason="the emoji names need: pip install emoji==2.16.0")

SCRIPT = Path(__file__).parents[2] / "examples" / "emoji" / "make_dataset.py"
SAMPLE = [
    "grinning face",
    "Norway",
    "England",
    "family man woman girl boy",
    "keycap 5",
    "rainbow flag",
    "woman firefighter medium-dark skin tone",
    "kiss man man dark skin tone light skin tone",
    "people holding hands medium skin tone dark skin tone",
]


def load_script():
    spec = importlib.util.spec_from_file_location("make_dataset", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emoji_set = load_script()


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return emoji_set.emoji_names()


@pytest.fixture(scope="module")
def font() -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        pytest.skip("this Pillow has no raqm")
    try:
        return emoji_set.load_font()
    except ValueError as error:
        pytest.skip(str(error))


def test_names(pairs: list[tuple[str, str]]):
    captions = [caption for caption, _ in pairs]
    assert len(captions) == len(set(captions)) == 3655
    assert len({characters for _, characters in pairs}) == 3655
    assert captions == sorted(captions)
    assert not any("_" in caption or caption != caption.strip(" :") for caption in captions)
    assert ("grinning face", "😀") in pairs
    assert ("woman firefighter dark skin tone", "👩🏿‍🚒") in pairs
    assert "shaking face" in captions  # version 15.0
    assert "lime" not in captions  # version 15.1


def test_heldout(pairs: list[tuple[str, str]]):
    heldout = [caption for caption, _ in pairs if emoji_set.is_heldout(caption)]
    assert len(heldout) == 197
    assert all("skin tone" in caption for caption in heldout)
    # every skin tone and most subjects remain in training, so that only combinations are new
    words = {word for caption, _ in pairs if caption not in heldout for word in caption.split()}
    assert all(word in words for caption in heldout for word in caption.split())


def test_every_emoji_is_one_glyph(pairs: list[tuple[str, str]], font: ImageFont.FreeTypeFont):
    wrong = [caption for caption, text in pairs if not emoji_set.is_one_glyph(text, font)]
    assert wrong == []


def test_two_glyphs_and_unknown_characters_are_noticed(font: ImageFont.FreeTypeFont):
    assert not emoji_set.is_one_glyph("😀😀", font)
    assert not emoji_set.is_one_glyph("é", font)


def test_drawings_are_whole_and_on_white(
    pairs: list[tuple[str, str]], font: ImageFont.FreeTypeFont
):
    texts = dict(pairs)
    images = [np.asarray(emoji_set.draw(texts[caption], font)) for caption in SAMPLE]
    for image in images:
        assert image.shape == (128, 128, 3)
        assert image[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 255  # corners
        assert (image < 250).any(-1).mean() > 0.2
        # nothing is cut off above and below: the glyph ends within the padding
        assert image[:3].min() > 250
        assert image[-3:].min() > 250
    assert len({image.tobytes() for image in images}) == len(images)


def test_halving_averages_four_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    half = np.asarray(emoji_set.halve(Image.fromarray(noise)))
    mean = noise.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(half - mean).max() <= 0.5


@pytest.fixture
def few(monkeypatch, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A set of eleven, two of them held out."""
    texts = dict(pairs)
    heldout = [caption for caption, _ in pairs if emoji_set.is_heldout(caption)][:2]
    few = sorted((caption, texts[caption]) for caption in [*SAMPLE, *heldout])
    monkeypatch.setattr(emoji_set, "emoji_names", lambda: few)
    monkeypatch.setattr(emoji_set, "EXPECTED_TOTAL", 11)
    monkeypatch.setattr(emoji_set, "EXPECTED_HELDOUT", 2)
    return few


def read_all(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_written_set(tmp_path: Path, few, font: ImageFont.FreeTypeFont):
    assert emoji_set.make_dataset(tmp_path / "a", font) == {"train": 9, "heldout": 2}
    files = read_all(tmp_path / "a")
    assert Counter(Path(name).suffix for name in files) == {".png": 22, ".csv": 4}
    for number, (caption, _) in enumerate(few):
        split = "heldout" if emoji_set.is_heldout(caption) else "train"
        small, large = (
            Image.open(tmp_path / "a" / size / split / f"{number:05}.png") for size in ("64", "128")
        )
        assert (small.mode, small.size, large.size) == ("RGB", (64, 64), (128, 128))
        assert np.array_equal(np.asarray(small), np.asarray(emoji_set.halve(large)))
        for size in ("64", "128"):
            with (tmp_path / "a" / size / split / "metadata.csv").open(encoding="utf-8") as lines:
                rows = {row["file_name"]: row["text"] for row in csv.DictReader(lines)}
            assert rows[f"{number:05}.png"] == caption

    # repeated after an interruption, and in another place, it comes out the same
    (tmp_path / "a" / "64" / "train" / "metadata.csv").unlink()
    (tmp_path / "a" / "64" / "train" / "00000.png").write_bytes(b"half")
    emoji_set.make_dataset(tmp_path / "a", font)
    emoji_set.make_dataset(tmp_path / "b", font)
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b") == files


def test_other_images_in_the_way(tmp_path: Path, few, font: ImageFont.FreeTypeFont):
    (tmp_path / "128" / "train").mkdir(parents=True)
    (tmp_path / "128" / "train" / "mine.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"mine\.png"):
        emoji_set.make_dataset(tmp_path, font)
    assert (tmp_path / "128" / "train" / "mine.png").read_bytes() == b"mine"


def test_another_release_of_the_names(tmp_path: Path, monkeypatch, font: ImageFont.FreeTypeFont):
    monkeypatch.setattr(emoji_set, "emoji_names", lambda: [("grinning face", "😀")])
    with pytest.raises(ValueError, match=r"3,655 pairs with 197.*got 1 with 0.*emoji==2\.16\.0"):
        emoji_set.make_dataset(tmp_path / "out", font)
    assert not (tmp_path / "out").exists()


def test_missing_or_wrong_font(tmp_path: Path):
    if not features.check("raqm"):
        pytest.skip("this Pillow has no raqm")
    with pytest.raises(ValueError, match="apt install fonts-noto-color-emoji"):
        emoji_set.load_font(tmp_path / "none.ttf")
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="bitmaps"):
        emoji_set.load_font(tmp_path / "bad.ttf")


def test_pillow_without_raqm(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match="raqm"):
        emoji_set.load_font()
