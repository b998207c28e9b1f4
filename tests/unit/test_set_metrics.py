"""Figures of sets of pictures and their intervals: closed forms, and what scikit-learn says."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_distances, polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from torch import Tensor

from muse_maskgit_pytorch.evaluation import figures as f
from muse_maskgit_pytorch.evaluation import metrics as m


def sets(real: int = 300, generated: int = 270, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Two overlapping clouds, more vectors than one block holds."""
    return torch.randn(real, dim), 0.4 + 1.2 * torch.randn(generated, dim)


# Kernel distances --------------------------------------------------------------------------------


def test_kid_is_the_mean_of_scikit_learns_kernel_without_the_diagonal():
    real, made = sets()
    kernel = {"degree": 3, "gamma": 1 / 6, "coef0": 1}
    a, b = real.double().numpy(), made.double().numpy()

    def off_diagonal(x: np.ndarray) -> float:
        table = polynomial_kernel(x, **kernel)
        return float(table[~np.eye(len(x), dtype=bool)].mean())

    wanted = off_diagonal(a) + off_diagonal(b) - 2 * polynomial_kernel(a, b, **kernel).mean()
    assert m.kid(real, made) == pytest.approx(wanted, rel=1e-9)
    assert m.kid(made, real) == pytest.approx(wanted, rel=1e-9)


def test_kid_by_hand():
    # of one dimension, (x y + 1)^3: within the zeros 1, within the ones 8, across 1
    zeros, ones = torch.zeros(3, 1), torch.ones(4, 1)
    assert m.kid(zeros, ones) == pytest.approx(1 + 8 - 2)
    assert m.kid(ones, ones) == pytest.approx(0)


