"""One run of `learning.py` or `ablation.py`: a process of one thread that trains and is judged.

Ours has the parts of our trainer, `MaskGit.losses` and `make_optimizer`; the 0.3.5 release, whose
package has the same name and so needs a Python of its own, its `MaskGit` and AdamW, with PyTorch's
fused attention in the place of its own, which makes it faster. Batches, betas, clipping and
schedule are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SIZE: dict[str, Any] = dict(dim=128, depth=4, heads=2, dim_head=64)
CODES, TOKENS, WIDTH = 4096, 64, 384
BATCH, LOOKS = 32, 24
DRAWING_STEPS, GUIDANCE = 8, 3.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids, embeddings, which are real -> a scalar
# ids with the mask token, embeddings, which are real, whether the text is seen -> logits
Logits = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


class Average:
    """A moving average of a network's weights, with a decay of each step."""

    def __init__(self, network: nn.Module, decay: Callable[[int], float]):
        self.decay = decay
        self.weights: list[Tensor] = list(network.parameters())
        self.values = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.values, self.weights, 1 - self.decay(step))

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        own = [weight.clone() for weight in self.weights]
        for weight, value in zip(self.weights, self.values, strict=True):
            weight.copy_(value)
        yield
        for weight, value in zip(self.weights, own, strict=True):
            weight.copy_(value)


# what `training.ema` has: with a warm-up, and by a power of the step (Karras et al. 2024, eq. 127)
AVERAGES: dict[str, Callable[[int], float]] = {
    "0.9": lambda step: min(0.9, (1 + step) / (10 + step)),
    "0.99": lambda step: min(0.99, (1 + step) / (10 + step)),
    "0.999": lambda step: min(0.999, (1 + step) / (10 + step)),
    "power 0.05": lambda step: (1 - 1 / step) ** (16.97 + 1),
    "power 0.10": lambda step: (1 - 1 / step) ** (6.94 + 1),
}


