"""3x3 convolutions with a quarter of the products, for training the tokenizer on a CPU.

Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): 16 pixels of a
result take 36 products of each input and output channel instead of 144. It is exact up to
rounding. The usual points 0, 1, -1, 2, -2 lose two bits to it; with square roots of 1/2 and 2 in
the place of 1 and 2, it is as good as the plain sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
PATCH, TILE = 6, 4  # sides of what is read and of what is written
TILES = 256  # at a time: about what the caches hold
LEAST_CHANNELS, LEAST_PIXELS = 64, 4096  # of a batch, below which the plain convolution is faster


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Of patches (36, 6, 6), kernels (36, 3, 3) and results (36, 4, 4).

    Toom and Cook: a result is a polynomial's value times a kernel's at five points and at
    infinity, transposed. Scales are free, and chosen to be of one size.
    """
    points = torch.tensor(POINTS, dtype=torch.float64, device="cpu")

    def values(powers: int) -> Tensor:
        infinity = torch.eye(powers, dtype=torch.float64, device="cpu")[-1:]
        return torch.cat([torch.vander(points, powers, increasing=True), infinity])

    patch, kernel, result = torch.linalg.inv(values(PATCH)).T, values(3), values(TILE)
    scale = patch.norm(dim=1, keepdim=True)
    patch, kernel = patch / scale, kernel * scale
    even = (kernel.norm(dim=1, keepdim=True) / result.norm(dim=1, keepdim=True)).sqrt()
    sides = patch, kernel / even, result * even
    return tuple(torch.einsum("ia,jb->ijab", m, m).flatten(0, 1).float() for m in sides)  # type: ignore[return-value]


OF_PATCH, OF_KERNEL, OF_RESULT = _matrices()


def pays(x: Float[Tensor, "B C H W"], weight: Float[Tensor, "O C 3 3"]) -> bool:
    """Whether training is faster this way: float32 on a CPU, many channels, many tiles."""
    batch, _, height, width = x.shape
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and height % TILE == width % TILE == 0
        and batch * height * width >= LEAST_PIXELS
    )


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by one, by whichever way is faster."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O H W"]:
        if not pays(input, self.weight):
            return super().forward(input)
        out = _Convolution.apply(input, self.weight)
        return out if self.bias is None else out + self.bias[:, None, None]  # type: ignore[operator]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), [grad], wants = ctx.saved_tensors, grads, ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated once more
            ones, more = [1, 1], [*wants, False]
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, ones, ones, ones, False, [0, 0], 1, more
            )[:2]
        turned = weight.flip(2, 3).transpose(0, 1)
        return (
            _convolved(grad, turned) if wants[0] else None,
            _by_weight(x, grad) if wants[1] else None,
        )


def _strips(x: Float[Tensor, "B C H W"]) -> Iterator[tuple[slice, slice, slice]]:
    """Images and rows of about ``TILES`` tiles, and these rows with their neighbours if padded."""
    batch, _, height, width = x.shape
    rows = min(height, TILE * max(1, TILES * TILE // width))
    images = max(1, TILES * TILE**2 // (rows * width))
    for image in range(0, batch, images):
        for row in range(0, height, rows):
            end = min(row + rows, height)
            yield slice(image, image + images), slice(row, end), slice(row, end + PATCH - TILE)


def _spread(
    x: Float[Tensor, "b C h w"], matrix: Float[Tensor, "36 s s"]
) -> Float[Tensor, "36 C T"]:
    """Each channel's patches, four pixels apart, as 36 numbers."""
    spread = F.conv2d(x.reshape(-1, 1, *x.shape[2:]), matrix[:, None], stride=TILE)
    return spread.view(*x.shape[:2], PATCH**2, -1).permute(2, 1, 0, 3).flatten(2)


def _convolved(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, "O C 3 3"]
) -> Float[Tensor, "B O H W"]:
    outputs, channels = weight.shape[:2]
    kernel = (OF_KERNEL.flatten(1) @ weight.reshape(-1, 9).T).view(-1, outputs, channels)
    back = OF_RESULT.flatten(1).T
    padded, out = F.pad(x, (1, 1, 1, 1)), x.new_empty(len(x), outputs, *x.shape[2:])
    for images, rows, read in _strips(x):
        products = torch.bmm(kernel, _spread(padded[images, :, read], OF_PATCH))
        part = out[images, :, rows]
        tiles = part.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE))  # b O h 4 w 4
        made = (back @ products.flatten(1)).view(TILE, TILE, outputs, len(part), *tiles.shape[2::2])
        tiles.copy_(made.permute(3, 2, 4, 0, 5, 1))
    return out


def _by_weight(
    x: Float[Tensor, "B C H W"], grad: Float[Tensor, "B O H W"]
) -> Float[Tensor, "O C 3 3"]:
    padded, channels, outputs = F.pad(x, (1, 1, 1, 1)), x.shape[1], grad.shape[1]
    total = x.new_empty(PATCH**2, outputs, channels)
    for place, (images, rows, read) in enumerate(_strips(x)):
        given = _spread(grad[images, :, rows], OF_RESULT)
        patches = _spread(padded[images, :, read], OF_PATCH)
        total.baddbmm_(given, patches.transpose(1, 2), beta=min(place, 1))
    return (total.flatten(1).T @ OF_KERNEL.flatten(1)).view(outputs, channels, 3, 3)
