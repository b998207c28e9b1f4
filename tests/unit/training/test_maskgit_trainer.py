"""The transformers' trainer: parts and critics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import (
    MaskGit,
    MaskGitTransformer,
    testing,
)
from muse_maskgit_pytorch.data.order import Shares
from muse_maskgit_pytorch.inference import compiling
from muse_maskgit_pytorch.layers import Block
from muse_maskgit_pytorch.training.guard import Diverged
from tests.runs import (
    assert_same,
    last_checkpoint,
    logged,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    metrics,
    vae_trainer,
)


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("part", ["transformer", "critic", "all"])
def test_a_part_trains_alone(images: Path, tmp_path: Path, t5: str, part: str, own_head: bool):
    maskgit = make_maskgit(t5, critic=not own_head, self_token_critic=own_head)
    before = {k: v.clone() for k, v in maskgit.state_dict().items()}
    maskgit_trainer(
        images, tmp_path / "r", maskgit, part=part, num_train_steps=3, warmup_steps=0
    ).train()
    moved = {k.split(".")[0] for k, v in maskgit.state_dict().items() if (v != before[k]).any()}
    assert moved == ({"transformer", "critic"} if part == "all" else {part})


def test_a_compiled_run_names_everything_as_a_plain_one(
    images: Path, tmp_path: Path, t5: str, monkeypatch
):
    """With the compiler taken for what changes nothing: what it compiles, and what is written."""
    compiled = []
    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append((f.__name__, how)) or f)
    for name, compile in (("plain", False), ("compiled", True)):
        maskgit_trainer(images, tmp_path / name, make_maskgit(t5), compile=compile).train()
        assert bool(compiled) is compile
    assert ("_terms", {"fullgraph": True}) in compiled
    files = [tmp_path / name / "base.safetensors" for name in ("plain", "compiled")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_training_leaves_the_tokenizer_alone(images: Path, tmp_path: Path, t5: str):
    """Neither its weights nor the codebook's running means move, and it stays in eval mode."""
    maskgit = make_maskgit(t5)
    before = {k: v.clone() for k, v in maskgit.vae.state_dict().items()}
    maskgit_trainer(images, tmp_path / "r", maskgit, sample_every=1, cache_tokens=False).train()
    assert_same(dict(maskgit.vae.state_dict()), before)
    assert not any(module.training for module in maskgit.vae.modules())


def test_a_diverging_run_stops_with_a_sentence_and_keeps_its_checkpoint(
    images: Path, tmp_path: Path
):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=6, save_every=2)
    original = trainer.train_step

    def poisoned(batches: Iterator[Any]) -> dict[str, Tensor]:
        terms = original(batches)
        return terms if trainer.step < 3 else terms | {"loss": torch.tensor(torch.nan)}

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="the loss is nan at step 4: lower lr"):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 2


def test_precisions_may_differ_from_trainer_to_trainer(images: Path, tmp_path: Path, t5: str):
    vae = make_vae()
    forward = vae.forward
    vae_trainer(images, tmp_path / "vae", vae, mixed_precision="bf16").train()
    assert vae.forward == forward  # not wrapped for good
    maskgit_trainer(images, tmp_path / "base", make_maskgit(t5), mixed_precision="no").train()


def test_what_is_frozen_stays_frozen_and_a_part_is_narrowed_for_its_run(
    images: Path, tmp_path: Path, t5: str
):
    model = make_maskgit(t5, critic=True)
    model.transformer.text_proj.requires_grad_(False)  # by the caller, as LoRA does
    before = {name: p.clone() for name, p in model.named_parameters()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}

    def moved() -> set[str]:
        return {
            name.split(".")[0]
            for name, p in model.named_parameters()
            if not torch.equal(p, before[name])
        }

    maskgit_trainer(images, tmp_path / "critic", model, part="critic").train()
    assert moved() == {"critic"}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    maskgit_trainer(images, tmp_path / "all", model).train()
    assert moved() == {"critic", "transformer"}
    name = "transformer.text_proj.weight"
    assert torch.equal(model.get_parameter(name), before[name])
    model.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train with part='transformer'"):
        maskgit_trainer(images, tmp_path / "none", model, part="transformer")


def test_each_masked_token_of_a_step_counts_alike(
    images: Path, tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    """Micro batches with few masked tokens and with many make the gradient of one large batch."""
    masks = torch.arange(16) < torch.tensor([1, 16, 3, 12])[:, None]
    found = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = make_maskgit(t5, cond_drop_prob=0.0)
        trainer = maskgit_trainer(
            images, tmp_path / f"r{batch_size}", model, batch_size=batch_size,
            grad_accum_every=accumulate, num_train_steps=1, valid_fraction=0,
        )  # fmt: skip
        shares = iter(masks.split(batch_size))
        monkeypatch.setattr(model, "draw_mask", lambda *_, shares=shares: next(shares))
        grads: dict[str, Tensor] = {}

        def keep(name: str, model=model, grads=grads) -> Tensor:
            grads |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return torch.ones(())

        trainer.optimizer_step = keep  # type: ignore[method-assign]
        monkeypatch.setattr(trainer, "save", lambda: None)
        monkeypatch.setattr(trainer, "_look", lambda: None)
        trainer.train()
        [line] = logged(tmp_path / f"r{batch_size}")
        found.append((line["loss"], grads))
    (loss, whole), *others = found
    assert whole["transformer.to_logits.weight"].abs().max() > 1e-3
    for other, grads in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert grads.keys() == whole.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-7, msg=name)


