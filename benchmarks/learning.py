"""Learning efficiency: the loss after equally many CPU seconds, ours and the 0.3.5 release's.

    python examples/emoji/make_dataset.py --out data/emoji
    python benchmarks/learning.py --release-python release-env/bin/python --seconds 240

(how to make the release's environment stands at the top of `speed.py`). The images become ids
once, by the shipped tokenizer, and the captions embeddings by the shipped text encoder. Every run
is a process of one thread with a budget of CPU seconds for its training steps
(`learning_worker.py`). All get the same batches in the same order, the same betas, clipping and
warm-up, a cosine that ends with the budget, and drop a tenth of the texts. "ours/3" has a third of
the budget: the goal is the release's final loss.

The validation loss is that of the 197 held-out captions' images, in nats per masked token, texts
seen: the ratios at equal distances of the cosine law, the same masks for all. R@1 is the share of
pictures drawn from these captions, by one plain sampler for all, that are nearer to their own true
picture than to any other of the 3,655 (squared error of pixels). Runs that stand in ``--out`` are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from muse_maskgit_pytorch import ImageFolder, Muse, TokenCache, write_cache
from muse_maskgit_pytorch.evaluation.metrics import recall_at

WORKER = Path(__file__).with_name("learning_worker.py")


class Task:
    """The emoji as ids and embeddings, and their pictures to find the drawn ones among."""

    def __init__(self, data: Path, out: Path):
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.tokens = out / "tokens.safetensors"
        self.model = Muse.from_pretrained("scenes").base
        sets = {s: ImageFolder(data / "64" / s, 64, captions=True) for s in ("heldout", "train")}
        if not self.tokens.exists():
            self._encode(sets)
        images = [dataset[row]["image"] for dataset in sets.values() for row in range(len(dataset))]
        self.images = torch.stack(images)

    def _encode(self, sets: dict[str, ImageFolder]) -> None:
        tensors: dict[str, Tensor] = {}
        for split, dataset in sets.items():
            folder = self.out / f"tokens-{split}"
            write_cache(folder, self.model, dataset)
            cache = TokenCache(folder, self.model)
            batch = cache.__getitems__(range(len(cache)))
            assert batch.ids is not None
            assert batch.text_embeds is not None
            tensors[f"{split}/ids"] = batch.ids.int()
            tensors[f"{split}/embeds"] = batch.text_embeds.embeds.half()
            tensors[f"{split}/mask"] = batch.text_embeds.mask
        save_file(tensors, self.tokens)

    @torch.no_grad()
    def recall(self, ids: list[list[int]]) -> float:
        """R@1 of pictures of the held-out captions."""
        drawn = self.model.decode(torch.tensor(ids))
        return recall_at(drawn, self.images, torch.arange(len(ids)), 1)

    def run(self, name: str, spec: dict[str, Any], python: str = sys.executable) -> dict[str, Any]:
        """The result of one run, which a process of its own makes unless it stands in a file."""
        path = self.out / f"{name}.json"
        if not path.exists():
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            if not spec["ours"]:
                env.pop("PYTHONPATH", None)  # it may lead to our package, which has the same name
            call = [python, str(WORKER), json.dumps({**spec, "data": str(self.tokens)})]
            done = subprocess.run(call, env=env, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            for part in (result, *(p for p in result.values() if isinstance(p, dict))):
                part["recall"] = self.recall(part.pop("ids"))
            path.write_text(json.dumps(result))
            loss = result["curve"][-1][2]
            print(f"{name}: loss {loss:.4f}, R@1 {result['recall']:.3f}", flush=True)
        return json.loads(path.read_text())


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--release-python", default=None)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--release-lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", default="adamw", help="of ours")
    parser.add_argument("--only", nargs="+", default=["release", "ours", "ours/3"])
    args = parser.parse_args()
    task = Task(args.data, args.out)
    sides: dict[str, dict[str, Any]] = {
        "release": dict(ours=False, lr=args.release_lr, optimizer="adamw", seconds=args.seconds),
        "ours": dict(ours=True, lr=args.lr, optimizer=args.optimizer, seconds=args.seconds),
        "ours/3": dict(ours=True, lr=args.lr, optimizer=args.optimizer, seconds=args.seconds / 3),
    }
    sides = {side: spec for side, spec in sides.items() if side in args.only}
    if "release" in sides and args.release_python is None:
        parser.error("--release-python is missing, or leave out the release: --only ours ours/3")
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in args.seeds:
        for side, spec in sides.items():
            spec |= dict(seed=seed, weight_decay=0.01, maskgit={})
            name = f"{side.replace('/', '-')}-{spec['optimizer']}-{spec['lr']:g}"
            python = sys.executable if spec["ours"] else args.release_python
            results[side].append(task.run(f"{name}-{spec['seconds']:g}s-{seed}", spec, python))
    goal = None
    for side, spec in sides.items():
        runs = results[side]
        ends = [r["curve"][-1][2] for r in runs]
        goal = mean(ends) if side == "release" else goal
        times = [next((c[0] for c in r["curve"] if goal and c[2] <= goal), None) for r in runs]
        print(
            f"{side:8} {runs[0]['parameters']:>9,} parameters, {spec['seconds']:g} s, "
            f"{mean(r['steps'] for r in runs):.0f} steps: loss {spread(ends)}, R@1 "
            f"{spread([r['recall'] for r in runs])}; the release's final loss at "
            f"{[None if t is None else round(t, 1) for t in times]} s"
        )


if __name__ == "__main__":
    main()
