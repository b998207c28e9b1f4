"""`muse generate`, `muse inspect` and `muse bundle`.

Prompts into pictures, how a picture was drawn, trained stages into one model file.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from PIL import Image
from tqdm.auto import tqdm

from ..checkpoint import CheckpointError, find_file, load_tree
from ..foreign import load_tokenizer
from ..images import image_grid, read_record, save_gif, save_png
from ..maskgit import MaskGit
from ..muse import Muse
from ..provenance import Drawing, made_by, plain, read_drawings, row_wise, stamp_sheet
from ..structures import SampleOptions, SampleStep
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
    parser.add_argument(
        "--model",
        type=str,
        default="emoji",
        help="name of a shipped model, file of a whole model or of a base stage, or hub repository",
    )
    parser.add_argument(
        "--negative", type=list[str] | str | None, help="what to stay away from: for all, or each"
    )
    parser.add_argument(
        "--seed", type=int | list[int] | None, help="s for s, s + 1, ..., or one for each picture"
    )
    parser.add_argument(
        "--out", type=str, default="out.png", help="the picture, or a sheet of all, with captions"
    )
    parser.add_argument("--each", type=str | None, help="folder for every picture as its own PNG")
    parser.add_argument("--gif", type=str | None, help="the sampling step by step, as a GIF")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures drawn together")
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    for stage in ("base", "superres"):
        parser.add_optional(SampleOptions, stage, skip={"seeds"})
    return parser


def generate(argv: list[str]) -> None:
    config = generate_parser().read(argv)
    prompts, out = _prompts(config), Path(config.out)
    if not (prompts or config.like) or not all(prompt.strip() for prompt in prompts):
        raise ValueError('give at least one prompt, and no empty one: muse generate "a red heart"')
    for name, ending in {"out": ".png", "gif": ".gif"}.items():
        if config[name] and Path(config[name]).suffix.lower() != ending:
            raise ValueError(f"--{name} {config[name]!r} must end in {ending}")
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {config.batch_size}")
    like = read_drawings(config.like) if config.like else []
    model = _on_device(load_model(config.model), config.device)
    if model.superres is None and stated(config.superres):
        raise ValueError(f"--superres options given, but {config.model!r} has no such stage")
    for drawing in like:
        drawing.check_model(model.fingerprint, config.like)
    drawings = _again(like, prompts, config, model) if like else _new(prompts, config, model)
    captions = [drawing.prompts[row] for drawing in drawings for row in drawing.rows]
    if config.gif and len(captions) > GIF_PICTURES:
        raise ValueError(f"--gif shows up to {GIF_PICTURES} pictures, not {len(captions)}")

    images: list[Image.Image] = []
    films: list[list[Image.Image]] = []  # the frames of each picture
    with _progress([o.timesteps for drawing in drawings for o in drawing.options.values()]) as bar:
        for drawing in drawings:
            film = Film(list(_stages(model).values()), drawing.rows) if config.gif else None

            def callback(step: SampleStep, film: Film | None = film) -> None:
                bar(step)
                if film is not None:
                    film.add(step)

            images += model.like(drawing, callback)
            films += film.strips() if film else []
    if config.each:
        for number, (image, prompt) in enumerate(zip(images, captions, strict=True), 1):
            words = "-".join(re.findall(r"\w+", prompt))[:60]
            save_png(image, Path(config.each) / f"{number:03d}-{words}.png")
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
        swapped = [stage.swap_vae(vae) for stage in _stages(model).values()]
        if not any(swapped):
            raise ValueError(
                f"--vae {name}: its encoder and codebook are of no tokenizer in this model, whose "
                "transformers would not understand its ids; fine-tune theirs (muse train decoder)"
            )
    print(model.save(config.out, getattr(torch, config.dtype)))


def load_model(name: str) -> Muse:
    """A whole model, or a base stage alone as one.

    Raises:
        CheckpointError: not to be found, or another kind of file.
    """
    path = find_file(name)
    kind = load_tree(path)[1]
    if kind == "Muse":
        return Muse.from_pretrained(path)
    if kind != "MaskGit":
        raise CheckpointError(f"{path} holds a {kind}: give a Muse or a base MaskGit")
    stage = MaskGit.from_pretrained(path)
    if stage.cond_image_size is not None:
        raise CheckpointError(
            f"{path} is a super-resolution stage alone: join it with a base by `muse bundle`"
        )
    return Muse(stage)


def _on_device(model: Muse, device: str | None) -> Muse:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # both, depending on how torch was built
        raise ValueError(f"--device {device!r} cannot be used: {error}") from error


def _stages(model: Muse) -> dict[str, MaskGit]:
    stages = {"base": model.base, "superres": model.superres}
    return {name: stage for name, stage in stages.items() if stage is not None}


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


def _new(prompts: list[str], config: Namespace, model: Muse) -> list[Drawing]:
    """What the command line asks for, in batches."""
    negatives, seeds = _per_picture(config, len(prompts))
    seeded = {} if seeds is None else {"seeds": seeds}
    whole = Drawing(
        prompts=tuple(prompts),
        negatives=None if negatives is None else tuple(negatives),
        options={
            name: stage.default_options.replace(**stated(config[name]), **seeded)
            for name, stage in _stages(model).items()
        },
        rows=tuple(range(len(prompts))),
        model=model.fingerprint,
    )
    size = config.batch_size
    return [whole.take(whole.rows[at : at + size]) for at in range(0, len(prompts), size)]


def _again(
    like: list[Drawing], prompts: list[str], config: Namespace, model: Muse
) -> list[Drawing]:
    """What a PNG says, as it was; or what the command line makes of it, without the batch."""
    count = sum(len(drawing.rows) for drawing in like)
    negatives, seeds = _per_picture(config, count)
    if prompts and len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for the {count} pictures of {config.like}")
    here = made_by(model.device)
    changes = {name: stated(config[name]) for name in _stages(model)}
    if not (prompts or negatives is not None or seeds is not None or any(changes.values())):
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
            )
        )
    return changed


def _per_picture(config: Namespace, count: int) -> tuple[list[str] | None, list[int] | None]:
    """Negative prompts and seeds for each picture, None where the command line has none."""
    negatives, seeds = config.negative, config.seed
    if isinstance(negatives, str):
        negatives = [negatives]
    if negatives is not None and len(negatives) == 1:
        negatives = negatives * count
    if isinstance(seeds, int):
        seeds = list(range(seeds, seeds + count))
    for name, values in {"negative": negatives, "seed": seeds}.items():
        if values is not None and len(values) != count:
            raise ValueError(
                f"--{name} has {len(values)} values for {count} pictures: give one for all, or "
                "one each"
            )
    return negatives, seeds


def _sheet(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The only picture, or all with their captions."""
    if len(images) == 1:
        return images[0]
    sheet = image_grid(images, math.ceil(math.sqrt(len(images))), captions)
    stamp_sheet(sheet, images)
    return sheet


@contextmanager
def _progress(timesteps: list) -> Iterator[Callable[[SampleStep], None]]:
    """A bar over the sampling steps of all stages, as a callback that moves it."""
    total = sum(steps if isinstance(steps, int) else max(steps) for steps in timesteps)
    with tqdm(total=total, desc="sampling", unit="step", dynamic_ncols=True) as bar:

        def advance(step: SampleStep) -> None:
            bar.update()

        yield advance
