"""Models by their name: what each kind of file gives."""

from pathlib import Path

import pytest
import torch

from muse_maskgit_pytorch import CheckpointError, Muse, open_model
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.loading import open_stage


def test_what_each_kind_of_file_gives(tmp_path: Path):
    base, superres = tiny.maskgit(), tiny.superres()
    files = {
        "vae": base.vae.save(tmp_path / "vae.safetensors"),
        "base": base.save(tmp_path / "base.safetensors"),
        "superres": superres.save(tmp_path / "superres.safetensors"),
        "muse": Muse(base, superres).save(tmp_path / "muse.safetensors"),
        "alone": Muse(base).save(tmp_path / "alone.safetensors"),
    }
    for name in ("base", "muse", "alone"):
        model = open_model(files[name], "cpu")
        assert not model.training
        assert (model.superres is not None) == (name == "muse")
        weights, expected = model.base.state_dict(), base.state_dict()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    with pytest.raises(CheckpointError, match="super-resolution stage alone: join it with a base"):
        open_model(files["superres"])
    with pytest.raises(CheckpointError, match="holds a VQGanVAE: give a Muse or a base MaskGit"):
        open_model(str(files["vae"]))
    with pytest.raises(ValueError, match="--device 'abacus' cannot be used"):
        open_model(files["base"], "abacus")

    assert open_stage(files["muse"], "superres").cond_image_size == 16
    assert open_stage(f"{files['muse']}:superres").cond_image_size == 16
    assert open_stage("scenes:base").image_size == open_stage("scenes").image_size == 128
    assert open_stage(files["muse"]).cond_image_size is None
    assert open_stage(files["superres"]).cond_image_size == 16
    with pytest.raises(CheckpointError, match="has no stage 'superres'"):
        open_stage(files["alone"], "superres")
    with pytest.raises(CheckpointError, match="holds a VQGanVAE: give a Muse or a MaskGit"):
        open_stage(files["vae"])
