"""What is wrapped for training: the model with a forward that returns its loss terms by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from torch import Tensor, nn

from ..maskgit import MaskGit

T = TypeVar("T")


class NamedTerms(nn.Module):
    """A `MaskGit` whose forward returns "loss" and, with a critic, "ce" and "critic".

    DistributedDataParallel sees only what goes through ``forward``. The model's submodules are
    registered under their own names, so its parameters are named in a checkpoint as the model
    names them.
    """

    maskgit: Any

    def __init__(self, maskgit: MaskGit):
        super().__init__()
        object.__setattr__(self, "maskgit", maskgit)  # not as a submodule, which would add a name
        for name, module in maskgit._modules.items():
            self.add_module(name, module)
        encoder = maskgit.own_encoder
        if encoder is not None and encoder.is_trained:
            self.add_module("text_encoder", encoder.model)

    def forward(self, **arguments: Any) -> dict[str, Tensor]:
        terms = self.maskgit.losses(**arguments)
        if terms.critic is None:
            return {"loss": terms.total}
        return {"loss": terms.total, "ce": terms.ce, "critic": terms.critic}

    def doing(self, work: Callable[[], T]) -> T:
        """What ``work`` returns: where the module is sharded, with its weights put together."""
        return work()

    def train(self, mode: bool = True) -> Self:
        """Switch the model its own way: tokenizers stay in eval mode."""
        self.training = mode
        self.maskgit.train(mode)
        return self


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters require no gradient; afterwards those that did do again."""
    narrowed = [p for p in parameters if p.requires_grad]
    for parameter in narrowed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in narrowed:
            parameter.requires_grad_(True)
