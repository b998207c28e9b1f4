"""`muse edit inpaint|outpaint|free|vary`: pictures drawn from a given one.

Each draws ``--count`` results of every prompt. A single one is written as it is, with its record.
Several make a sheet that begins with the given picture. As nothing tells where that one is from,
the sheet carries no record: its captions give the seeds, and the files of ``--each`` have theirs.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from jsonargparse import Namespace
from PIL import Image, ImageOps

from .. import editing
from ..arguments import as_path, ratio
from ..images import image_grid, read_image, read_with_alpha, record_of, save_png
from ..provenance import Record, from_json
from ..request import Request
from .drawing import (
    Outputs,
    announce,
    check_options,
    each_files,
    new_requests,
    num_steps,
    open_drawing_model,
    progress,
)
from .parser import Parser

RESULTS = 64  # more on one sheet would be too small to look at
GREY = (128, 128, 128)
# The commands ---------------------------------------------------------------------------------


def inpaint(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    picture = read_picture(config)
    mask = read_mask(config, picture)
    masked = picture.copy()
    shown = Image.fromarray(mask.byte().numpy() * 255)
    masked.paste(GREY, mask=shown.resize(picture.size, Image.Resampling.NEAREST))
    results = draw(config, editing.inpaint, picture, masks=mask)
    write(config, results, fit(picture, results[0]), fit(masked, results[0]))


def outpaint(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    if config.aspect is not None:
        config.aspect = ratio("--aspect", config.aspect)
    results = draw(config, editing.outpaint, read_picture(config), steps=None)
    added = record(results[0]).request.edit or {}
    masked = Image.new("RGB", results[0].size, GREY)
    left, top = added["left"], added["top"]
    right, bottom = masked.width - added["right"], masked.height - added["bottom"]
    given = results[0].crop((left, top, right, bottom))  # it is kept exactly
    masked.paste(given, (left, top))
    write(config, results, given, masked)


def free(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    config.at = [n for given in config.at for n in (given if isinstance(given, list) else [given])]
    if not config.prompts or not all(prompt.strip() for prompt in config.prompts):
        raise ValueError("give at least one prompt, and no empty one: it alone says what changes")
    picture = read_picture(config)

    @wraps(editing.free)
    def picture_by_picture(*args: Any, **kwargs: Any) -> list[Image.Image]:
        by_iteration = editing.free(*args, **kwargs)
        return [image for images in zip(*by_iteration, strict=True) for image in images]

    def steps(request: Request) -> int:
        rest = {name: given for name, given in request.options.items() if name != "base"}
        finish = num_steps(replace(request, options=rest))
        return max(config.at, default=0) + finish * len(config.at)

    results = draw(config, picture_by_picture, picture, steps)
    write(config, results, fit(picture, results[0]))


def vary(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    picture = read_picture(config)
    results = draw(config, editing.vary, picture)
    write(config, results, fit(picture, results[0]))


# What they share ------------------------------------------------------------------------------


def labels(config: Namespace) -> list[str]:
    """What each result is of, in their order, to stand behind its seed."""
    turns = [f", after {iteration}" for iteration in config.get("at", [])] or [""]
    prompts = [prompt for prompt in config.prompts or [""] for _ in range(config.count)]
    return [turn + (prompt and f": {prompt}") for prompt in prompts for turn in turns]


def read_picture(config: Namespace) -> Image.Image:
    """The given picture, after every check that needs no model.

    Raises:
        ValueError: an option out of its range, a picture that cannot be read, a given file that
            would be overwritten.
    """
    check_options(config, {"out": ".png"})
    if not 1 <= config.count <= RESULTS:
        raise ValueError(f"--count must be 1 to {RESULTS}, not {config.count}")
    names = labels(config)
    if len(names) > RESULTS:
        raise ValueError(f"a sheet shows up to {RESULTS} results, not {len(names)}: ask for fewer")
    given = {name: config.get(name) for name in ("picture", "white", "transparent")}
    for name, value in given.items():
        if value:
            config[name] = given[name] = as_path(value, name)
    picture = read_image(config.picture)
    sources = [path for path in given.values() if path and path.exists()]
    for file in [config.out, *(each_files(config.each, names) if config.each else [])]:
        if file.exists() and any(file.samefile(source) for source in sources):
            raise ValueError(
                f"{file} is one of the given files and would be overwritten: choose another --out "
                "or --each"
            )
    return picture


def read_mask(config: Namespace, picture: Image.Image) -> editing.Mask:
    """What is to be repainted, in the one convention that was stated.

    Raises:
        ValueError: none or several stated, a file that cannot be read or has not what it should.
    """
    given = {name: config[name] for name in ("white", "transparent", "box") if config[name]}
    if len(given) != 1:
        raise ValueError(
            "say what to repaint by exactly one of --white MASK, --transparent MASK and --box LEFT "
            f"TOP RIGHT BOTTOM, not by {' and '.join(f'--{name}' for name in given) or 'none'}"
        )
    if config.box:
        return editing.box(picture.size[::-1], *config.box)
    [(name, path)] = given.items()
    mask = read_with_alpha(path)
    try:
        return editing.white(mask) if name == "white" else editing.transparent(mask)
    except ValueError as error:
        raise ValueError(
            f"--transparent {path}: it has no transparency; if its white is to be repainted, say "
            "--white"
        ) from error


def draw(
    config: Namespace,
    edit: Callable[..., list[Image.Image]],
    picture: Image.Image,
    steps: Callable[[Request], int] | None = num_steps,
    **arguments: Any,
) -> list[Image.Image]:
    """All results of an edit, whose arguments are options of the same names.

    Args:
        config: of `edit_parser`.
        edit: a function of `editing`.
        picture: to be edited.
        steps: sampling steps of a batch; None if unknown.
        **arguments: of the edit, which are not options.
    """
    arguments |= {
        name: config[name] for name in inspect.signature(edit).parameters if name in config
    }
    prompts = [prompt for prompt in config.prompts or [""] for _ in range(config.count)]
    model = open_drawing_model(config)
    requests = new_requests(prompts, config, model)
    announce(config, model)
    images: list[Image.Image] = []
    total = None if steps is None else sum(map(steps, requests))
    with progress(total) as bar, warnings.catch_warnings():
        for request in requests:
            images += edit(
                model,
                picture,
                request.prompts,
                negative_texts=request.negatives,
                base_options=request.options["base"],
                superres_options=request.options.get("superres"),
                image_size=config.image_size,
                large=config.large,
                callback=bar,
                **arguments,
            )
            warnings.filterwarnings("ignore", "a (picture|mask) ")  # the same for every batch
    return images


def record(result: Image.Image) -> Record:
    return from_json(record_of(result) or "", "the result")[0]


def fit(image: Image.Image, result: Image.Image) -> Image.Image:
    """As large as the result, as the edit scaled it."""
    return ImageOps.fit(image, result.size, Image.Resampling.BICUBIC)


def write(config: Namespace, results: list[Image.Image], *given: Image.Image) -> None:
    """The files.

    Args:
        config: of `edit_parser`.
        results: in the order of `labels`.
        *given: what a sheet begins with: the picture, and maybe its masked form.
    """
    names, outputs = labels(config), Outputs()
    if config.each:
        with outputs.one():
            for image, file in zip(results, each_files(config.each, names), strict=True):
                save_png(image, file)
    out = results[0]
    if len(results) > 1:
        captions = ["given", "masked"][: len(given)]
        for result, name in zip(results, names, strict=True):
            drawn = record(result)
            captions.append(f"seed {drawn.request.seeds[drawn.rows[0]]}{name}")
        images = [*given, *results]
        out = image_grid(images, math.ceil(math.sqrt(len(images))), captions)
    with outputs.one():
        save_png(out, config.out)
    outputs.check()
    print(config.out)
