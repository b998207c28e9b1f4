"""Quality of the emoji model: reconstruction, retrieval, speed; and a sheet of pictures.

    python examples/emoji/make_dataset.py --out data/emoji
    python benchmarks/emoji.py

R@k: a generated image counts as found if fewer than k of the 3,655 real images are nearer to it
(mean squared error over RGB) than the one that its caption belongs to. "Held-out" captions ask
for a profession, gender and skin tone that no stage of the training saw together.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.evaluation.metrics import recall_at
from muse_maskgit_pytorch.images import image_grid, read_image, to_tensor
from muse_maskgit_pytorch.vqgan_vae import ImageTokenizer


def load(folder: Path) -> tuple[list[str], Tensor]:
    """Captions and images (n, 3, S, S) of one split, in the order of its metadata."""
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [to_tensor(read_image(folder / row["file_name"]), None) for row in rows]
    return [row["text"] for row in rows], torch.stack(images)


@torch.no_grad()
def psnr(vae: ImageTokenizer, images: Tensor) -> float:
    """Mean over the images of the PSNR of their reconstruction, dB."""
    errors = [
        (vae.decode_from_ids(vae.encode_to_ids(x)) - x).square().mean(dim=(1, 2, 3))
        for x in images.split(32)
    ]
    return float(-10 * torch.cat(errors).log10().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji", help="name or file of a Muse")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-emoji"))
    parser.add_argument("--train-captions", type=int, default=300)
    parser.add_argument("--heldout-captions", type=int, default=None, help="default: all")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="float32", help="see inference/precision.py")
    parser.add_argument("--base", type=json.loads, default={}, help="JSON of SampleOptions")
    parser.add_argument("--superres", type=json.loads, default={}, help="JSON of SampleOptions")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    muse = Muse.from_pretrained(args.model).to(device)
    muse.precision = args.precision
    base_options = muse.base.default_options.replace(**args.base)
    superres = muse.superres
    superres_options = superres.default_options.replace(**args.superres) if superres else None

    splits: dict[str, tuple[list[str], Tensor, Tensor]] = {}
    for name in ("train", "heldout"):
        texts, small = load(args.data / "64" / name)
        _, large = load(args.data / "128" / name)
        splits[name] = (texts, small, large)
    real = {
        64: torch.cat([small for _, small, _ in splits.values()]),
        128: torch.cat([large for *_, large in splits.values()]),
    }

    muse("warming up", seeds=0)
    results: dict[str, dict[str, float]] = {}
    start = 0
    for name, (texts, small, large) in splits.items():
        count = args.train_captions if name == "train" else args.heldout_captions
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))
        # all held-out captions in their own order; of the training ones a fixed sample
        rows = torch.arange(len(texts)) if count is None else order[:count].sort().values
        prompts = [texts[row] for row in rows]
        figures: dict[str, float] = {"captions": len(prompts)}
        figures["psnr_64"] = psnr(muse.base.vae, small[rows].to(device))
        if superres:
            figures["psnr_128"] = psnr(superres.vae, large[rows].to(device))
        stages: list[list[Tensor]] = []
        seconds = 0.0
        for i in tqdm(range(0, len(prompts), args.batch_size), desc=name, unit="batch"):
            before = time.perf_counter()
            request = muse.request(
                prompts[i : i + args.batch_size],
                seeds=args.seed + i,
                base_options=base_options,
                superres_options=superres_options,
            )
            drawn = muse.draw(request)
            stages.append([x.float().cpu() for x in (drawn.base_images, drawn.images)])
            seconds += time.perf_counter() - before
        for size, images in zip((64, 128), zip(*stages, strict=True), strict=False):
            for k in (1, 5):
                found = recall_at(torch.cat(images), real[size], rows + start, k)
                figures[f"recall_at_{k}_{size}"] = found
        figures["seconds_per_image"] = seconds / len(prompts)
        results[name] = figures
        start += len(texts)

        shown = torch.arange(0, len(prompts), max(1, len(prompts) // 24))[:24]
        last = torch.cat([s[-1] for s in stages])
        truth = (large if superres else small)[rows]
        pairs = [image for row in shown for image in (truth[row], last[row])]
        labels = [label for row in shown for label in (prompts[row], "generated")]
        image_grid(torch.stack(pairs), columns=8, labels=labels).save(args.out / f"{name}.png")

    names = sorted({key for figures in results.values() for key in figures})
    print(f"\n{'':22}" + "".join(f"{name:>12}" for name in results))
    for key in names:
        row = "".join(f"{figures.get(key, float('nan')):12.3f}" for figures in results.values())
        print(f"{key:22}{row}")
    report = {"model": args.model, "device": device, "seed": args.seed, **results}
    (args.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\ntruth beside generation: {args.out}/train.png, {args.out}/heldout.png")


if __name__ == "__main__":
    main()
