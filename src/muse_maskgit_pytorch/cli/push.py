"""`muse push`: a model's folder with its card, on the disk and on the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from ..card import write_card
from ..files import check_output
from ..hub import check_repository, upload
from ..loading import open_any
from .parser import Parser


def push(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    if config.out is None and config.repo is None:
        raise ValueError("say where to: --out FOLDER, --repo OWNER/NAME, or both")
    if config.repo is not None:
        check_repository(config.repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"  # nothing is left behind by what is refused
        out = None if config.out is None else check_output("--out", config.out, folder=True)
        model = open_any(config.model)
        model.license = config.license or model.license
        model.save_pretrained(folder, getattr(torch, config.dtype))
        card = write_card(
            type(model).from_pretrained(folder),  # as it is stored
            folder,
            name=config.repo or (out.resolve().name if out else None),
            runs=config.runs,
            figures=config.figures,
            pictures=config.pictures,
            license=model.license,
            limits=config.limits,
        )
        if out is not None:
            shutil.copytree(folder, out, dirs_exist_ok=True)
            print(out / card.name)
        if config.repo is not None:
            given = {
                "private": config.private,
                "branch": config.branch,
                "create_pr": config.create_pr,
            }
            message = {} if config.message is None else {"commit_message": config.message}
            print(upload(folder, config.repo, **given, **message))
