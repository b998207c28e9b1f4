"""Make a captioned image set out of the Noto Color Emoji font and the names in `emoji`.

    python examples/emoji/make_dataset.py --out data/emoji

writes OUT/64/train, OUT/64/heldout, OUT/128/train and OUT/128/heldout, each with numbered PNG
files and a `metadata.csv` (file_name,text). A number means the same emoji everywhere.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

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
LAST_EMOJI_VERSION = 15.0
EXPECTED_TOTAL, EXPECTED_HELDOUT = 3655, 197  # with emoji 2.16


def emoji_names() -> list[tuple[str, str]]:
    """List (caption, characters) of all fully qualified emoji up to version 15.0, by caption.

    Raises:
        ImportError: the `emoji` package is missing.
    """
    try:
        from emoji import EMOJI_DATA, STATUS
    except ImportError as error:
        raise ImportError("the emoji names are missing: pip install emoji==2.16.0") from error
    return sorted(
        (entry["en"].strip(":").replace("_", " "), characters)
        for characters, entry in EMOJI_DATA.items()
        if entry["status"] == STATUS["fully_qualified"] and entry["E"] <= LAST_EMOJI_VERSION
    )


def is_heldout(caption: str) -> bool:
    """Say whether no training may ever see this caption: a tenth of those with a skin tone."""
    return "skin tone" in caption and int(sha256(caption.encode()).hexdigest(), 16) % 10 == 0


def load_font(path: str | Path | None = None) -> ImageFont.FreeTypeFont:
    """Open the colour font; without a path where the usual packages put it.

    Raises:
        ValueError: no such file, not the bitmap font, or a Pillow without raqm.
    """
    if not features.check("raqm"):
        # Without it a family would be drawn as its members one after another.
        raise ValueError(
            "this Pillow cannot shape emoji sequences (no raqm): use the wheel from PyPI, "
            "pip install --force-reinstall --only-binary :all: pillow"
        )
    places = [Path(path)] if path else [Path(p).expanduser() / FONT_NAME for p in FONT_FOLDERS]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"{path or FONT_NAME} not found: apt install fonts-noto-color-emoji, "
            f"or give the path to {FONT_NAME} with --font"
        )
    try:
        return ImageFont.truetype(found, STRIKE_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(
            f"{found} has no 136x128 bitmaps ({error}): Debian's fonts-noto-color-emoji does"
        ) from error


def is_one_glyph(characters: str, font: ImageFont.FreeTypeFont) -> bool:
    """Say whether the font draws a sequence as one picture, whole and not empty."""
    box = font.getbbox(characters)
    one_wide = STRIKE_WIDTH - 1 < font.getlength(characters) <= STRIKE_WIDTH
    return box == (0, 0, STRIKE_WIDTH, STRIKE_HEIGHT) and one_wide


def draw(characters: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw an emoji on a white square of 128 px."""
    image = Image.new("RGB", (STRIKE_WIDTH, STRIKE_WIDTH), "white")
    top = (STRIKE_WIDTH - STRIKE_HEIGHT) // 2
    ImageDraw.Draw(image).text((0, top), characters, font=font, embedded_color=True)
    return image.resize((128, 128), Image.Resampling.LANCZOS)


def halve(image: Image.Image) -> Image.Image:
    """Average 2x2 pixels, so that the 128 px image scaled down by area is the 64 px one."""
    return image.reduce(2)  # unlike resize with BOX it rounds only once


def make_dataset(out: Path, font: ImageFont.FreeTypeFont) -> dict[str, int]:
    """Write the whole set; a run that was interrupted is simply repeated.

    Args:
        out: folder to write to; what it already holds of this set is overwritten.
        font: as from `load_font`.

    Returns:
        the number of pairs per split.

    Raises:
        ValueError: another release of `emoji` lists other pairs, the font cannot draw one, or
            `out` holds images of something else, which a training that reads the folder would
            take for its own.
    """
    pairs = emoji_names()
    heldout = sum(is_heldout(caption) for caption, _ in pairs)
    if (len(pairs), heldout) != (EXPECTED_TOTAL, EXPECTED_HELDOUT):
        raise ValueError(
            f"expected {EXPECTED_TOTAL:,} pairs with {EXPECTED_HELDOUT} held out, got "
            f"{len(pairs):,} with {heldout}: pip install emoji==2.16.0"
        )
    if wrong := [name for name, characters in pairs if not is_one_glyph(characters, font)]:
        raise ValueError(f"the font has no picture for {len(wrong)} emoji: {', '.join(wrong[:10])}")
    splits = {"train": [], "heldout": []}
    for number, (caption, _) in enumerate(pairs):
        splits["heldout" if is_heldout(caption) else "train"].append((f"{number:05}.png", caption))

    for folder, rows in _folders(out, splits):
        strangers = {path.name for path in folder.glob("*.png")} - {name for name, _ in rows}
        if strangers:
            raise ValueError(f"{folder} holds other images, such as {min(strangers)}: clear it")
        folder.mkdir(parents=True, exist_ok=True)
    for number, (caption, characters) in enumerate(tqdm(pairs, desc="drawing", unit="emoji")):
        split = "heldout" if is_heldout(caption) else "train"
        image = draw(characters, font)
        for size, picture in ((128, image), (64, halve(image))):
            _save(picture, out / str(size) / split / f"{number:05}.png")
    # Last, so that a folder with captions is a complete one.
    for folder, rows in _folders(out, splits):
        partial = folder / "metadata.csv.part"
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file_name", "text"), *rows])
        os.replace(partial, folder / "metadata.csv")
    return {split: len(rows) for split, rows in splits.items()}


def _folders(
    out: Path, splits: dict[str, list[tuple[str, str]]]
) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    for size in ("64", "128"):
        for split, rows in splits.items():
            yield out / size / split, rows


def _save(image: Image.Image, path: Path) -> None:
    partial = path.with_suffix(".part")
    image.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="folder to write")
    parser.add_argument("--font", help=f"path of {FONT_NAME}")
    arguments = parser.parse_args()
    try:
        counts = make_dataset(arguments.out, load_font(arguments.font))
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{sum(counts.values()):,} pairs, each drawn as one glyph: {counts['train']:,} for "
        f"training, {counts['heldout']} held out, in {arguments.out}"
    )


if __name__ == "__main__":
    main()
