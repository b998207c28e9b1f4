"""All figures of drawn pictures that the networks, true images and judge at hand allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import shown
from ..features import FeatureNet, TextImageNet
from ..files import cache_folder, digest_state, digest_text, replacing
from ..images import to_pil
from . import metrics
from .drawing import Pictures
from .figures import Metric, bootstrap_mean, bootstrap_spread, subset_interval
from .truth import Prompt, Truth, batches, digest_files

NEIGHBOUR, DENSE = 3, 5  # of precision and recall, of density and coverage
JUDGE = "judge"  # in the place of a network's name
ALL_RIGHT = "all_right"

Facts = dict[str, bool]


class FactJudge(Protocol):
    """Says of pictures whether what their prompts state is true of them: anybody's own."""

    def facts(self, pictures: Sequence[Image.Image], rows: Sequence[Prompt]) -> list[Facts]:
        """Of each picture, by the kind of fact, whether it is right.

        A prompt's pictures have the kinds of which it states something; a picture may have none.
        """
        ...


class Images(Protocol):
    """Pictures by their numbers."""

    def __len__(self) -> int: ...
    def images(self, rows: Sequence[int]) -> Float[Tensor, "B 3 H W"]: ...


@dataclass
class Evaluation:
    """What came of it.

    Attributes:
        metrics: by the network that judged, or "judge", and by name.
        scores: of each prompt, by name, the higher the better; the first ranks prompts.
        spreads: of each prompt, by name, what is neither better nor worse.
        left_out: what could not be had, and why, in sentences.
    """

    metrics: dict[str, dict[str, Metric]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    spreads: dict[str, list[float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    pictures: Pictures,
    truth: Truth | None,
    networks: Sequence[FeatureNet] = (),
    judge: FactJudge | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Evaluation:
    """Judge pictures that are drawn.

    Intervals say where a figure of other prompts of the same kind would lie, in 95 of 100 cases:
    by the bootstrap over prompts for what is a mean over pictures, with the other set of images
    held fixed; by disjoint subsets for KID and CMMD; and for FID by the bootstrap's spread, which
    does not show that an FID of few images is too large.

    Args:
        pictures: all of them drawn.
        truth: of their prompts, the first images being theirs; None: not known, and then what
            compares with it is left out.
        networks: whose features judge. A `TextImageNet` also compares pictures with prompts.
        judge: of facts.
        device: where the networks compute.
        cache: folder for features of true images, by digests of network and pixels; by default
            the user's.
    """
    found = Evaluation()
    if judge is not None:
        _by_facts(found, pictures, truth, judge)
    made_digest = digest_files(pictures.files) if networks else ""
    for network in networks:
        network.to(device)
        folder = (cache or cache_folder()) / "features"
        made = features_of(network, pictures, made_digest, pictures.folder / "features")
        real = None if truth is None else features_of(network, truth, truth.digest, folder)
        one = _ByFeatures(network, made, real, pictures, found)
        one.run()
        network.cpu()
    # what a stranger would rank by: what the prompts say, then likeness
    order = ("facts", "clip_score", "similarity")
    names = sorted(found.scores, key=lambda name: order.index(name.split(",")[0]))
    found.scores = {name: found.scores[name] for name in names}
    return found


def features_of(
    network: FeatureNet, images: Images, digest: str, folder: Path
) -> Float[Tensor, "B C"]:
    """The features of pictures; read from a folder if they are there, else kept in it.

    Args:
        network: `FeatureNet.pooled`.
        images: the pictures.
        digest: of their pixels.
        folder: of such files.
    """
    state = digest_state(network.state_dict(), f"{type(network).__name__} {network.input_size}")
    file = folder / f"{digest_text(f'{state} {digest}')}.safetensors"
    try:
        known = load_file(file)["features"]
        if len(known) == len(images):
            return known
    except (OSError, SafetensorError, KeyError):
        pass
    device, parts = network.mean.device, []
    size = 8 if device.type == "cpu" else 64  # the fastest
    with tqdm(total=len(images), desc=network.name, unit="image", dynamic_ncols=True) as bar:
        for rows in batches(range(len(images)), size):
            parts.append(network.pooled(images.images(rows).to(device)).cpu())
            bar.update(len(rows))
    features = torch.cat(parts)
    with replacing(file) as temporary:
        save_file({"features": features.contiguous()}, temporary)
    return features


class _ByFeatures:
    """The figures of one network.

    Args:
        network: whose features they are.
        made: of the pictures, those of a prompt in a row.
        real: of the true images, those of the prompts first.
        pictures: for the prompts and the number of their pictures.
        found: where the figures go.
    """

    def __init__(
        self,
        network: FeatureNet,
        made: Tensor,
        real: Tensor | None,
        pictures: Pictures,
        found: Evaluation,
    ):
        self.network, self.made, self.real, self.found = network, made, real, found
        self.texts = [prompt.text for prompt in pictures.prompts]
        self.count, self.seeds = len(self.texts), pictures.seeds
        self.metrics = found.metrics.setdefault(network.name, {})

    def run(self) -> None:
        if self.real is not None:
            self._distances(self.real)
            self._neighbours(self.real)
            self._likeness(self.real)
        self._diversity()
        if isinstance(self.network, TextImageNet):
            self._agreement(self.network)

    def _leave_out(self, what: str, why: str) -> None:
        self.found.left_out.append(f"{what} ({self.network.name}): {why}")

    def _part(self, prompts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """True images and pictures of some prompts."""
        rows = prompts[:, None] * self.seeds + torch.arange(self.seeds)
        return real[prompts], self.made[rows.flatten()]

    def _distances(self, real: Tensor) -> None:
        """FID, KID, CMMD."""
        few = min(len(real), len(self.made))
        if few < 2:
            self._leave_out("fid, kid, cmmd", "they take at least two images of either kind")
            return
        against = f"{len(real)} true images"
        dim = real.shape[1]

        def over(figure: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor], float]:
            return lambda prompts: figure(*self._part(prompts, real))

        value = metrics.frechet_of_sets(real, self.made)
        few_ones = ", fewer images than features" if few <= dim else ""
        note = (
            f"{against}, {dim} features{few_ones}; few images make it too large, beyond the "
            "interval: compare equal numbers only"
        )
        spread = bootstrap_spread(value, self.count, over(metrics.frechet_of_sets), 0.0)
        self._add("fid", value, note, spread)
        kernels = {"kid": (metrics.kid, -math.inf), "cmmd": (metrics.cmmd, 0.0)}
        for name, (figure, least) in kernels.items():
            value = figure(real, self.made)
            interval, by = subset_interval(value, self.count, over(figure), least)
            self._add(name, value, f"{against}; {by}", interval)

    def _neighbours(self, real: Tensor) -> None:
        """Precision, recall, density, coverage."""
        least = min(len(real) - 1, len(self.made) - 1, NEIGHBOUR)
        if least < NEIGHBOUR or len(real) <= DENSE:
            self._leave_out(
                "precision, recall, density, coverage",
                f"{len(self.made)} pictures and {len(real)} true images are too few, they take "
                f"{NEIGHBOUR + 1} and {DENSE + 1}",
            )
            return
        near = metrics.neighbourhoods(real, self.made, NEIGHBOUR, DENSE)
        by_prompt = (self.count, self.seeds)
        for name, values, k in (
            ("precision", near.precise.view(by_prompt), NEIGHBOUR),
            ("recall", near.recalled, NEIGHBOUR),
            ("density", near.density.view(by_prompt), DENSE),
            ("coverage", near.covered, DENSE),
        ):
            value, interval = bootstrap_mean(values.double())
            self._add(name, value, f"{len(real)} true images, k = {k}", interval)

    def _likeness(self, real: Tensor) -> None:
        """Whether the true picture of the prompt is found, and how near it is."""
        own = torch.arange(self.count).repeat_interleave(self.seeds)
        unit_made, unit_real = (F.normalize(x.double(), dim=1) for x in (self.made, real))
        nearer = metrics.num_nearer(unit_made, unit_real, own)
        for k in (1, 5):
            if len(real) > k:
                value, interval = bootstrap_mean((nearer < k).double().view(-1, self.seeds))
                note = f"the true picture is among the {k} nearest of {len(real)}"
                self._add(f"recall_at_{k}", value, note, interval)
        cosine = (unit_made * unit_real[own]).sum(1).view(self.count, self.seeds)
        value, interval = bootstrap_mean(cosine)
        self._add("similarity", value, "cosine to the true picture", interval)
        self.found.scores[f"similarity, {self.network.name}"] = cosine.mean(1).tolist()

    def _diversity(self) -> None:
        """How different the pictures of a prompt are, and how different those of all prompts."""
        if self.seeds < 2:
            self._leave_out("diversity", "it takes several pictures of each prompt, --seeds 3")
            return
        each = metrics.diversity(self.made.unflatten(0, (self.count, self.seeds)))
        value, interval = bootstrap_mean(each)
        note = f"within prompts of {self.seeds} pictures, 1 - cosine"
        if self.real is not None and len(self.real) > 1:
            note += f"; all true images: {float(metrics.diversity(self.real[None])):.4g}"
        self._add("diversity", value, note, interval)
        self.found.spreads[f"diversity, {self.network.name}"] = each.tolist()

    def _agreement(self, network: TextImageNet) -> None:
        """CLIPScore."""
        if not any(self.texts):
            self._leave_out("clip_score", "there are no captions")
            return
        parts = [network.embed_texts(texts).cpu() for texts in batches(self.texts, 32)]
        texts = torch.cat(parts)
        each = metrics.clip_score(self.made, texts.repeat_interleave(self.seeds, 0))
        each = each.view(self.count, self.seeds)
        value, interval = bootstrap_mean(each)
        true = None
        if self.real is not None:
            true = float(metrics.clip_score(self.real[: self.count], texts).mean())
        self._add("clip_score", value, "2.5 max(cosine, 0), without logit scale", interval, true)
        self.found.scores[f"clip_score, {network.name}"] = each.mean(1).tolist()

    def _add(
        self,
        name: str,
        value: float,
        note: str,
        interval: tuple[float, float] | None,
        truth: float | None = None,
    ) -> None:
        self.metrics[name] = Metric(value, len(self.made), note, interval, truth)


# Facts -------------------------------------------------------------------------------------------


def _by_facts(found: Evaluation, pictures: Pictures, truth: Truth | None, judge: FactJudge) -> None:
    """The share of right facts by kind, and of pictures in which all are right."""
    size, seeds = 64, pictures.seeds
    prompts = [prompt for prompt in pictures.prompts for _ in range(seeds)]
    made = [
        facts
        for rows in batches(range(len(pictures)), size)
        for facts in judged(
            judge, [pictures.picture(row) for row in rows], [prompts[row] for row in rows]
        )
    ]
    true: list[Facts] = []
    if truth is not None:
        for rows in batches(range(len(pictures.prompts)), size):
            known = [pictures.prompts[row] for row in rows]
            true += judged(judge, to_pil(truth.images(rows)), known)
    if not any(made):
        found.left_out.append("facts: the judge finds none in these prompts")
        return
    ours = found.metrics.setdefault(JUDGE, {})
    for kind in [*sorted({kind for facts in made for kind in facts}), ALL_RIGHT]:
        values, counted = _kind(made, kind)
        value, interval = bootstrap_mean(values.view(-1, seeds), counted.view(-1, seeds))
        ceiling = None
        if true and _kind(true, kind)[1].any():
            ceiling = bootstrap_mean(*_kind(true, kind))[0]
        what = "pictures with all facts right" if kind == ALL_RIGHT else "pictures that have it"
        ours[kind] = Metric(value, int(counted.sum()), f"share of the {what}", interval, ceiling)
    right = [
        [all(facts.values()) for facts in made[at : at + seeds]] for at in _starts(made, seeds)
    ]
    found.scores["facts"] = [sum(each) / seeds for each in right]


def _starts(made: Sequence[Facts], seeds: int) -> range:
    return range(0, len(made), seeds)


def _kind(judged: Sequence[Facts], kind: str) -> tuple[Tensor, Tensor]:
    """Of each picture whether a kind of fact is right, and whether it has that kind."""
    if kind == ALL_RIGHT:
        pairs = [(all(facts.values()), bool(facts)) for facts in judged]
    else:
        pairs = [(facts.get(kind, False), kind in facts) for facts in judged]
    table = torch.tensor(pairs)
    return table[:, 0].double(), table[:, 1]


def judged(
    judge: FactJudge, pictures: Sequence[Image.Image], rows: Sequence[Prompt]
) -> list[Facts]:
    """What a judge says, checked.

    Raises:
        ValueError: something else than one dict a picture.
    """
    given = judge.facts(pictures, rows)
    if not isinstance(given, list) or len(given) != len(pictures):
        raise ValueError(
            f"the judge's facts must be a list of one dict for each of {len(pictures)} pictures, "
            f"not {shown(given)}"
        )
    for facts in given:
        if not isinstance(facts, dict) or ALL_RIGHT in facts:
            raise ValueError(
                f"the judge's facts of a picture must be a dict without the kind {ALL_RIGHT!r}, "
                f"not {shown(facts)}"
            )
    return [{str(kind): bool(right) for kind, right in facts.items()} for facts in given]
