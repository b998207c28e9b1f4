"""What a training costs before it is begun: memory, arithmetic, time.

A step is traced with fake tensors, which have shapes and no values: the code that is measured is
the code that trains, and nothing is allocated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import layers
from ..cross_entropy import cross_entropy
from ..maskgit import MaskGit
from ..structures import Conditioning, TextEmbeds
from ..transformer import TokenCritic
from ..vqgan_vae import VQGanVAE
from .gan import Discriminator
from .optimizers import block_matrices, factors, moment8bit, trained

MASKED = 0.64  # mean share of masked tokens under the cosine law (2.6)


@dataclass
class Estimate:
    """Of one process's step.

    Attributes:
        parameters: trained and frozen, by part.
        weights, gradients, optimizer, averages: bytes of what is trained, whole.
        frozen: bytes of weights that stay as they are.
        activations: bytes that wait for the way back.
        working: the most bytes alive at once besides weights, optimizer and averages.
        largest: bytes of the largest part that FSDP puts together at once.
        forward, backward: operations of one image.
        drawing: operations of one picture, both branches of the guidance.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    frozen: int = 0
    activations: int = 0
    working: int = 0
    largest: int = 0
    forward: float = 0.0
    backward: float = 0.0
    drawing: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes of one process that has all of the weights."""
        return self.weights + self.optimizer + self.averages + self.frozen + self.working

    def peak_of(self, processes: int, sharded: bool) -> int:
        """Bytes of one of some processes: with a second copy of the gradients, which DDP exchanges.

        Or with its share of weights, gradients, optimizer and averages (FSDP), and the largest
        part twice, as it is put together while the one before is at work.
        """
        if processes == 1:
            return self.peak
        if not sharded:
            return self.peak + self.gradients
        divided = self.weights + self.gradients + self.optimizer + self.averages
        rest = self.working - min(self.working, self.gradients)
        return divided // processes + 2 * self.largest + max(rest, self.activations) + self.frozen


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        out = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen and key not in given:
                    self._seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as a GPU computes it, which never has all of its scores."""
    seen = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    rows, heads, length, width = q
    return 4 * rows * heads * length * k[2] * width


