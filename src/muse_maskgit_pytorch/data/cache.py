"""Token ids and text embeddings of a whole data set, computed once.

Tokenizers and text encoder are frozen, so a masked transformer can train from their outputs: the
loss is the same, and a step costs the transformer alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..maskgit import MaskGit
from ..structures import Batch, TextEmbeds
from .dataset import ImageDataset


class TokenCache(Dataset):
    """What `MaskGit.losses` needs of each image, in memory.

    Indexing with a list of rows (as a DataLoader does) gives a `Batch`; texts are padded to the
    longest of that batch.

    Args:
        maskgit: whose tokenizers and text encoder to use.
        dataset: images with captions, of the model's image size; for super-resolution with their
            low-resolution images (``cond_size``), which are else made from the images' tensors.
        batch_size: images encoded at a time.
        say: is told once, early, how much memory and time it takes; None also hides the progress.

    Memory: 4 bytes a token and 2 bytes a text feature; 64 tokens and 12 words of a
    384-wide encoder are about 10 KB an image.
    """

    def __init__(
        self,
        maskgit: MaskGit,
        dataset: ImageDataset,
        batch_size: int = 64,
        say: Callable[[str], None] | None = print,
    ):
        ids: list[Tensor] = []
        cond_ids: list[Tensor] = []
        self.embeds: list[Tensor] = []
        loader = DataLoader(dataset, batch_size=batch_size)
        bar = tqdm(total=len(dataset), desc="encoding", unit="image", disable=say is None)
        began = time.monotonic()
        for number, batch in enumerate(loader):
            images = batch["image"].to(maskgit.device)
            ids.append(maskgit.vae.encode_to_ids(images).flatten(1).int().cpu())
            cond = maskgit.encode_cond(batch.get("cond_image"), None, images)
            if cond is not None:
                cond_ids.append(cond.int().cpu())
            texts = batch.get("text") or maskgit.no_texts(len(images))
            text = maskgit.embed_texts(texts, long="cut")
            rows = zip(text.embeds.half().cpu(), text.mask.cpu(), strict=True)
            self.embeds += [embeds[mask] for embeds, mask in rows]
            bar.update(len(images))
            # the first batch also loads the text encoder: it tells nothing of the others' time
            if say is not None and number == min(1, len(loader) - 1):
                size = sum(t.nbytes for t in (*ids, *cond_ids, *self.embeds))
                share = len(dataset) / len(self.embeds)
                left = (time.monotonic() - began) * (len(loader) - 1 - number)
                wait = f", and {left:.0f} s more to encode" if left >= 1 else ""
                say(
                    f"token cache: {len(dataset):,} images take about {size * share / 1e6:.2g} MB "
                    f"of memory in each process{wait}"
                )
            began = time.monotonic()
        bar.close()
        self.ids = torch.cat(ids)
        self.cond_ids = torch.cat(cond_ids) if cond_ids else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        rows = list(rows)
        embeds = [self.embeds[row].float() for row in rows]
        lengths = torch.tensor([len(e) for e in embeds], device="cpu")
        mask = torch.arange(int(lengths.max()), device="cpu") < lengths[:, None]
        padded = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        return Batch(
            ids=self.ids[rows].long(),
            cond_ids=None if self.cond_ids is None else self.cond_ids[rows].long(),
            text_embeds=TextEmbeds(padded, mask),
        )
