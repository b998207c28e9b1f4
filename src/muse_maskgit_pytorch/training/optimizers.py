"""Optimizers of a module: what weight decay leaves alone, and states stored by parameter name."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint import plain_names, plain_state, unwrapped
from ..devices import fast_precisions
from ..distributed import world_size
from ..layers import Block
from ..weights import is_finite

OptimizerName = Literal["adamw", "adafactor", "muon", "adamw8bit"]
MOMENTUM = 0.95  # of Muon
BLOCK = 256  # numbers of 8 bits that share a scale
TABLES = ("row", "column", "digits", "null_kv")  # of positions and codes, and null keys


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


def block_matrices(module: nn.Module) -> set[str]:
    """Names of the matrices of a transformer's blocks, which Muon trains."""
    blocks = (block for block in module.modules() if isinstance(block, Block))
    inside = {id(p) for block in blocks for p in block.parameters()}
    parameters = trained(module)
    return {n for n in decayed(module) if parameters[n].ndim == 2 and id(parameters[n]) in inside}


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018) with a first moment, as the paper has it (table 4).

    The squares of a matrix's gradient are remembered by their means over rows and over columns.
    torch's own has no first moment, and a rate relative to the size of each weight, with which
    weights that start at zero would stay there; here ``lr`` is absolute, as AdamW's is. The second
    moment's decay rises as 1 - t^-0.8 to ``betas[1]`` (as in Zhai et al. 2022, 3.6).

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the first moment, and the highest of the second.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            for name, shape in factors(parameter).items():
                state[name] = parameter.new_zeros(shape)
        state["step"] += 1
        (first, most), lr = group["betas"], group["lr"]
        second = min(most, 1 - float(state["step"]) ** -0.8)
        squares = gradient.square() + 1e-30
        if parameter.ndim > 1:
            squares = squares.flatten(1)
            row, column = state["row"], state["column"]
            row.lerp_(squares.mean(1), 1 - second)
            column.lerp_(squares.mean(0), 1 - second)
            scale = (row / row.mean()).rsqrt()[:, None] * column.rsqrt()
            update = gradient * scale.view_as(gradient)
        else:
            update = gradient * state["exp_avg_sq"].lerp_(squares, 1 - second).rsqrt()
        update /= update.square().mean().sqrt().clamp(min=1)  # a leap is cut, as in the paper of it
        state["exp_avg"].lerp_(update, 1 - first)
        parameter.mul_(1 - lr * group["weight_decay"]).sub_(state["exp_avg"], alpha=lr)


