"""Taming's checkpoints: their names, their configurations, and objects that must not run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import CheckpointError
from muse_maskgit_pytorch.foreign import load_tokenizer
from tests import hub
from tests.vqgans import ATTENTION, TAMING, check_equal, images, lightning, taming_state


@pytest.fixture
def foreign_class() -> Iterator[type]:
    """Classes of a package that is there when a checkpoint is written, and not when it is read."""
    module: Any = ModuleType("pytorch_lightning")
    module.Callback = type("Callback", (), {"__module__": "pytorch_lightning"})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning"})
    sys.modules["pytorch_lightning"] = module
    yield module
    sys.modules.pop("pytorch_lightning", None)


@pytest.mark.parametrize("place", ["model.yaml", "last.yaml", "configs/model.yaml", None])
def test_taming_checkpoints(place: str | None, attending: Any, tmp_path: Path):
    torch.save(lightning(attending), tmp_path / "last.ckpt")
    if place is not None:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(TAMING)
    pixels = images(2, 3, 24, 32)
    for name in (tmp_path, tmp_path / "last.ckpt"):
        check_equal(load_tokenizer(name), attending, pixels)


def test_the_folder_that_taming_training_leaves(attending: Any, tmp_path: Path):
    for folder in ("checkpoints", "configs"):
        (tmp_path / folder).mkdir()
    torch.save(lightning(attending), tmp_path / "checkpoints" / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "epoch=000001.ckpt")
    config = tmp_path / "configs" / "2021-01-01T00-00-00-project.yaml"
    config.write_text(TAMING)
    check_equal(load_tokenizer(tmp_path), attending, images(1, 3, 16, 16))
    config.write_text(TAMING.replace("[16, 8]", "[8]"))
    with pytest.raises(
        CheckpointError, match=r"project.yaml says encoder_attention \[False, False"
    ):
        load_tokenizer(tmp_path)


def test_a_checkpoint_with_objects_of_an_absent_package(
    attending: Any, tmp_path: Path, foreign_class: Any
):
    callback = foreign_class.Callback()
    callback.best_model_score = torch.tensor(0.5)
    content = lightning(attending) | {
        "callbacks": {foreign_class.Callback: {"best": 1.0}, "other": callback},
        "hyper_parameters": foreign_class.AttributeDict(learning_rate=1e-4),
    }
    torch.save(content, tmp_path / "model.ckpt")
    del sys.modules["pytorch_lightning"]
    check_equal(load_tokenizer(tmp_path / "model.ckpt"), attending, images(1, 3, 16, 16))
    assert "pytorch_lightning" not in sys.modules


class Hostile:
    """Pickled, it is a call."""

    def __init__(self, call: Any, *arguments: Any):
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", ["system", "exec", "open", "call"])
def test_a_hostile_checkpoint_runs_nothing(how: str, zipped: bool, attending: Any, tmp_path: Path):
    mark = tmp_path / "was-here"
    hostile = {
        "system": Hostile(os.system, f"touch {mark}"),
        "exec": Hostile(exec, f"open({str(mark)!r}, 'w')"),
        "open": Hostile(open, str(mark), "w"),
        "call": Hostile(subprocess.check_output, ["touch", str(mark)]),
    }[how]
    path = tmp_path / "model.ckpt"
    torch.save(lightning(attending) | {"x": hostile}, path, _use_new_zipfile_serialization=zipped)
    if zipped and how != "system":  # read, and the call left out
        check_equal(load_tokenizer(path), attending, images(1, 3, 16, 16))
    else:
        with pytest.raises(CheckpointError, match="would have to be executed, which is refused"):
            load_tokenizer(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the same file, read carelessly
    assert mark.exists()


def test_plain_tensors_in_the_format_before_torch_1_6(attending: Any, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save(lightning(attending), path, _use_new_zipfile_serialization=False)
    check_equal(load_tokenizer(path), attending, images(1, 3, 16, 16))


def test_pooling_and_repeating_instead_of_convolutions(attending: Any, tmp_path: Path):
    """Taming's resamp_with_conv: false; a convolution that does the same is the reference."""
    state = taming_state(attending)
    model = hub.make_vqmodel(tmp_path / "reference", **ATTENTION)
    with torch.no_grad():
        for level in model.encoder.down_blocks[:-1]:
            conv = level.downsamplers[0].conv
            width = conv.weight.shape[0]
            conv.bias.zero_()
            conv.weight.zero_()[:, :, :2, :2] = torch.eye(width)[..., None, None] / 4
        for level in model.decoder.up_blocks[:-1]:
            conv = level.upsamplers[0].conv
            conv.bias.zero_()
            conv.weight.zero_()[:, :, 1, 1] = torch.eye(conv.weight.shape[0])
    state = {k: v for k, v in taming_state(model).items() if "sample.conv" not in k}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    check_equal(load_tokenizer(tmp_path / "model.ckpt"), model, images(2, 3, 16, 16))
