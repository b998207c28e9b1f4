"""The judge of scenes: is every fact that a caption states right in the picture?

    python examples/scenes/judge.py check
    python examples/scenes/judge.py train --steps 20000 --out data/scenes-judge.safetensors

Two small networks read a picture: a `Finder` says where things are (centres and boxes, as in Zhou
et al. 2019, "Objects as Points"), a `Namer` what is in a box: subject, skin tone and style. Both
are trained on real scenes, and on these as a tokenizer rebuilds them. The background is compared
with the colours that there are, and sizes, counts and relations follow from the boxes. In the
spirit of GenEval (Ghosh et al. 2023), with detectors that know the language of these scenes.

`check` prints how often the judge is right about real scenes that training never sees, by kind of
fact: no score of generated pictures can be higher, so it stands beside each.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scenes import BACKGROUNDS, COLOURS, Scene, Scenes
from sprites import STYLES, TONES, Sprites
from torch import Tensor, nn
from tqdm import tqdm

from muse_maskgit_pytorch.files import replacing
from muse_maskgit_pytorch.foreign import load_tokenizer
from muse_maskgit_pytorch.vqgan_vae import ImageTokenizer

WEIGHTS = Path(__file__).with_name("judge.safetensors")
SIDE, CELL, CROP = 128, 4, 32  # pixels that are looked at, of a cell of the finder, of a box
FOUND, APART = 0.35, 0.5  # the least score of a thing; the most of one that another one hides
HIDDEN = 5  # of a batch of training, at most one part in so many has things in front of others
SOME = 3  # times as many scenes are planned as drawn, to find these
BATCH, WARMUP = 32, 200
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the side


@dataclass(frozen=True)
class Found:
    """A thing that the judge sees: a subject, its tone (None: it has none) and its box."""

    subject: str
    tone: str | None
    box: Box


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a picture."""

    things: tuple[Found, ...]
    style: str
    background: str


# The networks ------------------------------------------------------------------------------------


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


