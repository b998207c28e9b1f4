"""Quantizers side by side: the same small tokenizer, steps and data; PSNR, rFID, usage, speed.

    python benchmarks/quantizers.py --folder data/emoji/64 --out runs/quantizers

trains one tokenizer for each quantizer and codebook size (skipping those already in ``--out``) and
prints a table. PSNR and rFID are of held-out images; usage is of all training images, with the
averaged weights. rFID's feature network is EfficientNet-Lite0 (the extra ``perceptual``).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer
from muse_maskgit_pytorch.data import ImageFolder
from muse_maskgit_pytorch.evaluation import evaluate_tokenizer
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.quantizer import QuantizerName

KINDS: tuple[QuantizerName, ...] = ("vq", "simvq", "fsq", "lfq", "bsq")
CASES: list[tuple[QuantizerName, int]] = [
    *[(kind, 1024) for kind in KINDS],
    *[(kind, 8192) for kind in KINDS],
    ("bsq", 2**18),
]


def train(kind: QuantizerName, size: int, folder: str, out: Path, steps: int) -> float:
    """Train one tokenizer; returns its seconds per step."""
    torch.manual_seed(0)
    vae = VQGanVAE(
        dim=32,
        factor=8,
        patch_size=2,
        channel_mults=[1, 2, 3],
        quantizer=kind,
        codebook_size=size,
    )
    trainer = VQGanVAETrainer(
        vae,
        folder=f"{folder}/train",
        image_size=64,
        cache_images=True,
        batch_size=16,
        num_train_steps=steps,
        lr=1e-3,
        warmup_steps=100,
        perceptual_weight=0,
        gan_weight=0,
        ema_decay=0.998,
        mixed_precision="bf16",
        valid_fraction=0,
        sample_every=0,
        save_every=steps,
        log_every=25,
        results_folder=str(out),
    )
    start = time.process_time()
    trainer.train()
    return (time.process_time() - start) / steps


def judge(vae: VQGanVAE, folder: str) -> dict[str, float]:
    heldout = ImageFolder(f"{folder}/heldout", 64, cache=True)
    train = ImageFolder(f"{folder}/train", 64, cache=True)
    features = FeatureNet("efficientnet-lite0")
    seen = evaluate_tokenizer(vae, train)
    unseen = evaluate_tokenizer(vae, heldout, features)
    return {
        "psnr": unseen["psnr"].value,
        "psnr_train": seen["psnr"].value,
        "rfid": unseen["rfid"].value,
        "usage": seen["codebook_usage"].value,
        "perplexity": seen["perplexity"].value,
        "heldout_images": unseen["psnr"].images,
        "train_images": seen["psnr"].images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="data/emoji/64", help="with train and heldout")
    parser.add_argument("--out", default="runs/quantizers")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", nargs="*", help="such as vq-1024")
    args = parser.parse_args()
    for kind, size in CASES:
        name = f"{kind}-{size}"
        out = Path(args.out) / name
        if (args.only and name not in args.only) or (out / "result.json").is_file():
            continue
        seconds = train(kind, size, args.folder, out, args.steps)
        result = judge(VQGanVAE.from_pretrained(out / "vae-ema.safetensors"), args.folder)
        result |= {"images_per_cpu_s": 16 / seconds, "steps": args.steps}
        (out / "result.json").write_text(json.dumps(result, indent=2))
        print(name, result, flush=True)
    print("| quantizer | codes | PSNR, dB | rFID | usage | perplexity | images per CPU second |")
    print("|---|---|---|---|---|---|---|")
    for kind, size in CASES:
        file = Path(args.out) / f"{kind}-{size}" / "result.json"
        if file.is_file():
            r = json.loads(file.read_text())
            print(
                f"| {kind} | {size:,} | {r['psnr']:.2f} | {r['rfid']:.1f} | {r['usage']:.1%} "
                f"| {r['perplexity']:.0f} | {r['images_per_cpu_s']:.0f} |"
            )


if __name__ == "__main__":
    main()
