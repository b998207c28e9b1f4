"""Multi-axis attention: who sees whom, at every size; what it costs; that it fits everywhere."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_maskgit_pytorch import Muse, TokenCritic, layers, linears
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.inference import precision
from muse_maskgit_pytorch.inference.precision import PLACES
from muse_maskgit_pytorch.layers import MultiAxisAttention, SelfAttention
from muse_maskgit_pytorch.structures import Conditioning
from muse_maskgit_pytorch.transformer import MaskGitTransformer

GRIDS = [(8, 8), (8, 12), (4, 4), (7, 10), (5, 9), (1, 6), (17, 3)]


def attention(size: int = 4, heads: int = 4) -> MultiAxisAttention:
    return tiny.randomise(MultiAxisAttention(16, heads, 8, size))


def sees(grid: tuple[int, int], size: int = 4) -> tuple[Tensor, Tensor]:
    """(N, N): whether a token sees another in the blocks, and on the grid; token by token."""

    def same(place: Any) -> Tensor:
        places = [(place(r, grid[0]), place(c, grid[1])) for r, c in cells]
        return torch.tensor([[a == b for b in places] for a in places])

    def windows(side: int) -> int:
        return math.ceil(side / size)

    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    blocks = same(lambda at, side: at // math.ceil(side / windows(side)))
    return blocks, same(lambda at, side: at % windows(side))


def masked_attention(layer: SelfAttention, x: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
    """Full attention in which each half of the heads has a mask."""
    q, k, v = (
        t.unflatten(-1, (-1, layer.dim_head)).transpose(1, 2)
        for t in layer.to_qkv(layer.norm(x)).chunk(3, -1)
    )
    scores = layer.q_norm(q) @ layer.k_norm(k).transpose(-1, -2) * layer.dim_head**-0.5
    mask = torch.stack(masks).repeat_interleave(q.shape[1] // 2, dim=0)
    out = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
    return layer.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_full_attention_under_two_masks(grid):
    layer, x = attention(), torch.randn(2, math.prod(grid), 16)
    expected = masked_attention(layer, x, sees(grid))
    torch.testing.assert_close(layer(x, grid=grid), expected, atol=2e-5, rtol=1e-5)
    at = torch.stack([torch.randperm(math.prod(grid))[:3] for _ in range(2)])
    torch.testing.assert_close(layer(x, at, grid), layers.taken(expected, at), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_equal_those_under_two_masks(grid):
    layer, x = attention(), torch.randn(1, math.prod(grid), 16, requires_grad=True)
    wanted = [x, *layer.parameters()]
    out = torch.randn(1, math.prod(grid), 16)
    found = torch.autograd.grad(layer(x, grid=grid), wanted, out)
    expected = torch.autograd.grad(masked_attention(layer, x, sees(grid)), wanted, out)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_a_window_as_large_as_the_image_is_full_attention():
    layer, x = attention(size=12), torch.randn(2, 96, 16)
    full = SelfAttention(16, 4, 8)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, grid=(8, 12)), full(x), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (7, 10)])
def test_a_token_reaches_its_windows_in_one_layer_and_all_in_two(grid):
    first, second = attention(), attention()
    blocks, spread = sees(grid)
    for token in range(0, math.prod(grid), 5):
        x = torch.randn(1, math.prod(grid), 16)
        other = x.clone()
        other[:, token] = torch.randn(16)

        def moved(a: Tensor, b: Tensor) -> Tensor:
            return (a != b)[0].any(-1)

        once = [first(t, grid=grid) for t in (x, other)]
        assert torch.equal(moved(*once), blocks[token] | spread[token])
        if all(side % 4 == 0 for side in grid):
            twice = [second(t + out, grid=grid) for t, out in zip((x, other), once, strict=True)]
            assert moved(*twice).all()


@torch.no_grad()
def test_scores_grow_with_the_number_of_tokens(monkeypatch):
    """Of 16 times as many tokens, 16 times the scores, not 256 times."""
    counts: list[int] = []
    attend = layers.attend

    def counting(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        counts.append(q.shape[:-1].numel() * k.shape[2])
        return attend(q, k, *rest)

    monkeypatch.setattr(layers, "attend", counting)
    layer = attention()
    for side in (8, 32):
        layer(torch.randn(1, side**2, 16))
    assert counts == [4 * 64 * 16, 4 * 1024 * 16]


# In the transformer


def model(kind: type[MaskGitTransformer] = MaskGitTransformer, **changes: Any) -> Any:
    """8 x 8 tokens in windows of up to 4 x 4."""
    return tiny.transformer(kind, **{"seq_len": 64, "multi_axis": 4, **changes})


def given(grid: tuple[int, int] | None, keep: bool = True) -> Conditioning:
    return replace(tiny.conditioning(tiny.text(), keep=keep), grid=grid)


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, (8, 12), (7, 10)])
def test_branches_past_and_wanted_positions(grid):
    network, tokens = model(self_cond=True), math.prod(grid or (8, 8))
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


COMPILED = """
import torch
from dataclasses import replace
from muse_maskgit_pytorch import testing as tiny

