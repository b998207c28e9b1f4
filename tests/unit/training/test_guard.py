"""The guard: steps skipped, returns, the end of a diverging run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from muse_maskgit_pytorch import (
    VQGanVAETrainer,
)
from muse_maskgit_pytorch.training.guard import Diverged, Guard
from muse_maskgit_pytorch.training.loop import MAX_RESTARTS
from tests.runs import (
    GAN,
    assert_same,
    checkpoints,
    first_weight,
    interrupt,
    last_checkpoint,
    last_state,
    logged,
    make_vae,
    metrics,
    poison,
    vae_trainer,
)


def judged(guard: Guard, *norms: float) -> list[bool]:
    """One step with each of these gradient norms; whether it may be taken."""
    return [(guard.allows("vae", norm), guard.must_return())[0] for norm in norms]


def test_guard_refuses_leaps_above_the_moving_average():
    guard = Guard(max_spike=10, max_skips=5)
    assert all(judged(guard, *[1.0] * Guard.FIRST))
    assert judged(guard, 9.9, 11.5, 1.0) == [True, False, True]  # the average is 1.09 then
    assert guard.skipped == 1
    assert guard.in_a_row == 0
    average = 1.0
    for norm in (9.9, 10 * 1.089, 1.0):  # a leap counts as far as it is allowed
        average = 0.99 * average + 0.01 * norm
    assert guard.state()["_average"] == {"vae": pytest.approx(average)}


def test_guard_trusts_its_average_only_after_some_steps():
    guard = Guard(max_spike=10, max_skips=5)
    assert all(judged(guard, *[1.0] * (Guard.FIRST - 1), 1e6))
    assert judged(guard, 2e6) == [False]  # but then
    assert judged(Guard(10, 5), math.nan, 1.0, math.inf) == [False, True, False]


def test_guard_keeps_numbers_that_are_none_out_of_its_average():
    guard = Guard(max_spike=10, max_skips=500)
    judged(guard, math.nan, *[2.0] * Guard.FIRST)
    before = guard.state()["_average"]
    assert before == {"vae": pytest.approx(2)}
    assert not any(judged(guard, math.nan, math.inf, -math.inf))
    assert guard.state()["_average"] == before


def test_guard_accepts_a_lasting_new_level():
    """Norms 30 times those of before: the average follows, until they are no leap."""
    guard = Guard(max_spike=10, max_skips=500)
    judged(guard, *[1.0] * Guard.FIRST)
    answers = judged(guard, *[30.0] * 100)
    first = answers.index(True)
    assert 5 < first < 20
    assert all(answers[first:])


def test_guard_judges_each_optimizer_by_its_own_norms():
    guard = Guard(max_spike=10, max_skips=2)
    for _ in range(Guard.FIRST):
        assert guard.allows("vae", 1.0)
        assert guard.allows("discriminator", 100.0)
        assert not guard.must_return()
    assert guard.allows("discriminator", 900.0)
    assert not guard.allows("vae", 20.0)
    assert not guard.allows("discriminator", math.nan)
    assert not guard.must_return()
    assert guard.counts() == {"skipped_steps": 1, "restarts": 0}  # one step, both optimizers
    assert not guard.allows("vae", math.nan)
    assert guard.must_return()


def test_guard_counts_what_a_return_costs():
    guard = Guard(max_spike=10, max_skips=3)
    judged(guard, 1.0, math.nan, math.nan)
    assert guard.in_a_row == 2
    history = guard.state() | {"skipped": 3}
    guard.load(Guard(max_spike=10, max_skips=3).state())  # what the checkpoint knew
    guard.returned(history, steps=4)
    assert guard.lr_factor == 0.5
    assert guard.in_a_row == 0
    assert guard.lost_steps == 5  # and the one in which it returned
    assert guard.counts() == {"skipped_steps": 3, "restarts": 1}
    again = Guard(max_spike=7, max_skips=9)
    again.load(guard.state())
    assert vars(again) == vars(guard) | {"max_spike": 7, "max_skips": 9}


def test_a_lasting_new_level_is_accepted_after_some_returns():
    """A checkpoint that forgot the new level would bring the same skips for ever."""
    guard = Guard(max_spike=10, max_skips=5)
    judged(guard, *[1.0] * Guard.FIRST)
    known = guard.state()
    assert not any(judged(guard, *[16.5] * 5))
    while not any(judged(guard, *[16.5] * 5)):
        history = guard.state()
        guard.load(known)
        guard.returned(history, steps=1)
    assert guard.restarts < 3


def test_guard_switched_off():
    assert all(judged(Guard(max_spike=0, max_skips=1), math.nan, math.inf, 1e30))


def test_bad_steps_are_skipped_and_counted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Guard, "FIRST", 3)
    settings: dict[str, Any] = dict(num_train_steps=8, warmup_steps=0, max_grad_norm=0)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **GAN, **settings)
    poison(trainer, {2: math.nan, 4: 1e6, 6: math.inf})
    original, moved = trainer.train_step, []

    def spy(batches: Iterator[Any]) -> dict[str, Tensor]:
        modules = trainer.modules().values()
        before = [p.detach().clone() for m in modules for p in m.parameters()]
        terms = original(batches)
        after = [p for m in modules for p in m.parameters()]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return terms

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.train()
    assert moved == [True, True, False, True, False, True, False, True]
    lines = logged(tmp_path / "r")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[2]["grad_norm"] is None  # JSON has no NaN
    assert lines[4]["grad_norm"] > 1e3 * lines[3]["grad_norm"]
    assert all(line["restarts"] == 0 for line in lines)


def test_a_run_returns_to_its_last_good_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Two bad steps in a row: then other data, half the learning rate, and a word of it."""
    settings: dict[str, Any] = dict(num_train_steps=8, warmup_steps=0, lr_schedule="constant")
    settings |= dict(save_every=2, max_skips=2, keep_checkpoints=9)
    results = tmp_path / "r"
    trainer = vae_trainer(images, results, make_vae(quantizer="fsq"), **settings)
    seen = poison(trainer, {5: math.nan, 6: math.nan})
    original, states, seeds = trainer.train_step, [], set()

    def spy(batches: Iterator[Any]) -> dict[str, Tensor]:
        seeds.add(torch.initial_seed())
        state = {k: v.clone() for k, v in trainer.vae.state_dict().items()}
        states.append((state, trainer.optimizers["vae"].param_groups[0]["lr"]))
        return original(batches)

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.train()
    # step 6 would be saved, but after a skipped step nobody knows whether the weights are good
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert trainer.step == 8
    assert len(seeds) == 11  # the random numbers of a failed step do not come again either
    assert checkpoints(results) == [2, 4, 6, 8]
    assert_same(states[7][0], states[4][0])  # as they were after step 4
    assert not torch.equal(states[5][0]["encoder.0.weight"], states[4][0]["encoder.0.weight"])
    assert [lr for _, lr in states] == pytest.approx([1e-3] * 7 + [0.5e-3] * 4)
    lines = metrics(results)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    last = [line for line in lines if "loss" in line][-1]
    assert (last["skipped_steps"], last["restarts"]) == (2, 1)
    assert last["lr"] == pytest.approx(0.5e-3)
    warned = [line["warning"] for line in lines if "warning" in line]
    (told,) = [text for text in warned if "back to" in text]
    assert "2 steps in a row were skipped at step 6: back to vae-checkpoint-00000004" in told
    assert f"step 4: {told}" in capsys.readouterr().out
    assert "back to vae-checkpoint-00000004" in (results / "report.html").read_text()