def factors(parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of what Adafactor remembers of a gradient's squares."""
    if parameter.ndim < 2:
        return {"exp_avg_sq": tuple(parameter.shape)}
    return {"row": (len(parameter),), "column": tuple(parameter[0].flatten().shape)}


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the orthogonal matrix nearest to one, by five steps of Newton and Schulz.

    The coefficients are those of Jordan et al. 2024, "Muon": the singular values come to lie
    between 0.5 and 1.5.
    """
    wide = matrix.to(dtype)
    wide = wide.T if len(matrix) > matrix.shape[1] else wide
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(
            wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445
        )
    return wide.T if len(matrix) > matrix.shape[1] else wide


def orthogonals(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of each, in the fastest precision.

    Processes that all hold the same matrices compute a share each, and exchange what they have
    computed.
    """
    if not matrices:
        return []
    device, world = matrices[0].device, world_size()
    dtype = torch.bfloat16 if "bf16" in fast_precisions(device) else torch.float32
    if world == 1 or isinstance(matrices[0], DTensor):
        return [orthogonal(matrix, dtype) for matrix in matrices]
    found = list(matrices)
    by_size = sorted(range(len(matrices)), key=lambda index: -matrices[index].numel())
    own = [orthogonal(matrices[index], dtype) for index in by_size[dist.get_rank() :: world]]
    for rank in range(min(world, len(matrices))):
        share = by_size[rank::world]
        parts = own if rank == dist.get_rank() else [found[i].to(dtype) for i in share]
        flat = torch.cat([part.flatten() for part in parts])
        dist.broadcast(flat, rank)
        sizes = [part.numel() for part in parts]
        for index, part in zip(share, flat.split(sizes), strict=True):
            found[index] = part.view_as(found[index])
    return found


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal.

    It does what torch's own does with ``adjust_lr_fn="match_rms_adamw"``, which gives its steps the
    size of AdamW's. But torch's computes in bfloat16 everywhere, which makes a training step three
    times as long on a processor that has it in software only: there this one computes in float32.
    And processes that train together share the matrices, where each of torch's computes all.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = orthogonals([self._momentum(parameter) for parameter in moved])
            for parameter, update in zip(moved, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(parameter.shape) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * size)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's, of the gradient."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of blocks, torch's AdamW for all others, as one optimizer.

    One learning rate and one weight decay serve both.

    Args:
        matrices: what Muon trains.
        groups: parameter groups of AdamW.
        lr: learning rate.
        betas: of AdamW.
        weight_decay: of all but the groups that say otherwise.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        self._parts = [
            Muon(matrices, lr=lr, weight_decay=weight_decay),
            torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both have their groups and their state in this one's."""
        self._parts[0].param_groups = self.param_groups[:1]
        self._parts[1].param_groups = self.param_groups[1:]
        for part in self._parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self._parts:
            part.step()


class AdamW8bit(torch.optim.Optimizer):
    """torchao's AdamW, whose moments have 8 bits in blocks with a scale each.

    The method is that of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". On a
    GPU torch's compiler makes one kernel of it; elsewhere it is computed as it is written: slower,
    but without minutes of compiling.

    Args:
        groups: parameter groups.
        lr: learning rate.
        betas: decay of both moments.
        weight_decay: of all but the groups that say otherwise.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        from torchao import optim

        self._part: Any = optim.AdamW8bit(
            groups, lr=lr, betas=betas, weight_decay=weight_decay, block_size=BLOCK
        )
        super().__init__(self._part.param_groups, {})
        self._share()

    def _share(self) -> None:
        self._part.param_groups, self._part.state = self.param_groups, self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:  # torchao refuses a rate that is a number
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        compiled = self.param_groups[0]["params"][0].is_cuda
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            self._part.step()

    def joined(self, parameter: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the optimizer remembers of a parameter, from the parts that `apart` made."""
        state = {name: value for name, value in parts.items() if "." not in name}
        for name in {name.partition(".")[0] for name in parts} - state.keys():
            state[name] = moment = self._part._new_buffer(parameter, name == "exp_avg")
            moment.codes.copy_(parts[f"{name}.codes"])
            moment.scale.copy_(parts[f"{name}.scale"])
        return state


def apart(state: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's state in plain tensors: moments of 8 bits as their codes and scales."""
    parts = {}
    for name, value in state.items():
        if hasattr(value, "codes"):
            parts |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            parts[name] = value
    return parts


def moment8bit(parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of a moment of 8 bits; none where torchao leaves it in float32."""
    count = parameter.numel()
    if count < 4096 or count % BLOCK:
        return {}
    return {"codes": tuple(parameter.shape), "scale": (count // BLOCK,)}


def check_optimizer(name: OptimizerName) -> None:
    """Refuse an optimizer that this installation lacks.

    Raises:
        ValueError: says what to install.
    """
    if name == "adamw8bit" and find_spec("torchao") is None:
        raise ValueError(
            "optimizer 'adamw8bit' needs torchao: pip install 'muse-maskgit-pytorch[torchao]', or "
            "use 'adamw'"
        )


def make_optimizer(
    name: OptimizerName,
    module: nn.Module,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of a module's trained parameters; arguments as in `Trainer`.

    Raises:
        ValueError: "muon" for a module without transformer blocks; "adamw8bit" without torchao.
    """
    check_optimizer(name)
    parameters, with_decay = trained(module), decayed(module)
    matrices = block_matrices(module) if name == "muon" else set()
    if name == "muon" and not matrices:
        raise ValueError(
            f"optimizer 'muon' is for the matrices of transformer blocks, and this "
            f"{type(unwrapped(module)).__name__} trains none: use 'adamw'"
        )
    left = {n: p for n, p in parameters.items() if n not in matrices}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in left.items() if n in with_decay]},
        {"params": [p for n, p in left.items() if n not in with_decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = dict(lr=lr, betas=betas, weight_decay=weight_decay)
    if name == "muon":
        return MuonAdamW([parameters[n] for n in parameters if n in matrices], groups, **settings)
    if name == "adafactor":
        return Adafactor(groups, **settings)
    if name == "adamw8bit":
        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def _names(module: nn.Module, optimizer: Any) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in trained(module).items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _layout(optimizer: Any, parameter: Tensor, of_muon: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the optimizer remembers of a parameter."""
    shape = tuple(parameter.shape)
    if of_muon:
        return {"momentum_buffer": shape}
    if isinstance(optimizer, Adafactor):
        return {"step": (), "exp_avg": shape, **factors(parameter)}
    if isinstance(optimizer, AdamW8bit) and (parts := moment8bit(parameter)):
        moments = product(("exp_avg", "exp_avg_sq"), parts.items())
        return {"step": ()} | {f"{name}.{part}": size for name, (part, size) in moments}
    return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}


def named_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What the optimizer remembers of each parameter, by the parameter's name."""
    names = _names(module, optimizer)
    return {names[i]: apart(state) for i, state in optimizer.state_dict()["state"].items()}


def load_named_state(module: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """Restore the state that `named_state` returned; the settings stay those of today.

    Older checkpoints hold torch's own form, numbered with all tensors of two or more dimensions
    first.

    Raises:
        ValueError: a state of another optimizer or parameter, or without finite numbers.
    """
    parameters = trained(module)
    if saved.keys() == {"state", "param_groups"}:
        old = sorted(parameters, key=lambda name: parameters[name].ndim <= 1)
        saved = {old[int(i)]: state for i, state in saved["state"].items()}
    inner = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    matrices = block_matrices(module) if isinstance(inner, MuonAdamW) else set()
    for name, own in saved.items():
        layout = _layout(inner, parameters[name], name in matrices)
        if own.keys() != layout.keys():
            raise ValueError(
                f"it was trained with another optimizer, which remembers {', '.join(sorted(own))} "
                f"of {name}, while {type(inner).__name__} remembers {', '.join(sorted(layout))}: "
                "resume with the optimizer that the run was begun with"
            )
        for key, wanted in layout.items():
            of_kind = key.endswith(".codes") != own[key].is_floating_point()
            if own[key].shape != wanted or not is_finite(own[key]) or not of_kind:
                raise ValueError(f"the optimizer's {key} of {name} is of another parameter")
    names = _names(module, optimizer)
    if isinstance(inner, AdamW8bit):
        saved = {name: inner.joined(parameters[name], own) for name, own in saved.items()}
    state = {i: saved[name] for i, name in enumerate(names) if name in saved}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
