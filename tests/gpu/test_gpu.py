"""What only a GPU can show. Skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from muse_maskgit_pytorch import Muse, SampleOptions, VQGanVAETrainer, save_png
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import to_pil
from muse_maskgit_pytorch.sampling import make_plan

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_tf32_changes_no_id():
    """With it some ids would differ: the tokenizer's 1,024 codes lie close to one another."""
    vae = tiny.vae(dim=64, codebook_size=1024, quantizer="vq").to(DEVICE)
    tiny.randomise(vae)
    images = tiny.images(16, 64).to(DEVICE)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    ids = []
    try:
        for precision, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = allowed
            ids.append(vae.encode_to_ids(images))
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert torch.equal(*ids)


def test_a_model_draws_while_the_gpu_is_the_default_device():
    model = tiny.superres().to(DEVICE)
    drawing: dict[str, Any] = dict(text_embeds=tiny.text(), seeds=[1, 2], timesteps=3)
    cond_images = tiny.images()
    expected = model.generate(cond_images=cond_images, **drawing)
    with torch.device(DEVICE):
        images = model.generate(cond_images=cond_images, **drawing)
    assert torch.equal(images, expected)


def test_fused_attention_is_the_plain_one():
    model = tiny.transformer(seq_len=64, dim=64, dim_head=32).to(DEVICE)
    text = tiny.conditioning(tiny.text().to(torch.device(DEVICE)))
    ids = tiny.ids(num_tokens=64).to(DEVICE)

    def logits() -> Tensor:
        return model.to_logits(model(ids, model.encode_context(text))).float()

    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            plain = logits()
        torch.testing.assert_close(logits(), plain, rtol=1e-3, atol=1e-3)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(logits(), plain, rtol=0.1, atol=0.1)


def test_one_seed_gives_one_noise_on_every_device():
    mask = torch.ones(2, 16, dtype=torch.bool)
    options = SampleOptions(timesteps=4, seeds=[3, 4])
    plan, other = (make_plan(mask.to(device), options) for device in ("cpu", DEVICE))
    for name in ("uniform", "gumbel", "order"):
        assert torch.equal(getattr(plan, name), getattr(other, name).cpu()), name


def test_a_picture_is_drawn_again_bit_for_bit(t5: str, tmp_path: Path):
    text = dict(t5_name=t5, text_embed_dim=16)
    base = tiny.maskgit(tiny.transformer(**text))
    model = Muse(base, tiny.superres(model=tiny.transformer(seq_len=64, **text))).to(DEVICE)
    for number, picture in enumerate(model(["a cat", "a dog"], seeds=5)):
        path = save_png(picture, tmp_path / f"{number}.png")
        (again,) = model.like(path)
        assert again.tobytes() == picture.tobytes()


def test_a_step_whose_fp16_gradients_overflow_is_skipped(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(to_pil(tiny.images(8, 16))):
        image.save(folder / f"{number}.png")
    vae = tiny.vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    trainer = VQGanVAETrainer(
        vae,
        folder=str(folder),
        image_size=16,
        results_folder=str(tmp_path / "run"),
        num_train_steps=1,
        batch_size=2,
        num_workers=0,
        gan_weight=0,
        perceptual_weight=0,
        recon_weight=1e6,
        mixed_precision="fp16",
    )
    trainer.train()
    for name, value in trainer.vae.state_dict().items():
        assert torch.equal(value.cpu(), before[name]), name