def rotary(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, dim / 2) of angles in two dimensions, half of the pairs for each."""
    rates = 100.0 ** -(torch.arange(dim // 4) / (dim // 4))  # a side has 8 tokens
    angles = (positions[:, :, None] * rates).flatten(1)
    return angles.cos(), angles.sin()


class Rotated(nn.Module):
    """A norm of queries or keys (b, h, n, d), then rotary positions on a square grid."""

    def __init__(self, norm: nn.Module, dim_head: int):
        super().__init__()
        self.norm = norm
        side = torch.arange(math.isqrt(TOKENS))
        self.cos, self.sin = rotary(torch.cartesian_prod(side, side).float(), dim_head)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(x).chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1)


class Plain(nn.Module):
    """An MLP without a gate, of as many parameters."""

    def __init__(self, gated: Any):
        super().__init__()
        self.norm, width = gated.norm, gated.to_out.in_features * 3 // 2
        self.to_hidden = nn.Linear(gated.to_out.out_features, width, bias=False)
        self.to_out = nn.Linear(width, gated.to_out.out_features, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(F.gelu(self.to_hidden(self.norm(x))))


def alter(transformer: Any, how: str) -> None:
    """Change what the package gives no choice of."""
    for block in transformer.blocks:
        if how == "no QK-norm":
            for attention in (block.attn, block.cross):
                attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        elif how == "plain MLP":
            block.ff = Plain(block.ff)
        elif how == "no zero-init":
            for part in (block.attn, block.cross, block.ff):
                nn.init.normal_(part.to_out.weight, std=0.02)
        elif how == "RoPE":
            block.attn.q_norm = Rotated(block.attn.q_norm, block.attn.dim_head)
            block.attn.k_norm = Rotated(block.attn.k_norm, block.attn.dim_head)
        else:
            raise ValueError(how)
    if how == "RoPE":
        for table in (transformer.embed.row, transformer.embed.column):
            nn.init.zeros_(table.requires_grad_(False))


def ours(spec: dict[str, Any]) -> tuple[nn.Module, Loss, Logits, torch.optim.Optimizer]:
    muse: Any = import_module("muse_maskgit_pytorch")
    optimizers: Any = import_module("muse_maskgit_pytorch.training.optimizers")
    structures: Any = import_module("muse_maskgit_pytorch.structures")
    vae = muse.VQGanVAE(dim=4, num_res_blocks=0, factor=4, codebook_size=CODES, quantizer="lfq")
    transformer = muse.MaskGitTransformer(
        **SIZE,
        num_tokens=CODES,
        seq_len=TOKENS,
        text_embed_dim=WIDTH,
        t5_name="none",
    )
    model = muse.MaskGit(vae=vae, transformer=transformer, image_size=32, **spec["maskgit"])
    if "alter" in spec:
        alter(transformer, spec["alter"])

    def loss(ids: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return model.losses(ids, text_embeds=structures.TextEmbeds(embeds, mask)).total

    def logits(ids: Tensor, embeds: Tensor, mask: Tensor, text: bool) -> Tensor:
        given = structures.TextEmbeds(embeds, mask)
        context = transformer.encode_context(
            structures.Conditioning(given, None, torch.full((len(ids),), text))
        )
        return transformer.to_logits(transformer(ids, context)[0])

    optimizer = optimizers.make_optimizer(
        spec["optimizer"], transformer, spec["lr"], (0.9, 0.96), spec["weight_decay"]
    )
    return transformer, loss, logits, optimizer


def release(spec: dict[str, Any]) -> tuple[nn.Module, Loss, Logits, torch.optim.Optimizer]:
    import_module("transformers")  # before the stand-in, for it looks for torchvision's version
    import_module("versus_old").stand_in_for_torchvision()
    package = "muse_maskgit_pytorch"
    t5: Any = import_module(f"{package}.t5")
    t5.T5_CONFIGS["none"] = {"config": argparse.Namespace(d_model=WIDTH)}
    old: Any = import_module(package)
    attend: Any = import_module(f"{package}.attend").Attend  # type: ignore[attr-defined]
    attend.flash_attn = import_module("speed_worker").fused_attention
    transformer = old.MaskGitTransformer(**SIZE, num_tokens=CODES, seq_len=TOKENS, t5_name="none")
    transformer.self_cond_to_init_embed = None  # without self-conditioning never used
    vae = old.VQGanVAE(dim=16, codebook_size=CODES, use_vgg_and_gan=False)
    model = old.MaskGit(image_size=16, transformer=transformer, vae=vae)

    def loss(ids: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return model(ids, text_embeds=embeds, cond_drop_prob=0.1)

    def logits(ids: Tensor, embeds: Tensor, mask: Tensor, text: bool) -> Tensor:
        return transformer(ids, text_embeds=embeds, cond_drop_prob=0.0 if text else 1.0)

    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        spec["lr"],
        (0.9, 0.96),
        weight_decay=spec["weight_decay"],
        fused=True,
    )
    return transformer, loss, logits, optimizer


def validate(logits: Logits, data: dict[str, Tensor]) -> float:
    """Cross-entropy of the masked tokens of the held-out images, the same masks always."""
    ids, embeds, seen = (data[f"heldout/{name}"] for name in ("ids", "embeds", "mask"))
    generator = torch.Generator().manual_seed(0)
    ratio = torch.cos(
        (torch.randperm(len(ids), generator=generator) + 0.5) / len(ids) * torch.pi / 2
    )
    order = torch.rand(ids.shape, generator=generator).argsort(1).argsort(1)
    masked = order < (ratio * TOKENS).round().clamp(min=1)[:, None]
    total = 0.0
    with torch.no_grad():
        for rows in torch.arange(len(ids)).split(BATCH):
            given = torch.where(masked[rows], CODES, ids[rows])
            scores = logits(given, embeds[rows], seen[rows], True)[masked[rows]]
            total += float(F.cross_entropy(scores, ids[rows][masked[rows]], reduction="sum"))
    return total / int(masked.sum())


@torch.no_grad()
def draw(logits: Logits, data: dict[str, Tensor]) -> Tensor:
    """Ids of a picture for each held-out caption, by one plain sampler for all contenders.

    MaskGIT's: cosine schedule, confidence with Gumbel noise of temperature 4.5 that falls to 0.
    """
    generator = torch.Generator().manual_seed(0)
    embeds, seen = data["heldout/embeds"], data["heldout/mask"]
    ids = torch.full((len(embeds), TOKENS), CODES)
    for step in range(DRAWING_STEPS):
        parts = zip(ids.split(BATCH), embeds.split(BATCH), seen.split(BATCH), strict=True)
        scores = [
            torch.lerp(logits(*part, False), logits(*part, True), GUIDANCE).log_softmax(-1)
            for part in parts
        ]
        logs = torch.cat(scores)
        noise = torch.rand(logs.shape, generator=generator)
        sampled = (logs - (-noise.log()).log()).argmax(-1)
        masked = ids == CODES
        order = torch.rand(ids.shape, generator=generator)
        gumbel = -(-order.log()).log() * 4.5 * (1 - (step + 1) / DRAWING_STEPS)
        confidence = logs.gather(-1, sampled[..., None])[..., 0] + gumbel
        confidence = confidence.masked_fill(~masked, torch.inf)
        ids = torch.where(masked, sampled, ids)
        left = math.ceil(TOKENS * math.cos(math.pi / 2 * (step + 1) / DRAWING_STEPS) - 1e-9)
        ids.scatter_(1, confidence.argsort(1)[:, :left], CODES)
    return ids


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One run: its curve of (CPU seconds, step, validation loss), and what it draws at the end.

    It ends with a budget of ``seconds``, or of ``steps`` where the spec has these.
    """
    torch.set_num_threads(1)
    data = load_file(spec["data"])
    data = {k: v.long() if k.endswith("ids") else v for k, v in data.items()}
    data = {k: v.float() if k.endswith("embeds") else v for k, v in data.items()}
    torch.manual_seed(spec["seed"])
    network, loss, logits, optimizer = (ours if spec["ours"] else release)(spec)
    parameters = [p for p in network.parameters() if p.requires_grad]
    rows = torch.Generator().manual_seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    curve: list[tuple[float, int, float]] = []
    seconds, step, done = 0.0, 0, 0.0
    peaks = [group["lr"] for group in optimizer.param_groups]
    averages = {name: Average(network, decay) for name, decay in AVERAGES.items()}
    averages = averages if spec.get("averages") else {}
    while done < 1:
        batch = torch.randint(len(data["train/ids"]), (BATCH,), generator=rows)
        length = int(data["train/mask"][batch].sum(1).max())
        given = [data[f"train/{name}"][batch] for name in ("ids", "embeds", "mask")]
        given = [given[0], given[1][:, :length], given[2][:, :length]]
        began = time.process_time()
        rise = min(1.0, (done + 0.001) / 0.05)
        factor = rise * (0.01 + 0.99 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()) / 2)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss(*given).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - began
        step += 1
        for average in averages.values():
            average.update(step)
        done = step / spec["steps"] if "steps" in spec else seconds / spec["seconds"]
        if done >= (len(curve) + 1) / spec.get("looks", LOOKS):
            network.eval()
            curve.append((seconds, step, validate(logits, data)))
            network.train()
    network.eval()
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in parameters),
        "steps": step,
        "curve": curve,
    }
    result |= {"seconds": seconds, "ids": draw(logits, data).tolist()}
    for name, average in averages.items():
        with average.applied():
            result[name] = {"loss": validate(logits, data), "ids": draw(logits, data).tolist()}
    return result


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
