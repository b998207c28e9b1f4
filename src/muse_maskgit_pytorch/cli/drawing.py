"""What `muse generate` and `muse edit` share: options, the model, batches, the bar, files."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from tqdm.auto import tqdm

from ..arguments import as_path, printable
from ..files import check_output
from ..licenses import CODE
from ..loading import open_model
from ..maskgit import MaskGit
from ..muse import Muse
from ..request import Request
from ..sampling import per_row
from ..structures import SampleStep
from ..text import TextCompute
from .options import SHIPPED_MODEL
from .parser import stated

if TYPE_CHECKING:
    from ..evaluation import Drawer


def check_options(config: Namespace, endings: dict[str, str]) -> None:
    """Refuse what can be refused before any work, and make paths of the names of files.

    Args:
        config: of `add_options`.
        endings: of the files to write, by the option that names them.

    Raises:
        ValueError: a file of another kind, a place that cannot be written, an empty batch.
    """
    for name, ending in endings.items():
        if config[name] is not None:
            config[name] = check_output(f"--{name}", config[name], ending)
    if config.each is not None:
        config.each = check_output("--each", config.each, folder=True)
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {config.batch_size}")


def open_drawing_model(config: Namespace) -> Muse:
    """The model of ``--model`` on ``--device``.

    Raises:
        CheckpointError: as `open_model`.
        ValueError: a device or precision that cannot be used, options of a stage that the model
            does not have.
    """
    model = open_model(config.model, config.device)
    load_loras(model, config.lora)
    set_precision(model, config)
    if model.superres is None and stated(config.superres):
        raise ValueError(f"--superres options given, but {config.model!r} has no such stage")
    return model


def set_precision(model: Muse | MaskGit, config: Namespace) -> None:
    """How it computes, by the options of `add_sampling`.

    Raises:
        ValueError: a precision or a device that there is not.
    """
    model.precision = config.precision
    model.text_compute = TextCompute(
        config.text_precision, config.text_device, config.free_text_encoder
    )


def load_loras(model: Muse, names: Sequence[str]) -> None:
    """Put the adapters of ``--lora`` into a model.

    Args:
        model: as loaded.
        names: FOLDER or FOLDER:WEIGHT each.

    Raises:
        CheckpointError: as `Muse.load_lora`.
    """
    for name in names:
        folder, weight = name, 1.0
        stem, _, last = name.rpartition(":")
        if stem and not as_path(name).exists():
            with suppress(ValueError):
                folder, weight = stem, float(last)
        model.load_lora(folder, weight)


def new_requests(prompts: Sequence[str], config: Namespace, model: Muse) -> list[Request]:
    """What the command line asks for, in batches; a prompt may be empty.

    Raises:
        ValueError: no such preset; negative prompts, seeds or options whose number differs from
            the number of pictures; more than one batch may ask for.
    """
    options = {
        name: usual.replace(**stated(config[name]))
        for name, usual in model.options(config.preset).items()
    }
    whole = model.request(
        prompts,
        negative_texts=config.negative,
        seeds=config.seed,
        base_options=options["base"],
        superres_options=options.get("superres"),
        image_size=config.image_size,
        canvases={},
        large=config.large,
    )
    every, size = range(len(whole)), config.batch_size
    batches = [whole.take(every[at : at + size]) for at in range(0, len(whole), size)]
    for batch in batches:
        batch.check_size("the command", model.image_size)
    return batches


def num_steps(request: Request) -> int:
    """Sampling steps of all stages together."""
    return sum(max(per_row(o.timesteps, len(request), "")) for o in request.options.values())


def each_files(folder: Path, labels: Sequence[str]) -> list[Path]:
    """A file for every picture, named by its number and its label; the names sort."""
    digits = max(3, len(str(len(labels))))
    words = ("-".join(re.findall(r"\w+", label))[:60] for label in labels)
    # a name has at most 255 bytes, and letters of most scripts take several
    short = (word.encode()[:150].decode(errors="ignore") for word in words)
    names = (f"{number:0{digits}d}-{word}".rstrip("-") for number, word in enumerate(short, 1))
    return [folder / f"{name}.png" for name in names]


def announce(config: Namespace, model: Muse | Drawer) -> None:
    """Say on standard error which model draws, and its licenses.

    Standard output is for the names of files.
    """
    name = printable(config.model, 200)
    if config.model == SHIPPED_MODEL:
        name = f"the shipped model {name} (--model FILE draws with your own)"
    note(f"drawing with {name}, {model.fingerprint}, on {model.device}")
    say_licenses(model)


def say_licenses(model: Muse | Drawer) -> None:
    """Say on standard error under which licenses a model's weights and this code are."""
    licenses = ", ".join(f"{part} {license}" for part, license in model.licenses.items())
    note(f"licenses: {licenses}, code {CODE}")


def note(text: str) -> None:
    """A line on standard error."""
    print(f"muse: {text}", file=sys.stderr)


class Outputs:
    """The files that a command writes: one that fails does not take the others with it."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        """Write one of them in the block."""
        try:
            yield
        except OSError as error:
            self.failed.append(str(error))

    def check(self) -> None:
        """Raises:
        OSError: what could not be written, when all others are.
        """
        if self.failed:
            raise OSError("; ".join(self.failed))


@contextmanager
def progress(steps: int | None) -> Iterator[Callable[[SampleStep], None]]:
    """A bar over the sampling steps, as a callback that moves it.

    Args:
        steps: of all runs of the sampler; None if unknown.
    """
    look = dict(desc="sampling", unit="step", dynamic_ncols=True)
    # shown from the first step on: warnings and refusals before it keep a line of their own
    with tqdm(total=steps, delay=1e-3, **look) as bar:

        def advance(step: SampleStep) -> None:
            bar.update()

        yield advance
