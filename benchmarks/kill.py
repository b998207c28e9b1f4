"""Killed at random moments and resumed, every kind of run ends as if nothing had happened.

    python benchmarks/kill.py --kills 50

Each case trains a tiny model in processes of its own that are ended by SIGKILL, half of the time
while they start and read their checkpoint, and else at any moment of training, saving and
validating; a last life ends the run. An unbroken run of as many steps must have the same weights,
averages, optimizer states and logged losses, to the last bit. Of a case with two processes all are
killed, or one of them, whereupon the launcher ends the other.

The data are small (32 pictures of 16 px, four classes); what is tried is the trainers', on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ENDLESS, SAVE_EVERY = 10**6, 2
CLASSES = ("red", "green", "blue", "grey")
CHECKPOINT = re.compile(r"\w+-checkpoint-(\d{8})(?:\.safetensors)?")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


# One life, in a process of its own ---------------------------------------------------------------


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i in range(32):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(CLASSES[i % 4])


class Stream:
    """The pictures without a length, and with a position."""

    def __init__(self, folder: Path):
        self.files, self.place = sorted(folder.glob("*.png")), 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.place < len(self.files):
            file = self.files[self.place]
            self.place += 1
            yield {"image": Image.open(file), "text": file.with_suffix(".txt").read_text()}
        self.place = 0


def trainer(case: str, work: Path, results: Path, steps: int) -> Any:
    import muse_maskgit_pytorch as muse

    common: dict[str, Any] = dict(
        batch_size=2, grad_accum_every=2, num_train_steps=steps, lr=1e-3, lr_schedule="constant",
        warmup_steps=4, ema_decay=0.9, results_folder=str(results), resume=True, log_every=1,
        sample_every=6, save_every=SAVE_EVERY, keep_checkpoints=2, max_valid=4,
    )  # fmt: skip
    # not the weights of the first life: the checkpoint must bring all
    torch.manual_seed(os.getpid() if any(results.glob("*-checkpoint-*")) else 0)
    if case == "tokenizer":
        vae = muse.VQGanVAE(dim=16, codebook_size=48, layers=2, num_res_blocks=1, quantizer="vq")
        return muse.VQGanVAETrainer(
            vae, folder=str(work / "images"), image_size=16, perceptual_weight=0, gan_weight=0.1,
            gan_start=2, gan_ramp=4, lecam_weight=0.1, discriminator_dim=8, **common,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(123)  # the tokenizer is frozen, and no checkpoint's
        vae = muse.VQGanVAE(dim=8, codebook_size=60, layers=2, num_res_blocks=1, quantizer="fsq")
    if case == "LoRA":
        torch.manual_seed(0)  # so is the base of an adapter
    more: dict[str, Any] = {"superres": dict(cond_image_size=8)}.get(case, {})
    model = muse.MaskGit(
        vae=vae, image_size=16, self_token_critic=case == "self-critic", **more,
        transformer=muse.MaskGitTransformer(
            num_tokens=60, seq_len=16, dim=16, depth=2, dim_head=8, heads=2, classes=CLASSES
        ),
    )  # fmt: skip
    given: dict[str, Any] = dict(folder=str(work / "images"))
    if case == "stream":
        given = dict(data=Stream(work / "images"), shuffle_buffer=7, cache_tokens=False)
    elif case == "cache":
        given = dict(cache=str(work / "cache"))
        source = muse.ImageFolder(work / "images", 16, captions=True)
        muse.write_cache(work / "cache", model, source)  # as it stands, if it is whole
    elif case == "LoRA":
        given |= dict(lora_rank=2)
    return muse.MaskGitTrainer(model, num_samples=2, **given, **common)


def live(case: str, work: Path, results: Path, steps: int) -> None:
    torch.set_num_threads(1)
    trainer(case.removesuffix(" sharded").removesuffix(" by two"), work, results, steps).train()


# The one who kills -------------------------------------------------------------------------------

CASES = (
    "tokenizer", "base", "superres", "self-critic", "LoRA", "stream", "cache",
    "superres by two", "base by two sharded",
)  # fmt: skip


class Killer:
    """Runs a case's lives in a folder.

    Args:
        case: one of `CASES`.
        work: has the pictures; each run has a folder in it.
        draw: gives the random moments.
    """

    def __init__(self, case: str, work: Path, draw: torch.Generator):
        self.case, self.work, self.draw = case, work, draw
        self.killed, self.unbroken = (work / f"run {case}" / name for name in ("killed", "whole"))
        self.killed.mkdir(parents=True)
        self.unbroken.mkdir()

    def start(self, results: Path, steps: int) -> subprocess.Popen[bytes]:
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        how: list[str] = []
        if "by two" in self.case:
            how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            env |= FSDP if "sharded" in self.case else {}
        call = [sys.executable, *how, __file__, "--life", self.case, str(self.work), str(results)]
        with open(results.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                [*call, str(steps)], env=env, stdout=log, stderr=log, start_new_session=True
            )

    def uniform(self, limit: float) -> float:
        return limit * float(torch.rand((), generator=self.draw))

    def newest(self) -> int:
        names = (CHECKPOINT.fullmatch(path.name) for path in self.killed.iterdir())
        return max((int(name[1]) for name in names if name), default=0)

    def kill(self, moment: Callable[[], bool], delay: float) -> float:
        """One life, ended ``delay`` seconds after the moment; how long it took to the moment."""
        began = time.monotonic()
        process = self.start(self.killed, ENDLESS)
        try:
            while not moment() and process.poll() is None:
                time.sleep(0.002)
            took = time.monotonic() - began
            time.sleep(delay)
            if process.poll() is not None:
                raise SystemExit(f"{self.case} ended by itself: {self.log()}")
            workers = children(process.pid)
            if workers and self.uniform(1) < 0.5:  # one alone; the launcher ends the other
                os.kill(workers[int(self.uniform(len(workers)))], signal.SIGKILL)
                process.wait(120)
        finally:
            if process.poll() is None:
                # a launcher's workers have sessions of their own, and live on without it
                os.kill(process.pid, signal.SIGSTOP)
                for pid in (*children(process.pid), process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        return took

    def log(self) -> str:
        return self.killed.with_suffix(".log").read_text(errors="replace")[-3000:]

    def run(self, kills: int) -> tuple[int, int]:
        """Kill so many lives, and compare; the steps that were trained, and how often resumed."""
        pace, resumed = 0.0, 0
        for life in range(kills):
            reached = self.newest()
            resumed += reached > 0
            aim = reached + SAVE_EVERY * (1 + int(self.uniform(3)))
            if life % 2 and pace:  # as it starts, or reads
                self.kill(lambda: True, self.uniform(pace))
            else:
                took = self.kill(lambda aim=aim: self.newest() >= aim, self.uniform(0.3))
                pace = pace or took
        steps = self.newest() + 3
        for results in (self.killed, self.unbroken):
            process = self.start(results, steps)
            if process.wait(600):
                raise SystemExit(f"{self.case} failed: {self.log()}")
        self.compare()
        return steps, resumed

    def compare(self) -> None:
        from muse_maskgit_pytorch.checkpoint import load_tree

        for path in self.unbroken.rglob("*.safetensors"):
            other = self.killed / path.relative_to(self.unbroken)
            if "-cache" in str(path) or ("-checkpoint-" in str(path) and not other.exists()):
                continue  # an older one
            if path.parent.name == "shards" or path.name.startswith("adapter"):
                from safetensors.torch import load_file

                pair: list[Any] = [load_file(p) for p in (path, other)]
            else:
                pair = [load_tree(p)[0] for p in (path, other)]
            for tree in pair:
                tree.pop("written", None)
            different(pair[0], pair[1], f"{self.case}: {path.name}")
        losses = [curve(folder) for folder in (self.killed, self.unbroken)]
        assert losses[0] == losses[1], f"{self.case}: the logged losses differ"


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def curve(results: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def different(a: Any, b: Any, at: str) -> None:
    """End with the place of the first difference, if there is one."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            different(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            different(x, y, f"{at}/{i}")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            raise SystemExit(f"{at} differs")
    elif a != b:
        raise SystemExit(f"{at}: {a} and {b}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of all cases together")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--work", type=Path, default=Path("runs/kill"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--life", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.life:
        case, work, results, steps = args.life
        live(case, Path(work), Path(results), int(steps))
        return
    if args.work.exists():
        parser.error(f"{args.work} is there already: remove it, or give another --work")
    pictures(args.work / "images")
    draw = torch.Generator().manual_seed(args.seed)
    for number, case in enumerate(args.cases):
        kills = args.kills * (number + 1) // len(args.cases) - args.kills * number // len(
            args.cases
        )
        began = time.monotonic()
        steps, resumed = Killer(case, args.work.absolute(), draw).run(kills)
        print(
            f"{case:22} {kills:3} kills, {resumed:3} of them in a resumed run, {steps:4} steps: "
            f"equal to the unbroken run ({time.monotonic() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
