"""Every way to sample, side by side: retrieval, FID, precision and recall, passes, seconds.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py --out runs/sampling

draws the held-out emoji captions with the base stage of the shipped model: each policy at 4 to 32
steps, each guidance schedule at 8 and 16, three seeds each. It ends with a table (mean over the
seeds, and in brackets the least and the most) and a plot (needs matplotlib). What is already in
``--out`` is not drawn again, so an interrupted benchmark goes on.

All settings but the stated ones are the defaults of `SampleOptions`, not the model's. The noise of
an image depends on its caption and seed alone, so differences are those of the settings. FID,
precision and recall are of EfficientNet-Lite0's features (the extra ``perceptual``), and hold
between equal numbers of captions only. "Rows" are the rows of tokens that went through the
transformer, and the critic, for one image; seconds are CPU time on a CPU, without the decoder.
Sampling runs in bfloat16: 2.5 times as fast on a CPU that has it, and no worse (confidence order,
16 steps, 100 captions: R@1 0.837, FID 117.4; in float32, ``--dtype float32``, 0.843 and 117.7; the
seeds differ by 0.06 and 4).

The captions of a split are divided in two fixed halves, ``--part tune`` and ``--part test``: what
was chosen on one can be reported on the other. One more configuration:

    python benchmarks/sampling.py --name fast8 --options '{"timesteps": 8, "policy": "halton"}'
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from muse_maskgit_pytorch import MaskGit, SampleOptions, TextEmbeds
from muse_maskgit_pytorch.data import ImageFolder
from muse_maskgit_pytorch.evaluation.generator import Judge
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.loading import open_model

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
    **{g: {"guidance_schedule": g} for g in ("constant", "linear", "cosine")},
    "interval": {"guidance_schedule": [0, 0, 0, 1, 1, 1, 1, 1]},  # none in the first third
    "autonat": AUTONAT,
    "none": {"cond_scale": 1.0},
}
STEPS = {"policies": (4, 8, 12, 16, 24, 32), "guidance": (8, 16)}
# Figures by name, as they are headed.
COLUMNS = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
}
Result = dict[str, Any]


def configurations(critic: bool) -> list[Result]:
    """Name, group, series and options of each; the critic's for models that have one."""
    found = []
    for group, series in {"policies": POLICIES, "guidance": GUIDANCE}.items():
        for name, settings in series.items():
            settings = {"policy": "confidence", **settings}
            if settings["policy"] == "critic" and not critic:
                continue
            found += [
                {
                    "name": f"{name}-{steps}",
                    "group": group,
                    "series": name,
                    "options": {**settings, "timesteps": steps},
                }
                for steps in STEPS[group]
            ]
    return found


def load(folder: Path, image_size: int) -> tuple[list[str], Tensor]:
    """Captions and images (n, 3, S, S)."""
    dataset = ImageFolder(folder, image_size, captions=True, cache=True)
    items = [dataset[row] for row in range(len(dataset))]
    return [item["text"] for item in items], torch.stack([item["image"] for item in items])


