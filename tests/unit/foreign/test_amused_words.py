"""Prompt-to-prompt on aMUSEd's transformer: the laws of `words`, with random weights."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import MaskGit, Muse
from muse_maskgit_pytorch.foreign.amused import AmusedContext, AmusedTransformer, Attention
from muse_maskgit_pytorch.words import emphasise, replace_words
from tests import hub

OLD, NEW = ["a cat", "red fox"], ["a dog", "red big owl"]
OPTIONS: dict[str, Any] = dict(timesteps=4, cond_scale=3.0, seeds=[3, 8])


@pytest.fixture(scope="module")
def muse(tmp_path_factory: pytest.TempPathFactory) -> Muse:
    folder = tmp_path_factory.mktemp("amused") / "model"
    hub.make_amused(folder)
    return Muse.from_pretrained(folder)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The ids of every batch that is decoded."""
    seen: list[Tensor] = []
    decode = MaskGit.decode

    def record(self: MaskGit, ids: Tensor, image_size: Any = None) -> Tensor:
        seen.append(ids)
        return decode(self, ids, image_size)

    monkeypatch.setattr(MaskGit, "decode", record)
    return seen  # type: ignore[return-value]


def test_words_and_padding_have_their_places(muse: Muse):
    words = muse.base.transformer.text_reader().words("a cat")
    assert words == [
        ("", [0]), ("a", [1]), ("cat", [2, 3, 4]), ("", [5]), ("", [6, 7, 8, 9, 10, 11])
    ]  # fmt: skip


def test_which_values_are_scaled(muse: Muse, monkeypatch: pytest.MonkeyPatch):
    """Those of the word's tokens, with a text, in all attentions to it; nothing else."""
    seen: list[AmusedContext] = []
    forward = AmusedTransformer.forward

    def record(self: Any, ids: Tensor, context: AmusedContext, *more: Any, **named: Any) -> Tensor:
        seen.append(context)
        return forward(self, ids, context, *more, **named)

    monkeypatch.setattr(AmusedTransformer, "forward", record)
    muse("a cat", timesteps=1, seeds=1)
    emphasise(muse, "a cat", {"cat": -0.5}, timesteps=1, seeds=1)
    plain, changed = seen
    assert len(plain.text_values) == 2 * 4 + 2  # 4 blocks of two, and 2 layers
    for before, after in zip(plain.text_values, changed.text_values, strict=True):
        expected = before.clone()
        expected[0, :, :, 2:5] *= -0.5
        assert torch.equal(after, expected)
    rest = [changed.with_text_values(plain.text_values), plain]
    for ours, theirs in zip(*(context.parts for context in rest), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_maps_are_scaled_taken_over_and_added_to():
    """Against the softmax written out."""
    attention = Attention(16, 2, bias=True)
    x, text = torch.randn(3, 9, 16), torch.randn(3, 5, 16)
    keys, values = attention.constants(text)
    queries = attention.to_q(x).unflatten(-1, (2, 8)).transpose(1, 2)
    maps = (queries @ keys.transpose(-1, -2) / 8**0.5).softmax(-1)

    def by_hand(out: Tensor) -> Tensor:
        return attention.to_out[0](out.transpose(1, 2).flatten(2))

    factors = torch.tensor([1.0, 3, 0, -1, 0.5])
    scaled = attention(x, (keys, values * factors[:, None]))
    torch.testing.assert_close(scaled, by_hand((maps * factors) @ values), atol=1e-5, rtol=1e-4)
    sees, extra = torch.tensor([0, 0, 2]), torch.randn_like(values)
    taken = attention(x, (keys, values), sees, extra)
    expected = by_hand(maps[sees] @ values + maps @ extra)
    torch.testing.assert_close(taken, expected, atol=1e-5, rtol=1e-4)


def test_factors_of_1_are_plain_generation(muse: Muse, drawn: list[Tensor]):
    muse(OLD, **OPTIONS)
    emphasise(muse, OLD, [{"cat": 1.0}, {}], **OPTIONS)
    emphasise(muse, OLD, [{"cat": 30.0}, {}], **OPTIONS)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][1], drawn[2][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_replaced_words(muse: Muse, drawn: list[Tensor]):
    """The source is as if alone; without a share so is the target; a prompt is its own target."""
    for texts in (OLD, NEW):
        muse(texts, **OPTIONS)
    old, new = drawn
    for share in (0.0, 0.5, 1.0):
        replace_words(muse, OLD, NEW, cross_share=share, **OPTIONS)
    for both in drawn[2:]:
        assert torch.equal(both[:2], old)
    assert torch.equal(drawn[2][2:], new)
    assert not torch.equal(drawn[3][2:], new)
    assert not torch.equal(drawn[3][2:], drawn[4][2:])
    replace_words(muse, OLD, OLD, cross_share=1.0, negative_texts="blue", **OPTIONS)
    assert torch.equal(drawn[5][2:], drawn[5][:2])


def test_a_word_that_is_cut_off(muse: Muse):
    with pytest.raises(ValueError, match="has no 'dog'; its words are 'a', 'verylong', 'cat'"):
        emphasise(muse, "a verylong cat dog", {"dog": 2.0})
