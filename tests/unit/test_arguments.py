"""Numbers, paths and texts from outside."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.arguments import as_path, as_text, printable, real, whole


@pytest.mark.parametrize("four", [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)])
def test_a_whole_number_of_any_library_is_one(four):
    assert type(whole("n", four, 1, 4)) is int
    assert whole("n", four) == 4
    assert real("x", four) == 4.0


@pytest.mark.parametrize("value", [4.0, True, "4", None, [4], np.float32(4), b"4", 2j])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match="n must be a whole number, not"):
        whole("n", value)


@pytest.mark.parametrize("value", ["1", None, float("nan"), float("inf"), 10**400, [1.0], True])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match=r"x must be a (finite )?number, not"):
        real("x", value)


def test_ranges_are_named():
    with pytest.raises(ValueError, match="n must be at most 4, not 5"):
        whole("n", 5, 1, 4)
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        whole("n", 0, 1)
    with pytest.raises(ValueError, match=r"x must be at least 0, not -0.5"):
        real("x", -0.5, 0)
    with pytest.raises(ValueError, match=r"x must be in \[0, 1\], not 1.5"):
        real("x", 1.5, 0, 1)


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/runs") == tmp_path / "runs"
    assert as_path(Path("~")) == tmp_path
    assert as_path("a/~/b") == Path("a/~/b")


@pytest.mark.parametrize("value", [None, 3, "", b"a", "a\0b", ["a"]])
def test_what_is_no_path(value):
    with pytest.raises(ValueError, match="folder"):
        as_path(value, "folder")


def test_broken_texts_are_mended_and_said():
    with pytest.warns(UserWarning, match="prompt 1"):
        assert as_text("caf\udce9 \ud83d\0", "prompt 1") == "caf\ufffd \ufffd\ufffd"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_text("🍎 é", "prompt") == "🍎 é"
    with pytest.raises(ValueError, match="prompt must be a string, not None"):
        as_text(None, "prompt")


def test_terminals_get_no_control_characters():
    assert printable("a\x1b[31mb\n\u202ec\ud83d") == r"a\x1b[31mb\n\u202ec\ud83d"
    assert printable("👩\u200d🚀 é") == "👩\u200d🚀 é"
    assert printable("x" * 100, 10) == "xxxxxxx..."


def test_constructors_take_numbers_of_any_library_and_nothing_else():
    """So does every class that can be saved: one place checks them by their annotations."""
    assert tiny.vae(dim=np.int64(8), channel_mults=np.array([1, 1, 2])).config["dim"] == 8
    assert tiny.transformer(depth=torch.tensor(1)).config["depth"] == 1
    for make, message in {
        lambda: tiny.vae(dim="8"): "dim must be a whole number, not '8'",
        lambda: tiny.vae(l2_norm="yes"): "l2_norm must be True or False, not 'yes'",
        lambda: tiny.transformer(heads=2.0): "heads must be a whole number, not 2.0",
        lambda: tiny.maskgit(image_size="32"): "image_size must be a whole number, not '32'",
        lambda: tiny.maskgit(vae="a.pt"): "vae must be an ImageTokenizer, not 'a.pt'",
        lambda: tiny.maskgit(cond_drop_prob=None): "cond_drop_prob must be a number, not None",
        lambda: Muse(tiny.vae()): "base must be a MaskGit, not a VQGanVAE",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            make()
