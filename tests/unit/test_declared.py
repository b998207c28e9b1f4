"""What is read from the source is what importing it gives."""

import inspect
from importlib import import_module
from typing import Any, get_type_hints

import pytest

from muse_maskgit_pytorch.cli.declared import declared
from muse_maskgit_pytorch.training.loop import Trainer

NAMES = [
    "sampling.SampleOptions",
    "vqgan_vae.VQGanVAE",
    "transformer.MaskGitTransformer",
    "transformer.TokenCritic",
    "maskgit.MaskGit",
    "training.vae_trainer.VQGanVAETrainer",
    "training.maskgit_trainer.MaskGitTrainer",
    "editing.inpaint",
    "editing.outpaint",
    "editing.free",
    "editing.vary",
]
CONSTANTS = [
    "features.LITE",
    "loading.Stage",
    "sampling.Policy",
    "evaluation.tuning.Score",
    "arguments.LARGEST",
]


def imported(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(import_module(f"muse_maskgit_pytorch.{module}"), last)


def is_ours(annotation: Any) -> bool:
    """Whether it names classes of models or pictures, which no option has."""
    return any(word in str(annotation) for word in ("muse_maskgit_pytorch", "Image", "Tensor"))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_types_defaults_and_docstrings(name):
    real, read = imported(name), declared(name)
    parameters = dict(inspect.signature(real).parameters)
    hints = get_type_hints(real.__init__ if isinstance(real, type) else real)
    if isinstance(real, type) and issubclass(real, Trainer):
        del parameters["common"]
        above = list(inspect.signature(Trainer).parameters.items())[1:]
        parameters |= {key: value for key, value in above if key not in parameters}
        hints = get_type_hints(Trainer.__init__) | hints
    found = inspect.signature(read).parameters
    assert list(found) == list(parameters)
    for key, parameter in parameters.items():
        assert found[key].default == parameter.default
        if not is_ours(hints.get(key)) and parameter.kind is not parameter.VAR_KEYWORD:
            assert found[key].annotation == hints[key]
    assert inspect.cleandoc(read.__doc__) == inspect.getdoc(real)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name):
    assert declared(name) == imported(name)


def test_it_cannot_be_called():
    with pytest.raises(NotImplementedError, match="inpaint is only declared here"):
        declared("editing.inpaint")()
