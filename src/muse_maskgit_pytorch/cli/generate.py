"""`muse generate`, `muse inspect` and `muse bundle`.

Prompts into pictures, how a picture was drawn, trained stages into one model file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image

from ..arguments import as_path, printable
from ..conditioning import one_each
from ..data.captions import read_prompts
from ..files import check_output
from ..film import Film
from ..foreign import load_tokenizer
from ..images import image_grid, read_record, record_of, save_gif, save_png
from ..loading import open_model, open_stage
from ..muse import Muse
from ..provenance import (
    Record,
    attach_to_sheet,
    from_json,
    made_on,
    read_records,
    warn_of_other_bits,
)
from ..request import Request
from ..sampling import ROW_WISE, row_seeds
from ..structures import SampleStep
from .drawing import (
    Outputs,
    announce,
    check_options,
    each_files,
    load_loras,
    new_requests,
    note,
    num_steps,
    open_drawing_model,
    progress,
    say_licenses,
)
from .parser import Parser, stated

SHEET = 256  # pictures on one that can still be looked at
GIF_PICTURES = 64  # more would be a large file of small pictures
Job = tuple[Request, Sequence[int]]  # a batch, and which of its pictures are wanted
ROWS, LINE = 100, 2000  # what `muse inspect` shows of a file: pictures, and characters of a line


def generate(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    prompts = _prompts(config)
    if not (prompts or config.like) or not all(prompt.strip() for prompt in prompts):
        raise ValueError('give at least one prompt, and no empty one: muse generate "a red heart"')
    check_options(config, {"out": ".png", "gif": ".gif"})
    like = read_records(config.like) if config.like else []
    like = [record.allowing(config.large) for record in like]
    model = open_drawing_model(config)
    for record in like:
        record.check(model, config.like)
    jobs: list[Job]
    if like:
        jobs = _again(like, prompts, config, model)
    else:
        jobs = [(batch, range(len(batch))) for batch in new_requests(prompts, config, model)]
    captions = [(request.prompts or [])[row] for request, rows in jobs for row in rows]
    if config.gif and len(captions) > GIF_PICTURES:
        raise ValueError(f"--gif shows up to {GIF_PICTURES} pictures, not {len(captions)}")
    if len(captions) > SHEET and not config.each:
        raise ValueError(
            f"{len(captions)} pictures are too many for one sheet, which shows up to {SHEET}: "
            "--each FOLDER writes every picture as its own file"
        )
    announce(config, model)
    _draw(jobs, captions, config, model)


def _draw(jobs: list[Job], captions: list[str], config: Namespace, model: Muse) -> None:
    """Draw and write, batch by batch; of many pictures no more than a batch is held.

    What was drawn before Ctrl-C, or before an error, is written too. The pictures of --each that
    an earlier start has written are not drawn again.
    """
    files = each_files(config.each, captions) if config.each else []
    sheet = len(captions) <= SHEET
    # Without a seed every start draws other pictures: it goes on only where one has stopped.
    go_on = bool(files) and not config.gif
    go_on = go_on and (config.seed is not None or not all(file.exists() for file in files))
    outputs = Outputs()
    images: list[Image.Image] = []
    films: list[list[Image.Image]] = []  # the frames of each picture
    done = kept = 0
    try:
        with progress(sum(num_steps(request) for request, _ in jobs)) as bar:
            for request, rows in jobs:
                here = files[done : done + len(rows)]
                old = _written(request, rows, here, config, model) if go_on and here else None
                if old:
                    batch = old
                    kept += len(rows)
                else:
                    batch, strips = _draw_batch(request, rows, bool(config.gif), model, bar)
                    films += strips
                if sheet:
                    images += batch
                done += len(rows)
                if here and not old:
                    try:
                        for image, file in zip(batch, here, strict=True):
                            save_png(image, file)
                    except OSError as error:
                        if not sheet:
                            raise
                        outputs.failed.append(str(error))
                        files = []  # the others would fail alike
    finally:
        if kept or 0 < done < len(captions):
            there = f", {kept} of them from an earlier start" if kept else ""
            note(f"{done} of {len(captions)} pictures are there{there}")
        if images:
            if films:
                with outputs.one():
                    longest = max(map(len, films))
                    films = [film + film[-1:] * (longest - len(film)) for film in films]
                    frames = zip(*films, strict=True)
                    shown = captions[: len(images)]
                    save_gif([_sheet(list(frame), shown) for frame in frames], config.gif)
            with outputs.one():
                save_png(_sheet(images, captions[: len(images)]), config.out)
    outputs.check()
    if not sheet:
        note(f"a sheet shows up to {SHEET} pictures: {config.out} is not written")
    print(config.out if sheet else config.each)


def _draw_batch(
    request: Request,
    rows: Sequence[int],
    with_film: bool,
    model: Muse,
    bar: Callable[[SampleStep], None],
) -> tuple[list[Image.Image], list[list[Image.Image]]]:
    """Some pictures of a batch, and if wanted the frames of each."""
    film = Film(model, rows, request.image_size) if with_film else None

    def callback(step: SampleStep) -> None:
        bar(step)
        if film is not None:
            film.add(step)

    batch = model.pictures(model.draw(request, callback))
    return [batch[row] for row in rows], film.strips() if film else []


def _written(
    request: Request, rows: Sequence[int], files: list[Path], config: Namespace, model: Muse
) -> list[Image.Image] | None:
    """The pictures of a batch from their files, if all are there and are the wanted ones."""
    images: list[Image.Image] = []
    for row, file in zip(rows, files, strict=True):
        try:
            with Image.open(file, formats=["PNG"]) as image:
                image.load()
            [record] = from_json(record_of(image) or "", file)
        except (OSError, ValueError, SyntaxError):  # not there, damaged, another picture
            return None
        if not images and config.seed is None and not config.like:
            request = request.with_seeds(record.request.seeds)  # those of the first start
        wanted = Record(request, (row,), model.fingerprint, record.made_by)
        if record != wanted.allowing(False):
            return None
        images.append(image)
    return images


def inspect(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    for path in map(as_path, config.pictures):
        records = read_records(path)
        if config.json:
            print(_safe_json(json.loads(read_record(path) or "")))
            continue
        print(printable(str(path)))
        left = ROWS
        for record in records:
            made = ", ".join(f"{name} {value}" for name, value in record.made_by.items())
            print(printable(f"model {record.model} ({made})", LINE))
            for row in record.rows[:left]:
                for name, value in _facts(record.request.take([row])).items():
                    print(printable(f"  {name:<9} {value}", LINE))
            if record.request.edit:
                edit = " ".join(f"{name}={value}" for name, value in record.request.edit.items())
                print(printable(f"  {'edit':<9} {edit}", LINE))
            left -= min(left, len(record.rows))
            if not left:
                break
        if more := sum(len(record.rows) for record in records) - ROWS + left:
            print(f"... and {more} more: --json true shows them all")


def _safe_json(document: Any) -> str:
    """As it stands, but what a terminal might obey, or cannot show, is escaped."""
    plain = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    text = json.dumps(document, ensure_ascii=not plain, indent=2)
    return "".join(c if c == "\n" or printable(c) == c else json.dumps(c)[1:-1] for c in text)


def _facts(request: Request) -> dict[str, str]:
    """What decides the one picture of a request, for people."""
    facts = {"prompt": (request.prompts or [""])[0]}
    if request.negatives and request.negatives[0]:
        facts["negative"] = request.negatives[0]
    for stage, options in request.options.items():
        values = vars(options).items()
        single = {n: v[0] if n in ROW_WISE and isinstance(v, list) else v for n, v in values}
        seed = single.pop("seeds")
        facts[stage] = " ".join(f"{n}={v}" for n, v in {"seed": seed, **single}.items())
    return facts


def bundle(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    out = check_output("--out", config.out, ".safetensors")
    model = open_model(config.base)
    if config.superres:
        base, superres = model.base, open_stage(config.superres, "superres")
        base.license = base.license or model.license
        model = Muse(base, superres)
        model.license = base.license if base.license == superres.license else None
    load_loras(model, config.lora)
    for name in config.vae:
        vae = load_tokenizer(name)
        swapped = [stage.swap_vae(vae) for stage in model.stages.values()]
        if not any(swapped):
            raise ValueError(
                f"--vae {name}: its encoder and codebook are of no tokenizer in this model, whose "
                "transformers would not understand its ids; fine-tune theirs (muse train decoder)"
            )
    say_licenses(model)
    print(model.save(out, getattr(torch, config.dtype)))


def _prompts(config: Namespace) -> list[str]:
    """Prompts from the command line, then those of the file."""
    given = [p for prompt in config.prompts for p in (_lines("-") if prompt == "-" else [prompt])]
    return given + (_lines(config.file) if config.file else [])


def _lines(name: str) -> list[str]:
    """Prompts in a text file, or in standard input for "-"."""
    if name != "-":
        return read_prompts(as_path(name), name)
    if sys.stdin is None:
        raise ValueError("- stands for the lines of standard input, which is closed")
    return read_prompts(sys.stdin, "standard input")


def _again(like: list[Record], prompts: list[str], config: Namespace, model: Muse) -> list[Job]:
    """What a PNG says, as it was; or what the command line makes of it, without the batch."""
    count = sum(len(record.rows) for record in like)
    if prompts and len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for the {count} pictures of {config.like}")
    negatives = one_each(config.negative, count)
    seeds = None if config.seed is None else row_seeds(config.seed, count)
    changes = {name: stated(config[name]) for name in model.stages}
    if config.preset is not None:  # everything but the seeds takes the place of what was
        for name, options in model.options(config.preset).items():
            preset = {key: value for key, value in vars(options).items() if key != "seeds"}
            changes[name] = preset | changes[name]
    given = prompts, negatives is not None, seeds is not None, config.image_size
    if not (any(given) or any(changes.values())):
        made_by = made_on(model.device, model.precision, model.text_compute.precision)
        warn_of_other_bits(like, made_by, config.like)
        return [(record.request, record.rows) for record in like]
    size = list(model.sizes(config.image_size).values())[-1] if config.image_size else None
    jobs, done = [], 0
    for record in like:
        now = slice(done, done := done + len(record.rows))
        old = record.request.take(record.rows)
        seeded = {} if seeds is None else {"seeds": seeds[now]}
        options = {n: o.replace(**changes[n], **seeded) for n, o in old.options.items()}
        rows = range(len(old))
        request = replace(
            old,
            prompts=prompts[now] or old.prompts,
            negatives=old.negatives if negatives is None else negatives[now],
            options={name: changed.with_rows(len(rows)) for name, changed in options.items()},
            image_size=size or old.image_size,
        )
        request.check_size("the command", model.image_size)
        jobs.append((request, rows))
    return jobs


def _sheet(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The only picture, or all with their captions."""
    if len(images) == 1:
        return images[0]
    sheet = image_grid(images, math.ceil(math.sqrt(len(images))), captions)
    attach_to_sheet(sheet, images)
    return sheet
