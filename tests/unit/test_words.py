"""Prompt-to-prompt: the laws of scaled and replaced words, and the attention step by step."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muse_maskgit_pytorch import MaskGit, Muse, SampleOptions
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import record_of
from muse_maskgit_pytorch.layers import CrossAttention
from muse_maskgit_pytorch.sampling import SampleState
from muse_maskgit_pytorch.transformer import Context
from muse_maskgit_pytorch.words import (
    Emphasis,
    SourceMaps,
    _alignment,
    _factors,
    emphasise,
    replace_words,
)

BASE = SampleOptions(timesteps=6, cond_scale=2.5, choice_temperature=1.0)
SUPERRES = SampleOptions(timesteps=3, cond_scale=1.5, choice_temperature=1.0)
OPTIONS: dict[str, Any] = dict(base_options=BASE, superres_options=SUPERRES)
SEEDS = [3, 8]
OLD = ["a red car", "two cats in the rain"]
NEW = ["a blue car", "two dogs in the warm rain"]


def make_muse(t5: str, **changes) -> Muse:
    """Both stages read a tiny T5; the text sways their random weights strongly."""

    def reader(**sizes):
        return tiny.transformer(t5_name=t5, text_embed_dim=16, **sizes)

    vae = tiny.vae()
    base = tiny.maskgit(reader(), vae=vae, **changes)
    superres = tiny.superres(model=reader(seq_len=64), vae=vae)
    for stage in (base, superres):
        for cross in attentions(stage):
            cross.to_out.weight.data *= 3
    return Muse(base, superres).eval()


@pytest.fixture(scope="module")
def muse(t5):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_muse(t5)


@pytest.fixture
def drawn(monkeypatch):
    """The ids of every stage that is decoded."""
    seen = []
    decode = MaskGit.decode

    def record(self, ids, image_size=None):
        seen.append(ids)
        return decode(self, ids, image_size)

    monkeypatch.setattr(MaskGit, "decode", record)
    return seen


def attentions(model) -> list[CrossAttention]:
    return [module for module in model.modules() if isinstance(module, CrossAttention)]


def context_of(keys_values, mask, branches: int = 2) -> Context:
    """Rows of all branches, one after another, as one layer's context."""

    def split(x):
        return x.unflatten(0, (branches, -1))

    return Context([tuple(map(split, keys_values))], split(mask))


def state_at(*steps: int) -> SampleState:
    nothing = torch.zeros(len(steps), 0)
    return SampleState(nothing.long(), nothing.bool(), torch.tensor(steps), nothing, nothing)


# Emphasis


def test_factors_of_1_are_plain_generation(muse, drawn):
    plain = muse(OLD, seeds=SEEDS, **OPTIONS)
    same = emphasise(muse, OLD, [{"red": 1.0}, {"cats": 1.0, "rain": 1}], seeds=SEEDS, **OPTIONS)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert [i.tobytes() for i in plain] == [i.tobytes() for i in same]
    assert '"edit": null' in str(record_of(plain[0]))
    assert '"edit": {"kind": "words", "weights": [{"red": 1.0}' in str(record_of(same[0]))


def test_a_factor_moves_its_row_alone(muse, drawn):
    muse(OLD, seeds=SEEDS, **OPTIONS)
    emphasise(muse, OLD, [{}, {"rain": 4}], seeds=SEEDS, **OPTIONS)
    for plain, changed in (drawn[::2], drawn[1::2]):
        assert torch.equal(plain[0], changed[0])
        assert not torch.equal(plain[1], changed[1])


@pytest.mark.parametrize("negative", [None, "a very long negative prompt, longer than both"])
def test_which_values_are_scaled(muse, monkeypatch, negative):
    """Those of the word's tokens, in the conditional rows, in both stages; no others."""
    seen: list = []

    def record(self, x, keys_values, mask):
        seen.append((keys_values[1], mask))
        return plain_forward(self, x, keys_values, mask)

    plain_forward = CrossAttention.forward
    monkeypatch.setattr(CrossAttention, "forward", record)
    # the base is given, so that the super-resolution reads the same low resolution both times
    given_base: dict[str, Any] = dict(
        canvases={"base": tiny.ids(1)}, negative_texts=negative, seeds=3, **OPTIONS
    )
    muse.draw(muse.request(["a red car"], **given_base))
    plain = list(seen)
    seen.clear()
    emphasise(muse, ["a red car"], {"red": -0.5}, **given_base)
    assert len(plain) == len(seen) > 0
    for (values, mask), (scaled, _) in zip(plain, seen, strict=True):
        expected = values.clone()
        first = 1 + 16  # null key, 4 x 4 tokens of low resolution
        # tokens: ▁ a ▁ r e d ▁ c a r </s>
        expected[0, :, first + 2 : first + 6] *= -0.5
        assert torch.equal(scaled, expected)
        assert mask[0, first + 2 : first + 6].all()


