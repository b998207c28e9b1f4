"""`muse export`: a model in the formats of other programs."""

from __future__ import annotations

from ..foreign import export_diffusers, load_tokenizer
from .parser import Parser


def export(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    print(export_diffusers(load_tokenizer(config.model), config.out))
