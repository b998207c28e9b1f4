"""`muse data check` finds what is wrong with a data set, and says nothing of what is not."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.data.check import check_data, near_pairs, perceptual_hash
from muse_maskgit_pytorch.data.folder import open_source


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth shapes, as in a photograph."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Six good pictures, and one of each fault."""
    folder = tmp_path / "data"
    folder.mkdir()

    def save(name: str, image: Image.Image, text: str | None, **options: Any) -> None:
        image.save(folder / name, **options)
        if text is not None:
            (folder / name).with_suffix(".txt").write_text(text)

    for i in range(6):
        save(f"good{i}.png", picture(i), f"picture number {i}")
    save("resized.png", picture(0).resize((48, 32)), "a small one")
    save("recompressed.jpg", picture(1), "an old one", quality=40)
    save("blurred.png", picture(2).filter(ImageFilter.GaussianBlur(1)), "picture number 3")
    (folder / "copy.png").write_bytes((folder / "good4.png").read_bytes())
    (folder / "copy.txt").write_text("words " * 40)
    save("flat.png", Image.new("RGB", (64, 64), "red"), "red")
    save("silent.png", picture(20), None)
    save("empty.png", picture(21), "  ")
    raw = io.BytesIO()
    picture(22).save(raw, "JPEG")
    (folder / "cut.jpg").write_bytes(raw.getvalue()[:-400])
    (folder / "cut.txt").write_text("a cut one")
    (folder / "notes.png").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_every_fault_is_found_and_no_other(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], t5: str
):
    out = tmp_path / "out"
    command = ["data", "check", str(faulty), "--out", str(out), "--image_size", "48"]
    assert main([*command, "--t5_name", t5, "--max_text_len", "24"]) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "check.json").read_text())
    assert found["images"] == 11
    assert found["broken"].keys() == {"cut.jpg", "notes.png"}
    assert "cannot identify" in found["broken"]["notes.png"]
    assert set(found["left_out"]["have no caption"]) == {"silent.png", "empty.png"}
    assert found["small"] == ["resized.png"]
    assert found["flat"] == ["flat.png"]
    assert found["repeated"] == [["picture number 3", 2]]
    assert [key for key, _ in found["too_long"]] == ["copy.png"]
    assert found["limit"] == 24
    assert found["same"] == [["copy.png", "good4.png"]]
    assert {frozenset(group) for group in found["alike"]} == {
        frozenset({"good0.png", "resized.png"}),
        frozenset({"good1.png", "recompressed.jpg"}),
        frozenset({"good2.png", "blurred.png"}),
    }
    for words in ("2 cannot be read", "2 are left out", "are of one colour", "the same file"):
        assert words in said
    page = (out / "check.html").read_text()
    assert "resized.png" in page
    assert page.count("data:image") >= 5
    assert Image.open(out / "sheet.png").width > 700


def test_good_data_are_called_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    assert main(["data", "check", str(tmp_path), "--t5_name", "none", "--num_workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "nothing was found to be wrong" in said
    assert "captions: 5; words: 2" in said


def test_a_folder_without_captions_is_looked_at_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture(0).save(tmp_path / "a.png")
    assert main(["data", "check", str(tmp_path), "--t5_name", "none"]) == 0
    assert "none of the 1 images" in capsys.readouterr().out


def test_tars_and_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(4):
            raw = io.BytesIO()
            picture(i % 3).save(raw, "PNG")
            for name, data in ((f"{i}.png", raw.getvalue()), (f"{i}.txt", b"a text")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    command = ["data", "check", str(tmp_path / "a.tar"), "--t5_name", "none"]
    assert main([*command, "--streaming", "true"]) == 2
    assert "--limit" in capsys.readouterr().err
    for more in ([], ["--streaming", "true", "--limit", "4"]):
        assert main([*command, *more]) == 0
        said = capsys.readouterr().out
        assert "4 images" in said
        assert "1 captions stand for several images, 4 in all" in said
        assert "2 images in 1 groups are the same file" in said


def test_what_cannot_be_looked_at_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    picture(0).save(tmp_path / "a.png")
    assert main(["data", "check", str(tmp_path), "--limit", "0", "--t5_name", "none"]) == 2
    assert "limit" in capsys.readouterr().err


def test_near_pairs_are_all_of_them():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(40):  # planted: up to 9 bits away
        bits = generator.choice(64, i % 10, replace=False)
        flip = np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=0)
        hashes[100 + i] = hashes[i] ^ np.uint64(flip)
    expected = {
        (i, j)
        for i in range(300)
        for j in range(i + 1, 300)
        if int(hashes[i] ^ hashes[j]).bit_count() <= 6
    }
    found = [tuple(sorted(pair)) for pair in near_pairs(hashes)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) >= 28


def test_hashes_stay_when_pictures_are_scaled_and_differ_between_pictures():
    hashes = [perceptual_hash(picture(seed)) for seed in range(20)]
    for seed, own in enumerate(hashes):
        assert own is not None
        other = perceptual_hash(picture(seed).resize((60, 40)))
        assert other is not None
        assert (own ^ other).bit_count() <= 4
    apart = [(a ^ b).bit_count() for a in hashes for b in hashes if a != b]  # type: ignore[operator]
    assert min(apart) > 12


def test_a_limit_looks_at_items_from_all_over(tmp_path: Path):
    for i in range(8):
        picture(i).save(tmp_path / f"{i}.png")
    report = check_data(open_source(None, str(tmp_path)), limit=2)
    assert report.images == 2
