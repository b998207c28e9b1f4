"""One batch, learnt by heart: the loss of every stage goes to nearly zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, TextEmbeds, TokenCritic, VQGanVAE
from muse_maskgit_pytorch.quantizer import QuantizerName

CODES, TEXT_DIM, BATCH = 64, 12, 4
T = TypeVar("T", bound=MaskGitTransformer)


def fit(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], steps: int) -> list[float]:
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0, betas=(0.9, 0.96))
    values = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        values.append(value.item())
    return values


def last(values: list[float]) -> float:
    return sum(values[-10:]) / 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def patchwork(size: int = 16) -> Tensor:
    """Four images of 4 x 4 coloured squares."""
    colours = torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(colours, size, mode="nearest")


def make_vae(quantizer: QuantizerName = "fsq") -> VQGanVAE:
    return VQGanVAE(
        dim=16,
        layers=2,
        num_res_blocks=1,
        channel_mults=[1, 2, 2],
        codebook_size=CODES,
        quantizer=quantizer,
    )


def make_transformer(kind: type[T] = MaskGitTransformer) -> T:
    size: dict[str, Any] = dict(num_tokens=CODES, seq_len=16, dim=32, depth=2, dim_head=16, heads=2)
    return kind(text_embed_dim=TEXT_DIM, t5_name="none", **size)


def texts() -> TextEmbeds:
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(BATCH, 3, TEXT_DIM, generator=generator)
    return TextEmbeds(embeds, torch.ones(BATCH, 3, dtype=torch.bool))


def random_ids(num_tokens: int, codes: int = CODES) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(codes, (BATCH, num_tokens), generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["vq", "simvq", "lfq", "fsq"])
def test_tokenizer(quantizer: QuantizerName):
    vae, images = make_vae(quantizer), patchwork()

    def loss() -> Tensor:
        reconstruction, output = vae(images)
        return F.mse_loss(reconstruction, images) + output.loss

    fit(loss, vae.parameters(), steps=400)
    vae.eval()
    error = F.mse_loss(vae.decode_from_ids(vae.encode_to_ids(images)), images)
    spread = images.var()  # what a grey image would cost
    assert error < 0.05 * spread


@pytest.mark.slow
@pytest.mark.parametrize("self_critic", [False, True])
def test_base(self_critic: bool):
    """Each text has its image; with a second head for the critic, that one learns too."""
    model = MaskGit(
        vae=make_vae(),
        transformer=make_transformer(),
        image_size=16,
        cond_drop_prob=0,
        self_token_critic=self_critic,
        critic_target="truth",  # of a model that knows the truth, nothing tells what it sampled
    )
    ids, text = random_ids(16), texts()
    values = fit(lambda: model(ids, text_embeds=text), model.parameters(), steps=300)
    assert values[0] > 3.5
    assert last(values) < 0.1
    model.eval()
    drawn = model.generate_ids(text_embeds=text, cond_scale=1.0, timesteps=4)
    assert (drawn == ids).float().mean() > 0.98


@pytest.mark.slow
def test_superres():
    """One text for all: what is asked for stands in the low-resolution tokens alone."""
    model = MaskGit(
        vae=make_vae(),
        transformer=make_transformer(),
        image_size=16,
        cond_image_size=8,
        cond_drop_prob=0,
    )
    ids, cond = random_ids(16), random_ids(4)
    text = TextEmbeds.of(texts().embeds[:1].expand(BATCH, -1, -1))
    values = fit(lambda: model(ids, text_embeds=text, cond_ids=cond), model.parameters(), steps=300)
    assert values[0] > 3.5
    assert last(values) < 0.1
    # the wrong low-resolution image is answered with the wrong image
    drawn = model.generate_ids(text_embeds=text, cond_ids=cond.flip(0), cond_scale=1.0)
    assert (drawn == ids.flip(0)).float().mean() > 0.98


@pytest.mark.slow
def test_critic():
    """The transformer is untrained and guesses; the critic learns which tokens are the true."""
    model = MaskGit(
        vae=make_vae(),
        transformer=make_transformer(),
        image_size=16,
        cond_drop_prob=0,
        token_critic=make_transformer(TokenCritic),
    )
    assert model.critic is not None
    ids, text = random_ids(16), texts()
    values = fit(
        lambda: model(ids, text_embeds=text, part="critic"), model.critic.parameters(), steps=400
    )
    assert values[0] > 0.4
    assert last(values) < 0.1
