"""Fixtures for all tests."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing downloads

import jaxtyping
import pytest
import torch
from hypothesis import settings

from tests import shapes

# The shape annotations of the core become assertions.
CORE = """structures vqgan_vae quantizer minilm text masking layers transformer geometry
conditioning sampling.options sampling.contract sampling.plan sampling.policies sampling.choose
sampling.loop request maskgit muse images provenance features foreign words
evaluation.metrics evaluation.tokenizer evaluation.generator evaluation.figures
evaluation.truth evaluation.drawing evaluation.scores training.gan"""
jaxtyping.install_import_hook(
    [f"muse_maskgit_pytorch.{name}" for name in CORE.split()], f"{shapes.__name__}.check"
)

from tests import hub  # noqa: E402

# The same examples in every run, however slow the machine.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny T5, a text encoder of width 16."""
    return str(hub.make_t5(tmp_path_factory.mktemp("models") / "t5"))


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny image classifier with batch norm."""
    return str(hub.make_resnet(tmp_path_factory.mktemp("models") / "resnet"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny CLIP: 20 features, texts of up to 12 letters."""
    return str(hub.make_clip(tmp_path_factory.mktemp("models") / "clip"))


@pytest.fixture(scope="session")
def hub_environment(
    t5: str, resnet: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Environment of a process that knows t5-small and microsoft/resnet-50 from its cache."""
    models = {"t5-small": Path(t5), "microsoft/resnet-50": Path(resnet)}
    return hub.make_hub(tmp_path_factory.mktemp("hub"), models)
