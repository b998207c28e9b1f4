"""Other people's models: `load_tokenizer` reads any tokenizer by its name, `read_pipeline` aMUSEd
and Meissonic; `export_diffusers` gives a tokenizer back.

Three published formats hold one and the same network, the VQGAN of Esser et al. 2021 (arXiv
2012.09841), under other names and with small differences:

- diffusers: a `VQModel` folder (aMUSEd, Meissonic). The same network, other names.
- taming: a taming-transformers checkpoint, and what uses its layout (latent diffusion's VQ models).
- maskgit: the PyTorch port of MaskGIT's VQGAN (open-muse, TiTok). No attention, average pooling,
  convolutions without bias, nothing between encoder and codebook; where a block changes the
  width, its skip starts from the block's result, not from its input.

The names here are taming's, the others are renamed. The geometry is read off the weights and
checked against the configuration where there is one. Pixels are [-1, 1] to taming's networks and to
most of diffusers', [0, 1] to MaskGIT's and to those made for aMUSEd (``lookup_from_codebook``: its
pipeline and Meissonic's do not normalise); outside they are always [0, 1].

Nothing in a foreign file is executed: tensors are read by safetensors, or by torch with
``weights_only=True``, where other objects become empty dicts.

Verified with random weights, the published ones were not at hand: diffusers' layout against
diffusers' `VQModel`, taming's by its one-to-one correspondence with it, MaskGIT's against an
independent writing-down of the published architecture (tests).
"""

from .amused import AmusedTransformer
from .export import export_diffusers
from .loading import load_tokenizer
from .meissonic import MeissonicTransformer
from .network import Family, ForeignVQGAN
from .pipeline import is_pipeline, read_pipeline

__all__ = [
    "AmusedTransformer",
    "Family",
    "ForeignVQGAN",
    "MeissonicTransformer",
    "export_diffusers",
    "is_pipeline",
    "load_tokenizer",
    "read_pipeline",
]
