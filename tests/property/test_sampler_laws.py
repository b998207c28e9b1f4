"""What holds for the sampler with any numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_maskgit_pytorch import SampleOptions
from muse_maskgit_pytorch.masking import mask_ratio
from muse_maskgit_pytorch.sampling import Denoiser, make_plan, masked_counts, sample_tokens
from tests import tiny

schedules = st.sampled_from(["cosine", "arccos", "linear", "square"])


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


@given(num_masked=st.integers(1000, 5000), timesteps=st.integers(1, 30), schedule=schedules)
def test_masked_counts_follow_the_schedule(num_masked, timesteps, schedule):
    counts = torch.tensor(masked_counts(num_masked, timesteps, schedule), dtype=torch.float64)
    u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    # the first steps of a flat schedule decide at least one token: at most a few more than due
    assert (counts - mask_ratio(u, schedule) * num_masked).abs().max() <= max(2, timesteps / 4)


torch.manual_seed(0)
MODEL = tiny.transformer(num_tokens=20, seq_len=9, depth=1)
N, MASK = 9, MODEL.mask_id


def sample(text, canvas, options, seen=None):
    # the conditional texts, then the same without
    conditioning = tiny.conditioning(text.cat(text))
    conditioning.keep[len(text.mask) :] = False
    denoiser = Denoiser(MODEL, MODEL.encode_context(conditioning))
    return sample_tokens(denoiser, canvas, options, seen)


row = st.tuples(
    st.integers(1, 12),  # timesteps
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),  # temperature
    st.sampled_from([0.0, 1.0, 4.5]),  # choice temperature
    st.sampled_from([0.0, 1.0, 3.0, 7.5]),  # guidance
    st.integers(0, 2**40),  # seed
    st.lists(st.integers(0, MASK), min_size=N, max_size=N),  # canvas
)


@settings(max_examples=40)
@given(rows=st.lists(row, min_size=1, max_size=4), data=st.data(), schedule=schedules)
def test_any_batch(rows, data, schedule):
    timesteps, temperature, choice, scale, seeds, canvas = map(list, zip(*rows, strict=True))
    canvas = torch.tensor(canvas)
    text = tiny.text(len(rows))
    options = SampleOptions(
        timesteps, temperature, choice, scale, noise_schedule=schedule, seeds=seeds
    )
    steps = []
    out = sample(text, canvas, options, steps.append)

    known = canvas != MASK
    assert torch.equal(out[known], canvas[known])
    assert (out != MASK).all()
    plan = make_plan(~known, options)
    for i, seen in enumerate(steps):
        assert seen.mask.sum(1).tolist() == plan.num_masked[:, i].tolist()

    one = data.draw(st.integers(0, len(rows) - 1), "row")
    alone = sample(
        type(text)(text.embeds[one : one + 1], text.mask[one : one + 1]),
        canvas[one : one + 1],
        SampleOptions(
            timesteps[one],
            temperature[one],
            choice[one],
            scale[one],
            noise_schedule=schedule,
            seeds=[seeds[one]],
        ),
    )
    assert torch.equal(alone[0], out[one])
