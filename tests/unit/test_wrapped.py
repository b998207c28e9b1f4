"""Wrappers round parts of a model, and classes of one's own: what their files hold."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muse_maskgit_pytorch import MaskGit, Muse, VQGanVAE, load_tokenizer
from muse_maskgit_pytorch import testing as tiny
from tests.runs import maskgit_trainer


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def both(module: nn.Module) -> Any:
    return compiled(nn.DataParallel(module))


WRAPPERS: list[Callable[[nn.Module], Any]] = [compiled, nn.DataParallel, both]


class Adapter(nn.Module):
    """A wrapper that this package knows nothing of."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.inner = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def cascade() -> Muse:
    torch.manual_seed(0)
    vae = tiny.vae()
    return Muse(tiny.maskgit(vae=vae), tiny.superres(vae=vae))


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.__name__)
@pytest.mark.parametrize("part", ["base.transformer", "superres.vae.encoder"])
def test_the_file_is_that_of_the_bare_model(tmp_path: Path, wrapper: Callable, part: str):
    model = cascade()
    bare = model.save(tmp_path / "bare.safetensors").read_bytes()
    parent, _, name = part.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, wrapper(getattr(parent, name)))
    path = model.save(tmp_path / "wrapped.safetensors")
    assert path.read_bytes() == bare
    Muse.from_pretrained(path)


def test_parts_compiled_before_the_model_is_made(tmp_path: Path):
    vae, transformer = tiny.vae(), tiny.transformer()
    bare = MaskGit(vae=vae, transformer=transformer, image_size=16)
    wrapped = MaskGit(vae=vae, transformer=compiled(transformer), image_size=16)
    files = [m.save(tmp_path / f"{m is bare}.safetensors") for m in (bare, wrapped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="transformer is wrapped in a DataParallel, which hides"):
        MaskGit(vae=vae, transformer=nn.DataParallel(transformer), image_size=16)  # type: ignore[arg-type]


def test_what_could_not_be_read_again_is_refused_before_any_work(tmp_path: Path):
    model = tiny.maskgit()
    model.transformer = Adapter(model.transformer)
    with pytest.raises(ValueError, match="take out what was put into the model"):
        model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="take out what was put into the model"):
        maskgit_trainer(tmp_path / "no-data-yet", tmp_path / "run", model)
    assert not list(tmp_path.iterdir())


class Mine(VQGanVAE):
    def __init__(me, *, dim: int = 8):
        super().__init__(dim=dim, codebook_size=16, layers=1)


def test_a_class_of_ones_own_and_what_to_import(tmp_path: Path):
    """Whatever its constructor calls the instance; another process says where the class is."""
    path = Mine(dim=4).save(tmp_path / "a.safetensors")
    again = load_tokenizer(path)
    assert isinstance(again, Mine)
    assert again.config == {"dim": 4}
    with pytest.raises(ValueError, match="holds a Mine, not a VQGanVAE"):
        VQGanVAE.from_pretrained(path)
    load = f"from muse_maskgit_pytorch import load_tokenizer; load_tokenizer({str(path)!r})"
    said = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True).stderr
    assert said.strip().endswith(f"import its module, {__name__}, before you load it")
