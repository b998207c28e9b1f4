"""Optimizers: what decays, what each does, state by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from muse_maskgit_pytorch import testing
from muse_maskgit_pytorch.checkpoint import CheckpointError, load_tree, save_tree
from muse_maskgit_pytorch.training import optimizers
from muse_maskgit_pytorch.training.optimizers import (
    Adafactor,
    OptimizerName,
    block_matrices,
    decayed,
    load_named_state,
    make_optimizer,
    named_state,
    trained,
)
from tests.runs import (
    assert_same,
    interrupt,
    last_state,
    make_maskgit,
    maskgit_trainer,
    vae_trainer,
)

NAMES = get_args(OptimizerName)
OTHERS = [name for name in NAMES if name != "adamw"]
SETTINGS: Any = (1e-2, (0.9, 0.96), 0.1)


def test_what_weight_decay_leaves_alone(t5: str):
    maskgit = make_maskgit(t5)
    maskgit.vae.requires_grad_(False)
    left = {n for n, p in maskgit.named_parameters() if p.requires_grad} - decayed(maskgit)
    kinds = {name.split(".")[-1] for name in left if maskgit.get_parameter(name).ndim > 1}
    assert kinds == {"weight", "row", "column", "null_kv"}
    tables = {n for n in left if n.endswith(".weight") and maskgit.get_parameter(n).ndim > 1}
    assert (
        tables
        == {f"{name}.weight" for name, m in maskgit.named_modules() if isinstance(m, nn.Embedding)}
        & left
    )
    assert all(maskgit.get_parameter(n).ndim > 1 for n in decayed(maskgit))
    assert any("to_logits" in n or "to_q" in n or "ff" in n for n in decayed(maskgit))


def test_optimizer_state_of_older_checkpoints_is_mapped(t5: str):
    """They number the parameters with all matrices first, whatever they are."""
    model = make_maskgit(t5)
    model.vae.requires_grad_(False)
    parameters = trained(model)
    names = [n for n, p in parameters.items() if p.ndim > 1]
    names += [n for n, p in parameters.items() if p.ndim <= 1]
    state = {
        name: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.full_like(parameters[name], i),
            "exp_avg_sq": torch.full_like(parameters[name], i),
        }
        for i, name in enumerate(names)
    }
    old = {"state": dict(enumerate(state.values())), "param_groups": []}
    for saved in (old, state):
        optimizer = make_optimizer("adamw", model, *SETTINGS)
        load_named_state(model, optimizer, saved)
        assert_same(
            dict(sorted(named_state(model, optimizer).items())), dict(sorted(state.items()))
        )


def stepped(name: OptimizerName, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A tiny transformer after some steps of an optimizer on one batch."""
    torch.manual_seed(0)
    model = testing.maskgit()
    model.vae.requires_grad_(False)
    optimizer = make_optimizer(name, model, *SETTINGS)
    for step in range(steps):
        torch.manual_seed(step)
        model(testing.ids(4), text_embeds=testing.text(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("fast", [["bf16"], []])
def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest(
    monkeypatch: pytest.MonkeyPatch, fast: list[str]
):
    """Each moves its own as torch's own optimizer does alone; exactly so in its precision."""
    monkeypatch.setattr(optimizers, "fast_precisions", lambda device: fast)
    model, optimizer = stepped("muon", steps=0)
    names, before = block_matrices(model), trained(model)
    assert names
    assert all(".blocks." in f".{n}" and before[n].ndim == 2 for n in names)
    assert not any(word in n for n in names for word in ("embed", "to_logits", "text_proj", "null"))
    model(testing.ids(4), text_embeds=testing.text(4)).backward()
    start = {n: p.detach().clone() for n, p in before.items()}
    copies = {n: nn.Parameter(p.clone()) for n, p in start.items()}
    for name, copy in copies.items():
        copy.grad = before[name].grad
    lr, betas, decay = SETTINGS
    muon = torch.optim.Muon(
        [copies[n] for n in names], lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = {n: p for n, p in copies.items() if n not in names}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in rest.items() if n in decayed(model)]},
            {"params": [p for n, p in rest.items() if n not in decayed(model)], "weight_decay": 0},
        ],
        lr=lr,
        betas=betas,
        weight_decay=decay,
        fused=True,
    )
    for each in (optimizer, muon, adamw):
        each.step()
    for name, moved in before.items():
        if fast or name not in names:
            assert torch.equal(moved, copies[name]), name
        else:
            grad, old = moved.grad, start[name]
            assert grad is not None
            first = grad.double() * (0.05 + 0.95 * 0.05)  # Nesterov's, of an empty memory
            turned = optimizers.orthogonal(first, torch.float64)
            wanted = old * (1 - lr * decay) - lr * 0.2 * max(old.shape) ** 0.5 * turned
            torch.testing.assert_close(moved.double(), wanted, rtol=0, atol=1e-3 * lr, msg=name)


