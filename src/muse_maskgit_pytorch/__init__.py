"""The complete Muse: text-to-image generation by masked generative transformers, in PyTorch.

Reading order: structures, vqgan_vae, quantizer, text, masking, layers, transformer, sampling,
maskgit, muse. Around them: loading, editing, words, files, devices, checkpoint, images, provenance,
features, foreign, data, training, evaluation, cli.

Public names are loaded on first use, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import CheckpointError
    from .data.cache import TokenCache
    from .data.encoding import write_cache
    from .data.folder import ImageFolder
    from .evaluation.tokenizer import evaluate_tokenizer
    from .features import FeatureNet
    from .foreign import ForeignVQGAN, load_tokenizer
    from .images import save_png
    from .loading import open_model
    from .maskgit import MaskGit
    from .muse import Muse
    from .sampling import SampleOptions
    from .structures import Conditioning, LossTerms, SampleStep, TextEmbeds
    from .text import TextCompute, TextEncoder, TextEncoderError
    from .training.maskgit_trainer import MaskGitTrainer
    from .training.vae_trainer import VQGanVAETrainer
    from .transformer import MaskedTransformer, MaskGitTransformer, SelfCritic, TokenCritic
    from .vqgan_vae import ImageTokenizer, VQGanVAE

__version__ = "0.2.0"

_HOMES = {
    "CheckpointError": "checkpoint",
    "Conditioning": "structures",
    "FeatureNet": "features",
    "ForeignVQGAN": "foreign",
    "ImageFolder": "data.folder",
    "ImageTokenizer": "vqgan_vae",
    "LossTerms": "structures",
    "MaskGit": "maskgit",
    "MaskGitTrainer": "training.maskgit_trainer",
    "MaskGitTransformer": "transformer",
    "MaskedTransformer": "transformer",
    "Muse": "muse",
    "SampleOptions": "sampling",
    "SampleStep": "structures",
    "SelfCritic": "transformer",
    "TextEmbeds": "structures",
    "TextCompute": "text",
    "TextEncoder": "text",
    "TextEncoderError": "text",
    "TokenCache": "data.cache",
    "TokenCritic": "transformer",
    "VQGanVAE": "vqgan_vae",
    "VQGanVAETrainer": "training.vae_trainer",
    "evaluate_tokenizer": "evaluation.tokenizer",
    "load_tokenizer": "foreign",
    "open_model": "loading",
    "save_png": "images",
    "write_cache": "data.encoding",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
