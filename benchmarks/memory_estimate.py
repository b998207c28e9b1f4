"""The memory that `muse estimate` foretells against what training steps take, on this machine.

Each case runs in a process of its own: the growth of its resident memory at its highest, from
before the model is made, over steps with AdamW and averaged weights.

    python benchmarks/memory_estimate.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, TextEmbeds, VQGanVAE
from muse_maskgit_pytorch.training.ema import EMA, warmed_up
from muse_maskgit_pytorch.training.estimate import of_maskgit, sketched
from muse_maskgit_pytorch.training.optimizers import make_optimizer, trained_state
from muse_maskgit_pytorch.weights import sketching

TEXT = 32  # tokens
# What is freed leaves the process at once, as a GPU's allocator uses it again.
GIVEN_BACK = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CASES: dict[str, dict[str, Any]] = {
    "base, 256 tokens": dict(rows=8, dim=512, depth=6),
    "base, 1024 tokens": dict(rows=2, dim=384, depth=6, image_size=512),
    "superres, 1024 tokens": dict(rows=2, dim=384, depth=4, image_size=512, cond=256),
    "base, many weights": dict(rows=1, dim=1024, depth=6),
}


def make(dim: int, depth: int, image_size: int = 256, cond: int | None = None) -> MaskGit:
    vae = VQGanVAE(dim=32, factor=16, codebook_size=1024, quantizer="fsq")
    transformer = MaskGitTransformer(
        num_tokens=vae.codebook_size, seq_len=(image_size // 16) ** 2, dim=dim, depth=depth,
        heads=dim // 64, text_embed_dim=384, t5_name="none",
    )  # fmt: skip
    return MaskGit(vae=vae, transformer=transformer, image_size=image_size, cond_image_size=cond)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def step(model: MaskGit, optimizer: torch.optim.Optimizer, ema: EMA, rows: int) -> None:
    mask = torch.rand(rows, model.transformer.seq_len) < 0.64
    ids = torch.randint(model.vae.codebook_size, mask.shape)
    transformer: Any = model.transformer
    cond = transformer.cond_encoder
    terms = model.losses(
        ids, text_embeds=TextEmbeds(torch.randn(rows, TEXT, 384), torch.ones(rows, TEXT) > 0),
        cond_ids=None if cond is None else torch.randint(1024, (rows, int(cond.seq_len))),
        mask=mask,
    )  # fmt: skip
    terms.total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update(1)


def train(model: MaskGit, rows: int) -> None:
    optimizer = make_optimizer("adamw", model, 1e-4, (0.9, 0.96), 0.045)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    ema = EMA(trained_state(model), names, warmed_up(0.999))
    for _ in range(2):
        step(model, optimizer, ema, rows)


def measure(case: dict[str, Any]) -> int:
    rows = case.pop("rows")
    train(make(dim=64, depth=1), 1)  # what libraries take at their first use
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    train(make(**case), rows)
    return resident("VmHWM") - before


def foretell(case: dict[str, Any]) -> int:
    with sketching(10**6):
        model = make(**{k: v for k, v in case.items() if k != "rows"})
    with sketched():
        return of_maskgit(model.to_empty(device="cpu"), case["rows"], TEXT).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args().child
    if given:
        torch.set_num_threads(1)
        print(measure(json.loads(given)))
        return
    print(f"{'':<24}{'foretold':>10}{'measured':>10}")
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--child", json.dumps(case)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=GIVEN_BACK)
        told, taken = foretell(case), int(run.stdout)
        print(
            f"{name:<24}{told / 1e6:>7.0f} MB{taken / 1e6:>7.0f} MB{told / taken - 1:>+8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
