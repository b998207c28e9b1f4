"""Sprites: the same subjects in two styles, cut out, in one file.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && apt install fonts-noto-color-emoji
    python examples/scenes/sprites.py --fluent lobehub-fluent-emoji-3d-1.1.0.tgz

writes data/sprites.safetensors. "3D" is Fluent Emoji in 3D, "flat" is Noto Color Emoji. Which
emoji take part, and what they are called, is in subjects.csv; the characters, and the variants with
skin tones, come from the package `emoji`. Those that the table calls common are the language that a
model learns; ``--all`` takes the others too, flags and signs among them: what the judge knows.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from muse_maskgit_pytorch.files import replacing

STYLES = ("3D", "flat")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SUBJECTS = Path(__file__).with_name("subjects.csv")
INSTALL = (
    "npm pack @lobehub/fluent-emoji-3d@1.1.0, apt install fonts-noto-color-emoji and "
    "pip install emoji==2.16.0, then python examples/scenes/sprites.py"
)
LONGEST = 224  # pixels of the longer side that are kept: what a square of 256 can show
FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "/usr/share/fonts/google-noto-emoji",
    "/usr/share/fonts/google-noto-color-emoji-fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
)
# The font's one bitmap strike: Pillow takes no other size, and every glyph has exactly this box.
STRIKE_SIZE, STRIKE_WIDTH, STRIKE_HEIGHT = 109, 136, 128


@dataclass(frozen=True)
class Subject:
    """Something that can be drawn.

    Attributes:
        emoji: its name in the package `emoji`.
        group: "animal", "food", "flag" ...
        name: what it is called, without an article; no other subject is called the same.
        plural: of the name; "" for what is only drawn alone, large and on white.
        tones: the skin tones that it can have, besides none.
    """

    emoji: str
    group: str
    name: str
    plural: str
    tones: tuple[str, ...] = ()


def read_subjects(path: Path = SUBJECTS, every: bool = True) -> list[Subject]:
    """The subjects of a table with the columns emoji, group, name, plural and common.

    Args:
        path: of the table.
        every: take those that are not common, too.
    """
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Subject(row["emoji"], row["group"], row["name"], row["plural"])
            for row in csv.DictReader(file)
            if every or row["common"]
        ]


def toned(emoji: str, tone: str) -> str:
    """The name that the package `emoji` gives a subject with a skin tone."""
    return f"{emoji} {tone} skin tone"


def is_tone_heldout(emoji: str, tone: str) -> bool:
    """Say whether no training sees this subject with this tone: a tenth, as in examples/emoji."""
    return int(sha256(toned(emoji, tone).encode()).hexdigest(), 16) % 10 == 0


class Sprites:
    """Sprites in a file that `write_sprites` made, read as they are asked for.

    Args:
        path: the file.

    Attributes:
        subjects: all of them, in the order of the table.

    Raises:
        ValueError: there is no such file, or it is something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there are no sprites at {path}: {INSTALL} --out {path}")
        try:
            with safe_open(self.path, "np") as file:
                listed = json.loads(file.metadata()["subjects"])
                sizes = json.loads(file.metadata()["sizes"])
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no sprites ({error}): {INSTALL}") from error
        self.subjects = [
            Subject(
                each["emoji"], each["group"], each["name"], each["plural"], tuple(each["tones"])
            )
            for each in listed
        ]
        self._sizes: dict[str, tuple[int, int]] = {key: (w, h) for key, (w, h) in sizes.items()}
        self._open: tuple[int, Callable[[str], np.ndarray]] | None = None

    def size(self, style: str, subject: Subject, tone: str | None = None) -> tuple[int, int]:
        """Width and height of a sprite, in pixels."""
        return self._sizes[_key(style, subject.name, tone)]

    def image(self, style: str, subject: Subject, tone: str | None = None) -> Image.Image:
        """A sprite as it is kept: "RGBA", cropped to what is not transparent."""
        if self._open is None or self._open[0] != os.getpid():  # a file is not shared by processes
            self._open = os.getpid(), safe_open(self.path, "np").get_tensor
        return Image.fromarray(self._open[1](_key(style, subject.name, tone)))

    def __getstate__(self):
        return self.__dict__ | {"_open": None}


def _key(style: str, name: str, tone: str | None) -> str:
    return f"{style}/{name}" + (f"/{tone}" if tone else "")


