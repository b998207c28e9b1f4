"""`muse report`: a training run as one page."""

from __future__ import annotations

from ..watching.report import write_report
from .parser import Parser


def report(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    print(write_report(config.results_folder, config.stage, out=config.out))
