"""What `muse generate` and `muse edit` share: options, the model, batches, the bar, files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jsonargparse import Namespace
from tqdm.auto import tqdm

from ..checkpoint import CheckpointError, find_file, load_tree
from ..maskgit import MaskGit
from ..muse import Muse
from ..provenance import Drawing
from ..structures import SampleOptions, SampleStep
from .parser import Parser, stated


def add_options(parser: Parser, base: Collection[str] | None = None) -> None:
    """The model, the sampling and the files.

    Args:
        parser: the command's.
        base: the sampling options of the base stage that count; None: all.
    """
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
        "--preset",
        type=str | None,
        help="sampling options by name, such as fast; --base.* and --superres.* change single ones",
    )
    parser.add_argument(
        "--image_size",
        type=int | tuple[int, int] | None,
        help="side, or [height, width], in pixels, if not the trained square",
    )
    parser.add_argument(
        "--out", type=str, default="out.png", help="the picture, or a sheet of all, with captions"
    )
    parser.add_argument("--each", type=str | None, help="folder for every picture as its own PNG")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures drawn together")
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    parser.add_optional(SampleOptions, "base", skip={"seeds"}, only=base)
    parser.add_optional(SampleOptions, "superres", skip={"seeds"})


def check_options(config: Namespace, endings: dict[str, str]) -> None:
    """Refuse what can be refused before any work.

    Args:
        config: of `add_options`.
        endings: of the files to write, by the option that names them.

    Raises:
        ValueError: a file of another kind, an empty batch.
    """
    for name, ending in endings.items():
        if config[name] and Path(config[name]).suffix.lower() != ending:
            raise ValueError(f"--{name} {config[name]!r} must end in {ending}")
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {config.batch_size}")


def open_model(config: Namespace) -> Muse:
    """The model of ``--model`` on ``--device``.

    Raises:
        CheckpointError: as `load_model`.
        ValueError: a device that cannot be used, options of a stage that the model has not.
    """
    model = load_model(config.model)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # both, depending on how torch was built
        raise ValueError(f"--device {device!r} cannot be used: {error}") from error
    if model.superres is None and stated(config.superres):
        raise ValueError(f"--superres options given, but {config.model!r} has no such stage")
    return model


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


def stages(model: Muse) -> dict[str, MaskGit]:
    both = {"base": model.base, "superres": model.superres}
    return {name: stage for name, stage in both.items() if stage is not None}


def pixels(config: Namespace, model: Muse) -> tuple[int, int]:
    """Height and width of the pictures."""
    return list(stages(model).values())[-1].pixels(config.image_size)


def new_drawings(prompts: Sequence[str], config: Namespace, model: Muse) -> list[Drawing]:
    """What the command line asks for, in batches.

    Raises:
        ValueError: as `per_picture`; no such preset; options of another number of pictures.
    """
    negatives, seeds = per_picture(config, len(prompts))
    seeded = {} if seeds is None else {"seeds": seeds}
    whole = Drawing(
        prompts=tuple(prompts),
        negatives=None if negatives is None else tuple(negatives),
        options={
            name: options.replace(**stated(config[name]), **seeded)
            for name, options in model.options(config.preset).items()
        },
        rows=tuple(range(len(prompts))),
        model=model.fingerprint,
        image_size=pixels(config, model),
    )
    size = config.batch_size
    return [whole.take(whole.rows[at : at + size]) for at in range(0, len(prompts), size)]


def per_picture(config: Namespace, count: int) -> tuple[list[str] | None, list[int] | None]:
    """Negative prompts and seeds for each picture, None where the command line has none.

    Raises:
        ValueError: of another number of pictures.
    """
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


def each_files(folder: str, labels: Sequence[str]) -> list[Path]:
    """A file for every picture, named by its number and its label."""
    words = ("-".join(re.findall(r"\w+", label))[:60] for label in labels)
    names = (f"{number:03d}-{word}".rstrip("-") for number, word in enumerate(words, 1))
    return [Path(folder) / f"{name}.png" for name in names]


@contextmanager
def progress(
    timesteps: Iterable[int | Sequence[int]] | None,
) -> Iterator[Callable[[SampleStep], None]]:
    """A bar over the sampling steps, as a callback that moves it.

    Args:
        timesteps: of every run of the sampler, one number or one for each row; None: unknown.
    """
    total = None
    if timesteps is not None:
        total = sum(steps if isinstance(steps, int) else max(steps) for steps in timesteps)
    look = dict(desc="sampling", unit="step", dynamic_ncols=True)
    # shown from the first step on: warnings and refusals before it keep a line of their own
    with tqdm(total=total, delay=1e-3, **look) as bar:

        def advance(step: SampleStep) -> None:
            bar.update()

        yield advance
