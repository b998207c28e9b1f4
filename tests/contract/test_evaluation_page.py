"""The Python of docs/evaluation.md is run as it stands, but for the model and the network."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli import options
from muse_maskgit_pytorch.evaluation import Metric

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, t5: str, resnet: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captioned_images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 99)).save(f"captioned_images/{i}.png")
        Path(f"captioned_images/{i}.txt").write_text(f"shade {i}")
    text = dict(text_embed_dim=16, t5_name=t5)
    presets = {"fast": {"timesteps": 1}}
    base = tiny.maskgit(tiny.transformer(**text), presets=presets)
    large = tiny.superres(
        model=tiny.transformer(seq_len=64, **text), sample_options=presets["fast"]
    )
    Muse(base, large).eval().save("muse.safetensors")
    judge, walk = BLOCKS
    names: dict[str, Any] = {"is_red": lambda picture: True}
    exec(judge, names)
    for text, smaller in {"scenes": "muse.safetensors", "efficientnet-lite0": resnet}.items():
        assert f'"{text}"' in walk
        walk = walk.replace(f'"{text}"', repr(smaller))
    exec(walk, names)
    assert isinstance(names["found"].metrics[resnet]["kid"], Metric)
    rows = names["truth"].prompts
    assert names["Judge"]().facts([None] * len(rows), rows) == [
        {"red": True} if "red" in r.text else {} for r in rows
    ]


def test_the_options_are_there():
    for part in ("base", "superres", "model"):
        known = getattr(options, f"eval_{part}_parser")().keys()
        lines = re.findall(rf"^muse eval {part} .*$", PAGE, re.M)
        assert lines
        for line in lines:
            assert set(re.findall(r"--([\w.]+)", line)) <= known
