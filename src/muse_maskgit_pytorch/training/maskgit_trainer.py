"""Training of the masked transformers: base, super-resolution and critic alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..arguments import as_path, one_of, whole
from ..cross_entropy import TINY
from ..data.cache import TokenCache
from ..data.captions import read_prompts
from ..data.dataset import ImageDataset, split
from ..data.encoding import write_cache
from ..data.folder import open_source
from ..data.order import Shares
from ..data.pixels import Crop, View
from ..data.source import few, has_cond
from ..data.stream import RowStream
from ..data.wording import Wording
from ..images import image_grid, to_pil
from ..layers import Block
from ..lora import add_lora, save_lora, with_text_lora
from ..maskgit import MaskGit, Part
from ..structures import Batch, TextEmbeds
from ..text import TextPrecision
from ..watching.log import writing
from ..watching.run_file import settings_of
from .loop import Trainer
from .losses import NamedTerms, frozen
from .probe import Probe, references

PROBED = 256  # images of a validation that are looked at closely
ENCODED = ("images_or_ids", "texts", "text_embeds", "cond_images", "cond_ids", "image_size")


class MaskGitTrainer(Trainer):
    """Trains a `MaskGit` on captioned images.

    A model with ``cond_image_size`` trains as super-resolution. Its low-resolution images should
    be those that the base was trained on: by default they come from the same files, scaled as the
    base's images are; ``cond_folder`` names the base's own files.

    The captions of a model with classes are their names, in caption files or as the names of the
    folders that the images lie in; a model without any takes images alone.

    Args:
        maskgit: base or super-resolution, with its trained tokenizer.
        folder: images and captions, see `Folder`; the short form of ``data=folder``.
        data: where the images and captions come from instead: a `Source`; any list, data set or
            stream of dicts with "image" (a PIL image, a float tensor (3,H,W) in [0,1], or encoded
            bytes), "text" (a caption, or several, of which one is drawn each time; a class or its
            number) or "text_embeds" (float (L,E), with "text_mask" or without), and, if there is
            one, "cond_image", and "loss_mask", a picture of the image's size: white counts in the
            loss, black does not (of a folder's images ``NAME-masklabel.png``); or a name of files
            or of a data set (`data.open_named`). A stream has no length; it is not cached, and
            `num_train_steps` decides the end.
        cond_folder: low-resolution images for super-resolution, found by the name of the image
            (its path relative to the folder, without the suffix). Without it: the items' own
            (`Item.cond_image`) or the images scaled down.
        part: "transformer" or "critic" trains only one of the two. Parameters that require no
            gradient are never trained.
        cache: folder of a cache that ``muse cache`` made, in the place of images and captions:
            neither these nor the text encoder are needed.
        cache_tokens: encode the whole set once, each process its share, and train from ids and text
            embeddings, which are kept in ``results_folder`` (`TokenCache`): the loss is the same, a
            step far cheaper.
        complementary: each image is there twice in a step, with a mask and with its complement, so
            that all of its tokens are learnt from. It costs as much as twice the batch.
        checkpoint_activations: keep only each block's input for the way back and compute the block
            again there: less memory, more work, the same gradients.
        num_samples: images in the pictures of ``results_folder/samples``.
        sample_prompts: file of prompts, one on a line, that are drawn with the same seeds each time
            too, by the averaged weights and by the raw ones.
        aspect_ratios: train on pictures in their own shapes instead of squares: each is cropped to
            the nearest of these (width:height, such as [3:2, 1:1, 2:3]), with about as many pixels
            as the square (`Geometry.buckets`). All pictures of a step on all processes, or of one
            of its ``grad_accum_every`` parts, have the same.
        crop: "center", or "random", see `View`; with ``cache_tokens=False``, as the next five.
        crop_scale: smallest and largest side of random crops, as a share of the shorter side.
        flip: mirror half of the training images, left to right.
        shuffle_tags: captions are tags between commas, which come in any order, see `Wording`.
        tag_dropout: share of the tags that is left out each time, in [0,1).
        keep_tags: so many of the first tags always stay, and stay first.
        lora_rank: train low-rank adapters of this rank beside the transformer's linear layers, and
            nothing else (`lora.add_lora`); 0: none. What is saved, as ``NAME-lora``,
            ``NAME-lora-ema`` and ``NAME-lora-best``, are folders for `Muse.load_lora`.
        lora_alpha: their weight; ``lora_rank`` by default.
        lora_targets: names of the layers, or their last parts; all of the blocks by default.
        lora_text: train adapters of the same rank beside all linear layers of the text encoder,
            too. Texts are then encoded anew in each step, with ``cache_tokens=False``.
        text_precision: of the text encoder; if None, as the model says (`MaskGit.text_compute`).
        text_device: where texts are encoded; if None, as the model says.
        compile: compute the loss by `torch.compile` (`MaskGit.compile`): meant for a GPU; the first
            steps take minutes.
        **common: see `Trainer`.
    """

    name = "maskgit"

    def __init__(
        self,
        maskgit: MaskGit,
        *,
        folder: str | None = None,
        data: Any = None,
        cond_folder: str | None = None,
        cache: str | None = None,
        part: Part = "all",
        cache_tokens: bool = True,
        complementary: bool = False,
        checkpoint_activations: bool = False,
        num_samples: int = 8,
        sample_prompts: str | None = None,
        aspect_ratios: list[str] | None = None,
        crop: Crop = "center",
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
        shuffle_tags: bool = False,
        tag_dropout: float = 0.0,
        keep_tags: int = 0,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
        lora_text: bool = False,
        text_precision: TextPrecision | None = None,
        text_device: str | None = None,
        compile: bool = False,
        **common: Any,
    ):
        settings = settings_of(locals())
        super().__init__(maskgit, **common)
        self.settings |= settings
        part = one_of("part", part, Part)
        num_samples = whole("num_samples", num_samples, 1)
        if part == "critic" and maskgit.critic is None:
            raise ValueError(
                "part='critic', but the model has no token_critic or self_token_critic"
            )
        self.name = "superres" if maskgit.cond_image_size else "base"
        self.maskgit, self.part, self.cache_tokens = maskgit, part, cache_tokens
        self.lora = whole("lora_rank", lora_rank, 0) > 0
        self.lora_text = bool(lora_text)
        if self.lora_text and not self.lora:
            raise ValueError("lora_text adds to an adapter: say its rank, lora_rank=16")
        encoder = maskgit.shared_encoder() if self.lora_text else None
        text: dict[str, Any] = dict(precision=text_precision, device=text_device)
        maskgit.text_compute = replace(
            maskgit.text_compute, **{name: v for name, v in text.items() if v is not None}
        )
        self.complementary = bool(complementary)
        self.checkpoint_activations = bool(checkpoint_activations)
        if cond_folder is not None and maskgit.cond_image_size is None:
            raise ValueError(
                "cond_folder is given, but the model has no cond_image_size: leave it out"
            )
        self._own: TokenCache | None = None
        buckets = () if aspect_ratios is None else maskgit.geometry.buckets(aspect_ratios)
        self.view = View(maskgit.image_size, crop, crop_scale, flip, self.seed, buckets)
        self.wording = Wording(shuffle_tags, tag_dropout, keep_tags, self.seed)
        self.dataset: Any = (
            self._open_images(data, folder, cond_folder)
            if cache is None
            else self._open_cache(cache, data or folder or cond_folder)
        )
        if self.lora:
            if self.posthoc_every:
                raise ValueError(
                    "posthoc_every averages models, and lora_rank trains an adapter: leave one of "
                    "them out"
                )
            if self.parallel.wants_shards:
                raise ValueError(
                    "lora_rank does not go with FSDP: adapters are small, so use an accelerate "
                    "configuration with distributed_type MULTI_GPU"
                )
            if part == "critic":
                raise ValueError("part='critic' trains no adapter: leave out lora_rank")
            if maskgit.critic is not None:
                self.part = part = "transformer"
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                add_lora(maskgit.transformer, lora_rank, lora_alpha, lora_targets)
                if encoder is not None:
                    maskgit.own_encoder = with_text_lora(encoder, lora_rank, lora_alpha)
        with frozen(self._left_out()):
            if not any(p.requires_grad for p in maskgit.parameters()):
                raise ValueError(
                    f"nothing to train with part={part!r}: all of its parameters are frozen; call "
                    "requires_grad_(True) on what should be trained"
                )
        self.terms = NamedTerms(maskgit)
        if compile:
            if self.view.buckets and maskgit.transformer.config.get("multi_axis"):
                raise ValueError(
                    "compile, aspect_ratios and multi_axis do not go together, since torch's "
                    "compiler fails on windows of several shapes: leave one of them out"
                )
            maskgit.compile()
            self.counting = False
        self.num_samples = min(num_samples, len(self.dataset))
        if sample_prompts is not None:
            if maskgit.cond_image_size is not None:
                raise ValueError(
                    "sample_prompts need a base model: super-resolution draws from low-resolution "
                    "images, which prompts do not have"
                )
            self.prompts = read_prompts(as_path(sample_prompts, "sample_prompts"), sample_prompts)
            maskgit.embed_texts(self.prompts)  # refused now rather than after hours

    def _open_images(self, data: Any, folder: str | None, cond_folder: str | None) -> ImageDataset:
        maskgit = self.maskgit
        classes = maskgit.transformer.classes
        captions = classes != ()  # an unconditional model needs none
        source = open_source(
            data, folder, captions, cond_folder, self.results_folder, classes or (), **self.reading
        )
        if classes and (others := set(getattr(source, "texts", None) or ()) - set(classes)):
            raise ValueError(
                f"{source} has captions that are no class of this model: {few(sorted(others))}; "
                f"its classes are {few(classes)}"
            )
        if self.lora_text and getattr(source, "embeds", False):
            raise ValueError(
                f"{source} has text_embeds, and lora_text trains the encoder of texts: leave it out"
            )
        cond_size = maskgit.cond_image_size
        if self.view.is_random and cond_size is not None:
            if source.columns.cond if isinstance(source, RowStream) else has_cond(source):
                raise ValueError(
                    f"{source} has low-resolution images of its own (cond_folder or cond_image), "
                    "which do not fit random crops and flips: leave them out, and the crops are "
                    "scaled down"
                )
            cond_size = None
        if isinstance(source, RowStream):
            if self.view.buckets:
                raise ValueError(
                    f"aspect_ratios need data with a length, and {source} is a stream: leave out "
                    "streaming, or aspect_ratios"
                )
            return self._take_stream(source, self.view, captions, cond_size, self.wording, True)
        self._check_cached(source)
        view = View(maskgit.image_size, seed=self.seed, buckets=self.view.buckets)
        return ImageDataset(source, view, captions, cond_size, wording=self.wording, masks=True)

    def _check_cached(self, source: Any) -> None:
        """Refuse what a cache, which has seen each item once, would not show."""
        changing = {
            "random crops and flips": self.view.is_random,
            "shuffle_tags and tag_dropout": bool(self.wording),
            "text_embeds": getattr(source, "embeds", False),
            "the text encoder's changing states (lora_text)": self.lora_text,
        }
        if self.cache_tokens and any(changing.values()):
            names = " and ".join(name for name, there in changing.items() if there)
            raise ValueError(f"{names} cannot be cached: set cache_tokens=False")

    def _open_cache(self, cache: str, images: Any) -> TokenCache:
        if images is not None:
            raise ValueError(
                f"cache {cache} is given together with images, {images}: leave one of them out "
                "(trainer.folder: null)"
            )
        if self.view.is_random or self.view.buckets or self.wording:
            raise ValueError(
                f"cache {cache} has its own crops, shapes and captions: leave out crop, flip, "
                "aspect_ratios, shuffle_tags and tag_dropout (muse cache takes the first three)"
            )
        if self.lora_text:
            raise ValueError(
                f"cache {cache} has the text encoder's states, which lora_text changes: train from "
                "the images, with cache_tokens=False"
            )
        return TokenCache(cache, self.maskgit, self.seed)

    def _left_out(self) -> list[nn.Parameter]:
        """The parameters that ``part`` leaves as they are."""
        critic = self.maskgit.critic
        if self.part == "critic":
            return list(self.maskgit.transformer.parameters())
        return list(critic.parameters()) if self.part == "transformer" and critic else []

    def train(self) -> None:
        blocks = [module for module in self.maskgit.modules() if isinstance(module, Block)]
        for block in blocks:
            block.recomputed = self.checkpoint_activations
        try:
            with frozen(self._left_out()):
                super().train()
        finally:
            for block in blocks:
                block.recomputed = False

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.terms}

    def make_datasets(self) -> tuple[Any, Any]:
        if self.stream:
            return self.stream, self.dataset if self.dataset.held else None
        train, valid = split(self.dataset, self.valid_fraction)
        if self.view.is_random:
            train = train.viewed(self.view)
        return train, valid if len(valid) else None

    def ready(self, dataset: Any, say: Callable[[str], None] | None) -> Dataset:
        if isinstance(dataset, TokenCache) or self.stream or not self.cache_tokens:
            return dataset
        if self._own is None:  # of the whole set, before it was split
            assert isinstance(self.dataset, ImageDataset)
            folder = self.results_folder / f"{self.name}-cache"
            write_cache(
                folder, self.maskgit, self.dataset, num_workers=self.num_workers, say=say,
                rank=self.parallel.rank, world=self.parallel.world, renew=True,
            )  # fmt: skip
            self.parallel.wait()
            self._own = TokenCache(folder, self.maskgit, self.seed)
        return self._own.select(dataset.rows)

    def _write_model(self, which: str) -> None:
        if not self.lora:
            return super()._write_model(which)
        folder = self.results_folder / f"{self.name}-lora{which}"
        if self.parallel.is_main:
            with writing(folder):
                encoder = self.maskgit.own_encoder if self.lora_text else None
                save_lora(self.maskgit.transformer, folder, self.name, encoder)

    def collate(self, items: Any) -> Batch:
        if isinstance(items, Batch):  # from a TokenCache
            return items
        given = [item.pop("text_embeds", None) for item in items]
        if any("loss_mask" in item for item in items):
            white = torch.ones_like(items[0]["image"][:1])
            items = [{"loss_mask": white} | item for item in items]
        joined = torch.utils.data.default_collate(items)
        embeds = [embeds for embeds in given if embeds is not None]
        if 0 < len(embeds) < len(items):
            raise ValueError("some items have text_embeds and others a text: give all the same")
        return Batch(
            images=joined["image"],
            cond_images=joined.get("cond_image"),
            texts=None if embeds else joined.get("text") or self.maskgit.no_texts(len(items)),
            text_embeds=TextEmbeds.padded(embeds) if embeds else None,
            image_size=tuple(joined["image"].shape[-2:]),
            loss_mask=joined.get("loss_mask"),
        )

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        images = batch.images if batch.ids is None else batch.ids
        assert images is not None
        cond_images = None if batch.cond_images is None else batch.cond_images.to(self.device)
        cond_ids = None if batch.cond_ids is None else batch.cond_ids.to(self.device)
        return dict(
            images_or_ids=images.to(self.device, non_blocking=True),
            texts=batch.texts,
            text_embeds=batch.text_embeds,
            cond_images=cond_images,
            cond_ids=cond_ids,
            image_size=batch.image_size,
            loss_mask=batch.loss_mask,
            part=self.part,
        )

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step on the mean over all its masked tokens, however they are divided.

        A mean of the micro batches' means would count a token more where few others are masked.
        The critic's loss is a mean over all tokens, as many on each process.
        """
        micros = [next(batches) for _ in range(self.grad_accum_every)]
        masks = [self.maskgit.draw_mask(_rows(batch), batch.image_size) for batch in micros]
        if self.complementary:
            masks = [torch.cat([mask, ~mask]) for mask in masks]
        counts = torch.stack(
            [self._counted(mask, batch) for mask, batch in zip(masks, micros, strict=True)]
        )
        total = self.parallel.reduce(counts.sum())
        weights = counts * len(micros) * self.parallel.world / total.clamp(min=TINY)
        tokens = sum(mask.numel() for mask in masks) / len(micros)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for micro, (batch, mask, weight) in enumerate(zip(micros, masks, weights, strict=True)):
            arguments = self._arguments(batch)  # one micro batch at a time on the device
            arguments["self_cond"] = self._guesses(micro)
            arguments |= dict(mask=mask, mask_weight=weight, token_weight=mask.numel() / tokens)
            with self.accumulating(self.wrapped["model"], micro):
                with self.autocast():
                    terms = self.wrapped["model"](**arguments)
                self.backward(terms["loss"])
            for name, value in terms.items():
                sums[name] += value.detach() / len(micros)
        return {**sums, "grad_norm": self.optimizer_step("model")}

    def _counted(self, mask: Tensor, batch: Batch) -> Tensor:
        """What the masked tokens of a batch count in all."""
        if batch.loss_mask is None:
            return mask.sum()
        shares = self.maskgit.token_shares(batch.loss_mask, batch.image_size)
        return (mask * shares.repeat(len(mask) // len(shares), 1)).sum()

    def _guesses(self, micro: int) -> bool | None:
        """Whether a micro batch trains with self-conditioning; None: the model draws it.

        Where weights are divided all processes must decide alike, for it takes a further pass.
        """
        if not self.sharded:
            return None
        steps = self.step + self.guard.lost_steps
        place = (self.seed * 1_000_003 + steps) * self.grad_accum_every + micro
        generator = torch.Generator("cpu").manual_seed(place)
        return (
            float(torch.rand((), generator=generator, device="cpu")) < self.maskgit.self_cond_prob
        )

    def validate(self, shares: Shares) -> dict[str, float]:
        """Mean loss terms, over masked tokens and over all for the critic; texts always seen.

        With self-conditioning as in drawing. Where pictures have masks of the loss, tokens count by
        these, as in training. Of the first images also the figures of `Probe`, without such masks.
        """
        masks: dict[int, Tensor] = {}
        for size, bucket in shares.buckets.items():
            masks |= zip(map(int, bucket), self.maskgit.draw_mask(len(bucket), size), strict=True)
        tokens = sum(mask.numel() for mask in masks.values()) / shares.count  # of an image
        masked = torch.stack([mask.sum() for mask in masks.values()]).float().mean()
        sums: dict[str, float] = defaultdict(float)
        probe = Probe(self.maskgit)
        probed = math.ceil(PROBED / shares.batch_size / shares.world)  # as many on every process
        for number, (rows, counted, batch) in enumerate(shares):
            mask = torch.stack([masks[row] for row in rows])
            # a batch draws the same numbers whichever process has it
            torch.manual_seed(self.seed * 1_000_003 + rows[0] + 1)
            heeded = self._counted(mask, batch)
            sums["unheeded"] += float((mask.sum() - heeded) / len(rows) / masked) * counted
            arguments = self._arguments(batch)
            if number < probed and self.part != "critic":
                known = {name: arguments[name] for name in ENCODED}
                others = self._others(shares, rows)
                seeds = [self.seed * 1_000_003 + row for row in rows]
                probe.see(known, None if others is None else vars(others), counted, seeds)
            terms = self.maskgit.losses(
                **arguments,
                cond_drop_prob=0.0,
                mask=mask,
                mask_weight=heeded / len(rows) / masked,
                token_weight=mask.shape[1] / tokens,
                self_cond=True,
            )
            for name, value in vars(terms).items():
                if value is not None:
                    sums[name] += float(value) * counted
        sums = self.parallel.sums(sums)
        figures = {name: value / shares.count for name, value in sums.items()}
        if unheeded := figures.pop("unheeded"):  # so far a mean over all masked tokens
            scale = 1 / max(1 - unheeded, TINY)
            critic = self.maskgit.critic_loss_weight * figures.get("critic", 0.0)
            figures["total"] = critic + scale * (figures["total"] - critic)
            figures["ce"] *= scale
        if self.part != "critic":
            figures |= probe.figures(self.parallel.sums(probe.sums))
        return {"loss" if name == "total" else name: value for name, value in figures.items()}

    def _others(self, shares: Shares, rows: list[int]) -> Batch | None:
        """Images half a set further on, whose captions should not do for these ones.

        None where captions decide little: of super-resolution, or where there are none.
        """
        told = self.maskgit.transformer.classes != () and self.maskgit.cond_vae is None
        for bucket in shares.buckets.values():
            if told and len(bucket) > 1 and rows[0] in bucket:
                places = [list(bucket).index(row) + len(bucket) // 2 for row in rows]
                return self._batch(shares.dataset, [bucket[p % len(bucket)] for p in places])
        return None

    def _batch(self, dataset: Any, rows: Sequence[int]) -> Batch:
        cached = isinstance(dataset, TokenCache)
        return dataset.__getitems__(rows) if cached else self.collate([dataset[r] for r in rows])

    def references(self, train: Any, valid: Any) -> dict[str, float]:
        if not isinstance(valid, TokenCache) or not isinstance(train, TokenCache):
            return {}
        sizes = train.buckets.keys() | valid.buckets.keys()
        grids = {size: self.maskgit.geometry.grid(size) for size in sizes}
        return references(train, valid, self.maskgit.vae.codebook_size, grids)

    def draw_prompts(self) -> Tensor:
        own = self.parallel.share(list(range(len(self.prompts))))
        drawn = []
        for start in range(0, len(own), self.batch_size):
            seeds = own[start : start + self.batch_size]
            drawn.append(self._generated([self.prompts[i] for i in seeds], seeds=seeds))
        return self.parallel.joined(torch.cat(drawn).float(), len(self.prompts)).cpu()

    def draw(self, path: Path) -> dict[str, float]:
        """Real images above those generated from their captions (and low-resolution ids)."""
        data, count = self.dataset, self.num_samples
        rows = [i * len(data) // count for i in range(count)]
        if isinstance(data, TokenCache):
            texts = data.captions(rows)
        else:
            texts = [data[row].get("text", "") for row in rows]
        sheet: dict[int, Image.Image] = {}
        for bucket in data.buckets.values():  # the processes share out those of one size
            here = [i for i in range(count) if rows[i] in bucket]
            if here:
                own = self.parallel.share(here)
                for part, images in enumerate(self._pictures([rows[i] for i in own], own)):
                    joined = self.parallel.joined(images.float().to(self.device), len(here))
                    sheet |= zip(
                        [i + part * count for i in here], to_pil(joined.cpu()), strict=True
                    )
        if self.parallel.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures, labels = [sheet[i] for i in range(2 * count)], [*texts, *[""] * count]
            image_grid(pictures, columns=count, labels=labels).save(path)
        contrasts = [float(np.asarray(sheet[i]).std(axis=(0, 1)).mean()) for i in range(2 * count)]
        return {
            "real_contrast": fmean(contrasts[:count]) / 255,
            "drawn_contrast": fmean(contrasts[count:]) / 255,
        }

    def _pictures(self, rows: Sequence[int], seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Images of one size, and what is drawn from their captions."""
        data = self.dataset
        batch = self._batch(data, rows)
        if batch.ids is not None:  # without the images: as the tokenizer decodes them
            images = self.maskgit.decode(batch.ids.to(self.device), batch.image_size)
        else:
            assert batch.images is not None
            images = batch.images.to(self.device)
        with self.autocast():
            cond_ids = self.maskgit.encode_cond(
                batch.cond_images, batch.cond_ids, None if batch.images is None else images,
                batch.image_size,
            )  # fmt: skip
        return images, self._generated(
            batch.texts, text_embeds=batch.text_embeds, cond_ids=cond_ids, seeds=seeds,
            image_size=batch.image_size,
        )  # fmt: skip

    def _generated(self, texts: list[str] | None, **arguments: Any) -> Tensor:
        precision = self.maskgit.precision
        if self.device.type == "cuda":  # a few pictures are worth no graphs beside the training
            self.maskgit.precision = "reference"
        try:
            with self.autocast():
                return self.maskgit.generate(texts, **arguments)
        finally:
            self.maskgit.precision = precision


def _rows(batch: Batch) -> int:
    images = batch.images if batch.ids is None else batch.ids
    assert images is not None
    return len(images)
