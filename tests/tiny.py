"""Models small enough for a slow core, with random weights everywhere.

What is made is typed as Any: tests look into its parts, of which many are optional.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from muse_maskgit_pytorch import (
    Conditioning,
    MaskGit,
    MaskGitTransformer,
    TextEmbeds,
    TokenCritic,
    VQGanVAE,
)

Module = TypeVar("Module", bound=nn.Module)
TEXT_DIM = 12
CODES = 60


def randomise(module: Module) -> Module:
    """Give every weight a random value: output projections start at zero and hide much."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return module


def vae(**changes: Any) -> Any:
    """Factor 4, 60 codes."""
    arguments: dict[str, Any] = dict(
        dim=8, codebook_size=CODES, layers=2, num_res_blocks=1, quantizer="fsq"
    )
    return VQGanVAE(**{**arguments, **changes}).eval()


def transformer(kind: type[MaskGitTransformer] = MaskGitTransformer, **changes: Any) -> Any:
    """60 codes, 4 x 4 tokens, texts of width 12."""
    arguments: dict[str, Any] = dict(
        num_tokens=CODES, seq_len=16, dim=16, depth=2, dim_head=8, heads=2
    )
    arguments |= dict(text_embed_dim=TEXT_DIM, t5_name="none")
    return randomise(kind(**{**arguments, **changes}))


def critic(**changes: Any) -> Any:
    return transformer(TokenCritic, **changes)


def maskgit(model: MaskGitTransformer | None = None, **changes: Any) -> Any:
    """Images of 16 pixels, 4 x 4 tokens."""
    changes.setdefault("vae", vae())
    changes.setdefault("image_size", 16)
    made = MaskGit(transformer=model or transformer(), **changes)
    for added in (made.transformer.cond_encoder, made.critic):
        if added is not None:
            randomise(added)
    return made


def superres(**changes: Any) -> Any:
    """Images of 32 pixels, 8 x 8 tokens, over images of 16 pixels, 4 x 4 tokens."""
    changes.setdefault("model", transformer(seq_len=64))
    arguments: dict[str, Any] = {"image_size": 32, "cond_image_size": 16, **changes}
    return maskgit(**arguments)


def text(batch: int = 2, length: int = 5, seed: int = 0) -> TextEmbeds:
    """Random embeddings; row i has its last i tokens padded."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, length, TEXT_DIM, generator=generator)
    real = length - torch.arange(batch)[:, None].clamp(max=length - 1)
    return TextEmbeds(embeds, torch.arange(length) < real)


def ids(batch: int = 2, num_tokens: int = 16, seed: int = 0, codes: int = CODES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(codes, (batch, num_tokens), generator=generator)


def images(batch: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def conditioning(text: TextEmbeds, cond_ids: Tensor | None = None, keep: bool = True):
    return Conditioning(text, cond_ids, torch.full((len(text.mask),), keep))
