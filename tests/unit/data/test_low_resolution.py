"""Super-resolution reads the low-resolution tokens that the base is trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data

from muse_maskgit_pytorch import ImageFolder, MaskGitTrainer, write_cache
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.data import ImageDataset, Item
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.data.rows import Rows
from muse_maskgit_pytorch.images import resize, to_tensor

SMALL, LARGE = 32, 64
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in PHOTOS:
        photo(name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    vae = tiny.randomise(tiny.vae())
    model = tiny.maskgit(
        tiny.transformer(seq_len=256), vae=vae, image_size=LARGE, cond_image_size=SMALL
    )
    monkeypatch.setattr(model, "embed_texts", lambda texts, **_: tiny.text(len(texts)))
    return model


def trainer(stage: Any, results: Path, **changes: Any) -> MaskGitTrainer:
    settings: dict[str, Any] = dict(batch_size=2, valid_fraction=0, results_folder=str(results))
    return MaskGitTrainer(stage, **(settings | changes))


def trained_ids(stage: Any, results: Path, **changes: Any) -> torch.Tensor:
    """The low-resolution ids of the training, in the order of the files."""
    made = trainer(stage, results, **changes)
    train = made.ready(made.make_datasets()[0], None)
    if made.cache_tokens:
        with torch.device("meta"):  # batches stay where the cache is
            assert train.__getitems__([1, 0]).text_embeds.mask.device.type == "cpu"  # type: ignore[attr-defined]
        return train.__getitems__(range(len(train))).cond_ids  # type: ignore
    batch = made.collate([train[row] for row in range(len(train))])  # type: ignore[arg-type]
    arguments = made._arguments(batch)
    images = arguments["images_or_ids"]
    return stage.encode_cond(arguments["cond_images"], arguments["cond_ids"], images)


def base_ids(stage: Any, folder: Path) -> torch.Tensor:
    images = torch.stack([item["image"] for item in ImageFolder(folder, SMALL)])
    return stage.cond_vae.encode_to_ids(images).flatten(1)


@pytest.mark.parametrize("cached", [True, False])
def test_the_trainers_low_resolution_is_the_bases_data(
    photos: Path, tmp_path: Path, stage: Any, cached: bool
):
    ids = trained_ids(stage, tmp_path / "r", folder=str(photos), cache_tokens=cached)
    assert torch.equal(ids.long(), base_ids(stage, photos))


@pytest.mark.parametrize("cached", [True, False])
def test_low_resolution_images_can_be_given(photos: Path, tmp_path: Path, stage: Any, cached: bool):
    """As a folder, or by the items of a source themselves."""
    small = tmp_path / "small"
    small.mkdir()
    for name, other in zip(PHOTOS, reversed(PHOTOS), strict=True):
        photo(other).resize((SMALL, SMALL)).save(small / f"{name}.png")
    expected = base_ids(stage, small)
    given: dict[str, Any] = dict(folder=str(photos), cond_folder=str(small), cache_tokens=cached)
    assert torch.equal(trained_ids(stage, tmp_path / "r", **given).long(), expected)

    class Pairs:
        keys = sorted(PHOTOS)

        def __len__(self) -> int:
            return len(self.keys)

        def item(self, index: int) -> Item:
            key = self.keys[index]
            return Item(photo(key), key, Image.open(small / f"{key}.png"))

    given = dict(data=Pairs(), cache_tokens=cached)
    assert torch.equal(trained_ids(stage, tmp_path / "r", **given).long(), expected)


def test_low_resolution_images_of_ones_own_are_no_random_crops(
    photos: Path, tmp_path: Path, stage: Any
):
    small = [{"image": photo(name), "text": name, "cond_image": photo(name)} for name in PHOTOS]

    class Endless:
        def __iter__(self) -> Any:
            yield from small

    ways: list[dict[str, Any]] = [
        dict(folder=str(photos), cond_folder=str(photos)),
        dict(data=small, min_size=10),
        dict(data=Endless()),
    ]
    for way in ways:
        for view in ({"crop": "random"}, {"flip": True}):
            with pytest.raises(ValueError, match=r"low-resolution images of its own .* leave them"):
                trainer(stage, tmp_path / "r", cache_tokens=False, **way, **view)
    data = ImageDataset(Rows(small, captions=True), View(LARGE, "random"), True)
    with pytest.raises(ValueError, match="do not fit random crops: leave them out"):
        write_cache(tmp_path / "cache", stage, data, crops=2, say=None)


def test_tensors_scaled_down_have_the_ids_of_files(stage: Any):
    """Where there is no file: at most one id in a hundred may differ; area averages: many."""
    wrong = area = total = 0
    for name in PHOTOS:
        image = photo(name).crop((0, 0, 256, 256))
        ids = stage.vae.encode_to_ids(to_tensor(image, LARGE)[None])
        whole = to_tensor(image)[None]
        wrong += int((stage.vae.encode_to_ids(resize(whole, (LARGE, LARGE))) != ids).sum())
        averaged = torch.nn.functional.interpolate(whole, LARGE, mode="area")
        area += int((stage.vae.encode_to_ids(averaged) != ids).sum())
        total += ids.numel()
    assert wrong <= total / 100
    assert area > 2 * wrong + total / 100
