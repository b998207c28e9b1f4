"""`muse eval`: how good a tokenizer or a generator is, as a table, files of figures and a page."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image

from ..arguments import as_path, printable, shown, whole
from ..data.captions import read_prompts
from ..data.folder import ImageFolder, open_source
from ..data.opening import own_object
from ..devices import pick_device
from ..evaluation import (
    Drawer,
    FactJudge,
    Metric,
    Pictures,
    Truth,
    evaluate,
    evaluate_tokenizer,
)
from ..evaluation.drawing import Part
from ..evaluation.truth import of_texts
from ..features import FeatureNet, FeatureNetError, open_network
from ..files import check_output, replacing
from ..foreign import load_tokenizer
from ..images import image_grid, to_pil
from ..loading import open_model, open_stage
from ..muse import Muse
from ..vqgan_vae import ImageTokenizer
from ..watching.eval_page import write_eval_page
from .drawing import announce, load_loras, note, set_precision
from .parser import Parser, stated

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


def eval_base(parser: Parser, argv: list[str]) -> None:
    _eval_generator(parser.read(argv), "base")


def eval_superres(parser: Parser, argv: list[str]) -> None:
    _eval_generator(parser.read(argv), "superres")


def eval_model(parser: Parser, argv: list[str]) -> None:
    _eval_generator(parser.read(argv), "model")


def _eval_generator(config: Namespace, part: Part) -> None:
    out = check_output("--out", config.out, folder=True)
    prompts_file = None if part == "superres" else config.prompts
    if (config.data is None) == (prompts_file is None):
        other = "" if part == "superres" else ", or --prompts FILE, but not both"
        raise ValueError(f"say what to draw: --data FOLDER of captioned images{other}")
    for name in ("samples", "references", "seeds", "batch_size"):
        if config[name] is not None:
            whole(f"--{name}", config[name], 1)
    cache = None if config.cache is None else check_output("--cache", config.cache, folder=True)
    texts = [] if prompts_file is None else read_prompts(as_path(prompts_file), prompts_file)
    judge = None if config.judge is None else open_judge(config.judge)
    networks = _networks(config.features)
    drawer = _drawer(config, part)
    if prompts_file is None:
        truth = _truth(config, drawer)
        prompts = truth.prompts
    else:
        truth, prompts = None, of_texts(texts[: config.samples])
    pictures = Pictures(out, drawer, prompts, config.seeds, config.seed, truth)
    announce(config, drawer)
    if there := pictures.draw(config.batch_size):
        note(f"{there} of {len(pictures)} pictures are from an earlier start")
    found = evaluate(pictures, truth, networks, judge, drawer.device, cache)
    for network, figures in found.metrics.items():
        print(f"{printable(network, 200)}\n{table(figures)}")
    for line in found.left_out:
        note(f"left out: {line}")
    result = {
        "setup": pictures.setup,
        "data": config.data if prompts_file is None else prompts_file,
        "metrics": {
            network: {name: asdict(metric) for name, metric in figures.items()}
            for network, figures in found.metrics.items()
        },
        "left_out": found.left_out,
        "scores": list(found.scores),
        "prompts": [
            {"key": prompt.key, "text": prompt.text}
            | {name: values[row] for name, values in (found.scores | found.spreads).items()}
            for row, prompt in enumerate(prompts)
        ],
    }
    with replacing(out / "figures.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def row(number: int) -> tuple[Any, list[Any]]:
        true = None if truth is None else to_pil(truth.images([number]))[0]
        first = number * pictures.seeds
        return true, [pictures.picture(i) for i in range(first, first + pictures.seeds)]

    print(write_eval_page(out / "evaluation.html", result, row))


def _networks(names: list[str]) -> list[FeatureNet]:
    """Those that can be had; of the others a warning says what is left out."""
    found: dict[str, FeatureNet] = {}
    for name in dict.fromkeys(names):
        if name == "none":
            continue
        try:
            found[name] = open_network(name)
        except FeatureNetError as error:
            warnings.warn(f"its figures are left out: {error}", stacklevel=2)
    return list(found.values())


def _drawer(config: Namespace, part: Part) -> Drawer:
    """What draws, with its sampling options."""
    if part == "superres":
        stage = open_stage(config.model, "superres").to(pick_device(config.device))
        if stage.cond_image_size is None:
            raise ValueError(
                f"{config.model} is a base stage and no super-resolution: muse eval base judges it"
            )
        model, stages = stage, {"superres": stage.preset(config.preset or "default")}
    else:
        model = open_model(config.model, config.device)
        if part == "base":
            model = Muse(model.base).eval()
        elif model.superres is None and stated(config.superres):
            raise ValueError(f"--superres options given, but {config.model!r} has no such stage")
        load_loras(model, config.lora)
        stages = model.options(config.preset)
    set_precision(model, config)
    options = {name: usual.replace(**stated(config[name])) for name, usual in stages.items()}
    return Drawer(part, model, options, config.negative, config.image_size, config.large)


def _truth(config: Namespace, drawer: Drawer) -> Truth:
    captions = drawer.classes != ()  # an unconditional model needs none
    source = open_source(
        config.data, None, captions, classes=drawer.classes or (),
        image_column=config.image_column, text_column=config.text_column,
        streaming=config.streaming, min_size=config.min_size,
    )  # fmt: skip
    return Truth(source, drawer.geometry, drawer.size, config.samples, config.references, captions)


def open_judge(name: str) -> FactJudge:
    """A judge by FILE.py:NAME.

    Raises:
        ValueError: there is none.
    """
    judge = own_object("--judge", name)
    if not hasattr(judge, "facts"):
        raise ValueError(f"--judge {shown(name)} has no method facts(pictures, rows)")
    return judge


def table(figures: dict[str, Metric]) -> str:
    """One line per figure: name, value, number of images, what to know.

    The 95 % interval, and the figure of the true images, have columns where any figure has them.
    """
    rows = [["metric", "value", "95 %", "true", "images", ""]]
    for name, m in figures.items():
        between = "" if m.interval is None else " to ".join(f"{end:.4g}" for end in m.interval)
        true = "" if m.truth is None else f"{m.truth:.4g}"
        rows.append([name, f"{m.value:.5g}", between, true, str(m.images), m.note])
    kept = [c for c in range(6) if c not in (2, 3) or any(row[c] for row in rows[1:])]
    rows = [[row[column] for column in kept] for row in rows]
    wide = [max(len(row[column]) for row in rows) for column in range(len(kept) - 1)]
    return "\n".join(
        "  ".join(
            [f"{row[0]:<{wide[0]}}"]
            + [f"{cell:>{width}}" for cell, width in zip(row[1:-1], wide[1:], strict=True)]
            + [row[-1]]
        ).rstrip()
        for row in rows
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
