"""Sprites: what is read from an archive or a folder, and how it is cut out and kept."""

import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sprites
from PIL import Image, features
from sprites import (
    STYLES,
    TONES,
    Sprites,
    Subject,
    cut,
    fluent,
    is_tone_heldout,
    noto,
    read_subjects,
    toned,
    write_sprites,
)  # fmt: skip

ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


def picture(colour: str, size: tuple[int, int] = (30, 20)) -> Image.Image:
    """A filled box with a transparent edge of five pixels."""
    image = Image.new("RGBA", (size[0] + 10, size[1] + 10))
    image.paste(Image.new("RGBA", size, colour), (5, 5))
    return image


def files() -> dict[str, bytes]:
    made = {}
    for name, colour in (("1f98a.webp", "red"), ("1f468-200d-1f692.webp", "blue")):
        stream = io.BytesIO()
        picture(colour).save(stream, "WEBP", lossless=True)
        made[name] = stream.getvalue()
    return made


@pytest.fixture(params=["archive", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        (tmp_path / "assets").mkdir()
        for name, data in files().items():
            (tmp_path / "assets" / name).write_bytes(data)
        return tmp_path
    with tarfile.open(tmp_path / "fluent.tgz", "w:gz") as archive:
        for name, data in {**files(), "README.md": b"no picture"}.items():
            member = tarfile.TarInfo(f"package/assets/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path / "fluent.tgz"


def test_fluent_is_found_by_its_characters(source: Path):
    draw = fluent(source)
    fox, man = draw("\U0001f98a"), draw("\U0001f468\u200d\U0001f692")
    assert fox is not None
    assert man is not None
    assert (fox.mode, fox.size) == ("RGBA", (40, 30))
    assert fox.getpixel((20, 15)) == (255, 0, 0, 255)
    assert man.getpixel((20, 15)) == (0, 0, 255, 255)
    assert draw("\U0001f437") is None


def test_flags_spelt_with_underscores(tmp_path: Path):
    name = "-".join(f"{ord(each):04x}" for each in ENGLAND).replace("-e", "_e")
    picture("red").save(tmp_path / f"{name}.webp")
    assert fluent(tmp_path)(ENGLAND) is not None


def test_missing_sources(tmp_path: Path):
    both = r"npm pack @lobehub/fluent-emoji-3d@1\.1\.0.*apt install fonts-noto-color-emoji"
    for place in (tmp_path, tmp_path / "none.tgz"):
        with pytest.raises(ValueError, match=f"holds no 3D sprites: {both}"):
            fluent(place)
    if not features.check("raqm"):
        pytest.skip("this Pillow has no raqm")
    with pytest.raises(ValueError, match=rf"none\.ttf not found: {both}"):
        noto(tmp_path / "none.ttf")
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="no 136x128 bitmaps"):
        noto(tmp_path / "bad.ttf")


def test_pillow_without_raqm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match="no raqm"):
        noto()


def test_the_font_draws_one_glyph_or_nothing():
    try:
        draw = noto()
    except ValueError as error:
        pytest.skip(str(error))
    fox = draw("\U0001f98a")
    assert fox is not None
    assert fox.size == (136, 128)
    alpha = np.asarray(fox.getchannel("A"))
    assert alpha[64, 68] == 255
    assert alpha[0, 0] == 0
    assert draw("\U0001f98a\U0001f98a") is None
    assert draw("\u00e9") is None


def test_cut_to_what_is_visible_and_no_larger_than_needed():
    assert cut(picture("red")).size == (30, 20)
    large = cut(picture("red", (448, 100)))
    assert large.size == (sprites.LONGEST, 50)
    assert np.asarray(large)[2:-2, 2:-2].tolist() == [[[255, 0, 0, 255]] * 220] * 46


def test_written_and_read(tmp_path: Path):
    colours = {"fox": "red", "man": "yellow", "man light": "pink", "man dark": "brown"}

    def flat(characters: str) -> Image.Image | None:
        # no style of its own has every tone, and a subject may be missing in one
        return None if characters in ("man dark", "cow") else picture(colours[characters])

    def round_one(characters: str) -> Image.Image | None:
        return picture(colours.get(characters, "black"), (20, 30))

    subjects = [Subject(name, "animal", name, f"{name}s") for name in ("fox", "man", "cow", "elk")]
    characters = {"fox": "fox", "man": "man", "cow": "cow"}
    characters |= {toned("man", tone): f"man {tone}" for tone in ("light", "dark")}
    path = tmp_path / "new" / "sprites"
    written = write_sprites(path, {"3D": round_one, "flat": flat}, characters, subjects)
    assert [(subject.name, subject.tones) for subject in written] == [
        ("fox", ()), ("man", ("light",)),
    ]  # fmt: skip
    found = Sprites(path)
    assert found.subjects == written
    fox, man = found.subjects
    for style, size in zip(STYLES, ((20, 30), (30, 20)), strict=True):
        assert found.size(style, fox) == found.image(style, fox).size == size
        assert found.image(style, man, "light").getpixel((3, 3)) == (255, 192, 203, 255)
        assert found.image(style, man).getpixel((3, 3)) == (255, 255, 0, 255)


def test_tones_are_held_out_as_in_the_emoji_set():
    script = Path(sprites.__file__).parents[1] / "emoji" / "make_dataset.py"
    spec = importlib.util.spec_from_file_location("make_emoji", script)
    assert spec is not None
    assert spec.loader is not None
    emoji_set = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emoji_set)
    held = 0
    for subject in read_subjects():
        for tone in TONES:
            here = is_tone_heldout(subject.emoji, tone)
            assert here == emoji_set.is_heldout(toned(subject.emoji, tone))
            held += here
    assert held > 100
