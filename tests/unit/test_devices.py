"""Devices by name, and the settings under which tokenizers encode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.devices import exact, pick_device
from muse_maskgit_pytorch.foreign import load_tokenizer
from tests import hub

backends: Any = torch.backends
new_settings = pytest.mark.skipif(
    not hasattr(backends, "fp32_precision"), reason="torch has fp32_precision from 2.9 on"
)


def precisions() -> list[str]:
    parts = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
    return [part.fp32_precision for part in parts]


@pytest.fixture(params=["default", "allow_tf32", "medium", "fp32_precision"])
def settings(request) -> Iterator[list[str]]:
    """Every way to allow less than float32; the process's settings come back."""
    cudnn, matmul = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    if request.param == "allow_tf32":
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = True
    elif request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "fp32_precision":
        backends.cuda.matmul.fp32_precision = "tf32"
        backends.mkldnn.matmul.fp32_precision = "bf16"
    yield precisions()
    backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(matmul)


@new_settings
def test_encoding_is_exact_under_every_setting(settings: list[str], tmp_path: Path):
    hub.make_vqmodel(tmp_path)
    tokenizers: list[Any] = [tiny.vae(), load_tokenizer(tmp_path)]
    for tokenizer in tokenizers:
        seen = []
        tokenizer.encoder.register_forward_hook(
            lambda *_, seen=seen: seen.append((precisions(), torch.is_autocast_enabled("cpu")))
        )
        with torch.autocast("cpu", torch.bfloat16):
            tokenizer.encode_to_ids(tiny.images())
        assert seen == [(["ieee"] * 3, False)]
        assert precisions() == settings


@new_settings
def test_an_error_restores_the_settings(settings: list[str]):
    with pytest.raises(KeyError), exact("cpu"), exact("cpu"):
        raise KeyError
    assert precisions() == settings


def test_devices_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"--device '{wrong}' cannot be used"):
            pick_device(wrong)
