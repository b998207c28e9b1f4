"""`muse estimate`, and the paper's numbers of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.estimate import _read, _tokenizer
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.cli.train import make_maskgit
from muse_maskgit_pytorch.training.estimate import Estimate, of_maskgit, sketched
from muse_maskgit_pytorch.weights import sketching

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(("name", "millions"), [("632m", 632), ("3b", 3000)])
def test_the_papers_bases_have_as_many_weights(name: str, millions: int):
    """Sections 1 and 3: 632 million to 3 billion."""
    path = RECIPES / f"paper-base-{name}.yaml"
    stage, recipe = _read(path)
    assert stage == "base"
    with sketching(10**6):
        model = make_maskgit(recipe, load=lambda vae: _tokenizer(vae, path, None))
    assert model.geometry.grid() == (16, 16)
    count = sum(p.numel() for p in model.transformer.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.02)


def small(**changes) -> MaskGit:
    shape: dict[str, Any] = dict(
        num_tokens=tiny.CODES, seq_len=16, dim=32, depth=2, dim_head=8, heads=2
    )
    shape |= dict(text_embed_dim=12, t5_name="none") | changes
    with sketching(10**6):
        return MaskGit(vae=tiny.vae(), transformer=MaskGitTransformer(**shape), image_size=16)


def estimated(rows: int = 4, depth: int = 2, dim: int = 32, **how) -> Estimate:
    model = small(depth=depth, dim=dim)
    with sketched():
        return of_maskgit(model.to_empty(device="cpu"), rows, 5, **how)


def test_memory_by_part():
    found = estimated()
    count = sum(p.numel() for p in small().transformer.parameters())
    assert found.parameters["transformer"] == count
    assert found.weights == found.gradients == found.averages == 4 * count
    assert found.optimizer == 8 * count
    assert 4 * count < estimated(optimizer="adafactor").optimizer < 5 * count
    assert 4 * count < estimated(optimizer="muon").optimizer < 7 * count
    large: Any = dict(dim=128, depth=1)  # of which small tensors stay in float32
    eight, full = (estimated(optimizer=o, **large).optimizer for o in ("adamw8bit", "adamw"))
    assert 0.25 < eight / full < 0.35
    assert estimated(averages=0).averages == 0
    twice = estimated(rows=8)
    assert twice.activations == pytest.approx(2 * found.activations, rel=0.1)
    again = estimated(checkpointed=True)
    assert again.activations < found.activations / 2
    assert again.backward > found.backward


def test_of_several_processes():
    found = estimated()
    assert found.peak_of(1, True) == found.peak
    assert found.peak_of(4, False) == found.peak + found.gradients
    assert found.peak_of(64, True) < found.peak_of(4, True)


def test_arithmetic_is_that_of_the_products():
    """Two operations for each weight and token, three times as many with the way back."""
    found = estimated(rows=1, depth=4)
    with sketching(10**6):
        blocks: Any = small(depth=4).transformer.blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert found.forward == pytest.approx(2 * 16 * weights, rel=0.35)  # and attention, and text
    assert found.backward == pytest.approx(2 * found.forward, rel=0.15)
    # so many steps of two branches
    assert found.drawing > 24 * 2 * 2 * 16 * weights


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = tmp_path / "stage.yaml"
    recipe.write_text(
        "vae: runs/v/vae-ema.safetensors\n"
        "transformer: {dim: 32, depth: 1, t5_name: none, text_embed_dim: 12}\n"
        "maskgit: {image_size: 32}\ntrainer: {folder: x, batch_size: 2}\n"
    )
    assert main(["estimate", str(recipe)]) == 2
    assert "give --vae, the recipe that it is to be trained by" in capsys.readouterr().err
    tokenizer = "vae: {dim: 8, factor: 4, codebook_size: 64}\n"
    tokenizer += "trainer: {folder: x, image_size: 32, results_folder: runs/v}\n"
    (tmp_path / "my-vae.yaml").write_text(tokenizer)
    assert main(["estimate", str(recipe), "--gpu=t4", "--gpus=2", "--sharded=true"]) == 0
    shown = capsys.readouterr().out
    assert "stage (base), 2 images a GPU at once" in shown
    assert "of 16 GB\n" in shown
    assert main(["estimate", str(recipe), "--memory=0.0001"]) == 0
    assert "too little, lower trainer.batch_size" in capsys.readouterr().out
    assert main(["estimate", str(tmp_path / "my-vae.yaml"), "--utilisation=0"]) == 2
    assert main(["estimate", str(tmp_path / "my-vae.yaml")]) == 0
    assert "discriminator" in capsys.readouterr().out
    capsys.readouterr()
    saved = tmp_path / "saved.safetensors"
    tiny.vae().save(saved)  # read for its shape alone: nothing is said of values
    recipe.write_text(recipe.read_text().replace("runs/v/vae-ema.safetensors", str(saved)))
    assert main(["estimate", str(recipe)]) == 0
    assert not capsys.readouterr().err