def write_sprites(
    path: str | Path,
    draw: Mapping[str, Callable[[str], Image.Image | None]],
    characters: Mapping[str, str],
    subjects: list[Subject],
) -> list[Subject]:
    """Write the sprites of all subjects that every style has.

    Args:
        path: the file to write.
        draw: by style, what draws an emoji's characters with transparency; None: it has none.
        characters: of the emoji, by name.
        subjects: which.

    Returns:
        the subjects that were written, with the tones that every style has.
    """
    pixels: dict[str, np.ndarray] = {}
    written = []
    for subject in tqdm(subjects, desc="cutting out", unit="subject"):
        found: list[str | None] = []
        for tone in (None, *TONES):
            emoji = subject.emoji if tone is None else toned(subject.emoji, tone)
            if emoji not in characters:
                continue
            drawn = {style: draw[style](characters[emoji]) for style in STYLES}
            images = {style: cut(image) for style, image in drawn.items() if image is not None}
            if len(images) < len(STYLES):
                continue
            found.append(tone)
            for style, image in images.items():
                pixels[_key(style, subject.name, tone)] = np.asarray(image)
        if None in found:
            tones = tuple(tone for tone in found if tone)
            written.append(replace(subject, tones=tones))
    names = {subject.name for subject in written}
    pixels = {key: image for key, image in pixels.items() if key.split("/")[1] in names}
    metadata = {
        "subjects": json.dumps([asdict(subject) for subject in written]),
        "sizes": json.dumps({key: image.shape[1::-1] for key, image in pixels.items()}),
    }
    with replacing(path) as temporary:
        save_file(pixels, temporary, metadata)
    return written


def cut(image: Image.Image) -> Image.Image:
    """Crop to what is visible, and scale down to `LONGEST`."""
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    image = image.crop(box)
    if max(image.size) > LONGEST:
        scale = LONGEST / max(image.size)
        width, height = (max(1, round(scale * side)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def emoji_characters() -> dict[str, str]:
    """Characters of all fully qualified emoji by name.

    Raises:
        ImportError: the package is missing.
    """
    try:
        from emoji import EMOJI_DATA, STATUS
    except ImportError as error:
        raise ImportError("the emoji's names are missing: pip install emoji==2.16.0") from error
    return {
        entry["en"].strip(":").replace("_", " "): characters
        for characters, entry in EMOJI_DATA.items()
        if entry["status"] == STATUS["fully_qualified"]
    }


def fluent(path: str | Path) -> Callable[[str], Image.Image | None]:
    """What draws in 3D.

    Args:
        path: the archive that npm packs, or the folder of its WebP files.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if path.is_dir():
        data = {file.name: file.read_bytes() for file in path.rglob("*.webp")}
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            data = {
                Path(member.name).name: file.read()
                for member in archive
                if member.name.endswith(".webp") and (file := archive.extractfile(member))
            }
    else:
        data = {}
    if not data:
        raise ValueError(f"{path} holds no 3D sprites: {INSTALL} --fluent ARCHIVE")
    # three flags are spelt with underscores
    files = {name.removesuffix(".webp").replace("_", "-"): each for name, each in data.items()}

    def draw(characters: str) -> Image.Image | None:
        found = files.get("-".join(f"{ord(each):04x}" for each in characters))
        return Image.open(io.BytesIO(found)).convert("RGBA") if found else None

    return draw


def noto(path: str | Path | None = None) -> Callable[[str], Image.Image | None]:
    """What draws flat.

    Args:
        path: the font; None: where the usual packages put it.

    Raises:
        ValueError: no such file, not the bitmap font, or a Pillow without raqm.
    """
    if not features.check("raqm"):
        raise ValueError(
            "this Pillow cannot shape emoji sequences (no raqm): use the wheel from PyPI, "
            "pip install --force-reinstall --only-binary :all: pillow"
        )
    places = [Path(path)] if path else [Path(p).expanduser() / FONT_NAME for p in FONT_FOLDERS]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"{path or FONT_NAME} not found: {INSTALL} --font {FONT_NAME}")
    try:
        font = ImageFont.truetype(found, STRIKE_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"{found} has no 136x128 bitmaps ({error}): {INSTALL}") from error

    def draw(characters: str) -> Image.Image | None:
        if not STRIKE_WIDTH - 1 < font.getlength(characters) <= STRIKE_WIDTH:
            return None  # several glyphs side by side: the font has no picture for them
        image = Image.new("RGBA", (STRIKE_WIDTH, STRIKE_HEIGHT))
        ImageDraw.Draw(image).text((0, 0), characters, font=font, embedded_color=True)
        return image if image.getchannel("A").getbbox() else None

    return draw


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--fluent", default="lobehub-fluent-emoji-3d-1.1.0.tgz", help="archive")
    parser.add_argument("--font", help=f"path of {FONT_NAME}")
    parser.add_argument("--all", action="store_true", help="subjects that are not common, too")
    arguments = parser.parse_args()
    try:
        draw = {"3D": fluent(arguments.fluent), "flat": noto(arguments.font)}
        subjects = read_subjects(every=arguments.all)
        written = write_sprites(arguments.out, draw, emoji_characters(), subjects)
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    sprites = len(STYLES) * sum(1 + len(subject.tones) for subject in written)
    print(f"{sprites:,} sprites of {len(written):,} subjects in {arguments.out}")


if __name__ == "__main__":
    main()
