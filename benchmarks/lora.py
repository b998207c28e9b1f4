"""An adapter on twenty pictures of a style that the base has never seen: what it brings elsewhere.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python benchmarks/lora.py --style package/assets

The shipped base knows its subjects in the flat style of Noto Color Emoji. Here it learns the 3D
style of another set (Fluent, MIT) from a few subjects, and draws 200 others, whose true pictures in
that style are known. Figures of these 200, before and after, with the same prompts and seeds:

- pixels: mean squared error to the true picture, times 1,000;
- features: distance of pooled features of EfficientNet-Lite0 to the true picture's, a share of the
  mean distance between two true pictures;
- R@1: share whose true picture is the nearest of the 200 by features.

"reconstruction" is the true picture through the base's tokenizer: no adapter can do better.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import FeatureNet, MaskGitTrainer, Muse
from muse_maskgit_pytorch.features import LITE
from muse_maskgit_pytorch.images import image_grid, read_image, to_tensor

# in the place of this folder, in which emoji.py stands before the library of that name
sys.path[0] = str(Path(__file__).parents[1] / "examples" / "emoji")
emoji_names = import_module("make_dataset").emoji_names

SIZE = 64


def subjects(folder: Path) -> dict[str, Path]:
    """Files by caption, without flags and skin tones."""
    found = {}
    for caption, characters in emoji_names():
        file = folder / f"{'-'.join(f'{ord(c):04x}' for c in characters)}.webp"
        if file.exists() and "skin tone" not in caption and not caption.startswith("flag"):
            found[caption] = file
    return found


def on_white(file: Path) -> Image.Image:
    picture = read_image(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


@torch.no_grad()
def figures(drawn: Tensor, true: Tensor, network: FeatureNet) -> dict[str, float]:
    a, b = (torch.cat([network.pooled(x) for x in images.split(50)]) for images in (drawn, true))
    distances, apart = torch.cdist(a, b), torch.cdist(b, b)
    count = len(b)
    return {
        "pixels": 1000 * float((drawn - true).square().mean()),
        "features": float(distances.diagonal().mean() / (apart.sum() / (count * (count - 1)))),
        "R@1": float((distances.argmin(dim=1) == torch.arange(count)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--style", type=Path, required=True, help="folder of the WebP files")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-lora"))
    parser.add_argument("--train", type=int, default=20, help="pictures to learn from")
    parser.add_argument("--test", type=int, default=200, help="other subjects to draw")
    parser.add_argument("--word", default="3D", help="that captions end with; empty: none")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "run").exists():
        parser.error(f"{args.out} holds a run already: give another --out")

    files = subjects(args.style)
    generator = torch.Generator().manual_seed(args.seed)
    order = [list(files)[row] for row in torch.randperm(len(files), generator=generator)]
    learnt, others = order[: args.train], order[args.train : args.train + args.test]
    ending = f", {args.word}" if args.word else ""
    data = args.out / "images"
    data.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(learnt):
        on_white(files[caption]).save(data / f"{number:03d}.png")
        (data / f"{number:03d}.txt").write_text(f"{caption}{ending}", encoding="utf-8")
    true = torch.stack([to_tensor(on_white(files[caption]), None) for caption in others])
    prompts = [f"{caption}{ending}" for caption in others]
    network = FeatureNet(LITE)

    def drawn(model: Muse, texts: list[str]) -> Tensor:
        parts = [texts[i : i + 50] for i in range(0, len(texts), 50)]
        base = Muse(model.base).eval()
        return torch.cat(
            [base(part, seeds=i, return_pil_images=False) for i, part in enumerate(parts)]
        )

    model = Muse.from_pretrained(args.model)
    with torch.no_grad():
        again = model.base.decode(model.base.vae.encode_to_ids(true).flatten(1))
    results = {"reconstruction": figures(again, true, network)}
    before = drawn(model, prompts)
    results["before"] = figures(before, true, network)
    if ending:
        results["before, without the word"] = figures(drawn(model, others), true, network)
    started = time.process_time()
    MaskGitTrainer(
        model.base, folder=str(data), results_folder=str(args.out / "run"), lora_rank=args.rank,
        batch_size=8, num_train_steps=args.steps, lr=args.lr, warmup_steps=20, weight_decay=0,
        ema_decay=0.99, valid_fraction=0, sample_every=0, save_every=args.steps, seed=args.seed,
    ).train()  # fmt: skip
    seconds = time.process_time() - started
    model = Muse.from_pretrained(args.model).load_lora(args.out / "run" / "base-lora-ema")
    after = drawn(model, prompts)
    results["after"] = figures(after, true, network)
    if ending:
        results["after, without the word"] = figures(drawn(model, others), true, network)

    print(f"\n{'':26}" + "".join(f"{name:>10}" for name in results["after"]))
    for name, row in results.items():
        print(f"{name:26}" + "".join(f"{value:10.3f}" for value in row.values()))
    print(f"{args.steps} steps of 8 took {seconds:.0f} s of CPU")
    report = vars(args) | {"seconds": seconds, "results": results, "learnt": learnt}
    (args.out / "results.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    rows = range(0, len(others), max(1, len(others) // 16))[:16]
    shown = [images[row] for images in (true, before, after) for row in rows]
    labels = [others[row] for row in rows] + [""] * 2 * len(rows)
    image_grid(torch.stack(shown), columns=len(rows), labels=labels).save(args.out / "sheet.png")
    print(f"true, before, after: {args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
