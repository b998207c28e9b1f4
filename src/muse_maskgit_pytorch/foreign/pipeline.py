"""Whole models in diffusers' layout: aMUSEd's folder or hub repository -> the parts of a stage.

A folder has a ``model_index.json`` and the parts ``transformer``, ``vqvae``, ``text_encoder``,
``tokenizer`` and ``scheduler``. Half precision (files with ``fp16`` in their names) is read where
it is all there is; everything computes in float32 unless told otherwise.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..arguments import as_path, shown, whole
from ..checkpoint import state_of
from ..hub import hub_file, is_repository
from ..weights import CheckpointError, check_weights, reading, sketching, unfilled
from .amused import MICRO_CONDITIONS, AmusedTransformer
from .loading import CONFIG_BYTES, WEIGHTS, _read_state, load_tokenizer

INDEX = "model_index.json"
# 1x1 convolutions, which are linear layers here
POINTWISE = ("embed.conv.weight", "mlm_layer.conv1.weight", "mlm_layer.conv2.weight")
# As its own pipeline draws; the Gumbel noise falls from 2 to 0.
DEFAULTS = dict(
    timesteps=12, cond_scale=10.0, guidance_schedule="constant", choice_temperature=2.0
)  # fmt: skip
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
    """The arguments of a `MaskGit` that draws as aMUSEd's pipeline does by default.

    Args:
        name: a folder in diffusers' layout, or a hub repository such as ``amused/amused-256``.

    Raises:
        CheckpointError: a part that is missing, damaged, or of another kind of model.
        TextEncoderError: the same of the text encoder.
    """
    name = str(name) if is_repository(str(name)) else str(as_path(name, "model"))
    path, index = _config(name, INDEX)
    kind = index.get("transformer")
    if not (isinstance(kind, list) and kind[-1:] == ["UVit2DModel"]):
        raise CheckpointError(
            f"{path} is of the pipeline {shown(index.get('_class_name'))}, which is not known "
            "here: of diffusers' pipelines, aMUSEd's are read (their transformer: UVit2DModel)"
        )
    tokenizer = load_tokenizer(f"{name}:vqvae")
    file, config = _config(name, "scheduler/scheduler_config.json")
    with reading(file):
        schedule = config.get("masking_schedule", "cosine")
        if schedule not in SCHEDULES:
            raise ValueError(f"masking_schedule {shown(schedule)} is not one of {[*SCHEDULES]}")
        mask_id = whole("mask_token_id", config.get("mask_token_id"), 0)
    transformer = _transformer(name, mask_id, tokenizer.factor)
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
        sample_options=DEFAULTS | dict(noise_schedule=SCHEDULES[schedule]),
        presets={"inpaint": DEFAULTS | dict(noise_schedule="linear32")},  # as its pipeline for that
    )


def _transformer(name: str, mask_id: int, factor: int) -> AmusedTransformer:
    file, c = _config(name, "transformer/config.json")
    with reading(file):
        arguments: dict[str, Any] = _arguments(c) | dict(mask_id=mask_id, factor=factor)
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
            sketch = AmusedTransformer(**arguments)
        own = sketch.state_dict()
        own.pop("no_text")  # the text encoder's
        advice = "the file is incomplete, or the configuration belongs to another model"
        check_weights(own, state, weights, "aMUSEd's transformer of its config.json", advice)
        with unfilled():
            made = AmusedTransformer(**arguments)
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


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What a `UVit2DModel`'s configuration says, as `AmusedTransformer` calls it."""

    def size(name: str, least: int = 1) -> int:
        return whole(name, config.get(name), least)

    def flag(name: str, default: bool) -> bool:
        value = config.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}")
        return value

    resample = flag("downsample", False)
    if flag("upsample", False) != resample:
        raise ValueError("downsample and upsample differ: sides that are halved must be doubled")
    micro = size("micro_cond_encode_dim")
    if size("micro_cond_embed_dim") != MICRO_CONDITIONS * micro:
        raise ValueError(
            f"micro_cond_embed_dim {config['micro_cond_embed_dim']} must be {MICRO_CONDITIONS} "
            f"times micro_cond_encode_dim {micro}"
        )
    return dict(
        num_tokens=size("codebook_size"),
        seq_len=size("sample_size") ** 2,
        num_embeddings=size("vocab_size"),
        dim=size("hidden_size"),
        depth=size("num_hidden_layers"),
        heads=size("num_attention_heads"),
        ff_dim=size("intermediate_size"),
        channels=size("block_out_channels"),
        conv_blocks=size("num_res_blocks"),
        conv_heads=size("block_num_heads"),
        embed_dim=size("in_channels"),
        resample=resample,
        text_embed_dim=size("encoder_hidden_size"),
        pooled_dim=size("cond_embed_dim"),
        micro_dim=micro,
        bias=flag("use_bias", False),
        affine=flag("ln_elementwise_affine", True),
        eps=config.get("layer_norm_eps", 1e-6),
    )


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