torch.set_grad_enabled(False)
network = tiny.transformer(seq_len=64, multi_axis=4, depth=1)
compiled = torch.compile(network, backend="eager", fullgraph=True)
for grid, tokens in ((None, 64), ((7, 10), 70)):
    context = network.encode_context(replace(tiny.conditioning(tiny.text()), grid=grid))
    ids = tiny.ids(num_tokens=tokens)
    torch.testing.assert_close(compiled(ids, context), network(ids, context))
"""


def test_compiles_whole():
    """In a process without the checks of shapes, which torch cannot trace."""
    ran = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("critic", [{}, {"self_token_critic": True}, {"token_critic": True}])
def test_a_cascade_draws_every_size_and_is_the_same_from_its_file(tmp_path: Path, critic: dict):
    if "token_critic" in critic:
        critic = {"token_critic": model(TokenCritic)}
    vae = tiny.vae()
    base = tiny.maskgit(tiny.transformer(multi_axis=2), vae=vae)
    muse = Muse(base, tiny.superres(vae=vae, model=model(), **critic)).eval()
    again = Muse.from_pretrained(muse.save(tmp_path / "muse.safetensors"))
    assert again.fingerprint == muse.fingerprint
    assert again.superres is not None
    assert again.superres.transformer.config["multi_axis"] == 4
    for size in (32, (32, 48), (24, 40)):
        drawn = [
            m(text_embeds=tiny.text(), seeds=1, timesteps=3, image_size=size, cond_scale=2.0,
              return_pil_images=False)
            for m in (muse, again)
        ]  # fmt: skip
        assert torch.equal(*drawn)
    other = Muse(base, tiny.superres(vae=vae, model=model(multi_axis=2))).eval()
    other.load_state_dict(muse.state_dict(), strict=not critic)
    assert other.fingerprint != muse.fingerprint


def test_full_attention_states_nothing():
    """So files and fingerprints are those of releases that had nothing else."""
    assert "multi_axis" not in tiny.transformer().config
    assert "multi_axis" not in tiny.transformer(multi_axis=None).config


@torch.no_grad()
@pytest.mark.parametrize("kind, most", [("float32", 2e-5), ("bfloat16", 0.02), ("int8", 0.07)])
def test_copies_in_other_precisions(kind: Any, most: float, monkeypatch):
    costs = {f"{name}, {place}": 9.0 for name in ("packed", "bfloat16") for place in PLACES}
    monkeypatch.setattr(precision, "products", lambda device: costs)
    monkeypatch.setattr(linears, "available", lambda device: ["bfloat16", "int8"])
    network = model(dim=128, dim_head=16).eval()
    ids, context = tiny.ids(num_tokens=70), network.encode_context(given((7, 10)))
    fast = precision.prepared(network, kind)
    assert isinstance(fast.blocks[0].attn, MultiAxisAttention)
    assert not isinstance(fast.blocks[0].attn.to_qkv, torch.nn.Linear)
    exact = network(ids, context)
    assert (fast(ids, context) - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("changes", [{"multi_axis": 4}, {"patch_size": 2}, {"rotary": True}])
def test_learns(changes: dict):
    network = MaskGitTransformer(
        num_tokens=30, seq_len=64, dim=32, depth=2, dim_head=8, heads=4, text_embed_dim=12,
        **changes,
    )  # fmt: skip
    ids, targets = tiny.ids(num_tokens=64, codes=31), tiny.ids(num_tokens=64, codes=30, seed=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        [hidden] = network(ids, network.encode_context(given(None)))
        loss = F.cross_entropy(network.to_logits(hidden).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(p.grad.abs().max() > 0 for p in network.blocks.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(multi_axis=1), "multi_axis must be at least 2, not 1"),
        (dict(multi_axis=2.5), "multi_axis must be a whole number, not 2.5"),
        (dict(heads=3), "heads 3 is odd: multi_axis halves the heads, so make it 4"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