class Residual(nn.Module):
    """x + f(x) of two convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Finder(nn.Module):
    """(B,3,128,128) -> (B,5,32,32): a centre's logit, its offset in its cell, width and height.

    It looks at 64 pixels a side, which show where things are. Offsets are in cells, sides the
    logarithms of shares of the picture's.
    """

    def __init__(self, width: int):
        super().__init__()
        w = width
        self.fine = _conv(3, w, 2)  # 32 x 32
        self.coarse = nn.Sequential(
            _conv(w, 2 * w, 2), Residual(2 * w), _conv(2 * w, 4 * w, 2), Residual(4 * w)
        )
        self.joined = _conv(5 * w, w)
        self.head = nn.Conv2d(w, 5, 1)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias[:1], -4.0)  # few cells are centres

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(F.avg_pool2d(images, 2) - 0.5)
        up = F.interpolate(self.coarse(fine), scale_factor=4, mode="bilinear")
        return self.head(self.joined(torch.cat([fine, up], 1)))


class Namer(nn.Module):
    """Crops (K,3,32,32) -> logits of subject (K,S), tone (K,1+5) and style (K,2)."""

    def __init__(self, subjects: int, width: int):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            _conv(3, w), _conv(w, 2 * w, 2), Residual(2 * w), _conv(2 * w, 4 * w, 2),
            Residual(4 * w), _conv(4 * w, 8 * w, 2),
        )  # fmt: skip
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(8 * w * 16, 384), nn.ReLU())
        self.subject = nn.Linear(384, subjects)
        self.tone = nn.Linear(384, 1 + len(TONES))
        self.style = nn.Linear(384, len(STYLES))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.neck(self.body(crops - 0.5))
        return self.subject(states), self.tone(states), self.style(states)


def cut_out(images: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
    """What is in boxes, and a little around it, as squares (K,3,32,32).

    Args:
        images: (B,3,128,128).
        boxes: (K,4), shares of the side.
        rows: (K,) of the images.
    """
    out = images.new_zeros(len(boxes), 3, CROP, CROP)
    centres = boxes.view(-1, 2, 2).mean(1)
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2 * 1.15  # a square, whatever the box
    steps = (torch.arange(CROP, device=images.device) + 0.5) / CROP * 2 - 1
    level = images
    for number in range(3):  # a large box is read from a smaller picture: no pixel is skipped
        across = 2 * half * SIDE / 2**number
        here = (across <= 1.5 * CROP) if number < 2 else torch.ones_like(half, dtype=torch.bool)
        if number:
            here &= 2 * half * SIDE / 2 ** (number - 1) > 1.5 * CROP
        if here.any():
            places = centres[here, None, :] + half[here, None, None] * steps[None, :, None]
            x, y = places[..., 0] * 2 - 1, places[..., 1] * 2 - 1
            grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
            out[here] = F.grid_sample(
                level[rows[here]], grid, padding_mode="border", align_corners=False
            )
        level = F.avg_pool2d(level, 2)
    return out


class Judge(nn.Module):
    """Reads pictures, and says which facts are right in them.

    Args:
        subjects: names, in the order of the logits.
        width: of the first layers of both networks.
    """

    def __init__(self, subjects: Sequence[str], width: int = 32):
        super().__init__()
        self.subjects, self.width = list(subjects), width
        self.finder, self.namer = Finder(width), Namer(len(self.subjects), width)

    def save(self, path: str | Path) -> None:
        """Write the weights, in half precision, and the subjects."""
        state = {
            k: v.half().contiguous() if v.is_floating_point() else v
            for k, v in self.state_dict().items()
        }
        with replacing(path) as temporary:
            save_file(
                state, temporary, {"subjects": json.dumps(self.subjects), "width": f"{self.width}"}
            )

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            described = file.metadata()
            judge = cls(json.loads(described["subjects"]), int(described["width"]))
            judge.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
        return judge.eval()

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image]) -> list[Reading]:
        """What is in pictures of any size."""
        images = torch.stack([_pixels(picture) for picture in pictures])
        boxes, rows = self._boxes(self.finder(images))
        things: list[list[Found]] = [[] for _ in pictures]
        styles = torch.zeros(len(pictures), len(STYLES))
        if len(boxes):
            subject, tone, style = self.namer(cut_out(images, boxes, rows))
            styles.index_add_(0, rows, style.log_softmax(-1))
            for box, row, s, t in zip(
                boxes.tolist(), rows.tolist(), subject.argmax(1).tolist(), tone.argmax(1).tolist(),
                strict=True,
            ):  # fmt: skip
                found = Found(self.subjects[s], TONES[t - 1] if t else None, tuple(box))
                if all(
                    _shared(found.box, other.box) < APART or found.subject != other.subject
                    for other in things[row]
                ):
                    things[row].append(found)
        return [
            Reading(tuple(each), STYLES[int(style.argmax())], _background(image))
            for each, style, image in zip(things, styles, images, strict=True)
        ]

    @staticmethod
    def _boxes(maps: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (K,4), those of the highest scores first, and the rows of their images."""
        score = maps[:, 0].sigmoid()
        peak = score == F.max_pool2d(score[:, None], 3, 1, 1)[:, 0]
        rows, y, x = torch.nonzero(peak & (score > FOUND), as_tuple=True)
        order = score[rows, y, x].argsort(descending=True)
        rows, y, x = rows[order], y[order], x[order]
        offset_x, offset_y, width, height = maps[rows, 1:, y, x].unbind(1)
        cells = SIDE // CELL
        centre = torch.stack([(x + offset_x) / cells, (y + offset_y) / cells], 1)
        side = torch.stack([width, height], 1).exp() / 2
        return torch.cat([centre - side, centre + side], 1).clamp(0, 1), rows

    def facts(
        self, pictures: Sequence[Image.Image], stated: Sequence[Sequence[dict[str, Any]]]
    ) -> list[dict[str, bool]]:
        """Which kinds of facts are right.

        Args:
            pictures: of any size.
            stated: the facts of each, as `Scene.facts` gives them.

        Returns:
            of each picture the kinds that are stated, and whether all facts of the kind are right.
        """
        found = []
        for reading, facts in zip(self.read(pictures), stated, strict=True):
            kinds: dict[str, bool] = {}
            for fact in facts:
                kinds[fact["fact"]] = kinds.get(fact["fact"], True) and _is_right(fact, reading)
            found.append(kinds)
        return found


