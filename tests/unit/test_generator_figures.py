"""The judge of generators: each figure where it is known, and against the metrics it is made of."""

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.evaluation import metrics
from muse_maskgit_pytorch.evaluation.generator import Judge
from muse_maskgit_pytorch.features import FeatureNet
from tests import shapes

COUNT = 8


@pytest.fixture
def network(resnet: str) -> FeatureNet:
    return FeatureNet(resnet)


@pytest.fixture
def real() -> Tensor:
    return tiny.images(COUNT, 32)


@pytest.fixture
def judge(network: FeatureNet, real: Tensor) -> Judge:
    return Judge(network, [f"caption {i}" for i in range(COUNT)], real)


def test_the_real_images_themselves_are_perfect(judge: Judge, real: Tensor):
    found = judge.figures(real)
    assert found.pop("fid") == pytest.approx(0, abs=1e-6)
    assert found == {"images": 8, "recall_at_1": 1, "recall_at_5": 1, "precision": 1, "recall": 1}
    assert judge.captions == [f"caption {i}" for i in range(COUNT)]


def test_the_wrong_captions_are_found_out_by_retrieval_alone(judge: Judge, real: Tensor):
    found = judge.figures(real.roll(1, 0))
    assert found["recall_at_1"] == 0
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    # unless it is said what they were drawn from
    assert judge.figures(real.roll(1, 0), torch.arange(COUNT).roll(1))["recall_at_1"] == 1


def test_one_image_for_all_captions_is_precise_without_recall(judge: Judge, real: Tensor):
    found = judge.figures(real[:1].repeat(COUNT, 1, 1, 1))
    assert found["recall_at_1"] == 1 / COUNT
    assert (found["precision"], found["recall"]) == (1, 1 / COUNT)
    assert found["fid"] > 0.01


def test_noise_is_neither_real_nor_varied(judge: Judge, real: Tensor):
    found = judge.figures(1 - real.mean(1, keepdim=True).expand_as(real) ** 8)
    assert found["precision"] == found["recall"] == 0
    assert found["fid"] > judge.figures((real + 0.05 * torch.randn_like(real)).clamp(0, 1))["fid"]


def test_figures_are_those_of_the_metrics(network: FeatureNet, judge: Judge, real: Tensor):
    drawn = (real.lerp(tiny.images(COUNT, 32, seed=1), 0.5)).repeat(2, 1, 1, 1)
    found = judge.figures(drawn)
    a, b = network.pooled(real), network.pooled(drawn)
    truth = torch.arange(2 * COUNT) % COUNT
    assert found["images"] == 2 * COUNT
    assert found["fid"] == pytest.approx(metrics.frechet_of_sets(a, b), rel=1e-4)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(a, b, 3)
    for k in (1, 5):
        assert found[f"recall_at_{k}"] == metrics.recall_at(drawn, real, truth, k)


def test_several_seeds_follow_one_another(judge: Judge, real: Tensor):
    # the second draw has the captions mixed up
    found = judge.figures(torch.cat([real, real.flip(0)]))
    assert found["recall_at_1"] == 0.5


def test_retrieval_searches_the_gallery_and_nothing_else_does(network: FeatureNet, real: Tensor):
    drawn = real + 0.02
    captions = [""] * COUNT
    alone = Judge(network, captions, real).figures(drawn)
    # of half of the drawn images there is something nearer than the true one
    gallery = torch.cat([drawn[: COUNT // 2], tiny.images(3, 32, seed=2)])
    searched = Judge(network, captions, real, gallery=gallery).figures(drawn)
    assert (alone.pop("recall_at_1"), searched.pop("recall_at_1")) == (1, 0.5)
    assert alone == searched


def test_figures_do_not_depend_on_the_batch_size(network: FeatureNet, judge: Judge, real: Tensor):
    drawn = tiny.images(COUNT, 32, seed=1)
    small = Judge(network, judge.captions, real, batch_size=3)
    assert small.figures(drawn) == pytest.approx(judge.figures(drawn), rel=1e-4)


@pytest.mark.parametrize(
    "count, size, changes, says",
    [
        (7, 32, {}, "8 captions for 7 images"),
        (8, 32, {"gallery": tiny.images(2, 16)}, r"gallery are \(3, 16, 16\)"),
        (8, 32, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_real_images(network: FeatureNet, count, size, changes, says):
    with shapes.unchecked(), pytest.raises(ValueError, match=says):
        Judge(network, [""] * 8, tiny.images(count, size), **changes)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_images_for_their_neighbours(network: FeatureNet, judge: Judge, count: int):
    images = tiny.images(count, 32)
    with pytest.raises(ValueError, match=f"images: {count} are too few"):
        Judge(network, [""] * count, images)
    with pytest.raises(ValueError, match=f"generated: {count} are too few"):
        judge.figures(images, torch.arange(count))


@pytest.mark.parametrize(
    "images, truth, says",
    [
        (tiny.images(8, 16), None, r"generated are \(3, 16, 16\), the real images \(3, 32, 32\)"),
        (tiny.images(12, 32), None, "12 generated images are no multiple of the 8 captions"),
        (tiny.images(8, 32), torch.arange(7), "truth has 7 values for 8"),
        (tiny.images(8, 32), torch.arange(8) + 1, "from 1 to 8, there are 8 captions"),
        (tiny.images(8, 32), torch.arange(8) - 1, "from -1 to 6, there are 8 captions"),
    ],
)
def test_bad_generated_images(judge: Judge, images, truth, says):
    with shapes.unchecked(), pytest.raises(ValueError, match=says):
        judge.figures(images, truth)
