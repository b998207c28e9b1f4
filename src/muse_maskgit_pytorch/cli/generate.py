"""`muse generate`, `muse inspect` and `muse bundle`.

Prompts into pictures, how a picture was drawn, trained stages into one model file.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from PIL import Image

from ..foreign import load_tokenizer
from ..images import image_grid, read_record, save_gif, save_png
from ..maskgit import MaskGit
from ..muse import Muse
from ..provenance import Drawing, made_by, plain, read_drawings, row_wise, stamp_sheet
from ..structures import SampleOptions, SampleStep
from .drawing import (
    add_options,
    check_options,
    each_files,
    load_model,
    new_drawings,
    open_model,
    per_picture,
    pixels,
    progress,
    stages,
)
from .film import Film
from .parser import Parser, stated

GIF_PICTURES = 64  # more would be a large file of small pictures


def generate_parser() -> Parser:
    parser = Parser("muse generate", "Draw pictures of prompts.")
    parser.add_argument(
        "prompts",
        type=str,
        nargs="*",
        help="what to draw, one picture each; - stands for the lines of standard input",
    )
    parser.add_argument(
        "--file",
        type=str | None,
        help="text file with a prompt on each line, without empty lines and # comments",
    )
    parser.add_argument(
        "--like",
        type=str | None,
        help="PNG of this package: draw it, or all of a sheet, again; prompts, --negative, --seed "
        "and sampling options replace its own",
    )
    add_options(parser)
    parser.add_argument("--gif", type=str | None, help="the sampling step by step, as a GIF")
    return parser


def generate(argv: list[str]) -> None:
    config = generate_parser().read(argv)
    prompts, out = _prompts(config), Path(config.out)
    if not (prompts or config.like) or not all(prompt.strip() for prompt in prompts):
        raise ValueError('give at least one prompt, and no empty one: muse generate "a red heart"')
    check_options(config, {"out": ".png", "gif": ".gif"})
    like = read_drawings(config.like) if config.like else []
    model = open_model(config)
    for drawing in like:
        drawing.check_model(model.fingerprint, config.like)
    drawings = (
        _again(like, prompts, config, model) if like else new_drawings(prompts, config, model)
    )
    captions = [drawing.prompts[row] for drawing in drawings for row in drawing.rows]
    if config.gif and len(captions) > GIF_PICTURES:
        raise ValueError(f"--gif shows up to {GIF_PICTURES} pictures, not {len(captions)}")

    images: list[Image.Image] = []
    films: list[list[Image.Image]] = []  # the frames of each picture
    with progress([o.timesteps for drawing in drawings for o in drawing.options.values()]) as bar:
        for drawing in drawings:
            film = None
            if config.gif:
                film = Film(list(stages(model).values()), drawing.rows, drawing.image_size)

            def callback(step: SampleStep, film: Film | None = film) -> None:
                bar(step)
                if film is not None:
                    film.add(step)

            images += model.like(drawing, callback)
            films += film.strips() if film else []
    if config.each:
        for image, file in zip(images, each_files(config.each, captions), strict=True):
            save_png(image, file)
    if config.gif:
        longest = max(map(len, films))
        films = [film + film[-1:] * (longest - len(film)) for film in films]
        save_gif(
            [_sheet(list(frames), captions) for frames in zip(*films, strict=True)], config.gif
        )
    save_png(_sheet(images, captions), out)
    print(out)


def inspect_parser() -> Parser:
    parser = Parser("muse inspect", "Show how the pictures of a PNG were drawn.")
    parser.add_argument("pictures", type=str, nargs="+", help="PNG files of this package")
    parser.add_argument("--json", type=bool, default=False, help="as it stands in the file")
    return parser


def inspect(argv: list[str]) -> None:
    config = inspect_parser().read(argv)
    for path in config.pictures:
        drawings = read_drawings(path)
        if config.json:
            print(json.dumps(json.loads(read_record(path) or ""), ensure_ascii=False, indent=2))
            continue
        print(path)
        for drawing in drawings:
            made = ", ".join(f"{name} {value}" for name, value in drawing.made_by.items())
            print(plain(f"model {drawing.model} ({made})"))
            for row in drawing.rows:
                for name, value in _facts(drawing.take([row])).items():
                    print(plain(f"  {name:<9} {value}"))
            if drawing.edit:
                edit = " ".join(f"{name}={value}" for name, value in drawing.edit.items())
                print(plain(f"  {'edit':<9} {edit}"))


def _facts(drawing: Drawing) -> dict[str, str]:
    """What decides one picture, for people."""
    facts = {"prompt": drawing.prompts[0]}
    if drawing.negatives and drawing.negatives[0]:
        facts["negative"] = drawing.negatives[0]
    per_row = row_wise(SampleOptions)
    for stage, options in drawing.options.items():
        values = vars(options).items()
        alone = {n: v[0] if n in per_row and isinstance(v, list) else v for n, v in values}
        seed = alone.pop("seeds")
        facts[stage] = " ".join(f"{n}={v}" for n, v in {"seed": seed, **alone}.items())
    return facts


def bundle_parser() -> Parser:
    parser = Parser("muse bundle", "Join trained stages into one file for `muse generate`.")
    parser.add_argument(
        "--base", type=str, required=True, help="saved base stage, or a model to take apart"
    )
    parser.add_argument("--superres", type=str | None, help="saved super-resolution stage")
    parser.add_argument(
        "--vae",
        nargs="*",
        type=str,
        default=[],
        help="tokenizers with fine-tuned decoders, for the places of those with the same ids",
    )
    parser.add_argument("--out", type=str, required=True, help="file to write, .safetensors")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float16", "bfloat16"],
        default="float32",
        help="type of the stored weights; float16 halves the file",
    )
    return parser


def bundle(argv: list[str]) -> None:
    config = bundle_parser().read(argv)
    model = load_model(config.base)
    if config.superres:
        model = Muse(model.base, MaskGit.from_pretrained(config.superres))
    for name in config.vae:
        vae = load_tokenizer(name)
        swapped = [stage.swap_vae(vae) for stage in stages(model).values()]
        if not any(swapped):
            raise ValueError(
                f"--vae {name}: its encoder and codebook are of no tokenizer in this model, whose "
                "transformers would not understand its ids; fine-tune theirs (muse train decoder)"
            )
    print(model.save(config.out, getattr(torch, config.dtype)))


def _prompts(config: Namespace) -> list[str]:
    """Prompts from the command line, then those of the file."""
    given = [p for prompt in config.prompts for p in (_lines("-") if prompt == "-" else [prompt])]
    return given + (_lines(config.file) if config.file else [])


def _lines(name: str) -> list[str]:
    """Prompts in a text file, or in standard input for "-"."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a text file in UTF-8: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{'standard input' if name == '-' else name} holds no prompt")
    return prompts


