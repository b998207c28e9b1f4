"""Data of another origin: what it takes to train from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from muse_maskgit_pytorch import MaskGitTrainer, VQGanVAETrainer
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.data import Folder, ImageDataset, Item, split
from muse_maskgit_pytorch.data.source import WithCondImages
from muse_maskgit_pytorch.images import read_image


class Pictures:
    """A stranger's source: pictures in memory with captions."""

    def __init__(self, pictures: dict[str, Image.Image]):
        self.keys, self.pictures = list(pictures), list(pictures.values())

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, index: int) -> Item:
        return Item(self.pictures[index], text=self.keys[index])


def noise(seed: int, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def pictures(count: int = 6) -> Pictures:
    return Pictures({f"picture {i}": noise(i) for i in range(count)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i, key in enumerate(pictures().keys):
        noise(i).save(root / f"{key}.png")
        (root / f"{key}.txt").write_text(key)
    return root


SETTINGS: dict[str, Any] = dict(
    batch_size=2, num_train_steps=2, warmup_steps=0, sample_every=0, valid_fraction=0
)
PLAIN: dict[str, Any] = dict(image_size=16, perceptual_weight=0, gan_weight=0)


def test_both_trainers_train_from_a_source_as_from_a_folder(folder: Path, tmp_path: Path):
    vae = tiny.vae().state_dict()
    ways: dict[str, dict[str, Any]] = {
        "data": {"data": pictures()},
        "folder": {"folder": str(folder)},
    }
    for name, data in ways.items():
        model = tiny.vae()
        model.load_state_dict(vae)
        results = str(tmp_path / name)
        VQGanVAETrainer(model, **data, **PLAIN, results_folder=results, **SETTINGS).train()
    first, second = (load_file(tmp_path / n / "vae.safetensors") for n in ("data", "folder"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_exactly_one_of_folder_and_data(folder: Path):
    cases: list[dict[str, Any]] = [{}, {"folder": str(folder), "data": pictures()}]
    for both in cases:
        with pytest.raises(ValueError, match=r"folder (and|nor) data"):
            VQGanVAETrainer(tiny.vae(), **PLAIN, **both)


def test_a_source_is_split_by_its_keys_and_stands_in_for_what_is_broken():
    source = pictures(12)
    train, valid = split(ImageDataset(source, 16), 0.3)
    assert sorted(train.keys + valid.keys) == sorted(source.keys)
    again = split(ImageDataset(Pictures({k: noise(0) for k in reversed(source.keys)}), 16), 0.3)
    assert set(again[1].keys) == set(valid.keys)

    def item(index: int) -> Item:
        if index == 0:
            raise ValueError("picture 0 is broken")
        return Item(source.pictures[index])

    source.item = item  # type: ignore[method-assign]
    data = ImageDataset(source, 16)
    with pytest.warns(UserWarning, match="picture 0 is broken; the next"):
        assert torch.equal(data[0]["image"], data[1]["image"])
    assert data.broken == ["picture 0"]


def test_captions_that_are_needed_are_asked_for():
    source = pictures(2)
    source.item = lambda index: Item(noise(index))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'picture 0'.*no caption"):
        ImageDataset(source, 16, captions=True)[0]


def test_low_resolution_images_are_matched_by_name(folder: Path, tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    for i in range(6):
        noise(100 + i, 8).save(small / f"picture {i}.bmp")
    source = WithCondImages(Folder(folder), Folder(small))
    low = source.item(3).cond_image
    assert low is not None
    assert read_image(low).tobytes() == noise(103, 8).tobytes()
    noise(0, 8).save(small / "picture 2.png")
    with pytest.raises(ValueError, match="more than one low-resolution image for picture 2"):
        WithCondImages(Folder(folder), Folder(small))
    for name in ("picture 2.png", "picture 2.bmp", "picture 4.bmp"):
        (small / name).unlink()
    with pytest.raises(ValueError, match=r"no low.* 2 of 6 images: picture 2\.png, picture 4"):
        WithCondImages(Folder(folder), Folder(small))
    with pytest.raises(ValueError, match=r"cond_folder.*no cond_image_size"):
        MaskGitTrainer(tiny.maskgit(), folder=str(folder), cond_folder=str(small))
