"""A loss that counts by a mask of the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from muse_maskgit_pytorch import MaskGitTrainer, testing
from muse_maskgit_pytorch.data import Folder, ImageFolder
from muse_maskgit_pytorch.data.check import check_data
from muse_maskgit_pytorch.data.dataset import ImageDataset
from muse_maskgit_pytorch.data.order import Sample, Shares
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.data.source import Item
from muse_maskgit_pytorch.images import to_pil
from tests.runs import assert_same, last_state, make_maskgit, metrics


def test_tokens_without_weight_teach_nothing():
    model = testing.maskgit(label_smoothing=0.1, unmasked_weight=0.2)
    loss_mask = torch.zeros(2, 1, 16, 16)
    loss_mask[:, :, :6, :8] = 1  # the left half: one row of 4 x 4 patches, and half of the next
    counted = torch.tensor([1.0, 1, 0, 0, 0.5, 0.5, 0, 0, *[0.0] * 8]).repeat(2, 1)
    assert torch.equal(model.token_shares(loss_mask), counted)
    ids, mask = testing.ids(2), torch.arange(16).expand(2, 16) % 2 == 0
    others = torch.where((counted > 0) | ~mask, ids, (ids + 1) % testing.CODES)
    assert not torch.equal(ids, others)

    def loss(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.losses(ids, text_embeds=testing.text(2), mask=mask, **more).total

    assert torch.equal(loss(ids, loss_mask=loss_mask), loss(others, loss_mask=loss_mask))
    assert not torch.equal(loss(ids), loss(others))
    assert torch.equal(loss(ids, loss_mask=torch.ones(2, 1, 16, 16)), loss(ids))
    assert loss(ids, loss_mask=torch.zeros(2, 1, 16, 16)) == 0


class Halves:
    """A picture that is white on the left, and a mask that is so too."""

    keys = ("one",)

    def __init__(self, size: tuple[int, int] = (40, 30)):
        self.mask = Image.new("L", size)
        self.mask.paste(255, (0, 0, 17, 30))

    def __len__(self) -> int:
        return 1

    def item(self, index: int) -> Item:
        image = Image.new("RGB", (40, 30))
        image.paste((255, 255, 255), (0, 0, 17, 30))
        return Item(image, "a half", loss_mask=self.mask)


def test_crops_and_flips_move_the_mask_along():
    view = View(16, "random", (0.4, 0.9), flip=True)
    dataset = ImageDataset(Halves(), view, captions=True, masks=True)
    seen = [dataset[Sample(0, position)] for position in range(12)]
    for item in seen:
        assert torch.equal(item["loss_mask"], item["image"][:1])
    assert len({float(item["loss_mask"].mean()) for item in seen}) > 6


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"loss_mask of item 'one'.*\(20, 30\).*give both"):
        ImageDataset(Halves((20, 30)), 16, masks=True)[0]
    assert "loss_mask" not in ImageDataset(Halves((20, 30)), 16)[0]  # a tokenizer's


def rows(mask: int | None) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for i in range(6):
        pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        made.append({"image": pixels, "text": f"picture {i}"})
        if mask is not None and i != 3:  # an item without one counts whole
            made[-1]["loss_mask"] = Image.new("L", (16, 16), mask)
    return made


def run(data: Any, folder: Path, t5: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        batch_size=2, num_train_steps=2, warmup_steps=1, grad_accum_every=2, sample_every=0,
        valid_fraction=0.0, num_samples=1, cache_tokens=False, complementary=True,
    )  # fmt: skip
    maskgit = make_maskgit(t5)
    MaskGitTrainer(maskgit, data=data, results_folder=str(folder), **settings | changes).train()
    return {k: last_state(folder)[k] for k in ("modules", "optimizers")}


def test_training_with_a_mask(tmp_path: Path, t5: str):
    plain = run(rows(None), tmp_path / "plain", t5)
    assert_same(run(rows(255), tmp_path / "white", t5), plain)
    grey = run(rows(51), tmp_path / "grey", t5)  # the picture without a mask counts five times
    name = "transformer.to_logits.weight"
    assert not torch.equal(grey["modules"]["model"][name], plain["modules"]["model"][name])


def mean_over_counted(trainer: MaskGitTrainer, items: list[dict[str, Any]]) -> torch.Tensor:
    """The validation loss by its definition: over all masked tokens, each by what it counts."""
    model, above, below = trainer.maskgit, torch.tensor(0.0), torch.tensor(0.0)
    masks = model.draw_mask(len(items))
    for item, mask in zip(items, masks, strict=True):
        white = torch.ones(1, 16, 16)
        counted = mask * model.token_shares(item.get("loss_mask", white)[None])[0]
        arguments: dict[str, Any] = dict(cond_drop_prob=0.0, mask=mask[None])
        if "loss_mask" in item:
            arguments["loss_mask"] = item["loss_mask"][None]
        above += model.losses(item["image"][None], [item["text"]], **arguments).ce * counted.sum()
        below += counted.sum()
    return above / below


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_validation_is_one_mean_whatever_the_batches(tmp_path: Path, t5: str, batch_size: int):
    data = rows(255)
    for i, row in enumerate(data):
        if "loss_mask" in row and i != 5:
            row["loss_mask"] = Image.new("L", (16, 16), 40 * i)
    critic = make_maskgit(t5, critic=True, critic_loss_weight=0.5)
    trainer = MaskGitTrainer(
        critic, data=data, results_folder=str(tmp_path), batch_size=batch_size, cache_tokens=False
    )
    trainer.maskgit.eval()
    items = [trainer.dataset[row] for row in range(len(data))]
    assert [("loss_mask" in item) for item in items] == [True, True, True, False, True, True]
    with torch.no_grad():
        torch.manual_seed(7)
        wanted = mean_over_counted(trainer, items)
        torch.manual_seed(7)
        figures = trainer.validate(Shares(trainer.dataset, batch_size, trainer.collate))
        trainer.dataset.masks = False
        torch.manual_seed(7)
        plain = trainer.validate(Shares(trainer.dataset, batch_size, trainer.collate))
    assert figures["ce"] == pytest.approx(float(wanted), rel=1e-5)
    assert plain["ce"] != pytest.approx(float(wanted), rel=1e-3)
    assert figures["loss"] == pytest.approx(figures["ce"] + 0.5 * figures["critic"], rel=1e-5)
    assert figures["critic"] == plain["critic"]


def test_masks_that_leave_nothing_make_no_nan(tmp_path: Path, t5: str):
    data = [row | {"loss_mask": Image.new("L", (16, 16))} for row in rows(None)]
    run(data, tmp_path, t5, valid_fraction=0.5)
    losses = [line["valid_loss"] for line in metrics(tmp_path) if "valid_loss" in line]
    assert losses == [0.0] * len(losses)
    assert losses


# In a folder -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pictures of `rows(51)` as files, and their masks beside them."""
    made = tmp_path / "images"
    (made / "more").mkdir(parents=True)
    for i, row in enumerate(rows(51)):
        stem = made / ("more" if i == 4 else "") / f"{i}"
        to_pil(row["image"])[0].save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(row["text"])
        if "loss_mask" in row:
            row["loss_mask"].save(stem.with_name(f"{i}-masklabel.png"))
    return made


