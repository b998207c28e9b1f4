"""Reference models for the tests of other people's tokenizers, and what equality means."""

from typing import Any

import torch
from torch import Tensor

ATTENTION = dict(
    down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    up_block_types=["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    mid_block_add_attention=True,
    lookup_from_codebook=False,
)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def diffusers_ids(model: Any, pixels: Tensor) -> Tensor:
    """As diffusers' pipelines do: aMUSEd's do not normalise the pixels, the others do."""
    pixels = pixels if model.config.lookup_from_codebook else pixels * 2 - 1
    latents = model.encode(pixels).latents
    return model.quantize(latents)[2][2].view(len(pixels), *latents.shape[-2:])


@torch.no_grad()
def diffusers_pixels(model: Any, ids: Tensor) -> Tensor:
    shape = (*ids.shape, model.quantize.vq_embed_dim)
    if model.config.lookup_from_codebook:
        return model.decode(ids, force_not_quantize=True, shape=shape).sample.clamp(0, 1)
    codes = model.quantize.get_codebook_entry(ids.flatten(), shape)
    return (model.decode(codes).sample / 2 + 0.5).clamp(0, 1)


def check_equal(tokenizer: Any, model: Any, pixels: Tensor) -> None:
    """Equal ids, pixels equal to 1e-5; in double precision, which shows more, to 1e-10."""
    ids = tokenizer.encode_to_ids(pixels)
    assert torch.equal(ids, diffusers_ids(model, pixels))
    decoded = tokenizer.decode_from_ids(ids)
    torch.testing.assert_close(decoded, diffusers_pixels(model, ids), rtol=0, atol=1e-5)
    assert decoded.shape == pixels.shape
    assert len(ids.unique()) > min(8, ids.numel() // 4)  # or equality would say little
    assert decoded.std() > 0.01
    exact, expected = tokenizer.double().decode_from_ids(ids), diffusers_pixels(model.double(), ids)
    tokenizer.float(), model.float()
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-10)


def taming_state(model: Any) -> dict[str, Tensor]:
    """A VQModel's weights in the layout of taming-transformers, which has the same parts."""
    found: dict[str, Tensor] = {}

    def put(name: str, module: Any, kernel: bool = False) -> None:
        for key, value in module.state_dict().items():
            found[f"{name}.{key}"] = value[..., None, None] if kernel and value.ndim == 2 else value

    def block(name: str, module: Any) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{name}.{part}", getattr(module, part))
        if module.conv_shortcut is not None:
            put(f"{name}.nin_shortcut", module.conv_shortcut)

    def attention(name: str, module: Any) -> None:
        put(f"{name}.norm", module.group_norm)
        parts = dict(q=module.to_q, k=module.to_k, v=module.to_v, proj_out=module.to_out[0])
        for part, linear in parts.items():
            put(f"{name}.{part}", linear, kernel=True)

    def level(name: str, module: Any) -> None:
        for j, resnet in enumerate(module.resnets):
            block(f"{name}.block.{j}", resnet)
        for j, attn in enumerate(getattr(module, "attentions", [])):
            attention(f"{name}.attn.{j}", attn)
        for change in ("downsample", "upsample"):
            if getattr(module, f"{change}rs", None):
                put(f"{name}.{change}.conv", getattr(module, f"{change}rs")[0].conv)

    for half in ("encoder", "decoder"):
        network = getattr(model, half)
        put(f"{half}.conv_in", network.conv_in)
        put(f"{half}.norm_out", network.conv_norm_out)
        put(f"{half}.conv_out", network.conv_out)
        block(f"{half}.mid.block_1", network.mid_block.resnets[0])
        block(f"{half}.mid.block_2", network.mid_block.resnets[1])
        if network.mid_block.attentions[0] is not None:
            attention(f"{half}.mid.attn_1", network.mid_block.attentions[0])
    for i, module in enumerate(model.encoder.down_blocks):
        level(f"encoder.down.{i}", module)
    for i, module in enumerate(reversed(model.decoder.up_blocks)):
        level(f"decoder.up.{i}", module)
    for part in ("quant_conv", "post_quant_conv", "quantize"):
        put(part, getattr(model, part))
    return found


TAMING = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: 50
    ddconfig: {double_z: false, z_channels: 8, resolution: 32, in_channels: 3, out_ch: 3, ch: 32,
      ch_mult: [1, 2, 2], num_res_blocks: 1, attn_resolutions: [16, 8], dropout: 0.0}
"""


def lightning(model: Any) -> dict[str, Any]:
    """What Lightning writes around the weights, the discriminator among them."""
    state = taming_state(model) | {"loss.discriminator.main.0.weight": torch.ones(2, 2)}
    return {"epoch": 3, "global_step": 7, "state_dict": state, "optimizer_states": []}
