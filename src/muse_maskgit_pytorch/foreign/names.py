"""What a foreign file holds: its family, its weights' names, its geometry.

The names of the network are taming's; the others' are renamed. The geometry is read off the
weights, and off the configuration to be compared with it.
"""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import whole
from ..weights import CheckpointError
from .network import Family

UNDERSTOOD = (
    "understood are this package's .safetensors, a diffusers VQModel folder, a taming-transformers "
    ".ckpt, and a MaskGIT-VQGAN in open-muse's layout"
)

# Other projects' names -> taming's.
RENAMED = [
    (r"\.upsample_conv\.", ".upsample.conv."),  # MaskGIT's; the rest is diffusers'
    (r"\.down_blocks\.", ".down."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),  # the second is its older name
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


def family_of(state: dict[str, Tensor], path: Path) -> Family:
    if "quantize.embed.weight" in state:
        raise CheckpointError(
            f"{path} is a Gumbel VQGAN, which draws its ids instead of taking the nearest code; it "
            "is not supported: use one with a plain codebook"
        )
    if "quantize.embedding.weight" in state:
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
            return "diffusers"
        if "encoder.mid.0.conv1.weight" in state:
            return "maskgit"
        if "encoder.down.0.block.0.conv1.weight" in state:
            return "taming"
    known = "encoder.conv_in.weight" in state
    reason = "has no codebook (a continuous autoencoder?)" if known else "is of an unknown kind"
    raise CheckpointError(f"{path} {reason}; {UNDERSTOOD}")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under taming's names."""
    top = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")}) - 1
    made = {}
    for name, value in state.items():
        # diffusers counts a decoder's levels from the coarsest, MaskGIT the middle's blocks from 0
        name = re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up.{top - int(m[1])}", name)
        name = re.sub(r"\.mid\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        attends = re.search(r"attn.*\.(q|k|v|proj_out)\.weight$", name)
        made[name] = value[..., None, None] if attends and value.ndim == 2 else value
    return made


def geometry(state: dict[str, Tensor], path: Path, family: Family) -> dict[str, Any]:
    """The arguments of `ForeignVQGAN` that the weights determine."""

    def size(name: str, axis: int = 0) -> int:
        if name not in state:
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        return state[name].shape[axis]

    def number(pattern: str) -> int:
        return next(i for i in count() if pattern.format(i) not in state)

    levels = range(number("encoder.down.{}.block.0.conv1.weight"))
    return dict(
        family=family,
        channels=[size(f"encoder.down.{i}.block.0.conv1.weight") for i in levels],
        blocks=number("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=size("encoder.conv_out.weight"),
        code_dim=size("quantize.embedding.weight", 1),
        codebook_size=size("quantize.embedding.weight"),
        encoder_attention=[f"encoder.down.{i}.attn.0.norm.weight" in state for i in levels],
        decoder_attention=[f"decoder.up.{i}.attn.0.norm.weight" in state for i in levels],
        mid_attention="encoder.mid.attn_1.norm.weight" in state,
        resample_conv=len(levels) == 1 or "decoder.up.1.upsample.conv.weight" in state,
        stem=size("encoder.conv_in.weight"),
        signed=family != "maskgit",
    )


def stated_arguments(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The arguments of `ForeignVQGAN` that a configuration states.

    Raises:
        KeyError: one is missing, or its value is not one that this network has.
    """

    def size(of: dict[str, Any], name: str) -> int:
        return whole(name, of[name], 1)

    def sizes(of: dict[str, Any], name: str) -> list[int]:
        return [whole(name, value, 1) for value in of[name]]

    c = config
    if family == "diffusers":
        for key, known in {"norm_type": ("group",), "act_fn": ("silu", "swish")}.items():
            if c.get(key, known[0]) not in known:
                raise KeyError(f"{key}: {c[key]}")
        down = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
        up = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
        return dict(
            channels=sizes(c, "block_out_channels"),
            blocks=size(c, "layers_per_block"),
            latent_channels=size(c, "latent_channels"),
            code_dim=size(c, "vq_embed_dim" if c.get("vq_embed_dim") else "latent_channels"),
            codebook_size=size(c, "num_vq_embeddings"),
            encoder_attention=[down[name] for name in c["down_block_types"]],
            decoder_attention=[up[name] for name in reversed(c["up_block_types"])],
            mid_attention=c.get("mid_block_add_attention", True),
        )
    if family == "maskgit":
        return dict(
            channels=[size(c, "hidden_channels") * mult for mult in sizes(c, "channel_mult")],
            blocks=size(c, "num_res_blocks"),
            latent_channels=size(c, "z_channels"),
            code_dim=size(c, "quantized_embed_dim"),
            codebook_size=size(c, "num_embeddings"),
        )
    d = c["ddconfig"]
    mults = sizes(d, "ch_mult")
    sides = [size(d, "resolution") // 2**i for i in range(len(mults))]
    attended = sizes(d, "attn_resolutions")
    return dict(
        channels=[size(d, "ch") * mult for mult in mults],
        blocks=size(d, "num_res_blocks"),
        latent_channels=size(d, "z_channels"),
        code_dim=size(c, "embed_dim"),
        codebook_size=size(c, "n_embed"),
        encoder_attention=[side in attended for side in sides],
        decoder_attention=[side in attended for side in sides],
    )
