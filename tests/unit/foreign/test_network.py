"""The network, against diffusers' own VQModel and against a slow reference of MaskGIT's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_maskgit_pytorch import CheckpointError
from muse_maskgit_pytorch.foreign import load_tokenizer
from tests import hub
from tests.vqgans import (
    ATTENTION,
    check_equal,
    images,
)

CONFIGS: dict[str, dict[str, Any]] = {
    # aMUSEd's five levels, two blocks, latents as codes; fewer channels
    "amused": dict(block_out_channels=[32, 32, 64, 64, 96], layers_per_block=2),
    "mid attention": dict(mid_block_add_attention=True),
    "attention": ATTENTION,
    "width of codes": dict(vq_embed_dim=4, lookup_from_codebook=False),
    "groups": dict(norm_num_groups=8, block_out_channels=[8, 24], layers_per_block=3),
    "one level": dict(block_out_channels=[32]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_and_pixels_are_those_of_diffusers(name: str, tmp_path: Path):
    model = hub.make_vqmodel(tmp_path, **CONFIGS[name])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.factor == 2 ** (len(model.config["block_out_channels"]) - 1)
    assert tokenizer.codebook_size == 50
    check_equal(tokenizer, model, images(2, 3, 32, 48))
    check_equal(tokenizer, model, images(1, 3, 16, 16))
    check_equal(tokenizer, model, images(3, 3, 64, 32))


def test_pixels_are_0_to_1_for_amused_and_signed_for_the_others(tmp_path: Path):
    hub.make_vqmodel(tmp_path / "signed", lookup_from_codebook=False)
    hub.make_vqmodel(tmp_path / "unit", lookup_from_codebook=True)
    signed, unit = load_tokenizer(tmp_path / "signed"), load_tokenizer(tmp_path / "unit")
    assert torch.equal(
        signed.encode_to_ids(images(2, 3, 16, 16) / 2 + 0.5),
        unit.encode_to_ids(images(2, 3, 16, 16)),
    )


def test_old_names_of_the_attention_and_bin_files(tmp_path: Path):
    """Before diffusers 0.14 attention had other names, and its weights were pickled."""
    model = hub.make_vqmodel(tmp_path, **ATTENTION)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    check_equal(load_tokenizer(tmp_path), model, images(2, 3, 16, 24))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_files_compute_in_float32(variant: str | None, tmp_path: Path):
    model = hub.make_vqmodel(tmp_path).half()
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(tmp_path, variant=variant)
    tokenizer = load_tokenizer(tmp_path)
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}
    check_equal(tokenizer, model.float(), images(1, 3, 16, 16))


def test_autocast_changes_no_id(tmp_path: Path):
    hub.make_vqmodel(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = tokenizer.encode_to_ids(images(2, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode_to_ids(images(2, 3, 32, 32)), expected)


def test_quantisation_is_float32_in_a_bfloat16_model(tmp_path: Path):
    hub.make_vqmodel(tmp_path)
    tokenizer: Any = load_tokenizer(tmp_path).bfloat16()
    pixels = images(32, 3, 32, 32).bfloat16()
    latents = tokenizer.quant_conv(tokenizer.encoder(pixels)).movedim(1, -1)
    codes = tokenizer.quantize["embedding"].weight

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        return (a[..., None, :] - b).square().sum(-1).argmin(-1)

    assert torch.equal(tokenizer.encode_to_ids(pixels), nearest(latents.double(), codes.double()))
    assert not torch.equal(nearest(latents.double(), codes.double()), nearest(latents, codes))


def test_a_whole_pipeline_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = hub.make_vqmodel(tmp_path / "model" / "vqvae")
    hub.make_hub(tmp_path / "home", {"amused/amused-256": tmp_path / "model"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for name in (f"{tmp_path}/model:vqvae", "amused/amused-256:vqvae"):
        check_equal(load_tokenizer(name), model, images(1, 3, 16, 16))
    with pytest.raises(CheckpointError, match="model:vqvae"):
        load_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match="amused/amused-256:unet has no weights"):
        load_tokenizer("amused/amused-256:unet")


# MaskGIT ------------------------------------------------------------------------------------------

MASKGIT = dict(
    resolution=256,
    num_channels=3,
    hidden_channels=32,
    channel_mult=[1, 2, 2],
    num_res_blocks=2,
    attn_resolutions=[16],
    z_channels=8,
    num_embeddings=50,
    quantized_embed_dim=8,
)


class Reference:
    """The published network, slowly: every weight is made where it is first used."""

    def __init__(self, state: dict[str, Tensor] | None = None):
        self.state: dict[str, Tensor] = {} if state is None else state
        self.generator = torch.Generator().manual_seed(0)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 25
            noise = torch.randn(shape, generator=self.generator) * fan**-0.5
            self.state[name] = noise + 1 if "norm" in name and "weight" in name else noise
        assert self.state[name].shape == shape
        return self.state[name]

    def conv(self, x: Tensor, name: str, width: int, kernel: int = 3, bias: bool = False) -> Tensor:
        weight = self.weight(f"{name}.weight", width, x.shape[1], kernel, kernel)
        return F.conv2d(
            x, weight, self.weight(f"{name}.bias", width) if bias else None, padding="same"
        )

    def act(self, x: Tensor, name: str) -> Tensor:
        grouped = x.reshape(len(x), 32, -1)
        mean = grouped.mean(-1, keepdim=True)
        scale = (grouped.var(-1, unbiased=False, keepdim=True) + 1e-6).rsqrt()
        x = ((grouped - mean) * scale).view(x.shape)
        width = x.shape[1]
        weight = self.weight(f"{name}.weight", width).view(-1, 1, 1)
        x = x * weight + self.weight(f"{name}.bias", width).view(-1, 1, 1)
        return x * torch.sigmoid(x)

    def block(self, x: Tensor, name: str, width: int) -> Tensor:
        h = self.conv(self.act(x, f"{name}.norm1"), f"{name}.conv1", width)
        h = self.conv(self.act(h, f"{name}.norm2"), f"{name}.conv2", width)
        if x.shape[1] != width:  # MaskGIT's own: the skip starts from the result
            x = self.conv(h, f"{name}.nin_shortcut", width, kernel=1)
        return x + h

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in", 32)
        for i, width in enumerate([32, 64, 64]):
            for j in range(2):
                x = self.block(x, f"encoder.down.{i}.block.{j}", width)
            if i < 2:
                x = (
                    x[:, :, ::2, ::2]
                    + x[:, :, 1::2, ::2]
                    + x[:, :, ::2, 1::2]
                    + x[:, :, 1::2, 1::2]
                ) / 4
        for j in range(2):
            x = self.block(x, f"encoder.mid.{j}", 64)
        z = self.conv(self.act(x, "encoder.norm_out"), "encoder.conv_out", 8, kernel=1, bias=True)
        codes = self.weight("quantize.embedding.weight", 50, 8)
        return (z[:, None] - codes[None, :, :, None, None]).square().sum(2).argmin(1)

    def decode(self, ids: Tensor) -> Tensor:
        x = self.weight("quantize.embedding.weight", 50, 8)[ids].permute(0, 3, 1, 2)
        x = self.conv(x, "decoder.conv_in", 64, bias=True)
        for j in range(2):
            x = self.block(x, f"decoder.mid.{j}", 64)
        for i, width in reversed(list(enumerate([32, 64, 64]))):
            for j in range(2):
                x = self.block(x, f"decoder.up.{i}.block.{j}", width)
            if i > 0:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                x = self.conv(x, f"decoder.up.{i}.upsample_conv", width, bias=True)
        return self.conv(self.act(x, "decoder.norm_out"), "decoder.conv_out", 3, bias=True)


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.safetensors"])
def test_maskgit_against_the_published_architecture(file: str, configured: bool, tmp_path: Path):
    from safetensors.torch import save_file

    reference, pixels = Reference(), images(2, 3, 16, 24)
    expected = reference.encode(pixels)
    decoded = reference.decode(expected)
    if file.endswith(".bin"):
        torch.save(reference.state, tmp_path / file)
    else:
        save_file(reference.state, tmp_path / file)
    if configured:
        config = {"_class_name": "MaskGitVQGAN", **MASKGIT}
        (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.codebook_size, tokenizer.factor) == (50, 4)
    ids = tokenizer.encode_to_ids(pixels)
    assert torch.equal(ids, expected)
    assert len(ids.unique()) > 5
    ours = tokenizer.decode_from_ids(ids)
    torch.testing.assert_close(ours, decoded.clamp(0, 1), rtol=0, atol=1e-5)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.2  # clamping hides not all
