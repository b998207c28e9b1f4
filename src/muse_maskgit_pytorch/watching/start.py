"""What is known of a run before its first step: said in a few lines, and judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def summary(run: Mapping[str, Any], image_size: int, sides: Sequence[int]) -> list[str]:
    """The lines that a run begins with.

    Args:
        run: its description, as its `RunFile` holds it.
        image_size: side of the squares that it trains on, in pixels.
        sides: of the largest crops of some of its images, as they are stored.
    """
    settings, data, device = run["settings"], run["data"], run["device"]
    endless = data["items"] is None
    images = 0 if endless else data["items"] - data["held_back"]
    left_out = ", ".join(f"{count:,} that {why}" for why, count in data["left_out"].items())
    trained, frozen = (_parts(run["parameters"][kind]) for kind in ("trained", "frozen"))
    processes = f", {device['processes']} processes" if device["processes"] > 1 else ""
    batch, steps = _batch(run), settings["num_train_steps"]
    lines = [
        f"{run['stage']}: {'a stream' if endless else f'{images:,} images'} to train on, "
        f"{data['held_back']:,} held back for "
        f"validation, of {data['source']}",
        f"left out: {left_out}" if left_out else "",
        f"sizes: largest crops of {_span(sides)} px, trained at {image_size}" if sides else "",
        f"parameters: {trained}" + (f"; {frozen} stay as they are" if frozen else ""),
        f"device: {device['kind']}, {PRECISIONS[settings['mixed_precision']]}{processes}",
        f"steps: {steps:,} of {batch:,} image{'s' * (batch > 1)} each, "
        + _epochs(steps * batch, batch, images),
    ]
    return [line for line in lines if line]


def defeats(run: Mapping[str, Any], image_size: int, sides: Sequence[int]) -> Iterator[str]:
    """Settings that defeat the run: what they do, and what to do. Arguments as of `summary`."""
    settings = run["settings"]
    lr, warmup, steps = (settings[name] for name in ("lr", "warmup_steps", "num_train_steps"))
    if warmup > steps:
        yield (
            f"warmup_steps={warmup:,} is longer than the run: the learning rate ends at "
            f"{steps / warmup:.0%} of lr={lr:g} and never falls; set warmup_steps to "
            f"{max(1, steps // 10):,} or so, or train longer"
        )
    if lr == 0:
        yield "lr=0: nothing is learnt; set a learning rate, such as 1e-4"
    precision = settings["mixed_precision"]
    if precision not in ("no", *run["device"]["fast precisions"]):
        yield (
            f"this device computes {PRECISIONS[precision]} in software, many times slower than "
            "float32: set mixed_precision=no"
        )
    small = sorted(side for side in sides if side < image_size)
    if 2 * len(small) > len(sides):
        typical = small[len(small) // 2]
        yield (
            f"the images are enlarged: {len(small)} of {len(sides)} looked at are smaller than "
            f"image_size={image_size} (typically {typical} px), and the model learns the blur; "
            f"train at {typical} px or less, or use larger images"
        )


def count_parameters(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """Parameters that are "trained" and that are "frozen", by part.

    Args:
        modules: the first is the model, whose parts are counted one by one.
    """
    counts: dict[str, dict[str, int]] = {"trained": {}, "frozen": {}}
    for place, (name, module) in enumerate(modules.items()):
        for path, parameter in module.named_parameters():
            part = name if place else path.partition(".")[0]
            kind = counts["trained" if parameter.requires_grad else "frozen"]
            kind[part] = kind.get(part, 0) + parameter.numel()
    return counts


def _batch(run: Mapping[str, Any]) -> int:
    """Images of one optimizer step, of all processes together."""
    settings = run["settings"]
    share = settings["batch_size"] * settings["grad_accum_every"]
    return share * run["device"]["processes"]


def _parts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_large(number)}" for name, number in counts.items())


def _epochs(samples: int, batch: int, images: int) -> str:
    """How often a run sees its images; of a stream, how many."""
    if not images:
        return f"{samples:,} in all"
    return f"{_about(images / batch)} to an epoch: {_about(samples / images)} epochs in all"


def _large(number: int) -> str:
    """A number with three digits: 940, 12.3 k, 4.56 M."""
    power = min(3, int(math.log10(max(1, number))) // 3)
    return f"{number / 1000**power:.3g} {' kMG'[power]}".strip()


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _about(number: float) -> str:
    """Two digits below ten, whole numbers above."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"
