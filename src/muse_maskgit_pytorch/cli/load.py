"""`muse bench-serve`: how a server does under load."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from ..arguments import real, whole
from ..serving.load import Kind, Target, lines, measure, write
from .parser import Parser

PROMPTS = (
    "a red apple",
    "a sailboat on a light blue background",
    "three butterflies on a green background",
    "a fox in 3D style",
    "a big rocket above a small house",
)


def bench_serve(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    seconds = real("--seconds", config.seconds, 0.1)
    timeout = real("--timeout", config.timeout, 0.1)
    rate = None if config.rate is None else real("--rate", config.rate, 0.001)
    loads = [real("--loads", load, 0.001) for load in config.loads]
    clients = whole("--clients", config.clients, 1)
    prompts = PROMPTS
    if config.prompts is not None:
        text = Path(config.prompts).read_text(encoding="utf-8")
        prompts = tuple(line for line in text.splitlines() if line.strip())
        if not prompts:
            raise ValueError(f"{config.prompts} holds no prompt")
    kinds = [Kind(*each) for each in product(config.timesteps or [None], config.sizes or [None])]
    target = Target(config.url, prompts, kinds, config.token, timeout, config.seed)
    count = len(loads) + (rate is None)
    print(
        f"muse: {count} times {seconds:g} seconds, each until the last answer",
        file=sys.stderr,
    )
    found = measure(target, loads, seconds, clients, rate)
    print("\n".join(lines(found)))
    for path in write(found, Path(config.out)):
        print(path)
