"""How well a generator draws: what its captions ask for, how real, how varied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..features import FeatureNet
from ..images import to_pil
from . import metrics
from .scores import FactJudge, judged
from .truth import Prompt

NEIGHBOUR = 3  # of precision and recall: which one bounds the ball around an image


class Judge:
    """Captioned real images by which generated ones are judged; what is costly is computed once.

    Args:
        network: gives the features, ``pooled``, of FID, precision and recall. Figures of different
            networks cannot be compared, so name it with them; published FIDs are Inception's.
        captions: what to draw.
        images: the true picture of each caption.
        gallery: further real images among which retrieval searches, without those of ``images``,
            which always belong to it.
        batch_size: images that the network sees at a time.

    Attributes:
        captions: what to draw.

    Raises:
        ValueError: other counts of captions and images, fewer than four images, a gallery of
            another size, a batch size below 1.
    """

    def __init__(
        self,
        network: FeatureNet,
        captions: Sequence[str],
        images: Float[Tensor, "B 3 H W"],
        *,
        gallery: Float[Tensor, "R 3 H W"] | None = None,
        batch_size: int = 64,
    ):
        if len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} images: give one each")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        _check_count("images", images)
        if gallery is not None:
            _check_size("gallery", gallery, images)
        self.captions = list(captions)
        self._network, self._batch_size = network, batch_size
        self._gallery = (images if gallery is None else torch.cat([images, gallery])).cpu()
        self._features = self._pooled(images)

    def figures(
        self,
        generated: Float[Tensor, "G 3 H W"],
        truth: Int[Tensor, " G"] | None = None,
    ) -> dict[str, float]:
        """Judge images.

        FID from few images is too large: with fewer than there are features most of it is the
        count's doing, and even from thousands some. Precision and recall depend on the counts
        too. So compare these three only between figures of equally many generated images, judged
        by the same images and network. Retrieval is free of that, but not of the gallery's size.

        Args:
            generated: RGB in [0, 1], of the size of the real images.
            truth: which caption each was drawn from; by default the first from the first, and so
                on, again from the first where several draws of all captions follow one another.

        Returns:
            "images", how many were judged; "recall_at_1" and "recall_at_5", the share of them
            with fewer than 1 or 5 of all real images nearer in pixels than the one that was asked
            for (`metrics.recall_at`); "fid", Fréchet distance of the features to those of the
            real images; "precision" and "recall" (`metrics.precision_recall`, k = 3).

        Raises:
            ValueError: images of another size, fewer than four, a number that is not a multiple
                of the captions' without ``truth``, a ``truth`` of another length or beyond the
                captions.
        """
        count, captions = len(generated), len(self.captions)
        _check_count("generated", generated)
        _check_size("generated", generated, self._gallery)
        if truth is None:
            if count % captions:
                raise ValueError(
                    f"{count} generated images are no multiple of the {captions} captions: say in "
                    "truth which caption each was drawn from"
                )
            truth = torch.arange(captions).repeat(count // captions)
        if len(truth) != count:
            raise ValueError(f"truth has {len(truth)} values for {count} generated images")
        if truth.min() < 0 or truth.max() >= captions:
            raise ValueError(
                f"truth reaches from {truth.min()} to {truth.max()}, there are {captions} captions"
            )
        nearer = metrics.num_nearer(generated, self._gallery, truth)
        features = self._pooled(generated)
        precision, recall = metrics.precision_recall(self._features, features, NEIGHBOUR)
        return {
            "images": count,
            "recall_at_1": float((nearer < 1).double().mean()),
            "recall_at_5": float((nearer < 5).double().mean()),
            "fid": metrics.frechet_of_sets(self._features, features),
            "precision": precision,
            "recall": recall,
        }

    @torch.no_grad()
    def _pooled(self, images: Tensor) -> Tensor:
        device = self._network.mean.device
        batches = images.split(self._batch_size)
        return torch.cat([self._network.pooled(x.to(device).float()).cpu() for x in batches])


class FactFigures:
    """Prompts by whose facts generated images are judged, in the place of a `Judge`.

    Args:
        judge: says which facts are right.
        prompts: what to draw.

    Attributes:
        captions: the prompts' texts.
    """

    def __init__(self, judge: FactJudge, prompts: Sequence[Prompt]):
        self.captions = [prompt.text for prompt in prompts]
        self._judge, self._prompts = judge, list(prompts)

    def figures(self, generated: Float[Tensor, "G 3 H W"]) -> dict[str, float]:
        """Judge images.

        Args:
            generated: RGB in [0, 1], one of each prompt, then perhaps again one of each.

        Returns:
            "images", how many were judged; "all_right", the share of those of whose prompts
            something is stated in which all of it is right; "facts", of all kinds of facts of all
            images the share that is right.

        Raises:
            ValueError: the judge finds no fact in any prompt.
        """
        prompts = self._prompts * (len(generated) // len(self._prompts))
        facts = [kinds for kinds in judged(self._judge, to_pil(generated), prompts) if kinds]
        if not facts:
            raise ValueError("the judge finds no fact in these prompts: it must know their data")
        single = [right for kinds in facts for right in kinds.values()]
        return {
            "images": len(generated),
            "all_right": sum(all(kinds.values()) for kinds in facts) / len(facts),
            "facts": sum(single) / len(single),
        }


def _check_count(name: str, images: Tensor) -> None:
    if len(images) <= NEIGHBOUR:
        raise ValueError(
            f"{name}: {len(images)} are too few, precision and recall (k = {NEIGHBOUR}) need at "
            f"least {NEIGHBOUR + 1}"
        )


def _check_size(name: str, images: Tensor, others: Tensor) -> None:
    if images.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"{name} are {tuple(images.shape[1:])}, the real images {tuple(others.shape[1:])}: "
            "scale them"
        )
