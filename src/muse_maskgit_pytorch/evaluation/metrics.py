"""The figures by which images and codebooks are judged, each one formula.

Four kinds: of an image and its reconstruction (PSNR, SSIM, MS-SSIM: one number per image), of sets
of images (Fréchet and kernel distances, precision, recall, density and coverage of features;
retrieval), of pictures and what they were drawn from (CLIPScore, diversity), of the codebook's use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
# Wang et al. 2003, 3.2: how much each scale counts, finest first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Mean squared error of images that are called equal, 100 dB: rounding to 8 bits alone makes 1e-6.
LEAST_ERROR = 1e-10
BLOCK = 256  # vectors of a set that are compared with another set at a time
ROUNDING = 1e-12  # of a sum of a few thousand products in float64, and to spare
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
CLIP_SCORE_WEIGHT = 2.5


def psnr(images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB, peak 1, at most 100; clamped to [0,1]."""
    error = (images.clamp(0, 1) - others.clamp(0, 1)).square().mean((1, 2, 3))
    return -10 * error.clamp(min=LEAST_ERROR).log10()


def ssim(images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of each image (Wang et al. 2004), at most 1; clamped to [0,1].

    Gaussian window of 11 x 11, sigma 1.5, where it fits whole; per channel, then averaged.

    Raises:
        ValueError: a side shorter than the window.
    """
    similarity, _ = _ssim(images.clamp(0, 1), others.clamp(0, 1))
    return similarity.mean(1)


def ms_ssim(
    images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]
) -> Float[Tensor, " B"]:
    """Multi-scale structural similarity of each image (Wang et al. 2003), in [0,1].

    Contrast and structure at every scale, luminance at the coarsest; each scale is the one before
    averaged over 2 x 2 pixels (an odd last row is left out). Five scales need 176 pixels. Of a
    smaller image as many are taken as the window fits in (64 pixels: 3, 128: 4), and their weights
    scaled to the sum of all five: compare such figures at equal sizes only.

    Raises:
        ValueError: a side shorter than the window.
    """
    a, b = images.clamp(0, 1), others.clamp(0, 1)
    weights = SCALE_WEIGHTS[: num_scales(min(images.shape[-2:]))]
    full = sum(SCALE_WEIGHTS) / sum(weights)
    product = torch.ones((), device=images.device)
    for i, weight in enumerate(weights):
        similarity, contrast = _ssim(a, b)
        factor = contrast if i < len(weights) - 1 else similarity
        # a power of a negative number is none: such a scale has nothing in common
        product = product * factor.clamp(min=0) ** (weight * full)
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)


def num_scales(side: int) -> int:
    """How many scales of `ms_ssim` an image has whose shorter side has so many pixels."""
    return max(1, sum(side >> scale >= WINDOW for scale in range(len(SCALE_WEIGHTS))))


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity, and its contrast and structure part alone: (B, channels), means over space."""
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(
            f"images must be at least {WINDOW} pixels high and wide for SSIM, not "
            f"{tuple(a.shape[-2:])}"
        )
    places = torch.arange(WINDOW, device=a.device, dtype=a.dtype) - WINDOW // 2
    line = torch.exp(-places.square() / (2 * SIGMA**2))
    line = (line / line.sum()).expand(a.shape[1], 1, 1, WINDOW)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, line, groups=x.shape[1])
        return F.conv2d(x, line.mT, groups=x.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    contrast = (2 * covariance + C2) / (var_a + var_b + C2)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * contrast).mean((2, 3)), contrast.mean((2, 3))


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, in float64 on the CPU.

    Batches are merged by their own means (Chan et al. 1983), so nothing cancels, and the batch
    size does not matter.

    Attributes:
        count: vectors seen.
    """

    def __init__(self):
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Float[Tensor, "B C"]) -> None:
        """Take in a batch."""
        features = features.detach().cpu().double()
        rows, mean = len(features), features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self._mean, self._scatter = rows, mean, scatter
            return
        total, shift = self.count + rows, mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * rows / total)
        self._mean += shift * (rows / total)
        self.count = total

    @property
    def mean(self) -> Float[Tensor, " C"]:
        return self._mean

    @property
    def covariance(self) -> Float[Tensor, "C C"]:
        """Unbiased (divided by the count less one), as published FIDs have it.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(
    mean: Float[Tensor, " C"],
    covariance: Float[Tensor, "C C"],
    other_mean: Float[Tensor, " C"],
    other_covariance: Float[Tensor, "C C"],
) -> float:
    """Squared Fréchet distance of two Gaussians: FID where they are fitted to features.

    ``|m - n|^2 + tr(S) + tr(T) - 2 tr((S^1/2 T S^1/2)^1/2)`` (Heusel et al. 2017). The last trace
    is the sum of the singular values of S^1/2 T^1/2. This way there is no root of a product's
    rounding errors, and covariances of low rank, from fewer images than features, need no offset.
    """
    roots = [_root(matrix.double()) for matrix in (covariance, other_covariance)]
    return _frechet(mean.double(), roots[0], other_mean.double(), roots[1])


