r"""Every way to sample, side by side: what the pictures get right, passes, seconds.

    python examples/scenes/sprites.py
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --model FILE --out runs/sampling

draws sentences of `examples/scenes` that training never saw with the base stage of a model, three
seeds each: every policy at 4 to 32 steps, guidance schedules over strengths, temperatures, noise
of the order, ReMDM. The judge of scenes says which facts are right. It ends with a table and a plot
(needs matplotlib). What is already in ``--out`` is not drawn again, so an interrupted benchmark
goes on.

All settings but the stated ones are the defaults of `SampleOptions`, not the model's. The noise of
an image depends on its sentence and seed alone, so differences are those of the settings.
Intervals are 95 %, by the bootstrap over sentences; beside them stand the least and the most of the
seeds. "Rows" are the rows of tokens that went through the transformer, and the critic, for one
image; seconds are CPU time on a CPU, without the decoder.

The sentences are divided in two fixed halves, ``--part tune`` and ``--part test``: what was chosen
on one can be reported on the other. One more configuration:

    python benchmarks/sampling.py --model FILE --name fast8 \
        --options '{"timesteps": 8, "policy": "halton"}'

``--against NAME`` adds to the table how each differs from one of them, for the same sentences and
seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from muse_maskgit_pytorch import MaskGit, SampleOptions, TextEmbeds
from muse_maskgit_pytorch.evaluation.figures import bootstrap_mean
from muse_maskgit_pytorch.images import to_pil
from muse_maskgit_pytorch.loading import open_model

sys.path[0] = str(Path(__file__).parents[1] / "examples" / "scenes")
from judge import WEIGHTS, Judge  # noqa: E402
from scenes import SPLITS, Scene, Scenes  # noqa: E402

POLICIES: dict[str, dict[str, Any]] = {
    **{p: {"policy": p} for p in ("confidence", "margin", "entropy", "halton", "random")},
    "remask": {"policy": "confidence", "remask": 0.5},
    "halton-remask": {"policy": "halton", "remask": 0.5},
    "critic": {"policy": "critic"},
}
# AutoNAT's tables (Ni et al. 2024) for 8 steps; read linearly in between for others.
AUTONAT = {
    "cond_scale": 2.0,
    "noise_schedule": [0.953, 0.880, 0.794, 0.746, 0.625, 0.407, 0.261],
    "guidance_schedule": [0, 0, 0, 0.9, 1.6, 1.2, 1.4, 1.2],
}
GUIDANCE: dict[str, dict[str, Any]] = {
    "none": {"cond_scale": 1.0},
    **{
        f"{name}-{scale:g}": {"cond_scale": scale, "guidance_schedule": schedule}
        for name, schedule in {
            "constant": "constant",
            "linear": "linear",
            "cosine": "cosine",
            "interval": [0, 0, 0, 1, 1, 1, 1, 1],  # none in the first third
        }.items()
        for scale in (1.5, 2.0, 3.0, 4.5)
    },
    "autonat": AUTONAT,
}
CHOICE: dict[str, dict[str, Any]] = {
    **{f"temperature-{t:g}": {"temperature": t} for t in (0.3, 0.5, 0.7, 0.85, 1.2)},
    "temperature-1.2-0.6": {"temperature": 1.2, "temperature_end": 0.6},
    "temperature-0.5-1": {"temperature": 0.5, "temperature_end": 1.0},
    **{f"noise-{t:g}": {"choice_temperature": t} for t in (0.0, 1.0, 2.0, 8.0)},
    **{f"top-p-{p:g}": {"top_p": p} for p in (0.8, 0.9, 0.95)},
    **{f"remask-{r:g}": {"remask": r} for r in (0.1, 0.3, 0.8)},
}
GROUPS = {"policies": POLICIES, "guidance": GUIDANCE, "choice": CHOICE}
STEPS = {"policies": (4, 8, 12, 16, 24, 32), "guidance": (8, 16), "choice": (16,)}
COLUMNS = ("all", "subject", "count", "relation", "size", "background", "style")
Result = dict[str, Any]


def configurations(critic: bool) -> list[Result]:
    """Name, group, series and options of each; the critic's for models that have one."""
    found = []
    for group, series in GROUPS.items():
        for name, settings in series.items():
            settings = {"policy": "confidence", **settings}
            if settings["policy"] == "critic" and not critic:
                continue
            found += [
                {
                    "name": f"{name}-{steps}" if len(STEPS[group]) > 1 else name,
                    "group": group,
                    "series": name,
                    "options": {**settings, "timesteps": steps},
                }
                for steps in STEPS[group]
            ]
    return found


