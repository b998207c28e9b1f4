"""The other side of `versus.py`: the `muse-maskgit-pytorch` 0.3.5 release, by its own trainer.

`versus.py` starts this file with the Python of that release's environment and says there how to
make one. Its package has our name, hence a process of its own. Nothing of it is changed: classes
and arguments are its public ones. It imports torchvision, which `stand_in_for_torchvision`
replaces by the few things that it calls.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Turns:
    """Lets one contender train at a time: `versus.py` writes "7", seven steps pass.

    Each turn is answered with a line of JSON, ``{"seconds": [...]}``, one number for every step
    that ended in it; the last answer holds the results too. What else is printed goes to stderr.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.left = 0
        self.seconds: list[float] = []
        self.start: float | None = None

    def begin_step(self) -> None:
        """Ends the step before; waits for the next turn where this one is over."""
        now = time.perf_counter()
        if self.start is not None:
            self.seconds.append(now - self.start)
        if self.left == 0:
            self.answer()
            self.left = int(sys.stdin.readline() or sys.exit("versus.py has gone"))
            now = time.perf_counter()
        self.left -= 1
        self.start = now

    def answer(self, **results: Any) -> None:
        print(json.dumps({"seconds": self.seconds, **results}), file=self.answers, flush=True)
        self.seconds = []


Coder = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@torch.no_grad()
def reconstruct(real: Path, out: Path, models: dict[str, Coder]) -> None:
    """Send images through ids and back, once for each set of weights.

    Args:
        real: safetensors of uint8 images (n, 3, S, S) by the name of their set.
        out: the same of the reconstructions, rounded to what a PNG would hold, as
            ``weights/set``; the ids as ``weights/set/ids``.
        models: name of the weights -> (images in [0, 1] -> ids, ids -> images).
    """
    results = {}
    for weights, (encode, decode) in models.items():
        for name, images in load_file(real).items():
            ids = torch.cat([encode(part.float() / 255) for part in images.split(32)])
            drawn = torch.cat([decode(part) for part in ids.split(32)]).clamp(0, 1)
            results[f"{weights}/{name}"] = (drawn * 255).round().byte().contiguous()
            results[f"{weights}/{name}/ids"] = ids.contiguous()
    save_file(results, out)


# The part of torchvision that the release imports --------------------------------------------


class Compose:
    def __init__(self, transforms: list[Callable]):
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


def resize(size: int) -> Callable[[Image.Image], Image.Image]:
    """The shorter side to ``size``, bilinear; nothing where it is that already."""

    def run(image: Image.Image) -> Image.Image:
        scale = size / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        return image if scale == 1 else image.resize((width, height), Image.Resampling.BILINEAR)

    return run


def center_crop(size: int) -> Callable[[Image.Image], Image.Image]:
    def run(image: Image.Image) -> Image.Image:
        left, top = ((side - size) // 2 for side in image.size)
        return image.crop((left, top, left + size, top + size))

    return run


def flip(image: Image.Image) -> Image.Image:
    mirrored = torch.rand(()) < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> float (3, H, W) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def make_grid(images: Tensor, nrow: int, **_: Any) -> Tensor:
    rows = [torch.cat(list(row), dim=2) for row in images.split(nrow) if len(row) == nrow]
    return torch.cat(rows, dim=1)


def save_image(image: Tensor, path: str) -> None:
    pixels = (image.permute(1, 2, 0) * 255).round().byte().contiguous()
    Image.fromarray(pixels.numpy()).save(path)


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman 2014, configuration D), at random weights.

    Initialised as torchvision does; pretrained weights cannot be had without its download.
    """

    def __init__(self, pretrained: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(repeats):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(512 * 49, 4096), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout()),
            nn.Linear(4096, 1000),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def stand_in_for_torchvision() -> None:
    parts: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.transforms": {
            "Compose": Compose,
            "Lambda": lambda function: function,
            "Resize": resize,
            "CenterCrop": center_crop,
            "RandomHorizontalFlip": lambda: flip,
            "ToTensor": lambda: to_tensor,
        },
        "torchvision.datasets": {"ImageFolder": None},  # imported there and never used
        "torchvision.utils": {"make_grid": make_grid, "save_image": save_image},
        "torchvision.models": {"vgg16": VGG16},
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(attributes)
        sys.modules[name] = module
        if "." in name:
            setattr(sys.modules["torchvision"], name.split(".")[1], module)


# Training ------------------------------------------------------------------------------------


def main() -> None:
    """Train one contender: the argument is its JSON from `versus.py`."""
    spec = json.loads(sys.argv[1])
    turns = Turns()
    importlib.import_module("transformers")  # before, for it looks for torchvision's version
    stand_in_for_torchvision()
    old: Any = importlib.import_module("muse_maskgit_pytorch")
    torch.manual_seed(spec["seed"])
    # its argument vgg takes any module; flattening makes the perceptual term a plain L2
    perceptual = {"vgg": nn.Flatten()} if spec["perceptual"] == "pixels" else {}
    vae = old.VQGanVAE(**spec["vae"], **perceptual)
    trainer = old.VQGanVAETrainer(vae, **spec["trainer"])
    # its trainer neither steps VGG nor clears its gradients: not computing them changes nothing
    vae.vgg.requires_grad_(False)
    for _ in range(spec["trainer"]["num_train_steps"]):
        turns.begin_step()
        trainer.train_step()

    def coder(model: Any) -> Coder:
        model.eval()
        return lambda images: model.encode(images)[1], model.decode_from_ids

    models = {"raw": coder(vae), "averaged": coder(trainer.ema_vae.ema_model)}
    reconstruct(Path(spec["real"]), Path(spec["drawn"]), models)
    turns.answer(parameters=sum(p.numel() for p in vae.enc_dec.parameters()))


if __name__ == "__main__":
    main()
