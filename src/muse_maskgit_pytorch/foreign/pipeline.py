"""Whole models in diffusers' layout: aMUSEd's and Meissonic's, of a folder or a hub repository ->
the parts of a stage.

A folder has a ``model_index.json`` and the parts ``transformer``, ``vqvae``, ``text_encoder``,
``tokenizer`` and ``scheduler``. Half precision (files with ``fp16`` in their names) is read where
it is all there is; everything computes in float32 unless told otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..arguments import as_path, shown, whole
from ..checkpoint import state_of
from ..hub import hub_file, is_repository
from ..weights import CheckpointError, check_weights, reading, sketching, unfilled
from .amused import AmusedTransformer
from .clip import MICRO_CONDITIONS, ClipTransformer
from .loading import CONFIG_BYTES, WEIGHTS, _read_state, load_tokenizer
from .meissonic import MeissonicTransformer

INDEX = "model_index.json"
# 1x1 convolutions, which are linear layers here
POINTWISE = ("embed.conv.weight", "mlm_layer.conv1.weight", "mlm_layer.conv2.weight")
SIDE = 32  # positions of Meissonic's trained square, whose configuration does not say it
# First names of the transformer's layers with weights that adapters may change (`lora`)
LAYERS = ("cond_embed", "down_block", "embed", "encoder_proj", "mlm_layer", "project_from_hidden")
LAYERS += ("project_to_hidden", "transformer_layers", "up_block")
SCHEDULES = {"cosine": "cosine32", "linear": "linear32"}  # diffusers' names, and ours


def is_pipeline(name: str | PathLike[str]) -> bool:
    """Whether a folder or a hub repository is a whole model in diffusers' layout."""
    path = as_path(name, "model")
    if path.exists():
        return (path / INDEX).is_file()
    try:
        return is_repository(str(name)) and _find(str(name), INDEX) is not None
    except CheckpointError:
        return False  # who reads it as a model of this package says what is wrong


@torch.inference_mode(False)
def read_pipeline(name: str | PathLike[str]) -> dict[str, Any]:
    """The arguments of a `MaskGit` that draws as the model's own pipeline does.

    Args:
        name: a folder in diffusers' layout, or a hub repository such as ``amused/amused-256`` or
            ``MeissonFlow/Meissonic``.

    Raises:
        CheckpointError: a part that is missing, damaged, or of another kind of model.
        TextEncoderError: the same of the text encoder.
    """
    name = str(name) if is_repository(str(name)) else str(as_path(name, "model"))
    path, index = _config(name, INDEX)
    part = index.get("transformer")
    project = PROJECTS.get(str(part[-1])) if isinstance(part, list) and part else None
    if project is None:
        known = " and ".join(f"{p.name} (whose transformer is a {k})" for k, p in PROJECTS.items())
        raise CheckpointError(
            f"{path} is of the pipeline {shown(index.get('_class_name'))}, which is not known "
            f"here: of models in diffusers' layout, those of {known} are read"
        )
    tokenizer = load_tokenizer(f"{name}:vqvae")
    file, config = _config(name, "scheduler/scheduler_config.json")
    with reading(file):
        schedule = config.get("masking_schedule", "cosine")
        if schedule not in SCHEDULES:
            raise ValueError(f"masking_schedule {shown(schedule)} is not one of {[*SCHEDULES]}")
        mask_id = whole("mask_token_id", config.get("mask_token_id"), 0)
    transformer = _transformer(name, project, mask_id, tokenizer.factor)
    if transformer.num_tokens != tokenizer.codebook_size:
        raise CheckpointError(
            f"{name} has a transformer of {transformer.num_tokens} codes and a tokenizer (vqvae) "
            f"of {tokenizer.codebook_size}: one of the two belongs to another model"
        )
    transformer.set_no_text(transformer.text_reader().encode(""))
    return dict(
        vae=tokenizer,
        transformer=transformer,
        image_size=int(transformer.seq_len**0.5) * tokenizer.factor,
        sample_options=ALIKE | project.drawing | dict(noise_schedule=SCHEDULES[schedule]),
        presets={"inpaint": ALIKE | project.inpainting | dict(noise_schedule="linear32")},
    )


