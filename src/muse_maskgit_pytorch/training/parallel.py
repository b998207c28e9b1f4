"""Devices and processes of a training run: the only place that knows accelerate."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import real, whole
from ..layers import Block

Precision = Literal["no", "fp16", "bf16"]


class Parallel:
    """One process's view of all the processes that train together.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
    """

    def __init__(self, mixed_precision: Precision):
        from accelerate import Accelerator

        # accelerate holds one precision per process and wraps models for it; what needs it is the
        # gradient scaler of fp16 alone, so the rest is autocast of our own
        scaled = "fp16" if mixed_precision == "fp16" else "no"
        self.accelerator = Accelerator(mixed_precision=scaled)
        # its environment may ask for an accumulation, which would divide the gradients once more
        self.accelerator.gradient_accumulation_steps = 1
        self.precision = mixed_precision
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def scaler(self) -> Any:
        """fp16's gradient scaler; None in other precisions."""
        return self.accelerator.scaler

    def scaler_state(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_scaler(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:  # its settings stay those of today
            scale, tracker = real("scale", state["scale"], 0), "_growth_tracker"
            changed = {"scale": scale, tracker: whole(tracker, state[tracker], 0)}
            self.scaler.load_state_dict(self.scaler_state() | changed)

    def prepare(self, module: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Wrap a module and its optimizer for this device and these processes."""
        return self.accelerator.prepare(module, optimizer)

    def autocast(self) -> AbstractContextManager:
        """Half precision where it is safe, if ``mixed_precision`` says so."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager:
        """Within the block gradients are not exchanged between processes."""
        return self.accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip gradients to a norm (0: no limit); returns the norm before, alike everywhere."""
        norm = self.accelerator.clip_grad_norm_(parameters, limit or math.inf)
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def reduce(self, value: Tensor, how: Literal["sum", "mean"] = "sum") -> Tensor:
        """Sum or mean of a tensor over all processes."""
        return self.accelerator.reduce(value, how)  # type: ignore[return-value]

    def agreed(self, flag: bool) -> bool:
        """Whether any process says so: they must stop together, or the others wait for ever."""
        if self.world == 1:
            return flag
        return bool(self.reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def broadcast(self, value: float) -> float:
        """The main process's value."""
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(value, device=self.device)))

    def gathered(self, text: str) -> list[str]:
        """The texts of all processes, in their order."""
        from accelerate.utils import gather_object

        return [text] if self.world == 1 else gather_object([text])

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def shard(module: nn.Module) -> None:
    """Shard weights, gradients and optimizer state over all processes, block by block (FSDP2).

    For loops of one's own: the trainers do not use it, since their checkpoints are written by one
    process that has all the weights. torch.distributed must be initialised.

    Args:
        module: a `MaskGit`, a transformer, or what wraps one. Parameters that are frozen (the
            tokenizers') stay whole on every process.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    frozen = {p for p in module.parameters() if not p.requires_grad}
    for part in module.modules():
        if isinstance(part, Block):
            fully_shard(part, ignored_params=frozen)
            if part.cross is not None:
                # called before the block's forward, and so with its weights still apart
                register_fsdp_forward_method(part, "keys_values")
    fully_shard(module, ignored_params=frozen)
    for method in ("losses", "encode_context"):
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)