def _again(
    like: list[Drawing], prompts: list[str], config: Namespace, model: Muse
) -> list[Drawing]:
    """What a PNG says, as it was; or what the command line makes of it, without the batch."""
    count = sum(len(drawing.rows) for drawing in like)
    negatives, seeds = per_picture(config, count)
    if prompts and len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for the {count} pictures of {config.like}")
    here = made_by(model.device)
    changes = {name: stated(config[name]) for name in stages(model)}
    if config.preset is not None:  # all of it but the seeds takes the place of what was
        for name, options in model.options(config.preset).items():
            preset = {key: value for key, value in vars(options).items() if key != "seeds"}
            changes[name] = preset | changes[name]
    given = prompts, negatives is not None, seeds is not None, config.image_size
    if not (any(given) or any(changes.values())):
        for name in ("device", "torch"):
            others = {drawing.made_by.get(name, "unknown") for drawing in like} - {here[name]}
            if others:
                warnings.warn(
                    f"{config.like} was drawn with {name} {', '.join(sorted(others))}, this is "
                    f"{here[name]}: single pixels may differ",
                    stacklevel=2,
                )
        return like
    changed, done = [], 0
    for drawing in like:
        now = slice(done, done := done + len(drawing.rows))
        drawing = drawing.take(drawing.rows)
        seeded = {} if seeds is None else {"seeds": seeds[now]}
        options = {n: old.replace(**changes[n], **seeded) for n, old in drawing.options.items()}
        changed.append(
            replace(
                drawing,
                prompts=tuple(prompts[now]) or drawing.prompts,
                negatives=drawing.negatives if negatives is None else tuple(negatives[now]),
                options=options,
                image_size=pixels(config, model) if config.image_size else drawing.image_size,
            )
        )
    return changed


def _sheet(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The only picture, or all with their captions."""
    if len(images) == 1:
        return images[0]
    sheet = image_grid(images, math.ceil(math.sqrt(len(images))), captions)
    stamp_sheet(sheet, images)
    return sheet
