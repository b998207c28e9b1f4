"""What happens to a tokenizer when the discriminator starts, with the guards and without.

    python benchmarks/gan.py --vae runs/quantizers/fsq-1024/vae-ema.safetensors

continues one trained tokenizer three times on the same images: without an adversary, with it as
this package does it (delayed, ramped, weighted adaptively, LeCam, clipped, spikes skipped), and
with all of that off. It prints PSNR and rFID on held-out images and draws the curves (needs
matplotlib).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer
from muse_maskgit_pytorch.data import ImageFolder
from muse_maskgit_pytorch.evaluation import evaluate_tokenizer
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.training.guard import Diverged
from muse_maskgit_pytorch.watching.report import read_curves

COMMON: dict[str, Any] = {"discriminator_dim": 32, "discriminator_layers": 2}
RUNS: dict[str, dict[str, Any]] = {
    "no adversary": {"gan_weight": 0.0},
    "guarded": {
        "gan_weight": 0.1,
        "gan_adaptive": True,
        "gan_start": 100,
        "gan_ramp": 100,
        "lecam_weight": 0.01,
        "discriminator_lr": 2e-4,
        **COMMON,
    },
    "guards off": {
        "gan_weight": 0.1,
        "gan_start": 100,
        "gan_ramp": 0,
        "lecam_weight": 0.0,
        "max_grad_norm": 0.0,
        "max_spike": 0.0,
        **COMMON,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", required=True, help="trained tokenizer to continue")
    parser.add_argument("--folder", default="data/emoji/64", help="with train and heldout")
    parser.add_argument("--out", default="runs/gan")
    parser.add_argument("--picture", default="docs/pictures/gan.png")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    heldout = ImageFolder(f"{args.folder}/heldout", 64, cache=True)
    features = FeatureNet("efficientnet-lite0")
    results = {}
    for name, settings in RUNS.items():
        out = Path(args.out) / name.replace(" ", "-")
        file = out / "result.json"
        if not file.is_file():
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
                results_folder=str(out),
                **settings,
            )
            try:
                trainer.train()
            except Diverged as error:
                file.write_text(json.dumps({"diverged": str(error)}))
            else:
                vae = VQGanVAE.from_pretrained(out / "vae-ema.safetensors")
                found = evaluate_tokenizer(vae, heldout, features)
                figures = {key: found[key].value for key in ("psnr", "rfid", "perceptual")}
                file.write_text(json.dumps({**figures, "images": len(heldout)}))
        results[name] = json.loads(file.read_text())
        print(name, results[name], flush=True)
    draw(Path(args.out), Path(args.picture))


def draw(folder: Path, picture: Path) -> None:
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]  # only needed here

    charts = {"psnr": "PSNR of the training batch, dB", "grad_norm": "gradient norm (log)"}
    charts |= {"discriminator_accuracy": "discriminator's accuracy"}
    figure, axes = plt.subplots(1, len(charts), figsize=(14, 4))
    for axis, (key, title) in zip(axes, charts.items(), strict=True):
        for number, name in enumerate(RUNS):
            curve = read_curves(folder / name.replace(" ", "-"), "vae").get(key, [])
            width = 5  # logged lines that are averaged
            means = [
                (curve[i][0], sum(v for _, v in curve[i - width : i]) / width)
                for i in range(width, len(curve))
            ]
            if means:
                axis.plot(*zip(*means, strict=True), label=name, color=f"C{number}")
        axis.axvline(100, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step; dotted: the discriminator starts")
        if key == "grad_norm":
            axis.set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=90)
    print(picture)


if __name__ == "__main__":
    main()
