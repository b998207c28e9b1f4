"""What `muse generate "red apple"` costs from a cold shell, part by part, in CPU seconds.

    python benchmarks/startup.py --against ../older-checkout/src

Every figure is the median over fresh processes of one thread, user and system time together. With
``--against`` whole commands of another checkout are run in turns with those of this one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[1] / "src"
COMMANDS = {
    "muse generate 'red apple'": ["generate", "red apple", "--seed", "1"],
    "muse --help": ["--help"],
    "muse generate --help": ["generate", "--help"],
    "muse train superres --help": ["train", "superres", "--help"],
    "muse generate --sed 1": ["generate", "red apple", "--sed", "1"],
    "muse generat": ["generat"],
}
# The same work as the command's, with a look at the clock between its parts.
PARTS = """
import time
clock = [("python", 0.0, time.process_time())]
def lap(name):
    clock.append((name, clock[-1][2], time.process_time()))
from muse_maskgit_pytorch.cli import options
config = options.generate_parser().read(["red apple", "--seed", "1", "--out", "out.png"])
lap("options")
import torch
lap("torch")
from muse_maskgit_pytorch.cli import drawing, generate
from muse_maskgit_pytorch.images import save_png
lap("this package")
model = drawing.open_drawing_model(config)
lap("weights")
from muse_maskgit_pytorch.text import get_text_encoder
conditioner = model.base.transformer
get_text_encoder(conditioner.text_encoder, conditioner.max_text_len).encode(["red apple"])
lap("text encoder and text")
[request] = drawing.new_requests(config.prompts, config, model)
images = model.pictures(model.draw(request, None))
lap("drawing")
save_png(images[0], config.out)
lap("file")
for name, start, end in clock:
    print(name, end - start, sep="\\t")
"""


def seconds(source: Path, words: list[str], folder: str) -> tuple[float, str]:
    """CPU seconds of a Python process, and what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(source.resolve()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):  # 2: an option is refused
        raise RuntimeError(f"{words} failed: {done.stderr}")
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, done.stdout


def parts(runs: int, folder: str) -> Iterator[tuple[str, float]]:
    """The parts of drawing a picture, in their order."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        for line in seconds(HERE, ["-c", PARTS], folder)[1].splitlines():
            name, spent = line.split("\t")
            found.setdefault(name, []).append(float(spent))
    return ((name, median(each)) for name, each in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="fresh processes for each figure")
    parser.add_argument("--against", type=Path, help="src folder of another checkout")
    options = parser.parse_args()
    sources = [HERE, *([options.against] if options.against else [])]
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'':<28} {'here':>7}" + " against   ratio" * (len(sources) - 1))
        for name, words in COMMANDS.items():
            command = ["-m", "muse_maskgit_pytorch.cli.main", *words]
            rounds = [
                [seconds(at, command, folder)[0] for at in sources] for _ in range(options.runs)
            ]
            middle = [median(each) for each in zip(*rounds, strict=True)]
            ratios = [f" {there:>7.2f} {there / middle[0]:>7.1f}" for there in middle[1:]]
            print(f"{name:<28} {middle[0]:>7.2f}" + "".join(ratios), flush=True)
        print()
        for name, spent in parts(options.runs, folder):
            print(f"{name:<28} {spent:>7.2f}")


if __name__ == "__main__":
    main()