def _pixels(picture: Image.Image) -> Tensor:
    """(3,128,128) in [0,1]."""
    pixels = np.array(picture.convert("RGB"), dtype=np.float32) / 255
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def _shared(one: Box, other: Box) -> float:
    """What two boxes have in common, as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(0.0, width) * max(0.0, height) / max(min(areas), 1e-9)


def _background(image: Tensor) -> str:
    """The one whose colours are nearest to the picture's edge."""
    edge = 3
    top, bottom = image[:, :edge], image[:, -edge:]
    left, right = image[:, :, :edge], image[:, :, -edge:]
    shades = (torch.arange(SIDE) + 0.5) / SIDE
    best, name = math.inf, ""
    for each in BACKGROUNDS:
        ends = [torch.tensor(COLOURS[colour]) / 255 for colour in each.split(" to ")]
        column = ends[0][:, None] + (ends[-1] - ends[0])[:, None] * shades
        # the median: things may touch the edge
        apart = [
            (part - column[:, rows, None]).abs().sum(0).flatten()
            for part, rows in (
                (top, slice(0, edge)), (bottom, slice(-edge, None)), (left, slice(None)),
                (right, slice(None)),
            )
        ]  # fmt: skip
        distance = float(torch.cat(apart).median())
        if distance < best:
            best, name = distance, each
    return name


def _is_right(fact: dict[str, Any], reading: Reading) -> bool:
    kind, value = fact["fact"], fact["value"]
    if kind == "style":
        return reading.style == value
    if kind == "background":
        return reading.background == value
    own = [thing for thing in reading.things if thing.subject == fact["subject"]]
    if kind == "subject":
        return bool(own)
    if kind == "count":
        return len(own) == value
    if kind == "tone":
        return bool(own) and all(thing.tone == value for thing in own)
    if kind == "size":
        return bool(own) and all(_size(thing) == value for thing in own)
    others = [thing for thing in reading.things if thing.subject == fact["other"]]
    return bool(own and others) and _is_related(own, others, value)


def _size(thing: Found) -> str:
    """A thing's size, by `layout.LENGTHS`."""
    side = max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
    return "small" if side < 0.28 else "big" if side > 0.375 else "medium"


def _is_related(own: list[Found], others: list[Found], relation: str) -> bool:
    first, second = (np.array([thing.box for thing in things]) for things in (own, others))
    if relation == "in front of":
        touching = any(_shared(a.box, b.box) > 0 for a in own for b in others)
        return touching and first[:, 3].mean() > second[:, 1].mean() and _lower(first, second)
    along = 0 if relation == "left of" else 1
    centres = [(boxes[:, :2] + boxes[:, 2:]).mean(0) / 2 for boxes in (first, second)]
    distance = centres[1] - centres[0]
    apart = first[:, 2 + along].max() <= second[:, along].min() + 0.02
    return bool(apart and distance[along] > abs(distance[1 - along]))


