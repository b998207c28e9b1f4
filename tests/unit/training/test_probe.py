"""What a run shows of its model: by share masked and caption, beside references; prompts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import MaskGit, TokenCache
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.data.order import Shares
from muse_maskgit_pytorch.images import image_grid
from muse_maskgit_pytorch.structures import Batch
from muse_maskgit_pytorch.training.probe import Probe, references
from muse_maskgit_pytorch.watching.interval import Interval
from muse_maskgit_pytorch.watching.pace import COUNTED, Pace
from tests.runs import interrupt, make_maskgit, maskgit_trainer, metrics

CPU = torch.device("cpu")


def known(maskgit: MaskGit, count: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, 16, 16, generator=generator)
    return {"images_or_ids": images, "texts": ["one", "two owls", "three red kites"][:count]}


def figures(maskgit: MaskGit, counted: int = 3, others: Any = None) -> dict[str, float]:
    probe = Probe(maskgit.eval())
    probe.see(known(maskgit), others, counted, [7, 8, 9])
    return probe.figures(probe.sums)


def test_nats_are_those_of_the_loss(t5: str):
    """All masked, without smoothing and dropout, they are the loss; and of guessing, ln V."""
    maskgit = make_maskgit(t5, label_smoothing=0.1, z_loss=0.1).eval()
    found = figures(maskgit)
    maskgit.label_smoothing = maskgit.z_loss = 0.0
    arguments = known(maskgit)
    everything = torch.ones(3, 16, dtype=torch.bool)
    loss = maskgit.losses(**arguments, cond_drop_prob=0.0, mask=everything)
    assert found["nats_100"] == pytest.approx(float(loss.ce.detach()), rel=1e-5)
    with torch.no_grad():
        maskgit.transformer.to_logits.weight.zero_()
    blind = figures(maskgit)
    for share in (25, 50, 75, 100):
        assert blind[f"nats_{share}"] == pytest.approx(math.log(16), rel=1e-6)
        assert 0 <= blind[f"accuracy_{share}"] <= 1


def test_of_each_size_so_many_tokens_are_masked(t5: str, monkeypatch: pytest.MonkeyPatch):
    maskgit, seen = make_maskgit(t5).eval(), []
    mask_id = maskgit.transformer.mask_id
    forward = maskgit.transformer.forward

    def spied(ids: Tensor, *arguments: Any) -> Any:
        seen.append((ids == mask_id).sum(dim=1).tolist())
        return forward(ids, *arguments)

    monkeypatch.setattr(maskgit.transformer, "forward", spied)
    figures(maskgit)
    assert seen == [[4] * 3, [8] * 3, [12] * 3, [16] * 3]


def test_what_is_learnt_by_heart_is_seen(images: Path, tmp_path: Path, t5: str):
    """Few nats, right guesses; and other captions cost more than the images' own."""
    maskgit = make_maskgit(t5, cond_drop_prob=0.0)
    settings: dict[str, Any] = dict(num_train_steps=150, batch_size=7, lr=1e-2, valid_fraction=0)
    trainer = maskgit_trainer(images, tmp_path / "r", maskgit, **settings, log_every=150)
    trainer.train()
    maskgit.eval()
    shares = Shares(trainer.dataset, 4, trainer.collate)
    found = trainer.validate(shares)
    assert found["nats_100"] < 0.5 * math.log(16)
    assert found["accuracy_100"] > 0.6
    assert found["accuracy_25"] > 0.6
    assert found["nats_other_captions"] > 2 * found["nats_100"]


def test_images_that_do_not_count_do_not(t5: str):
    maskgit = make_maskgit(t5)
    two = Probe(maskgit.eval())
    two.see(known(maskgit), None, 2, [7, 8, 9])
    less = {name: value[:2] for name, value in known(maskgit).items()}
    alone = Probe(maskgit)
    alone.see(less, None, 2, [7, 8])
    assert two.figures(two.sums) == pytest.approx(alone.figures(alone.sums), rel=1e-5)
    assert "nats_other_captions" not in two.sums


# References --------------------------------------------------------------------------------------


