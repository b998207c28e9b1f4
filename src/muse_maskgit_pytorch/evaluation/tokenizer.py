"""What a tokenizer loses, what it uses of its codebook, what its tokens cost, how fast it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..features import FeatureNet, lpips_distance
from ..vqgan_vae import ImageTokenizer
from . import metrics
from .figures import Metric


@torch.no_grad()
def evaluate_tokenizer(
    vae: ImageTokenizer,
    dataset: Dataset[dict[str, Any]],
    features: FeatureNet | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    limit: int | None = None,
) -> dict[str, Metric]:
    """Encode and decode a set of images and judge the result.

    The figures do not depend on the batch size, the speeds do. The tokenizer is put on the device
    and, for the time being, in eval mode.

    Args:
        vae: the tokenizer.
        dataset: items ``{"image": (3,H,W) in [0,1]}``, all of one size.
        features: network for the perceptual distance and the Fréchet distance of the
            reconstructions (rFID); without one both are left out.
        batch_size: images at a time.
        device: where to compute.
        limit: take this many from the front of the set.

    Returns:
        "psnr", "ssim", "ms_ssim", "perceptual", "rfid", "codebook_usage", "perplexity",
        "bits_per_pixel", "bits_per_pixel_coded", "encode_images_per_s", "decode_images_per_s".

    Raises:
        ValueError: no images, a size that the tokenizer does not take or that SSIM is not defined
            for, a batch size or limit below 1.
    """
    for name, number in {"batch_size": batch_size, "limit": limit}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    total = len(dataset)  # type: ignore[arg-type]
    total = min(total, limit or total)
    if total < 1:
        raise ValueError("there are no images to evaluate the tokenizer on")
    device = torch.device(device)
    features = features and features.to(device)
    training = vae.training
    vae.to(device).eval()
    try:
        return _evaluate(vae, Subset(dataset, range(total)), features, batch_size, device)
    finally:
        vae.train(training)


def _evaluate(
    vae: ImageTokenizer,
    dataset: Subset,
    features: FeatureNet | None,
    batch_size: int,
    device: torch.device,
) -> dict[str, Metric]:
    sums: dict[str, float] = {}
    real, made = metrics.FeatureStatistics(), metrics.FeatureStatistics()
    counts = torch.zeros(vae.codebook_size, dtype=torch.int64)
    encoding = decoding = 0.0
    tokens = pixels = side = 0

    def add(name: str, per_image: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(per_image.cpu().double().sum())

    loader = DataLoader(dataset, batch_size)
    bar = tqdm(total=len(dataset), desc="evaluating", unit="image", dynamic_ncols=True)
    for number, batch in enumerate(loader):
        images = batch["image"].to(device)
        if number == 0:  # the first pass pays for kernels and memory; it is not timed
            vae.decode_from_ids(vae.encode_to_ids(images))
        ids, seconds = _timed(device, vae.encode_to_ids, images)
        encoding += seconds
        recon, seconds = _timed(device, vae.decode_from_ids, ids)
        decoding += seconds

        counts += ids.flatten().bincount(minlength=vae.codebook_size).cpu()
        tokens, pixels = ids[0].numel(), images[0, 0].numel()
        side = min(images.shape[-2:])
        recon = recon.float()
        add("psnr", metrics.psnr(images, recon))
        add("ssim", metrics.ssim(images, recon))
        add("ms_ssim", metrics.ms_ssim(images, recon))
        if features is not None:
            add("perceptual", lpips_distance(features.maps(images), features.maps(recon)))
            real.update(features.pooled(images))
            made.update(features.pooled(recon))
        bar.update(len(images))
    bar.close()

    total = len(dataset)
    scales = metrics.num_scales(side)
    notes = {
        "psnr": "dB, mean over images",
        "ssim": "mean over images",
        "ms_ssim": f"mean over images; {scales} of 5 scales at {side} px",
    }
    if features is not None:
        notes["perceptual"] = f"LPIPS without learned weights, {features.name}"
    found = {name: (sums[name] / total, note) for name, note in notes.items()}
    if features is not None and total > 1:
        distance = metrics.frechet_distance(real.mean, real.covariance, made.mean, made.covariance)
        note = f"{len(real.mean)} features of {features.name}, not Inception's"
        if total <= len(real.mean):
            note += "; fewer images than features: compare at equal numbers only"
        found["rfid"] = (distance, note)
    entropy = metrics.entropy_bits(counts)
    found |= {
        "codebook_usage": (metrics.codebook_usage(counts), f"share of {len(counts)} codes"),
        "perplexity": (metrics.perplexity(counts), f"from {total * tokens} tokens"),
        "bits_per_pixel": (
            metrics.bits_per_pixel(math.log2(vae.codebook_size), tokens, pixels),
            f"{tokens} tokens of {math.log2(vae.codebook_size):.4g} bits",
        ),
        "bits_per_pixel_coded": (
            metrics.bits_per_pixel(entropy, tokens, pixels),
            f"{entropy:.4g} bits a token, by the codes' frequencies here",
        ),
        "encode_images_per_s": (total / encoding, f"on {device}, {batch_size} at a time"),
        "decode_images_per_s": (total / decoding, f"on {device}, {batch_size} at a time"),
    }
    return {name: Metric(value, total, note) for name, (value, note) in found.items()}


def _timed(
    device: torch.device, function: Callable[[Tensor], Tensor], argument: Tensor
) -> tuple[Tensor, float]:
    """Result, and seconds it took, until the device is done with it."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    result = function(argument)
    wait()
    return result, time.perf_counter() - start
