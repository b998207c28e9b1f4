"""The tokenizer: sizes, ids, and settings that mean what they say."""

import pytest
import torch
from torch import nn

from muse_maskgit_pytorch import VQGanVAE
from tests import tiny
from tests.shapes import unchecked

KINDS = {"vq": 48, "simvq": 48, "lfq": 64, "fsq": 60}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_ids_and_pixels_say_the_same(kind):
    vae = tiny.randomise(tiny.vae(quantizer=kind, codebook_size=KINDS[kind])).eval()
    images = tiny.images(2, 16)
    reconstruction, out = vae(images)
    ids = vae.encode_to_ids(images)
    assert ids.shape == (2, 4, 4)
    assert 0 <= ids.min() <= ids.max() < KINDS[kind] == vae.codebook_size
    assert torch.equal(ids, out.ids)
    pixels = vae.decode_from_ids(ids)
    assert pixels.shape == images.shape
    assert 0 <= pixels.min() <= pixels.max() <= 1
    torch.testing.assert_close(pixels, reconstruction.clamp(0, 1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(reconstruction, reconstruction.clamp(0, 1))  # training: unclamped


def test_a_codebook_size_is_what_was_asked_for():
    assert VQGanVAE(dim=8, vq_codebook_size=512, layers=1).codebook_size == 512
    assert VQGanVAE(dim=8, codebook_size=512, layers=1).codebook_size == 512
    assert VQGanVAE(dim=8, codebook_size=64, vq_codebook_size=64, layers=1).codebook_size == 64
    vae = VQGanVAE(dim=8, vq_codebook_size=512, layers=1)
    assert vae.quantizer.inner.get_buffer("codes").shape[0] == 512
    assert VQGanVAE(dim=4, layers=0, num_res_blocks=0).codebook_size == 8192


def test_fsq_levels_alone_give_the_codebook_size():
    vae = tiny.vae(quantizer="fsq", fsq_levels=[5, 4, 3], codebook_size=None)
    assert vae.codebook_size == 60
    assert vae.encode_to_ids(tiny.images()).max() < 60


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vq_codebook_size=512), "vq_codebook_size 512 and codebook_size 60 .* disagree"),
        (dict(codebook_size=0), "codebook_size must be at least 2, not 0"),
        (dict(codebook_size=-8), "codebook_size must be at least 2, not -8"),
        (dict(dim=0), "dim 0 must be a positive multiple of 4"),
        (dict(dim=10), "dim 10 must be a positive multiple of 4"),
        (dict(patch_size=0), "patch_size must be at least 1"),
        (dict(layers=-1), "layers -1"),
        (dict(channel_mults=[1, 2]), r"channel_mults \[1, 2\] must have layers \+ 1 = 3"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.vae(**changes)


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="codebok_size"):
        tiny.vae(codebok_size=512)


@pytest.mark.parametrize("layers, patch_size", [(0, 1), (0, 4), (1, 2), (2, 1), (2, 2), (5, 1)])
def test_factor(layers, patch_size):
    vae = tiny.vae(layers=layers, patch_size=patch_size)
    factor = patch_size * 2**layers
    assert vae.factor == factor
    ids = vae.encode_to_ids(tiny.images(1, 2 * factor))
    assert ids.shape == (1, 2, 2)
    assert vae.fmap_size(2 * factor) == 2
    assert vae.decode_from_ids(ids).shape == (1, 3, 2 * factor, 2 * factor)


def test_default_factor_is_the_papers():
    assert VQGanVAE(dim=4, vq_codebook_size=8, num_res_blocks=0).fmap_size(256) == 16


def test_channel_mults():
    vae = tiny.vae(channel_mults=[1, 2, 3])
    widths = [m.out_channels for m in vae.encoder if isinstance(m, nn.Conv2d)]
    assert widths == [8, 16, 24]


def test_works_at_sizes_it_was_never_trained_at():
    vae = tiny.vae()
    for height, width in ((4, 4), (16, 16), (64, 64), (12, 40)):
        images = torch.rand(1, 3, height, width)
        ids = vae.encode_to_ids(images)
        assert ids.shape == (1, height // 4, width // 4)
        assert vae.decode_from_ids(ids).shape == images.shape


@pytest.mark.parametrize("height, width", [(18, 16), (16, 3), (0, 16)])
def test_size_that_does_not_fit(height, width):
    with pytest.raises(ValueError, match=r"image size (18|3|0) is not .* factor 4: use (16|4)"):
        tiny.vae().encode_to_ids(torch.rand(1, 3, height, width))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16)])
def test_wrong_channels(shape):
    with unchecked(), pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not"):
        tiny.vae().encode_to_ids(torch.rand(shape))


def test_images_of_a_batch_do_not_meet():
    vae = tiny.vae(quantizer="vq")
    images = tiny.images(3)
    alone = torch.cat([vae.encode_to_ids(image[None]) for image in images])
    assert torch.equal(vae.encode_to_ids(images), alone)


@every_kind
def test_autocast_does_not_move_the_codes_much(kind):
    vae = tiny.vae(quantizer=kind, codebook_size=KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, out = vae(tiny.images())
        assert vae.decode_from_ids(out.ids).isfinite().all()
    assert reconstruction.isfinite().all()
    assert out.loss.dtype == torch.float32


@every_kind
def test_gradient_reaches_every_weight(kind):
    vae = tiny.vae(quantizer=kind, codebook_size=KINDS[kind]).train()
    images = tiny.images()
    reconstruction, out = vae(images)
    ((reconstruction - images).square().mean() + out.loss).backward()
    without = [n for n, p in vae.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert vae.encoder[0].weight.grad.abs().sum() > 0


def test_eval_leaves_the_codebook_alone():
    vae = tiny.vae(quantizer="vq")
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae(tiny.images())
    vae.encode_to_ids(tiny.images())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_learns_an_image(kind):
    vae = tiny.vae(quantizer=kind, codebook_size=64, dim=16).train()
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    images = torch.stack([x, y, (x - y).abs()])[None]
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        reconstruction, out = vae(images)
        error = (reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
    assert error < 0.01  # the image's variance is 0.08
