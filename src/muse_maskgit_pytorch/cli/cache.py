"""`muse cache`: a folder of images into token ids and text embeddings, for the training."""

from __future__ import annotations

from tqdm.auto import tqdm

from ..arguments import as_path
from ..data.cache import Manifest
from ..data.dataset import ImageDataset
from ..data.encoding import write_cache
from ..data.folder import open_source
from ..data.pixels import View
from ..loading import open_stage
from ..maskgit import MaskGit
from ..text import TextCompute
from ..training.parallel import Parallel
from ..watching.run_file import leaves
from .options import maskgit_parser
from .parser import Parser
from .recipe import Recipe
from .train import make_maskgit, open_start


def cache(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    if config.flip and not config.crops:
        raise ValueError("--flip mirrors crops, and there are none: say how many, --crops 2")
    parallel = Parallel("no")
    models = [_open(name).to(parallel.device).eval() for name in config.model]
    for model in models:
        model.text_compute = TextCompute(config.text_precision, config.text_device)
    size = max(model.image_size for model in models)
    low = [model.cond_image_size or model.image_size for model in models]
    cond_size = min(low) if min(low) < size and not config.crops else None
    if config.cond_folder is not None and cond_size is None:
        raise ValueError(
            "--cond_folder is of a super-resolution without crops: leave it or --crops out"
        )
    classes = models[0].transformer.classes
    source = open_source(
        config.data, config.folder, classes != (), config.cond_folder, classes=classes or (),
        image_column=config.image_column, text_column=config.text_column, min_size=config.min_size,
    )  # fmt: skip
    crop = "random" if config.crops else "center"
    largest = max(models, key=lambda model: (model.image_size, model.cond_image_size or 0))
    ratios = config.aspect_ratios
    buckets = () if ratios is None else largest.geometry.buckets(ratios)
    view = View(size, crop, config.crop_scale, config.flip, config.seed, buckets)
    finished = write_cache(
        config.out,
        models,
        ImageDataset(source, view, classes != (), cond_size, masks=True),
        crops=config.crops,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        rank=parallel.rank,
        world=parallel.world,
        say=tqdm.write if parallel.is_main else None,
    )
    if finished:
        print(_in_words(config.out))
    elif parallel.is_main:
        print("this process has done its share; the cache is finished when all have")


def _open(name: str) -> MaskGit:
    """A saved stage, or the one that a recipe of ``muse train`` describes."""
    path = as_path(name, "model")
    if path.suffix.lower() not in (".yaml", ".yml"):
        return open_stage(name)
    every = maskgit_parser(superres=True)
    said = leaves(Recipe(path, every.keys(), every.sections()).tree())
    superres = "maskgit.cond_image_size" in said
    parser, argv = maskgit_parser(superres), ["--config", str(path)]
    start = open_start(parser, argv, superres)
    config = parser.read(argv)
    if start is None:
        config.transformer.depth = 1  # no layer of it reads the data, and a large one takes long
    return make_maskgit(config, start)


def _in_words(folder: str) -> str:
    """What a finished cache holds."""
    manifest = Manifest.read(as_path(folder))
    plan, shards = manifest.plan, manifest.shards or []
    broken = sum(count for _, count, _ in shards)
    return (
        f"{folder}: {plan.images:,} images"
        + (f" ({broken:,} broken)" if broken else "")
        + (f" in {plan.crops} crops each" if plan.crops else "")
        + f", ids of {' and '.join(map(str, plan.ids))}, texts of {plan.texts}; "
        + f"{sum(size for *_, size in shards) / 1e6:,.3g} MB in {len(shards)} shards"
    )
