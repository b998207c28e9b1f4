"""Training of the masked transformers: base, super-resolution and critic alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.cache import TokenCache
from ..data.folder import ImageFolder, split
from ..images import image_grid
from ..maskgit import MaskGit, Part
from ..structures import Batch
from .loop import Trainer
from .settings import at_least


class MaskGitTrainer(Trainer):
    """Trains a `MaskGit` on a folder of captioned images.

    A model with ``cond_image_size`` trains as super-resolution: its low-resolution images are the
    images scaled down.

    Args:
        maskgit: base or super-resolution, with its trained tokenizer.
        folder: images and captions, see `ImageFolder`.
        part: "transformer" or "critic" trains one of the two and freezes the other.
        cache_tokens: encode the whole set once and train from ids and text embeddings in memory
            (see `TokenCache` for its size); the loss is the same, a step far cheaper.
        num_samples: images in the pictures of ``results_folder/samples``.
        **common: see `Trainer`.
    """

    name = "maskgit"

    def __init__(
        self,
        maskgit: MaskGit,
        *,
        folder: str,
        part: Part = "all",
        cache_tokens: bool = True,
        num_samples: int = 8,
        **common: Any,
    ):
        super().__init__(maskgit, **common)
        if part not in get_args(Part):
            raise ValueError(f"part must be one of {get_args(Part)}, not {part!r}")
        at_least(1, num_samples=num_samples)
        if part == "critic" and maskgit.critic is None:
            raise ValueError(
                "part='critic', but the model has no token_critic or self_token_critic"
            )
        self.name = "superres" if maskgit.cond_image_size else "base"
        self.maskgit, self.part, self.cache_tokens = maskgit, part, cache_tokens
        self.dataset = ImageFolder(folder, maskgit.image_size, captions=True)
        maskgit.transformer.requires_grad_(part != "critic")
        if maskgit.critic is not None:
            maskgit.critic.requires_grad_(part != "transformer")
        self.num_samples = min(num_samples, len(self.dataset))

    def make_datasets(self) -> tuple[Dataset, Dataset | None]:
        train, valid = split(self.dataset, self.valid_fraction)
        if not self.cache_tokens:
            return train, valid if len(valid) else None
        self.maskgit.to(self.device)
        cached = TokenCache(self.maskgit, train)
        return cached, TokenCache(self.maskgit, valid) if len(valid) else None

    def collate(self, items: Any) -> Batch:
        if isinstance(items, Batch):  # from a TokenCache
            return items
        joined = torch.utils.data.default_collate(items)
        return Batch(images=joined["image"], texts=joined["text"])

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        images = batch.images if batch.ids is None else batch.ids
        assert images is not None
        cond_ids = None if batch.cond_ids is None else batch.cond_ids.to(self.device)
        return dict(
            images_or_ids=images.to(self.device, non_blocking=True),
            texts=batch.texts,
            text_embeds=batch.text_embeds,
            cond_ids=cond_ids,
            part=self.part,
        )

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        total = torch.zeros((), device=self.device)
        for micro in range(self.grad_accum_every):
            arguments = self._arguments(next(batches))
            with self.accumulating(self.wrapped["model"], micro):
                with self.autocast():
                    loss = self.wrapped["model"](**arguments)
                self.backward(loss)
            total += loss.detach() / self.grad_accum_every
        return {"loss": total, "grad_norm": self.optimizer_step("model")}

    def validate(self, loader: DataLoader) -> dict[str, float]:
        """Mean loss terms, with the text always seen."""
        sums: dict[str, float] = defaultdict(float)
        count = 0
        for batch in loader:
            arguments = self._arguments(batch)
            terms = self.maskgit.losses(**arguments, cond_drop_prob=0.0)
            rows = len(arguments["images_or_ids"])
            for name, value in vars(terms).items():
                if value is not None:
                    sums[name] += float(value) * rows
            count += rows
        sums = {name: value / count for name, value in sums.items()}
        return {"loss" if name == "total" else name: value for name, value in sums.items()}

    def draw(self, path: Path) -> None:
        """Real images above those generated from their captions (and low-resolution ids)."""
        rows = [i * len(self.dataset) // self.num_samples for i in range(self.num_samples)]
        items = [self.dataset[row] for row in rows]
        images = torch.stack([item["image"] for item in items])
        texts = [item["text"] for item in items]
        with self.autocast():
            cond_ids = self.maskgit.encode_cond(None, None, images.to(self.device))
            drawn = self.maskgit.generate(texts, cond_ids=cond_ids, seeds=list(range(len(rows))))
        path.parent.mkdir(parents=True, exist_ok=True)
        both = torch.cat([images, drawn.float().cpu()])
        image_grid(both, columns=len(rows), labels=[*texts, *[""] * len(texts)]).save(path)