def test_validation_is_a_mean_over_masked_tokens(images: Path, tmp_path: Path, t5: str):
    figures = []
    for batch_size in (7, 2):
        trainer = maskgit_trainer(
            images, tmp_path / "r", make_maskgit(t5), batch_size=batch_size, cache_tokens=False
        )
        trainer.model.to(trainer.device).eval()
        shares = Shares(trainer.dataset, batch_size, trainer.collate)
        torch.manual_seed(3)
        with torch.no_grad():
            figures.append(trainer.validate(shares))
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert figures[0]["loss"] == figures[0]["ce"]


def test_the_critics_term_is_in_the_log(images: Path, tmp_path: Path, t5: str):
    maskgit_trainer(images, tmp_path / "r", make_maskgit(t5, critic=True)).train()
    lines = [line for line in metrics(tmp_path / "r") if "loss" in line]
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + line["critic"], rel=1e-5)
    maskgit_trainer(images, tmp_path / "plain", make_maskgit(t5)).train()
    assert all("ce" not in line for line in metrics(tmp_path / "plain"))


def test_no_checkpoint_is_written_over_a_good_one_once_the_loss_is_no_number(
    images: Path, tmp_path: Path
):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9, save_every=1, log_every=50)
    original = trainer.train_step

    def poisoned(batches: Iterator[Any]) -> dict[str, Tensor]:
        terms = original(batches)
        return terms if trainer.step < 4 else terms | {"loss": torch.tensor(torch.nan)}

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 4


def test_a_checkpoint_leaves_the_tokenizers_out(images: Path, tmp_path: Path, t5: str):
    vae = make_vae(123)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    model = MaskGit(
        vae=vae, transformer=MaskGitTransformer(**size), image_size=16, cond_image_size=8
    )
    maskgit_trainer(images, tmp_path / "r", model).train()
    saved = last_checkpoint(tmp_path / "r")["modules"]["model"]
    assert saved
    assert all(name.startswith("transformer.") for name in saved)


def test_resume_takes_the_settings_of_today(images: Path, tmp_path: Path):
    vae_trainer(images, tmp_path / "r", num_train_steps=2).train()
    again = vae_trainer(
        images, tmp_path / "r", num_train_steps=3, resume=True, betas=(0.5, 0.6), weight_decay=0.7
    )
    again.train()
    assert {group["betas"] for group in again.optimizers["vae"].param_groups} == {(0.5, 0.6)}
    assert [g["weight_decay"] for g in again.optimizers["vae"].param_groups] == [0.7, 0.0]


def test_complementary_masks_learn_every_token(
    images: Path, tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    maskgit, masks = make_maskgit(t5), []
    losses = maskgit.losses
    monkeypatch.setattr(maskgit, "losses", lambda **a: masks.append(a["mask"]) or losses(**a))
    maskgit_trainer(images, tmp_path / "r", maskgit, complementary=True, valid_fraction=0).train()
    assert masks
    for mask in masks:
        first, second = mask.chunk(2)
        assert torch.equal(first, ~second)
        assert len(first) == 2


@pytest.mark.parametrize("superres", [False, True])
def test_blocks_computed_again_give_the_same_gradients_from_less_memory(superres: bool):
    model = (
        testing.superres(model=testing.transformer(seq_len=64, depth=6))
        if superres
        else (testing.maskgit(testing.transformer(depth=6)))
    )
    ids = testing.ids(2, 64 if superres else 16)
    cond = {"cond_ids": testing.ids(2, 16)} if superres else {}
    mask = torch.rand(ids.shape) < 0.5
    results = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for again in (False, True):
        for module in model.modules():
            if isinstance(module, Block):
                module.recomputed = again
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(ids, text_embeds=testing.text(), mask=mask, **cond)
        model.zero_grad()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, sum(kept.values())))
    (loss, gradients, much), (again_loss, again_gradients, little) = results
    assert_same({"loss": again_loss, **again_gradients}, {"loss": loss, **gradients})
    assert little < 0.6 * much


def test_a_run_that_computes_blocks_again_is_the_same(images: Path, tmp_path: Path, t5: str):
    states = []
    for again in (False, True):
        maskgit = make_maskgit(t5)
        folder = tmp_path / str(again)
        maskgit_trainer(images, folder, maskgit, checkpoint_activations=again).train()
        states.append(dict(maskgit.state_dict()))
        assert not any(m.recomputed for m in maskgit.modules() if isinstance(m, Block))
    assert_same(states[0], states[1])