class Rows:
    """A cache of these images' ids, in place of one on disk."""

    def __init__(self, ids: list[list[list[int]]]):
        self.ids = torch.tensor(ids).flatten(1)
        self.buckets = {None: range(len(ids))}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, rows: list[int]) -> Batch:
        return Batch(ids=self.ids[rows])


def test_references_by_hand():
    """Four codes; after a 0 always comes a 1."""
    train: Any = Rows([[[0, 1], [0, 1]], [[0, 1], [2, 2]]])
    valid: Any = Rows([[[0, 1], [3, 0]]])
    found = references(train, valid, 4, {None: (2, 2)})
    share = np.array([4, 4, 3, 1]) / 12  # one more than counted
    after_0 = (3 + 100 * share[1]) / (3 + 100)
    after_3 = share[0]  # never seen to begin a pair
    assert found["reference_uniform"] == math.log(4)
    single = -np.log(share[[0, 1, 3, 0]]).mean()
    assert found["reference_unigram"] == pytest.approx(single)
    pair = -np.log([share[0], after_0, share[3], after_3]).mean()
    assert found["reference_bigram"] == pytest.approx(pair)


def test_neighbours_help_where_they_decide():
    stripes = [[[(row + column) % 8 for column in range(8)] for row in range(8)]] * 200
    found = references(Rows(stripes), Rows(stripes[:1]), 8, {None: (8, 8)})  # type: ignore[arg-type]
    assert found["reference_unigram"] == pytest.approx(math.log(8), rel=1e-3)
    assert found["reference_bigram"] < 0.5 * math.log(8)


def test_the_log_begins_with_them(images: Path, tmp_path: Path, t5: str):
    """Once, before the first step; a resume does not repeat them."""
    settings: dict[str, Any] = dict(num_train_steps=3, valid_fraction=0.4)
    interrupt(maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), **settings), 2)
    maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), resume=True, **settings).train()
    first, *later = metrics(tmp_path / "r")
    assert first["step"] == 0
    assert first["reference_uniform"] == math.log(16)
    assert first["reference_bigram"] > 0
    assert not any("reference_uniform" in line for line in later)
    maskgit = make_maskgit(t5)
    cache = TokenCache(tmp_path / "r" / "base-cache", maskgit)
    found = references(cache, cache, 16, {(16, 16): (4, 4)})
    counted = np.bincount(cache.__getitems__(range(7)).ids.flatten(), minlength=16) + 1  # type: ignore
    share = counted / counted.sum()
    assert found["reference_unigram"] == pytest.approx(
        float(-((counted - 1) * np.log(share)).sum() / (counted - 1).sum())
    )


# Prompts -----------------------------------------------------------------------------------------


