"""What each part of the design is worth: runs of the same length that differ in one thing.

    python examples/emoji/make_dataset.py --out data/emoji
    python benchmarks/ablation.py --steps 400

Task, figures and files are those of `learning.py`; each row has the same seeds, batches and number
of steps. An optimizer's learning rate is the best of ``--lrs``, by the loss of one seed; all other
rows have ``--optimizer`` and its rate. The averages of weights are those of the first row's runs.
What the package gives no choice of is changed from outside (`learning_worker.alter`).
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

learning: Any = import_module("learning")  # beside this file
spread = learning.spread

ROWS: dict[str, dict[str, Any]] = {
    "as it is": {"averages": True},
    "optimizer: adamw": {"optimizer": "adamw"},
    "optimizer: adafactor": {"optimizer": "adafactor"},
    "optimizer: muon": {"optimizer": "muon"},
    "mask law: linear": {"maskgit": {"noise_schedule": "linear"}},
    "mask law: beta:12,3": {"maskgit": {"noise_schedule": "beta:12,3"}},
    "mask law: gaussian:0.55,0.25": {"maskgit": {"noise_schedule": "gaussian:0.55,0.25"}},
    "label smoothing 0.1": {"maskgit": {"label_smoothing": 0.1}},
    "no QK-norm": {"alter": "no QK-norm"},
    "plain MLP": {"alter": "plain MLP"},
    "no zero-init": {"alter": "no zero-init"},
    "RoPE": {"alter": "RoPE"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--optimizer", default="muon", help="of the rows that name none")
    args = parser.parse_args()
    args.rows = [row for row in args.rows if ROWS[row].get("optimizer") != args.optimizer]
    task = learning.Task(args.data, args.out)
    common: dict[str, Any] = dict(
        ours=True, steps=args.steps, looks=4, weight_decay=0.01, maskgit={}
    )

    def run(row: str, lr: float, seed: int) -> dict[str, Any]:
        spec = {"optimizer": args.optimizer, **common, **ROWS[row], "lr": lr, "seed": seed}
        name = f"{row.replace(' ', '-').replace(':', '')}-{lr:g}-{args.steps}-{seed}"
        return task.run(name, spec)

    def tuned(row: str) -> float:
        ends = {lr: run(row, lr, args.seeds[0])["curve"][-1][2] for lr in args.lrs}
        return min(ends, key=lambda lr: ends[lr])

    plain = tuned("as it is")
    rates = {row: tuned(row) if "optimizer" in ROWS[row] else plain for row in args.rows}
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in args.rows}
    for seed in args.seeds:  # a row has its first figures early
        for row in args.rows:
            runs[row].append(run(row, rates[row], seed))
    print(f"\n{'':30} {'lr':>6} {'loss':>15} {'R@1':>15} {'CPU s':>6} {'parameters':>11}")
    for row, results in runs.items():
        line(row, f"{rates[row]:g}", [r["curve"][-1][2] for r in results], results)
        print(f" {mean(r['seconds'] for r in results):6.0f} {results[0]['parameters']:>11,}")
    for name in import_module("learning_worker").AVERAGES:
        parts = [result[name] for result in runs[args.rows[0]]]
        line(f"average {name}", "", [part["loss"] for part in parts], parts)
        print()


def line(name: str, lr: str, losses: list[float], results: list[dict[str, Any]]) -> None:
    recalls = spread([result["recall"] for result in results])
    print(f"{name:30} {lr:>6} {spread(losses):>15} {recalls:>15}", end="")


if __name__ == "__main__":
    main()
