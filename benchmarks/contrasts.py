"""What a base of scenes reads of a sentence: is a picture likelier under its own or a false one?

    python examples/scenes/sprites.py
    python benchmarks/contrasts.py --model scenes

For each kind of fact, real scenes of `examples/scenes` are given their own caption and one that
differs in this fact alone (the other order of a relation, one more or less of a kind, another
size, style, background or subject), both in the same words. Printed is the share of scenes whose
tokens are likelier under their own caption, at several shares of masked tokens: 0.5 is chance. At
1 nothing is known but the caption, as in the first step of sampling, where it is decided what
stands where; below it, what is not masked helps. No sampler and no judge take part.

Then: which tokens it knows, with its own caption, by what lies in their patches: a thing alone, the
edge of a thing, or background alone; on white, on another colour, or on a gradient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from muse_maskgit_pytorch.evaluation.figures import bootstrap_mean
from muse_maskgit_pytorch.images import to_tensor
from muse_maskgit_pytorch.loading import open_model
from muse_maskgit_pytorch.maskgit import MaskGit

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from captions import STYLES, Writer  # noqa: E402
from scenes import COLOURS, WHITE, Dice, Group, Scene, Scenes  # noqa: E402

FACTS = ("relation", "count", "size", "style", "background", "subject")


def false(fact: str, scene: Scene, data: Scenes, dice: Dice) -> Scene | None:
    """The scene with another value of this fact, if its caption states it."""

    def changed(**values: Any) -> Scene:
        return replace(scene, groups=(replace(scene.groups[0], **values), *scene.groups[1:]))

    first: Group = scene.groups[0]
    alike = len({(group.count, group.size) for group in scene.groups}) == 1
    if fact == "relation" and scene.relation and alike and first.count == 1:
        return replace(scene, groups=scene.groups[::-1])
    if fact == "count" and first.count > 1:
        return changed(count={2: 3, 3: dice.one((2, 4)), 4: 3}[first.count])
    if fact == "size" and first.says_size:
        return changed(size={"small": "big", "big": "small"}[first.size])
    if fact == "style" and scene.says_style:
        return replace(scene, style=next(style for style in STYLES if style != scene.style))
    if fact == "background" and scene.says_background and scene.background in COLOURS:
        others = [colour for colour in COLOURS if colour != scene.background]
        return replace(scene, background=dice.one(others))
    if fact == "subject" and not first.tone:
        shown = {group.name for group in scene.groups}
        others = [s for s in data.subjects if s.plural and s.name not in shown]
        return changed(subject=dice.one(others))
    return None


def contrasts(data: Scenes, fact: str) -> Iterator[tuple[Scene, str, str]]:
    """Scenes, their captions and false ones."""
    for number in count():
        scene = data.scene(number)
        other = false(fact, scene, data, Dice(f"false {fact} {number}"))
        if other is not None:
            own, wrong = (
                Writer(Dice(f"words {number}"), held=False).write(plan).text
                for plan in (scene, other)
            )
            yield scene, own, wrong


@torch.no_grad()
def predicted(base: MaskGit, ids: Tensor, texts: list[str], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of the true tokens, and whether they are the likeliest: both (B,N)."""
    ids, text, _ = base.encoded(ids, texts)
    conditioning = base.conditioner.dropped(text, None, 0.0)
    network = base.transformer
    hidden = network(torch.where(mask, network.mask_id, ids), network.encode_context(conditioning))
    logits = network.to_logits(hidden[0]).float()
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return nats, logits.argmax(-1) == ids


def patches(data: Scenes, scenes: list[Scene], images: Tensor, side: int) -> dict[str, Tensor]:
    """Which patches show a thing alone, a thing's edge, and background alone: (B,N) each."""

    def same(others: list[Scene]) -> Tensor:
        drawn = torch.stack([to_tensor(data.draw(scene), None) for scene in others])
        return F.unfold((images == drawn).float(), side, stride=side).all(1)

    others = ["blue" if scene.background == "red" else "red" for scene in scenes]
    recoloured = [replace(s, background=other) for s, other in zip(scenes, others, strict=True)]
    thing, background = same(recoloured), same([replace(scene, things=()) for scene in scenes])
    return {"thing": thing, "edge": ~thing & ~background, "background": background}


def print_patches(base: MaskGit, data: Scenes, count: int, batch: int, share: float) -> None:
    """What is known of the tokens, by patch and background."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for at in tqdm(range(0, count, batch), desc="patches", leave=False):
        scenes = [data.scene(number) for number in range(at, min(count, at + batch))]
        images = torch.stack([to_tensor(data.draw(scene), None) for scene in scenes])
        ids = base.vae.encode_to_ids(images.to(base.device)).flatten(1)
        mask = torch.rand(ids.shape, device=ids.device) < share
        each = torch.stack(predicted(base, ids, [s.caption.text for s in scenes], mask)).cpu()
        grounds = [
            WHITE if s.background == WHITE else "colour" if s.background in COLOURS else "gradient"
            for s in scenes
        ]
        for kind, where in patches(data, scenes, images, base.vae.factor).items():
            for row, ground in enumerate(grounds):
                here = (where & mask.cpu())[row]
                found.setdefault((kind, ground), []).append(each[:, row, here])
    print(f"\n{count} scenes, {share:g} of the tokens masked")
    print(f"{'':24}{'of all':>12}{'nats':>12}{'right':>12}")
    joined = {key: torch.cat(rows, 1) for key, rows in found.items()}
    whole = sum(rows.shape[1] for rows in joined.values())
    for (kind, ground), rows in joined.items():
        figures = rows.shape[1] / whole, *rows.mean(1).tolist()
        print(f"{kind + ', ' + ground:24}" + "".join(f"{figure:12.3f}" for figure in figures))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name or file of a Muse, or a base")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--scenes", type=int, default=200, help="of each kind of fact")
    parser.add_argument("--facts", nargs="*", choices=FACTS, default=FACTS)
    parser.add_argument("--masked", type=float, nargs="+", default=[1.0, 0.95, 0.8, 0.5])
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = open_model(args.model).base.eval()
    data = Scenes(args.sprites, "seen", size=base.image_size)
    print(f"{args.scenes} scenes each: the own caption is the likelier one (0.5 is chance)")
    print(f"{'masked':12}" + "".join(f"{share:>20}" for share in args.masked), flush=True)
    for fact in args.facts:
        found = contrasts(data, fact)
        right: dict[float, list[Tensor]] = {share: [] for share in args.masked}
        for at in tqdm(range(0, args.scenes, args.batch_size), desc=fact, leave=False):
            rows = [next(found) for _ in range(min(args.batch_size, args.scenes - at))]
            images = torch.stack([to_tensor(data.draw(scene), None) for scene, *_ in rows])
            captions = [own for _, own, _ in rows], [wrong for *_, wrong in rows]
            ids = base.vae.encode_to_ids(images.to(base.device)).flatten(1)
            order = torch.rand(ids.shape).argsort(1).to(ids.device)
            for share in args.masked:
                mask = order < round(share * ids.shape[1])
                both = [predicted(base, ids, texts, mask)[0] for texts in captions]
                own, wrong = ((nats * mask).sum(1) for nats in both)
                right[share].append((own < wrong).double().cpu())
        cells = []
        for shares in right.values():
            mean, interval = bootstrap_mean(torch.cat(shares))
            low, high = interval or (mean, mean)
            cells.append(f"{mean:.3f} ({low:.2f}-{high:.2f})")
        print(f"{fact:12}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    for share in args.masked:
        print_patches(base, data, args.scenes, args.batch_size, share)


if __name__ == "__main__":
    main()