def _lower(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the centres of the first lie lower: what is nearer stands lower."""
    return bool(first[:, [1, 3]].mean() > second[:, [1, 3]].mean())


# Training ----------------------------------------------------------------------------------------


def targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Heat maps (B,32,32), boxes (K,4) and their rows (K,)."""
    cells = SIDE // CELL
    heat = torch.zeros(len(scenes), cells, cells)
    place = torch.arange(cells)
    boxes, rows = [], []
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            left, top, right, bottom = thing.box
            x, y = ((left + right) / 2 * cells), ((top + bottom) / 2 * cells)
            spread = max(0.6, min(right - left, bottom - top) * cells / 8)
            squares = (place[None, :] - int(x)) ** 2 + (place[:, None] - int(y)) ** 2
            heat[row] = torch.maximum(heat[row], torch.exp(-squares / (2 * spread**2)))
            boxes.append(thing.box)
            rows.append(row)
    return heat, torch.tensor(boxes), torch.tensor(rows)


def find_loss(maps: Tensor, heat: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
    """The focal loss of centres, and the L1 of offsets and sides (Zhou et al. 2019, eq. 1 to 4)."""
    logits, count = maps[:, 0], len(boxes)
    share = logits.sigmoid()
    hit = heat == 1
    focal = (
        -((1 - share[hit]) ** 2 * F.logsigmoid(logits[hit])).sum()
        - ((1 - heat) ** 4 * share**2 * F.logsigmoid(-logits))[~hit].sum()
    )
    centre = boxes.view(-1, 2, 2).mean(1) * (SIDE // CELL)
    cell = centre.long()
    found = maps[rows, 1:, cell[:, 1], cell[:, 0]]
    wanted = torch.cat([centre - cell, (boxes[:, 2:] - boxes[:, :2]).log()], 1)
    return (focal + (found - wanted).abs().sum()) / count


def worsened(images: Tensor, generator: torch.Generator) -> Tensor:
    """As generated pictures are: some smaller or blurred, with noise, with colours that are off."""
    out = images.clone()
    kind = torch.rand(len(images), generator=generator)
    small = kind < 0.5  # of 64 pixels
    half = F.avg_pool2d(images[small], 2)
    out[small] = F.interpolate(half, (SIDE, SIDE), mode="bilinear")
    blurred = (kind > 0.35) & (kind < 0.65)
    out[blurred] = F.avg_pool2d(out[blurred], 3, 1, 1, count_include_pad=False)
    noise = 0.06 * torch.rand(len(images), 1, 1, 1, generator=generator)
    out += noise * torch.randn(images.shape, generator=generator)
    shift = 0.04 * torch.randn(len(images), 3, 1, 1, generator=generator)
    return (out + shift).clamp(0, 1)


@torch.no_grad()
def rebuilt(vae: ImageTokenizer, images: Tensor, bf16: bool = False) -> Tensor:
    """What a tokenizer makes of images (B,3,128,128) in [0,1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return vae.decode_from_ids(vae.encode_to_ids(images)).float()


def train(
    judge: Judge,
    data: Scenes,
    out: Path,
    steps: int,
    lr: float = 2e-3,
    batch: int = BATCH,
    bf16: bool = False,
    vae: ImageTokenizer | None = None,
) -> None:
    """Train on scenes of the split "train", and write the weights every 500 steps.

    Args:
        judge: is trained as it is.
        data: of 128 px.
        out: file of the weights.
        steps: in all, the learning rate falling to zero.
        lr: its peak.
        batch: scenes of a step.
        bf16: convolutions in bfloat16, where the processor has it.
        vae: half of the scenes are looked at as it rebuilds them.
    """
    known = {name: number for number, name in enumerate(judge.subjects)}
    judge.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    halved = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    optimizer = torch.optim.AdamW(judge.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    right: dict[str, float] = dict.fromkeys(("subject", "tone", "style"), 0.0)
    warm_up = min(WARMUP, steps // 10 + 1)
    bar = tqdm(range(steps), desc="judge", unit="step", mininterval=1)
    for step in bar:
        rate = lr * min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        scenes = _chosen([data.scene(SOME * batch * step + i) for i in range(SOME * batch)], batch)
        images = torch.stack([_pixels(data.draw(scene)) for scene in scenes])
        if vae is not None:
            images[::2] = rebuilt(vae, images[::2], bf16)
        images = worsened(images, generator)
        heat, boxes, rows = targets(scenes)
        with halved:
            maps = judge.finder(images).float()
        loss = find_loss(maps, heat, boxes, rows)
        sides = boxes[:, 2:] - boxes[:, :2]
        shift = 0.05 * torch.randn(boxes.shape, generator=generator) * sides.repeat(1, 2)
        groups = [scene.groups[thing.group] for scene in scenes for thing in scene.things]
        labels = {
            "subject": torch.tensor([known[group.name] for group in groups]),
            "tone": torch.tensor([1 + TONES.index(g.tone) if g.tone else 0 for g in groups]),
            "style": torch.tensor([STYLES.index(s.style) for s in scenes for _ in s.things]),
        }
        with halved:
            logits = judge.namer(cut_out(images, boxes + shift, rows))
        for (kind, true), guess in zip(labels.items(), logits, strict=True):
            guess = guess.float()
            loss = loss + F.cross_entropy(guess, true)
            here = float((guess.argmax(1) == true).float().mean())
            right[kind] += (here - right[kind]) / min(step + 1, 50)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix({kind: f"{share:.3f}" for kind, share in right.items()})
        if (step + 1) % 500 == 0 or step + 1 == steps:
            judge.save(out)


def _chosen(scenes: list[Scene], count: int) -> list[Scene]:
    """So many of them, more of those in which one thing hides a part of another: they are hard."""
    hidden = [scene for scene in scenes if scene.relation == "in front of"][: -(-count // HIDDEN)]
    others = [scene for scene in scenes if scene.relation != "in front of"]
    return [*hidden, *others[: count - len(hidden)]]


# Its accuracy ------------------------------------------------------------------------------------


def accuracy(
    judge: Judge, data: Scenes, count: int, change: Any = lambda pictures: pictures
) -> dict[str, tuple[float, int]]:
    """Share of pictures in which a kind of fact is found right, and of how many; "all" of them.

    Args:
        judge: in eval mode.
        data: real scenes: every fact is right.
        count: of pictures.
        change: what is done to them before, such as a tokenizer's reconstruction.
    """
    right: dict[str, list[bool]] = {}
    for start in range(0, count, BATCH):
        scenes = [data.scene(number) for number in range(start, min(count, start + BATCH))]
        pictures = change([data.draw(scene) for scene in scenes])
        for kinds in judge.facts(pictures, [scene.facts() for scene in scenes]):
            for kind, value in kinds.items():
                right.setdefault(kind, []).append(value)
            right.setdefault("all", []).append(all(kinds.values()))
    return {kind: (sum(values) / len(values), len(values)) for kind, values in right.items()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train it")
    training.add_argument("--out", type=Path, default=Path("data/scenes-judge.safetensors"))
    training.add_argument("--steps", type=int, default=20_000)
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--init_from", type=Path, help="a judge to go on from")
    training.add_argument("--seed", type=int, default=1, help="of the scenes")
    training.add_argument("--vae", help="tokenizer that rebuilds half of the scenes")
    training.add_argument("--bf16", action="store_true", help="faster on some processors")
    checking = commands.add_parser("check", help="how often it is right about real scenes")
    checking.add_argument("judge", type=Path, nargs="?", default=WEIGHTS)
    checking.add_argument("--count", type=int, default=1000)
    checking.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    for each in (training, checking):
        each.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    arguments = parser.parse_args()
    sprites = Sprites(arguments.sprites)
    if arguments.command == "train":
        torch.manual_seed(0)
        known = arguments.init_from
        judge = Judge.load(known) if known else Judge([s.name for s in sprites.subjects])
        data = Scenes(sprites, seed=arguments.seed, size=SIDE)
        train(
            judge, data, arguments.out, arguments.steps, arguments.lr, bf16=arguments.bf16,
            vae=arguments.vae and load_tokenizer(arguments.vae),
        )  # fmt: skip
        return
    judge = Judge.load(arguments.judge)
    for size in arguments.sizes:
        found = accuracy(judge, Scenes(sprites, "seen", size=size), arguments.count)
        parts = ", ".join(f"{kind} {share:.3f} of {n}" for kind, (share, n) in found.items())
        print(f"{size} px: {parts}")


if __name__ == "__main__":
    main()
