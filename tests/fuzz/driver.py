"""Runs a seeded fuzzer: many damaged inputs, and what must hold for every one of them.

A fuzzer is a function that is given a random generator, tries one input and returns a word for what
came of it ("loaded", "refused"). The same seed and number give the same input on every machine::

    def test_records():
        run("records", seed=3, one=try_a_record, default=40)

``MUSE_FUZZ_CASES`` sets the number of inputs of every fuzzer, ``MUSE_FUZZ_FIRST`` the first of
them: so one failing case, whose number is printed, is tried alone. `make fuzz` runs thousands.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Random = np.random.Generator
MEGABYTES, SECONDS = 300, 20  # that no single input may take


def cases(seed: int, n: int, first: int = 0) -> Iterator[tuple[int, Random]]:
    """Numbers of cases, each with a random generator of its own."""
    for number in range(first, first + n):
        yield number, np.random.default_rng([seed, number])


def run(
    name: str,
    seed: int,
    one: Callable[[Random], str],
    default: int,
    megabytes: float = MEGABYTES,
    seconds: float = SECONDS,
) -> Counter[str]:
    """Try many inputs, and print how often each outcome was.

    Args:
        name: of the fuzzer, for the printed line and for failures.
        seed: of its inputs.
        one: tries one input; what it returns is counted, what it raises is a failure.
        default: number of inputs, unless ``MUSE_FUZZ_CASES`` says otherwise.
        megabytes: by which no input may raise the process's memory.
        seconds: that no input may take.
    """
    number_of = int(os.environ.get("MUSE_FUZZ_CASES", default))
    first = int(os.environ.get("MUSE_FUZZ_FIRST", 0))
    found: Counter[str] = Counter()
    for number, random in cases(seed, number_of, first):
        start, before = time.monotonic(), memory()
        try:
            found[one(random)] += 1
            took = time.monotonic() - start
            grown = memory() - before
            assert took < seconds, f"it took {took:.1f} s"
            assert grown < megabytes, f"memory grew by {grown:.0f} MB"
        except BaseException as error:
            error.add_note(f"{name}: case {number} of seed {seed} (MUSE_FUZZ_FIRST={number})")
            raise
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
    print(f"\nfuzz {name}: {number_of} cases, {said}")
    return found


def memory() -> float:
    """The most memory that this process has had since the last call, in MB."""
    try:  # Linux can forget the peak, so that a small one after a large one shows
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
        Path("/proc/self/clear_refs").write_text("5")
        return peak
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# Damage ------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**20, 2**31, 2**63, 10**30, -(2**40), 0.5, 1e308, float("nan"),
    float("inf"), "", "8", "none", "\x1b[31m", "\ud83d", "a\0b", "../../etc", "é" * 1000, [], {},
    [[]], [0] * 1000, {"": None}, {"kind": "VQGanVAE", "config": {}}, {"tensor": "none"},
)  # fmt: skip


def odd(random: Random) -> Any:
    """Something that hardly anybody expects."""
    if random.random() < 0.03:
        return deep(int(random.choice([20, 300])))
    return ODD[random.integers(len(ODD))]


def deep(levels: int) -> Any:
    """Lists in lists."""
    node: Any = 1
    for _ in range(levels):
        node = [node]
    return node


def damaged_bytes(random: Random, raw: bytes) -> bytes:
    """Cut off, flipped, filled with zeros, repeated or taken out."""
    data, size = bytearray(raw), len(raw)
    start = int(random.integers(size + 1))
    if random.random() < 0.5:  # most of what matters stands at the beginning
        start = min(start, int(random.integers(200)))
    end = min(size, start + int(random.choice([1, 8, 100, size])))
    match random.integers(6):
        case 0:
            return raw[:start]
        case 1:
            for _ in range(random.integers(1, 9)):
                data[random.integers(size)] ^= 1 << random.integers(8)
        case 2:
            data[start:end] = bytes(end - start)
        case 3:
            data[start:start] = data[start:end]
        case 4:
            del data[start:end]
        case _:
            data[start:end] = random.bytes(end - start)
    return bytes(data)


def damaged(random: Random, tree: Any) -> Any:
    """A tree of lists and dicts in which one node, drawn evenly, is another, gone or doubled."""
    places = list(_places(tree))
    if not places:
        return odd(random)
    path = places[random.integers(len(places))]
    return _changed(random, tree, path)


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*path, key))


def _changed(random: Random, node: Any, path: tuple[Any, ...]) -> Any:
    key, *rest = path
    made = node.copy()
    if rest:
        made[key] = _changed(random, node[key], tuple(rest))
        return made
    match random.integers(5):
        case 0:
            del made[key]
        case 1 if isinstance(made, list):
            made.insert(key, made[key])
        case 1:
            made[f"{key}x"] = made.pop(key)
        case 2 if isinstance(made[key], (int, float)) and not isinstance(made[key], bool):
            made[key] = made[key] * int(random.choice([-1, 0, 2, 1000, 10**6]))
        case _:
            made[key] = odd(random)
    return made
