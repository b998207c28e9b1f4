"""Edits of scenes, judged: a thing replaced; style, background and subject changed by words.

    python examples/scenes/sprites.py
    OMP_NUM_THREADS=1 python benchmarks/editing.py --model scenes

The pictures given are real scenes that no training saw (`examples/scenes`, split "seen"). After an
edit the judge of scenes says in how many pictures all is right that the new caption states.

Inpainting: one of two things in a relation is replaced by another, in a box around it: with the new
caption, with the old one, and with none.

Mask-free editing: a scene of one thing, after so many iterations with the caption of another style,
background or subject; "0" is the picture given. Once with the paper's share of tokens and guidance,
once with those that docs/editing.md takes for this model.

Variation: at rising strength with its own caption, and PSNR to the picture given.

Pictures of each kind lie in --out. Intervals are 95 %, by the bootstrap over pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from muse_maskgit_pytorch import Muse, editing
from muse_maskgit_pytorch.evaluation.figures import bootstrap_mean
from muse_maskgit_pytorch.evaluation.metrics import psnr
from muse_maskgit_pytorch.images import image_grid, to_tensor
from muse_maskgit_pytorch.loading import open_model

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from captions import Writer  # noqa: E402
from judge import WEIGHTS, Judge  # noqa: E402
from scenes import COLOURS, WHITE, Dice, Scene, Scenes, heldout  # noqa: E402
from sprites import STYLES  # noqa: E402

AT = (10, 25, 50, 100)
FREE: dict[str, dict[str, Any]] = {
    "8 % at guidance 5": {},  # the paper's, and the defaults
    "30 % at guidance 1.5": {"share": 0.3, "cond_scale": 1.5},
}
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
CHANGES = ("style", "background", "subject")
Pictures = list[Image.Image]


@dataclass(frozen=True)
class Task:
    """A scene, and the scene that an edit of its picture is to show.

    Attributes:
        scene: the one given.
        wanted: what is to come of it, with a caption of its own; its things have no new places.
    """

    scene: Scene
    wanted: Scene


def tasks(data: Scenes, change: str) -> Iterator[Task]:
    """Endless tasks: one thing of two in the place of another, or a change to a single thing.

    Args:
        data: where the scenes are from.
        change: "replace", or one of `CHANGES`.
    """
    for number in count():
        scene = data.scene(number)
        pair = scene.relation in ("left of", "above") and len(scene.things) == 2
        alone = len(scene.things) == 1 and not scene.is_full and " to " not in scene.background
        if not (pair if change == "replace" else alone):
            continue
        dice = Dice(f"edit/{change}/{number}")
        wanted: Any = replace(scene, says_style=True, says_background=True)
        if change == "style":
            wanted = replace(wanted, style=STYLES[scene.style == STYLES[0]])
        elif change == "background":
            others = [colour for colour in COLOURS if colour not in (scene.background, WHITE)]
            wanted = replace(wanted, background=dice.one(others))
        else:
            names = [group.name for group in scene.groups]
            others = [each for each in data.sprites.subjects if each.name not in names]
            first = replace(scene.groups[0], subject=dice.one(others), tone=None)
            wanted = replace(wanted, groups=(first, *scene.groups[1:]))
        # as in training, what a caption names is known and can be seen
        if heldout(wanted) or not data.stands_out(wanted):
            continue
        caption = Writer(dice, False).write(wanted)
        yield Task(scene, replace(wanted, caption=caption))


def share_right(judge: Judge, pictures: Pictures, scenes: Sequence[Scene]) -> dict[str, Any]:
    """The share of pictures in which all facts are right, and its interval."""
    right = []
    for at in range(0, len(scenes), 64):
        rows = slice(at, at + 64)
        found = judge.facts(pictures[rows], [scene.facts() for scene in scenes[rows]])
        right += [float(all(kinds.values())) for kinds in found]
    mean, interval = bootstrap_mean(torch.tensor(right, dtype=torch.float64))
    return {"all": mean, "interval": interval, "pictures": len(right)}


def in_batches(edit: Callable[..., list], *lists: Sequence, size: int, name: str) -> list:
    """Call ``edit(*parts, seeds=...)`` on parts of lists, and join the results."""
    done: list = []
    for start in tqdm(range(0, len(lists[0]), size), desc=name, unit="batch", leave=False):
        done += edit(*(list(each[start : start + size]) for each in lists), seeds=start)
    return done


def shown(columns: dict[str, Pictures], texts: Sequence[str]) -> Image.Image:
    """Up to eight rows of pictures: the given one, over the new caption, and what came of it."""
    cells, labels = [], []
    for row in range(min(8, len(texts))):
        cells += [pictures[row] for pictures in columns.values()]
        labels += [texts[row], *list(columns)[1:]]
    return image_grid(cells, len(columns), labels)


def inpainting(muse: Muse, judge: Judge, data: Scenes, args: argparse.Namespace) -> dict:
    """A thing replaced by another."""
    chosen = list(islice(tasks(data, "replace"), args.pictures))
    given = [data.draw(task.scene, muse.image_size) for task in chosen]
    masks = []
    for task in chosen:
        first = next(thing for thing in task.scene.things if thing.group == 0)
        edges = [round(muse.image_size * edge) for edge in first.box]
        masks.append(editing.box((muse.image_size, muse.image_size), *edges))
    captions = {
        "new caption": [task.wanted.caption.text for task in chosen],
        "old caption": [task.scene.caption.text for task in chosen],
        "no caption": [""] * len(chosen),
    }
    wanted = [task.wanted for task in chosen]
    found, columns = {"given": share_right(judge, given, wanted)}, {"given": given}
    for name, texts in captions.items():

        def edit(pictures: Pictures, texts: list[str], masks: list, seeds: int) -> Pictures:
            return editing.inpaint(muse, pictures, texts, torch.stack(masks), seeds=seeds)

        size = args.batch_size
        columns[name] = in_batches(edit, given, texts, masks, size=size, name=f"inpaint, {name}")
        found[name] = share_right(judge, columns[name], wanted)
    shown(columns, captions["new caption"]).save(args.out / "inpaint.png")
    return found


def mask_free(muse: Muse, judge: Judge, data: Scenes, args: argparse.Namespace) -> dict:
    """Style, background and subject changed."""
    results = {}
    for change, settings in product(CHANGES, FREE):
        chosen = list(islice(tasks(data, change), args.pictures))
        given = [data.draw(task.scene, muse.image_size) for task in chosen]
        texts = [task.wanted.caption.text for task in chosen]

        def edit(pictures: Pictures, texts: list[str], seeds: int) -> list[tuple]:
            stages = editing.free(
                muse,
                pictures,
                texts,
                at=AT,
                seeds=seeds,
                **FREE[settings],  # noqa: B023
            )
            return list(zip(*stages, strict=True))

        name = f"{change}, {settings}"
        rows = in_batches(edit, given, texts, size=args.batch_size, name=f"free, {name}")
        columns = {"0": given} | {
            f"{at}": list(pictures)
            for at, pictures in zip(AT, zip(*rows, strict=True), strict=True)
        }
        wanted = [task.wanted for task in chosen]
        results[name] = {at: share_right(judge, drawn, wanted) for at, drawn in columns.items()}
        shown(columns, texts).save(args.out / f"free-{change}-{list(FREE).index(settings)}.png")
    return results


def variation(muse: Muse, judge: Judge, data: Scenes, args: argparse.Namespace) -> dict:
    """From the picture given to another one of its caption."""
    scenes = [data.scene(number) for number in range(args.pictures)]
    given = [data.draw(scene, muse.image_size) for scene in scenes]
    texts = [scene.caption.text for scene in scenes]
    truth = torch.stack([to_tensor(picture, None) for picture in given])
    results, columns = {"0": share_right(judge, given, scenes)}, {"0": given}
    for strength in STRENGTHS:

        def edit(pictures: Pictures, texts: list[str], seeds: int) -> Pictures:
            return editing.vary(muse, pictures, texts, strength=strength, seeds=seeds)  # noqa: B023

        drawn = in_batches(edit, given, texts, size=args.batch_size, name=f"vary {strength}")
        columns[f"{strength}"] = drawn
        found = share_right(judge, drawn, scenes)
        pixels = torch.stack([to_tensor(picture, None) for picture in drawn])
        results[f"{strength}"] = found | {"psnr": float(psnr(pixels, truth).mean())}
    shown(columns, texts).save(args.out / "vary.png")
    return results


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scenes", help="name or file of a Muse, or a base")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--judge", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("runs/editing"))
    parser.add_argument("--pictures", type=int, default=100, help="of each kind of edit")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--precision", default="float32", help="see inference/precision.py")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    muse = open_model(args.model)
    muse.precision = args.precision
    judge, data = Judge.load(args.judge), Scenes(args.sprites, "seen")
    results = {
        "inpainting": inpainting(muse, judge, data, args),
        "variation": variation(muse, judge, data, args),
    } | {f"free, {kind}": found for kind, found in mask_free(muse, judge, data, args).items()}
    for kind, found in results.items():
        print(f"\n{kind}: all facts right")
        for name, row in found.items():
            low, high = row["interval"]
            apart = f", {row['psnr']:.1f} dB" if "psnr" in row else ""
            print(f"{name:12} {row['all']:.3f} ({low:.2f}-{high:.2f}){apart}")
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{args.pictures} pictures of each kind: {args.out}/*.png")


if __name__ == "__main__":
    main()