def frechet_of_sets(features: Float[Tensor, "R C"], others: Float[Tensor, "G C"]) -> float:
    """`frechet_distance` of the Gaussians fitted to two sets of feature vectors.

    A set that is at hand as a whole has a root of its covariance, so none is formed: of a hundred
    images and a thousand features it takes milliseconds.

    Raises:
        ValueError: a set of fewer than two vectors.
    """
    return _frechet(*_gaussian(features), *_gaussian(others))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,), and A (C, min(B, C)) with A A^T = covariance, of B vectors."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, not {len(features)}")
    features = features.detach().cpu().double()
    mean = features.mean(0)
    triangle = torch.linalg.qr(features - mean, mode="r").R  # R^T R = X^T Q^T Q X = X^T X
    return mean, triangle.T / math.sqrt(len(features) - 1)


def _frechet(mean: Tensor, root: Tensor, other_mean: Tensor, other_root: Tensor) -> float:
    overlap = torch.linalg.svdvals(root.T @ other_root).sum()
    shift = (mean - other_mean).square().sum()
    distance = shift + root.square().sum() + other_root.square().sum()  # tr(A A^T) = |A|^2
    return max(0.0, float(distance - 2 * overlap))


def _root(covariance: Tensor) -> Tensor:
    """A (C, rank) with A A^T = covariance; directions of rounding errors are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    least = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > least
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Neighbourhoods:
    """Which vectors of two sets lie in each other's neighbourhoods; one value per vector.

    Around each vector of a set lies the ball that reaches to its k-th nearest neighbour in it.

    Attributes:
        precise: whether a generated vector is in any ball of the real ones, k = 3.
        recalled: whether a real vector is in any ball of the generated ones, k = 3.
        density: how many balls of the real ones a generated vector is in, over k = 5.
        covered: whether any generated vector is in the ball of a real one, k = 5.
    """

    precise: Bool[Tensor, " G"]
    recalled: Bool[Tensor, " R"]
    density: Float[Tensor, " G"]
    covered: Bool[Tensor, " R"]


def neighbourhoods(
    real: Float[Tensor, "R C"],
    generated: Float[Tensor, "G C"],
    k: int = 3,
    density_k: int = 5,
) -> Neighbourhoods:
    """What precision, recall, density and coverage are the means of.

    Precision and recall (Kynkäänniemi et al. 2019, eqs. 1 and 2) ask how real the generated
    vectors are, and how much of the variety of the real ones is generated; one real outlier has a
    ball that much falls into. Density and coverage (Naeem et al. 2020, eqs. 3 and 4) count the
    balls, and look at those of the real vectors alone. Computed in float64.

    All four depend on the counts: compare figures of equal ones only.

    Args:
        real: feature vectors.
        generated: feature vectors.
        k: which neighbour bounds the balls of precision and recall; the paper's 3.
        density_k: of density and coverage; the paper's 5.

    Raises:
        ValueError: a k below 1, or not below the number of vectors whose balls it bounds.
    """
    centre = real.detach().cpu().double().mean(0)  # small numbers have small errors
    sets = {"real": real, "generated": generated}
    sets = {name: x.detach().cpu().double() - centre for name, x in sets.items()}
    for name, number in (("real", k), ("generated", k), ("real", density_k)):
        if not 1 <= number < len(sets[name]):
            raise ValueError(
                f"k must be at least 1 and below the number of images, not {number} for "
                f"{len(sets[name])} {name} ones: give more images"
            )
    real, generated = sets.values()
    near, dense = _radii(real, (k, density_k))
    [reach] = _radii(generated, (k,))
    precise, density = [], []
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = recalled.clone()
    for part, radii in zip(generated.split(BLOCK), reach.split(BLOCK), strict=True):
        distance, error = _distances(part, real)
        distance -= error  # a point on a ball is inside of it
        inside = distance <= dense
        precise.append((distance <= near).any(1))
        density.append(inside.sum(1) / density_k)
        recalled |= (distance <= radii[:, None]).any(0)
        covered |= inside.any(0)
    return Neighbourhoods(torch.cat(precise), recalled, torch.cat(density), covered)


def precision_recall(
    real: Float[Tensor, "R C"], generated: Float[Tensor, "G C"], k: int = 3
) -> tuple[float, float]:
    """Precision and recall of a generator, each in [0,1]; see `neighbourhoods`.

    Raises:
        ValueError: k below 1, or not below the number of vectors of either set.
    """
    found = neighbourhoods(real, generated, k, density_k=k)
    return float(found.precise.double().mean()), float(found.recalled.double().mean())


def _radii(points: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Of each point the squared distances to its k-th nearest others, for each k."""
    nearest = [  # the nearest of all is the point itself
        _distances(part, points)[0].topk(max(ks) + 1, dim=1, largest=False).values
        for part in points.split(BLOCK)
    ]
    return [torch.cat(nearest)[:, k] for k in ks]


