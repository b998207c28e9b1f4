"""Images larger than trained, or of another aspect: positions, geometry, both stages."""

import pytest
import torch

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import save_png
from muse_maskgit_pytorch.provenance import read_records
from muse_maskgit_pytorch.transformer import TokenEmbedding
from tests.shapes import unchecked


def test_positions_are_read_between_their_entries():
    embed = TokenEmbedding(5, 9, 4)
    torch.nn.init.zeros_(embed.token.weight)
    ids = torch.zeros(1, 15, dtype=torch.long)
    wide = embed(ids, (3, 5)).view(3, 5, 4)
    square = embed(ids[:, :9]).view(3, 3, 4)
    assert torch.allclose(wide[:, ::2], square)  # the edges and the middle are where they were
    between = (square[:, :2] + square[:, 1:]) / 2
    assert torch.allclose(wide[:, 1::2], between)
    assert torch.equal(embed(ids[:, :9], (3, 3)), embed(ids[:, :9]))
    with pytest.raises(ValueError, match="15 tokens given"):
        embed(ids)


def test_the_trained_size_is_the_same_said_or_not():
    model, text = tiny.maskgit(), tiny.text()
    plain = model.generate_ids(text_embeds=text, seeds=3)
    assert torch.equal(model.generate_ids(text_embeds=text, seeds=3, image_size=16), plain)
    assert torch.equal(model.generate_ids(text_embeds=text, seeds=3, image_size=(16, 16)), plain)


@pytest.mark.parametrize("policy", ["confidence", "halton"])
def test_another_aspect(policy):
    model, text = tiny.maskgit(), tiny.text()
    images = model.generate(
        text_embeds=text, seeds=3, image_size=(8, 24), policy=policy, timesteps=4
    )
    assert images.shape == (2, 3, 8, 24)
    alone = model.generate(
        text_embeds=tiny.TextEmbeds(text.embeds[1:], text.mask[1:]),
        seeds=4,
        image_size=(8, 24),
        policy=policy,
        timesteps=4,
    )
    assert torch.allclose(images[1:], alone, atol=1e-5)


def test_height_and_width_are_told_apart():
    """A transposed grid gives the transposed positions, not the same ones."""
    model = tiny.maskgit()
    ids = torch.arange(12)[None]
    embed = model.transformer.embed
    tall, wide = embed(ids, (6, 2)), embed(ids, (2, 6))
    assert not torch.allclose(tall, wide)
    assert torch.allclose((tall - embed.token(ids))[0, 1], (embed.row[0, 0] + embed.column[0, -1]))


def test_both_stages_of_a_cascade_grow_alike(t5, tmp_path):
    text = dict(t5_name=t5, text_embed_dim=None)
    base = tiny.maskgit(tiny.transformer(**text), sample_options=dict(timesteps=3))
    superres = tiny.superres(
        model=tiny.transformer(seq_len=64, **text), sample_options=dict(timesteps=3)
    )
    muse = Muse(base, superres)
    drawn = muse.draw(muse.request("a red car", seeds=1, image_size=(32, 48)))
    assert drawn.base_images.shape == (1, 3, 16, 24)
    assert drawn.images.shape == (1, 3, 32, 48)
    [image] = muse("a red car", seeds=1, image_size=(32, 48))
    assert image.size == (48, 32)
    save_png(image, tmp_path / "a.png")
    assert read_records(tmp_path / "a.png")[0].request.image_size == (32, 48)
    assert muse.like(tmp_path / "a.png") == [image]


def test_sizes_that_are_no_whole_tokens():
    model, superres = tiny.maskgit(), tiny.superres()
    assert model.geometry.pixels() == (16, 16)
    assert model.geometry.grid((8, 12)) == (2, 3)
    assert superres.geometry.grid(48) == (12, 12)
    assert superres.geometry.cond_grid((48, 16)) == (6, 2)
    with pytest.raises(ValueError, match=r"18 is not a positive multiple of 4.*nearest size is 16"):
        model.generate(text_embeds=tiny.text(), image_size=18)
    # 12 pixels are 3 tokens, but their half, 6, would be 1.5
    with pytest.raises(ValueError, match="12 is not a positive multiple of 8"):
        superres.geometry.pixels((16, 12))
    with pytest.raises(ValueError, match="image_size must be at least 1, not 0"):
        model.geometry.pixels(0)
    with pytest.raises(ValueError, match=r"a number or \(height, width\)"):
        model.geometry.pixels((4, 4, 4))
    with pytest.raises(ValueError, match=r"canvas is \(2, 16\), must be \(2, 24\)"):
        model.generate(
            text_embeds=tiny.text(), image_size=(16, 24), canvas=torch.zeros(2, 16).long()
        )
    with unchecked(), pytest.raises(ValueError, match=r"canvas is \(\), must be \(2, 16\)"):
        model.generate(text_embeds=tiny.text(), canvas=torch.tensor(0))
    with pytest.raises(ValueError, match=r"are \(16, 16\) pixels, but must be \(16, 24\)"):
        superres.generate(
            text_embeds=tiny.text(), image_size=(32, 48), cond_images=torch.rand(2, 3, 16, 16)
        )
