"""Linear layers that compute faster than torch's own, made from these; and which a device has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .devices import fast_precisions

QUANTISED = ("int8", "float8")


class PackedLinear(nn.Module):
    """A float32 layer whose weight oneDNN has laid out for its kernels."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.plain = plain
        # of so many rows the layout is best; others are computed too
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), 512)

    def forward(self, x: Float[Tensor, "*s K"]) -> Float[Tensor, "*s N"]:
        if x.dtype != torch.float32 or not x.numel() or torch.is_autocast_enabled(x.device.type):
            return self.plain(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.plain.bias, "none", [], "")


class Bfloat16Linear(nn.Module):
    """A layer with its weight in bfloat16; so is what comes out."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.weight = plain.weight.detach().bfloat16()
        self.bias = None if plain.bias is None else plain.bias.detach().bfloat16()

    def forward(self, x: Float[Tensor, "*s K"]) -> Float[Tensor, "*s N"]:
        return F.linear(x.bfloat16(), self.weight, self.bias)


class Int8Linear(nn.Module):
    """A layer of 8-bit integers (oneDNN): a scale for each output, and one for each row of x."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        weight = plain.weight.detach().float()
        # without VNNI, pairs of products are added up in 16 bits: a weight may use 7
        most = 127 if getattr(torch.cpu, "_is_vnni_supported", bool)() else 63
        self.scale = (weight.abs().amax(dim=1) / most).clamp(min=1e-12)
        codes = (weight / self.scale[:, None]).round().clamp(-most, most).to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, [512, weight.shape[1]])
        self.zero = torch.zeros(len(weight), dtype=torch.long)
        self.bias = plain.bias

    def forward(self, x: Float[Tensor, "*s K"]) -> Float[Tensor, "*s N"]:
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], len(self.scale))
        flat = x.flatten(0, -2).float()
        scale = (flat.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-12)
        codes = (flat / scale).round_().add_(128).to(torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self.packed, self.scale, self.zero,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out = out.mul_(scale)
        out = out if self.bias is None else out + self.bias
        return out.unflatten(0, x.shape[:-1])


class TorchaoLinear(nn.Module):
    """A layer of 8-bit numbers on a GPU (torchao); bfloat16 goes in and comes out.

    Args:
        plain: the layer.
        kind: "int8" or "float8".
    """

    def __init__(self, plain: nn.Linear, kind: str):
        super().__init__()
        quantization: Any = import_module("torchao.quantization")
        if kind == "int8":  # a scale for each row of x and each output, as for float8
            how = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        else:
            how = quantization.Float8DynamicActivationFloat8WeightConfig(
                granularity=quantization.PerRow(), set_inductor_config=False
            )
        self.inner = copy.deepcopy(plain).bfloat16().requires_grad_(False)
        quantization.quantize_(self.inner, how)

    def forward(self, x: Float[Tensor, "*s K"]) -> Float[Tensor, "*s N"]:
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.inner.out_features)
        return self.inner(x.bfloat16())


def check_available(precision: str, device: torch.device) -> None:
    """Refuse a precision of linear layers that a device does not have.

    Raises:
        ValueError: the message names those there are.
    """
    if precision in ("bfloat16", *QUANTISED) and precision not in (there := available(device)):
        missing = device.type == "cuda" and precision in QUANTISED and not has_torchao()
        raise ValueError(
            f"precision {precision!r} is not to be had on this {device.type} with this torch: "
            f"there are {there}" + (", and more with pip install torchao" if missing else "")
        )


def available(device: torch.device) -> list[str]:
    """The precisions of a device, by name."""
    there = ["float32"]
    if device.type == "cuda" or "bf16" in fast_precisions(device):
        there.append("bfloat16")
    if device.type == "cpu" and works(Int8Linear):
        there.append("int8")
    if device.type == "cuda" and has_torchao():
        capability = torch.cuda.get_device_capability(device)
        there += ["int8"] if capability >= (8, 0) else []
        there += ["float8"] if capability >= (8, 9) else []
    return there


def has_torchao() -> bool:
    return find_spec("torchao") is not None


@cache
def works(layer: Callable[[nn.Linear], nn.Module]) -> bool:
    """Whether this build of torch has the operators of a kind of layer."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            plain = nn.Linear(16, 16, bias=False)
            x = torch.ones(2, 16)
            return torch.allclose(layer(plain)(x), plain(x), rtol=0.1, atol=0.1)
        except (AttributeError, RuntimeError, NotImplementedError):
            return False


class SameTypeLinear(nn.Module):
    """A layer of any of these kinds, whose output has its input's type.

    So it fits into networks that know nothing of it.
    """

    weight = None  # of no type of its own, where a network looks for one

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Float[Tensor, "*s K"]) -> Float[Tensor, "*s N"]:
        return self.inner(x).to(x.dtype)


def lower(network: nn.Module, precision: str, device: torch.device) -> None:
    """Put layers of a lower precision in the place of all linear layers of a network.

    One at a time, and nothing keeps those that were there: it never takes more memory than before.

    Args:
        network: on any device, in float32.
        precision: "bfloat16" or "int8".
        device: where it is going to compute; the new layers are made there.

    Raises:
        ValueError: a precision that the device does not have.
    """
    check_available(precision, device)
    layer: Callable[[nn.Linear], nn.Module] = Bfloat16Linear
    if precision in QUANTISED:
        layer = Int8Linear if device.type == "cpu" else partial(TorchaoLinear, kind=precision)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, SameTypeLinear(layer(child.to(device))))
