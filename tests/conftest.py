"""What many tests share: shapes checked at run time, and models small enough for a slow core."""

from collections.abc import Callable

import jaxtyping
import pytest
import torch
from torch import nn

CORE = (
    "structures checkpoint vqgan_vae quantizer text masking layers transformer sampling "
    "maskgit muse images"
)
# The shape annotations of the core become assertions.
jaxtyping.install_import_hook(
    [f"muse_maskgit_pytorch.{name}" for name in CORE.split()], "beartype.beartype"
)

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, VQGanVAE  # noqa: E402

TEXT_DIM = 12


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _randomise(module: nn.Module) -> nn.Module:
    """Give every weight a random value: at first, output projections are zero and hide much."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif parameter.numel():
                parameter.uniform_(0.5, 1.5)
    return module


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    return _randomise


@pytest.fixture(scope="session")
def make_vae() -> Callable[..., VQGanVAE]:
    """Factor 4, 60 codes, unless told otherwise."""

    def make(**changes) -> VQGanVAE:
        arguments = dict(
            dim=8, codebook_size=60, layers=2, num_res_blocks=1, quantizer="fsq", codebook_dim=4
        )
        return VQGanVAE(**{**arguments, **changes})

    return make


@pytest.fixture(scope="session")
def make_transformer() -> Callable[..., MaskGitTransformer]:
    """60 codes, 4 x 4 tokens, texts of width 12, all weights random, unless told otherwise."""

    def make(kind: type[MaskGitTransformer] = MaskGitTransformer, **changes):
        arguments = dict(
            num_tokens=60, seq_len=16, dim=16, depth=2, dim_head=8, heads=2,
            text_embed_dim=TEXT_DIM, t5_name="none",
        )  # fmt: skip
        return _randomise(kind(**{**arguments, **changes}))

    return make


@pytest.fixture(scope="session")
def make_maskgit(make_vae, make_transformer) -> Callable[..., MaskGit]:
    """Images of 16 pixels, 4 x 4 tokens; ``superres=True`` makes it 32 pixels over 16."""

    def make(superres: bool = False, transformer: dict | None = None, **changes) -> MaskGit:
        arguments = dict(image_size=16)
        model = dict(transformer or {})
        if superres:
            arguments |= dict(image_size=32, cond_image_size=16)
            model.setdefault("seq_len", 64)
        if "vae" not in changes:
            changes["vae"] = make_vae()
        maskgit = MaskGit(transformer=make_transformer(**model), **{**arguments, **changes})
        for added in (maskgit.transformer.cond_encoder, maskgit.critic):
            if added is not None:
                _randomise(added)
        return maskgit

    return make
