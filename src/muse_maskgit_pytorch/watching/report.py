"""A training run as one HTML page: figures, warnings, pictures, curves.

The page needs no other file: pictures are embedded, curves are SVG, there is no script. It is drawn
from what the training wrote (``metrics.jsonl``, ``NAME-run.json``, ``samples/``), during or after.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..images import read_image
from .health import Curve, Curves, add_line
from .page import embedded, table, write_page
from .run_file import RunFile

MASKED = (25, 50, 75, 100)  # per cent, see `training.probe`
# What a token costs without any model: lines across the loss.
REFERENCES = {
    "uniform": "untrained (ln V)",
    "unigram": "frequency of codes",
    "bigram": "and of neighbours",
}
# Title, unit, names of the curves (an adversary's without it are left out), kind of axis.
CHARTS = [
    ("Reconstruction", "PSNR, dB", ["psnr", "valid_psnr"]),
    ("Loss", "", ["loss", "valid_loss"]),
    ("Loss by share masked", "validation, nats per token", [f"valid_nats_{s}" for s in MASKED]),
    ("Right tokens by share masked", "validation", [f"valid_accuracy_{s}" for s in MASKED]),
    (
        "Whose caption",
        "validation, all masked, nats per token",
        ["valid_nats_own_caption", "valid_nats_other_captions"],
    ),
    ("Terms of reconstruction", "unweighted", ["recon", "perceptual", "valid_mse"]),
    ("Codes in use", "share of the codebook", ["codebook_usage"]),
    ("Codebook perplexity", "codes", ["codebook_perplexity"]),
    ("Terms of the codebook", "unweighted", ["commitment", "codebook", "entropy", "diversity"]),
    ("Terms of the adversary", "unweighted", ["generator", "discriminator"]),
    ("Discriminator accuracy", "share of patches", ["discriminator_accuracy"]),
    ("Discriminator's regularisers", "unweighted", ["lecam", "gradient_penalty"]),
    ("Weight of the adversarial term", "", ["gan_weight"]),
    ("Gradient norms", "before clipping", ["grad_norm", "discriminator_grad_norm"]),
    ("Learning rate", "", ["lr"]),
    ("Contrast of samples", "standard deviation", ["real_contrast", "drawn_contrast"]),
    ("Speed", "steps per second", ["steps_per_s"]),
    ("Time waited for data", "share", ["data_wait"]),
    ("Use of the machine", "share of its matrix products", ["gemm_share"]),
]
MARKS = {"skipped_steps", "restarts"}  # in the charts rather than curves
# without a chart: numbers of a tile, lines across a chart
HIDDEN = MARKS | {"images_per_s", "hours_left", *(f"reference_{name}" for name in REFERENCES)}
EXACT = {"lr", "gan_weight", "steps_per_s", "codebook_usage", "codebook_perplexity"}  # no noise
SHARES = {"codebook_usage", "discriminator_accuracy", "data_wait"}  # always drawn from 0 to 1
SHARES |= {f"valid_accuracy_{share}" for share in MASKED}
ADVERSARY = ("gan_weight", "generator", "discriminator")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 230, 52, 12, 10, 26  # of a chart, in its own units
POINTS = 240  # drawn of a curve: more cannot be told apart
EARLIER = 6  # pictures next to the last one
MAX_PICTURE = 1_500_000, 250_000  # bytes of the last picture, of an earlier one


@dataclass
class Run:
    """What the log holds of one stage."""

    stage: str
    curves: Curves = field(default_factory=dict)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step in the log."""
        steps = [curve[-1][0] for curve in self.curves.values()]
        return max([*steps, *(step for step, _ in self.warnings)], default=0)

    @property
    def seconds(self) -> float:
        """What its steps took, without validation, pictures and pauses."""
        speeds = self.curves.get("steps_per_s", [])
        return sum(
            (step - before) / speed
            for (before, _), (step, speed) in pairwise([(0, 0.0), *speeds])
            if speed > 0
        )


