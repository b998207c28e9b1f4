"""`muse report`: a training run as one page."""

from __future__ import annotations

from ..watching.report import write_report
from .parser import Parser


def report_parser() -> Parser:
    parser = Parser("muse report", "Draw a training run's curves and pictures as one HTML page.")
    parser.add_argument("results_folder", type=str, help="where the training wrote metrics.jsonl")
    parser.add_argument("--stage", type=str | None, help="only this stage, of several in the run")
    parser.add_argument(
        "--out", type=str | None, help="file to write; report.html in the folder if not given"
    )
    return parser


def report(argv: list[str]) -> None:
    config = report_parser().read(argv)
    print(write_report(config.results_folder, config.stage, out=config.out))
