"""`muse average`: a run's averaged weights of any length, or the average of saved models."""

from __future__ import annotations

from ..files import check_output
from ..training.averages import offline_average, posthoc_average
from .parser import Parser


def average(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    out = check_output("--out", config.out, ".safetensors")
    if config.length is None:
        if config.stage is not None:
            raise ValueError("--stage is of a run's snapshots: give --length too")
        decay = 0.7 if config.decay is None else config.decay
        print(offline_average(config.sources, None if decay == "uniform" else decay).save(out))
        return
    if len(config.sources) > 1 or config.decay is not None:
        raise ValueError(
            "--length is of one run's snapshots: give its folder alone, and no --decay"
        )
    model, error = posthoc_average(config.sources[0], config.length, config.stage)
    print(model.save(out))
    print(f"length {config.length:g}, to within {error:.2%} of its profile")
