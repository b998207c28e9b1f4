"""Records of pictures, damaged: read or refused, and never more work than the limits allow."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import RECORD, record_of, save_png
from muse_maskgit_pytorch.provenance import read_records
from tests.fuzz.driver import Random, damaged, damaged_bytes, run

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def png_with(text: str, path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(RECORD, text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=chunks)


def damaged_record(random: Random, text: str) -> str:
    """Values changed, or letters."""
    if random.random() < 0.1:
        return damaged_bytes(random, text.encode()).decode(errors="replace").replace("\0", "0")
    tree: Any = json.loads(text)
    for _ in range(random.integers(1, 3)):
        tree = damaged(random, tree)
    return json.dumps(tree)


def tried(what: Callable[[], Any], path: Path) -> Any:
    """Its result, or None where it is refused with the name of the file."""
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return what()
    except ValueError as error:
        said = str(error)
    assert str(path) in said, said
    return None


def test_records(t5: str, tmp_path: Path, capsys):
    torch.manual_seed(0)
    text = dict(t5_name=t5, text_embed_dim=None)
    vae = tiny.vae()
    base = tiny.maskgit(tiny.transformer(**text), vae=vae, sample_options=dict(timesteps=2))
    high = tiny.transformer(seq_len=64, **text)
    steps = dict(timesteps=2)
    superres = tiny.superres(model=high, vae=vae, cond_vae=vae, sample_options=steps)
    muse: Any = Muse(base, superres).eval()
    [picture, _] = muse(["a red car", "two cats"], negative_texts="dogs", seeds=[5, 2**40])
    record = str(record_of(picture))
    whole = save_png(picture, tmp_path / "whole.png").read_bytes()
    path = tmp_path / "damaged.png"
    capsys.readouterr()

    def one(random: Random) -> str:
        if random.random() < 0.1:
            path.write_bytes(damaged_bytes(random, whole))
        else:
            png_with(damaged_record(random, record), path)
        for more in ([], ["--json=true"]):
            code = main(["inspect", str(path), *more])
            said = capsys.readouterr()
            assert code in (0, 2), said.err
            assert not CONTROL.search(said.out + said.err), repr(said)
            assert more or max(map(len, [*said.out.splitlines(), ""])) <= 2000
            assert (code == 0) == (said.err == "")
            assert len(said.err) < 1000 + len(str(path)), said.err
        records = tried(lambda: read_records(path), path)
        if records is None:
            return "refused"
        pictures = tried(lambda: muse.like(path), path)
        if pictures is None:
            return "read, not drawn"
        assert len(pictures) == sum(len(record.rows) for record in records)
        return "drawn"

    found = run("records", 3, one, default=60)
    assert min(found["refused"], found["drawn"]) > 0
