"""Rotary positions: products that know distances, on every grid and in every kind of attention."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import Muse, layers
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.layers import MultiAxisAttention, SelfAttention

GRIDS = [(4, 4), (3, 6), (7, 2)]


def pairwise(layer: SelfAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same by pairs: channels as complex numbers, turned by how far two tokens are apart."""
    half, quarter = layer.dim_head // 2, layer.dim_head // 4
    q, k, v = (
        t.unflatten(-1, (-1, layer.dim_head)) for t in layer.to_qkv(layer.norm(x)).chunk(3, -1)
    )
    q, k = (torch.complex(t[..., :half], t[..., half:]) for t in (layer.q_norm(q), layer.k_norm(k)))
    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    scores = q.new_empty(len(x), q.shape[2], len(cells), len(cells)).real
    for i, (row, column) in enumerate(cells):
        for j, (other_row, other_column) in enumerate(cells):
            apart = torch.tensor([row - other_row] * quarter + [column - other_column] * quarter)
            speeds = torch.tensor([0.01 ** (n / quarter) for n in range(quarter)] * 2)
            turn = torch.polar(torch.ones(half), apart * speeds)
            scores[:, :, i, j] = (q[:, i] * turn * k[:, j].conj()).real.sum(-1)
    seen = (scores * layer.dim_head**-0.5).softmax(-1)
    return layer.to_out((seen @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_sum_over_pairs(grid: tuple[int, int]):
    layer = tiny.randomise(SelfAttention(16, 2, 8, rotary=True))
    x = torch.randn(2, math.prod(grid), 16)
    expected = pairwise(layer, x, grid)
    torch.testing.assert_close(layer(x, grid=grid), expected, atol=2e-5, rtol=1e-5)
    at = torch.stack([torch.randperm(math.prod(grid))[:3] for _ in range(2)])
    torch.testing.assert_close(layer(x, at, grid), layers.taken(expected, at), atol=2e-5, rtol=1e-5)
    plain = SelfAttention(16, 2, 8)
    plain.load_state_dict(layer.state_dict())
    assert (plain(x) - expected).abs().max() > 1e-2
    windows = MultiAxisAttention(16, 2, 8, size=7, rotary=True)  # one window
    windows.load_state_dict(layer.state_dict())
    torch.testing.assert_close(windows(x, grid=grid), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        windows(x, at, grid), layers.taken(expected, at), atol=2e-5, rtol=1e-5
    )


@torch.no_grad()
def test_what_is_known_in_one_place_is_known_in_all():
    """A pattern that is moved makes the same outputs, moved, where nothing else is seen."""
    layer, pattern = tiny.randomise(SelfAttention(16, 2, 8, rotary=True)), torch.randn(3, 16)
    angles = layers.turns((6, 6), 8, torch.device("cpu"))
    q, k, _ = layer.to_qkv(layer.norm(pattern)).unflatten(-1, (3, -1, 8)).unbind(1)

    def scores(places: list[int]) -> Tensor:
        turned = (layers.turned(t.transpose(0, 1), angles[places]) for t in (q, k))
        return next(turned) @ next(turned).mT

    here = scores([0, 1, 7])
    torch.testing.assert_close(scores([21, 22, 28]), here, atol=1e-5, rtol=1e-5)
    assert (scores([0, 1, 8]) - here).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, (8, 12)])
@pytest.mark.parametrize("changes", [{}, {"multi_axis": 4}, {"patch_size": 2}])
def test_branches_and_wanted_positions(grid: tuple[int, int] | None, changes: dict[str, Any]):
    network = tiny.transformer(seq_len=64, rotary=True, **changes)
    tokens = math.prod(grid or (8, 8))
    both = [replace(tiny.conditioning(tiny.text(), keep=k), grid=grid) for k in (True, False)]
    ids = tiny.ids(num_tokens=tokens)
    guided = network(ids, network.encode_context(*both))
    for hidden, branch in zip(guided, both, strict=True):
        [alone] = network(ids, network.encode_context(branch))
        torch.testing.assert_close(hidden, alone, atol=2e-5, rtol=1e-5)
    at = torch.stack([torch.randperm(tokens)[:5] for _ in range(2)])
    expected = torch.stack([layers.taken(hidden, at) for hidden in guided])
    some = network(ids, network.encode_context(*both), None, at)
    torch.testing.assert_close(some, expected, atol=2e-5, rtol=1e-5)


def test_a_cascade_draws_every_size_and_is_the_same_from_its_file(tmp_path: Path):
    vae = tiny.vae()
    base = tiny.maskgit(tiny.transformer(rotary=True), vae=vae)
    muse = Muse(base, tiny.superres(vae=vae, model=tiny.transformer(seq_len=64, rotary=True)))
    again = Muse.from_pretrained(muse.eval().save(tmp_path / "muse.safetensors"))
    assert again.fingerprint == muse.fingerprint
    assert again.superres is not None
    low: Any = again.superres.transformer.cond_encoder
    assert all(block.attn.rotary for block in low.blocks)
    for size in (32, (32, 48)):
        drawn = [
            m(text_embeds=tiny.text(), seeds=1, timesteps=3, image_size=size,
              return_pil_images=False)
            for m in (muse, again)
        ]  # fmt: skip
        assert torch.equal(*drawn)
    plain = Muse(tiny.maskgit(tiny.transformer(), vae=vae), tiny.superres(vae=vae)).eval()
    plain.load_state_dict(muse.state_dict())
    assert plain.fingerprint != muse.fingerprint


@torch.no_grad()
def test_low_resolution_tokens_stand_on_their_own_grid():
    """Of 2 x 8 and 8 x 2 tokens the second rows begin elsewhere."""
    encoder = tiny.superres(
        model=tiny.transformer(seq_len=64, rotary=True)
    ).transformer.cond_encoder
    for table in (encoder.embed.row, encoder.embed.column):
        table.zero_()
    ids = tiny.ids(num_tokens=16)
    wide, high = encoder(ids, (2, 8)), encoder(ids, (8, 2))
    assert (wide - high).abs().max() > 1e-3
    torch.testing.assert_close(encoder(ids), encoder(ids, (4, 4)))


def test_what_files_state():
    """Nothing where it is off, so that files and fingerprints stay; heads in pairs of pairs."""
    assert "rotary" not in tiny.transformer().config
    assert tiny.transformer(rotary=True).config["rotary"] is True
    with pytest.raises(ValueError, match="rotary needs a dim_head that is a multiple of 4, not 6"):
        tiny.transformer(rotary=True, dim_head=6)