def test_after_a_return_come_the_data_that_follow(images: Path, tmp_path: Path):
    """Those of the position, whatever the step is called."""
    settings: dict[str, Any] = dict(save_every=2, max_skips=1, valid_fraction=0)
    pictures: dict[str, list[Tensor]] = {}
    for name, factors, steps in (("returned", {2: math.nan}, 5), ("straight", {}, 6)):
        vae = make_vae(quantizer="fsq")
        trainer = vae_trainer(images, tmp_path / name, vae, num_train_steps=steps, **settings)
        poison(trainer, factors)
        seen = pictures[name] = []
        vae.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].clone()))
        trainer.train()
    for returned, straight in zip(*(found[:6] for found in pictures.values()), strict=True):
        assert torch.equal(returned, straight)


def test_a_run_that_cannot_return_stops_with_a_sentence(images: Path, tmp_path: Path):
    everywhere = dict.fromkeys(range(3, 99), math.nan)
    trainer = vae_trainer(images, tmp_path / "early", num_train_steps=9, max_skips=3)
    poison(trainer, everywhere)
    with pytest.raises(Diverged, match="3 steps in a row had to be skipped at step 5") as caught:
        trainer.train()
    assert "there is no checkpoint yet: lower lr" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoints(tmp_path / "early") == []

    settings: dict[str, Any] = dict(num_train_steps=9, max_skips=2, save_every=3)
    trainer = vae_trainer(images, tmp_path / "late", **settings)
    poison(trainer, everywhere)
    with pytest.raises(Diverged, match="2 steps in a row had to be skipped at step 4, as before"):
        trainer.train()
    assert trainer.guard.restarts == MAX_RESTARTS
    assert checkpoints(tmp_path / "late") == [3]
    assert last_checkpoint(tmp_path / "late")["guard"]["restarts"] == 0


