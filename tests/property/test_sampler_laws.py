"""What holds for the sampler with any numbers."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_maskgit_pytorch import SampleOptions
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.masking import mask_ratio
from muse_maskgit_pytorch.sampling import (
    Denoiser,
    choose_tokens,
    make_plan,
    masked_counts,
    sample_tokens,
)
from muse_maskgit_pytorch.sampling.policies import halton_order, rolled_halton
from muse_maskgit_pytorch.transformer import Context

named = st.sampled_from(["cosine", "arccos", "linear", "square"])
shares = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=9)
schedules = named | shares.map(lambda table: sorted(table, reverse=True))


@given(num_masked=st.integers(0, 5000), timesteps=st.integers(1, 300), schedule=schedules)
def test_masked_counts(num_masked, timesteps, schedule):
    counts = masked_counts(num_masked, timesteps, schedule)
    assert len(counts) == timesteps
    assert counts[-1] == 0
    before = num_masked
    for i, count in enumerate(counts, 1):
        assert count < before or before == count == 0  # at least one token in every step
        if timesteps <= num_masked and i < timesteps:
            assert count > 0  # and none left for the last steps only when tokens have run out
        before = count


@given(num_masked=st.integers(1000, 5000), timesteps=st.integers(1, 30), schedule=named)
def test_masked_counts_follow_the_schedule(num_masked, timesteps, schedule):
    counts = torch.tensor(masked_counts(num_masked, timesteps, schedule), dtype=torch.float64)
    u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    # the first steps of a flat schedule decide at least one token: at most a few more than due
    assert (counts - mask_ratio(u, schedule) * num_masked).abs().max() <= max(2, timesteps / 4)


torch.manual_seed(0)
MODEL = tiny.transformer(num_tokens=20, seq_len=9, depth=1)
CRITIC = tiny.critic(num_tokens=20, seq_len=9, depth=1)
N, MASK = 9, MODEL.mask_id


def sample(text, canvas, options, seen=None, critic=None):
    kept = [tiny.conditioning(text, keep=keep) for keep in (True, False)]
    contexts = [
        m and Context.stack([m.encode_context(branch) for branch in kept]) for m in (MODEL, critic)
    ]
    return sample_tokens(Denoiser(MODEL, contexts[0], critic, contexts[1]), canvas, options, seen)


ROW = dict(
    timesteps=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    temperature_end=st.sampled_from([0.0, 1.0]),
    choice_temperature=st.sampled_from([0.0, 1.0, 4.5]),
    cond_scale=st.sampled_from([0.0, 1.0, 3.0, 7.5]),
    remask=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 20]),
    top_p=st.sampled_from([0.0, 0.6, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    seeds=st.integers(0, 2**40),
    canvas=st.lists(st.integers(0, MASK), min_size=N, max_size=N),
)
BATCH = dict(
    noise_schedule=schedules,
    guidance_schedule=st.sampled_from(["linear", "constant", "cosine", [0, 0, 2, 1]]),
    policy=st.sampled_from([None, "confidence", "margin", "entropy", "halton", "random"]),
)


@settings(max_examples=60)
@given(
    rows=st.lists(st.fixed_dictionaries(ROW), min_size=1, max_size=4),
    batch=st.fixed_dictionaries(BATCH),
    judged=st.booleans(),
    data=st.data(),
)
def test_any_batch(rows, batch, judged, data):
    """Known tokens stay, counts are exact, no mask is left, and a row is as it would be alone."""
    every: dict[str, Any] = {name: [row[name] for row in rows] for name in ROW}
    canvas = torch.tensor(every.pop("canvas"))
    text, critic = tiny.text(len(rows)), CRITIC if judged else None
    options = SampleOptions(**every, **batch)
    steps = []
    out = sample(text, canvas, options, steps.append, critic)

    known = canvas != MASK
    assert torch.equal(out[known], canvas[known])
    assert (out != MASK).all()
    plan, before = make_plan(~known, options), ~known
    for i, seen in enumerate(steps):
        assert seen.mask.sum(1).tolist() == plan.num_masked[:, i].tolist()
        assert torch.equal(seen.ids == MASK, seen.mask)
        again = (seen.mask & ~before).sum(1)
        if critic is None or options.policy:
            assert again.tolist() == plan.num_remasked[:, i].tolist()
        else:  # a critic may take back more
            assert (again >= plan.num_remasked[:, i]).all()
        before = seen.mask

    one = data.draw(st.integers(0, len(rows) - 1), "row")
    own: dict[str, Any] = {name: [values[one]] for name, values in every.items()}
    alone = sample(
        type(text)(text.embeds[one : one + 1], text.mask[one : one + 1]),
        canvas[one : one + 1],
        SampleOptions(**own, **batch),
        critic=critic,
    )
    assert torch.equal(alone[0], out[one])


@given(height=st.integers(1, 24), width=st.integers(1, 24), seed=st.integers(0, 99))
def test_halton_covers_each_cell_once(height, width, seed):
    cells = list(range(height * width))
    order = halton_order(height, width)
    assert sorted(order.flatten().tolist()) == cells
    noise = torch.rand(height * width, generator=torch.Generator().manual_seed(seed))
    rolled = rolled_halton(noise, (height, width))
    assert sorted(rolled.tolist()) == cells
    assert rolled.argmin() == noise.argmax()  # where the noise says, it begins


@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 1.0]))
def test_top_k_1_is_the_argmax(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 30, generator=generator)
    uniform = torch.rand(2, 6, generator=generator)
    ids, _ = choose_tokens(logits, torch.full((2,), temperature), uniform, torch.tensor([1, 1]))
    assert torch.equal(ids, logits.argmax(-1))
