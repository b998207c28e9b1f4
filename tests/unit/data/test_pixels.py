"""Random crops and flips: drawn from the seed and the position of the sample."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from muse_maskgit_pytorch import VQGanVAETrainer
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.data import ImageDataset, Item
from muse_maskgit_pytorch.data.order import EndlessBatches, Sample
from muse_maskgit_pytorch.data.pixels import View

SIZE = 8


class Ramps:
    """Pictures whose red says how far right and whose green how far down a pixel is."""

    keys = ("a", "b", "c", "d", "e")

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, index: int) -> Item:
        y, x = np.mgrid[:48, :64]
        return Item(Image.fromarray(np.stack([x * 4, y * 5, x * 0 + index], -1).astype(np.uint8)))


def dataset(cache: bool = False, **changes: Any) -> ImageDataset:
    arguments: dict[str, Any] = {"crop": "random", **changes}
    return ImageDataset(Ramps(), View(SIZE, **arguments), cache=cache)


def stream(data: ImageDataset, count: int, *, batch=2, start=0, rank=0, world=1, workers=0):
    sampler = EndlessBatches([range(len(data))], batch, 0, start, rank, world)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    return [item["image"] for item in islice(loader, count)]


def test_crops_depend_on_the_position_alone_whoever_draws_them():
    """On several workers and processes, after a resume, and with a cache."""
    data = dataset(flip=True)
    whole = torch.cat(stream(data, 8))
    assert torch.equal(torch.cat(stream(data, 8, workers=2)), whole)
    assert torch.equal(torch.cat(stream(data, 3, start=10)), whole[10:])
    shares = [stream(data, 4, rank=rank, world=2) for rank in (0, 1)]
    joined = [images for pair in zip(*shares, strict=True) for images in pair]
    assert torch.equal(torch.cat(joined), whole)
    assert torch.equal(torch.cat(stream(dataset(cache=True, flip=True), 8)), whole)
    with torch.device("meta"):  # no random number comes from another default device
        assert torch.equal(data[Sample(2, 7)]["image"], dataset(flip=True)[Sample(2, 7)]["image"])


def test_crops_differ_between_epochs_and_seeds():
    data, other = dataset(), dataset(seed=1)
    first, second = (data[Sample(0, position)]["image"] for position in (0, 5))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other[Sample(0, 0)]["image"])


def span(image: Tensor) -> tuple[float, float, float]:
    """First column, first row, and side of a crop, in pixels of the picture."""
    red, green = image[0, 0] * 255 / 4, image[1, :, 0] * 255 / 5
    side = float(red[-1] - red[0]) * SIZE / (SIZE - 1)
    return float(red[0]), float(green[0]), side


def test_crops_have_every_side_and_place_that_is_asked_for():
    data = dataset(crop_scale=(0.5, 0.75))
    lefts, tops, sides = zip(
        *(span(data[Sample(0, position)]["image"]) for position in range(200)), strict=True
    )
    assert 22 < min(sides) < 26
    assert 34 < max(sides) < 38
    assert min(lefts) < 4
    assert max(lefts) > 32  # of at most 40
    assert min(tops) < 4
    assert max(tops) > 18  # of at most 24


def test_half_of_the_pictures_are_mirrored():
    data = dataset(crop="center", flip=True)
    plain = data[0]["image"]
    drawn = [data[Sample(0, position)]["image"] for position in range(200)]
    mirrored = sum(torch.equal(image, plain.flip(-1)) for image in drawn)
    assert mirrored + sum(torch.equal(image, plain) for image in drawn) == 200
    assert 75 < mirrored < 125  # binomial: 100 with a deviation of 7


def test_the_cache_keeps_no_more_than_the_smallest_crop_needs():
    data = dataset(cache=True, crop_scale=(0.5, 1.0))
    assert data._cache is not None
    assert data._cache[0]["picture"].shape == (16, 21, 3)
    enlarged = dataset(cache=True, crop_scale=(0.1, 1.0))  # 80 pixels would be needed
    assert enlarged._cache is not None
    assert enlarged._cache[0]["picture"].shape == (48, 64, 3)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.8, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_scales_are_checked(scale: tuple[float, float]):
    with pytest.raises(ValueError, match="crop_scale"):
        View(SIZE, "random", scale)
    with pytest.raises(ValueError, match="crop must be"):
        View(SIZE, "middle")  # type: ignore[arg-type]


@pytest.mark.parametrize("cached", [True, False])
def test_the_trainer_crops_the_training_images_alone_and_resumes_exactly(
    tmp_path: Path, cached: bool
):
    weights = tiny.vae().state_dict()

    def trainer(name: str, steps: int, **changes: Any) -> VQGanVAETrainer:
        vae = tiny.vae()
        vae.load_state_dict(weights)
        settings: dict[str, Any] = dict(
            image_size=SIZE, crop="random", flip=True, cache_images=cached, perceptual_weight=0,
            gan_weight=0, batch_size=2, warmup_steps=0, lr_schedule="constant", sample_every=0,
            valid_fraction=0.4, num_train_steps=steps, results_folder=str(tmp_path / name),
        )  # fmt: skip
        return VQGanVAETrainer(vae, data=Ramps(), **(settings | changes))

    whole = trainer("whole", 4)
    train, valid = whole.make_datasets()
    plain = ImageDataset(Ramps(), SIZE)[0]["image"]
    assert valid is not None
    for view in (valid, whole.dataset):
        assert torch.equal(view[Sample(0, 3)]["image"][:2], plain[:2])
    assert not torch.equal(train[Sample(0, 3)]["image"][:2], plain[:2])

    whole.train()
    trainer("parts", 2).train()
    trainer("parts", 4, resume=True).train()
    first, second = (load_file(tmp_path / n / "vae.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load_file(trained(trainer("centre", 4, crop="center", flip=False)))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def trained(trainer: VQGanVAETrainer) -> Path:
    trainer.train()
    return trainer.results_folder / "vae.safetensors"
