"""`muse export`: a model in the formats of other programs."""

from __future__ import annotations

from ..foreign import export_diffusers, load_tokenizer
from ..loading import open_any
from ..onnx_export import export_onnx
from .parser import Parser


def export(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    if config.format == "diffusers":
        if config.image_size is not None:
            raise ValueError("--image_size is of --format onnx: a VQModel takes any size")
        print(export_diffusers(load_tokenizer(config.model), config.out))
    else:
        print(export_onnx(open_any(config.model), config.out, config.image_size))
