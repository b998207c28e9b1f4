"""Tokenizers given back to diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import testing
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.foreign import ForeignVQGAN, export_diffusers, load_tokenizer
from tests import hub
from tests.unit.foreign.test_network import CONFIGS
from tests.vqgans import check_equal, images, taming_state


def read(folder: Path) -> Any:
    from diffusers import VQModel

    model: Any = VQModel
    return model.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["attention", "width of codes", "groups", "one level"])
def test_diffusers_reads_what_came_from_it(name: str, tmp_path: Path):
    model = hub.make_vqmodel(tmp_path / "in", **CONFIGS[name])
    tokenizer = load_tokenizer(tmp_path / "in")
    again = read(export_diffusers(tokenizer, tmp_path / "out"))
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    check_equal(tokenizer, again, images(2, 3, 16, 32))


def test_taming_becomes_diffusers(attending: Any, tmp_path: Path, capsys: pytest.CaptureFixture):
    path, out = tmp_path / "model.ckpt", tmp_path / "out"
    torch.save({"state_dict": taming_state(attending)}, path)
    assert main(["export", "--model", str(path), "--format", "diffusers", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    check_equal(load_tokenizer(path), read(out), images(2, 3, 16, 16))
    check_equal(load_tokenizer(out), attending, images(2, 3, 16, 16))  # and so does this package


def test_what_diffusers_cannot_hold(tmp_path: Path):
    with pytest.raises(ValueError, match="a VQGanVAE has layers that diffusers' VQModel lacks"):
        export_diffusers(testing.vae(), tmp_path / "out")
    arguments: dict[str, Any] = dict(
        channels=[8, 16], blocks=1, latent_channels=4, code_dim=4, codebook_size=9, groups=4,
        encoder_attention=[False] * 2, decoder_attention=[False] * 2, mid_attention=False,
    )  # fmt: skip
    others: dict[str, dict[str, Any]] = {
        "MaskGIT's VQGAN": dict(family="maskgit"),
        "pools and repeats": dict(family="taming", resample_conv=False),
        "first convolution has 4 channels": dict(family="taming", stem=4),
    }
    for reason, changes in others.items():
        given: dict[str, Any] = arguments | changes
        with pytest.raises(ValueError, match=f"cannot hold this tokenizer: .*{reason}"):
            export_diffusers(ForeignVQGAN(**given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
