"""What only a GPU can show. Skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from muse_maskgit_pytorch import Muse, SampleOptions, VQGanVAETrainer, maskgit, save_png
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import to_pil
from muse_maskgit_pytorch.inference.graphs import Graphs
from muse_maskgit_pytorch.linears import available
from muse_maskgit_pytorch.sampling import make_plan, sample_tokens, step

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


def drawing_model(**changes: Any) -> Any:
    model = tiny.maskgit(tiny.transformer(dim=128, heads=2, dim_head=64, depth=3), **changes)
    tiny.randomise(model.transformer)
    if model.critic is not None:
        tiny.randomise(model.critic)
    return model.to(DEVICE).eval()


CHOICES: list[dict[str, Any]] = [
    {},
    {"cond_scale": 1.0, "top_k": 5},
    {"timesteps": [3, 8], "policy": "entropy"},
    {"precision": "bfloat16"},
    {"self_token_critic": True, "top_p": 0.9},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@torch.no_grad()
def test_graphs_draw_what_steps_draw(monkeypatch, choice):
    """All but single tokens: cumulative sums repeat no bits on CUDA."""
    choice = dict(choice)
    model = drawing_model(self_token_critic=choice.pop("self_token_critic", False))
    model.precision = choice.pop("precision", "float32")
    graphs = Graphs()
    monkeypatch.setattr(maskgit, "GRAPHS", graphs)
    options = model.default_options.replace(**{"timesteps": 8, "seeds": 1, **choice})
    for batch in (2, 2, 2):
        text = tiny.text(batch).to(torch.device(DEVICE))
        plain = model.sample(text, options, step=step)
        drawn = model.sample(text, options)
        assert (plain == drawn).float().mean() > 0.95
    assert sum(len(inputs.graphs) for inputs in graphs.kept[next(iter(graphs.kept))].values())
    assert not graphs.off


@pytest.mark.parametrize("way", ["plain", "graphs"])
@torch.no_grad()
def test_no_step_waits_for_the_host(monkeypatch, way):
    """From the first step to the last, with rows that are done early."""
    model, graphs = drawing_model(), Graphs()
    options = SampleOptions(timesteps=[4, 8], seeds=1, top_k=5)
    denoiser = model.denoiser(tiny.text().to(torch.device(DEVICE)), options)
    chosen = graphs.step(denoiser) if way == "graphs" else step
    canvas = torch.full((2, 16), model.transformer.mask_id, device=DEVICE)
    for _ in range(3):  # what is recorded, and kernels that are loaded at their first use, may wait
        sample_tokens(denoiser, canvas, options, step=chosen)

    def strict(*args: Any, **how: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")  # until the last step is asked for
        return chosen(*args, **how)

    strict.by_row = True  # type: ignore[attr-defined]
    try:
        sample_tokens(denoiser, canvas, options, step=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_model_is_the_plain_one():
    """Loss, gradients, ids and pixels."""
    model = drawing_model()
    ids, text = tiny.ids(codes=model.vae.codebook_size).to(DEVICE), tiny.text()
    mask = torch.arange(ids.numel(), device=DEVICE).view_as(ids) % 3 > 0
    losses, images = [], []
    for compiled in (False, True):
        if compiled:
            model.compile()
        model.zero_grad()
        torch.manual_seed(0)
        loss = model.losses(ids, text_embeds=text, mask=mask).total
        loss.backward()
        losses.append((loss.detach(), model.transformer.to_logits.weight.grad.clone()))
        images.append(model.generate(text_embeds=text, seeds=[1, 2], timesteps=4))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert ((images[0] - images[1]).abs() < 0.02).float().mean() > 0.9


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "float8"])
@torch.no_grad()
def test_lower_precisions_are_near(precision):
    model = drawing_model()
    if precision not in available(torch.device(DEVICE)):
        pytest.skip(f"this GPU has no {precision}, or there is no torchao")
    model.precision = precision
    options = SampleOptions(cond_scale=1.0)
    text = tiny.text().to(torch.device(DEVICE))
    ids = tiny.ids().to(DEVICE)
    hidden = []
    for one in (precision, "reference"):
        model.precision = one
        denoiser = model.denoiser(text, options)
        hidden.append(denoiser.network(ids, denoiser.context))
    assert (hidden[0] - hidden[1]).norm() / hidden[1].norm() < 0.1


@torch.no_grad()
def test_a_tokenizer_in_bfloat16_decodes_nearly_the_same():
    vae = tiny.randomise(tiny.vae(dim=32)).to(DEVICE)
    ids = tiny.ids(codes=vae.codebook_size).view(2, 4, 4).to(DEVICE)
    plain = vae.decode_from_ids(ids)
    assert (vae.bfloat16().decode_from_ids(ids) - plain).abs().mean() < 0.02
