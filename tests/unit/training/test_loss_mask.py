"""A loss that counts by a mask of the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import MaskGitTrainer, testing
from muse_maskgit_pytorch.data.dataset import ImageDataset
from muse_maskgit_pytorch.data.order import Sample
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.data.source import Item
from tests.runs import assert_same, last_state, make_maskgit


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
    dataset = ImageDataset(Halves(), View(16, "random", (0.4, 0.9), flip=True), captions=True)
    seen = [dataset[Sample(0, position)] for position in range(12)]
    for item in seen:
        assert torch.equal(item["loss_mask"], item["image"][:1])
    assert len({float(item["loss_mask"].mean()) for item in seen}) > 6


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"loss_mask of item 'one'.*\(20, 30\).*give both"):
        ImageDataset(Halves((20, 30)), 16)[0]


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
    with pytest.raises(ValueError, match=r"loss_mask.*set cache_tokens=False"):
        run(rows(255), tmp_path / "cached", t5, cache_tokens=True)


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
