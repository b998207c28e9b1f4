"""Whole models in other precisions, and under another default type."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.evaluation.tokenizer import evaluate_tokenizer
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.layers import norm
from tests.runs import vae_trainer


def cascade(quantizer: str = "fsq") -> Any:
    vae = tiny.vae(quantizer=quantizer, codebook_size=64)
    base = tiny.transformer(num_tokens=64, self_cond=True)
    above = tiny.transformer(num_tokens=64, seq_len=64)
    return Muse(tiny.maskgit(base, vae=vae), tiny.superres(vae=vae, model=above))


@pytest.mark.parametrize("quantizer", ["vq", "simvq", "lfq", "bsq", "fsq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_models_draw_encode_and_learn(quantizer, dtype):
    muse = cascade(quantizer).to(dtype)
    images = muse(text_embeds=tiny.text(), seeds=1, timesteps=2, return_pil_images=False)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    loss = muse.superres(tiny.images(size=32), text_embeds=tiny.text())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in muse.parameters())


@pytest.mark.parametrize("quantizer", ["vq", "simvq", "fsq"])
def test_codes_stay_in_float32(quantizer):
    vae = tiny.vae(quantizer=quantizer, codebook_size=64)
    before = {name: value.clone() for name, value in vae.quantizer.state_dict().items()}
    vae.half().bfloat16()
    assert vae.encoder[0].weight.dtype == torch.bfloat16
    after = vae.quantizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # the same vectors get the same codes, whatever the rest is in
    features = torch.randn(2, 32, 4, 4)
    wide = tiny.vae(quantizer=quantizer, codebook_size=64).quantizer
    wide.load_state_dict(before)
    assert torch.equal(vae.quantizer(features).ids, wide.eval()(features).ids)


def test_double_precision_draws_what_single_does():
    muse = cascade()
    arguments = dict(text_embeds=tiny.text(), seeds=1, timesteps=4, return_pil_images=False)
    single = muse(**arguments)
    assert torch.allclose(muse.double()(**arguments), single, atol=1e-5)


def test_norms_and_softmax_are_computed_in_float32():
    """A mean of 300 bfloat16 numbers near 256, summed in their own type, would be wrong."""
    x = (256 + torch.randn(4, 300)).bfloat16()
    wide = F.layer_norm(x.float(), (300,))
    layer = norm(300).bfloat16()
    assert torch.allclose(layer(x).float(), wide, atol=2e-2)  # the rounding of the result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type(dtype: torch.dtype, tmp_path: Path, resnet: str):
    """Pictures, losses, evaluation and a training with all of its networks."""
    Image.new("RGB", (64, 64), (9, 99, 199)).save(tmp_path / "a.png")
    torch.set_default_dtype(dtype)
    try:
        muse = cascade()
        [image] = muse(text_embeds=tiny.text(1), timesteps=2)
        assert image.size == (32, 32)
        assert muse.base(tiny.images(), text_embeds=tiny.text()).isfinite()
        networks = dict(perceptual_weight=0.1, perceptual_model=resnet, gan_weight=0.1, gan_start=0)
        trainer = vae_trainer(
            tmp_path, tmp_path / "run", tiny.vae(), image_size=32, lecam_weight=0.1, **networks
        )
        trainer.train()
        images: Any = [{"image": image} for image in torch.rand(3, 3, 32, 32, dtype=torch.float32)]
        figures = evaluate_tokenizer(trainer.vae, images, FeatureNet(resnet))
        assert figures["perceptual"].value > 0
    finally:
        torch.set_default_dtype(torch.float32)
