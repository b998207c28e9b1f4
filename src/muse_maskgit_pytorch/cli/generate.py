"""`muse generate` and `muse bundle`: prompts into pictures, trained stages into one model file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..checkpoint import CheckpointError, find_file, load_tree
from ..foreign import load_tokenizer
from ..images import image_grid
from ..maskgit import MaskGit
from ..muse import Muse
from ..structures import SampleOptions, SampleStep
from .parser import Parser, stated


def generate_parser() -> Parser:
    parser = Parser("muse generate", "Draw pictures of prompts.")
    parser.add_argument("prompts", type=str, nargs="*", help="what to draw, one picture each")
    parser.add_argument(
        "--model",
        type=str,
        default="emoji",
        help="name of a shipped model, file of a whole model or of a base stage, or hub repository",
    )
    parser.add_argument("--negative", type=str | None, help="what to stay away from")
    parser.add_argument(
        "--seed", type=int | list[int] | None, help="s for s, s + 1, ..., or one for each picture"
    )
    parser.add_argument(
        "--out", type=str, default="out.png", help="the picture, or a sheet of all, with captions"
    )
    parser.add_argument("--each", type=str | None, help="folder for every picture as its own PNG")
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    for stage in ("base", "superres"):
        parser.add_optional(SampleOptions, stage, skip={"seeds"})
    return parser


def generate(argv: list[str]) -> None:
    config = generate_parser().read(argv)
    prompts, out = config.prompts, Path(config.out)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError('give at least one prompt, and no empty one: muse generate "a red heart"')
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {config.out!r} must end in .png")
    model = _on_device(load_model(config.model), config.device)
    if model.superres is None and stated(config.superres):
        raise ValueError(f"--superres options given, but {config.model!r} has no such stage")
    options = {
        f"{name}_options": stage.default_options.replace(**stated(config[name]))
        for name, stage in _stages(model).items()
    }
    with _progress([o.timesteps for o in options.values()]) as callback:
        images = model(
            prompts,
            negative_texts=config.negative,
            seeds=config.seed,
            callback=callback,
            **options,
        )
    if config.each:
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True), 1):
            words = "-".join(re.findall(r"\w+", prompt))[:60]
            _write(image, Path(config.each) / f"{number:03d}-{words}.png")
    columns = math.ceil(math.sqrt(len(images)))
    _write(images[0] if len(images) == 1 else image_grid(images, columns, prompts), out)
    print(out)


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


@contextmanager
def _progress(timesteps: list) -> Iterator[Callable[[SampleStep], None]]:
    """A bar over the sampling steps of all stages, as a callback that moves it."""
    total = sum(steps if isinstance(steps, int) else max(steps) for steps in timesteps)
    with tqdm(total=total, desc="sampling", unit="step", dynamic_ncols=True) as bar:

        def advance(step: SampleStep) -> None:
            bar.update()

        yield advance


def _write(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
