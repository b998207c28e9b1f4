"""What a model of scenes gets right, by kind of fact, on scenes and kinds of scenes never seen.

    python examples/scenes/sprites.py
    python benchmarks/scenes.py --model FILE
    python benchmarks/scenes.py --vae examples/scenes/tokenizer.safetensors

For each split of `examples/scenes` as many scenes are drawn from their captions, by the base alone
(128 px) and by both stages (256 px), and judged fact by fact (`examples/scenes/judge.py`). Beside
it stand the ceilings, what the judge says of the real scenes and of what the tokenizer makes of
them, and the tokenizer's PSNR, the share of its codes in use, the entropy of the ids within the
plain background of a picture, and how many ids of patches that a thing covers stay when the
background is another one. With ``--vae`` these alone. Intervals are 95 %, by the bootstrap
over scenes.

R@1: of single subjects on white, how often the nearest of all subjects of that style is the right
one, by the mean squared error of what is not white, cut out and scaled to 32 pixels. No network
takes part in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.evaluation.figures import bootstrap_mean
from muse_maskgit_pytorch.foreign import load_tokenizer
from muse_maskgit_pytorch.images import image_grid, to_pil, to_tensor
from muse_maskgit_pytorch.loading import open_model
from muse_maskgit_pytorch.vqgan_vae import ImageTokenizer

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from judge import WEIGHTS, Judge  # noqa: E402
from scenes import SPLITS, WHITE, Scene, Scenes  # noqa: E402
from sprites import Sprites  # noqa: E402

CUT, EDGE = 32, 24 / 255  # pixels of what is cut out; what differs from white
PLAIN = 0.02  # in [0, 1]: patches that differ less within are plain
Figure = dict[str, Any]
Pictures = list[Image.Image]


def draw(muse: Muse, texts: Sequence[str], batch: int, **changes: Any) -> dict[str, Pictures]:
    """Pictures of each stage, by "base" and "model"; the seed of a picture is its place."""
    stages: dict[str, Pictures] = {"base": [], "model": []}
    for at in tqdm(range(0, len(texts), batch), desc="drawing", leave=False):
        request = muse.request(list(texts[at : at + batch]), seeds=at, **changes)
        drawn = muse.draw(request)
        stages["base"] += to_pil(drawn.base_images.float().cpu())
        if muse.superres is not None:
            stages["model"] += to_pil(drawn.images.float().cpu())
    return {stage: pictures for stage, pictures in stages.items() if pictures}


def judged(judge: Judge, pictures: Pictures, scenes: Sequence[Scene]) -> list[dict[str, bool]]:
    """Which kinds of facts are right in each picture."""
    found = []
    for at in range(0, len(scenes), 64):
        rows = slice(at, at + 64)
        found += judge.facts(pictures[rows], [scene.facts() for scene in scenes[rows]])
    return found


def shares(verdicts: Sequence[dict[str, bool]]) -> dict[str, Figure]:
    """Share of right facts by kind, and of pictures in which "all" are right."""
    return figures(
        fact for kinds in verdicts for fact in {**kinds, "all": all(kinds.values())}.items()
    )


def kind_of(scene: Scene) -> str:
    """What a scene has: one thing, several of a kind, a list, or a relation."""
    count = len(scene.groups)
    if scene.relation:
        return scene.relation
    if count > 1:
        return f"{count} kinds"
    if scene.groups[0].count > 1:
        return f"{scene.groups[0].count} of a kind"
    return "alone" if scene.is_full else "one thing"


def by_kind(scenes: Sequence[Scene], verdicts: Sequence[dict[str, bool]]) -> dict[str, Figure]:
    """Share of the pictures in which all facts are right, by kind of scene."""
    pairs = zip(scenes, verdicts, strict=True)
    return figures((kind_of(scene), all(facts.values())) for scene, facts in pairs)


def figures(found: Iterable[tuple[str, float]]) -> dict[str, Figure]:
    """Of the values that go by the same name, one each."""
    values: dict[str, list[float]] = {}
    for name, value in found:
        values.setdefault(name, []).append(value)
    return {name: figure(each) for name, each in values.items()}


def figure(values: Sequence[float]) -> Figure:
    """A mean with its interval and count."""
    mean, interval = bootstrap_mean(torch.tensor(values, dtype=torch.float64))
    return {"value": mean, "interval": interval, "count": len(values)}


def cut(picture: Image.Image) -> Tensor:
    """What is not white in a picture, in the middle of a square: (3,32,32) in [0,1]."""
    image = to_tensor(picture, None)
    seen = (image < 1 - EDGE).any(0)
    rows, columns = torch.nonzero(seen.any(1)).flatten(), torch.nonzero(seen.any(0)).flatten()
    if not len(rows):
        return torch.ones(3, CUT, CUT)
    image = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = image.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    sides = (left, side - width - left, top, side - height - top)
    square = F.pad(image, sides, value=1.0)
    return F.interpolate(square[None], (CUT, CUT), mode="bilinear", antialias=True)[0]


class Nearest:
    """Finds the subject of a single thing on white.

    Args:
        sprites: all subjects.
        side: of the pictures that are compared.
    """

    def __init__(self, sprites: Sprites, side: int):
        self.sprites, self.side = sprites, side
        self._all: dict[tuple[str, str | None], Tensor] = {}

    def found(self, picture: Image.Image, scene: Scene) -> bool:
        """Whether no subject of the style is nearer than the scene's."""
        group = scene.groups[0]
        apart = (self._cuts(scene.style, group.tone) - cut(picture)).square().mean((1, 2, 3))
        own = self.sprites.subjects.index(group.subject)
        return bool((apart < apart[own]).sum() == 0)

    def _cuts(self, style: str, tone: str | None) -> Tensor:
        if (style, tone) not in self._all:
            self._all[style, tone] = torch.stack(
                [
                    cut(self._drawn(style, subject, tone if tone in subject.tones else None))
                    for subject in self.sprites.subjects
                ]
            )
        return self._all[style, tone]

    def _drawn(self, style: str, subject: Any, tone: str | None) -> Image.Image:
        """As large as a thing of full size."""
        sprite = self.sprites.image(style, subject, tone)
        share = 0.8 * self.side / max(sprite.size)
        small = sprite.resize([max(1, round(share * x)) for x in sprite.size])
        picture = Image.new("RGB", (self.side, self.side), WHITE)
        picture.paste(small, (self.side // 10, self.side // 10), small)
        return picture


def recall(
    muse: Muse, nearest: Nearest, data: Scenes, count: int, batch: int, preset: str | None
) -> dict[str, Figure]:
    """R@1 of the stages."""
    plain = (scene for scene in map(data.scene, range(10**6)) if scene.is_full)
    scenes = list(islice(plain, count))
    stages = draw(muse, [scene.caption.text for scene in scenes], batch, preset=preset)
    return {
        stage: figure([nearest.found(*pair) for pair in zip(made, scenes, strict=True)])
        for stage, made in stages.items()
    }


def entropy_of_plain(ids: Tensor, images: Tensor) -> list[float]:
    """Nats of the ids of plain patches, in each picture with more than a hundred of them."""
    side = images.shape[-1] // ids.shape[-1]
    patches = images.unfold(2, side, side).unfold(3, side, side)
    plain = (patches.amax((-1, -2)) - patches.amin((-1, -2))).amax(1) < PLAIN
    counts = [
        row[where].unique(return_counts=True)[1] for row, where in zip(ids, plain, strict=True)
    ]
    shares = [count / count.sum() for count in counts if count.sum() > 100]
    return [float(-(share * share.log()).sum()) for share in shares]


@torch.no_grad()
def kept_ids(vae: ImageTokenizer, data: Scenes, scenes: Sequence[Scene]) -> float:
    """Of patches that are the same on white and on yellow, the share whose ids are, too."""
    kept = equal = 0
    for at in range(0, len(scenes), 32):
        first, second = (
            torch.stack(
                [
                    to_tensor(data.draw(replace(scene, background=colour)), None)
                    for scene in scenes[at : at + 32]
                ]
            )
            for colour in (WHITE, "yellow")
        )
        side = vae.factor
        same = (first == second).all(1).unfold(1, side, side).unfold(2, side, side)
        covered = same.flatten(3).all(-1)
        ids = [vae.encode_to_ids(images.to(vae.device)).cpu() for images in (first, second)]
        kept += int((ids[0] == ids[1])[covered].sum())
        equal += int(covered.sum())
    return kept / max(1, equal)


@torch.no_grad()
def ceilings(vae: ImageTokenizer, judge: Judge, sprites: Sprites, size: int, count: int) -> Figure:
    """What the judge says of real scenes and of their reconstructions, and its own figures."""
    data = Scenes(sprites, "seen", size=size)
    scenes = [data.scene(number) for number in range(count)]
    real, made = [data.draw(scene) for scene in scenes], []
    psnr: list[float] = []
    nats: list[float] = []
    used = torch.zeros(vae.codebook_size, dtype=torch.bool)
    for at in range(0, count, 32):
        images = torch.stack([to_tensor(picture, None) for picture in real[at : at + 32]])
        ids = vae.encode_to_ids(images.to(vae.device))
        out = vae.decode_from_ids(ids).cpu()
        used[ids.flatten().cpu()] = True
        psnr += (-10 * (out - images).square().mean((1, 2, 3)).log10()).tolist()
        nats += entropy_of_plain(ids.cpu(), images)
        made += to_pil(out)
    rows = {
        name: shares(judged(judge, pictures, scenes))
        for name, pictures in {"real": real, "rebuilt": made}.items()
    }
    found = {"psnr": sum(psnr) / count, "codes_used": float(used.float().mean())}
    found["nats_of_plain"] = sum(nats) / max(1, len(nats))
    found["kept_ids"] = kept_ids(vae, data, scenes)
    print(
        f"\n{size} px, {count} scenes: the tokenizer has {found['psnr']:.2f} dB, uses "
        f"{found['codes_used']:.1%} of its codes, has {found['nats_of_plain']:.2f} nats within a "
        f"plain background, and keeps {found['kept_ids']:.1%} of the ids of covered patches on "
        f"another background\n{table(rows)}"
    )
    return {**rows, **found}


def sheet(
    scenes: Sequence[Scene],
    real: Pictures,
    made: Pictures,
    verdicts: Sequence[dict[str, bool]],
    count: int,
) -> Image.Image:
    """Truth beside generation, and what the judge says of that."""
    shown = range(0, len(scenes), max(1, len(scenes) // count))[:count]
    pairs = [to_tensor(picture, None) for row in shown for picture in (real[row], made[row])]
    wrong = [", ".join(k for k, right in kinds.items() if not right) for kinds in verdicts]
    labels = [
        label
        for row in shown
        for label in (scenes[row].caption.text, f"wrong: {wrong[row]}" if wrong[row] else "right")
    ]
    return image_grid(torch.stack(pairs), columns=8, labels=labels)


def table(rows: dict[str, dict[str, Figure]]) -> str:
    """One row a kind of fact, one column each of the rest."""
    kinds = sorted(
        {kind for figures in rows.values() for kind in figures}, key=lambda k: (k == "all", k)
    )
    lines = [f"{'':12}" + "".join(f"{name:>26}" for name in rows)]
    for kind in kinds:
        cells = []
        for figures in rows.values():
            one = figures.get(kind)
            low, high = (one and one["interval"]) or (0, 0)
            cells.append(
                f"{one['value']:.3f} ({low:.2f}-{high:.2f}) {one['count']:>4}" if one else ""
            )
        lines.append(f"{kind:12}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or file of a Muse, or a base")
    parser.add_argument("--vae", help="tokenizer to look at, in the place of a model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="of --vae, pixels")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--judge", type=Path, default=WEIGHTS)
    parser.add_argument("--scenes", type=int, default=300, help="of each split")
    parser.add_argument("--single", type=int, default=300, help="single subjects on white")
    parser.add_argument("--splits", nargs="+", choices=SPLITS[1:], default=list(SPLITS[1:]))
    parser.add_argument("--preset", help="of the model; its defaults unless given")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--precision", default="float32", help="see inference/precision.py")
    parser.add_argument("--shown", type=int, default=24, help="pictures on each sheet")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-scenes"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    if (args.model is None) == (args.vae is None):
        parser.error("give --model, or --vae in its place")
    judge, sprites = Judge.load(args.judge), Sprites(args.sprites)
    if args.vae is not None:
        vae = load_tokenizer(args.vae)
        for size in args.sizes:
            ceilings(vae, judge, sprites, size, args.scenes)
        return
    muse = open_model(args.model)
    muse.precision = args.precision
    sizes = {"base": muse.base.image_size, "model": muse.image_size}
    report: dict[str, Any] = {"model": args.model, "fingerprint": muse.fingerprint}
    for name, stage in muse.stages.items():
        report[f"ceiling_{name}"] = ceilings(
            stage.vae, judge, sprites, stage.image_size, args.scenes
        )

    by_stage: dict[str, dict[str, dict[str, Figure]]] = {stage: {} for stage in sizes}
    of_kinds: dict[str, dict[str, dict[str, Figure]]] = {stage: {} for stage in sizes}
    for split in args.splits:
        data = Scenes(sprites, split)
        scenes = [data.scene(number) for number in range(args.scenes)]
        texts = [scene.caption.text for scene in scenes]
        for stage, made in draw(muse, texts, args.batch_size, preset=args.preset).items():
            verdicts = judged(judge, made, scenes)
            by_stage[stage][split] = shares(verdicts)
            of_kinds[stage][split] = by_kind(scenes, verdicts)
            real = [data.draw(scene, sizes[stage]) for scene in scenes]
            drawn = sheet(scenes, real, made, verdicts, args.shown)
            drawn.save(args.out / f"{split}-{stage}.png")
    for stage, rows in by_stage.items():
        if rows:
            report |= {stage: rows, f"{stage}_by_kind": of_kinds[stage]}
            print(f"\n{stage}, {sizes[stage]} px\n{table(rows)}")
            print(f"\nall facts right, by kind of scene\n{table(of_kinds[stage])}")

    nearest, singles = Nearest(sprites, muse.base.image_size), {}
    for split in ("seen", "style"):
        data = Scenes(sprites, split)
        found = recall(muse, nearest, data, args.single, args.batch_size, args.preset)
        singles[split] = found
    report["recall_at_1"] = singles
    print(f"\nR@1 of single subjects on white\n{table(singles)}")
    (args.out / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\ntruth beside generation, and the judge's verdicts: {args.out}/*.png")


if __name__ == "__main__":
    main()
