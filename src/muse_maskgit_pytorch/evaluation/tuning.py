"""The search for sampling options: one setting after another, judged by the pictures it gives.

`make_trials` divides captions in two halves: on the first, `search` changes one setting at a time
and keeps what is better; the second, never seen by the search, shows what that was worth.
`write_preset` puts the options into a model file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import as_path
from ..checkpoint import find_file, load_tree, save_tree
from ..features import FeatureNet
from ..files import digest_pixels, digest_text, replacing
from ..images import resize
from ..maskgit import MaskGit
from ..presets import check_preset
from ..provenance import fingerprint
from ..sampling import ORDERS, Policy, SampleOptions
from ..structures import TextEmbeds
from ..transformer import MaskGitTransformer
from .generator import NEIGHBOUR, FactFigures, Judge
from .scores import FactJudge
from .truth import Prompt

Figures = dict[str, float]
Changes = dict[str, Any]
Score = Literal["balanced", "fid", "recall", "facts"]

# What the search tries, in this order: for each setting the changes among which it chooses.
GUIDANCE: tuple[Changes, ...] = (
    {"cond_scale": 1.0},
    *(
        {"cond_scale": scale, "guidance_schedule": schedule}
        for schedule in ("linear", "constant")
        for scale in (1.5, 2.0, 3.0, 4.5)
    ),
    *(
        {"cond_scale": scale, "guidance_schedule": list(shares)}
        # none in the first third, in the first half, at both ends
        for shares in ([0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0])
        for scale in (1.5, 2.0, 3.0)
    ),
)
TEMPERATURES = ((0.3, None), (0.5, None), (0.7, None), (0.85, None), (1.0, None), (1.2, None))
TEMPERATURES += ((1.0, 0.3), (1.2, 0.6), (0.5, 1.0))  # first step, last step
CHOICE_TEMPERATURES = (0.0, 1.0, 2.0, 4.5, 8.0)
# The last are AutoNAT's ratios (Ni et al. 2024).
NOISE_SCHEDULES = ("cosine", "arccos", "linear", "square")
NOISE_SCHEDULES += ([0.953, 0.880, 0.794, 0.746, 0.625, 0.407, 0.261],)
TOP_P = (1.0, 0.98, 0.95, 0.9, 0.8)
# Share masked again, and top-k: together they win what neither does alone (docs/log.md).
REMASK = ((0.0, 0), (0.5, 0), (0.5, 3), (0.8, 3), (0.5, 10))

# Which of two figures is better, the start's given: the larger, entry by entry.
SCORES: dict[Score, Callable[[Figures, Figures], tuple[float, ...]]] = {
    "balanced": lambda new, start: (new["recall_at_1"] >= start["recall_at_1"], -new["fid"]),
    "fid": lambda new, start: (-new["fid"], new["recall_at_1"]),
    "recall": lambda new, start: (new["recall_at_1"], -new["fid"]),
    "facts": lambda new, start: (new["all_right"], new["facts"]),
}


class Results:
    """Figures of what was tried, in memory and in a file, from which a later search goes on.

    Each line of the file holds one trial: the setup, the options and the figures, as JSON. It may
    hold the trials of other models, captions and presets too.

    Raises:
        ValueError: a file with something else in it.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path = None if path is None else as_path(path)
        self._lines: dict[str, Figures] = {}
        if self.path is not None and self.path.exists():
            for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    record = json.loads(line)
                    key = self._key(record["setup"], record["options"])
                    self._lines[key] = record["figures"]
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{path}, line {number}, is not a result of a search: give another file"
                    ) from error

    @staticmethod
    def _key(setup: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        return json.dumps({"setup": setup, "options": options}, sort_keys=True)

    def get(self, setup: Mapping[str, Any], options: Mapping[str, Any]) -> Figures | None:
        return self._lines.get(self._key(setup, options))

    def put(
        self, setup: Mapping[str, Any], options: Mapping[str, Any], figures: Figures
    ) -> Figures:
        self._lines[self._key(setup, options)] = figures
        if self.path is not None:  # all at once: an interruption leaves no half line
            lines = [
                json.dumps({**json.loads(key), "figures": value})
                for key, value in self._lines.items()
            ]
            with replacing(self.path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return figures


class Trials:
    """Draws the same captions with the same seeds by any options, and judges the pictures.

    The noise of a picture depends on its caption and the turn alone, so that options are compared
    by their effect and not by luck. Options that differ in nothing that has an effect are one.

    Args:
        stage: base or super-resolution; the latter sees the true images, reduced.
        judge: of the captions.
        images: the true image of each caption.
        turns: draws of all captions; each number stands for other noise.
        results: where the figures are kept.
        batch_size: images drawn together.
        bf16: draw in bfloat16 autocast.
        setup: what else decides the figures, to tell them apart in ``results``.
    """

    def __init__(
        self,
        stage: MaskGit,
        judge: Judge | FactFigures,
        images: Float[Tensor, "B 3 H W"],
        turns: Sequence[int],
        results: Results | None = None,
        batch_size: int = 64,
        bf16: bool = False,
        setup: Mapping[str, Any] | None = None,
    ):
        self._bf16 = bf16
        self.judge, self._stage, self._turns = judge, stage, list(turns)
        self._results, self._batch_size = results or Results(), batch_size
        self._text = stage.embed_texts(judge.captions)
        self._cond: Tensor | None = None
        if stage.cond_image_size is not None:
            self._cond = resize(images, stage.geometry.cond_pixels())
        self._setup = {
            "model": fingerprint(stage),
            "captions": digest_text(json.dumps(judge.captions)),
            "images": digest_pixels(images),
            "turns": self._turns,
            "device": stage.device.type,
            "bf16": bf16,
            **(setup or {}),
        }

    def __call__(self, options: SampleOptions) -> Figures:
        """The judge's figures, and "passes": of the transformer and the critic for one image."""
        options = effective(options)
        key = settings(options)
        known = self._results.get(self._setup, key)
        return known or self._results.put(self._setup, key, self._figures(options))

    @torch.no_grad()
    def _figures(self, options: SampleOptions) -> Figures:
        rows, drawn = 0, []

        def count(network: MaskGitTransformer, arguments: tuple[Any, ...]) -> None:
            nonlocal rows
            ids, context = arguments[:2]
            rows += len(ids) * context.num_branches  # all branches of the guidance

        networks = [self._stage.transformer, self._stage.critic]  # a self-critic calls the first
        counted = [n for n in networks if isinstance(n, MaskGitTransformer)]
        hooks = [network.register_forward_pre_hook(count) for network in counted]
        try:
            for turn in self._turns:
                drawn += [self._draw(options, turn, part) for part in self._parts()]
        finally:
            for hook in hooks:
                hook.remove()
        images = torch.cat(drawn)
        return {**self.judge.figures(images), "passes": rows / len(images)}

    def _parts(self) -> Iterator[slice]:
        for at in range(0, len(self.judge.captions), self._batch_size):
            yield slice(at, min(at + self._batch_size, len(self.judge.captions)))

    def _draw(self, options: SampleOptions, turn: int, part: slice) -> Tensor:
        with torch.autocast(self._stage.device.type, torch.bfloat16, enabled=self._bf16):
            images = self._stage.generate(
                text_embeds=TextEmbeds(self._text.embeds[part], self._text.mask[part]),
                cond_images=None if self._cond is None else self._cond[part],
                options=options.replace(seeds=turn * 100_000 + part.start),
            )
        return images.float().cpu()


def make_trials(
    stage: MaskGit,
    by: FeatureNet | FactJudge,
    prompts: Sequence[Prompt],
    images: Float[Tensor, "B 3 H W"],
    *,
    gallery: Float[Tensor, "R 3 H W"] | None = None,
    captions: int | None = None,
    seeds: int = 2,
    results: Results | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> tuple[Trials, Trials]:
    """Trials on two fixed halves of captioned images, with different seeds.

    The halves depend on the number of images alone.

    Args:
        stage: what draws.
        by: what judges: a network's features, or a judge of facts.
        prompts: the captions.
        images: the true image of each, of the stage's size.
        gallery: further real images among which, with ``images``, the true one is looked for: the
            more, the harder, and among a few hundred nearly every picture is recognised. A judge
            of facts has no use for it.
        captions: so many of each half; by default all.
        seeds: draws of each caption.
        results: as in `Trials`; both share it.
        batch_size: as in `Trials`.
        bf16: as in `Trials`.

    Returns:
        what to search on, and what to report on.

    Raises:
        ValueError: fewer than eight captioned images, too few captions, no seeds.
    """
    least = NEIGHBOUR + 1
    if len(prompts) < 2 * least:
        raise ValueError(
            f"{len(prompts)} captioned images are too few: it takes {least} to search on and "
            f"{least} others to report on"
        )
    if captions is not None and captions < least:
        raise ValueError(f"captions must be at least {least}, not {captions}")
    for name, value in {"seeds": seeds, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    everything = images if gallery is None else torch.cat([images, gallery])
    if isinstance(by, FeatureNet):
        setup = {"network": by.name, "gallery": digest_pixels(everything)}
    else:
        setup = {"judge": f"{type(by).__module__}.{type(by).__qualname__}"}
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    halves = []
    for part, turns in ((order[0::2], range(seeds)), (order[1::2], range(seeds, 2 * seeds))):
        rows = part[:captions].sort().values
        rest = torch.ones(len(everything), dtype=torch.bool).index_fill(0, rows, False)
        captioned = [prompts[row] for row in rows.tolist()]
        if isinstance(by, FeatureNet):
            judge = Judge(
                by,
                [prompt.text for prompt in captioned],
                images[rows],
                gallery=everything[rest],
                batch_size=8,  # the fastest on a CPU, and a GPU does not mind
            )
        else:
            judge = FactFigures(by, captioned)
        halves.append(Trials(stage, judge, images[rows], turns, results, batch_size, bf16, setup))
    return halves[0], halves[1]


def settings(options: SampleOptions) -> Changes:
    """All fields but the seeds, as they stand in a model file."""
    return {name: value for name, value in asdict(options).items() if name != "seeds"}


def effective(options: SampleOptions) -> SampleOptions:
    """The same options, with each that has no effect at its default."""
    idle = ["seeds"]
    if options.policy in ORDERS:
        idle.append("choice_temperature")
    if not options.guided:
        idle.append("guidance_schedule")
    return options.replace(**{name: getattr(SampleOptions, name) for name in idle})


def start_of(stage: MaskGit, preset: str, timesteps: int | None = None) -> SampleOptions:
    """Where a search starts: at the preset, or at the default options if it is a new one.

    Args:
        stage: whose preset.
        preset: its name.
        timesteps: instead of those that stand there.

    Raises:
        ValueError: ``timesteps`` below 1.
    """
    options = stage.presets.get(preset, stage.default_options)
    policy = options.policy or ("confidence" if stage.critic is None else "critic")
    steps = options.timesteps if timesteps is None else timesteps
    return options.replace(policy=policy, timesteps=steps, seeds=None)


def make_axes(
    stage: MaskGit, policies: Sequence[Policy] | None = None
) -> dict[str, tuple[Changes, ...]]:
    """The settings to search, in this order, each with the changes to choose from.

    Args:
        stage: decides whether there is a critic.
        policies: to choose from; by default all that the stage can follow.

    Raises:
        ValueError: unknown policies, or the critic of a stage without one.
    """
    can = [p for p in get_args(Policy) if p != "critic" or stage.critic is not None]
    for policy in policies or ():
        if policy not in can:
            raise ValueError(f"policy {policy!r} is none of this stage's: {', '.join(can)}")
    return {
        "policy": tuple({"policy": policy} for policy in policies or can),
        "guidance": GUIDANCE,
        "temperature": tuple(
            {"temperature": first, "temperature_end": last} for first, last in TEMPERATURES
        ),
        "choice_temperature": tuple({"choice_temperature": t} for t in CHOICE_TEMPERATURES),
        "noise_schedule": tuple({"noise_schedule": schedule} for schedule in NOISE_SCHEDULES),
        "top_p": tuple({"top_p": p} for p in TOP_P),
        "remask": tuple({"remask": share, "top_k": k} for share, k in REMASK),
    }


def search(
    trial: Callable[[SampleOptions], Figures],
    start: SampleOptions,
    axes: Mapping[str, Sequence[Changes]],
    score: Score = "balanced",
    rounds: int = 3,
) -> Iterator[SampleOptions]:
    """Choose along one axis after another, around and around until a round changes nothing.

    It ends where no single setting can be improved, which need not be the best there is.

    Args:
        trial: gives the figures of options, at least those that the score takes. Asked again for
            the same ones, so it should remember.
        start: what to improve.
        axes: the settings, each with its changes; ties go to what stands already.
        score: "balanced", the lowest FID of those with at least the start's "recall_at_1": more
            real, and no further from the captions. "fid" alone forgets the text, "recall", the
            highest "recall_at_1", all but the text; each settles the other's ties. "facts", the
            most pictures in which all facts are right, then the most facts.
        rounds: at most.

    Yields:
        the start, then each improvement; the last is the result.

    Raises:
        ValueError: no such score, no rounds.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    yield (best := start)
    reference = trial(start)

    def rank(options: SampleOptions) -> tuple[float, ...]:
        return SCORES[score](trial(options), reference)

    for turn in range(1, rounds + 1):
        before = best
        with tqdm(total=sum(map(len, axes.values())), unit="trial", dynamic_ncols=True) as bar:
            for name, changes in axes.items():
                bar.set_description(f"round {turn}, {name}")
                place = best
                for change in changes:
                    if rank(place.replace(**change)) > rank(best):
                        yield (best := place.replace(**change))
                    bar.update()
        if best == before:
            return


def write_preset(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    name: str,
    options: SampleOptions,
    stage: Literal["base", "superres"] = "base",
) -> Path:
    """Copy a model file with one preset set anew; all else stays, weights bit for bit.

    Args:
        model: file of a `Muse` or of a stage, or name of a shipped model.
        out: where to; may be the same file.
        name: of the preset; "default" stands for the stage's ``sample_options``.
        options: all fields are stored but the seeds.
        stage: of a `Muse`; a stage alone is the one it is.

    Raises:
        ValueError: a name that is taken, a stage that is not there, a file of something else.
    """
    path = find_file(model)
    tree, kind = load_tree(path)
    stages = {"Muse": tree["config"], "MaskGit": {stage: {"config": tree["config"]}}}.get(kind, {})
    if not stages.get(stage):
        raise ValueError(f"{path} holds a {kind} without a stage {stage!r}, so no presets of it")
    config = stages[stage]["config"]
    if name == "default":
        config["sample_options"] = settings(options)
    else:
        presets = config.get("presets") or {}
        config["presets"] = {**presets, check_preset(name): settings(options)}
    return save_tree(out, tree, kind)