def choose(split: str, sprites: Path, count: int, part: str) -> list[Scene]:
    """Scenes of a split: all of so many, or every other one."""
    data = Scenes(sprites, split)
    numbers = {"all": slice(None), "tune": slice(0, None, 2), "test": slice(1, None, 2)}[part]
    return [data.scene(number) for number in range(count)[numbers]]


class RowCounter:
    """Counts the rows of tokens that go through a model's transformer and critic."""

    def __init__(self, model: MaskGit):
        self.rows = 0
        networks: list[nn.Module] = [model.transformer]
        if isinstance(model.critic, type(model.transformer)):  # a self-critic calls the transformer
            networks.append(model.critic)
        for network in networks:
            network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        ids, context = arguments[:2]
        self.rows += len(ids) * context.num_branches  # of the guidance


@torch.no_grad()
def draw(
    model: MaskGit,
    text: TextEmbeds,
    options: SampleOptions,
    seeds: list[int],
    batch_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, float]:
    """Images (B, 3, H, W) on the CPU, and the seconds that sampling their ids took."""
    device, images, seconds = model.device, [], 0.0
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for at in range(0, len(seeds), batch_size):
        rows = slice(at, at + batch_size)
        before = clock()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ids = model.generate_ids(
                text_embeds=TextEmbeds(text.embeds[rows], text.mask[rows]),
                options=options.replace(seeds=seeds[rows]),
            ).cpu()
        seconds += clock() - before
        images.append(model.decode(ids.to(device)).float().cpu())
    return torch.cat(images), seconds