def choose(count: int, part: str, most: int | None) -> Tensor:
    """Which captions of a split: all, or one of two fixed halves; perhaps the first few of them."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    order = {"all": order, "tune": order[0::2], "test": order[1::2]}[part]
    return order[:most].sort().values


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
        self.rows += len(ids) * len(context.mask)  # all branches of the guidance


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


def summary(result: Result, figure: str) -> tuple[float, float, float]:
    """Mean, least and most of a figure over the seeds."""
    values = [figures[figure] for figures in result["figures"]]
    return sum(values) / len(values), min(values), max(values)


def table(results: list[Result]) -> str:
    """Markdown, a row for each configuration, those of the benchmark in its order."""
    places = {config["name"]: place for place, config in enumerate(configurations(True))}
    results = sorted(results, key=lambda result: places.get(result["name"], len(places)))
    lines = [
        f"| configuration | rows | s per image | {' | '.join(COLUMNS.values())} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for result in results:
        cells = [result["name"], f"{result['rows_per_image']:.4g}"]
        cells.append(f"{result['seconds_per_image']:.3f}")
        for figure in COLUMNS:
            digits = 1 if figure == "fid" else 3
            mean, least, most = (f"{value:.{digits}f}" for value in summary(result, figure))
            cells.append(f"{mean} ({least}–{most})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Policies over the steps, guidance schedules over what they cost; means and spreads."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]  # only needed here

    figure, axes = plt.subplots(2, 2, figsize=(13, 9))
    rows = {"policies": (POLICIES, "steps"), "guidance": (GUIDANCE, "rows per image")}
    for row, (group, (names, across)) in zip(axes, rows.items(), strict=True):
        for axis, key in zip(row, ("recall_at_1", "fid"), strict=True):
            for number, name in enumerate(names):
                points = sorted(
                    (
                        r["options"]["timesteps"] if across == "steps" else r["rows_per_image"],
                        *summary(r, key),
                    )
                    for r in results
                    if (r["group"], r["series"]) == (group, name)
                )
                if points:
                    x, mean, least, most = torch.tensor(points).T
                    spread = torch.stack([mean - least, most - mean])
                    style = {"marker": "o", "markersize": 4, "elinewidth": 0.7, "capsize": 2}
                    axis.errorbar(x, mean, spread, label=name, color=f"C{number}", **style)
            axis.set_title(f"{group}: {COLUMNS[key]}, mean and range of the seeds")
            axis.set_xlabel(across)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji", help="name or file of a Muse or a base MaskGit")
    parser.add_argument(
        "--data", type=Path, default=Path("data/emoji/64"), help="with train and heldout"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"))
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout")
    parser.add_argument("--part", choices=("all", "tune", "test"), default="all")
    parser.add_argument("--captions", type=int, help="so many of them; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="policies, guidance, or names: halton, halton-8")
    parser.add_argument("--options", type=json.loads, help="SampleOptions of one further, as JSON")
    parser.add_argument("--name", help="of that one")
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

    texts, images = load(args.data / args.split, model.image_size)
    other = "train" if args.split == "heldout" else "heldout"
    _, others = load(args.data / other, model.image_size)
    rows = choose(len(texts), args.part, args.captions)
    rest = torch.ones(len(texts), dtype=torch.bool).index_fill(0, rows, False)
    network = FeatureNet().to(device)
    judge = Judge(
        network,
        [texts[row] for row in rows],
        images[rows],
        gallery=torch.cat([images[rest], others]),
        batch_size=8,  # the fastest on a CPU, and a GPU does not mind
    )
    text = model.embed_texts(judge.captions)
    setup = {
        "model": muse.fingerprint,
        "split": args.split,
        "part": args.part,
        "captions": len(rows),
        "seeds": args.seeds,
        "features": network.name,
        "dtype": args.dtype,
    }

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    results = read(path, setup)
    dtype = getattr(torch, args.dtype)
    draw(model, text, SampleOptions(timesteps=1), [0] * min(8, len(rows)), 8, dtype)  # warming up
    counter = RowCounter(model)
    for config, options in zip(tqdm(wanted, unit="configuration"), every, strict=True):
        alike = {r["name"]: r for r in results if SampleOptions(**r["options"]) == options}
        if config["name"] in alike:
            continue
        if config["name"] in {r["name"] for r in results}:
            raise ValueError(f"{path} has other options under {config['name']!r}: take a new name")
        if alike:  # linear guidance is the policies' default
            results.append({**next(iter(alike.values())), **config})
        else:
            counter.rows, seconds, figures = 0, 0.0, []
            for seed in args.seeds:
                seeds = [seed * 100_000 + int(row) for row in rows]
                drawn, spent = draw(model, text, options, seeds, args.batch_size, dtype)
                seconds += spent
                figures.append(judge.figures(drawn))
            count = len(args.seeds) * len(rows)
            costs = {"rows_per_image": counter.rows / count, "seconds_per_image": seconds / count}
            results.append({**config, **costs, "figures": figures, "setup": setup})
        write(path, results)
    print(table(results))
    try:
        plot(results, args.out / "sampling.png")
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    main()
