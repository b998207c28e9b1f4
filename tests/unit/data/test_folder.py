"""Folders of images: order, captions, broken files, splits."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from muse_maskgit_pytorch import VQGanVAETrainer
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.data import Folder, ImageFolder, split


def paint(path: Path, level: int, size: int = 8) -> None:
    """A grey image whose level says which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level, level, level)).save(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def levels(dataset: ImageFolder) -> list[int]:
    return [round(dataset[i]["image"].mean().item() * 255) for i in range(len(dataset))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images made in another order than that of their names."""
    root = tmp_path / "images"
    for level in (50, 20, 60, 10, 40, 30):
        paint(root / f"{level}.png", level)
    return root


def test_the_listing_is_sorted_recursive_and_knows_its_endings(folder: Path):
    paint(folder / "deep" / "er" / "5.JPG", 100)
    paint(folder / "9.WebP", 110)
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    dataset = ImageFolder(folder, 8)
    expected = ["10.png", "20.png", "30.png", "40.png", "50.png", "60.png"]
    assert dataset.names == [*expected, "9.WebP", "deep/er/5.JPG"]
    assert levels(dataset)[:6] == [10, 20, 30, 40, 50, 60]
    assert set(dataset[0]) == {"image"}


def test_items_are_squares_in_the_unit_range(folder: Path):
    Image.new("RGB", (30, 12), "white").save(folder / "10.png")
    image = ImageFolder(folder, 16)[0]["image"]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert image.min() == image.max() == 1


def test_indices(folder: Path):
    dataset = ImageFolder(folder, 8)
    assert torch.equal(dataset[-1]["image"], dataset[5]["image"])
    for index in (6, -7):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_captions(folder: Path, kind: str):
    captions = {f"{level}.png": f"grey, “{level}”" for level in (60, 10, 30, 20, 50, 40)}
    if kind == "csv":
        rows = "".join(f'{name},"{text}"\r\n' for name, text in captions.items())
        (folder / "metadata.csv").write_text("file_name,text\r\n" + rows, "utf-8-sig")
    elif kind == "jsonl":
        rows = [json.dumps({"file_name": n, "text": t, "more": 1}) for n, t in captions.items()]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n\n", "utf-8")
    else:
        for name, text in captions.items():
            (folder / name).with_suffix(".txt").write_text(f"{text}\n", "utf-8")
    dataset = ImageFolder(folder, 8, captions=True)
    assert [item["text"] for item in dataset] == [f"grey, “{n}0”" for n in range(1, 7)]
    assert levels(dataset) == [10, 20, 30, 40, 50, 60]


def test_metadata_in_subfolders_and_text_beside(folder: Path):
    paint(folder / "more" / "a b.png", 70)
    (folder / "more" / "metadata.csv").write_text("text,file_name\nseventy,./a b.png\n")
    (folder / "40.txt").write_text("forty\n  grey ")
    with pytest.warns(UserWarning, match=r"5 of 7 images that have no caption: 10\.png, 20\.png"):
        dataset = ImageFolder(folder, 8, captions=True)
    assert dataset.names == ["40.png", "more/a b.png"]
    assert dataset.texts == ["forty grey", "seventy"]
    assert levels(dataset) == [40, 70]


def test_an_empty_or_unreadable_caption_is_none(folder: Path):
    (folder / "10.txt").write_text(" \n")
    (folder / "20.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "30.txt").write_text("thirty")
    with (
        pytest.warns(
            UserWarning,
            match=r"cannot read 1 of the caption files: 20\.txt \(it is marked as utf-16",
        ),
        pytest.warns(UserWarning, match="5 of 6 images that have no caption"),
    ):
        assert ImageFolder(folder, 8, captions=True).names == ["30.png"]


def test_no_captions_at_all(folder: Path):
    with pytest.raises(ValueError, match=r"none of the 6 images.*metadata\.csv.*NAME\.txt"):
        ImageFolder(folder, 8, captions=True)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", b"name,caption\n10.png,ten\n", "file_name and text"),
        ("metadata.csv", b"file_name,text\n10.png,a\0b\n", "cannot read.*NUL"),
        ("metadata.jsonl", b'{"file_name": "10.png", "text": "ten"\n', "cannot read"),
        ("metadata.jsonl", b'["10.png", "ten"]\n', "file_name and text"),
        ("metadata.jsonl", b'{"file_name": "10.png", "text": 3}\n', "file_name and text"),
    ],
)
def test_bad_metadata(folder: Path, name: str, content: bytes, message: str):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ImageFolder(folder, 8, captions=True)
    assert name in str(error.value)


def test_no_folder_no_images(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    cases = [("none", "does not exist"), ("file", "is not a folder"), ("empty", "no images")]
    for name, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            ImageFolder(tmp_path / name, 8)
        assert name in str(error.value)


@pytest.mark.parametrize("size", [0, -8])
def test_image_size_must_be_positive(folder: Path, size: int):
    with pytest.raises(ValueError, match="image_size"):
        ImageFolder(folder, size)


@pytest.mark.parametrize("cache", [False, True])
def test_a_file_that_is_no_image_is_left_out(folder: Path, cache: bool):
    (folder / "20.png").write_bytes(b"")
    (folder / "50.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"left out 2 of 6 .*: 20\.png, 50\.png") as caught:
        dataset = ImageFolder(folder, 8, cache=cache)
    assert len(caught) == 1
    assert dataset.broken == ["20.png", "50.png"]
    assert levels(dataset) == [10, 30, 40, 60]


def test_an_image_cut_short_gives_way_to_the_next(folder: Path):
    for name in ("10.png", "20.png", "60.png"):
        truncate(folder / name)
    dataset = ImageFolder(folder, 8)
    with pytest.warns(UserWarning, match="next readable") as caught:
        assert levels(dataset) == [30, 30, 30, 40, 50, 30]
    assert [name in str(w.message) for w, name in zip(caught, ["10", "20", "60"], strict=True)]
    assert dataset.broken == ["10.png", "20.png", "60.png"]
    with warnings.catch_warnings():  # named once only
        warnings.simplefilter("error")
        assert levels(dataset) == [30, 30, 30, 40, 50, 30]


def test_the_cache_finds_images_cut_short_at_once(folder: Path):
    truncate(folder / "30.png")
    (folder / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n}0.png,grey {n}0\n" for n in range(1, 7))
    )
    with pytest.warns(UserWarning, match=r"1 of 6 .*30\.png"):
        dataset = ImageFolder(folder, 8, captions=True, cache=True)
    assert levels(dataset) == [10, 20, 40, 50, 60]
    assert [item["text"] for item in dataset] == [f"grey {n}0" for n in (1, 2, 4, 5, 6)]


@pytest.mark.parametrize("cache", [False, True])
def test_nothing_readable(folder: Path, cache: bool):
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.warns(match="6 of 6"), pytest.raises(ValueError, match="no image that can be read"):
        ImageFolder(folder, 8, cache=cache)


def test_nothing_readable_any_more(folder: Path):
    dataset = ImageFolder(folder, 8)
    for path in folder.iterdir():
        truncate(path)
    with pytest.warns(match="cannot read"), pytest.raises(ValueError, match="no image that can"):
        dataset[0]


def test_the_cache_changes_nothing(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        noise = torch.randint(0, 256, (20, 31, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    plain, cached = (ImageFolder(tmp_path, 16, cache=cache) for cache in (False, True))
    for i in range(3):
        assert torch.equal(plain[i]["image"], cached[i]["image"])


def test_a_loader_with_workers(folder: Path):
    truncate(folder / "20.png")
    (folder / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n}0.png,grey {n}0\n" for n in range(1, 7))
    )
    loader = DataLoader(ImageFolder(folder, 8, captions=True), batch_size=3, num_workers=1)
    batches = list(loader)
    assert [batch["image"].shape for batch in batches] == [(3, 3, 8, 8)] * 2
    # image and caption stay together
    assert batches[0]["text"] == ["grey 10", "grey 30", "grey 30"]


def make_many(root: Path, numbers: range) -> None:
    for number in numbers:
        paint(root / f"{number:03}.png", number % 256, size=1)


@pytest.mark.parametrize("cache", [False, True])
def test_split_is_a_partition_of_about_the_right_size(tmp_path: Path, cache: bool):
    make_many(tmp_path, range(200))
    dataset = ImageFolder(tmp_path, 1, cache=cache)
    train, valid = split(dataset, 0.25)
    assert sorted(train.names + valid.names) == dataset.names
    assert 30 <= len(valid) <= 70  # binomial: 50 with a deviation of 6
    assert levels(valid) == [int(name[:3]) for name in valid.names]
    assert split(dataset, 0.25, seed=1)[1].names != valid.names


def test_adding_images_moves_none(tmp_path: Path):
    make_many(tmp_path, range(0, 100, 2))
    before = split(ImageFolder(tmp_path, 1), 0.3)
    make_many(tmp_path, range(1, 100, 2))
    after = split(ImageFolder(tmp_path, 1), 0.3)
    for old, new in zip(before, after, strict=True):
        assert set(old.names) < set(new.names)


def test_split_does_not_depend_on_where_the_folder_lies(tmp_path: Path):
    for root in (tmp_path / "a", tmp_path / "b" / "c"):
        make_many(root, range(30))
    a, b = (split(ImageFolder(root, 1), 0.3)[1] for root in (tmp_path / "a", tmp_path / "b" / "c"))
    assert a.names == b.names


@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_two_images_give_one_to_each_side(tmp_path: Path, fraction: float):
    make_many(tmp_path, range(2))
    train, valid = split(ImageFolder(tmp_path, 1), fraction)
    assert len(train) == len(valid) == 1


def test_split_edges(tmp_path: Path):
    make_many(tmp_path, range(1))
    dataset = ImageFolder(tmp_path, 1)
    train, valid = split(dataset, 0)
    assert (len(train), len(valid)) == (1, 0)
    assert [len(part) for part in split(dataset, 0.999)] == [1, 0]  # a single image trains
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="valid_fraction"):
            split(dataset, fraction)


def test_a_broken_training_image_never_lets_a_validation_image_in(folder: Path):
    dataset = ImageFolder(folder, 8)
    train, valid = split(dataset, 0.5)
    for name in train.names[:-1]:
        truncate(folder / name)
    with pytest.warns(UserWarning, match="next readable"):
        seen = set(levels(train))
    assert seen == {int(train.names[-1][:2])}
    assert seen.isdisjoint(levels(valid))
    assert dataset.broken == train.names[:-1]


# What is no part of the data ---------------------------------------------------------------------


def test_what_systems_and_runs_leave_behind_is_left_out_and_counted(folder: Path):
    rubbish = (".ipynb_checkpoints/1", ".Trash-1000/files/2", "@eaDir/3", "__MACOSX/._4", "._5")
    for name in rubbish:
        paint(folder / f"{name}.png", 1)
    paint(folder / "run" / "samples" / "vae-00000001.png", 1)
    paint(folder / "older" / "samples" / "base-00000001.png", 1)
    (folder / "older" / "metrics.jsonl").touch()
    paint(folder / "samples" / "70.png", 70)  # of that name, but of no run
    with (
        pytest.warns(UserWarning, match=r"left out 5 that are hidden.*\.Trash-1000/files/2\.png"),
        pytest.warns(UserWarning, match=r"left out 2 that were drawn by a training run"),
    ):
        source = Folder(folder, results_folder=folder / "run")
    assert len(source) == 7
    assert source.names[-1] == "samples/70.png"
    assert sorted(map(len, source.left_out.values())) == [2, 5]


def test_a_run_inside_its_data_folder_sees_the_same_images_when_it_goes_on(folder: Path):
    """Its sample sheets are pictures too."""

    def run(steps: int) -> VQGanVAETrainer:
        return VQGanVAETrainer(
            tiny.vae(), folder=str(folder), results_folder=str(folder), resume=True, image_size=8,
            num_train_steps=steps, batch_size=2, perceptual_weight=0, gan_weight=0,
        )  # fmt: skip

    first = run(1)
    first.train()
    assert list(folder.rglob("samples/*.png"))
    with pytest.warns(UserWarning, match="drawn by a training run"):
        second = run(2)
    found = first.dataset.summary()
    assert found["items"] == 6
    assert second.dataset.summary()["fingerprint"] == found["fingerprint"]
    assert second.dataset.summary()["left_out"] == {"were drawn by a training run": 1}


def test_the_summary_shows_what_has_changed(folder: Path):
    for name in ("10", "20", "30"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "20.png").write_bytes(b"no image")

    def summary(captions: bool = True) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageFolder(folder, 8, captions=captions).summary()

    first = summary()
    assert first == summary()
    assert first["items"] == 2
    assert first["left_out"] == {"have no caption": 3, "cannot be read": 1}
    assert first["source"] == f"image folder {str(folder)!r}"
    assert first["fingerprint"] != summary(captions=False)["fingerprint"]
    (folder / "10.txt").write_text("ten")
    assert summary()["fingerprint"] != first["fingerprint"]
    (folder / "10.txt").write_text("10")
    assert summary() == first
    (folder / "40.txt").write_text("40")
    assert summary()["items"] == 3
    assert summary()["fingerprint"] != first["fingerprint"]


def test_names_that_are_not_utf8(folder: Path):
    name = os.fsdecode(b"caf\xe9.png")
    paint(folder / name, 70)
    (folder / name).with_suffix(".txt").write_text("coffee")
    truncate(folder / "20.png")
    with pytest.warns(UserWarning, match="no caption"):
        dataset = ImageFolder(folder, 8, captions=True)
    assert levels(dataset) == [70]
    assert dataset[0]["text"] == "coffee"
    every = ImageFolder(folder, 8)
    train, valid = split(every, 0.5)
    assert sorted(train.names + valid.names) == every.names
    assert every.summary()["fingerprint"] != dataset.summary()["fingerprint"]
    (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:  # noqa: PT030 the text is checked below
        ImageFolder(folder, 8)
    assert "caf\\udce9.png" in str(caught[0].message)
    str(caught[0].message).encode()  # any terminal can show it


def test_folders_behind_links_are_searched_once(folder: Path, tmp_path: Path):
    paint(tmp_path / "elsewhere" / "70.png", 70)
    paint(tmp_path / "elsewhere" / "deep" / "80.png", 80)
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b").symlink_to(tmp_path / "elsewhere" / "deep")  # reached by way of a
    (folder / "circle").symlink_to(folder)
    (folder / "lost").symlink_to(tmp_path / "none")
    (folder / "90.png").symlink_to(tmp_path / "elsewhere" / "70.png")
    paint(folder / "z" / "60.png", 60)
    (folder / "c").symlink_to(folder / "z")  # a folder has its own name where it has one
    names = Folder(folder).names
    assert [n for n in names if "/" in n] == ["a/70.png", "a/deep/80.png", "z/60.png"]
    assert "90.png" in names


def test_further_endings_are_read_and_the_others_named(folder: Path):
    Image.new("RGB", (8, 8), (70, 70, 70)).save(folder / "70.jfif", "JPEG")
    for name in ("80.heic", "81.JXL", "notes.docx"):
        (folder / name).write_bytes(b"?")
    with pytest.warns(UserWarning, match=r"2 that are in formats .*: 80\.heic, 81\.JXL"):
        assert levels(ImageFolder(folder, 8))[-1] == 70
    for path in folder.iterdir():
        if path.suffix in (".png", ".jfif"):
            path.unlink()
    with (
        pytest.warns(UserWarning, match="formats"),
        pytest.raises(ValueError, match=r"no images .*it has 1 \.heic, 1 \.jxl, 1 \.docx"),
    ):
        Folder(folder)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(folder: Path):
    Image.new("RGB", (8, 8), (70, 70, 70)).save(folder / "70.AVIF", "AVIF")
    assert abs(levels(ImageFolder(folder, 8))[-1] - 70) <= 2