def test_kid_has_no_bias_where_fid_is_too_large():
    found = [m.kid(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(150)]
    mean, error = np.mean(found), np.std(found) / math.sqrt(150)
    assert abs(mean) < 3 * error
    assert min(found) < 0


def test_cmmd_is_scikit_learns_kernel_of_unit_vectors():
    real, made = sets()
    a, b = normalize(real.double().numpy()), normalize(made.double().numpy())
    gamma = 1 / (2 * 10**2)
    wanted = rbf_kernel(a, gamma=gamma).mean() + rbf_kernel(b, gamma=gamma).mean()
    wanted -= 2 * rbf_kernel(a, b, gamma=gamma).mean()
    assert m.cmmd(real, made) == pytest.approx(1000 * wanted, rel=1e-6)
    assert m.cmmd(3 * real, made / 7) == pytest.approx(1000 * wanted, rel=1e-6)


def test_cmmd_by_hand():
    east, north = torch.tensor([[1.0, 0.0]]).repeat(5, 1), torch.tensor([[0.0, 2.0]]).repeat(3, 1)
    # squared distance 2 across, 0 within
    assert m.cmmd(east, north) == pytest.approx(2000 * (1 - math.exp(-2 / 200)))
    assert m.cmmd(east, east) == 0


@pytest.mark.parametrize(
    "figure, count, says",
    [(m.kid, 1, "at least two generated images, not 1"), (m.cmmd, 0, "at least one image")],
)
def test_kernel_distances_need_images(figure, count, says):
    with pytest.raises(ValueError, match=says):
        figure(torch.randn(4, 2), torch.randn(count, 2))


# Neighbourhoods ----------------------------------------------------------------------------------


def test_density_and_coverage_on_a_line():
    # to the second nearest: balls -2 to 4, 0 to 4, 1 to 7 and 2 to 14
    real = torch.tensor([1.0, 2, 4, 8])[:, None]
    generated = torch.tensor([3.0, 13.0, -9.0])[:, None]
    found = m.neighbourhoods(real, generated, k=1, density_k=2)
    assert found.density.tolist() == [4 / 2, 1 / 2, 0]
    # 8 is covered, since 3 lies in its ball; the others by 3 too
    assert found.covered.tolist() == [True] * 4
    far = m.neighbourhoods(real, generated[1:], k=1, density_k=2)
    assert far.covered.tolist() == [False, False, False, True]


def test_neighbourhoods_are_those_of_scikit_learn():
    real, made = (x.double() for x in sets())
    found = m.neighbourhoods(real, made)

    def radii(x: Tensor, k: int) -> np.ndarray:
        # the nearest is the point itself
        return NearestNeighbors(n_neighbors=k + 1).fit(x.numpy()).kneighbors()[0][:, k - 1]

    across = (made[:, None] - real).norm(dim=2).numpy()
    in_real = across <= radii(real, 3)
    assert np.array_equal(found.precise.numpy(), in_real.any(1))
    in_made = across <= radii(made, 3)[:, None]
    assert np.array_equal(found.recalled.numpy(), in_made.any(0))
    dense = across <= radii(real, 5)
    assert found.density.tolist() == pytest.approx((dense.sum(1) / 5).tolist())
    assert np.array_equal(found.covered.numpy(), dense.any(0))
    shares = [x.double().mean() for x in (found.precise, found.recalled, found.covered)]
    assert all(0.1 < share < 0.999 for share in shares)


def test_one_outlier_makes_precision_and_not_density():
    # Naeem et al. 2020, figure 2: one real image far away has a large ball
    real = torch.cat([torch.randn(200, 4), torch.full((1, 4), 12.0)])
    fake = 8 + torch.randn(100, 4)
    found = m.neighbourhoods(real, fake)
    assert found.precise.double().mean() > 0.9
    assert found.density.mean() < 0.25


def test_equal_sets_are_dense_and_covered_as_naeem_et_al_say():
    found = [m.neighbourhoods(torch.randn(200, 3), torch.randn(200, 3)) for _ in range(10)]
    density, covered = (
        float(torch.cat([getattr(each, name).double() for each in found]).mean())
        for name in ("density", "covered")
    )
    assert density == pytest.approx(1, abs=0.05)  # lemma 1
    # lemma 2: of 399 real and generated ones, not all five nearest are real
    none = math.prod((199 - i) / (399 - i) for i in range(5))
    assert covered == pytest.approx(1 - none, abs=0.01)


# Pictures and prompts ----------------------------------------------------------------------------


def test_diversity_by_hand():
    east, north, west = torch.tensor([1.0, 0]), torch.tensor([0, 3.0]), torch.tensor([-2.0, 0])
    pairs = torch.stack([torch.stack(x) for x in ((east, east), (east, north), (east, west))])
    assert m.diversity(pairs).tolist() == pytest.approx([0, 1, 2])
    three = torch.stack([east, north, west])[None]
    assert m.diversity(three).tolist() == pytest.approx([(1 + 1 + 2) / 3])


def test_diversity_is_the_mean_of_scikit_learns_distances():
    features = torch.randn(4, 5, 7)
    upper = np.triu_indices(5, 1)
    wanted = [cosine_distances(rows.numpy())[upper].mean() for rows in features.double()]
    assert m.diversity(features).tolist() == pytest.approx(wanted)


def test_clip_score_by_hand():
    images = torch.tensor([[1.0, 0], [3.0, 4.0], [1.0, 0]])
    texts = torch.tensor([[5.0, 0], [0.5, 0], [-1.0, 0]])
    assert m.clip_score(images, texts).tolist() == pytest.approx([2.5, 1.5, 0])


# Intervals ---------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_statistics():
    values = torch.randn(2000).double()
    mean, interval = f.bootstrap_mean(values)
    assert mean == pytest.approx(float(values.mean()))
    assert interval is not None
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    assert interval == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for _ in range(60):
        _, interval = f.bootstrap_mean((torch.rand(50) < 0.3).double())
        assert interval is not None
        held += interval[0] <= 0.3 <= interval[1]
    assert 50 <= held <= 60  # 57 on average


def test_pictures_of_a_prompt_are_drawn_together():
    # eight equal pictures of each prompt say no more than one
    values = torch.randn(100).double()
    one = f.bootstrap_mean(values)
    assert f.bootstrap_mean(values[:, None].expand(-1, 8)) == (
        pytest.approx(one[0]),
        pytest.approx(one[1]),
    )


def test_a_mean_over_what_there_is():
    values = torch.tensor([[1.0, 0], [1, 9], [9, 9]])
    counted = torch.tensor([[True, True], [True, False], [False, False]])
    mean, interval = f.bootstrap_mean(values, counted)
    assert mean == pytest.approx(2 / 3)
    assert interval == (0.5, 1.0)
    assert f.bootstrap_mean(values[:1]) == (0.5, None)
    with pytest.raises(ValueError, match="at least one value"):
        f.bootstrap_mean(values, torch.zeros_like(counted))


def test_a_spread_stands_around_the_figure_of_all():
    values = torch.randn(400).double()
    found = f.bootstrap_spread(5.0, 400, lambda rows: float(values[rows].mean()))
    assert found is not None
    assert sum(found) / 2 == pytest.approx(5)
    # twenty draws say the width to a sixth
    assert (found[1] - found[0]) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.5)
    assert f.bootstrap_spread(5.0, 1, lambda rows: 0.0) is None


def test_subsets_are_disjoint_and_all_there_is():
    seen: list[Tensor] = []

    def figure(rows: Tensor) -> float:
        seen.append(rows)
        return float(len(seen))

    interval, note = f.subset_interval(7.0, 103, figure)
    assert len(seen) == 10
    assert sorted(torch.cat(seen).tolist()) == list(range(103))
    half = 2.262 * np.std(range(1, 11), ddof=1) / math.sqrt(10)
    assert interval == pytest.approx((7 - half, 7 + half))
    assert "10 subsets" in note
    assert f.subset_interval(7.0, 9, figure) == (None, "fewer than 10 prompts give no interval")
