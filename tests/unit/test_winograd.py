"""Winograd's convolution is the plain one."""

import pytest
import torch
from torch import nn

from muse_maskgit_pytorch import VQGanVAE, winograd
from muse_maskgit_pytorch.winograd import Conv3x3


@pytest.fixture(autouse=True)
def small_images_count(monkeypatch):
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 1024)


def both(shape: tuple[int, ...], channels: int) -> tuple[Conv3x3, nn.Conv2d, torch.Tensor]:
    """A layer, the plain one in double precision with the same weights, and an input."""
    torch.manual_seed(0)
    layer = Conv3x3(shape[1], channels)
    plain = nn.Conv2d(shape[1], channels, 3, padding=1).double()
    plain.load_state_dict(layer.state_dict())
    return layer, plain, torch.randn(shape)


def results(layer: nn.Module, x: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """What comes out, and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    out = layer(x)
    generator = torch.Generator().manual_seed(seed)
    pull = torch.randn(out.shape, generator=generator).to(out)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], pull)]


@pytest.mark.parametrize("tiles", [8, 24, 256])  # many strips of an image; images at once
@pytest.mark.parametrize("shape", [(2, 64, 24, 32), (3, 80, 32, 16)])
def test_equals_the_plain_convolution(tiles, shape, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    layer, plain, x = both(shape, 72)
    assert winograd.pays(x, layer.weight)
    for ours, wanted in zip(results(layer, x), results(plain, x.double()), strict=True):
        assert (ours - wanted).abs().max() < 4e-6 * wanted.abs().max()


def test_is_as_exact_as_single_precision_is():
    """The error of 256 channels, root mean square, is some 20 roundings of a float32.

    A plain convolution has 4 to 10 of them, as the processor adds up.
    """
    layer, plain, x = both((1, 256, 32, 32), 256)
    wanted = plain(x.double())
    error = (layer(x) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert 0 < error < 32 * 2**-24


def test_can_be_differentiated_twice():
    def penalty(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        [slope] = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), next(layer.parameters()))[0]

    layer, plain, x = both((1, 64, 32, 32), 64)
    ours, wanted = penalty(layer, x), penalty(plain, x.double())
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_is_taken_in_large_float32_training_alone():
    layer, _, x = both((1, 64, 32, 32), 64)
    weight = layer.weight
    assert winograd.pays(x, weight)
    with torch.no_grad():  # so ids and pictures stay what they were
        assert not winograd.pays(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd.pays(x, weight)
    assert not winograd.pays(x.double(), weight.double())
    assert not winograd.pays(x[:, :, :30], weight)  # no whole tiles
    assert not winograd.pays(x[:, :, :16], weight)  # few
    assert not winograd.pays(x[:, :32], weight[:, :32])


def test_a_step_of_the_tokenizer_is_the_plain_one(monkeypatch):
    torch.manual_seed(0)
    vae = VQGanVAE(dim=64, vq_codebook_size=64, layers=1, num_res_blocks=1).eval()
    images = torch.rand(1, 3, 32, 32)
    taken = []

    def gradients() -> list[torch.Tensor]:
        recon, quantized = vae(images)
        loss = (recon - images).square().mean() + quantized.loss
        return [loss, *torch.autograd.grad(loss, list(vae.parameters()))]

    convolved = winograd._convolved
    monkeypatch.setattr(winograd, "_convolved", lambda *a: taken.append(a) or convolved(*a))
    fast = gradients()
    assert len(taken) == 8  # two blocks of two convolutions at 32 x 32, there and back
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1000)
    for ours, plain in zip(fast, gradients(), strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