def test_prompts_are_drawn_by_averaged_and_raw_weights(images: Path, tmp_path: Path, t5: str):
    """The same each time from the same weights, and from the seeds of their places."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# for every look\na red owl\n\ntwo kites\n", encoding="utf-8")
    settings: dict[str, Any] = dict(lr=0.3, ema_decay=0.99, sample_prompts=str(prompts))
    maskgit = make_maskgit(t5, sample_options={"timesteps": 2})
    trainer = maskgit_trainer(images, tmp_path / "r", maskgit, **settings)
    trainer.train()
    [path] = (tmp_path / "r" / "samples").glob("base-prompts-*.png")
    assert path.stem == "base-prompts-00000002"
    maskgit.eval()
    with trainer.ema.applied():
        averaged = maskgit.generate(["a red owl", "two kites"], seeds=[0, 1])
    raw = maskgit.generate(["a red owl", "two kites"], seeds=[0, 1])
    assert not torch.equal(averaged, raw)
    pairs = torch.stack([averaged, raw], dim=1).flatten(0, 1)
    labels = ["a red owl", "raw weights", "two kites", "raw weights"]
    with Image.open(path) as sheet:
        assert sheet.tobytes() == image_grid(pairs, 4, labels).tobytes()
    assert "<h2>Prompts</h2>" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")


def test_looking_at_prompts_changes_no_step(images: Path, tmp_path: Path, t5: str):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an owl")
    states = []
    for name, more in {"with": {"sample_prompts": str(prompts)}, "without": {}}.items():
        maskgit = make_maskgit(t5, sample_options={"timesteps": 2})
        trainer = maskgit_trainer(images, tmp_path / name, maskgit, sample_every=1, **more)
        trainer.train()
        states.append(maskgit.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_prompts_that_cannot_be_drawn(images: Path, tmp_path: Path, t5: str):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt"):
        maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), sample_prompts=str(empty))
    with pytest.raises(OSError, match="nowhere"):
        maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), sample_prompts="nowhere")
    low = tiny.vae(layers=1, codebook_size=48)
    superres = tiny.maskgit(tiny.transformer(), cond_vae=low, cond_image_size=8, vae=tiny.vae())
    with pytest.raises(ValueError, match="sample_prompts need a base model"):
        maskgit_trainer(images, tmp_path / "r", superres, sample_prompts=str(empty))
    classes = tiny.maskgit(tiny.transformer(classes=["owl", "kite"], text_embed_dim=2))
    empty.write_text("an owl\n")
    (images / "owl").mkdir()
    for picture in images.glob("*.png"):
        picture.rename(images / "owl" / picture.name)
        (images / f"{picture.stem}.txt").unlink()
    with pytest.raises(ValueError, match="an owl"):  # no class of this model
        maskgit_trainer(images, tmp_path / "r", classes, sample_prompts=str(empty))


def test_contrast_is_that_of_the_pictures(images: Path, tmp_path: Path, t5: str):
    trainer = maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), num_samples=2)
    grey = torch.full((2, 3, 16, 16), 0.5)
    checks = grey.clone()
    checks[:, :, ::2] = 0.0
    checks[:, :, 1::2] = 1.0
    trainer._pictures = lambda rows, seeds: (checks, grey)  # type: ignore[method-assign]
    found = trainer.draw(tmp_path / "sheet.png")
    assert found == {"real_contrast": pytest.approx(0.5), "drawn_contrast": pytest.approx(0)}


# Pace --------------------------------------------------------------------------------------------


def test_waiting_for_data_is_measured(monkeypatch: pytest.MonkeyPatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("time.monotonic", lambda: now.time)

    def slow() -> Any:
        while True:
            now.time += 3
            yield "batch"

    interval = Interval()
    interval.start(0)
    batches = interval.timed(slow())
    for step in (1, 2):
        assert next(batches) == "batch"
        now.time += 1  # of work
        interval.add({"loss": torch.tensor(float(step))})
    line = interval.line(2, lambda tensor: tensor)
    assert line == {"loss": 1.5, "steps_per_s": 0.25, "data_wait": 0.75}
    assert interval.line(3, lambda tensor: tensor)["data_wait"] == 0


def test_the_pace_of_a_step_of_known_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "muse_maskgit_pytorch.watching.pace.products", lambda device: {"plain, blocks": 2.0}
    )
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("time.monotonic", lambda: now.time)
    pace = Pace(images=32, step=10, total=7310, device=CPU, precision="no")
    a = torch.ones(100, 200), torch.ones(200, 50)
    for step in range(1, COUNTED + 1):
        assert "gemm_share" not in pace.figures(step, 1.0)
        with pace.step():
            torch.mm(*a)
    assert pace.operations == 2 * 100 * 200 * 50
    now.time = 3.0  # of which the steps took a part
    found = pace.figures(110, 500.0)  # 2 million operations, 500 times a second, of 2 billion
    assert found == {
        "images_per_s": 16_000.0, "hours_left": pytest.approx(72 * 3 / 3600),
        "gemm_share": pytest.approx(0.5),
    }  # fmt: skip


def test_counting_operations_changes_no_step(
    images: Path, tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    states = []
    for name in ("counted", "not"):
        maskgit = make_maskgit(t5)
        step = 2 if name == "counted" else 9
        monkeypatch.setattr("muse_maskgit_pytorch.watching.pace.COUNTED", step)
        trainer = maskgit_trainer(images, tmp_path / name, maskgit, num_train_steps=3)
        trainer.train()
        states.append(maskgit.state_dict())
        assert ("gemm_share" in metrics(tmp_path / name)[-2]) == (name == "counted")
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
