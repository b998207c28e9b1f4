"""Decoding within bounded memory: strips of a picture, and some pictures of a batch at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muse_maskgit_pytorch import VQGanVAE, strips, vqgan_vae
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.foreign import ForeignVQGAN
from muse_maskgit_pytorch.vqgan_vae import ResBlock


def foreign(family: Any) -> Any:
    attention = dict(encoder_attention=[False] * 3, decoder_attention=[False, True, True])
    made = ForeignVQGAN(
        family=family, channels=[8, 16, 16], blocks=1, latent_channels=8, code_dim=8,
        codebook_size=60, mid_attention=family != "maskgit", groups=4, **attention,
    )  # fmt: skip
    return tiny.randomise(made)


MAKERS = {
    "ours": lambda: tiny.randomise(tiny.vae(num_res_blocks=2)),
    "ours, patches, a larger decoder": lambda: tiny.randomise(
        tiny.vae(patch_size=2, layers=1, decoder_dim=16, decoder_res_blocks=3)
    ),
    "taming": lambda: foreign("taming"),
    "maskgit": lambda: foreign("maskgit"),
}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, rows: int):
    """Pixels and ids, on pictures that the strips do not divide evenly; in double precision."""
    vae = MAKERS[name]().double().eval()
    ids, images = tiny.ids(2, 33).view(2, 11, 3), torch.rand(2, 3, 44, 12)

    @torch.no_grad()
    def decoded() -> Tensor:
        # ours gives its pixels in single precision, whatever it computes in
        ours = isinstance(vae, VQGanVAE)
        return vae.decode(vae.quantizer.decode(ids)) if ours else vae.decode_from_ids(ids)

    whole, wanted = decoded(), vae.encode_to_ids(images)
    monkeypatch.setattr(strips, "CPU_STRIP", 1)
    monkeypatch.setattr(strips, "LEAST_ROWS", rows)
    monkeypatch.setattr(vqgan_vae, "CPU_PIXELS", 1)
    cut = []
    monkeypatch.setattr(strips, "_affine", lambda *a: cut.append(a) or affine(*a))
    torch.testing.assert_close(decoded(), whole, atol=1e-9, rtol=0)
    assert cut
    assert whole.dtype == torch.float64
    assert torch.equal(vae.encode_to_ids(images), wanted)
    assert whole.std() > 0.01


affine = strips._affine


def test_as_exact_as_the_whole(monkeypatch: pytest.MonkeyPatch):
    """Against double precision, on a map whose mean is far from zero."""
    norm, conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(1, 16, 64, 64) + 30

    def off() -> float:
        with torch.no_grad():
            exact = nn.Sequential(norm, nn.SiLU(), conv).double()(x.double())
            found = strips.norm_silu_conv(norm.float(), conv.float(), x)
        return float((found - exact).abs().max())

    whole = off()
    monkeypatch.setattr(strips, "CPU_STRIP", 1)
    assert 0 < off() < 2 * whole + 1e-6


def test_no_gradient_is_lost_and_nothing_given_is_overwritten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strips, "CPU_STRIP", 1)
    block, x = tiny.randomise(ResBlock(8)), torch.randn(1, 8, 40, 4)
    kept = x.clone()
    with torch.no_grad():
        cut = block(x)
    assert torch.equal(x, kept)
    y = block(x.requires_grad_())
    torch.testing.assert_close(cut, y)
    y.sum().backward()
    assert all(p.grad is not None for p in [x, *block.parameters()])


@pytest.mark.parametrize("way", ["bfloat16", "autocast", "meta"])
@torch.no_grad()
def test_where_there_are_no_strips(monkeypatch: pytest.MonkeyPatch, way: str):
    vae, ids = tiny.vae(), tiny.ids().view(2, 4, 4)
    monkeypatch.setattr(strips, "CPU_STRIP", 1)
    monkeypatch.setattr(strips, "LEAST_ROWS", 1)
    monkeypatch.setattr(strips, "_affine", None)
    if way == "meta":  # shapes alone, which autocast does not know
        assert vae.to("meta").decode(torch.zeros(1, 32, 8, 8, device="meta")).shape[-1] == 32
    elif way == "bfloat16":
        assert vae.bfloat16().decode_from_ids(ids).dtype == torch.float32
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert vae.decode_from_ids(ids).isfinite().all()


def test_large_batches_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    vae, ids = tiny.vae(), tiny.ids(5).view(5, 4, 4)
    whole, sizes = vae.decode_from_ids(ids), []

    def watched(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return plain(part)

    plain = vae.pixels_of
    monkeypatch.setattr(vae, "pixels_of", watched)
    monkeypatch.setattr(vqgan_vae, "CPU_PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(vae.decode_from_ids(ids), whole)
    assert sizes == [2, 2, 1]
