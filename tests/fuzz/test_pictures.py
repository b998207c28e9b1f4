"""Image files and captions, damaged: each becomes a picture or a text, or is refused by name."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from torch import Tensor

from muse_maskgit_pytorch.data import Folder, ImageFolder, split
from muse_maskgit_pytorch.images import (
    RECORD,
    check_image,
    formats,
    read_image,
    read_record,
    read_with_alpha,
    to_tensor,
)
from tests.fuzz.driver import Random, damaged, damaged_bytes, run


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Images ------------------------------------------------------------------------------------------


def make_images() -> dict[str, bytes]:
    """Small files of every format, with all that may stand beside the pixels."""
    y, x = np.mgrid[:24, :40]
    photo = Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, 72.0, "a caption"
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt(RECORD, '{"prompt": "é"}', zip=True)
    texts.add_text("comment", "words")
    beside = dict(
        exif=exif.tobytes(),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    files: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, format: str, **options: object) -> None:
        if format in formats():
            buffer = io.BytesIO()
            image.save(buffer, format, **options)
            files[f"{name}.{format.lower()}"] = buffer.getvalue()

    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        add(mode, photo.convert(mode), "PNG", pnginfo=texts, **beside)
    deep = Image.fromarray((x * 1500).astype(np.uint16))
    add("deep", deep, "PNG")
    add("deep", deep, "TIFF")
    add("real", Image.fromarray((x / 40).astype(np.float32)), "TIFF")
    for mode in ("RGB", "L", "CMYK"):
        add(mode, photo.convert(mode), "JPEG", **beside)
    add("progressive", photo, "JPEG", progressive=True, **beside)
    for mode in ("RGB", "RGBA"):
        add(mode, photo.convert(mode), "WEBP", lossless=True, **beside)
    for compression in ("raw", "tiff_lzw", "jpeg"):
        add(compression, photo, "TIFF", compression=compression, **beside)
    moving = dict(save_all=True, append_images=[photo.convert("L").convert("RGB")])
    add("moving", photo, "GIF", **moving)
    add("moving", photo, "WEBP", **moving)
    add("moving", photo, "PNG", **moving)
    for format in ("BMP", "PPM", "JPEG2000", "AVIF", "QOI"):
        add("plain", photo, format)
    return files


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(png):
        size = struct.unpack(">I", png[at : at + 4])[0]
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def damaged_png(random: Random, png: bytes) -> bytes:
    """One chunk damaged, with a checksum that says it is sound."""
    parts = chunks(png)
    place = int(random.integers(len(parts)))
    kind, body = parts[place]
    match random.integers(4):
        case 0:
            body = damaged_bytes(random, body)
        case 1 if kind == b"IHDR":  # sizes of any kind
            sides = random.choice([0, 1, 7, 40, 300, 9000, 60_000, 2**31 - 1], size=2)
            body = struct.pack(">II", *map(int, sides)) + body[8:]
        case 1 if kind in (b"iTXt", b"iCCP", b"zTXt"):  # far longer than they look
            name = body.split(b"\0")[0]
            body = name + b"\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0")
            body += zlib.compress(bytes(2**22))
        case 1:
            kind = bytes(random.permutation(list(kind)).astype(np.uint8))
        case 2:
            parts.insert(int(random.integers(len(parts))), (kind, body))
        case _:
            body = bytes(body[: random.integers(len(body) + 1)])
    parts[place] = (kind, body)
    lines = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return png[:8] + b"".join(lines)


def refusal(read: Callable[..., Any], *arguments: Any) -> str | None:
    """In which words something is refused, if it is."""
    try:
        read(*arguments)
    except ValueError as error:
        return str(error)
    return None


def rgb(image: Image.Image) -> None:
    assert image.mode == "RGB"


def sound(tensor: Tensor) -> None:
    assert tensor.shape == (3, 16, 16)
    assert 0 <= tensor.min() <= tensor.max() <= 1  # NaN is neither


def test_damaged_images(tmp_path: Path):
    files = make_images()

    def one(random: Random) -> str:
        name = list(files)[random.integers(len(files))]
        raw = files[name]
        bad = damaged_png if name.endswith(".png") and random.random() < 0.7 else damaged_bytes
        path = tmp_path / f"damaged.{name}"
        path.write_bytes(bad(random, raw))
        said = [refusal(read, path) for read in (check_image, read_record, read_with_alpha)]
        said.append(refusal(lambda path: rgb(read_image(path)), path))
        outcome = "refused" if said[-1] else "read"
        try:  # as a caller opens it
            opened = Image.open(path)
        except Exception:
            return outcome
        with opened:
            said.append(refusal(lambda image: sound(to_tensor(image, 16)), opened))
        for error in filter(None, said):
            assert path.name in error, error
            assert len(error) < 1000 + len(str(path)), error
        return outcome

    # what a few bytes may declare, up to the limit of 89 million pixels, is decoded whole
    found = run("images", 11, one, default=250, megabytes=1024)
    assert found["read"] > 0 < found["refused"]


# Captions ----------------------------------------------------------------------------------------

NAMES = ("a.png", "b.png", "deep/c.png")
TEXTS = (
    "a red apple",
    "une pomme décorée, à l’ombre",
    "赤いりんご",
    "👩\u200d🚀",
    "",
    '"quoted", so',
)
ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "cp1252", "utf-8-sig", "utf-32", "gb18030", "utf-7")


def text_file(random: Random, text: str) -> bytes:
    encoding = ENCODINGS[random.integers(len(ENCODINGS))]
    raw = text.encode(encoding, "replace")
    return damaged_bytes(random, raw) if raw and random.random() < 0.4 else raw


def metadata(random: Random, is_csv: bool) -> str:
    rows = [
        {"file_name": name, "text": TEXTS[random.integers(len(TEXTS))], "more": 1} for name in NAMES
    ]
    for _ in range(random.integers(3)):
        rows = damaged(random, rows)
    if not is_csv:
        lines = rows if isinstance(rows, list) else [rows]
        text = "\n".join(json.dumps(row) for row in lines)
        return text.replace("1", "[" * 3000, 1) if random.random() < 0.05 else text
    lines = ["file_name,text,more"]
    for row in rows if isinstance(rows, list) else []:
        values = row.values() if isinstance(row, dict) else [row]
        quoted = random.random() < 0.7
        lines.append(
            ",".join(
                '"' + str(value).replace('"', '""') + '"' if quoted else str(value)
                for value in values
            )
        )
    return "\r\n".join(lines)


def odd_name(random: Random) -> bytes:
    names = (b"\xff\xfe", b"caf\xe9", b"a\nb", b"\x1b[31m", b"...", b" ", b"@eaDir", "é".encode())
    return names[random.integers(len(names))] + (b"", b".png", b".txt")[random.integers(3)]


def test_damaged_captions_and_folders(tmp_path: Path):
    plain = io.BytesIO()
    Image.new("RGB", (4, 4)).save(plain, "PNG")

    def one(random: Random) -> str:
        folder = tmp_path / "images"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "deep").mkdir(parents=True)
        for name in NAMES:
            (folder / name).write_bytes(plain.getvalue())
        tables = [name for name in ("metadata.csv", "metadata.jsonl") if random.random() < 0.4]
        for name in tables:
            text = metadata(random, name.endswith("csv")).encode("utf-8", "surrogatepass")
            raw = (
                text if random.random() < 0.4 else text_file(random, text.decode(errors="replace"))
            )
            (folder / name).write_bytes(raw)
        for name in NAMES:
            if random.random() < 0.6:
                text = TEXTS[random.integers(len(TEXTS))]
                (folder / name).with_suffix(".txt").write_bytes(text_file(random, text))
        for _ in range(random.integers(3)):
            place = os.path.join(os.fsencode(folder), odd_name(random))
            match random.integers(4):
                case 0:
                    os.makedirs(place, exist_ok=True)
                case 1 if not os.path.lexists(place):
                    os.symlink((folder, tmp_path, "none", place)[random.integers(4)], place)
                case _ if not os.path.isdir(place) and not os.path.islink(place):
                    with open(place, "wb") as file:
                        file.write(random.choice([plain.getvalue(), b""]))
        if error := refusal(Folder, folder, True):
            assert str(folder) in error, error
            error.encode()  # any terminal shows it
            return "refused"
        source = Folder(folder, captions=True)
        assert source.texts is not None
        assert len(source.texts) == len(source.names) > 0
        for text in source.texts:
            text.encode()
            assert text.strip()
            assert "\0" not in text
        dataset = ImageFolder(folder, 4, captions=True)
        train, valid = split(dataset, 0.5)
        assert sorted(train.keys + valid.keys) == sorted(dataset.keys)
        assert dataset.summary()["items"] == len(source)
        assert dataset[0]["image"].shape == (3, 4, 4)
        return "read"

    found = run("captions and folders", 12, one, default=250)
    assert found["read"] > 0 < found["refused"]
