"""Layers of a transformer's own for its texts: that they read order, and what they leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import Conditioning, MaskGit, MaskGitTransformer, TextEmbeds
from muse_maskgit_pytorch import testing as tiny


def model(**changes: Any) -> Any:
    return tiny.transformer(text_depth=2, **changes)


@torch.no_grad()
def hidden(network: Any, text: TextEmbeds) -> Tensor:
    context = network.encode_context(Conditioning(text, None, text.mask.any(1)))
    return network(tiny.ids(len(text.embeds)), context)[0]


def whole(text: TextEmbeds) -> TextEmbeds:
    return TextEmbeds(text.embeds, torch.ones_like(text.mask))


def test_only_they_know_which_word_comes_first():
    text = whole(tiny.text())
    turned = TextEmbeds(text.embeds.flip(1), text.mask)
    for network, knows in ((model(), True), (tiny.transformer(), False)):
        apart = (hidden(network, text) - hidden(network, turned)).abs().max()
        assert (apart > 1e-3) == knows


def test_at_first_they_change_nothing():
    deep = MaskGitTransformer(**tiny.transformer().config, text_depth=2)
    plain = MaskGitTransformer(**tiny.transformer().config)
    missing = deep.load_state_dict(tiny.randomise(plain).state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("text_blocks.") for name in missing)
    assert torch.equal(hidden(deep, tiny.text()), hidden(plain, tiny.text()))


def test_padding_is_not_seen():
    network, text = model(), tiny.text(3)
    states = hidden(network, text)
    other = torch.where(text.mask[..., None], text.embeds, 9.0)
    torch.testing.assert_close(hidden(network, TextEmbeds(other, text.mask)), states)
    length = int(text.mask[2].sum())
    alone = TextEmbeds(text.embeds[2:, :length], text.mask[2:, :length])
    ids = tiny.ids(3)[2:]
    with torch.no_grad():
        context = network.encode_context(Conditioning(alone, None, torch.tensor([True])))
        torch.testing.assert_close(network(ids, context)[0], states[2:])


def test_a_text_without_tokens_is_no_text():
    network, text = model(), tiny.text()
    none = TextEmbeds(text.embeds, torch.zeros_like(text.mask))
    states = hidden(network, none)
    assert states.isfinite().all()
    without = network.encode_context(Conditioning(None, None, torch.tensor([False, False])))
    torch.testing.assert_close(states, network(tiny.ids(), without)[0].detach())


def test_every_weight_learns():
    base = tiny.maskgit(model())
    base(tiny.images(), text_embeds=tiny.text()).backward()
    weights = dict(base.transformer.text_blocks.named_parameters())
    assert len(weights) == 16
    assert all(weight.grad.abs().max() > 0 for weight in weights.values())


def test_a_model_draws_the_same_from_its_file_and_by_the_fast_path(tmp_path: Path):
    base = tiny.maskgit(model())
    again = MaskGit.from_pretrained(base.save(tmp_path / "base.safetensors"))
    assert again.transformer.config["text_depth"] == 2
    assert "text_depth" not in tiny.transformer().config
    again.precision = "reference"
    options: dict[str, Any] = dict(text_embeds=tiny.text(), seeds=1, timesteps=3, cond_scale=2.0)
    assert torch.equal(again.generate_ids(**options), base.generate_ids(**options))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_depth": -1}, "text_depth must be at least 0, not -1"),
        ({"text_depth": 1, "dim_head": 6}, "text_depth needs a dim_head that is a multiple of 4"),
    ],
)
def test_depths_that_are_none(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny.transformer(**changes)
