"""What the states of a text encoder's words say: which thing, and which part it has in a sentence.

    python examples/scenes/sprites.py
    python benchmarks/text_roles.py

For each layer, linear classifiers of the state of a thing's name, in sentences that set two things
beside each other ("an apple left of a boat", "a boat right of an apple"): which of all subjects it
is; whether it is the one on the left or above; and whether there are one or two of it. They learn
from the first sentences and are asked about the others. A cross-attention knows no more of a word
than such a state says (`text_depth`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from muse_maskgit_pytorch.text import TextEncoder

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from reading import names_of, spans  # noqa: E402
from scenes import Scenes  # noqa: E402

BATCH, LEARNT, STEPS = 50, 0.8, 300


def right(states: Tensor, labels: Tensor) -> float:
    """Share of held-out states whose label a linear classifier finds."""
    learnt = int(LEARNT * len(labels))
    states = (states - states[:learnt].mean(0)) / states[:learnt].std()
    layer = nn.Linear(states.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(layer(states[:learnt]), labels[:learnt]).backward()
        optimizer.step()
    return float((layer(states[learnt:]).argmax(-1) == labels[learnt:]).float().mean())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--sentences", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = Scenes(args.sprites, size=64)
    scenes, number = [], 0
    while len(scenes) < args.sentences:
        scene = data.scene(number)
        number += 1
        if scene.relation in ("left of", "above"):
            scenes.append(scene)
    encoder = TextEncoder(args.encoder)
    kept: list[Tensor] = []
    layers = [part for part in encoder.model.modules() if type(part).__name__.endswith("Layer")]
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
    names = names_of(data.subjects, encoder)
    order = list(names)
    states: list[list[Tensor]] = [[] for _ in layers]
    labels: dict[str, list[int]] = {"which thing": [], "left or above": [], "one or two": []}
    for at in tqdm(range(0, len(scenes), BATCH), desc="reading", leave=False):
        rows = scenes[at : at + BATCH]
        texts = [scene.caption.text for scene in rows]
        kept.clear()
        encoder.encode(texts)
        for row, words in enumerate(encoder.tokenizer(texts)["input_ids"]):
            for place, group in enumerate(rows[row].groups):
                where = spans(words, names[group.name])
                if not where:
                    continue  # by another word
                for own, layer_states in zip(states, kept, strict=True):
                    own.append(layer_states[row, where[-1]])
                labels["which thing"].append(order.index(group.name))
                labels["left or above"].append(place)
                labels["one or two"].append(group.count - 1)
    counted: dict[str, Any] = {name: torch.tensor(each) for name, each in labels.items()}
    print(f"{len(scenes)} sentences, {len(states[0])} names; what is right of the last fifth")
    often = {name: float(each.bincount().max()) / len(each) for name, each in counted.items()}
    print("most often:", *(f"{name} {share:.3f}" for name, share in often.items()))
    for layer, own in enumerate(states, start=1):
        shares = [f"{name} {right(torch.stack(own), each):.3f}" for name, each in counted.items()]
        print(f"layer {layer}:", *shares, flush=True)


if __name__ == "__main__":
    main()