def _attention_back(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 5 * _attention(q, k, v) // 2  # the scores anew, and four products


_OPS = torch.ops.aten
_FLOPS: dict[Any, Any] = {
    _OPS._scaled_dot_product_flash_attention_for_cpu: _attention,
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}


@contextmanager
def sketched() -> Iterator[None]:
    """Within the block models are made and called without memory."""
    unchecked = patch.object(VQGanVAE, "check_ids", lambda vae, ids, grid=False: ids)
    fused = patch.object(layers, "attend", _fused)
    with FakeTensorMode(allow_non_fake_inputs=True), fused, unchecked:
        yield


def _traced(found: Estimate, losses: Callable[[int], list[Tensor]], rows: int, half: bool) -> None:
    """Count one step: the losses of a batch, and the way back from each."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=half)
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as flops:
        with autocast():
            terms = losses(1)
        found.forward = flops.get_total_flops()
        for term in terms:
            term.backward()
        found.backward = flops.get_total_flops() - found.forward
    del terms
    with _Live() as live:
        with autocast():
            terms = losses(rows)
        found.activations = live.now
        while terms:
            terms.pop().backward()
    found.working = live.peak


def _count(found: Estimate, module: nn.Module, optimizer: str) -> None:
    """Weights, gradients, optimizer and averages of a module, each weight in float32."""
    matrices = block_matrices(module) if optimizer == "muon" else set()
    for name, p in trained(module).items():
        size = p.numel() * 4
        found.weights += size
        found.gradients += size
        if optimizer == "adafactor":
            found.optimizer += size + 4 * sum(math.prod(f) for f in factors(p).values())
        elif optimizer == "adamw8bit" and (parts := moment8bit(p)):
            found.optimizer += 2 * (p.numel() + 4 * math.prod(parts["scale"]))
        else:
            found.optimizer += size if name in matrices else 2 * size


def of_maskgit(
    model: MaskGit,
    rows: int,
    text_len: int,
    *,
    optimizer: str = "adamw",
    half: bool = False,
    checkpointed: bool = False,
    averages: int = 1,
) -> Estimate:
    """The step of a base or super-resolution stage, made within `sketched`.

    Args:
        model: whose step.
        rows: images in a micro batch.
        text_len: text tokens of each.
        optimizer: of the trainer.
        half: bfloat16 where autocast has it.
        checkpointed: activations within a block are computed again on the way back.
        averages: how many averages of the weights are kept.
    """
    transformer, found = model.transformer, Estimate()
    blocks = [m for m in model.modules() if isinstance(m, layers.Block)]
    for name, part in {"transformer": transformer, "critic": model.critic}.items():
        if part is not None:
            found.parameters[name] = sum(p.numel() for p in part.parameters())
            _count(found, part, optimizer)
    found.averages = found.weights * averages
    tokenizers = {id(vae): vae for vae in (model.vae, model.cond_vae) if vae is not None}
    found.parameters["tokenizer"] = sum(
        p.numel() for vae in tokenizers.values() for p in vae.parameters()
    )
    found.frozen = 4 * found.parameters["tokenizer"]
    in_blocks = [4 * sum(p.numel() for p in block.parameters()) for block in blocks]
    found.largest = max(max(in_blocks), found.weights - sum(in_blocks))
    for block in blocks:
        block.recomputed = checkpointed
    tokens = transformer.seq_len

    def conditioning(count: int) -> Conditioning:
        width = transformer.text_embed_dim
        mask = torch.ones(count, text_len, dtype=torch.bool)
        text = TextEmbeds(torch.empty(count, text_len, width), mask) if width else None
        encoder: Any = transformer.cond_encoder
        cond = None
        if encoder is not None:
            cond = torch.zeros(count, int(encoder.seq_len), dtype=torch.long)
        return Conditioning(text, cond, torch.ones(count, dtype=torch.bool))

    def losses(count: int) -> list[Tensor]:
        given = conditioning(count)
        ids = torch.zeros(count, tokens, dtype=torch.long)
        context = transformer.encode_context(given)
        [hidden] = transformer(ids, context)
        hidden = hidden.flatten(0, 1)[: max(1, round(MASKED * count * tokens))]
        labels = torch.zeros(len(hidden), dtype=torch.long)
        loss = cross_entropy(transformer.to_logits, hidden, labels, model.label_smoothing)
        if model.critic is not None:
            if isinstance(model.critic, TokenCritic):
                context = model.critic.encode_context(given)
            [hidden] = model.critic(ids, context)
            loss = loss + model.critic.to_logits(hidden).float().mean()
        return [loss]

    _traced(found, losses, rows, half)
    steps = model.default_options.timesteps
    steps = len(steps) if isinstance(steps, Sequence) else steps
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as flops:
        ids = torch.zeros(2, tokens, dtype=torch.long)  # with the text and without
        [hidden] = transformer(ids, transformer.encode_context(conditioning(2)))
        transformer.to_logits(hidden)
    with torch.no_grad(), FlopCounterMode(display=False) as decoding:
        model.decode(ids[:1])
    found.drawing = steps * flops.get_total_flops() + decoding.get_total_flops()
    return found


def of_tokenizer(
    vae: VQGanVAE,
    judge: Discriminator | None,
    image_size: int,
    rows: int,
    *,
    optimizer: str = "adamw",
    half: bool = False,
    averages: int = 1,
) -> Estimate:
    """The step of a tokenizer with its discriminator, made within `sketched`.

    The network of the perceptual term is not counted. Arguments as of `of_maskgit`.
    """
    found = Estimate()
    found.parameters["tokenizer"] = sum(p.numel() for p in vae.parameters())
    _count(found, vae, optimizer)
    found.averages = found.weights * averages
    if judge is not None:
        found.parameters["discriminator"] = sum(p.numel() for p in judge.parameters())
        _count(found, judge, optimizer)
    found.largest = found.weights
    vae.eval()  # the moving averages of codes are no matter of memory

    def losses(count: int) -> list[Tensor]:
        images = torch.empty(count, 3, image_size, image_size)
        recon, quantized = vae(images)
        loss = F.mse_loss(recon.float(), images) + quantized.loss
        if judge is None:
            return [loss]
        loss = loss - judge(recon).float().mean()
        return [loss, judge(torch.cat([images, recon.detach()])).float().mean()]

    _traced(found, losses, rows, half)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        vae.decode_from_ids(vae.encode_to_ids(torch.empty(1, 3, image_size, image_size)))
    found.drawing = flops.get_total_flops()
    return found