def _transformer(name: str, project: _Project, mask_id: int, factor: int) -> ClipTransformer:
    file, c = _config(name, "transformer/config.json")
    with reading(file):
        arguments: dict[str, Any] = project.arguments(c) | dict(mask_id=mask_id, factor=factor)
    arguments |= dict(text_encoder=name, max_text_len=_text_len(name, arguments))
    weights = next((f for w in WEIGHTS if (f := _find(name, f"transformer/{w}"))), None)
    if weights is None:
        raise CheckpointError(
            f"{name} has no weights of the transformer: {WEIGHTS[0]} must be in its folder "
            "transformer"
        )
    with reading(weights):
        state = state_of(_read_state(weights), weights)
        for part in POINTWISE:
            if part in state and state[part].ndim == 4:
                state[part] = state[part].flatten(1)
        with sketching(2 * len(state) + 100):
            sketch = project.transformer(**arguments)
        own = sketch.state_dict()
        own.pop("no_text")  # the text encoder's
        advice = "the file is incomplete, or the configuration belongs to another model"
        model = f"{project.name}'s transformer of its config.json"
        check_weights(own, state, weights, model, advice)
        with unfilled():
            made = project.transformer(**arguments)
        made.load_state_dict(state | {"no_text": made.no_text})
    return made.eval()


def _text_len(name: str, arguments: dict[str, Any]) -> int:
    """Tokens of a text that the text encoder reads, whose widths must be the transformer's."""
    file, config = _config(name, "text_encoder/config.json")
    with reading(file):
        limit = whole("max_position_embeddings", config.get("max_position_embeddings", 77), 1)
        for key, wanted in (("hidden_size", "text_embed_dim"), ("projection_dim", "pooled_dim")):
            if config.get(key) != arguments[wanted]:
                raise ValueError(
                    f"{key} {shown(config.get(key))} is not the {arguments[wanted]} that the "
                    "transformer reads: one of the two belongs to another model"
                )
    file, config = _config(name, "tokenizer/tokenizer_config.json")
    with reading(file):
        return min(limit, whole("model_max_length", config.get("model_max_length", limit), 1))


class _Config(dict[str, Any]):
    """A transformer's configuration."""

    def size(self, name: str, least: int = 1) -> int:
        return whole(name, self.get(name), least)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}")
        return value

    @property
    def resample(self) -> bool:
        resample = self.flag("downsample", False)
        if self.flag("upsample", False) != resample:
            raise ValueError(
                "downsample and upsample differ: sides that are halved must be doubled"
            )
        return resample


def _amused(config: dict[str, Any]) -> dict[str, Any]:
    """What a `UVit2DModel`'s configuration says, as `AmusedTransformer` calls it."""
    c = _Config(config)
    micro = c.size("micro_cond_encode_dim")
    if c.size("micro_cond_embed_dim") != MICRO_CONDITIONS * micro:
        raise ValueError(
            f"micro_cond_embed_dim {config['micro_cond_embed_dim']} must be {MICRO_CONDITIONS} "
            f"times micro_cond_encode_dim {micro}"
        )
    return dict(
        num_tokens=c.size("codebook_size"),
        seq_len=c.size("sample_size") ** 2,
        num_embeddings=c.size("vocab_size"),
        dim=c.size("hidden_size"),
        depth=c.size("num_hidden_layers"),
        heads=c.size("num_attention_heads"),
        ff_dim=c.size("intermediate_size"),
        channels=c.size("block_out_channels"),
        conv_blocks=c.size("num_res_blocks"),
        conv_heads=c.size("block_num_heads"),
        embed_dim=c.size("in_channels"),
        resample=c.resample,
        text_embed_dim=c.size("encoder_hidden_size"),
        pooled_dim=c.size("cond_embed_dim"),
        micro_dim=micro,
        bias=c.flag("use_bias", False),
        affine=c.flag("ln_elementwise_affine", True),
        eps=config.get("layer_norm_eps", 1e-6),
    )


