"""What is worth training with: bases trained from the start, for equal compute.

    python examples/scenes/sprites.py
    OMP_NUM_THREADS=1 python benchmarks/from_start.py --seconds 500

The task is that of the shipped model in small: scenes of a few subjects in one style on a few
backgrounds, 128 px, by its tokenizer. Each row of `ROWS` differs from the first in one thing, and
each run has the same CPU seconds for its training steps: what a step costs is measured in turns
beforehand (means of nine without the least and the most), so a row whose steps cost more makes
fewer. The learning rate falls to the end of each run. A token critic is trained after its base, and
both share the seconds.

Each run then draws sentences that training never saw, in several ways (`WAYS`), all but one of
which take the same number of rows through transformer and critic, and the judge of scenes says in
which pictures all stated facts are right. Runs and figures that stand in ``--out`` are not
repeated. Several processes may each have some of the ``--rows`` or ``--seeds``, once the first has
encoded the scenes and measured the steps. The table has means over the seeds, and differences from
the first line for the same sentences and seeds, with 95 % intervals by the bootstrap over
sentences. Of self-conditioning it also says what the second pass knows that the first did not:
nats of scenes that it learnt from, without it and with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from muse_maskgit_pytorch import (
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    SampleOptions,
    TokenCache,
    TokenCritic,
    VQGanVAE,
    write_cache,
)
from muse_maskgit_pytorch.data.dataset import ImageDataset
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.loading import open_stage
from muse_maskgit_pytorch.maskgit import Part
from muse_maskgit_pytorch.training.optimizers import make_optimizer

sampling: Any = import_module("sampling")  # beside this file; it finds examples/scenes
from judge import WEIGHTS, Judge  # noqa: E402
from scenes import Plan, Scenes  # noqa: E402
from sprites import Sprites  # noqa: E402

TOKENIZER = Path(__file__).parents[1] / "examples" / "scenes" / "tokenizer.safetensors"
STYLE, BACKGROUNDS = "flat", ("white", "yellow", "blue")
SIZE: dict[str, Any] = dict(dim=128, depth=4, heads=2, dim_head=64, text_depth=2)
BATCH, LR = 16, 0.01

# By row: arguments of the transformer, of MaskGit, and the share of the seconds for a token critic.
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self-conditioning": {"transformer": {"self_cond": True}},
    "self-critic": {"maskgit": {"self_token_critic": True}},
    "token critic": {"critic": 0.4},
    "cosine masks": {"maskgit": {"noise_schedule": "cosine"}},
    "beta:12,3 masks": {"maskgit": {"noise_schedule": "beta:12,3"}},
}
PLAIN = {"policy": "confidence", "cond_scale": 2.0}
MENDING = {"cond_scale": 2.0, "remask": 0.5, "top_k": 3}
# By way: options, and whether the model must have a critic. A critic's step takes twice the rows:
# the last of them takes twice as many as all others.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "confidence": ({**PLAIN, "timesteps": 16}, False),
    "remasking, top-k": ({**MENDING, "policy": "confidence", "timesteps": 16}, False),
    "critic": ({**PLAIN, "policy": "critic", "timesteps": 8}, True),
    "critic, top-k": ({**PLAIN, "policy": "critic", "timesteps": 8, "top_k": 3}, True),
    "critic, less noise": (
        {**PLAIN, "policy": "critic", "timesteps": 8, "choice_temperature": 1.0},
        True,
    ),
    "critic, 16 steps": ({**PLAIN, "policy": "critic", "timesteps": 16}, True),
}


class Few(Scenes):
    """Scenes of few subjects in one style on few backgrounds."""

    def __init__(self, sprites: Path, subjects: int, split: str, length: int = 1):
        some = Sprites(sprites)
        named = [subject for subject in some.subjects if subject.plural]
        some.subjects = named[:: len(named) // subjects][:subjects]
        super().__init__(some, split, length=length)

    def _plan(self, dice: Any, kind: str) -> Plan:
        while True:
            plan = super()._plan(dice, kind)
            if plan.background in BACKGROUNDS and plan.style == STYLE:
                return plan


def make(row: dict[str, Any], vae: VQGanVAE, seed: int, critic: bool = False) -> MaskGit:
    """The model of a row before its first step."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = dict(
        num_tokens=vae.codebook_size, seq_len=256, patch_size=2, rotary=True,
        code_levels=[8, 8, 8, 8], t5_name="sentence-transformers/all-MiniLM-L6-v2", max_text_len=64,
        **SIZE,
    )  # fmt: skip
    transformer = MaskGitTransformer(**arguments | row.get("transformer", {}))
    judge = TokenCritic(**arguments) if critic else None
    law = {"noise_schedule": "beta:1,0.3333"} | row.get("maskgit", {})
    return MaskGit(vae=vae, transformer=transformer, image_size=128, token_critic=judge, **law)


