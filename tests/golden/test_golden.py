"""What must not change by accident: public names, weights' names, noise, a short loss curve.

A failure here is no fault by itself: it says that a change reaches users (old checkpoints, old
seeds). If that is meant, the new values belong into the same commit, and the change log.
"""

import pytest
import torch

import muse_maskgit_pytorch
from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, SampleOptions, TextEmbeds, VQGanVAE
from muse_maskgit_pytorch.masking import draw_mask
from muse_maskgit_pytorch.sampling import make_plan

LOW = [
    [40, 33, 42, 61, 14, 50, 32, 19, 49, 14, 54, 59, 37, 35, 26, 24],
    [38, 27, 19, 60, 28, 49, 53, 33, 37, 8, 10, 19, 12, 20, 24, 44],
]
HIGH = [
    [45, 35, 53, 31, 10, 8, 22, 30, 21, 25, 35, 57, 37, 49, 26, 12],
    [17, 24, 43, 23, 57, 28, 2, 45, 39, 30, 20, 36, 34, 6, 62, 7],
]


def make() -> MaskGit:
    torch.manual_seed(0)
    vae = VQGanVAE(dim=8, layers=1, num_res_blocks=1, quantizer="fsq", codebook_size=64)
    transformer = MaskGitTransformer(
        num_tokens=64, seq_len=16, dim=16, depth=1, heads=2, dim_head=8, text_embed_dim=6,
        ff_dim=42,  # as it was before widths were rounded up to multiples of 8
    )  # fmt: skip
    return MaskGit(vae=vae, transformer=transformer, image_size=8)


def test_public_names():
    assert set(muse_maskgit_pytorch.__all__) >= {
        "CheckpointError", "Conditioning", "ImageFolder", "ImageTokenizer", "LossTerms",
        "MaskGit",
        "MaskGitTrainer", "MaskGitTransformer", "Muse", "SampleOptions", "SampleStep",
        "SelfCritic", "TextEmbeds", "TextEncoder", "TextEncoderError", "TokenCache",
        "TokenCritic", "VQGanVAE", "VQGanVAETrainer",
    }  # fmt: skip
    assert all(hasattr(muse_maskgit_pytorch, name) for name in muse_maskgit_pytorch.__all__)


def test_names_of_the_weights():
    state = make().state_dict()
    names = {name for name in state if name.startswith("transformer.")}
    block = {
        "attn.norm.weight", "attn.to_qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight",
        "attn.to_out.weight", "cross.null_kv", "cross.norm.weight", "cross.to_q.weight",
        "cross.to_kv.weight", "cross.q_norm.weight", "cross.k_norm.weight", "cross.to_out.weight",
        "ff.norm.weight", "ff.to_hidden.weight", "ff.to_out.weight",
    }  # fmt: skip
    assert names == {
        "transformer.embed.token.weight",
        "transformer.embed.row",
        "transformer.embed.column",
        "transformer.text_proj.weight",
        "transformer.text_norm.weight",
        "transformer.norm.weight",
        "transformer.to_logits.weight",
        *(f"transformer.blocks.0.{name}" for name in block),
    }
    parts = {name.split(".")[1] for name in state if name.startswith("vae.")}
    assert parts == {"encoder", "decoder", "quantizer"}


def test_noise_of_a_seed():
    """Old seeds draw old pictures only while this holds."""
    plan = make_plan(torch.ones(1, 4, dtype=torch.bool), SampleOptions(timesteps=2, seeds=[7]))
    expected = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(plan.uniform[0], expected[:, 0])
    torch.testing.assert_close(plan.gumbel[0], -torch.log(-torch.log(expected[:, 1])))
    assert plan.num_masked.tolist() == [[2, 0]]


def test_ids_of_a_seed():
    """Of a base and of a cascade, whose second stage has random numbers of its own.

    All tokens are equally likely, so that the noise alone decides, on every machine.
    """
    base, text = make(), TextEmbeds.of(torch.ones(2, 3, 6))
    torch.manual_seed(1)
    vae = VQGanVAE(dim=8, layers=1, num_res_blocks=1, quantizer="fsq", codebook_size=64)
    transformer = MaskGitTransformer(
        num_tokens=64, seq_len=64, dim=16, depth=1, heads=2, dim_head=8, text_embed_dim=6
    )
    superres = MaskGit(
        vae=vae, transformer=transformer, image_size=16, cond_vae=base.vae, cond_image_size=8
    )
    for stage in (base, superres):
        torch.nn.init.zeros_(stage.transformer.to_logits.weight)  # the noise alone decides
    options = SampleOptions(timesteps=3, choice_temperature=2.0)
    low = base.generate_ids(text_embeds=text, seeds=[7, 8], options=options)
    high = superres.generate_ids(text_embeds=text, seeds=[7, 8], options=options, cond_ids=low)
    assert low.tolist() == LOW
    assert high[:, :16].tolist() == HIGH


def test_masks_of_a_seed():
    mask = draw_mask(3, 8, generator=torch.Generator().manual_seed(1))
    u = torch.rand(3, generator=torch.Generator().manual_seed(1))
    wanted = (torch.cos(u * torch.pi / 2) * 8).round().clamp(min=1)
    assert mask.sum(dim=1).tolist() == wanted.tolist()


def test_short_loss_curve():
    """Five steps of AdamW on fixed data; 0.5 % covers other processors' rounding."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (8, 16), generator=generator)
    text = TextEmbeds.of(torch.randn(8, 3, 6, generator=generator))
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=1e-2)
    curve = []
    torch.manual_seed(0)
    for _ in range(5):
        loss = model(ids, text_embeds=text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve == pytest.approx([4.361, 4.1449, 4.0305, 3.9574, 3.8847], rel=5e-3)
