"""`muse export`: a model in the formats of other programs."""

from __future__ import annotations

from ..arguments import as_path
from ..foreign import export_diffusers, load_tokenizer
from ..loading import open_any
from ..lora import CONFIG, Lora
from ..onnx_export import export_onnx
from .parser import Parser


def export(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    if config.format == "diffusers":
        if config.image_size is not None:
            raise ValueError("--image_size is of --format onnx: a VQModel takes any size")
        if (as_path(config.model) / CONFIG).is_file():
            print(Lora.read(config.model).export(config.out))
        else:
            print(export_diffusers(load_tokenizer(config.model), config.out))
    else:
        print(export_onnx(open_any(config.model), config.out, config.image_size))