def train(model: MaskGit, cache: Path, folder: Path, steps: int, seed: int, part: Part) -> Path:
    """Train it and give the file of its averaged weights."""
    made = folder / "base-ema.safetensors"
    if not (folder / "done").exists():
        MaskGitTrainer(
            model, cache=str(cache), results_folder=str(folder), num_train_steps=steps, part=part,
            batch_size=BATCH, optimizer="muon", lr=LR, betas=(0.9, 0.96), weight_decay=0.01,
            warmup_steps=min(100, steps // 4), ema_decay=0.99, valid_fraction=0.02, seed=seed,
            sample_every=0, save_every=max(100, steps // 4), num_samples=1, resume=True,
        ).train()  # fmt: skip
        (folder / "done").touch()
    return made


def step_seconds(models: dict[str, tuple[MaskGit, Part]], cache: Path) -> dict[str, float]:
    """CPU seconds of one training step of each model, measured in turns."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {
        name: make_optimizer("muon", model, LR, (0.9, 0.96), 0.01)
        for name, (model, _) in models.items()
    }
    for turn in range(12):  # the first warms up
        for name, (model, part) in models.items():
            batch = TokenCache(cache, model).__getitems__(range(BATCH))
            assert batch.ids is not None
            before = time.process_time()
            # of self-conditioning half of the steps take a pass more
            recall = turn % 2 == 0 if model.transformer.self_cond else None
            terms = model.train().losses(
                batch.ids, text_embeds=batch.text_embeds, part=part, self_cond=recall
            )
            terms.total.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn:
                taken[name].append(time.process_time() - before)
    return {name: statistics.fmean(sorted(times)[1:-1]) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/from-start"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=500, help="of CPU for each training")
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--images", type=int, default=3000, help="to train on")
    parser.add_argument("--scenes", type=int, default=100, help="to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    vae = VQGanVAE.from_pretrained(TOKENIZER)
    cache = args.out / "cache"
    few = Few(args.sprites, args.subjects, "train", args.images)
    write_cache(cache, make({}, vae, 0), ImageDataset(few, View(128), True))
    costs = args.out / "costs.json"
    if not costs.exists():
        models: dict[str, tuple[MaskGit, Part]]
        models = {name: (make(row, vae, 0), "all") for name, row in ROWS.items()}
        models["critic alone"] = make({}, vae, 0, critic=True), "critic"
        costs.write_text(json.dumps(step_seconds(models, cache), indent=1))
    seconds: dict[str, float] = json.loads(costs.read_text())
    print("seconds a step:", {name: round(each, 3) for name, each in seconds.items()})

    task = Few(args.sprites, args.subjects, "seen")
    scenes = [task.scene(number) for number in range(args.scenes)]
    judge = Judge.load(WEIGHTS)
    for seed in args.seeds:
        for name in args.rows:
            row, folder = ROWS[name], place(args, name, seed)
            share = row.get("critic", 0.0)
            steps = round(args.seconds * (1 - share) / seconds[name])
            file = train(make(row, vae, seed), cache, folder, steps, seed, "all")
            if share:
                model = make(row, vae, seed, critic=True)
                model.transformer.load_state_dict(open_stage(str(file)).transformer.state_dict())
                steps = round(args.seconds * share / seconds["critic alone"])
                file = train(model, cache, folder / "critic", steps, seed, "critic")
            model = open_stage(str(file)).eval()
            look(model, folder, scenes, judge, seed)
            if model.transformer.self_cond:
                print(
                    f"{name}, seed {seed}: nats without and with a guess: {guesses(model, cache)}"
                )
    results = collected(args)
    print(table(args, results))
    try:
        sampling.plot(results, args.out / "from-start.png")
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")


def place(args: argparse.Namespace, row: str, seed: int) -> Path:
    """Where a run lies."""
    return args.out / f"{row.replace(':', '-')}-{args.seconds:g}s-{seed}"


def figures(folder: Path, way: str, scenes: int) -> Path:
    """Where it stands what of so many scenes is right."""
    return folder / f"{way.replace(', ', '-')}-{scenes}.json"


@torch.no_grad()
def guesses(model: MaskGit, cache: Path) -> str:
    """Nats of 64 scenes of the cache by the share masked, without and with self-conditioning."""
    batch = TokenCache(cache, model).__getitems__(range(64))
    assert batch.ids is not None
    found = []
    for share in (1.0, 0.75, 0.5, 0.25):
        torch.manual_seed(0)
        arguments: dict[str, Any] = dict(mask=torch.rand(64, 256) < share, cond_drop_prob=0.0)
        nats = (
            model.losses(batch.ids, text_embeds=batch.text_embeds, self_cond=which, **arguments).ce
            for which in (False, True)
        )
        found.append(f"{share:.0%} masked {' and '.join(f'{each:.3f}' for each in nats)}")
    return ", ".join(found)


def look(model: MaskGit, folder: Path, scenes: list[Any], judge: Judge, seed: int) -> None:
    """Draw the scenes in every way, and keep which facts are right."""
    text = model.embed_texts([scene.caption.text for scene in scenes])
    counter = sampling.RowCounter(model)
    for name, (options, critical) in WAYS.items():
        path = figures(folder, name, len(scenes))
        if path.exists() or (critical and model.critic is None):
            continue
        counter.rows = 0
        seeds = [seed * 100_000 + row for row in range(len(scenes))]
        images, _ = sampling.draw(model, text, SampleOptions(**options), seeds, 50, torch.float32)
        facts = sampling.judged(judge, images, scenes)
        path.write_text(json.dumps({"facts": facts, "rows": counter.rows / len(scenes)}))


def collected(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What was found of each row and way, by seed, as `sampling.plot` takes it."""
    results = []
    for row in args.rows:
        for way, (options, _) in WAYS.items():
            files = [figures(place(args, row, seed), way, args.scenes) for seed in args.seeds]
            if files[0].exists():
                found = [json.loads(file.read_text()) for file in files]
                results.append({
                    "row": row, "way": way, "group": "further", "series": f"{row}; {way}",
                    "options": options, "figures": [each["facts"] for each in found],
                    "rows_per_image": statistics.fmean(each["rows"] for each in found),
                })  # fmt: skip
    return results


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row and way."""
    head = ("trained with", "nats, all masked", "drawn by", "rows", "all facts right (seeds)")
    head += ("against the first", "count", "relation")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        facts = result["figures"]
        folders = [place(args, result["row"], seed) for seed in args.seeds]
        by_seed = [statistics.fmean(each["all"]) for each in facts]
        shares = ", ".join(f"{share:.2f}" for share in by_seed)
        mean, low, high = sampling.difference(facts, results[0]["figures"])
        cells = [
            result["row"],
            f"{statistics.fmean(nats(folder) for folder in folders):.3f}",
            result["way"],
            f"{result['rows_per_image']:.4g}",
            f"{statistics.fmean(by_seed):.3f} ({shares})",
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
        ]
        for kind in ("count", "relation"):
            stated = [v for each in facts for v in each[kind] if v is not None]
            cells.append(f"{statistics.fmean(stated):.3f}" if stated else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def nats(folder: Path) -> float:
    """The last validation's loss with all tokens masked."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_nats_100"] for line in lines if "valid_nats_100" in line][-1]


if __name__ == "__main__":
    main()
