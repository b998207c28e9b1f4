"""Metrics against closed forms, slow loops and other libraries; the evaluation against both."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.evaluation import Metric, evaluate_tokenizer
from muse_maskgit_pytorch.evaluation import metrics as m
from muse_maskgit_pytorch.features import LITE, FeatureNet, lpips_distance
from muse_maskgit_pytorch.vqgan_vae import ImageTokenizer


def pair(height: int, width: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Two photographs in pieces of this size, and the same with noise."""
    photos = [data.chelsea()[:256, :256], data.coffee()[:256, :256]]
    images = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)[:, :, :height, :width] / 255
    return images, (images + noise * torch.randn(images.shape)).clamp(0, 1)


# One image and another ---------------------------------------------------------------------


def test_psnr_by_hand():
    images = torch.full((3, 3, 4, 4), 0.5)
    others = images + torch.tensor([0.1, 0.01, 0]).view(3, 1, 1, 1)
    assert m.psnr(images, others).tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    # what lies outside [0,1] is seen as it would be shown
    assert float(m.psnr(torch.full((1, 3, 4, 4), 1.7), torch.ones(1, 3, 4, 4))) == 100


@pytest.mark.parametrize("height, width", [(11, 11), (16, 40), (64, 64)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_ssim_is_scikit_images(height, width, noise):
    images, others = pair(height, width, noise)
    wanted = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        for a, b in zip(images, others, strict=True)
    ]
    assert m.ssim(images, others).tolist() == pytest.approx(wanted, abs=1e-5)


def slow_terms(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM and its contrast part of one channel, window by window."""
    place = np.arange(11) - 5
    weights = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    weights /= weights.sum()
    similarity, contrast = [], []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            u, v = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_u, mean_v = (weights * u).sum(), (weights * v).sum()
            var_u, var_v = ((weights * (z - (weights * z).sum()) ** 2).sum() for z in (u, v))
            cov = (weights * (u - mean_u) * (v - mean_v)).sum()
            contrast.append((2 * cov + 0.0009) / (var_u + var_v + 0.0009))
            luminance = (2 * mean_u * mean_v + 0.0001) / (mean_u**2 + mean_v**2 + 0.0001)
            similarity.append(contrast[-1] * luminance)
    return float(np.mean(similarity)), float(np.mean(contrast))


def test_ms_ssim_is_that_of_a_slow_loop():
    images, others = pair(44, 46)
    wanted = []
    for a, b in zip(images.double(), others.double(), strict=True):
        channels = []
        for channel in range(3):
            u, v = a[None, channel], b[None, channel]
            finest = slow_terms(u[0].numpy(), v[0].numpy())[1]
            u, v = avg_pool2d(u, 2), avg_pool2d(v, 2)
            half = slow_terms(u[0].numpy(), v[0].numpy())[1]
            u, v = avg_pool2d(u, 2), avg_pool2d(v, 2)  # 11 x 11: one window
            quarter = slow_terms(u[0].numpy(), v[0].numpy())[0]
            total = (0.0448 + 0.2856 + 0.3001) / 1.0001
            channels.append((finest**0.0448 * half**0.2856 * quarter**0.3001) ** (1 / total))
        wanted.append(np.mean(channels))
    assert m.ms_ssim(images, others).tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "side, scales", [(11, 1), (21, 1), (22, 2), (64, 3), (128, 4), (175, 4), (176, 5), (999, 5)]
)
def test_scales_that_fit(side, scales):
    assert m.num_scales(side) == scales


def test_similarities_of_equal_opposite_and_small_images():
    images, _ = pair(64, 64)
    for measure in (m.ssim, m.ms_ssim):
        assert measure(images, images).tolist() == pytest.approx([1, 1], abs=1e-6)
        with pytest.raises(ValueError, match="at least 11 pixels"):
            measure(images[..., :10], images[..., :10])
    single = pair(16, 16)
    # one scale; the weights' sum is 1.0001
    assert torch.allclose(m.ms_ssim(*single), m.ssim(*single), rtol=1e-3)
    dots = torch.rand(2, 3, 64, 64).round()
    assert (m.ssim(dots, 1 - dots) < -0.5).all()
    assert m.ms_ssim(dots, 1 - dots).tolist() == [0, 0]


# Sets of images --------------------------------------------------------------------------------


def covariance(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T / size


def test_frechet_distance_by_its_closed_forms():
    zero, eye = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    s = covariance(5, 0)
    assert m.frechet_distance(zero, s, zero, s) == pytest.approx(0, abs=1e-10)
    shift = torch.tensor([1.0, 2.0, 0.0, -2.0, 0.0])
    assert m.frechet_distance(zero, s, shift, s) == pytest.approx(9)
    a, b = torch.tensor([1.0, 4, 9, 0, 2]), torch.tensor([4.0, 4, 1, 1, 0])
    wanted = float((a.sqrt() - b.sqrt()).square().sum())
    assert m.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(wanted)
    # a point against a Gaussian: its trace
    assert m.frechet_distance(zero, 0 * eye, zero, s) == pytest.approx(float(s.trace()))
    assert m.frechet_distance(zero, 0 * eye, zero, 0 * eye) == 0


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_is_that_of_the_matrix_root(seed):
    s, t = covariance(20, seed), covariance(20, seed + 10) * 3
    means = torch.randn(2, 20, dtype=torch.float64)
    root = sqrtm((s @ t).numpy())
    wanted = float((means[0] - means[1]).square().sum() + s.trace() + t.trace())
    wanted -= 2 * float(np.trace(root.real))
    assert m.frechet_distance(means[0], s, means[1], t) == pytest.approx(wanted, rel=1e-8)
    assert m.frechet_distance(means[1], t, means[0], s) == pytest.approx(wanted, rel=1e-8)


def test_frechet_distance_from_fewer_images_than_features():
    features = torch.randn(8, 50)
    few = m.FeatureStatistics()
    few.update(features)
    assert m.frechet_distance(few.mean, few.covariance, few.mean, few.covariance) < 1e-9
    # of low rank, so the overlap can be had from the images themselves: the nuclear norm of their
    # inner products
    other = m.FeatureStatistics()
    other.update(moved := 2 * torch.randn(8, 50) + 1)
    centred = [(x - x.mean(0)).double() for x in (features, moved)]
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / 7
    wanted = (features.mean(0) - moved.mean(0)).double().square().sum() - 2 * overlap
    wanted += sum(x.square().sum() / 7 for x in centred)
    found = m.frechet_distance(few.mean, few.covariance, other.mean, other.covariance)
    assert found == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("sizes", [[100], [1, 99], [30, 30, 40], [1] * 100])
def test_streamed_statistics_are_those_of_the_whole(sizes):
    # far from zero, where the mean of squares less the square of the mean would have no digits
    features = 1e4 + torch.randn(100, 6, dtype=torch.float64)
    statistics = m.FeatureStatistics()
    for part in features.split(sizes):
        statistics.update(part)
    assert statistics.count == 100
    assert torch.allclose(statistics.mean, features.mean(0), rtol=1e-12)
    assert torch.allclose(statistics.covariance, torch.cov(features.T), atol=1e-9)


def test_a_covariance_needs_two_images():
    statistics = m.FeatureStatistics()
    statistics.update(torch.randn(1, 6))
    with pytest.raises(ValueError, match="at least two images, not 1"):
        _ = statistics.covariance


def test_rfid_is_zero_for_equal_sets_and_grows_with_blur_and_noise():
    net = FeatureNet(LITE)
    pieces = torch.from_numpy(
        np.stack(
            [data.astronaut(), data.coffee()[:400, :400].repeat(2, 0).repeat(2, 1)[:512, :512]]
        )
    )
    images = pieces.permute(0, 3, 1, 2).float() / 255
    images = images.unfold(2, 128, 96).unfold(3, 128, 96).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    images = avg_pool2d(images, 2)
    assert len(images) == 50

    def distance(others: Tensor) -> float:
        sets = [m.FeatureStatistics(), m.FeatureStatistics()]
        for statistics, group in zip(sets, (images, others), strict=True):
            with torch.no_grad():
                statistics.update(net.pooled(group, resize=False))
        a, b = sets
        return m.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    blurred = interpolate(avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    noise = torch.rand(images.shape)
    found = [distance(x) for x in (images, images.lerp(blurred, 0.5), blurred, noise)]
    assert found[0] < 1e-6
    assert found == sorted(found)
    assert found[3] > 2 * found[2] > 2 * found[1] > 1


@pytest.mark.parametrize("count, other", [(8, 8), (8, 200), (200, 100)])
def test_frechet_distance_of_sets_is_that_of_their_statistics(count, other):
    sets = 50 + torch.randn(count, 30), 50 + 2 * torch.randn(other, 30)
    fitted = [(x.double().mean(0), torch.cov(x.double().T)) for x in sets]
    wanted = m.frechet_distance(*fitted[0], *fitted[1])
    assert m.frechet_of_sets(*sets) == pytest.approx(wanted, rel=1e-6)
    assert m.frechet_of_sets(sets[0], sets[0].flip(0)) < 1e-6
    with pytest.raises(ValueError, match="at least two images, not 1"):
        m.frechet_of_sets(sets[0], sets[1][:1])


def test_precision_and_recall_on_a_line():
    # at 1, 2, 4, 8 the nearest neighbours are 1, 1, 2 and 4 away: balls from 0 to 12
    real = torch.tensor([1.0, 2, 4, 8])[:, None]
    # here 0.5, 0.5, 12.5 and 87.5: that of -0.5 reaches to 12, and so over all of the real ones
    generated = torch.tensor([12.0, 12.5, -0.5, 100])[:, None]
    assert m.precision_recall(real, generated, 1) == (0.25, 1)
    # the sets exchanged, the figures are too
    assert m.precision_recall(generated, real, 1) == (1, 0.25)
    # to the second nearest it is 3, 2, 3 and 6: balls from -2 to 14
    assert m.precision_recall(real, generated, 2)[0] == 0.75


def test_a_generator_of_one_mode_is_precise_and_recalls_that_mode():
    modes = torch.cat([torch.randn(50, 8), 100 + torch.randn(150, 8)])
    copies = modes[:50]
    assert m.precision_recall(modes, copies) == (1, 0.25)
    assert m.precision_recall(modes, modes) == (1, 1)
    assert m.precision_recall(modes, modes + 1000) == (0, 0)
    # one image again and again: exactly on it, balls without any size
    same = modes[:1].repeat(10, 1)
    assert m.precision_recall(modes, same) == (1, 1 / 200)


def test_precision_and_recall_are_those_of_a_slow_loop():
    real, generated = torch.randn(300, 4).double(), 0.5 + torch.randn(270, 4).double()

    def inside(point: Tensor, centres: Tensor) -> bool:
        for i, centre in enumerate(centres):
            others = torch.cat([centres[:i], centres[i + 1 :]])
            radius = (others - centre).norm(dim=1).sort().values[2]
            if (point - centre).norm() <= radius:
                return True
        return False

    found = m.precision_recall(real, generated[:40])
    wanted = sum(inside(point, real) for point in generated[:40]) / 40
    assert found[0] == pytest.approx(wanted)
    assert 0 < wanted < 1
    # more than one block, and in any order
    assert m.precision_recall(real.flip(0), generated[:40].flip(0)) == found


@pytest.mark.parametrize("k, real, generated", [(0, 9, 9), (3, 3, 9), (3, 9, 3)])
def test_precision_and_recall_need_more_images_than_neighbours(k, real, generated):
    with pytest.raises(ValueError, match=f"not {k} for [39] (real|generated)"):
        m.precision_recall(torch.randn(real, 2), torch.randn(generated, 2), k)


def test_recall_counts_the_images_that_are_nearer():
    real = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 4, 4) / 6
    truth = torch.arange(6)
    assert m.recall_at(real, real, truth, 1) == 1
    assert m.recall_at(real, real, truth.roll(1), 1) == 0
    assert m.num_nearer(real[:1], real, truth[3:4]).tolist() == [3]
    nearly = real[:1] + 0.1  # nearer to the second image than to the first
    assert m.recall_at(nearly, real, truth[:1], 1) == 0
    assert m.recall_at(nearly, real, truth[:1], 2) == 1
    twins = torch.cat([real, real])  # ties are hits
    assert m.recall_at(twins, twins, torch.arange(12), 1) == 1


def test_retrieval_is_that_of_all_distances():
    # more than one block of real images
    real, truth = torch.rand(2 * m.BLOCK + 5, 3, 2, 2), torch.randint(m.BLOCK, (20,))
    drawn = real[truth] + 0.2 * torch.randn(20, 3, 2, 2)
    distance = torch.cdist(drawn.flatten(1).double(), real.flatten(1).double())
    wanted = (distance < distance.gather(1, truth[:, None])).sum(1)
    assert m.num_nearer(drawn, real, truth).tolist() == wanted.tolist()
    assert wanted.max() > 1


# Codebook --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts, usage, perplexity, bits",
    [
        ([5, 5, 5, 5], 1, 4, 2),
        ([9, 0, 0, 0], 0.25, 1, 0),
        ([2, 1, 1, 0], 0.75, 2 * math.sqrt(2), 1.5),
    ],
)
def test_codebook_by_hand(counts, usage, perplexity, bits):
    counts = torch.tensor(counts)
    assert m.codebook_usage(counts) == usage
    assert m.perplexity(counts) == pytest.approx(perplexity)
    assert m.entropy_bits(counts) == pytest.approx(bits)


def test_bits_per_pixel_by_hand():
    assert m.bits_per_pixel(13, 16 * 16, 256 * 256) == pytest.approx(13 / 256)


# Tokenizers ------------------------------------------------------------------------------------


class Grey(ImageTokenizer):
    """The mean of every 4 x 4 pixels, in eleven steps."""

    codebook_size, factor = 11, 4

    def encode_to_ids(self, images: Tensor) -> Tensor:
        return (avg_pool2d(images, 4).mean(1) * 10).round().long()

    def decode_from_ids(self, ids: Tensor) -> Tensor:
        grey = (ids.float() / 10)[:, None].expand(-1, 3, -1, -1)
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3)


def items(images: Tensor) -> Any:
    return [{"image": image} for image in images]


def values(figures: dict[str, Metric]) -> dict[str, float]:
    return {k: metric.value for k, metric in figures.items() if not k.endswith("_per_s")}


def test_a_tokenizer_of_known_loss(resnet: str):
    # two images that it holds exactly, and one that is 0.04 off everywhere
    images = torch.tensor([0.2, 0.7, 0.24]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    figures = evaluate_tokenizer(Grey(), items(images[:2]), FeatureNet(resnet), batch_size=2)
    assert {metric.images for metric in figures.values()} == {2}
    found = values(figures)
    assert found.pop("psnr") == pytest.approx(100)
    assert found.pop("ssim") == found.pop("ms_ssim") == pytest.approx(1)
    assert found.pop("perceptual") == pytest.approx(0, abs=1e-9)
    assert found.pop("rfid") == pytest.approx(0, abs=1e-9)
    assert found.pop("codebook_usage") == pytest.approx(2 / 11)
    assert found.pop("perplexity") == pytest.approx(2)
    assert found.pop("bits_per_pixel") == pytest.approx(math.log2(11) / 16)
    assert found.pop("bits_per_pixel_coded") == pytest.approx(1 / 16)
    assert found == {}

    figures = evaluate_tokenizer(Grey(), items(images), batch_size=2)
    assert figures["psnr"].value == pytest.approx((100 + 100 - 20 * math.log10(0.04)) / 3, rel=1e-5)
    assert figures["perplexity"].value == pytest.approx(2 ** (math.log2(3) - 2 / 3))
    assert {metric.images for metric in figures.values()} == {3}


def test_the_figures_do_not_depend_on_the_batch_size(resnet: str):
    vae, net, images = tiny.vae(), FeatureNet(resnet), items(tiny.images(7, 24))
    whole, *others = (
        values(evaluate_tokenizer(vae, images, net, batch_size=size)) for size in (7, 1, 3, 100)
    )
    assert "rfid" in whole
    for other in others:
        assert other == pytest.approx(whole, rel=1e-5)


def test_the_distances_are_those_of_images_and_reconstructions(resnet: str):
    vae, net, images = tiny.vae(), FeatureNet(resnet), tiny.images(5, 16)
    found = values(evaluate_tokenizer(vae, items(images), net, batch_size=2))
    with torch.no_grad():
        recon = vae.decode_from_ids(vae.encode_to_ids(images))
        wanted = float(lpips_distance(net.maps(images), net.maps(recon)).mean())
        a, b = net.pooled(images).double(), net.pooled(recon).double()
    assert found["perceptual"] == pytest.approx(wanted, rel=1e-5)
    wanted = m.frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert found["rfid"] == pytest.approx(wanted, rel=1e-4)
    assert found["psnr"] == pytest.approx(float(m.psnr(images, recon).mean()), rel=1e-5)


def test_figures_say_what_they_rest_on(resnet: str):
    images = items(tiny.images(5, 16))
    figures = evaluate_tokenizer(tiny.vae(), images, FeatureNet(resnet), batch_size=2, limit=3)
    assert {metric.images for metric in figures.values()} == {3}
    assert "fewer images than features" in figures["rfid"].note  # 3 for 16
    assert "1 of 5 scales" in figures["ms_ssim"].note
    assert figures["perplexity"].note == f"from {3 * 16} tokens"
    assert figures["encode_images_per_s"].value > 0
    assert figures["decode_images_per_s"].value > 0
    alone = evaluate_tokenizer(tiny.vae(), images, FeatureNet(resnet), limit=1)
    assert "rfid" not in alone  # of one image there is no covariance
    assert evaluate_tokenizer(tiny.vae(), images).keys().isdisjoint({"rfid", "perceptual"})


def test_speed_is_measured_without_the_first_pass(monkeypatch):
    class Slow(Grey):
        calls = 0

        def encode_to_ids(self, images: Tensor) -> Tensor:
            clock[0] += 100 if Slow.calls == 0 else 2
            Slow.calls += 1
            return super().encode_to_ids(images)

        def decode_from_ids(self, ids: Tensor) -> Tensor:
            clock[0] += 0.5
            return super().decode_from_ids(ids)

    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    figures = evaluate_tokenizer(Slow(), items(tiny.images(6, 16)), batch_size=2)
    assert figures["encode_images_per_s"].value == pytest.approx(1)
    assert figures["decode_images_per_s"].value == pytest.approx(4)


def test_a_tokenizer_in_training_is_left_as_it_was():
    vae = tiny.vae(quantizer="vq", codebook_dim=4).train()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    evaluate_tokenizer(vae, items(tiny.images(4, 16)))
    assert vae.training
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())


@pytest.mark.parametrize(
    "size, changes, says",
    [
        (16, dict(batch_size=0), "batch_size must be at least 1"),
        (16, dict(limit=0), "limit must be at least 1"),
        (18, {}, "18 is not a positive multiple"),
        (8, {}, "at least 11 pixels"),
    ],
)
def test_bad_input(size, changes, says):
    vae = tiny.vae().train()
    with pytest.raises(ValueError, match=says):
        evaluate_tokenizer(vae, items(tiny.images(2, size)), **changes)
    assert vae.training


def test_no_images_at_all():
    with pytest.raises(ValueError, match="no images"):
        evaluate_tokenizer(tiny.vae(), items(tiny.images(0, 16)))
