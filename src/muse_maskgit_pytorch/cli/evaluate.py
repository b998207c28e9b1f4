"""`muse eval vae`: how good a tokenizer is, as a table, a file of figures and a sheet."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from PIL import Image

from ..data.folder import ImageFolder
from ..devices import pick_device
from ..evaluation import Metric, evaluate_tokenizer
from ..features import FeatureNet, FeatureNetError
from ..files import check_output, replacing
from ..foreign import load_tokenizer
from ..images import image_grid
from ..vqgan_vae import ImageTokenizer
from .parser import Parser

SHEET = 8  # images on it


def eval_vae(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    for option, ending in {"out": ".json", "picture": ".png"}.items():
        if config[option] is not None:
            config[option] = check_output(f"--{option}", config[option], ending)
    device = pick_device(config.device)
    vae = load_tokenizer(config.vae)
    vae.fmap_size(config.image_size)
    dataset = ImageFolder(config.folder, config.image_size)
    features = _features(config.features)
    figures = evaluate_tokenizer(vae, dataset, features, config.batch_size, device, config.limit)
    print(table(figures))
    if config.out:
        settings = {key: config[key] for key in ("vae", "folder", "image_size", "features")}
        result = {**settings, "metrics": {name: asdict(m) for name, m in figures.items()}}
        with replacing(config.out) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if config.picture:
        count = min(SHEET, config.limit or SHEET, len(dataset))
        images = torch.stack([dataset[row]["image"] for row in range(count)])
        with replacing(config.picture) as path:
            _sheet(vae, images).save(path, format="PNG")


def table(figures: dict[str, Metric]) -> str:
    """One line per figure: name, value, number of images, what to know."""
    rows = [("metric", "value", "images", "")]
    rows += [(name, f"{m.value:.5g}", str(m.images), m.note) for name, m in figures.items()]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{wide[0]}}  {value:>{wide[1]}}  {images:>{wide[2]}}  {note}".rstrip()
        for name, value, images, note in rows
    )


def _features(name: str) -> FeatureNet | None:
    try:
        return None if name == "none" else FeatureNet(name)
    except FeatureNetError as error:
        raise FeatureNetError(
            f"--features: {error}, or leave its figures out with --features none"
        ) from error


def _sheet(vae: ImageTokenizer, images: torch.Tensor) -> Image.Image:
    recon = vae.decode_from_ids(vae.encode_to_ids(images.to(vae.device))).cpu()
    return image_grid(torch.cat([images, recon]), columns=len(images))
