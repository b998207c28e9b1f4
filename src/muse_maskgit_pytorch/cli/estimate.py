"""`muse estimate`: what a recipe takes of memory, arithmetic, time and money, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from ..arguments import as_path, real, shown, whole
from ..foreign import load_tokenizer
from ..training.checkpoints import KEPT
from ..training.estimate import Estimate, of_maskgit, of_tokenizer, sketched
from ..training.gan import Discriminator
from ..vqgan_vae import ImageTokenizer, VQGanVAE
from ..weights import sketching
from . import options
from .options import GPUS
from .parser import Parser
from .train import make_maskgit

# Width and millions of parameters of text encoders; they lie beside the model in float32.
TEXT_ENCODERS = {
    "google/t5-v1_1-small": (512, 35.3),
    "google/t5-v1_1-base": (768, 109.6),
    "google/t5-v1_1-large": (1024, 341.2),
    "google/t5-v1_1-xl": (2048, 1223.5),
    "google/t5-v1_1-xxl": (4096, 4762.3),
    "sentence-transformers/all-MiniLM-L6-v2": (384, 22.7),
}


def estimate(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    memory, tflops, price = GPUS[config.gpu]
    memory = memory if config.memory is None else real("--memory", config.memory, 0)
    tflops = tflops if config.tflops is None else real("--tflops", config.tflops, 0)
    price = price if config.price is None else real("--price", config.price, 0)
    gpus, share = whole("--gpus", config.gpus, 1), real("--utilisation", config.utilisation, 0, 1)
    if not tflops or not share:
        raise ValueError("--tflops and --utilisation must be above 0")
    path = as_path(config.recipe, "recipe")
    stage, recipe = _read(path)
    found, encoder = _estimated(stage, recipe, path, config)
    trainer = recipe.trainer
    batch = trainer.batch_size * trainer.grad_accum_every * gpus
    work = (found.forward + found.backward) * batch * trainer.num_train_steps
    hours = work / (gpus * tflops * 1e12 * share) / 3600
    text = 0 if encoder is None else round(TEXT_ENCODERS[encoder][1] * 4e6)
    peak = found.peak_of(gpus, config.sharded) + text
    rows = [
        *((f"parameters, {name}", _millions(count)) for name, count in found.parameters.items()),
        *_memory(found, gpus, config.sharded),
        ("text encoder", _gigabytes(text) if encoder else "none, or unknown: not counted"),
        ("tokenizer, frozen", _gigabytes(found.frozen)),
        ("peak on each GPU", f"{_gigabytes(peak)} of {memory:g} GB{_verdict(peak, memory)}"),
        ("forward, an image", f"{found.forward / 1e9:,.1f} GFLOP"),
        ("backward, an image", f"{found.backward / 1e9:,.1f} GFLOP"),
        ("drawing, a picture", f"{found.drawing / 1e9:,.1f} GFLOP"),
        ("images a step", f"{batch:,}"),
        (f"{trainer.num_train_steps:,} steps", f"{work:.3g} FLOP"),
        (f"on {gpus} x {config.gpu}", f"{hours:,.1f} hours"),
        ("cost", f"{hours * gpus * price:,.0f} at {price:g} a GPU and hour"),
    ]
    print(f"{path.stem} ({stage}), {trainer.batch_size} images a GPU at once")
    wide = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{wide}}  {value}" for name, value in rows))
    print(f"at {tflops:g} TFLOP/s, of which {share:.0%} are used; without encoding text and images")


def _memory(found: Estimate, gpus: int, sharded: bool) -> Iterator[tuple[str, str]]:
    """What one process holds, by part."""
    parts = gpus if sharded else 1
    exchange = found.gradients if gpus > 1 and not sharded else 0
    yield "weights", _gigabytes(found.weights // parts)
    yield "gradients", _gigabytes(found.gradients // parts + exchange)
    yield "optimizer", _gigabytes(found.optimizer // parts)
    yield "averages", _gigabytes(found.averages // parts)
    yield "activations", _gigabytes(found.activations)


def _read(path: Path) -> tuple[str, Any]:
    """The stage that a recipe trains, and the recipe with all defaults."""
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    keys = keys if isinstance(keys, dict) else {}
    maskgit = keys.get("maskgit")
    if "transformer" not in keys and maskgit is None:
        stage = "vae"
    else:
        superres = isinstance(maskgit, dict) and "cond_image_size" in maskgit
        stage = "superres" if superres else "base"
    parser = getattr(options, f"train_{stage}_parser")()
    return stage, parser.read(["--config", str(path)])


def _estimated(stage: str, recipe: Any, path: Path, config: Any) -> tuple[Estimate, str | None]:
    """Of a recipe, and the name of its text encoder, if its size is known."""
    trainer = recipe.trainer
    how: dict[str, Any] = dict(
        rows=trainer.batch_size,
        optimizer=trainer.optimizer,
        half=trainer.mixed_precision != "no",
        averages=(trainer.ema_decay > 0) + len(KEPT) * (trainer.posthoc_every > 0),
    )
    if stage == "vae":
        with sketching(10**6):
            vae, judge = VQGanVAE(**recipe.vae.as_dict()), None
            if trainer.gan_weight > 0:
                judge = Discriminator(trainer.discriminator_dim, trainer.discriminator_layers)
        with sketched():
            judge = judge and judge.to_empty(device="cpu")
            vae = vae.to_empty(device="cpu")
            return of_tokenizer(vae, judge, trainer.image_size, **how), None
    encoder = recipe.transformer.t5_name
    if encoder in TEXT_ENCODERS and recipe.transformer.text_embed_dim is None:
        recipe.transformer.text_embed_dim = TEXT_ENCODERS[encoder][0]
    with sketching(10**6):
        model = make_maskgit(recipe, load=lambda name: _tokenizer(name, path, config.vae))
    with sketched():
        model = model.to_empty(device="cpu")
        found = of_maskgit(
            model,
            text_len=config.text_len,
            checkpointed=trainer.checkpoint_activations,
            **how | {"rows": trainer.batch_size * (1 + trainer.complementary)},
        )
    return found, encoder if encoder in TEXT_ENCODERS else None


def _tokenizer(name: str, recipe: Path, given: str | None) -> ImageTokenizer:
    """The tokenizer that a recipe names, without values: of its file, or of the recipe for it.

    That recipe stands beside, and writes its results where the file is to be.
    """
    if Path(name).is_file() or (given is None and not Path(name).suffix):
        with torch.device("cpu"):  # a file has values, which a sketch would lose
            saved = load_tokenizer(name)
        return type(saved)(**saved.config)
    others = [Path(given)] if given else sorted(recipe.parent.glob("*vae*.yaml"))
    for other in others:
        stage, read = _read(other)
        if stage == "vae" and (given or Path(read.trainer.results_folder) == Path(name).parent):
            return VQGanVAE(**read.vae.as_dict())
    raise ValueError(
        f"{recipe}: there is no tokenizer {shown(name)} yet, and no recipe beside it that writes "
        "one there: give --vae, the recipe that it is to be trained by"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _verdict(peak: float, memory: float) -> str:
    return "" if peak < 0.95e9 * memory else ": too little, lower trainer.batch_size"
