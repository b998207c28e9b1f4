"""Tiny models and inputs for tests, of this package and of what is built on it.

Every model runs in milliseconds on one CPU core, and every weight is random, so that each has an
effect. Their sizes fit together: images of 16 pixels are 4 x 4 tokens of 60 codes, texts are 12
wide. Inputs are on the CPU and the same in every run, whatever torch's seed and default device::

    from muse_maskgit_pytorch import testing

    model = testing.maskgit()
    loss = model(testing.images(), text_embeds=testing.text())

Models are typed as Any, since tests look into their parts, many of which are optional.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import (
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
    """Give every weight a random value, in place: output projections start at zero, which hides
    what comes before them.

    Returns:
        the module itself.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return module


def vae(**changes: Any) -> Any:
    """A tokenizer in eval mode: factor 4, 60 codes.

    Args:
        **changes: arguments of `VQGanVAE` to set differently.
    """
    arguments: dict[str, Any] = dict(
        dim=8, codebook_size=CODES, layers=2, num_res_blocks=1, quantizer="fsq"
    )
    return VQGanVAE(**{**arguments, **changes}).eval()


def transformer(kind: type[MaskGitTransformer] = MaskGitTransformer, **changes: Any) -> Any:
    """A transformer for 4 x 4 tokens of 60 codes and texts of width 12; it has no text encoder.

    Args:
        kind: `MaskGitTransformer`, or a class derived from it.
        **changes: arguments of its constructor to set differently.
    """
    arguments: dict[str, Any] = dict(
        num_tokens=CODES, seq_len=16, dim=16, depth=2, dim_head=8, heads=2
    )
    arguments |= dict(text_embed_dim=TEXT_DIM, t5_name="none")
    return randomise(kind(**{**arguments, **changes}))


def critic(**changes: Any) -> Any:
    """A `TokenCritic` of the same size as `transformer`."""
    return transformer(TokenCritic, **changes)


def maskgit(model: MaskGitTransformer | None = None, **changes: Any) -> Any:
    """A base model: images of 16 pixels, 4 x 4 tokens.

    Args:
        model: its transformer. If None, a new one.
        **changes: further arguments of `MaskGit`.
    """
    changes.setdefault("vae", vae())
    changes.setdefault("image_size", 16)
    made = MaskGit(transformer=model or transformer(), **changes)
    low: Any = getattr(made.transformer, "cond_encoder", None)
    for added in (low, made.critic):
        if added is not None:
            randomise(added)
    return made


def superres(**changes: Any) -> Any:
    """A super-resolution model: images of 32 pixels (8 x 8 tokens) from images of 16 (4 x 4).

    Args:
        **changes: ``model``, the transformer, and further arguments of `MaskGit`.
    """
    changes.setdefault("model", transformer(seq_len=64))
    arguments: dict[str, Any] = {"image_size": 32, "cond_image_size": 16, **changes}
    return maskgit(**arguments)


def text(batch: int = 2, length: int = 5, seed: int = 0) -> TextEmbeds:
    """Random text embeddings (batch, length, 12); row i has its last i tokens padded."""
    generator = torch.Generator("cpu").manual_seed(seed)
    embeds = torch.randn(batch, length, TEXT_DIM, generator=generator, device="cpu")
    real = length - torch.arange(batch, device="cpu")[:, None].clamp(max=length - 1)
    return TextEmbeds(embeds, torch.arange(length, device="cpu") < real)


def ids(batch: int = 2, num_tokens: int = 16, seed: int = 0, codes: int = CODES) -> Tensor:
    """Random token ids (batch, num_tokens) in [0, codes)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(codes, (batch, num_tokens), generator=generator, device="cpu")


def images(batch: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    """Random images (batch, 3, size, size) in [0, 1]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(batch, 3, size, size, generator=generator, device="cpu")


def conditioning(text: TextEmbeds, cond_ids: Tensor | None = None, keep: bool = True):
    """What a transformer is conditioned on.

    Args:
        text: see `text`.
        cond_ids: low-resolution ids (batch, M), for a super-resolution transformer.
        keep: whether the rows see their text, or are without it, as guidance has it.
    """
    return Conditioning(
        text, cond_ids, torch.full((len(text.mask),), keep, device=text.mask.device)
    )
