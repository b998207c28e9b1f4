"""`muse tune`: searches a stage's sampling options and stores them as a preset of its model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import find_file
from ..data.folder import ImageFolder, open_source
from ..devices import pick_device
from ..evaluation import Truth
from ..evaluation.tuning import (
    SCORES,
    Figures,
    Results,
    effective,
    make_axes,
    make_trials,
    search,
    settings,
    start_of,
    write_preset,
)
from ..features import FeatureNet
from ..files import check_output
from ..foreign import is_pipeline
from ..loading import open_stage
from ..muse import Muse
from ..presets import check_preset
from ..sampling import SampleOptions
from .evaluate import open_judge
from .parser import Parser


def tune(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    if config.preset != "default":
        check_preset(config.preset)
    model = None if is_pipeline(config.model) else find_file(config.model)
    out = _check_out(config.out, model)
    if config.results is not None:
        config.results = check_output("--results", config.results)
    score = config.score or ("balanced" if config.judge is None else "facts")
    if (score == "facts") != (config.judge is not None):
        raise ValueError(
            f"--score {score} is by "
            + ("a judge: say which, --judge FILE.py:NAME" if score == "facts" else "a network, and "
               "--judge is given: leave one of them out")
        )  # fmt: skip
    judge = None if config.judge is None else open_judge(config.judge)
    stage = open_stage(model or config.model, config.stage)
    start = start_of(stage, config.preset, config.timesteps)
    axes = make_axes(stage, config.policies)
    results = Results(config.results)
    size = stage.image_size
    truth = Truth(open_source(config.data, None, True), stage.geometry, (size, size))
    gallery = ImageFolder(config.gallery, size, cache=True) if config.gallery else None
    device = pick_device(config.device)
    tuned_on, others = make_trials(
        stage.to(device),
        judge or FeatureNet(config.network).to(device),
        truth.prompts,
        truth.images(range(len(truth))),
        gallery=None if gallery is None else _images(gallery),
        captions=config.captions,
        seeds=config.seeds,
        results=results,
        batch_size=config.batch_size,
        bf16=config.bf16,
    )
    found = start
    try:
        for found in search(tuned_on, start, axes, score, config.rounds):  # noqa: B007
            pass
        figures = [trial(options) for trial in (tuned_on, others) for options in (start, found)]
    except KeyboardInterrupt:
        print(f"{config.preset}, best so far: {_json(found)}")
        raise
    print(table(figures))
    print(f"{config.preset}: {_json(found)}")
    better = SCORES[score]
    before, after = figures[2:]
    if found != start and better(after, before) <= better(before, before):
        warnings.warn(
            f"by the score {score!r} this is no better on the captions not searched on: "
            "take more captions or seeds",
            stacklevel=2,
        )
    if out:
        # in diffusers' layout there is no place for presets
        model = model or Muse.from_pretrained(config.model).save(out)
        print(write_preset(model, out, config.preset, effective(found), config.stage))


def table(figures: list[Figures]) -> str:
    """One line per figure: before and after on what was searched on, and on the others."""
    rows = [["", "searched on", "", "others", ""], ["", "before", "after", "before", "after"]]
    rows += [[name, *(format(one[name], ".4g") for one in figures)] for name in figures[0]]
    wide = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    )


def _images(dataset: ImageFolder) -> Tensor:
    return torch.stack([dataset[row]["image"] for row in range(len(dataset))])


def _check_out(out: str | None, model: Path | None) -> Path | None:
    if out is None:
        return None
    path = check_output("--out", out, ".safetensors")
    if path.exists() and not (model and path.samefile(model)):
        raise ValueError(
            f"--out {out!r} exists and is not the file of --model: take a new name, or name the "
            "model's file to change the preset in place"
        )
    return path


def _json(options: SampleOptions) -> str:
    """What is not as in `SampleOptions`, and the steps."""
    default, options = settings(SampleOptions()), effective(options)
    stated = {
        name: value
        for name, value in settings(options).items()
        if name == "timesteps" or value != default[name]
    }
    return json.dumps(stated)
