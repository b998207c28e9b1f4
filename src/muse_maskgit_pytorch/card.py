"""Model cards: what a model is, learnt from and can do, from what was written on the way.

Nothing in a card is typed in that a file knows: parts and sizes are the model's, data, settings,
hours and losses those of ``NAME-run.json`` and ``metrics.jsonl``, figures and the numbers of their
samples those of ``muse eval``, prompts and seeds those of the pictures' records. What was made by
another model is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .arguments import as_path, printable, shown
from .checkpoint import CARD, Saveable
from .files import replacing
from .maskgit import MaskGit
from .muse import Muse
from .provenance import read_records
from .transformer import MaskedTransformer
from .vqgan_vae import ImageTokenizer
from .watching.report import Run, read_metrics
from .watching.run_file import RunFile

PICTURES = "pictures"  # folder of a card's pictures, beside it
# Of the settings, what says where files lay and no more.
PLACES = {"results_folder", "resume", "num_workers", "trackers"}
LAST = ("valid_psnr", "valid_loss", "psnr", "loss")  # figures of a training that a card gives
Path_ = str | PathLike[str]


def write_card(
    model: Saveable,
    folder: Path_,
    *,
    name: str | None = None,
    runs: Sequence[Path_] = (),
    figures: Sequence[Path_] = (),
    pictures: Sequence[Path_] = (),
    license: str | None = None,
    limits: Sequence[str] = (),
) -> Path:
    """Write a model's card, ``README.md``, into its folder (`Saveable.save_pretrained`).

    Args:
        model: that is in the folder.
        folder: in which the pictures are copied to ``pictures``.
        name: of the hub repository, ``owner/name``; the folder's by default.
        runs: results folders of the trainings, tokenizers first.
        figures: JSON files of ``muse eval``: its ``--out`` of a tokenizer, ``figures.json`` of
            generators.
        pictures: PNGs that this model drew, with their records.
        license: of the weights, by the hub's name for it, such as "mit"; those of parts that
            are known (`MaskGit.licenses`) stand beside it.
        limits: sentences on what the model cannot do.

    Returns:
        the card's path.

    Raises:
        ValueError: a file that is missing or of another kind, or that another model made.
    """
    place = as_path(folder, "folder")
    body = [
        _pictures(model, [as_path(path, "picture") for path in pictures]),
        _parts(model),
        _data_and_training(model, [as_path(path, "run") for path in runs]),
        _figures(model, [as_path(path, "figures") for path in figures]),
        _limits(model, limits),
        _licenses(model, license),
    ]
    for path in map(Path, pictures):
        (place / PICTURES).mkdir(parents=True, exist_ok=True)
        if path.resolve() != (place / PICTURES / path.name).resolve():
            shutil.copyfile(path, place / PICTURES / path.name)
    with replacing(place / CARD) as temporary:
        text = model.model_card(name or place.resolve().name, license, "".join(body))
        temporary.write_text(text, encoding="utf-8")
    return place / CARD


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    """Text of anybody's as it stands in a table: no letter of it means anything to Markdown."""
    text = printable(" ".join(str(value).split()), 300)
    return text.replace("|", "\\|").replace("<", "&lt;")


def _model_of_pictures(model: Saveable) -> Muse | None:
    if isinstance(model, Muse):
        return model
    return Muse(model) if isinstance(model, MaskGit) and model.cond_image_size is None else None


