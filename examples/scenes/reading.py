"""Teaches the text layers of a base what the words of a caption say, between two trainings.

    python examples/scenes/reading.py --base runs/a/base-ema.safetensors --out base.safetensors
    muse train base --config recipes/scenes-base.yaml --init_from base.safetensors

To draw an apple on the left takes two things: its word must carry that it is the one on the left,
and the image must ask the word for it. While neither is there, the loss of the images rewards none
of them. So the layers that a base has for its texts (`text_depth`) are trained here on what the
facts of scenes say of each word of a thing: its part in a relation, its number and its size. The
direction of each answer is drawn once and stays, so it must be found in the states themselves; and
what else these say should stay as it was.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scenes import RELATIONS, Scene, Scenes
from sprites import Subject
from torch import Tensor
from tqdm import tqdm

from muse_maskgit_pytorch.loading import open_stage
from muse_maskgit_pytorch.masking import IGNORE_INDEX
from muse_maskgit_pytorch.text import TextEncoder
from muse_maskgit_pytorch.transformer import MaskGitTransformer

# How many there are of each kind: of a relation, none or either side of each.
ANSWERS = {"part": 1 + 2 * len(RELATIONS), "number": 4, "size": 3}
SIZES = {"small": 1, "big": 2}
STRENGTH = 2.0  # of a direction: so little need a state move along it to give the answer
KEPT = 1.0  # weight of what the states said before, in the loss
WARMUP = 20  # steps


def names_of(subjects: Sequence[Subject], encoder: TextEncoder) -> dict[str, list[list[int]]]:
    """The tokens of each subject's plural and singular, by its name."""
    return {
        subject.name: [
            encoder.tokenizer([name])["input_ids"][0][1:-1]  # without the special tokens
            for name in (subject.plural, subject.name)
            if name
        ]
        for subject in subjects
    }


def spans(words: Sequence[int], names: Sequence[Sequence[int]]) -> list[int]:
    """Where the tokens of one of these names stand."""
    for name in names:
        for start in range(len(words) - len(name) + 1):
            if list(words[start : start + len(name)]) == list(name):
                return list(range(start, start + len(name)))
    return []  # by another word


def answers(scene: Scene, group: int) -> list[int]:
    """Of a thing: its part in a relation, its number, its size."""
    found = scene.groups[group]
    part = 1 + 2 * RELATIONS.index(scene.relation) + group if scene.relation else 0
    return [part, found.count - 1, SIZES[found.size] if found.says_size else 0]


def labelled(
    encoder: TextEncoder, names: dict[str, list[list[int]]], scenes: Sequence[Scene], length: int
) -> Int[Tensor, "B L K"]:
    """The answers of every token that names a thing; `IGNORE_INDEX` elsewhere."""
    labels = torch.full((len(scenes), length, len(ANSWERS)), IGNORE_INDEX)
    for row, scene in zip(labels, scenes, strict=True):
        words = encoder.tokenizer([scene.caption.text])["input_ids"][0]
        for group, thing in enumerate(scene.groups):
            for place in spans(words[:length], names[thing.name]):
                row[place] = torch.tensor(answers(scene, group))
    return labels


def directions(dim: int) -> Float[Tensor, "D K"]:
    """Of all answers, at right angles."""
    drawn = torch.randn(dim, sum(ANSWERS.values()), generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn)[0]


def teach(
    network: MaskGitTransformer, data: Scenes, steps: int, batch_size: int = 48, lr: float = 1e-3
) -> Iterator[dict[str, float]]:
    """Train the network's text layers on the captions of scenes, and nothing else.

    Yields:
        of each step's scenes, the share of right answers by kind, and by how much the states
        differ from what they were ("changed", a mean square of states whose mean square is 1).
    """
    encoder, former = network.text_reader(), copy.deepcopy(network)
    assert isinstance(encoder, TextEncoder)
    names = names_of(data.subjects, encoder)
    answered = STRENGTH * directions(network.dim)
    optimizer = torch.optim.AdamW(network.text_blocks.parameters(), lr=lr)
    for step in range(steps):
        scenes = [data.scene(step * batch_size + row) for row in range(batch_size)]
        text = encoder.encode([scene.caption.text for scene in scenes])
        labels = labelled(encoder, names, scenes, text.mask.shape[1])
        states = network.read(text)
        with torch.no_grad():
            kept = former.read(text)
        changed = (states - kept).square()[text.mask].mean()
        loss, shares = KEPT * changed, {"changed": float(changed.detach())}
        logits = (states @ answered).split(list(ANSWERS.values()), dim=-1)
        for name, each, wanted in zip(ANSWERS, logits, labels.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(each.flatten(0, 1), wanted.flatten())
            right = (each.argmax(-1) == wanted)[wanted != IGNORE_INDEX]
            shares[name] = float(right.float().mean())
        share = min(1, (step + 1) / WARMUP, 2 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = lr * share
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield shares


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="file of a base with text_depth")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=3, help="of the scenes")
    args = parser.parse_args()
    base = open_stage(args.base, "base")
    network = base.transformer
    if not (isinstance(network, MaskGitTransformer) and len(network.text_blocks)):
        parser.error(f"{args.base} has no layers for its texts: train it with text_depth")
    data = Scenes(args.sprites, "train", args.seed, size=64)
    taught = teach(network, data, args.steps, args.batch_size, args.lr)
    bar = tqdm(taught, total=args.steps, desc="reading", unit="step")
    for shares in bar:
        bar.set_postfix({name: f"{share:.2f}" for name, share in shares.items()})
    base.save(args.out)


if __name__ == "__main__":
    main()
