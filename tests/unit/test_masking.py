"""The law of the mask, and that nothing under it can be seen."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from muse_maskgit_pytorch.masking import (
    IGNORE_INDEX,
    draw_mask,
    mask_ratio,
    mask_tokens,
    read_table,
)

SCHEDULES = ["cosine", "arccos", "linear", "square", "beta:12,3", "gaussian:0.55,0.25"]


def test_cosine_ratio_has_the_density_of_the_paper():
    counts = draw_mask(20_000, 256).sum(1) / 256
    assert abs(counts.mean() - 2 / math.pi) < 0.009  # 0.6366, standard error 0.002
    # density (2/pi) (1 - r^2)^(-1/2) on [0, 1], so the distribution function is (2/pi) asin(r)
    ratio = mask_ratio(torch.rand(100_000)).numpy()
    assert stats.kstest(ratio, stats.arcsine(-1, 2).cdf).pvalue < 1e-6  # not the full arcsine
    assert stats.kstest(ratio, lambda r: 2 / math.pi * torch.tensor(r).asin().numpy()).pvalue > 0.01


def test_arccos_is_another_law():
    ratio = mask_ratio(torch.rand(100_000), "arccos")
    assert abs(ratio.mean() - 2 / math.pi) < 0.004  # the same mean ...
    cosine = lambda r: 2 / math.pi * torch.tensor(r).asin().numpy()  # noqa: E731
    assert stats.kstest(ratio.numpy(), cosine).pvalue < 1e-6  # ... but not the same law


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ratio_falls_from_one_to_zero(schedule):
    ratio = mask_ratio(torch.linspace(0, 1, 101, dtype=torch.float64), schedule)
    assert ratio[0] == 1
    assert ratio[-1].abs() < 1e-12
    assert (ratio.diff() < 0).all()


def test_cosine_value():
    assert mask_ratio(torch.tensor(0.5)) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 8, 300])
def test_a_table_gives_its_entries_exactly_and_lines_between(steps, dtype):
    table = torch.rand(steps + 1).tolist()
    exact = torch.tensor(table, dtype=dtype)
    assert torch.equal(read_table(table, torch.arange(steps + 1, dtype=dtype) / steps), exact)
    between = read_table(table, (torch.arange(steps, dtype=dtype) + 0.25) / steps)
    torch.testing.assert_close(between, 0.75 * exact[:-1] + 0.25 * exact[1:], atol=1e-4, rtol=0)
    assert (
        read_table([0.3], torch.linspace(0, 1, 3, dtype=dtype)).tolist()
        == [exact.new_tensor(0.3)] * 3
    )


def test_a_tabulated_ratio_lies_between_all_and_none():
    u = torch.linspace(0, 1, 5)
    assert mask_ratio(u, [0.5]).tolist() == [1, 0.75, 0.5, 0.25, 0]
    torch.testing.assert_close(mask_ratio(u, [0.75, 0.5, 0.25]), mask_ratio(u, "linear"))


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"'cosin'.*cosine"):
        mask_ratio(torch.zeros(1), "cosin")  # pyrefly: ignore


@given(
    batch=st.integers(1, 5),
    num_tokens=st.integers(1, 50),
    schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 2**31),
)
def test_counts_follow_the_drawn_ratio(batch, num_tokens, schedule, seed):
    mask = draw_mask(batch, num_tokens, schedule, generator=torch.Generator().manual_seed(seed))
    u = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    wanted = (mask_ratio(u, schedule) * num_tokens).round().clamp(min=1)
    assert mask.shape == (batch, num_tokens)
    assert mask.sum(1).tolist() == wanted.tolist()
    assert mask.any(dim=1).all()


def test_positions_are_uniform_and_rows_independent():
    mask = draw_mask(40_000, 8).float()
    assert (mask.mean(0) - mask.mean()).abs().max() < 0.01
    # one ratio per example: counts of two neighbouring rows are not correlated
    counts = mask.sum(1).view(-1, 2)
    assert abs(torch.corrcoef(counts.T)[0, 1]) < 0.03
    assert counts.unique().numel() == 8  # 1 to 8 all occur: not one ratio for the whole batch


@given(seed=st.integers(0, 2**31), num_codes=st.integers(2, 40))
def test_no_unmasked_id_leaks(seed, num_codes):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_codes, (3, 12), generator=generator)
    mask = draw_mask(3, 12, generator=generator)
    out = mask_tokens(ids, mask, mask_id=num_codes)
    assert ((out.input_ids == num_codes) == mask).all()
    assert (out.input_ids[~mask] == ids[~mask]).all()
    assert (out.labels[mask] == ids[mask]).all()
    assert (out.labels[~mask] == IGNORE_INDEX).all()
    assert IGNORE_INDEX < 0  # no legal code: 0 would silently drop the first one


def test_no_mask_token_prob_is_a_rate_among_masked_positions():
    ids = torch.zeros(200, 256, dtype=torch.long)
    mask = draw_mask(200, 256)
    out = mask_tokens(ids, mask, mask_id=7, no_mask_token_prob=0.2)
    shown = out.input_ids == 0
    assert shown[~mask].all()
    assert shown[mask].float().mean() == pytest.approx(0.2, abs=0.01)
    assert (out.labels == torch.where(mask, 0, IGNORE_INDEX)).all()  # predicted all the same
    assert (out.mask == mask).all()


@pytest.mark.parametrize(
    "law, distribution",
    [
        ("beta:12,3", stats.beta(12, 3)),
        ("beta:2,1.5", stats.beta(2, 1.5)),
        ("gaussian:0.55,0.25", stats.truncnorm(-0.2, 1.8, 0.55, 0.25)),  # 0.5 and 1 in spreads
    ],
)
def test_laws_have_their_density(law: str, distribution):
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert stats.kstest(mask_ratio(u, law).numpy(), distribution.cdf).pvalue > 0.01


@pytest.mark.parametrize(
    "law", ["beta", "beta:12", "beta:0,3", "beta:a,b", "gamma:1,2", "beta:1,2,3"]
)
def test_laws_that_are_none(law: str):
    with pytest.raises(ValueError, match=f"noise_schedule '{law}'"):
        mask_ratio(torch.zeros(1), law)


@pytest.mark.parametrize("grid", [(8, 8), (4, 9), (1, 6)])
def test_rectangles(grid: tuple[int, int]):
    """Each is one, anywhere, with the law's number of tokens as near as its height allows."""
    height, width = grid
    settings = dict(batch=2000, num_tokens=height * width, grid=grid)
    masks, plain = (
        draw_mask(**settings, rectangle_prob=prob, generator=torch.Generator().manual_seed(0))
        for prob in (1.0, 0.0)
    )
    masks = masks.unflatten(1, grid)
    rows, columns = masks.any(2), masks.any(1)
    assert torch.equal(masks, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):  # without gaps
        assert (line.int().diff(dim=1) == 1).sum(1).max() <= 1
    difference = masks.sum((1, 2)) - plain.sum(1)  # the same draw of counts
    assert (difference.abs() <= rows.sum(1) / 2).all()
    assert abs(difference.float().mean()) < 0.5
    assert masks.any(0).all()


def test_a_share_of_the_masks_are_rectangles():
    masks = draw_mask(2000, 64, "beta:8,8", grid=(8, 8), rectangle_prob=0.25).unflatten(1, (8, 8))
    whole = masks.any(2)[:, :, None] & masks.any(1)[:, None, :]
    assert abs(float((whole == masks).all(2).all(1).float().mean()) - 0.25) < 0.05
