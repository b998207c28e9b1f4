"""Models as ONNX: a tokenizer's encoder and decoder, and one step of a transformer.

Sampling is a loop over the step, in any language that runs ONNX; `docs/sharing.md` has it in numpy.
What writes the files is torch's exporter, and the package onnxscript.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import printable, with_names
from .checkpoint import CONFIG, Saveable
from .files import check_output, replacing
from .geometry import ImageSize
from .maskgit import MaskGit
from .muse import Muse
from .structures import Conditioning, TextEmbeds
from .transformer import MaskedTransformer
from .vqgan_vae import ImageTokenizer

BATCH = 2  # of the examples: any, and not 1, which torch would take for fixed
LENGTH = 5  # likewise, tokens of a text
DATA = ".data"  # what large weights are kept in, beside the file


class _Encoder(nn.Module):
    def __init__(self, vae: ImageTokenizer):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        return self.vae.encode_to_ids(images)


class _Decoder(nn.Module):
    def __init__(self, vae: ImageTokenizer):
        super().__init__()
        self.vae = vae

    def forward(self, ids: Tensor) -> Tensor:
        return self.vae.pixels_of(ids).clamp(0, 1)


class _Step(nn.Module):
    """Tokens, text and what else is known -> logits, and what the next step wants to know."""

    def __init__(self, transformer: MaskedTransformer):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        ids: Tensor,
        text: Tensor,
        text_mask: Tensor,
        cond_ids: Tensor | None = None,
        self_cond: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        keep = torch.ones_like(text_mask[:, 0])
        context = self.transformer.encode_context(
            Conditioning(TextEmbeds(text, text_mask), cond_ids, keep)
        )
        past = () if self_cond is None else (self_cond[None],)
        hidden = self.transformer(ids, context, *past)[0]
        logits = self.transformer.to_logits(hidden)
        return (logits,) if self_cond is None else (logits, hidden)


def export_onnx(
    model: Saveable, folder: str | PathLike[str], image_size: ImageSize | None = None
) -> Path:
    """Write a model's networks as ONNX files, for any number of pictures at a time.

    A tokenizer becomes ``encoder.onnx``, images (B, 3, H, W) in [0, 1] -> ids (B, h, w), and
    ``decoder.onnx``, the way back. A stage has both, and ``step.onnx``:

    - ``ids`` (B, N), ``mask_id`` where unknown;
    - ``text`` (B, L, E), what the text encoder made, or of a class (``MaskGit.embed_texts``);
    - ``text_mask`` (B, L), bool; a row of False sees no text, for guidance;
    - ``cond_ids`` (B, M), of super-resolution: the low resolution's, by ``cond_encoder.onnx``
      where that is another tokenizer;
    - ``self_cond`` (B, N, D), with self-conditioning: ``hidden`` of the step before, first zeros;

    -> ``logits`` (B, N, V), and with self-conditioning ``hidden``. ``config.json`` has the sizes
    and the stage's sampling options. A whole model is a folder for each stage.

    Args:
        model: a tokenizer, a stage or a whole model; it computes in float32 on the CPU.
        folder: where to; it is made, and other files in it stay.
        image_size: in pixels; as trained by default, which a tokenizer alone does not know.

    Returns:
        the folder.

    Raises:
        ImportError: without the extra ``onnx``.
        ValueError: a size that the tokenizer does not divide, a model that cannot be exported.
    """
    _check_extra()
    place = check_output("folder", folder, folder=True)
    if isinstance(model, Muse):
        sizes = model.sizes(image_size)
        for name, stage in model.stages.items():
            export_onnx(stage, place / name, sizes[name])
    elif isinstance(model, MaskGit):
        _export_stage(model, place, image_size)
    elif isinstance(model, ImageTokenizer):
        if image_size is None:
            raise ValueError("image_size is not given, and a tokenizer alone has none of its own")
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        _export_tokenizer(model, place, (height, width))
    else:
        raise ValueError(
            f"a {type(model).__name__} cannot be exported as onnx alone: give the stage that it is "
            "of, a whole model or a tokenizer"
        )
    return place


def _check_extra() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "export to onnx needs the packages onnx and onnxscript: pip install "
            "'muse-maskgit-pytorch[onnx]'"
        ) from error


def _export_tokenizer(vae: ImageTokenizer, place: Path, size: tuple[int, int]) -> None:
    images = torch.zeros(BATCH, 3, *size)
    grid = [vae.fmap_size(side) for side in size]
    _write(_Encoder(vae), place / "encoder.onnx", {"images": images}, ["ids"])
    ids = torch.zeros(BATCH, *grid, dtype=torch.long)
    _write(_Decoder(vae), place / "decoder.onnx", {"ids": ids}, ["images"])


def _export_stage(stage: MaskGit, place: Path, image_size: ImageSize | None) -> None:
    transformer, geometry = stage.transformer, stage.geometry
    size = geometry.pixels(image_size)
    if size != geometry.pixels(None):
        raise ValueError(
            f"image_size {image_size} is not the {stage.image_size} that the stage was trained on, "
            "for which alone its step can be exported"
        )
    if transformer.timed:
        raise ValueError(
            f"a {type(transformer).__name__} reads how many steps follow, which a step exported as "
            "onnx is not told: export its tokenizer alone"
        )
    tokens, width = transformer.seq_len, transformer.text_embed_dim
    inputs = {
        "ids": torch.zeros(BATCH, tokens, dtype=torch.long),
        "text": torch.zeros(BATCH, LENGTH, width),
        "text_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
    }
    if stage.cond_vae is not None:
        cond_size = geometry.cond_pixels(image_size)
        cond_tokens = [stage.cond_vae.fmap_size(side) for side in cond_size]
        inputs["cond_ids"] = torch.zeros(BATCH, cond_tokens[0] * cond_tokens[1], dtype=torch.long)
        if not stage.cond_vae.same_ids(stage.vae):
            images = {"images": torch.zeros(BATCH, 3, *cond_size)}
            _write(_Encoder(stage.cond_vae), place / "cond_encoder.onnx", images, ["ids"])
    outputs = ["logits"]
    if transformer.self_cond:
        inputs["self_cond"] = torch.zeros(BATCH, tokens, transformer.dim)
        outputs.append("hidden")
    _export_tokenizer(stage.vae, place, size)
    _write(_Step(transformer), place / "step.onnx", inputs, outputs)
    options = with_names({k: v for k, v in vars(stage.default_options).items() if k != "seeds"})
    classes = None if transformer.classes is None else list(transformer.classes)
    facts = {
        "image_size": list(size),
        "grid": list(geometry.grid(size)),
        "codebook_size": stage.vae.codebook_size,
        "mask_id": transformer.mask_id,
        "seq_len": tokens,
        "dim": transformer.dim,
        "text_encoder": transformer.text_encoder if classes is None else None,
        "classes": classes,
        "max_text_len": transformer.max_text_len,
        "sample_options": options,
    }
    with replacing(place / CONFIG) as temporary:
        temporary.write_text(f"{json.dumps(facts, indent=2)}\n", encoding="utf-8")


def _write(
    network: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: Sequence[str]
) -> None:
    """Export one network, for any number of rows and of a text's tokens."""
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in inputs}
    for name in inputs.keys() & {"text", "text_mask"}:
        axes[name][1] = "length"
    trained = [p for p in network.parameters() if p.requires_grad]
    training = [module for module in network.modules() if module.training]
    try:
        # Gradients stay on: where there are none, `encode_context` looks at the mask's values.
        with _quiet(), torch.enable_grad():
            network.eval().requires_grad_(False)
            program: Any = torch.onnx.export(
                network,
                kwargs=inputs,
                output_names=outputs,
                dynamic_shapes={name: axes.get(name) for name in inputs},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error  # torch's own says where to read of it
        said = printable(" ".join(str(cause).split()), 300)
        raise ValueError(
            f"{path} cannot be made, since torch cannot export this model "
            f"({type(cause).__name__}: {said})"
        ) from error
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
    with replacing(path) as temporary:
        program.save(str(temporary))
        large = temporary.with_name(temporary.name + DATA)
        if large.exists():
            os.replace(large, path.with_name(large.name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages that it lacks and axes that it renames."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