def test_masks_beside_the_images_are_those_of_items(folder: Path, tmp_path: Path, t5: str):
    source = Folder(folder, captions=True)
    assert source.names == ["0.png", "1.png", "2.png", "3.png", "5.png", "more/4.png"]
    assert source.masks["more/4.png"] == "more/4-masklabel.png"
    assert "3.png" not in source.masks

    data = rows(51)
    same = [data[i] | {"image": to_pil(data[i]["image"])[0]} for i in (0, 1, 2, 3, 5, 4)]
    run(same, tmp_path / "rows", t5)
    results = tmp_path / "folder"
    run(str(folder), results, t5)
    assert_same(last_state(results)["modules"], last_state(tmp_path / "rows")["modules"])

    # a tokenizer, and a loop of one's own, see images alone
    images = ImageFolder(folder, 16, captions=True)
    batch = default_collate([images[row] for row in range(len(images))])
    assert batch.keys() == {"image", "text"}


def test_other_masks_are_other_data(folder: Path):
    def name(masks: bool) -> str:
        source = Folder(folder, captions=True)
        return ImageDataset(source, 16, captions=True, masks=masks).summary()["fingerprint"]

    before = name(True), name(False)
    (folder / "0-masklabel.png").unlink()
    assert (name(True) != before[0], name(False) == before[1]) == (True, True)


def test_masks_that_do_not_fit(folder: Path, tmp_path: Path, t5: str):
    (folder / "3-masklabel.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read image .*3-masklabel\.png"):
        run(str(folder), tmp_path / "unreadable", t5)
    Image.new("L", (16, 12)).save(folder / "3-masklabel.png")
    for caching in (False, True):
        with pytest.raises(
            ValueError, match=r"loss_mask of item '3.png'.*\(16, 12\) pixels.*\(16, 16\)"
        ):
            run(str(folder), tmp_path / f"other{caching}", t5, cache_tokens=caching)
    assert "loss_mask of item '3.png'" in check_data(Folder(folder)).broken["3.png"]
    (folder / "3.png").unlink()
    with pytest.warns(UserWarning, match=r"left out 1 that are masks without their image: 3-mask"):
        source = Folder(folder)
    assert source.left_out == {"are masks without their image": ["3-masklabel.png"]}


def test_micro_batches_share_one_mean(tmp_path: Path, t5: str):
    """Two micro batches of one picture step as one batch of two, whatever their masks."""
    data = rows(255)[:2]
    data[0]["loss_mask"] = Image.new("L", (16, 16), 51)
    ends = []
    for batch_size in (1, 2):
        maskgit, masks = make_maskgit(t5, cond_drop_prob=0.0), iter(range(100))
        wanted = torch.arange(16) < torch.tensor([3, 12])[:, None]
        maskgit.draw_mask = lambda count, size=None, at=masks, m=wanted: m[  # type: ignore
            [next(at) % 2 for _ in range(count)]
        ]
        MaskGitTrainer(
            maskgit, data=data, results_folder=str(tmp_path / str(batch_size)), lr=1e-3,
            batch_size=batch_size, grad_accum_every=2 // batch_size, num_train_steps=1,
            warmup_steps=1, sample_every=0, valid_fraction=0.0, num_samples=1, cache_tokens=False,
        ).train()  # fmt: skip
        moments = last_state(tmp_path / str(batch_size))["optimizers"]["model"]
        ends.append({n: s["exp_avg"] for n, s in moments.items()})
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-7)