def _distances(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances, by a product of matrices, and how far rounding may make them wrong."""
    norms = points.square().sum(1)[:, None] + others.square().sum(1)
    return (norms - 2 * points @ others.T).clamp(min=0), ROUNDING * norms


def kid(real: Float[Tensor, "R C"], generated: Float[Tensor, "G C"]) -> float:
    """Kernel Inception distance (Bińkowski et al. 2018), of any network's features.

    The squared maximum mean discrepancy with the kernel ``(x.y / C + 1)^3``, in the estimate
    without bias, over all pairs: it may be negative, and unlike FID it is not too large from few
    images. Computed in float64.

    Raises:
        ValueError: a set of fewer than two vectors.
    """
    for name, features in {"real": real, "generated": generated}.items():
        if len(features) < 2:
            raise ValueError(f"KID needs at least two {name} images, not {len(features)}")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> float:
        own = (x.square().sum(1) / x.shape[1] + 1) ** 3  # of each vector with itself
        return float(_total(kernel, x, x) - own.sum()) / (len(x) * (len(x) - 1))

    real, generated = (features.detach().cpu().double() for features in (real, generated))
    across = float(_total(kernel, real, generated)) / (len(real) * len(generated))
    return within(real) + within(generated) - 2 * across


def cmmd(real: Float[Tensor, "R C"], generated: Float[Tensor, "G C"]) -> float:
    """Distance of CMMD (Jayasumana et al. 2024), of any network's features.

    1000 times the squared maximum mean discrepancy with a Gaussian kernel of sigma 10, of features
    brought to unit length; each vector's pair with itself counts, as in the authors' code. CMMD
    proper takes the image embeddings of CLIP ViT-L/14 at 336 pixels. Computed in float64.

    Raises:
        ValueError: an empty set.
    """
    if not len(real) or not len(generated):
        raise ValueError("CMMD needs at least one image of either kind")
    gamma = 1 / (2 * CMMD_SIGMA**2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # both of unit length: |x - y|^2 = 2 - 2 x.y; less 1, since the distance is of small numbers
        return torch.expm1(-gamma * (2 - 2 * x @ y.T))

    real, generated = (
        F.normalize(features.detach().cpu().double(), dim=1) for features in (real, generated)
    )
    within = [float(_total(kernel, x, x)) / len(x) ** 2 for x in (real, generated)]
    across = float(_total(kernel, real, generated)) / (len(real) * len(generated))
    return max(0.0, CMMD_SCALE * (sum(within) - 2 * across))


def _total(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Sum of a kernel over all pairs of two sets."""
    return torch.stack([kernel(part, y).sum() for part in x.split(BLOCK)]).sum()


def diversity(features: Float[Tensor, "B S C"]) -> Float[Tensor, " B"]:
    """Mean distance of the S pictures of each prompt from one another, in [0, 2]; S from 2.

    The distance is 1 less the cosine of their features.
    """
    unit = F.normalize(features.double(), dim=-1)
    count = unit.shape[1]
    pairs = (unit @ unit.mT).sum((1, 2)) - count  # each with itself is 1
    return (1 - pairs / (count * (count - 1))).clamp(0, 2)


def clip_score(images: Float[Tensor, "B C"], texts: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """CLIPScore of each picture and its text (Hessel et al. 2021): ``2.5 max(cos, 0)``.

    Of the embeddings alone: neither the logit scale nor a bias that the network has takes part.
    The authors begin every text with "A photo depicts"; here it stands as it is.
    """
    cosine = F.cosine_similarity(images.double(), texts.double(), dim=-1)
    return CLIP_SCORE_WEIGHT * cosine.clamp(min=0)


def num_nearer(
    generated: Float[Tensor, "G ..."], real: Float[Tensor, "R ..."], truth: Int[Tensor, " G"]
) -> Int[Tensor, " G"]:
    """How many real images are nearer to each generated one than its own, ``real[truth]``.

    The distance is the mean squared error over pixels and colours.

    Raises:
        ValueError: generated images that hold NaN: nothing would be nearer to them.
    """
    if not generated.isfinite().all():
        raise ValueError("the generated images hold NaN or infinities")
    drawn = generated.flatten(1).cpu().double()
    real, truth = real.flatten(1).cpu(), truth.cpu()
    # |a - b|^2 without |a|^2, which is the same for all b
    own = real[truth].double()
    own = (own * (own - 2 * drawn)).sum(1, keepdim=True)
    nearer = torch.zeros_like(truth)
    for part in real.split(BLOCK):
        part = part.double()
        distance = part.square().sum(1) - 2 * drawn @ part.T
        # identical bitmaps (some flags) differ by rounding alone, and are no worse a find
        nearer += (distance < own - 1e-6).sum(dim=1)
    return nearer


def recall_at(
    generated: Float[Tensor, "G ..."],
    real: Float[Tensor, "R ..."],
    truth: Int[Tensor, " G"],
    k: int,
) -> float:
    """Share of generated images with fewer than k real ones nearer than their own; ties are hits.

    Args:
        generated: images.
        real: images of the same size, among which is searched.
        truth: which of ``real`` each generated one ought to be.
        k: from 1.
    """
    return float((num_nearer(generated, real, truth) < k).double().mean())


def codebook_usage(counts: Int[Tensor, " V"]) -> float:
    """Share of the codes that occur at all, in [0,1]."""
    return float((counts > 0).double().mean())


def entropy_bits(counts: Int[Tensor, " V"]) -> float:
    """Entropy of the codes' empirical distribution in bits: what a token costs, entropy-coded.

    From few tokens per code it comes out too low: codes that were not met count as impossible.
    """
    share = counts.double() / counts.sum()
    return float(-torch.special.xlogy(share, share).sum() / math.log(2)) + 0.0  # no -0


def perplexity(counts: Int[Tensor, " V"]) -> float:
    """Number of equally frequent codes with the same entropy, in [1, V]."""
    return 2 ** entropy_bits(counts)


def bits_per_pixel(bits_per_token: float, tokens: int, pixels: int) -> float:
    """Size of an image of ``pixels`` = H * W pixels in ``tokens`` tokens.

    Args:
        bits_per_token: log2 V in plain binary; `entropy_bits` with an ideal coder that knows the
            frequencies.
        tokens: per image.
        pixels: per image; a pixel is one place, not three colours.
    """
    return bits_per_token * tokens / pixels
