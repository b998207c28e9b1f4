"""What a masked transformer knows: by how much it is shown, and by whose caption it is told.

A training loss says little by itself: it is a mean over masks of all sizes, with label smoothing in
it. Here are nats per token, of masks of four sizes; beside them what a model without any learning
has (ln V), and what counting codes, or pairs of them, gets to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_entropy import ROWS
from ..data.cache import TokenCache
from ..maskgit import MaskGit
from ..masking import mask_tokens
from ..structures import TextEmbeds

SHARES = (25, 50, 75, 100)  # per cent of the tokens that are masked
TOKENS = 2_000_000  # that are counted, at most
PRIOR = 100.0  # how many pairs the frequency of single codes weighs against those counted


class Probe:
    """Sums over the images that it is shown, of a model in eval mode."""

    def __init__(self, maskgit: MaskGit):
        self.maskgit = maskgit
        self.sums: dict[str, float] = defaultdict(float)

    @torch.no_grad()
    def see(
        self,
        arguments: Mapping[str, Any],
        others: Mapping[str, Any] | None,
        counted: int,
        seeds: Sequence[int],
    ) -> None:
        """Look at a batch.

        Args:
            arguments: of `MaskGit.encoded`.
            others: those of other images, of which the captions are taken; None: of none.
            counted: how many of its images count, the first ones.
            seeds: of their masks, so that these do not depend on the batch.
        """
        ids, text, cond = self.maskgit.encoded(**arguments)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        numbers = [torch.rand(ids.shape[1], generator=g, device="cpu") for g in generators]
        place = torch.stack(numbers).argsort(dim=1).argsort(dim=1).to(ids.device)
        size = arguments.get("image_size")
        for share in SHARES:
            mask = place < max(1, round(ids.shape[1] * share / 100))
            nats, right = self._pass(ids, mask, text, cond, size)
            self._add(f"nats_{share}", nats[:counted])
            self._add(f"accuracy_{share}", right[:counted])
        if others is not None:
            away = self.maskgit.embed_texts(others["texts"], others["text_embeds"], long="cut")
            nats, _ = self._pass(ids, torch.ones_like(ids, dtype=torch.bool), away, cond, size)
            self._add("nats_other_captions", nats[:counted])

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] += float(values.double().sum())
        self.sums[f"{name} images"] += len(values)

    def _pass(
        self, ids: Tensor, mask: Tensor, text: TextEmbeds, cond: Tensor | None, size: Any
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats, and share of right guesses, of each image's masked tokens."""
        model = self.maskgit.transformer
        context = model.encode_context(self.maskgit.conditioner.dropped(text, cond, 0.0, size))
        masked = mask_tokens(ids, mask, model.mask_id).input_ids
        recall = model(masked, context) if model.self_cond else None
        [states] = model(masked, context, recall)
        count = int(mask[0].sum())  # of every image
        hidden, labels = states[mask], ids[mask]
        nats, right = [], []
        for rows, true in zip(hidden.split(ROWS), labels.split(ROWS), strict=True):
            logits = model.to_logits(rows).float()
            nats.append(F.cross_entropy(logits, true, reduction="none"))
            right.append((logits.argmax(dim=-1) == true).float())
        return (
            torch.cat(nats).view(-1, count).mean(dim=1),
            torch.cat(right).view(-1, count).mean(dim=1),
        )

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means, of the `sums` of all processes."""
        return {
            name: value / sums[f"{name} images"]
            for name, value in sums.items()
            if f"{name} images" in sums
        }


def references(
    train: TokenCache, valid: TokenCache, codes: int, grids: Mapping[Any, tuple[int, int]]
) -> dict[str, float]:
    """What the validation's tokens cost without a transformer, in nats per token.

    Args:
        train: images whose codes are counted, some of them where they are many.
        valid: images that are judged.
        codes: V.
        grids: height and width in tokens of each size of image.

    Returns:
        ``reference_uniform``, ln V; ``reference_unigram``, by the frequency of each code (one added
        to every count); ``reference_bigram``, by the code to the left of it (where there is none,
        or the pair is rare, as before: a Dirichlet prior).
    """
    rows = list(_tokens(train, grids))
    single = np.ones(codes)
    for ids in rows:
        single += np.bincount(ids.ravel(), minlength=codes)
    share = single / single.sum()
    joined = np.concatenate([_pairs(ids, codes) for ids in rows])
    keys, counts = np.unique(joined, return_counts=True)
    before = np.bincount(joined // codes, minlength=codes)  # pairs that a code begins
    one = two = tokens = 0.0
    for ids in _tokens(valid, grids):
        alone, wanted = share[ids], _pairs(ids, codes)
        place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        seen = np.where(keys[place] == wanted, counts[place], 0)
        after = (seen + PRIOR * share[wanted % codes]) / (before[wanted // codes] + PRIOR)
        one -= float(np.log(alone).sum())
        two -= float(np.log(alone[:, 0]).sum() + np.log(after).sum())
        tokens += ids.size
    return {
        "reference_uniform": math.log(codes),
        "reference_unigram": one / tokens,
        "reference_bigram": two / tokens,
    }


def _pairs(ids: np.ndarray, codes: int) -> np.ndarray:
    """Neighbours in the rows of images, as one number each."""
    return (ids[:, :-1] * codes + ids[:, 1:]).ravel()


def _tokens(cache: TokenCache, grids: Mapping[Any, tuple[int, int]]) -> Iterator[np.ndarray]:
    """Rows of codes, of some images at a time and from all over the cache."""
    for size, bucket in cache.buckets.items():
        rows, columns = grids[size]
        every = math.ceil(len(cache) * rows * columns / TOKENS)
        wanted = list(bucket)[::every]
        for start in range(0, len(wanted), 256):
            ids = cache.__getitems__(wanted[start : start + 256]).ids
            assert ids is not None
            yield ids.numpy().reshape(-1, columns)