def _meissonic(config: dict[str, Any]) -> dict[str, Any]:
    """What Meissonic's configuration says, as `MeissonicTransformer` calls it."""
    c = _Config(config)
    if "num_single_layers" not in c:
        raise ValueError(
            "it has no num_single_layers: it is another Transformer2DModel than Meissonic's, which "
            "is not read"
        )
    if c.flag("guidance_embeds", False):
        raise ValueError("guidance_embeds is true: models that read a guidance are not read")
    heads, resample, axes = c.size("num_attention_heads"), c.resample, c.get("axes_dims_rope")
    dim, pooled = heads * c.size("attention_head_dim"), c.size("pooled_projection_dim")
    if dim != pooled:
        raise ValueError(
            f"pooled_projection_dim {pooled} is not the width {dim} of the transformer "
            "(num_attention_heads times attention_head_dim), as it must be"
        )
    if not isinstance(axes, list):
        raise ValueError(f"axes_dims_rope must be three numbers, not {shown(axes)}")
    return dict(
        num_tokens=c.size("codebook_size"),
        seq_len=(2 * SIDE if resample else SIDE) ** 2,
        num_embeddings=c.size("vocab_size"),
        dim=dim,
        depth=c.size("num_layers"),
        single_depth=c.size("num_single_layers"),
        heads=heads,
        axes=[whole("axes_dims_rope", axis, 0) for axis in axes],
        resample=resample,
        text_embed_dim=c.size("joint_attention_dim"),
        pooled_dim=pooled,
    )


@dataclass(frozen=True)
class _Project:
    """Whose models these are.

    Attributes:
        name: the project's.
        transformer: its class here.
        arguments: of that class, from its configuration; ValueError where they cannot be.
        drawing: sampling options of its own pipeline.
        inpainting: the same of its pipeline for that.
    """

    name: str
    transformer: type[ClipTransformer]
    arguments: Callable[[dict[str, Any]], dict[str, Any]]
    drawing: dict[str, Any]
    inpainting: dict[str, Any]


ALIKE = dict(guidance_schedule="constant", choice_temperature=2.0)  # the noise falls from 2 to 0
PROJECTS = {
    "UVit2DModel": _Project(
        "aMUSEd",
        AmusedTransformer,
        _amused,
        drawing=dict(timesteps=12, cond_scale=10.0),
        inpainting=dict(timesteps=12, cond_scale=10.0),
    ),
    "Transformer2DModel": _Project(
        "Meissonic",
        MeissonicTransformer,
        _meissonic,
        drawing=dict(timesteps=48, cond_scale=9.0),
        inpainting=dict(timesteps=64, cond_scale=9.0),  # as the script beside its pipeline
    ),
}


def _find(name: str, file: str) -> Path | None:
    """A file of a folder or of a hub repository; None where there is none.

    Raises:
        CheckpointError: the hub cannot be reached, or knows no such repository.
    """
    place = as_path(name)
    if place.exists():
        return place / file if (place / file).is_file() else None
    return hub_file(name, file)


def _config(name: str, file: str) -> tuple[Path, dict[str, Any]]:
    """A part's configuration.

    Raises:
        CheckpointError: it is missing, or is none.
    """
    path = _find(name, file)
    if path is None:
        raise CheckpointError(
            f"{name} has no {file}, which a model in diffusers' layout needs: fetch the whole "
            f"repository (hf download), or point at its folder"
        )
    with reading(path):
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"more than {CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no configuration: a JSON object is wanted")
    return path, config
