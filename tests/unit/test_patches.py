"""Transformers that compute squares of tokens as one position."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import MaskGitTransformer, Muse, TokenCritic, layers
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.structures import Conditioning
from muse_maskgit_pytorch.transformer import Patches


def model(kind: type[MaskGitTransformer] = MaskGitTransformer, **changes: Any) -> Any:
    """8 x 8 tokens as 4 x 4 positions."""
    return tiny.transformer(kind, **{"seq_len": 64, "patch_size": 2, **changes})


def given(grid: tuple[int, int] | None, keep: bool = True) -> Conditioning:
    return replace(tiny.conditioning(tiny.text(), keep=keep), grid=grid)


@torch.no_grad()
def test_a_position_is_a_square_of_the_picture():
    patches, grid = Patches(1, 2), (4, 6)
    x = torch.arange(24.0).view(1, 24, 1)
    patches.fold.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    found = patches.positions(x, grid).view(2, 3)
    pixels = x.view(4, 6)
    for row in range(2):
        for column in range(3):
            square = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            assert found[row, column] == square @ torch.tensor([1.0, 10.0, 100.0, 1000.0])
    # and back: each corner of a square is its own multiple of the position, beside the token
    patches.unfold.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    states = torch.arange(1.0, 7.0).view(1, 6, 1)
    out = (patches.tokens(states, x, grid) - x).view(4, 6)
    corners = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(out, torch.kron(states.view(2, 3), corners))


@torch.no_grad()
def test_blocks_compute_a_quarter_of_the_positions():
    network, counts = model(), []
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, out: counts.append(out.shape[1]))
    ids = tiny.ids(num_tokens=64)
    assert network(ids, network.encode_context(given(None))).shape == (1, 2, 64, 16)
    assert counts == [16, 16]


@torch.no_grad()
def test_every_token_reaches_every_other():
    network = model().eval()
    context = network.encode_context(given(None))
    ids = tiny.ids(num_tokens=64)
    before = network(ids, context)
    for place in (0, 9, 63):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 60
        moved = (network(changed, context) - before).abs().amax(-1)
        assert (moved > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, (8, 12), (6, 10)])
@pytest.mark.parametrize("multi_axis", [None, 2])
def test_branches_past_and_wanted_positions(grid: tuple[int, int] | None, multi_axis: int | None):
    network = model(self_cond=True, multi_axis=multi_axis)
    tokens = math.prod(grid or (8, 8))
    branches = given(grid), given(grid, keep=False)
    ids, past = tiny.ids(num_tokens=tokens), torch.randn(2, 2, tokens, 16)
    guided = network(ids, network.encode_context(*branches), past)
    for hidden, branch, before in zip(guided, branches, past, strict=True):
        [alone] = network(ids, network.encode_context(branch), before[None])
        torch.testing.assert_close(hidden, alone, atol=2e-5, rtol=1e-5)
    at = torch.stack([torch.randperm(tokens)[:5] for _ in range(2)])
    some = network(ids, network.encode_context(*branches), past, at)
    expected = torch.stack([layers.taken(hidden, at) for hidden in guided])
    torch.testing.assert_close(some, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", [{}, {"self_token_critic": True}, {"token_critic": True}])
def test_a_cascade_draws_and_is_the_same_from_its_file(tmp_path: Path, critic: dict):
    if "token_critic" in critic:
        critic = {"token_critic": model(TokenCritic)}
    vae = tiny.vae()
    base = tiny.maskgit(tiny.transformer(patch_size=2), vae=vae)
    muse = Muse(base, tiny.superres(vae=vae, model=model(), **critic)).eval()
    again = Muse.from_pretrained(muse.save(tmp_path / "muse.safetensors"))
    assert again.fingerprint == muse.fingerprint
    for size in (32, (32, 48)):
        drawn = [
            m(text_embeds=tiny.text(), seeds=1, timesteps=3, image_size=size, cond_scale=2.0,
              return_pil_images=False)
            for m in (muse, again)
        ]  # fmt: skip
        assert torch.equal(*drawn)


def test_sizes_are_whole_squares():
    base = tiny.maskgit(tiny.transformer(patch_size=2))  # 4 pixels a token
    with pytest.raises(ValueError, match="20 is not a positive multiple of 8"):
        base.geometry.grid(20)
    plain = tiny.maskgit(tiny.transformer(), token_critic=tiny.critic(patch_size=2))
    assert plain.geometry.side_step == 2
    superres = tiny.superres(model=model())
    assert superres.geometry.grid((32, 48)) == (8, 12)
    with pytest.raises(ValueError, match="36 is not a positive multiple of 8"):
        superres.geometry.grid(36)


def test_without_patches_nothing_is_stated():
    """So files and fingerprints are those of releases that had nothing else."""
    assert "patch_size" not in tiny.transformer().config
    assert "patch_size" not in tiny.transformer(patch_size=1).config
    assert not any("patches" in name for name in tiny.transformer().state_dict())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(patch_size=0), "patch_size must be at least 1, not 0"),
        (dict(patch_size=1.5), "patch_size must be a whole number, not 1.5"),
        (
            dict(patch_size=3),
            r"a side of 8 tokens \(seq_len 64\) is not a multiple of patch_size 3",
        ),
    ],
)
def test_bad_arguments(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        model(**changes)
