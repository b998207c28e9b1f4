"""Tokenizers for diffusers: the folder of a `VQModel`, as `load_tokenizer` reads it.

The network of a `VQModel` is Esser et al.'s VQGAN, so that taming's tokenizers fit as well as
diffusers' own. This package's `VQGanVAE` has other layers (patches, no middle, another quantizer),
and MaskGIT's another block: they travel as ONNX.
"""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import CONFIG
from ..files import check_output, replacing
from ..vqgan_vae import ImageTokenizer
from .loading import WEIGHTS
from .network import ForeignVQGAN

# Taming's names, in the order of their renaming -> diffusers'.
RENAMED = [
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.down\.", ".down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"\.proj_out\.", ".to_out.0."),
]


def export_diffusers(tokenizer: ImageTokenizer, folder: str | PathLike[str]) -> Path:
    """Write a tokenizer as diffusers' ``VQModel.from_pretrained`` reads it, with the same ids.

    Pixels are [0, 1] to the written model where they are to this one's network
    (``lookup_from_codebook`` in its configuration), else [-1, 1].

    Args:
        tokenizer: one that was read from diffusers' or taming's layout.
        folder: where to; it is made, and other files in it stay.

    Returns:
        the folder.

    Raises:
        ValueError: a tokenizer with other layers than a `VQModel` has; says which.
    """
    config = _config(tokenizer)
    place = check_output("folder", folder, folder=True)
    top = len(config["block_out_channels"]) - 1
    state = {_renamed(k, top): _shaped(k, v) for k, v in tokenizer.state_dict().items()}
    with replacing(place / WEIGHTS[0]) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    with replacing(place / CONFIG) as temporary:
        temporary.write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
    return place


def _config(tokenizer: ImageTokenizer) -> dict[str, Any]:
    if not isinstance(tokenizer, ForeignVQGAN):
        raise ValueError(
            f"a {type(tokenizer).__name__} has layers that diffusers' VQModel lacks: export it as "
            "onnx, or use a tokenizer of taming's or diffusers' layout"
        )
    c = tokenizer.config
    stem = c["channels"][0] if c["stem"] is None else c["stem"]
    reason = None
    if c["family"] == "maskgit":
        reason = "it is MaskGIT's VQGAN, whose blocks are others"
    elif not c["resample_conv"] and len(c["channels"]) > 1:
        reason = "it pools and repeats where VQModel has convolutions"
    elif stem != c["channels"][0]:
        reason = f"its first convolution has {stem} channels, its first level {c['channels'][0]}"
    if reason is not None:
        raise ValueError(f"diffusers' VQModel cannot hold this tokenizer: {reason}")
    attended = {False: "", True: "Attn"}
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": list(c["channels"]),
        "down_block_types": [f"{attended[a]}DownEncoderBlock2D" for a in c["encoder_attention"]],
        "in_channels": 3,
        "latent_channels": c["latent_channels"],
        "layers_per_block": c["blocks"],
        "lookup_from_codebook": not c["signed"],
        "mid_block_add_attention": c["mid_attention"],
        "norm_num_groups": c["groups"],
        "norm_type": "group",
        "num_vq_embeddings": c["codebook_size"],
        "out_channels": 3,
        "up_block_types": [f"{attended[a]}UpDecoderBlock2D" for a in c["decoder_attention"][::-1]],
        "vq_embed_dim": c["code_dim"],
    }


def _renamed(name: str, top: int) -> str:
    # diffusers counts a decoder's levels from the coarsest
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{top - int(m[1])}.", name)
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _shaped(name: str, value: Tensor) -> Tensor:
    """Linear layers where there are 1x1 convolutions here."""
    attends = re.search(r"attn.*\.(q|k|v|proj_out)\.weight$", name)
    return (value[..., 0, 0] if attends else value).detach().cpu().contiguous().clone()