def _pictures(model: Saveable, paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    drawer = _model_of_pictures(model)
    if drawer is None:
        raise ValueError(f"pictures are given, which a {type(model).__name__} alone does not draw")
    text = "\n## Pictures\n\nEach PNG holds what drew it, for `muse generate --like`.\n"
    for path in paths:
        rows = []
        for record in read_records(path):
            record.check(drawer, path)
            seeds = record.request.seeds
            rows += [
                (prompt, seeds[row])
                for prompt, row in zip(record.prompts, record.rows, strict=True)
            ]
        text += f"\n![]({PICTURES}/{path.name})\n{_table(['prompt', 'seed'], rows)}"
    return text


def _parts(model: Saveable) -> str:
    rows = [
        (part, facts, f"{sum(p.numel() for p in module.parameters()):,}")
        for part, module, facts in _modules(model)
    ]
    return "\n## Parts\n" + _table(["part", "what", "parameters"], rows)


def _modules(model: Saveable) -> Iterator[tuple[str, Saveable, str]]:
    """Names, the modules themselves and what is to be known of them."""
    if isinstance(model, Muse):
        for name, stage in model.stages.items():
            for part, module, facts in _modules(stage):
                yield f"{name}, {part}", module, facts
    elif isinstance(model, MaskGit):
        side, transformer = model.image_size, model.transformer
        low = model.cond_image_size
        from_low = f", from {low} px" if low else ""
        yield "tokenizer", model.vae, _facts(model.vae)
        yield "transformer", transformer, f"{_facts(transformer)}, {side} px{from_low}"
    else:
        yield "model", model, _facts(model)


def _facts(part: Saveable) -> str:
    kind = type(part).__name__
    if isinstance(part, ImageTokenizer):
        return f"{kind}, {part.factor} pixels a token, {part.codebook_size:,} codes"
    if isinstance(part, MaskedTransformer):
        depth = part.config.get("depth")
        layers = f", {depth} layers" if depth else ""
        return f"{kind}, width {part.dim}{layers}, {part.seq_len} tokens, {_reads(part)}"
    return kind


def _reads(transformer: MaskedTransformer) -> str:
    if transformer.classes is None:
        return f"reads up to {transformer.max_text_len} tokens of `{transformer.text_encoder}`"
    return f"{len(transformer.classes)} classes" if transformer.classes else "unconditional"


def _data_and_training(model: Saveable, folders: Sequence[Path]) -> str:
    if not folders:
        return ""
    data, training, made = [], [], ""
    for folder in folders:
        files = sorted(folder.glob("*-run.json"), key=lambda path: path.stat().st_mtime)
        if not files:
            raise ValueError(
                f"{folder} holds no NAME-run.json: give the results_folder of a training"
            )
        logs = read_metrics(folder)
        for file in files:
            stage = file.name.removesuffix("-run.json")
            run, log = RunFile(folder, stage).read(), logs.get(stage, Run(stage))
            if not run:
                raise ValueError(f"{file} is damaged: it says nothing of the training")
            _check_run(model, run, file)
            data.append(_data_row(stage, run))
            training.append(_training_row(stage, run, log))
            settings = run.get("recipe") or {"settings": run.get("settings"), **_model_of(run)}
            recipe = yaml.safe_dump(_published(settings), sort_keys=False, allow_unicode=True)
            versions = ", ".join(f"{k} {v}" for k, v in dict(run.get("versions") or {}).items())
            made += (
                f"\n<details><summary>Settings of {stage}</summary>\n\n"
                f"```yaml\n{recipe}```\n\n{_cell(versions)}\n\n</details>\n"
            )
    head = ["stage", "steps x batch", "training time", "on", "last figures"]
    return (
        "\n## Data\n"
        + _table(["stage", "source", "images", "held back", "fingerprint"], data)
        + "\n## Training\n"
        + _table(head, training)
        + made
    )


def _model_of(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": run["model"]} if isinstance(run.get("model"), dict) else {}


def _check_run(model: Saveable, run: Mapping[str, Any], file: Path) -> None:
    """Refuse the run of a network that is none of the model's.

    A tokenizer may have got another decoder since.
    """
    stated = _model_of(run).get("model", {})
    if stated.get("kind") == "MaskGit":
        stated = stated["config"]["transformer"]
    kind, wanted = stated.get("kind"), stated.get("config", {})
    others = []
    for _, part, _ in _modules(model):
        if type(part).__name__ == kind:
            here = json.loads(json.dumps(part.config))
            differing = [k for k in wanted if k in here and here[k] != wanted[k]]
            differing = [k for k in differing if not k.startswith("decoder_")]
            if not differing:
                return
            others.append((differing[0], here[differing[0]]))
    if not others:
        raise ValueError(f"{file} is of the training of a {shown(kind)}, which is no part here")
    [(name, here), *_] = others
    raise ValueError(
        f"{file} is of another model's training: its {kind} has {name} {shown(wanted[name])}, this "
        f"one's has {shown(here)}; leave it out"
    )


def _data_row(stage: str, run: Mapping[str, Any]) -> list[object]:
    data = dict(run.get("data") or {})
    items, held = data.get("items"), data.get("held_back")
    return [
        stage,
        _published(data.get("source", "not stated")),
        f"{items:,}" if isinstance(items, int) else "not known",
        held if held is not None else "none",
        data.get("fingerprint", ""),
    ]


def _training_row(stage: str, run: Mapping[str, Any], log: Run) -> list[object]:
    settings, device = dict(run.get("settings") or {}), dict(run.get("device") or {})
    processes = int(device.get("processes") or 1)
    batch = int(settings.get("batch_size") or 0) * int(settings.get("grad_accum_every") or 1)
    last = [
        f"{name} {curve[-1][1]:.4g} (step {curve[-1][0]:,})"
        for name in LAST
        if (curve := log.curves.get(name))
    ]
    cores = f"{processes} x " if processes > 1 else ""
    threads = f", threads: {device.get('threads')}" if "cpu" in str(device.get("kind")) else ""
    return [
        stage,
        f"{log.step:,} x {batch * processes}",
        f"{log.seconds / 3600:.2f} h",
        f"{cores}{device.get('kind', 'not stated')}{threads}",
        ", ".join(last),
    ]


def _published(value: Any) -> Any:
    """Settings without what was not given and where things lay on one's own machine."""
    if isinstance(value, Mapping):
        kept = {k: _published(v) for k, v in value.items() if k not in PLACES and v is not None}
        return {k: v for k, v in kept.items() if v != {}}
    if isinstance(value, list):
        return [_published(part) for part in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return Path(value).name
    return value


def _figures(model: Saveable, paths: Sequence[Path]) -> str:
    text = ""
    for path in paths:
        result = _read_figures(path)
        setup = result.get("setup")
        if isinstance(setup, dict):
            _check_figures(model, setup, path)
        tables = result["metrics"]
        if all("value" in metric for metric in tables.values()):
            tables = {"": tables}
        title = f"{setup['part']} on" if isinstance(setup, dict) and "part" in setup else "On"
        data = result.get("data") or result.get("folder") or "not stated"
        text += f"\n{title} `{_cell(_published(data))}`{_setup(setup)}:\n"
        for network, metrics in tables.items():
            text += f"\n`{_cell(network)}`:\n" if network else ""
            text += _table(
                ["figure", "value", "95 %", "true images", "images", ""],
                [_figure(name, metric) for name, metric in metrics.items()],
            )
    return f"\n## Figures\n{text}" if text else ""


def _read_figures(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text("utf-8"))
        metrics = result["metrics"]
        parts = [metrics] if all("value" in m for m in metrics.values()) else metrics.values()
        if all("images" in metric for part in parts for metric in part.values()):
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as figures ({type(error).__name__}): give a JSON file of "
            "muse eval"
        ) from error
    raise ValueError(f"{path} does not say of how many images its figures are: run muse eval anew")


def _check_figures(model: Saveable, setup: Mapping[str, Any], path: Path) -> None:
    drawer = _model_of_pictures(model)
    if drawer is None or "model" not in setup:
        return
    part = Muse(drawer.base) if setup.get("part") == "base" else drawer
    if setup.get("part") in ("base", "model") and setup["model"] != part.fingerprint:
        raise ValueError(
            f"{path} has figures of the model {shown(setup['model'])}, this one is "
            f"{part.fingerprint}: run muse eval on this one"
        )


def _setup(setup: Any) -> str:
    if not isinstance(setup, dict):
        return ""
    prompts, seeds, seed = (setup.get(name) for name in ("prompts", "seeds", "seed"))
    return f", {prompts} prompts, {seeds} pictures each, seeds from {seed}"


def _figure(name: str, metric: Mapping[str, Any]) -> list[object]:
    between, truth = metric.get("interval"), metric.get("truth")
    return [
        name,
        f"{metric['value']:.5g}",
        " to ".join(f"{end:.4g}" for end in between) if between else "",
        "" if truth is None else f"{truth:.4g}",
        metric["images"],
        metric.get("note", ""),
    ]


def _licenses(model: Saveable, license: str | None) -> str:
    """Of the weights, and of the parts that are others' work."""
    parts = {"weights": license or "not stated"}
    if isinstance(model, (Muse, MaskGit)):
        parts = model.licenses | parts
    lines = "".join(f"- {part}: {_cell(name)}\n" for part, name in parts.items())
    return f"\n## License\n\n{lines}"


def _limits(model: Saveable, limits: Sequence[str]) -> str:
    known = []
    for part, module, _ in _modules(model):
        if isinstance(module, MaskedTransformer) and module.classes is None:
            known.append(
                f"The {part} reads {module.max_text_len} tokens of a text at most, as "
                f"`{module.text_encoder}` understands them."
            )
    known.append("It knows what its data show, with their gaps and biases, and nothing else.")
    return "\n## Limits\n\n" + "".join(f"- {line}\n" for line in [*limits, *known])
