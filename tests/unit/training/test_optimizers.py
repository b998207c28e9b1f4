"""Optimizers: what decays, state by name."""

from __future__ import annotations

import torch
from torch import nn

from muse_maskgit_pytorch.training.optimizers import (
    adamw,
    decayed,
    load_named_state,
    named_state,
    trained,
)
from tests.runs import (
    assert_same,
    make_maskgit,
)


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
        optimizer = adamw(model, 1e-3, (0.9, 0.99), 0.1)
        load_named_state(model, optimizer, saved)
        assert_same(
            dict(sorted(named_state(model, optimizer).items())), dict(sorted(state.items()))
        )
