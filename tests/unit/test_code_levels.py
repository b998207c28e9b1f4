"""Codes with digits: what they share, that every path sees it, and that files have it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muse_maskgit_pytorch import MaskGit
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cross_entropy import cross_entropy
from muse_maskgit_pytorch.inference import precision
from muse_maskgit_pytorch.layers import CodeHead
from muse_maskgit_pytorch.quantizer import FSQ as FSQ

LEVELS = [5, 4, 3]  # of the tiny tokenizer's 60 codes


def model(**changes: Any) -> Any:
    return tiny.transformer(code_levels=LEVELS, **changes)


def head() -> CodeHead:
    return tiny.randomise(CodeHead(8, LEVELS))


def digits(code: int) -> list[int]:
    return [code % 5, code // 5 % 4, code // 20]


@torch.no_grad()
def test_a_row_is_its_own_and_what_its_digits_add():
    layer, x = head(), torch.randn(3, 8)
    parts = layer.digits.split(LEVELS)
    for code in range(60):
        shared = sum(part[digit] for part, digit in zip(parts, digits(code), strict=True))
        torch.testing.assert_close(layer.whole[code], layer.weight[code] + shared)
    torch.testing.assert_close(layer(x), x @ layer.whole.T)
    torch.testing.assert_close(layer.plain()(x), layer(x))


@torch.no_grad()
def test_so_is_an_embedding_but_the_masks():
    network = model()
    embed = network.embed
    places = (embed.row + embed.column).flatten(0, 1)
    found = embed(torch.arange(64).clamp(max=60).view(4, 16)) - places
    parts = embed.digits.split(LEVELS)
    for code, vector in enumerate(found.flatten(0, 1)[:60]):
        shared = sum(part[digit] for part, digit in zip(parts, digits(code), strict=True))
        torch.testing.assert_close(vector, embed.token.weight[code] + shared, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[-1, -1], embed.token.weight[60], atol=1e-6, rtol=1e-5)


def test_the_digits_are_those_of_fsq():
    codes = FSQ(LEVELS).codes_of(torch.arange(60)[None])[0]
    for dimension in range(3):
        values = [code[dimension] for code in codes.tolist()]
        numbers = [digits(code)[dimension] for code in range(60)]
        assert len(set(zip(values, numbers, strict=True))) == len(set(values)) == LEVELS[dimension]


def test_the_loss_in_chunks_and_its_gradients():
    layer = head()
    hidden, labels = torch.randn(9, 8, requires_grad=True), torch.arange(9) * 6
    given = [hidden, layer.weight, layer.digits]
    found = cross_entropy(layer, hidden, labels, 0.1)
    wanted = F.cross_entropy(layer(hidden), labels, label_smoothing=0.1)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(loss, given) for loss in (found, wanted)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-4)
    assert all(slope.abs().max() > 0 for slope in slopes[0])


def test_a_model_draws_the_same_from_its_file_and_by_the_fast_path(tmp_path: Path):
    base = tiny.maskgit(model())
    again = MaskGit.from_pretrained(base.save(tmp_path / "base.safetensors"))
    assert again.transformer.config["code_levels"] == LEVELS
    again.precision = "reference"
    options: dict[str, Any] = dict(text_embeds=tiny.text(), seeds=1, timesteps=3, cond_scale=2.0)
    assert torch.equal(again.generate_ids(**options), base.generate_ids(**options))
    with torch.no_grad():
        again.transformer.to_logits.digits.zero_()
    assert not torch.equal(again.generate_ids(**options), base.generate_ids(**options))


@torch.no_grad()
def test_a_wide_models_fast_copy_has_one_layer():
    network, x = model(dim=128).eval(), torch.randn(3, 128)
    fast = precision.prepared(network, "float32")
    assert not isinstance(fast.to_logits, CodeHead)
    torch.testing.assert_close(fast.to_logits(x), network.to_logits(x), atol=1e-4, rtol=1e-4)
    assert "code_levels" not in tiny.transformer().config
    assert type(tiny.transformer().to_logits) is nn.Linear


@pytest.mark.parametrize(
    "levels, message",
    [
        ([5, 4], r"code_levels \[5, 4\] make 20 codes, and num_tokens is 60"),
        ([], r"code_levels \[\] make 1 codes, and num_tokens is 60"),
        ([60, 0], r"code_levels\[1\] must be at least 1, not 0"),
        (60, "code_levels must be a list, not 60"),
        ("60", "code_levels must be a list, not '60'"),
    ],
)
def test_levels_that_are_none(levels: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tiny.transformer(code_levels=levels)