def read_metrics(folder: str | os.PathLike) -> dict[str, Run]:
    """Read the log of a run, stage by stage, in the order in which they began.

    Raises:
        ValueError: there is no ``metrics.jsonl``, or no valid line in it.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no metrics.jsonl: give the results_folder of a training that has run "
            "for at least log_every steps"
        )
    runs = _parse(path)
    if not runs:
        raise ValueError(f"{path} holds not one line of a log: train for at least log_every steps")
    return runs


def read_curves(folder: str | os.PathLike, stage: str) -> Curves:
    """The curves of one stage so far, as `Health` takes them; none where nothing was logged."""
    return _run(folder, stage).curves


def read_warnings(folder: str | os.PathLike, stage: str) -> set[str]:
    """The warnings of one stage so far."""
    return {text for _, text in _run(folder, stage).warnings}


def _run(folder: str | os.PathLike, stage: str) -> Run:
    path = Path(folder) / "metrics.jsonl"
    runs = _parse(path) if path.is_file() else {}
    return runs.get(stage, Run(stage))


def _parse(path: Path) -> dict[str, Run]:
    """Runs by stage.

    Lines that are not whole (the run was killed as it wrote) are passed over. Where a resumed run
    repeats steps, the later lines count.
    """
    runs: dict[str, Run] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            continue
        run = runs.setdefault(str(line.get("stage", "")), Run(str(line.get("stage", ""))))
        add_line(run.curves, line)
        warning = (line["step"], str(line.get("warning")))
        if "warning" in line and warning not in run.warnings:
            run.warnings.append(warning)
    return runs


def write_report(
    folder: str | os.PathLike,
    name: str | None = None,
    out: str | os.PathLike | None = None,
) -> Path:
    """Draw a run as one self-contained HTML page, written atomically.

    Args:
        folder: results folder of the training: ``metrics.jsonl``, ``samples/STAGE-STEP.png``.
        name: the stage to show; None: every stage in the log.
        out: file to write, by default ``report.html`` in the folder.

    Returns:
        The file's path.

    Raises:
        ValueError: no log, or no such stage in it.
    """
    runs = read_metrics(folder)
    if name is not None and name not in runs:
        raise ValueError(f"stage {name!r} is not in the log of {folder}: it has {sorted(runs)}")
    shown = [run for run in runs.values() if name in (None, run.stage)]
    body = "".join(_section(run, Path(folder)) for run in shown)
    title = f"{Path(folder).resolve().name}: {', '.join(run.stage for run in shown)}"
    return write_page(Path(out) if out is not None else Path(folder) / "report.html", title, body)


# The page ----------------------------------------------------------------------------------------


def _section(run: Run, folder: Path) -> str:
    """Everything about one stage."""
    charts = "".join(_charts(run))
    return (
        f"<header><h1>{escape(run.stage)}</h1><p>{escape(str(folder.resolve().name))}, "
        f"step {run.step:,}</p></header>"
        f"{_figures(run)}{_health(run)}{_pictures(run, folder)}{_prompted(run, folder)}"
        f"<h2>Curves</h2>{_key(run)}<div class=charts>{charts}</div>{_made(run, folder)}"
    )


def _figures(run: Run) -> str:
    """The state of things in a few large numbers."""

    def last(name: str) -> float | None:
        """The mean of the latest tenth (at most 20 lines) of a training curve."""
        values = [value for _, value in run.curves.get(name, [])]
        latest = values[-max(1, min(20, len(values) // 10)) :]
        return sum(latest) / len(latest) if latest else None

    def best(name: str, pick: Any) -> str | None:
        curve = run.curves.get(name)
        if not curve:
            return None
        step, value = pick(curve, key=lambda point: point[1])
        return f"{curve[-1][1]:.4g}<small>best {value:.4g} at {_short(step)}</small>"

    usage, perplexity, psnr, speed = (
        last(name) for name in ("codebook_usage", "codebook_perplexity", "psnr", "steps_per_s")
    )
    images, gemm = last("images_per_s"), last("gemm_share")
    left = run.curves.get("hours_left", [(0, 0.0)])[-1][1]
    loss, skipped = last("loss"), run.curves.get("skipped_steps", [(0, 0.0)])[-1][1]
    tiles = {
        "steps": f"{run.step:,}",
        "training time": run.seconds and f"{_duration(run.seconds)}",
        "steps per second": speed and f"{speed:.3g}",
        "validation PSNR, dB": best("valid_psnr", max),
        "training PSNR, dB": psnr is not None and f"{psnr:.4g}",
        "validation loss": best("valid_loss", min),
        "loss": loss is not None and f"{loss:.4g}",
        "images per second": images and f"{images:.3g}",
        "of the machine's products": gemm and f"{gemm:.0%}",
        "time left": left and _duration(3600 * left),
        "codes in use": usage is not None and f"{100 * usage:.3g} %",
        "perplexity": perplexity is not None and f"{perplexity:,.0f}",
        "steps skipped": skipped and f"{skipped:,.0f}",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{v}</dd></div>" for name, v in tiles.items() if v)
    return f"<dl class=tiles>{cells}</dl>"


def _health(run: Run) -> str:
    if not run.warnings:
        return "<section class='health good'><h2>Health</h2><p>No warnings.</p></section>"
    count = f"{len(run.warnings)} warning{'s' if len(run.warnings) > 1 else ''}"
    items = []
    for step, text in run.warnings[-20:]:
        what, colon, rest = text.partition(": ")
        words = f"<b>{escape(what)}</b>{colon}{escape(rest)}"
        items.append(f"<tr><th>step {step:,}<td>{words}")
    more = len(run.warnings) - len(items)
    note = f"<p>The latest {len(items)}; {more} earlier ones are in metrics.jsonl.</p>"
    return (
        f"<section class='health bad'><h2>Health: {count}</h2>{note if more else ''}"
        f"<table>{''.join(items)}</table></section>"
    )


def _made(run: Run, folder: Path) -> str:
    """How the run was made: the sittings, and its description part by part, closed up."""
    made = RunFile(folder, run.stage).read()
    if not made:
        return ""
    sittings, tables = made.pop("sittings", None), ""
    for number, sitting in enumerate(sittings if isinstance(sittings, list) else [], 1):
        if isinstance(sitting, dict):
            tables += table(f"Sitting {number}", sitting)
    alone = {name: value for name, value in made.items() if not isinstance(value, dict)}
    for title, part in [("", alone), *made.items()]:
        if isinstance(part, dict) and part:
            tables += table(title.capitalize(), part)
    return f"<h2>How it was made</h2><div class=made>{tables}</div>"


def _embedded(path: Path, max_width: int, max_bytes: int) -> str:
    """A picture of the run; "" if it is unreadable."""
    try:
        return embedded(read_image(path), max_width, max_bytes)
    except ValueError:
        return ""


def _pictures(run: Run, folder: Path) -> str:
    """What is drawn of the data."""
    note = "Images above, their reconstructions below. " if run.stage == "vae" else ""
    return _sheets("Pictures", note, folder, run.stage)


def _prompted(run: Run, folder: Path) -> str:
    """What is drawn of the prompts that were asked for."""
    note = "Averaged weights, and beside them the raw ones. "
    return _sheets("Prompts", note, folder, f"{run.stage}-prompts")


def _sheets(title: str, note: str, folder: Path, name: str) -> str:
    """The last picture large, and earlier ones from all over the run."""
    steps: dict[int, Path] = {}
    for path in (folder / "samples").glob(f"{name}-*.png"):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdigit():
            steps[int(number)] = path
    found = sorted(steps)
    while found:
        last = _embedded(steps[found[-1]], 1600, MAX_PICTURE[0])
        if last:
            break
        found.pop()  # cut off by a kill
    else:
        return ""
    *earlier, final = found
    chosen = earlier
    if len(earlier) > EARLIER:  # the first, the last but one, and evenly between them
        places = [round(i * (len(earlier) - 1) / (EARLIER - 1)) for i in range(EARLIER)]
        chosen = [earlier[place] for place in places]
    row = ""
    for step in chosen:
        image = _embedded(steps[step], 700, MAX_PICTURE[1])
        if image:
            row += f"<figure>{image}<figcaption>step {step:,}</figcaption></figure>"
    return (
        f"<h2>{title}</h2><figure class=last>{last}<figcaption>{note}Step {final:,}.</figcaption>"
        f"</figure><div class=earlier>{row}</div>"
    )


# The charts --------------------------------------------------------------------------------------


def _marks(run: Run) -> list[tuple[str, str, list[int]]]:
    """Class, meaning and steps of the vertical marks."""
    starts = []
    for name in ADVERSARY:
        curve = run.curves.get(name, [])
        starts += [step for step, value in curve if value or name != "gan_weight"][:1]
    first = min((curve[0][0] for curve in run.curves.values() if curve), default=0)
    start = [step for step in starts[:1] if step > first]
    grown = {
        name: [b for (_, was), (b, now) in pairwise(run.curves.get(name, [])) if now > was]
        for name in MARKS
    }
    return [
        ("start", "the adversary starts", start),
        ("skip", "steps were skipped", grown["skipped_steps"]),
        ("restart", "back to the last good checkpoint", grown["restarts"]),
    ]


def _key(run: Run) -> str:
    items = [
        f"<span><i class='rule {kind}'></i>{meaning}</span>"
        for kind, meaning, steps in _marks(run)
        if steps
    ]
    return f"<p class=key>{''.join(items)}</p>" if items else ""


def _charts(run: Run) -> Iterator[str]:
    """Every curve in the log: known ones in their groups, any other in a chart of its own."""
    known = {name for *_, names in CHARTS for name in names} | HIDDEN
    others = sorted({n.removeprefix("valid_") for n in run.curves if n not in known} - known)
    loose = [(name.replace("_", " ").capitalize(), "", [name, f"valid_{name}"]) for name in others]
    loose += [
        (f"Validation {n.removeprefix('valid_')}".replace("_", " "), "", [n])
        for n in run.curves
        if n not in known and n.removeprefix("valid_") in known
    ]
    all_curves = dict(run.curves)
    if "valid_nats_other_captions" in all_curves:
        all_curves["valid_nats_own_caption"] = all_curves.get("valid_nats_100", [])
    lines = {
        meaning: run.curves[f"reference_{name}"][-1][1]
        for name, meaning in REFERENCES.items()
        if run.curves.get(f"reference_{name}")
    }
    for title, unit, names in [*CHARTS, *loose]:
        curves = {name: all_curves[name] for name in names if all_curves.get(name)}
        if curves:
            across = lines if names[0].startswith("valid_nats") else {}
            yield _chart(title, unit, curves, max(1, run.step), _marks(run), across)


def _chart(
    title: str, unit: str, curves: Curves, last: int, marks: Sequence[tuple[str, str, list[int]]],
    across: Mapping[str, float],
) -> str:  # fmt: skip
    """One line chart: raw values faint, running means strong; levels by their meaning across it."""
    means = {n: curve if n in EXACT else _smooth(curve) for n, curve in curves.items()}
    low, high, log = _range(curves, means)
    if across:
        low, high, log = min(low, *across.values()), max(high, *across.values()), False
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    if not log and not SHARES & curves.keys():
        low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        if log:
            share = math.log(max(value, 1e-30) / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.5, max(-0.5, share))

    def path(points: Curve) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    parts = []
    for tick in ticks:
        parts.append(f"<path class=grid d='M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x={LEFT - 6} y={y(tick) + 4:.1f} class=y>{_number(tick)}</text>")
    for tick in _ticks(0, last, 6):
        if 0 <= tick <= last:
            parts.append(f"<path class=tick d='M{x(tick):.1f} {HEIGHT - BOTTOM}v4'/>")
            anchor = " class=end" if x(tick) > WIDTH - 24 else ""
            parts.append(f"<text x={x(tick):.1f} y={HEIGHT - 7}{anchor}>{_short(tick)}</text>")
    for kind, meaning, steps in marks:
        for step in _thinned(steps, 60):
            parts.append(
                f"<path class='mark {kind}' d='M{x(step):.1f} {TOP}V{HEIGHT - BOTTOM}'>"
                f"<title>step {step:,}: {meaning}</title></path>"
            )
    for meaning, level in across.items():
        parts.append(f"<path class='mark level' d='M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}'/>")
        label = f"{meaning}: {_number(level)}"
        parts.append(f"<text x={WIDTH - RIGHT} y={y(level) - 3:.1f} class=end>{label}</text>")
    # an inner <svg> cuts off what leaves the plot
    wide, tall = WIDTH - LEFT - RIGHT + 8, HEIGHT - TOP - BOTTOM + 8
    box = f"{LEFT - 4} {TOP - 4} {wide} {tall}"
    parts.append(f"<svg x={LEFT - 4} y={TOP - 4} width={wide} height={tall} viewBox='{box}'>")
    legend = []
    for number, (name, curve) in enumerate(curves.items()):
        if means[name] != curve:
            parts.append(f"<polyline class='raw c{number}' points='{path(_outline(curve))}'/>")
        parts.append(f"<polyline class='line c{number}' points='{path(_thinned(means[name]))}'/>")
        if len(curve) <= 30:
            for step, value in curve:
                parts.append(f"<circle class=c{number} cx={x(step):.1f} cy={y(value):.1f} r=2.5 />")
        of = name.removeprefix("valid_")
        label = name.replace("valid_", "validation ").replace("_", " ")
        if of != name and of in curves:
            label = "validation"
        elif of == name and len(curves) == 1:
            label = "last"
        if of[-2:].isdigit() and of.startswith(("nats_", "accuracy_")):
            label = f"{of.rpartition('_')[2]} %"
        end = _number(means[name][-1][1], 4)
        legend.append(f"<span><i class=c{number}></i>{escape(label)} <b>{end}</b></span>")
    scale = f"{unit}, log scale" if unit and log else "log scale" if log else unit
    return (
        f"<figure class=chart><figcaption><h3>{escape(title)}</h3><small>{escape(scale)}</small>"
        f"<div>{''.join(legend)}</div></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{escape(title)}'>"
        f"{''.join(parts)}</svg></svg></figure>"
    )


def _smooth(curve: Curve) -> Curve:
    """Running mean over a twentieth of a curve; short curves stay as they are.

    Centred, without a look ahead at the steep start, and over the latest values at the end.
    """
    reach = len(curve) // 40
    if reach == 0:
        return curve
    sums = [0.0]
    for _, value in curve:
        sums.append(sums[-1] + value)
    smooth = []
    for i, (step, _) in enumerate(curve):
        first = i - min(reach, i)
        last = min(2 * i - first, len(curve) - 1)
        smooth.append((step, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return smooth


def _outline(curve: Curve) -> Curve:
    """A long curve by the least and the largest value of each stretch, in their order."""
    size = math.ceil(len(curve) / POINTS)
    if size <= 2:
        return curve
    points: Curve = []
    for start in range(0, len(curve), size):
        stretch = curve[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        points += sorted(ends)
    return points


def _thinned(items: list, most: int = POINTS) -> list:
    """At most so many of a list, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _range(curves: Curves, means: Curves) -> tuple[float, float, bool]:
    """Lower and upper end of the axis, and whether it is logarithmic.

    A few outliers among the raw values may leave the chart: the means and the middle 98 % stay.
    """
    if SHARES & curves.keys():
        return 0.0, 1.0, False
    values = [value for curve in means.values() for _, value in curve]
    for curve in curves.values():
        raw = sorted(value for _, value in curve)
        cut = len(raw) // 100
        values += [raw[cut], raw[-1 - cut]]
    low, high = min(values), max(values)
    psnr = any(name.endswith("psnr") for name in curves)  # decibels are logarithms already
    from_zero = curves.keys() & EXACT
    if low > 0 and high > 20 * low and not psnr and not from_zero:
        return low / 1.1, high * 1.1, True
    if from_zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):  # a constant
        low, high = low - 0.1 * abs(low or 1), high + 0.1 * abs(high or 1)
    return low, high, False


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that enclose the range: steps of 1, 2 or 5 times 10^n."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.999 * rough)
    first, after = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, after + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range; with 2 and 5 times them where those alone are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = math.ceil(len(powers) / 7)
    tens = [10.0**p for p in powers if p % every == 0 and low <= 10.0**p <= high]
    if len(tens) >= 3:
        return tens
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    return [tick for tick in fine if low <= tick <= high]


def _number(value: float, digits: int = 3) -> str:
    """Short and exact enough: 0.05, 12.3, 40k, 3e-5."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return _short(value)
    if abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(power)}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def _short(step: float) -> str:
    """Steps: 950, 1.5k, 20k, 1.2M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{step / size:.4g}{letter}"
    return f"{step:.3g}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"
