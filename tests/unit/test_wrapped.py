"""Wrappers round parts of a model, and classes of one's own: what their files hold."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

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
    with pytest.raises(ValueError, match="transformer is spread over devices by DataParallel"):
        MaskGit(vae=vae, transformer=nn.DataParallel(transformer), image_size=16)  # type: ignore[arg-type]


def test_what_could_not_be_read_again_is_refused_before_any_work(tmp_path: Path):
    model = tiny.maskgit()
    model.transformer = Adapter(model.transformer)
    with pytest.raises(ValueError, match="take out what was put into the model"):
        model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="take out what was put into the model"):
        maskgit_trainer(tmp_path / "no-data-yet", tmp_path / "run", model)
    with pytest.raises(ValueError, match="model must be a Saveable, not an Adapter"):
        maskgit_trainer(tmp_path / "no-data-yet", tmp_path / "run", Adapter(tiny.maskgit()))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_process(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)
    return module


def fully_sharded(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a GPU it is slow
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


@pytest.mark.parametrize(
    "spread", [nn.DataParallel, nn.parallel.DistributedDataParallel, fully_sharded, sharded]
)
def test_what_is_spread_over_devices(tmp_path: Path, one_process: None, spread: Callable):
    """A part of it is the bare one in a file, or refused; a model or a trainer takes none."""
    model = cascade().base
    bare = model.save(tmp_path / "bare.safetensors").read_bytes()
    with pytest.raises(ValueError, match="transformer is spread over devices by"):
        MaskGit(vae=model.vae, transformer=spread(cascade().base.transformer), image_size=16)
    model.transformer = spread(model.transformer)
    if spread is sharded:
        with pytest.raises(ValueError, match="divided among processes: save the model that"):
            model.save(tmp_path / "wrapped.safetensors")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            path = model.save(tmp_path / "wrapped.safetensors")
        assert path.read_bytes() == bare
    parts: list[tuple[str, Any]] = [("model.transformer", model), ("model", nn.DataParallel(model))]
    for name, given in parts:
        with pytest.raises(ValueError, match=f"{name} is spread over devices by"):
            maskgit_trainer(tmp_path / "no-data-yet", tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


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
