"""A text encoder in each precision: CPU time, and how far its states are from those of float32.

    python examples/scenes/sprites.py
    OMP_NUM_THREADS=1 python benchmarks/text_precision.py

encodes the first captions of `examples/scenes`, in turns, and prints the median and the least.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

import torch.nn.functional as F

from muse_maskgit_pytorch.text import TextEncoder, TextPrecision

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from scenes import Scenes  # noqa: E402


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    data = Scenes(args.sprites, size=64)
    texts = [data.scene(number).caption.text for number in range(args.captions)]
    encoders = {each: TextEncoder(args.encoder).at(each) for each in get_args(TextPrecision)}
    states = {name: encoder.encode(texts) for name, encoder in encoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(args.rounds):
        for name, encoder in encoders.items():
            encoder.forget()
            before = time.process_time()
            encoder.encode(texts)
            seconds[name].append(time.process_time() - before)
    real = states["float32"].mask
    exact = states["float32"].embeds[real]
    for name, found in states.items():
        here = found.embeds[real]
        cosine = float(F.cosine_similarity(here, exact, dim=-1).min())
        apart = float((here - exact).norm() / exact.norm())
        times = sorted(seconds[name])
        print(
            f"{name:9} {1000 * times[len(times) // 2]:6.0f} ms, least {1000 * times[0]:.0f} ms; "
            f"relative difference {apart:.4f}, least cosine {cosine:.5f}"
        )


if __name__ == "__main__":
    main()
