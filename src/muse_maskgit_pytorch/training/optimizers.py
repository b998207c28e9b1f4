"""AdamW of a module: what weight decay leaves alone, and states stored by parameter name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import plain_names, plain_state, unwrapped
from ..weights import is_finite

TABLES = ("row", "column", "null_kv")  # learned positions and null keys


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by plain name, in the module's own order."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {plain: parameters[name] for name, plain in plain_names(module, parameters).items()}


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state by plain name, without what is frozen (a tokenizer in a MaskGit)."""
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = set(plain_names(module, [n for n, p in parameters if not p.requires_grad]).values())
    skip = tuple(
        f"{name}."
        for name, child in unwrapped(module)._modules.items()  # with those that stand there twice
        if child is not None and all(not p.requires_grad for p in child.parameters())
    )
    return {
        name: value
        for name, value in plain_state(module).items()
        if name not in frozen and not name.startswith(skip or ("\0",))
    }


def decayed(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to.

    Matrices and convolutions; not norms, biases, embeddings, position tables and null keys.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {
        name
        for name, p in trained(module).items()
        if p.ndim > 1 and id(p) not in embeddings and name.split(".")[-1] not in TABLES
    }


def adamw(
    module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """The optimizer of a module's trained parameters."""
    with_decay, parameters = decayed(module), trained(module)
    groups = [
        {"params": [p for n, p in parameters.items() if n in with_decay]},
        {"params": [p for n, p in parameters.items() if n not in with_decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        fused=True,
    )


def _order(module: nn.Module) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    with_decay = decayed(module)
    return sorted(trained(module), key=lambda name: name not in with_decay)


def named_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What the optimizer remembers of each parameter, by the parameter's name."""
    names = _order(module)
    return {names[i]: state for i, state in optimizer.state_dict()["state"].items()}


def load_named_state(module: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """Restore the state that `named_state` returned; the settings stay those of today.

    Older checkpoints hold torch's own form, numbered with all tensors of two or more dimensions
    first.

    Raises:
        ValueError: a state of another parameter, or without finite numbers.
    """
    if saved.keys() == {"state", "param_groups"}:
        parameters = trained(module)
        old = sorted(parameters, key=lambda name: parameters[name].ndim <= 1)
        saved = {old[int(i)]: state for i, state in saved["state"].items()}
    order, parameters = _order(module), trained(module)
    for name, own in saved.items():
        shape = parameters[name].shape
        for key, wanted in {"step": (), "exp_avg": shape, "exp_avg_sq": shape}.items():
            if own[key].shape != wanted or not is_finite(own[key]):
                raise ValueError(f"the optimizer's {key} of {name} is of another parameter")
    state = {i: saved[name] for i, name in enumerate(order) if name in saved}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