def test_a_nearly_orthogonal_matrix():
    """Wide or high, its singular values come near to one and its singular vectors stay."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 20), (20, 6)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = u.T @ optimizers.orthogonal(matrix, torch.float64) @ v.T
        assert (values - values.diagonal().diag()).abs().max() < 1e-9
        assert 0.4 < values.diagonal().min() <= values.diagonal().max() < 1.3


def adafactor_by_hand(weight: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """The algorithm in the paper of Adafactor, with its outer product written out."""
    row, column, moment = torch.zeros(3, 1), torch.zeros(1, 4), torch.zeros(3, 4)
    for step, gradient in enumerate(gradients, 1):
        second = min(0.96, 1 - step**-0.8)
        squares = gradient**2 + 1e-30
        row = second * row + (1 - second) * squares.sum(1, keepdim=True)
        column = second * column + (1 - second) * squares.sum(0, keepdim=True)
        update = gradient / (row @ column / row.sum()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        moment = 0.9 * moment + 0.1 * update
        weight = weight - lr * 0.1 * weight - lr * moment
    return weight


def test_adafactor_follows_its_algorithm():
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, generator=generator))
    gradients = [torch.randn(3, 4, generator=generator) * 10**i for i in range(-2, 3)]
    expected = adafactor_by_hand(weight.detach().clone(), gradients, 0.05)
    optimizer = Adafactor([weight], 0.05, (0.9, 0.96), 0.1)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-6)


def test_adafactor_remembers_half_as_much():
    remembered = {}
    for name in ("adamw", "adafactor"):
        model, optimizer = stepped(name)  # type: ignore[arg-type]
        states = named_state(model, optimizer)
        remembered[name] = sum(v.numel() for n in decayed(model) for v in states[n].values())
    assert remembered["adafactor"] < 0.62 * remembered["adamw"]  # of tiny matrices


@pytest.mark.parametrize("name", OTHERS)
def test_a_stopped_run_goes_on_bit_for_bit(images: Path, tmp_path: Path, t5: str, name: str):
    settings = dict(num_train_steps=4, optimizer=name)
    maskgit_trainer(images, tmp_path / "whole", make_maskgit(t5), **settings).train()
    stopped = maskgit_trainer(images, tmp_path / "parts", make_maskgit(t5), **settings)
    interrupt(stopped, step=2)
    again = make_maskgit(t5, seed=1)
    maskgit_trainer(images, tmp_path / "parts", again, resume=True, **settings).train()
    assert_same(last_state(tmp_path / "parts"), last_state(tmp_path / "whole"))
    other = "adamw" if name == "muon" else "muon"
    with pytest.raises(CheckpointError, match="another optimizer"):
        maskgit_trainer(
            images, tmp_path / "parts", again, resume=True, num_train_steps=5, optimizer=other
        ).train()


@pytest.mark.parametrize("name", NAMES)
def test_states_of_other_shapes_or_without_numbers_are_refused(name: OptimizerName):
    model, optimizer = stepped(name)
    good = named_state(model, optimizer)
    for parameter, state in list(good.items())[:3]:
        for key, value in state.items():
            for bad in (value.new_zeros(value.numel() + 1), torch.full_like(value, torch.nan)):
                changed = good | {parameter: state | {key: bad}}
                with pytest.raises(ValueError, match=f"{key} of {parameter}"):
                    load_named_state(model, optimizer, changed)
    load_named_state(model, optimizer, good)


def linear(name: OptimizerName, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer whose matrix has 4,096 numbers, trained to copy."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = make_optimizer(name, model, *SETTINGS)
    for _ in range(steps):
        copy(model, optimizer)
    return model, optimizer


def copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.randn(128, 64)
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_moments_of_8_bits_are_stored_as_they_are(tmp_path: Path):
    model, optimizer = linear("adamw8bit", steps=3)
    state = named_state(model, optimizer)
    assert {key: value.dtype for key, value in state["weight"].items()} == {
        "step": torch.float32,
        "exp_avg.codes": torch.uint8, "exp_avg.scale": torch.float32,
        "exp_avg_sq.codes": torch.uint8, "exp_avg_sq.scale": torch.float32,
    }  # fmt: skip
    path = save_tree(tmp_path / "state.safetensors", {"state": state}, kind="state")
    other, fresh = linear("adamw8bit", steps=0)
    other.load_state_dict(model.state_dict())
    load_named_state(other, fresh, load_tree(path)[0]["state"])
    assert_same(named_state(other, fresh), state)
    for each in ((model, optimizer), (other, fresh)):
        torch.manual_seed(1)
        copy(*each)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    parts = state["weight"]
    for bad in (parts["exp_avg.codes"].float(), parts["exp_avg.codes"][:-1]):
        changed = {"weight": parts | {"exp_avg.codes": bad}}
        with pytest.raises(ValueError, match=r"exp_avg.codes of weight is of another"):
            load_named_state(other, fresh, changed)
    with pytest.raises(ValueError, match="another optimizer"):
        load_named_state(*linear("adamw", steps=0), state)


def test_adam_of_8_bits_learns_as_adam_does():
    last = {name: copy(*linear(name, steps=60)) for name in ("adamw", "adamw8bit")}
    first = copy(*linear("adamw", steps=0))
    assert last["adamw"] < 0.2 * first
    assert last["adamw8bit"] == pytest.approx(last["adamw"], rel=0.05)


def test_adam_of_8_bits_needs_torchao(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw8bit.*pip install.*torchao"):
        make_optimizer("adamw8bit", nn.Linear(2, 2), *SETTINGS)


def test_muon_is_refused_where_it_has_nothing_to_do(images: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"muon.*VQGanVAE trains none: use 'adamw'"):
        vae_trainer(images, tmp_path / "r", optimizer="muon").train()