def test_scaled_values_are_a_scaled_map():
    """Against the softmax written out; the map is not normalised again."""
    cross = tiny.randomise(CrossAttention(16, 2, 8))
    x, text = torch.randn(4, 9, 16), torch.randn(4, 5, 16)
    keys, values = cross.keys_values(text)
    mask = torch.rand(4, 6) < 0.7
    mask[:, 0] = True
    factors = torch.tensor([[1.0, 3.0, 0.0], [0.5, 1.0, -2.0]])
    context = context_of((keys, values), mask)
    scaled = Emphasis(factors).changed(context, state_at(0, 0))

    columns = torch.ones(4, 1, 1, 6)
    columns[:2, 0, 0, 1:4] = factors
    expected = by_hand(cross, maps(cross, x, keys, mask) * columns, values)
    torch.testing.assert_close(scaled.attend(0, cross, x), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(context.keys_values[0][1].flatten(0, 1), values)  # left as they were


def maps(cross, x, keys, mask):
    q = cross.to_q(cross.norm(x)).unflatten(-1, (-1, 8)).transpose(1, 2)
    scores = cross.q_norm(q) @ keys.transpose(-1, -2) / 8**0.5
    return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


def by_hand(cross, attention, values):
    return cross.to_out((attention @ values).transpose(1, 2).flatten(2))


WORDS = [("Red", [0]), ("car", [1, 2]), (",", [3]), ("red", [4]), ("Red-hot", [5]), ("", [6])]


@pytest.mark.parametrize(
    "weights, expected",
    [
        ({}, [1, 1, 1, 1, 1, 1, 1]),
        ({"RED": 2}, [2, 1, 1, 1, 2, 1, 1]),  # wherever it stands, in any case
        ({"red car": 3}, [3, 3, 3, 1, 1, 1, 1]),
        ({"red-hot": 0}, [1, 1, 1, 1, 1, 0, 1]),
        ({"car": -1, "red car": 2}, [2, -2, -2, 1, 1, 1, 1]),
        ({"car,": 2}, [1, 2, 2, 2, 1, 1, 1]),
    ],
)
def test_factors_of_tokens(weights, expected):
    assert _factors(WORDS, weights, "Red car, red Red-hot").tolist() == expected


@pytest.mark.parametrize("word", ["blue", "hot", "car red", "", " "])
def test_a_word_that_is_not_there(muse, word):
    message = rf"weights: 'a red car' has no '{word}'; its words are 'a', 'red', 'car'"
    with pytest.raises(ValueError, match=message):
        emphasise(muse, "a red car", {word: 2.0})
    with pytest.raises(ValueError, match=message):
        replace_words(muse, f"a {word} car", "a red car", weights={word: 2.0})


def test_weights_that_do_not_fit(muse):
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of 'red' must be a finite number"):
            emphasise(muse, "a red car", {"red": factor})
    with pytest.raises(ValueError, match="weights has 1 values for 2 images"):
        emphasise(muse, OLD, [{"red": 2}])
    with pytest.raises(ValueError, match="'two cats in the rain' has no 'red'"):
        emphasise(muse, OLD, {"red": 2})


# Replacement


def test_the_source_is_drawn_as_if_alone(muse, drawn):
    muse(OLD, seeds=SEEDS, **OPTIONS)
    muse(NEW, seeds=SEEDS, **OPTIONS)
    weights = [{"blue": 3}, {}]
    replace_words(muse, OLD, NEW, cross_share=0.5, weights=weights, seeds=SEEDS, **OPTIONS)
    for stage in (0, 1):
        assert torch.equal(drawn[4 + stage][:2], drawn[stage])
        assert not torch.equal(drawn[4 + stage][2:], drawn[2 + stage])


def test_share_0_is_plain_generation_of_both(muse, drawn):
    muse(OLD, seeds=SEEDS, **OPTIONS)
    muse(NEW, seeds=SEEDS, **OPTIONS)
    replace_words(muse, OLD, NEW, cross_share=0, seeds=SEEDS, **OPTIONS)
    for stage in (0, 1):
        assert torch.equal(drawn[4 + stage], torch.cat([drawn[stage], drawn[2 + stage]]))


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("critic", [{}, {"self_token_critic": True}, {"token_critic": True}])
def test_the_same_prompt_gives_the_same_picture(t5, drawn, share, critic):
    if "token_critic" in critic:
        critic = {"token_critic": tiny.critic(t5_name=t5, text_embed_dim=16)}
    muse = make_muse(t5, **critic)
    replace_words(muse, OLD, OLD, cross_share=share, seeds=SEEDS, **OPTIONS)
    for ids in drawn:
        assert torch.equal(ids[:2], ids[2:])


@pytest.mark.parametrize(
    "share, first, second",
    [(0, 0, 0), (0.01, 1, 1), (0.25, 2, 1), (0.26, 2, 2), (0.5, 3, 2), (1, 6, 4)],
)
def test_how_many_steps_the_share_takes(muse, monkeypatch, share, first, second):
    """Each row by its own steps: 6 and 4."""
    taken = torch.zeros(2)
    forward = CrossAttention.forward

    def count(self, x, keys_values, mask):
        keys = keys_values[0]
        if len(keys) == 4 and keys.shape[2] < 17:  # of the base: no keys where no text is seen
            taken.add_(torch.stack([(keys[2 + i] == keys[i]).all() for i in (0, 1)]))
        return forward(self, x, keys_values, mask)

    monkeypatch.setattr(CrossAttention, "forward", count)
    base = BASE.replace(timesteps=[6, 4], guidance_schedule="constant")
    replace_words(muse, ["a red car"] * 2, ["a red bus"] * 2, cross_share=share, base_options=base)
    assert (taken / 2).tolist() == [first, second]  # two layers


def test_the_maps_are_the_sources():
    """Against the softmax written out: replaced, left out, added words; other rows untouched."""
    cross = tiny.randomise(CrossAttention(16, 2, 8))
    x, text = torch.randn(8, 9, 16), torch.randn(8, 4, 16)  # 2 pairs, and the unguided rows
    keys_values = keys, values = cross.keys_values(text)
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[0, 4] = mask[2, 4] = False  # the first pair's texts are shorter
    align = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    other = torch.eye(4).roll(1, 1)[:, :4] * torch.tensor([1.0, 1, 1, 0])
    added = torch.tensor([0.0, 0.0, 0.0, 1.0])
    source_maps = SourceMaps(torch.ones(4, 4), [(align, torch.zeros(3)), (other, added)], [2, 1])
    context = context_of(keys_values, mask)
    own = maps(cross, x, keys, mask)
    plain = by_hand(cross, own, values)

    moved = values[2:4].clone()
    moved[0, :, 1:4] = align @ values[2, :, 1:4]
    moved[1, :, 1:5] = other @ values[3, :, 1:5]
    expected = by_hand(cross, own[:2], moved)  # the maps of the sources
    new = torch.zeros(1, 1, 1, 5)
    new[..., 4] = 1  # the fourth token of the second target is added: by its own map
    expected[1:] += by_hand(cross, own[3:4] * new, values[3:4])

    with torch.no_grad():
        for done, taken in ((0, [0, 1]), (1, [0]), (2, [])):
            changed = source_maps.changed(context, state_at(*[done] * 4))
            wanted = plain.clone()
            for pair in taken:
                wanted[2 + pair] = expected[pair]
            out = changed.attend(0, cross, x)
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
            alone = changed.branches(1).attend(0, cross, x[:4])  # a step without guidance
            torch.testing.assert_close(alone, wanted[:4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "old, new, align, added",
    [
        # the place in the target that each token of the source passes its attention to
        ("S a red car E", "S a blue car E", [[0], [1], [2], [3], [4]], []),  # replaced
        ("S a red car E", "S a car E", [[0], [1], [], [2], [3]], []),  # left out
        ("S car E", "S red car E", [[0], [2], [3]], [1]),  # added
        ("S car E", "S big bus E", [[0], [1, 2], [3]], []),  # the mean of both
        ("S big bus E", "S car E", [[0], [1], [1], [2]], []),
        ("S Car E", "S car E", [[0], [1], [2]], []),
    ],
)
def test_alignment(old, new, align, added):
    def words(text):
        return [(word.strip("SE"), [i]) for i, word in enumerate(text.split())]

    found, own = _alignment(words(old), words(new))
    assert [row.nonzero().flatten().tolist() for row in found] == align
    assert all(row[row > 0].eq(1 / (row > 0).sum()).all() for row in found)
    assert own.nonzero().flatten().tolist() == added


def test_words_of_several_tokens():
    old = [("dark", [0, 1]), ("red", [2]), ("hat", [3])]
    new = [("light", [0]), ("green", [1, 2]), ("hat", [3, 4]), ("cut", [])]
    align, added = _alignment(old, new)
    assert align.tolist() == [
        [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0.5, 0.5],
    ]  # fmt: skip
    assert not added.any()


SENTENCES = st.lists(st.sampled_from(["red", "car", "a", ",", ""]), min_size=1, max_size=8)


@given(SENTENCES, SENTENCES)
def test_attention_is_passed_on_whole_or_not_at_all(old, new):
    words = [[(word, [i]) for i, word in enumerate(text)] for text in (old, new)]
    align, added = _alignment(*words)
    assert set(align.sum(1).tolist()) <= {0.0, 1.0}
    assert not (align.any(dim=0) & added.bool()).any()
    if old == new:
        assert torch.equal(align, torch.eye(len(old)))
    assert bool((align.any(dim=0) | added.bool()).all())  # every new word acts


def test_negatives_and_options_hold_for_both(muse, drawn):
    rows = OPTIONS | {
        "base_options": BASE.replace(temperature=[0.5, 1.5], cond_scale=[1.0, 4.0]),
    }
    negatives = ["rain", "a very long negative prompt"]
    muse(OLD, negative_texts=negatives, seeds=SEEDS, **rows)
    replace_words(muse, OLD, OLD, negative_texts=negatives, seeds=SEEDS, **rows)
    for stage in (0, 1):
        assert torch.equal(drawn[2 + stage], drawn[stage].repeat(2, 1))
    replace_words(muse, OLD, OLD, negative_texts="rain", seeds=SEEDS, **rows)
    assert not torch.equal(drawn[4][1], drawn[2][1])


def test_random_seeds_are_those_of_the_pair(muse, drawn):
    replace_words(muse, "a car", "a car", base_options=BASE)
    assert torch.equal(drawn[0][0], drawn[0][1])


def test_a_base_alone_and_another_size(muse, drawn):
    base = Muse(muse.base)
    (pair,) = replace_words(base, "a car", "a bus", image_size=(16, 24), seeds=1)
    assert [image.size for image in pair] == [(24, 16), (24, 16)]
    (image,) = emphasise(muse, "a car", {"car": 2}, image_size=(48, 32), seeds=1)
    assert image.size == (32, 48)


def test_what_does_not_fit(muse):
    with pytest.raises(ValueError, match="2 source prompts and 1 targets: give pairs"):
        replace_words(muse, OLD, NEW[0])
    with pytest.raises(ValueError, match="texts is empty"):
        replace_words(muse, [], [])
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="cross_share must be"):
            replace_words(muse, OLD, NEW, cross_share=share)
    with pytest.raises(ValueError, match="seeds has 3 values for 2 images"):
        replace_words(muse, OLD, NEW, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="3 negative_texts for 2 texts"):
        replace_words(muse, OLD, NEW, negative_texts=["a", "b", "c"])


def test_other_pictures_may_be_drawn_meanwhile(muse):
    """Nothing of the model is changed, not even while an edit is drawn."""
    plain = muse("two cats", seeds=8, **OPTIONS)
    seen = []

    def draw(step):
        if not seen:
            seen.append(muse("two cats", seeds=8, **OPTIONS))

    emphasise(muse, "a red car", {"red": 4}, seeds=3, callback=draw, **OPTIONS)
    assert seen[0][0].tobytes() == plain[0].tobytes()


LONG = "a red car and a blue bus in the rain by the sea"  # far more than 12 tokens


@pytest.mark.filterwarnings("ignore:1 caption", "ignore:2 caption")
def test_words_of_a_prompt_longer_than_the_encoder_reads(t5, drawn):
    """All of it reaches the model, its last word can be scaled, and the laws hold."""
    base = Muse(tiny.maskgit(tiny.transformer(t5_name=t5, text_embed_dim=16, max_text_len=12)))
    options = BASE.replace(timesteps=12, cond_scale=6.0)
    for texts in ([LONG], [LONG[:-3] + "bay"]):
        base(texts, seeds=1, base_options=options)
    emphasise(base, LONG, {"sea": 5}, seeds=1, base_options=options)
    emphasise(base, LONG, {"sea": 1}, seeds=1, base_options=options)
    replace_words(base, LONG, LONG, cross_share=1, seeds=1, base_options=options)
    plain, other, scaled, same, pair = drawn
    assert not torch.equal(plain, other)
    assert not torch.equal(plain, scaled)
    assert torch.equal(plain, same)
    assert torch.equal(plain.repeat(2, 1), pair)