def test_without_the_guard_a_bad_gradient_ends_the_run(images: Path, tmp_path: Path):
    settings: dict[str, Any] = dict(num_train_steps=6, save_every=2, max_spike=0)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **settings)
    poison(trainer, {3: math.nan})
    with pytest.raises(Diverged, match="not finite at step 4, and are not saved: lower lr"):
        trainer.train()
    assert trainer.guard.counts() == {"skipped_steps": 0, "restarts": 0}
    assert not first_weight(trainer.vae).isfinite().all()
    assert last_checkpoint(tmp_path / "r")["step"] == 2  # of finite weights


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_resume_after_a_return_is_exact(images: Path, tmp_path: Path, quantizer: str):
    def trainer(name: str, seed: int = 0, **changes: Any) -> VQGanVAETrainer:
        settings: dict[str, Any] = dict(num_train_steps=8, save_every=3, max_skips=2)
        settings |= dict(latent_noise=0.1, lecam_weight=0.1)
        vae = make_vae(seed, quantizer=quantizer)
        made = vae_trainer(images, tmp_path / name, vae, **GAN, **settings, **changes)
        poison(made, {4: math.nan, 5: math.nan, 9: math.inf})
        return made

    torch.manual_seed(0)
    trainer("unbroken").train()
    torch.manual_seed(0)
    interrupt(trainer("broken"), step=7)
    kept = last_checkpoint(tmp_path / "broken")
    assert (kept["step"], kept["guard"]["restarts"], kept["guard"]["lost_steps"]) == (7, 1, 3)
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))
    last = logged(tmp_path / "broken")[-1]
    assert (last["skipped_steps"], last["restarts"]) == (3, 1)


def test_half_precisions_scaler_survives_a_skipped_step(images: Path, tmp_path: Path):
    """It must hear of every gradient it has unscaled; a GPU is needed for the rest of fp16."""
    settings: dict[str, Any] = dict(num_train_steps=4, max_skips=9, **GAN)
    trainer = vae_trainer(images, tmp_path / "r", make_vae(quantizer="fsq"), **settings)
    trainer.parallel.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.parallel.accelerator.native_amp = True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    trainer.guard._seen, trainer.guard._average = {"vae": Guard.FIRST}, {"vae": 1e-9}
    trainer.train()  # every gradient of the tokenizer is a leap, none of the discriminator's
    last = logged(tmp_path / "r")[-1]
    assert last["skipped_steps"] == 4
    assert all(
        math.isfinite(line["discriminator_grad_norm"])
        for line in metrics(tmp_path / "r")
        if "loss" in line
    )


def test_half_precision_does_not_excuse_a_loss_that_is_no_number(images: Path, tmp_path: Path):
    """The scaler takes any gradient that is not finite for an overflow of its own."""
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=4, gan_weight=0, log_every=1)
    trainer.parallel.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.parallel.accelerator.native_amp = True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    poison(trainer, {1: math.nan})
    trainer.train()
    assert logged(tmp_path / "r")[-1]["skipped_steps"] == 1
