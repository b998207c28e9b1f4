"""What happens to a tokenizer when the discriminator starts, with each guard alone and with all.

    python benchmarks/quantizers.py --steps 1000 --only fsq-1024
    python benchmarks/gan.py --vae runs/quantizers/fsq-1024/vae-ema.safetensors

continues one trained tokenizer on the same images in several ways: without an adversary, with all
guards (adaptive weight, ramp, LeCam, slow discriminator, clipping and skipped spikes), with none,
with one alone, and with all but the adaptive weight. It prints PSNR and rFID on held-out images
(mean over the seeds) and draws the curves of the first seed (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer
from muse_maskgit_pytorch.data import ImageFolder
from muse_maskgit_pytorch.evaluation import evaluate_tokenizer
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.training.guard import Diverged
from muse_maskgit_pytorch.watching.report import read_curves

START = 100  # step at which the discriminator starts
GUARDS: dict[str, dict[str, Any]] = {
    "adaptive": {"gan_adaptive": True},
    "ramp": {"gan_ramp": 100},
    "LeCam": {"lecam_weight": 0.01},
    "slow discriminator": {"discriminator_lr": 2e-4},
    "clipping": {"max_grad_norm": 1.0, "max_spike": 10.0},
}
OFF: dict[str, Any] = {
    "gan_weight": 0.1,
    "gan_start": START,
    "gan_adaptive": False,
    "gan_ramp": 0,
    "lecam_weight": 0.0,
    "max_grad_norm": 0.0,
    "max_spike": 0.0,
    "discriminator_dim": 32,
    "discriminator_layers": 2,
}
GUARDED = {key: value for guard in (OFF, *GUARDS.values()) for key, value in guard.items()}
RUNS: dict[str, dict[str, Any]] = {
    "no adversary": {"gan_weight": 0.0},
    "guarded": GUARDED,
    "guarded without adaptive": {**GUARDED, "gan_adaptive": False},
    "guards off": OFF,
    **{f"{name} alone": {**OFF, **guard} for name, guard in GUARDS.items()},
}
DRAWN = ("no adversary", "guarded", "guarded without adaptive", "guards off", "adaptive alone")


def run(name: str, seed: int, out: Path, args: argparse.Namespace) -> dict[str, float | str]:
    """Continue the tokenizer in one way, unless that was done before, and judge the result."""
    file = out / "result.json"
    if file.is_file():
        return json.loads(file.read_text())
    torch.manual_seed(seed)  # the trainer's seed begins with its steps: the discriminator's weights
    trainer = VQGanVAETrainer(
        VQGanVAE.from_pretrained(args.vae),
        folder=f"{args.folder}/train",
        image_size=64,
        cache_images=True,
        batch_size=16,
        num_train_steps=args.steps,
        lr=5e-4,
        lr_schedule="constant",
        warmup_steps=20,
        perceptual_weight=0,
        ema_decay=0.99,
        mixed_precision="bf16",
        valid_fraction=0,
        sample_every=0,
        save_every=args.steps,
        log_every=5,
        seed=seed,
        results_folder=str(out),
        **RUNS[name],
    )
    try:
        trainer.train()
    except Diverged as error:
        result: dict[str, float | str] = {"diverged": str(error)}
    else:
        vae = VQGanVAE.from_pretrained(out / "vae-ema.safetensors")
        heldout = ImageFolder(f"{args.folder}/heldout", 64, cache=True)
        found = evaluate_tokenizer(vae, heldout, FeatureNet("efficientnet-lite0"))
        result = {key: found[key].value for key in ("psnr", "rfid", "perceptual")}
        weights = [w for _, w in read_curves(out, "vae").get("gan_weight", [])][-20:]
        result["gan_weight"] = sum(weights) / max(1, len(weights))  # over the last 100 steps
    file.write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", required=True, help="trained tokenizer to continue")
    parser.add_argument("--folder", default="data/emoji/64", help="with train and heldout")
    parser.add_argument("--out", type=Path, default=Path("runs/gan"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/gan.png"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), metavar="RUN")
    args = parser.parse_args()
    print("| run | seeds | PSNR, dB | rFID | perceptual | weight at the end |")
    print("|---|---|---|---|---|---|")
    for name in args.only:
        folders = {seed: args.out / f"{name.replace(' ', '-')}-{seed}" for seed in args.seeds}
        results = [run(name, seed, out, args) for seed, out in folders.items()]
        if any("diverged" in result for result in results):
            print(f"| {name} | {results} |", flush=True)
            continue
        cells = [f"{_mean(results, 'psnr'):.2f}", f"{_mean(results, 'rfid'):.1f}"]
        cells += [f"{_mean(results, 'perceptual'):.3f}", f"{_mean(results, 'gan_weight'):.4f}"]
        print(f"| {name} | {len(results)} | {' | '.join(cells)} |", flush=True)
    shown = [name for name in DRAWN if name in args.only]
    draw({name: args.out / f"{name.replace(' ', '-')}-{args.seeds[0]}" for name in shown}, args)


def _mean(results: list[dict[str, Any]], key: str) -> float:
    return sum(result[key] for result in results) / len(results)


def draw(folders: dict[str, Path], args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]  # only needed here

    charts = {"psnr": "PSNR of the training batch, dB", "grad_norm": "gradient norm (log)"}
    charts |= {"discriminator_accuracy": "discriminator's accuracy"}
    figure, axes = plt.subplots(1, len(charts), figsize=(14, 4))
    for axis, (key, title) in zip(axes, charts.items(), strict=True):
        for number, (name, folder) in enumerate(folders.items()):
            curve = read_curves(folder, "vae").get(key, [])
            width = 5  # logged lines that are averaged
            means = [
                (curve[i][0], sum(v for _, v in curve[i - width : i]) / width)
                for i in range(width, len(curve))
            ]
            if means:
                axis.plot(*zip(*means, strict=True), label=name, color=f"C{number}")
        axis.axvline(START, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step; dotted: the discriminator starts")
        if key == "grad_norm":
            axis.set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=90)
    print(args.picture)


if __name__ == "__main__":
    main()
