"""An adapter on twenty pictures of a style that the base has never seen: what it brings elsewhere.

    python examples/scenes/sprites.py
    python benchmarks/lora.py

The shipped base knows its subjects flat and in 3D. Here it learns a third style, brown prints on
white, from a few subjects, and draws others, whose true pictures in that style are known. Figures
of these before and after, with the same prompts and seeds:

- pixels: mean squared error to the true picture, times 1,000;
- features: distance of pooled features of EfficientNet-Lite0 to the true picture's, a share of the
  mean distance between two true pictures;
- R@1: share whose true picture is the nearest of all by features.

"reconstruction" is the true picture through the base's tokenizer: no adapter can do better.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from muse_maskgit_pytorch import FeatureNet, MaskGitTrainer, Muse
from muse_maskgit_pytorch.features import LITE
from muse_maskgit_pytorch.images import image_grid, to_tensor

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from captions import article  # noqa: E402
from scenes import Scenes  # noqa: E402

INK = "#46240e"


def subjects(data: Scenes) -> dict[str, Image.Image]:
    """Pictures in the style by the name of what fills them, of all subjects that are met."""
    found: dict[str, Image.Image] = {}
    for scene in map(data.scene, range(40 * len(data.sprites.subjects))):
        group = scene.groups[0]
        if scene.is_full and scene.style == "flat" and group.tone is None:
            picture = ImageOps.grayscale(data.draw(scene))
            found.setdefault(group.name, ImageOps.colorize(picture, INK, "white"))
    return found


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
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-lora"))
    parser.add_argument("--train", type=int, default=20, help="pictures to learn from")
    parser.add_argument("--test", type=int, default=150, help="other subjects to draw")
    parser.add_argument("--word", default="brown print", help="that captions end with; empty: none")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "run").exists():
        parser.error(f"{args.out} holds a run already: give another --out")

    model = Muse.from_pretrained(args.model)
    pictures = subjects(Scenes(args.sprites, "seen", size=model.base.image_size))
    generator = torch.Generator().manual_seed(args.seed)
    order = [list(pictures)[row] for row in torch.randperm(len(pictures), generator=generator)]
    learnt, others = order[: args.train], order[args.train : args.train + args.test]
    ending = f", {args.word}" if args.word else ""
    data = args.out / "images"
    data.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(learnt):
        pictures[name].save(data / f"{number:03d}.png")
        text = f"{article(name)} {name}{ending}"
        (data / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    true = torch.stack([to_tensor(pictures[name], None) for name in others])
    plain = [f"{article(name)} {name}" for name in others]
    prompts = [f"{text}{ending}" for text in plain]
    network = FeatureNet(LITE)

    def drawn(model: Muse, texts: list[str]) -> Tensor:
        parts = [texts[i : i + 50] for i in range(0, len(texts), 50)]
        base = Muse(model.base).eval()
        return torch.cat(
            [base(part, seeds=i, return_pil_images=False) for i, part in enumerate(parts)]
        )

    with torch.no_grad():
        again = model.base.decode(model.base.vae.encode_to_ids(true).flatten(1))
    results = {"reconstruction": figures(again, true, network)}
    before = drawn(model, prompts)
    results["before"] = figures(before, true, network)
    if ending:
        results["before, without the word"] = figures(drawn(model, plain), true, network)
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
        results["after, without the word"] = figures(drawn(model, plain), true, network)

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
