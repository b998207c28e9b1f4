"""Meissonic as published, put together from diffusers' own parts: what ours is compared with.

Blocks, angles, embeddings of time and numbers, norms and resampling are classes of the installed
diffusers, which computes them as the release did that Meissonic was published with. The order in
which they follow each other and the rule of its scheduler are written down anew, after the paper
and the published code.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def reference() -> Any:
    """The class of the transformer; its ``save_pretrained`` writes the published layout."""
    import diffusers
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.embeddings import (
        CombinedTimestepTextProjEmbeddings,
        TimestepEmbedding,
        get_timestep_embedding,
    )
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.resnet import Downsample2D, Upsample2D
    from diffusers.models.transformers.transformer_flux import (
        FluxPosEmbed,
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )

    model: Any = diffusers.ModelMixin
    configured: Any = diffusers.ConfigMixin

    class Transformer2DModel(model, configured):
        @register_to_config
        def __init__(
            self,
            patch_size: int = 1,
            in_channels: int = 64,
            num_layers: int = 19,
            num_single_layers: int = 38,
            attention_head_dim: int = 128,
            num_attention_heads: int = 24,
            joint_attention_dim: int = 4096,
            pooled_projection_dim: int = 768,
            guidance_embeds: bool = False,
            axes_dims_rope: Any = (16, 56, 56),
            vocab_size: int = 8256,
            codebook_size: int = 8192,
            downsample: bool = False,
            upsample: bool = False,
        ):
            super().__init__()
            dim = num_attention_heads * attention_head_dim
            sizes = dict(
                dim=dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
            )
            resampling = dict(
                kernel_size=2, padding=0, norm_type="rms_norm", eps=1e-6, elementwise_affine=True,
                bias=False,
            )  # fmt: skip

            def parts(**modules: nn.Module) -> nn.ModuleDict:
                return nn.ModuleDict(modules)

            self.pos_embed = FluxPosEmbed(theta=10_000, axes_dim=list(axes_dims_rope))
            self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, pooled_projection_dim)
            self.context_embedder = nn.Linear(joint_attention_dim, dim)
            self.transformer_blocks = nn.ModuleList(
                FluxTransformerBlock(**sizes) for _ in range(num_layers)
            )
            self.single_transformer_blocks = nn.ModuleList(
                FluxSingleTransformerBlock(**sizes) for _ in range(num_single_layers)
            )
            self.embed = parts(
                embeddings=nn.Embedding(vocab_size, dim),
                layer_norm=RMSNorm(dim, 1e-6),
                conv=nn.Conv2d(dim, dim, 1, bias=False),
            )
            self.mlm_layer = parts(
                conv1=nn.Conv2d(dim, dim, 1, bias=False),
                layer_norm=RMSNorm(dim, 1e-6),
                conv2=nn.Conv2d(dim, codebook_size, 1, bias=False),
            )
            self.cond_embed = TimestepEmbedding(
                5 * 256 + pooled_projection_dim, dim, sample_proj_bias=False
            )
            self.encoder_proj_layer_norm = RMSNorm(dim, 1e-6)
            self.project_to_hidden_norm = RMSNorm(dim, 1e-6)
            self.project_to_hidden = nn.Linear(dim, dim, bias=False)
            self.project_from_hidden_norm = RMSNorm(dim, 1e-6)
            self.project_from_hidden = nn.Linear(dim, dim, bias=False)
            self.down_block, self.up_block = parts(), parts()
            if downsample:
                self.down_block["downsample"] = Downsample2D(
                    dim, use_conv=True, name="Conv2d_0", **resampling
                )
            if upsample:
                self.up_block["upsample"] = Upsample2D(
                    dim, use_conv_transpose=True, name="conv", interpolate=False, **resampling
                )

        def forward(
            self, ids: Tensor, states: Tensor, pooled: Tensor, micro: Tensor, timestep: Tensor
        ) -> Tensor:
            """Logits (R, V, h, w) of ids (R, h, w), at a time of the scheduler, (1,) or (R,)."""
            x = self.embed["embeddings"](ids)
            x = self.embed["conv"](self.embed["layer_norm"](x).permute(0, 3, 1, 2))
            text = self.encoder_proj_layer_norm(self.context_embedder(states))
            for part in self.down_block.values():
                x = part(x)
            height, width = x.shape[2:]
            x = self.project_to_hidden_norm(x.permute(0, 2, 3, 1).flatten(1, 2))
            x = self.project_to_hidden(x)
            numbers = get_timestep_embedding(
                micro.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0
            )
            vector = self.cond_embed(torch.cat([pooled, numbers.view(len(ids), -1)], dim=1))
            vector = self.time_text_embed(timestep.float() * 1000, vector)
            places = torch.zeros(height, width, 3)
            places[..., 1] += torch.arange(height)[:, None]
            places[..., 2] += torch.arange(width)[None]
            places = torch.cat([torch.zeros(text.shape[1], 3), places.flatten(0, 1)])
            turns = self.pos_embed(places)
            for block in self.transformer_blocks:
                text, x = block(x, text, vector, turns)
            for block in self.single_transformer_blocks:
                text, x = block(x, text, vector, turns)
            x = self.project_from_hidden(self.project_from_hidden_norm(x))
            x = x.transpose(1, 2).unflatten(2, (height, width))
            for part in self.up_block.values():
                x = part(x)
            x = self.mlm_layer["conv1"](x).permute(0, 2, 3, 1)
            return self.mlm_layer["conv2"](self.mlm_layer["layer_norm"](x).permute(0, 3, 1, 2))

    return Transformer2DModel


def step(
    logits: Tensor,
    ids: Tensor,
    *,
    mask_id: int,
    number: int,
    steps: int,
    schedule: str,
    start: float | Tensor,
    uniform: Tensor,
    gumbel: Tensor,
) -> Tensor:
    """One step of its scheduler.

    Args:
        logits: (B, N, V), with guidance.
        ids: (B, N).
        mask_id: what stands for "unknown" in them.
        number: of the step, from 0 on.
        steps: how many there are.
        schedule: "cosine" or "linear".
        start: share of tokens that are masked at the beginning.
        uniform: (B, N), in the place of its draw from the probabilities.
        gumbel: (B, N), in the place of its noise.
    """
    unknown = ids == mask_id
    probs = logits.softmax(dim=-1)
    summed = probs.flatten(0, 1).cumsum(dim=-1)
    point = uniform.reshape(-1, 1) * summed[:, -1:]
    drawn = torch.searchsorted(summed, point, right=True).view_as(ids)
    drawn = torch.where(unknown, drawn, ids)
    if number == steps - 1:
        return drawn
    temperature = torch.linspace(2, 0, steps)[number]
    ratio = torch.tensor([[number + 1]]) / steps
    share = torch.cos(ratio * math.pi / 2) if schedule == "cosine" else 1 - ratio
    wanted = (ids.shape[1] * (start * share)).floor()
    wanted = torch.minimum(unknown.sum(dim=-1, keepdim=True) - 1, wanted).clamp(min=1)
    sure = probs.gather(-1, drawn[:, :, None])[:, :, 0]
    sure = sure.masked_fill(~unknown, torch.finfo(sure.dtype).max)
    sure = sure.clamp(min=1e-20).log() + temperature * gumbel
    least = sure.sort(dim=-1).values.gather(1, wanted.long())
    return drawn.masked_fill(sure < least, mask_id)