def read(path: Path, setup: dict[str, Any]) -> list[Result]:
    """What is done already.

    Raises:
        ValueError: results of other captions or another model.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    results = [json.loads(line) for line in lines]
    for result in results:
        if result["setup"] != setup:
            raise ValueError(f"{path} is of {result['setup']}, not {setup}: give another --out")
    return results


def write(path: Path, results: list[Result]) -> None:
    """All at once, so that an interruption leaves no half line."""
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(result) + "\n" for result in results))
    new.replace(path)


def judged(judge: Judge, images: Tensor, scenes: list[Scene]) -> dict[str, list[float | None]]:
    """By the kind of fact, for each picture whether it is right; None where none is stated."""
    found: dict[str, list[float | None]] = {kind: [] for kind in COLUMNS}
    stated = [scene.facts() for scene in scenes]
    for at in range(0, len(scenes), 64):
        rows = slice(at, at + 64)
        for kinds in judge.facts(to_pil(images[rows]), stated[rows]):
            for kind in COLUMNS:
                right = all(kinds.values()) if kind == "all" else kinds.get(kind)
                found[kind].append(None if right is None else float(right))
    return found


def summary(result: Result, kind: str) -> tuple[float, float, float, float, float]:
    """Share of right pictures, its interval, and the least and the most of the seeds."""
    by_seed = [figures[kind] for figures in result["figures"]]
    table = torch.tensor([[-1.0 if v is None else v for v in values] for values in by_seed])
    if not (table >= 0).any():  # of few scenes, none states such a fact
        return (math.nan,) * 5
    mean, interval = bootstrap_mean(table.T.double(), table.T >= 0)
    single = [bootstrap_mean(row.double(), row >= 0)[0] for row in table]
    return mean, *(interval or (mean, mean)), min(single), max(single)


def difference(figures: list[Any], others: list[Any]) -> tuple[float, float, float]:
    """How much more of the same pictures are all right, and the interval of that.

    Args:
        figures: by seed what `judged` found.
        others: likewise, of the same scenes and seeds.
    """
    more = [torch.tensor([f["all"] for f in each]).double() for each in (figures, others)]
    mean, interval = bootstrap_mean((more[0] - more[1]).T)
    return mean, *(interval or (mean, mean))


def table(results: list[Result], against: str | None = None) -> str:
    """Markdown, a row for each configuration, those of the benchmark in its order.

    Args:
        results: of all of them.
        against: the name of one, from which the others are to differ.
    """
    base = next((result for result in results if result["name"] == against), None)
    places = {config["name"]: place for place, config in enumerate(configurations(True))}
    results = sorted(results, key=lambda result: places.get(result["name"], len(places)))
    head = ["configuration", "rows", "s per image", "all facts right"]
    head += [f"against {against}"] if base else []
    head += COLUMNS[1:]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        cells = [result["name"], f"{result['rows_per_image']:.4g}"]
        cells.append(f"{result['seconds_per_image']:.3f}")
        mean, low, high, least, most = summary(result, "all")
        cells.append(f"{mean:.3f} ({low:.3f}–{high:.3f}; seeds {least:.3f}–{most:.3f})")
        if base:
            mean, low, high = difference(result["figures"], base["figures"])
            cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        cells += [f"{summary(result, kind)[0]:.3f}" for kind in COLUMNS[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Policies over the steps, guidance over what it costs, the choice and others by themselves."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]  # only needed here

    across = {"policies": "steps", "guidance": "rows per image", "choice": "", "further": ""}
    groups = [group for group in across if any(r["group"] == group for r in results)]
    figure, axes = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 6), squeeze=False)
    style = {"marker": "o", "markersize": 4, "elinewidth": 0.7, "capsize": 2}
    for axis, group in zip(axes[0], groups, strict=True):
        names = list(dict.fromkeys(r["series"] for r in results if r["group"] == group))
        for number, name in enumerate(names):
            of_series = [r for r in results if (r["group"], r["series"]) == (group, name)]
            points = sorted(
                (
                    r["options"]["timesteps"] if group == "policies" else r["rows_per_image"],
                    *summary(r, "all")[:3],
                )
                for r in of_series
            )
            x, mean, low, high = torch.tensor(points).T
            x = x if across[group] else torch.full_like(x, number)
            spread = torch.stack([mean - low, high - mean]).clamp(min=0)
            axis.errorbar(x, mean, spread, label=name, color=f"C{number % 10}", **style)
        named = "" if group == "further" else f"{group}: "
        axis.set_title(f"{named}share of pictures with all facts right")
        axis.set_xlabel(across[group])
        axis.grid(alpha=0.3)
        if across[group]:
            axis.legend(fontsize=7)
        else:
            axis.set_xticks(range(len(names)), names, rotation=70, ha="right")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="name or file of a Muse or a base")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--judge", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    parser.add_argument("--split", choices=SPLITS[1:], default="seen")
    parser.add_argument("--part", choices=("all", "tune", "test"), default="all")
    parser.add_argument("--scenes", type=int, default=200, help="before they are divided")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", help="groups, series or names: policies, halton, halton-8"
    )
    parser.add_argument("--options", type=json.loads, help="SampleOptions of one further, as JSON")
    parser.add_argument("--name", help="of that one")
    parser.add_argument("--against", help="name of one from which the table shows differences")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    if (args.options is None) != (args.name is None):
        parser.error("--options and --name belong together")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    muse = open_model(args.model)
    model = muse.base.to(device)
    wanted = configurations(model.critic is not None)
    if args.only:
        known = {c[key] for c in wanted for key in ("group", "series", "name")}
        if unknown := set(args.only) - known:
            parser.error(f"--only {' '.join(sorted(unknown))}: choose of {' '.join(sorted(known))}")
    if args.only or args.name:
        chosen = set(args.only or ())
        wanted = [c for c in wanted if {c["group"], c["series"], c["name"]} & chosen]
    if args.name:
        further = {"name": args.name, "group": "further", "series": args.name}
        wanted.append({**further, "options": args.options})
    every = [SampleOptions(**c["options"]) for c in wanted]  # refuses bad ones before any work

    scenes = choose(args.split, args.sprites, args.scenes, args.part)
    judge = Judge.load(args.judge)
    text = model.embed_texts([scene.caption.text for scene in scenes])
    setup = {
        "model": muse.fingerprint,
        "judge": hashlib.sha256(args.judge.read_bytes()).hexdigest()[:16],
        "split": args.split,
        "part": args.part,
        "scenes": len(scenes),
        "seeds": args.seeds,
        "dtype": args.dtype,
    }

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    results = read(path, setup)
    names = {result["name"] for result in [*results, *wanted]}
    if args.against and args.against not in names:
        parser.error(f"--against {args.against}: choose of {' '.join(sorted(names))}")
    dtype = getattr(torch, args.dtype)
    draw(model, text, SampleOptions(timesteps=1), [0] * min(8, len(scenes)), 8, dtype)  # warming up
    counter = RowCounter(model)
    for config, options in zip(tqdm(wanted, unit="configuration"), every, strict=True):
        alike = {r["name"]: r for r in results if SampleOptions(**r["options"]) == options}
        if config["name"] in alike:
            continue
        if config["name"] in {r["name"] for r in results}:
            raise ValueError(f"{path} has other options under {config['name']!r}: take a new name")
        if alike:
            results.append({**next(iter(alike.values())), **config})
        else:
            counter.rows, seconds, figures = 0, 0.0, []
            for seed in args.seeds:
                seeds = [seed * 100_000 + row for row in range(len(scenes))]
                drawn, spent = draw(model, text, options, seeds, args.batch_size, dtype)
                seconds += spent
                figures.append(judged(judge, drawn, scenes))
            count = len(args.seeds) * len(scenes)
            costs = {"rows_per_image": counter.rows / count, "seconds_per_image": seconds / count}
            results.append({**config, **costs, "figures": figures, "setup": setup})
        write(path, results)
    print(table(results, args.against))
    try:
        plot(results, args.out / "sampling.png")
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    main()
