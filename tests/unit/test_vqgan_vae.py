"""The tokenizer: sizes, ids, and settings that mean what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muse_maskgit_pytorch import VQGanVAE
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.vqgan_vae import ResBlock, Upsample
from tests.shapes import unchecked

KINDS = {"vq": 48, "simvq": 48, "lfq": 64, "bsq": 64, "fsq": 60}
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
        (dict(decoder_dim=6), "decoder_dim 6 must be a positive multiple of 4"),
        (dict(decoder_res_blocks=-1), "decoder_res_blocks must be at least 0"),
        (dict(layers=-1), "layers must be at least 0"),
        (dict(channel_mults=[1, 2]), r"channel_mults \[1, 2\] must have layers \+ 1 = 3"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.vae(**changes)


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match=r"VQGanVAE: .* 'codebok_size'"):
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


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("factor", [4, 8, 16, 32])
def test_factor_is_one_argument(factor, patch_size):
    vae = tiny.vae(factor=factor, patch_size=patch_size, layers=None, dim=4)
    assert vae.factor == factor
    images = torch.rand(1, 3, 2 * factor, factor)
    ids = vae.encode_to_ids(images)
    assert ids.shape == (1, 2, 1)
    assert vae.decode_from_ids(ids).shape == images.shape
    strides = [m.stride for m in vae.encoder if isinstance(m, nn.Conv2d)]
    assert patch_size * 2 ** strides.count((2, 2)) == factor


def test_factor_and_layers_may_agree():
    assert tiny.vae(factor=8, layers=3).factor == 8
    assert tiny.vae(factor=8, layers=2, patch_size=2).factor == 8
    assert tiny.vae(factor=12, layers=None, patch_size=3).factor == 12


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(factor=16, layers=3), r"factor 16 and layers 3 disagree .* is factor 8\): leave one"),
        (dict(factor=8, layers=3, patch_size=2), r"factor 8 and layers 3 disagree .* factor 16"),
        (dict(factor=12), r"factor 12 must be patch_size 1 times a power of two, .*\[4, 8, 16, 32"),
        (dict(factor=8, patch_size=3), r"factor 8 must be patch_size 3 times .*\[12, 24, 48"),
        (dict(factor=2, patch_size=4), "factor 2 must be patch_size 4 times"),
        (dict(factor=0), "factor 0 must be"),
        (dict(factor=-8), "factor -8 must be"),
    ],
)
def test_a_factor_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.vae(**dict(layers=None) | changes)


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


# A larger decoder -----------------------------------------------------------------------------


def trained(kind: str, **changes: Any) -> Any:
    """A tokenizer whose weights and, where they move, codes are not those of its making."""
    vae = tiny.randomise(tiny.vae(quantizer=kind, codebook_size=KINDS[kind], **changes)).train()
    for seed in range(3):
        vae(tiny.images(4, seed=seed))
    return vae.eval()


@every_kind
def test_ids_outlive_a_larger_decoder(kind, tmp_path):
    vae, images = trained(kind, patch_size=2), tiny.images(4, 32)
    for sizes in ((None, 3), (16, None), (4, 0)):  # channels, residual blocks
        larger = vae.with_decoder(*sizes)
        assert torch.equal(larger.encode_to_ids(images), vae.encode_to_ids(images))
        assert larger.same_ids(vae)
        assert vae.same_ids(larger)
    again = VQGanVAE.from_pretrained(larger.save(tmp_path / "larger.safetensors"))
    assert again.config["decoder_dim"] == 4
    assert again.same_ids(vae)
    ids = vae.encode_to_ids(images)
    assert torch.equal(again.decode_from_ids(ids), larger.decode_from_ids(ids))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_added_blocks_change_nothing_at_first(blocks):
    vae = trained("fsq", num_res_blocks=blocks, channel_mults=[1, 2, 2])
    larger = vae.with_decoder(None, blocks + 2)
    ids = tiny.ids(2, 16).view(2, 4, 4)
    assert torch.equal(larger.decode_from_ids(ids), vae.decode_from_ids(ids))
    counts = [sum(isinstance(m, ResBlock) for m in v.decoder) for v in (vae, larger)]
    assert counts == [3 * blocks, 3 * (blocks + 2)]
    # every block learns although it starts as the identity
    (larger(tiny.images())[0] - tiny.images(seed=1)).square().mean().backward()
    grads = [m.conv2.weight.grad for m in larger.decoder if isinstance(m, ResBlock)]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    # and once more on top
    again = larger.with_decoder(None, blocks + 3)
    assert torch.equal(again.decode_from_ids(ids), vae.decode_from_ids(ids))


def test_a_wider_decoder_is_new():
    vae = trained("fsq")
    wider = vae.with_decoder(decoder_dim=16, decoder_res_blocks=0)
    assert wider.decoder[-1].in_channels == 32  # the last resolution has twice as many
    assert wider.encoder[0].out_channels == 16
    ids = tiny.ids(2, 16).view(2, 4, 4)
    assert not torch.allclose(wider.decode_from_ids(ids), vae.decode_from_ids(ids))
    again = wider.with_decoder(None, None).decoder  # as now
    assert [m.weight.shape for m in again if isinstance(m, nn.Conv2d)] == [
        m.weight.shape for m in wider.decoder if isinstance(m, nn.Conv2d)
    ]


def test_the_papers_decoder_by_default():
    larger = tiny.vae(layers=1, channel_mults=[1, 1]).with_decoder()
    assert larger.decoder[-1].in_channels == 256
    assert sum(isinstance(m, ResBlock) for m in larger.decoder) == 2 * 4


def test_a_new_decoder_does_not_share_weights():
    vae = trained("vq")
    larger = vae.with_decoder(None, 2)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with torch.no_grad():
        for value in [*larger.parameters(), *larger.buffers()]:
            value.zero_()
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_fewer_blocks_are_refused():
    with pytest.raises(ValueError, match="decoder_res_blocks 1 are fewer than the 2 of this"):
        tiny.vae(num_res_blocks=2).with_decoder(None, 1)
    larger = tiny.vae().with_decoder(8, 3)
    with pytest.raises(ValueError, match="decoder_res_blocks 2 are fewer than the 3 of this"):
        larger.with_decoder(None, 2)


def test_a_decoder_of_its_own_from_the_start():
    vae = tiny.vae(decoder_dim=16, decoder_res_blocks=2)
    images = tiny.images()
    assert vae(images)[0].shape == images.shape
    sizes = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert sizes[1] > 3 * sizes[0]


@every_kind
def test_other_weights_make_other_ids(kind):
    vae = trained(kind)
    twin = tiny.vae(quantizer=kind, codebook_size=KINDS[kind])
    assert not vae.same_ids(twin)
    twin.load_state_dict(vae.state_dict())
    assert vae.same_ids(twin)
    with torch.no_grad():
        twin.decoder[-1].bias.add_(1)
        assert vae.same_ids(twin)
        twin.encoder[0].bias.add_(1e-3)
    assert not vae.same_ids(twin)


def test_values_are_compared_once_for_each_loading(monkeypatch: pytest.MonkeyPatch):
    vae, twin = tiny.vae(), tiny.vae()
    twin.load_state_dict(vae.state_dict())
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: compared.append(1) or equal(*pair))
    assert vae.same_ids(twin)
    assert len(compared) > 1
    compared.clear()
    assert vae.same_ids(twin)
    assert not compared
    twin.half().float()  # rounded, perhaps at the same addresses
    assert not vae.same_ids(twin)
    twin.load_state_dict(vae.state_dict())
    assert vae.same_ids(twin)
    compared.clear()
    twin.load_state_dict(vae.state_dict())
    assert vae.same_ids(twin)
    assert compared
    vae.encoder[0] = nn.Conv2d(3, 8, 3, padding=1)
    assert not vae.same_ids(twin)


@pytest.mark.parametrize(
    "one, other",
    [
        (dict(fsq_levels=[5, 4, 3]), dict(fsq_levels=[3, 4, 5])),
        (dict(quantizer="vq"), dict(quantizer="vq", l2_norm=False)),
        (dict(quantizer="lfq", codebook_size=64), dict(quantizer="bsq", codebook_size=64)),
    ],
)
def test_equal_weights_do_not_mean_equal_ids(one, other):
    """Some settings show in no weight."""
    a, b = tiny.vae(**one), tiny.vae(**other)
    b.load_state_dict(a.state_dict())
    assert not a.same_ids(b)


# Noise for the decoder ----------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_latent_noise_is_seen_by_the_decoder_alone(kind):
    vae = trained(kind, dim=32)
    images, seen = tiny.images(4, 64), []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain, clean = vae(images)
    noisy, out = vae(images, latent_noise=0.3)
    assert torch.equal(out.ids, clean.ids)
    assert torch.equal(out.quantized, clean.quantized)
    assert out.loss == clean.loss
    assert torch.equal(seen[0], clean.quantized)
    noise = seen[1] - clean.quantized
    rms = clean.quantized.square().mean().sqrt()
    assert noise.std() == pytest.approx(0.3 * rms.item(), rel=0.02)
    assert abs(noise.mean()) < 0.01 * rms
    assert not torch.allclose(noisy, plain)


def test_latent_noise_is_new_in_every_pass_and_lets_the_gradient_through():
    vae, images = tiny.vae().train(), tiny.images()
    first, second = (vae(images, latent_noise=0.3)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    second.square().mean().backward()
    assert vae.encoder[0].weight.grad.abs().sum() > 0


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


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 1, 1)])
def test_enlargement_is_nearest_neighbour_and_a_convolution(shape):
    """Values and gradients; the weights in a file are those of the convolution."""
    layer, x = Upsample(6, 4), torch.randn(*shape, requires_grad=True)
    long_way = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(layer(x), long_way, atol=1e-5, rtol=1e-5)
    given, weights = [x, *layer.parameters()], torch.randn_like(long_way)
    slopes = [torch.autograd.grad((out * weights).sum(), given) for out in (layer(x), long_way)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in layer.named_parameters()} == {"conv.weight", "conv.bias"}


# A local encoder


def local(**changes: Any) -> VQGanVAE:
    """8 pixels a token."""
    arguments: dict[str, Any] = dict(dim=16, codebook_size=64, patch_size=4, layers=1)
    arguments |= dict(quantizer="fsq", channel_mults=[1, 2], num_res_blocks=2, local_encoder=True)
    return VQGanVAE(**{**arguments, **changes}).eval()


def test_a_local_encoder_sees_its_own_patch_alone():
    vae = local().double()
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    x = F.pixel_unshuffle(image * 2 - 1, vae.patch_size)
    vae.encoder(x)[0, :, 3, 4].square().sum().backward()
    assert image.grad is not None
    seen = torch.nonzero(image.grad[0].abs().sum(0))
    assert len(seen) == 8 * 8
    assert seen.min(0).values.tolist() == [3 * 8, 4 * 8]


@torch.no_grad()
def test_plain_surfaces_get_equal_ids_wherever_they_are():
    image = torch.full((1, 3, 64, 64), 0.3)
    thing = image.clone()
    thing[..., 20:40, 20:40] = torch.rand(3, 20, 20)
    vae = local()
    plain, beside = vae.encode_to_ids(image), vae.encode_to_ids(thing)
    assert len(plain.unique()) == 1
    untouched = torch.ones(8, 8, dtype=torch.bool)
    untouched[2:5, 2:5] = False
    assert torch.equal(beside[0][untouched], plain[0][untouched])
    # with norms over the picture, even its other end knows of the thing
    first = local(local_encoder=False).encoder[:2]
    far = [first(F.pixel_unshuffle(x, 4))[..., -1, -1] for x in (image, thing)]
    assert not torch.equal(*far)


def test_a_local_encoder_is_saved_and_gets_other_decoders(tmp_path: Path):
    vae = local()
    again = VQGanVAE.from_pretrained(vae.save(tmp_path / "vae.safetensors"))
    assert again.config["local_encoder"]
    larger = vae.with_decoder(32, 3)
    images = torch.rand(2, 3, 32, 32)
    for other in (again, larger):
        assert vae.same_ids(other)
        assert torch.equal(vae.encode_to_ids(images), other.encode_to_ids(images))
    assert "local_encoder" not in local(local_encoder=False).config
