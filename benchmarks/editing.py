"""Edits on emoji whose right answer is known: inpainting, variation, mask-free editing.

    python examples/emoji/make_dataset.py --out data/emoji
    OMP_NUM_THREADS=1 python benchmarks/editing.py --out runs/editing

Inpainting: the lower half of each held-out picture is hidden and completed with its own caption,
with that of another held-out picture and with none; PSNR of the completed half (mean over the
pictures of its value in dB) and the share of pictures in which the right caption wins.

Variation: how far from the picture, with its own caption, at rising strength.

Mask-free editing: "... dark skin tone" into "... light skin tone", where there is a picture of the
new caption: root mean squared distance of the pixels to it, before and after so many iterations,
and the share of results to which no other real picture is nearer (R@1). The targets of held-out
pairs were seen by no stage of the training.

Pictures of each kind lie in --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from muse_maskgit_pytorch import Muse, editing
from muse_maskgit_pytorch.data import ImageFolder
from muse_maskgit_pytorch.evaluation.metrics import psnr, recall_at
from muse_maskgit_pytorch.images import image_grid, to_tensor

FROM, TO = "dark skin tone", "light skin tone"
AT = (10, 25, 50, 75, 100)
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def load(folder: Path) -> tuple[list[str], Tensor]:
    dataset = ImageFolder(str(folder), 128, captions=True)
    items = [dataset[row] for row in range(len(dataset))]
    return [item["text"] for item in items], torch.stack([item["image"] for item in items])


def tensors(images: list) -> Tensor:
    return torch.stack([to_tensor(image) for image in images])


def in_batches(edit: Any, pictures: Tensor, *rest: Any, size: int, name: str) -> list:
    """Call ``edit(pictures, *rest, seeds=...)`` on parts of a list, and join the results."""
    done: list = []
    for start in tqdm(range(0, len(pictures), size), desc=name, unit="batch"):
        part = slice(start, start + size)
        done += edit(list(pictures[part]), *(x[part] for x in rest), seeds=start)
    return done


def inpainting(muse: Muse, texts: list[str], images: Tensor, size: int, out: Path) -> dict:
    half = images.shape[-1] // 2
    mask = editing.box((2 * half, 2 * half), 0, half, 2 * half, 2 * half)
    # the skin tones come in turns: far enough for another person and another tone
    shift = min(49, len(texts) // 2)
    wrong = texts[shift:] + texts[:shift]
    captions = {"right": texts, "wrong": wrong, "none": [""] * len(texts)}
    found, figures = {}, {}
    for name, given in captions.items():

        def edit(pictures: list, prompts: list[str], seeds: int) -> list:
            return editing.inpaint(muse, pictures, prompts, mask, seeds=seeds)

        found[name] = tensors(in_batches(edit, images, given, size=size, name=f"inpaint {name}"))
        figures[name] = psnr(found[name][:, :, half:], images[:, :, half:])
    blank = editing.spread(images, ~mask[None, None])
    filled = psnr(blank[:, :, half:], images[:, :, half:])
    shown = torch.arange(0, len(texts), max(1, len(texts) // 8))[:8]
    hidden = torch.where(mask, 0.5, images)
    rows = [images[shown], hidden[shown], *(drawn[shown] for drawn in found.values())]
    labels = [texts[i] for i in shown] + ["given"] * len(shown)
    labels += [f"{name} caption" for name in captions for _ in shown]
    image_grid(torch.cat(rows), len(shown), labels).save(out / "inpaint.png")
    return {
        "pictures": len(texts),
        **{f"psnr_{name}": float(values.mean()) for name, values in figures.items()},
        "psnr_smooth_filling": float(filled.mean()),
        "right_beats_wrong": float((figures["right"] > figures["wrong"]).double().mean()),
        "right_beats_none": float((figures["right"] > figures["none"]).double().mean()),
    }


def variation(muse: Muse, texts: list[str], images: Tensor, size: int, out: Path) -> dict:
    figures, rows = {}, []
    for strength in STRENGTHS:

        def edit(pictures: list, prompts: list[str], seeds: int) -> list:
            return editing.vary(muse, pictures, prompts, strength=strength, seeds=seeds)  # noqa: B023

        drawn = tensors(in_batches(edit, images, texts, size=size, name=f"vary {strength}"))
        figures[f"psnr_{strength}"] = float(psnr(drawn, images).mean())
        rows.append(drawn[:8])
    labels = list(texts[:8]) + [f"{s}" for s in STRENGTHS[1:] for _ in texts[:8]]
    image_grid(torch.cat(rows), len(rows[0]), labels).save(out / "vary.png")
    return {"pictures": len(texts), **figures}


def nearness(pictures: Tensor, images: Tensor, truth: Tensor) -> dict[str, float]:
    apart = (pictures - images[truth]).square().mean((1, 2, 3)).sqrt()
    return {"distance": float(apart.mean()), "recall_at_1": recall_at(pictures, images, truth, 1)}


def mask_free(
    muse: Muse, splits: dict[str, tuple[list[str], Tensor]], size: int, out: Path
) -> dict:
    texts = [text for captions, _ in splits.values() for text in captions]
    images = torch.cat([pictures for _, pictures in splits.values()])
    place = {text: i for i, text in enumerate(texts)}
    held_out = set(splits["heldout"][0])
    # one person, so that one word says all
    pairs = [
        (text, text.replace(FROM, TO))
        for text in texts
        if text.endswith(f" {FROM}") and text.count("skin tone") == 1 and "medium" not in text
    ]
    pairs = [(a, b) for a, b in pairs if b in place]
    kinds = {
        "heldout": [pair for pair in pairs if pair[1] in held_out],
        "train": [pair for pair in pairs if not held_out & set(pair)][::4],
    }
    results = {}
    for kind, chosen in kinds.items():
        given = images[[place[a] for a, _ in chosen]]
        truth = torch.tensor([place[b] for _, b in chosen])
        wanted = [b for _, b in chosen]

        def edit(pictures: list, prompts: list[str], seeds: int) -> list:
            # one picture of each iteration for every pair
            stages = editing.free(muse, pictures, prompts, at=AT, seeds=seeds)
            return list(zip(*stages, strict=True))

        drawn = in_batches(edit, given, wanted, size=size, name=f"free {kind}")
        stages = {
            at: tensors(list(column))
            for at, column in zip(AT, zip(*drawn, strict=True), strict=True)
        }

        results[kind] = {
            "pairs": len(chosen),
            "before": nearness(given, images, truth),
            **{f"after_{at}": nearness(pictures, images, truth) for at, pictures in stages.items()},
        }
        count = min(8, len(chosen))
        rows = [given[:count], *(stages[at][:count] for at in (25, 50, 75, 100))]
        rows.append(images[truth[:count]])
        names = ["25 iterations", "50", "75", "100", "truth"]
        labels = [a for a, _ in chosen[:count]] + [n for n in names for _ in range(count)]
        image_grid(torch.cat(rows), count, labels).save(out / f"free-{kind}.png")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji", help="name or file of a Muse")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/editing"))
    parser.add_argument("--pictures", type=int, default=None, help="held-out ones; default: all")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    if args.pictures is not None and args.pictures < 2:
        parser.error("--pictures must be at least 2: one is the other's wrong caption")
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    muse = Muse.from_pretrained(args.model).to(device)
    splits = {name: load(args.data / "128" / name) for name in ("train", "heldout")}
    texts, images = splits["heldout"]
    count = args.pictures or len(texts)
    texts, images = texts[:count], images[:count]

    low = args.dtype == "bfloat16"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
        results = {
            "inpainting": inpainting(muse, texts, images, args.batch_size, args.out),
            "variation": variation(muse, texts[::4], images[::4], args.batch_size, args.out),
            "mask_free": mask_free(muse, splits, args.batch_size, args.out),
        }
    print(json.dumps(results, indent=2))
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"pictures: {args.out}/*.png")


if __name__ == "__main__":
    main()
