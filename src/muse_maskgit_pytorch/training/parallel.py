"""Devices and processes of a training run: the only place that knows accelerate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..arguments import real, whole
from ..distributed import gather_rows
from ..layers import Block
from .shards import model_for

Precision = Literal["no", "fp16", "bf16"]
T = TypeVar("T")


class Parallel:
    """One process's view of all the processes that train together.

    Accelerate's configuration alone decides how they share the work: DistributedDataParallel, or
    FSDP2 where it says ``distributed_type: FSDP`` with ``fsdp_version: 2``. What is wrapped how
    stands here: accelerate's own FSDP2 takes one model with its optimizer, all of whose
    parameters it divides, the frozen tokenizers' too.

    Args:
        mixed_precision: "no", "fp16" or "bf16".

    Raises:
        ValueError: a configuration of FSDP that the trainers do not follow.
    """

    def __init__(self, mixed_precision: Precision):
        from accelerate import Accelerator

        wants_shards = _flag("ACCELERATE_USE_FSDP")
        if wants_shards:
            _check_fsdp(mixed_precision)
        # accelerate holds one precision per process and wraps models for it; what needs it is the
        # gradient scaler of fp16 alone, so the rest is autocast of our own
        scaled = "fp16" if mixed_precision == "fp16" else "no"
        self.accelerator = Accelerator(mixed_precision=scaled)
        # its environment may ask for an accumulation, which would divide the gradients once more
        self.accelerator.gradient_accumulation_steps = 1
        self.precision = mixed_precision
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)
        self.wants_shards = wants_shards and self.world > 1

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

    def prepare(self, module: nn.Module, divisible: bool) -> nn.Module:
        """Wrap a module for this device and these processes, which begin with the same weights.

        Args:
            module: with the weights of the main process or others.
            divisible: whether it may be sharded (`shard`) where the configuration says so; else
                every process has all of it.
        """
        module.to(self.device)
        if not self.wants_shards:
            return self.accelerator.prepare(module)
        if not divisible:
            cards = [self.device] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(module, device_ids=cards)
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0)
        shard(module, init_device_mesh(self.device.type, (self.world,)))
        return module

    def prepare_optimizer(self, optimizer: Any) -> Any:
        """Wrap the optimizer of a module that is wrapped already."""
        return optimizer if self.wants_shards else self.accelerator.prepare(optimizer)

    def autocast(self) -> AbstractContextManager:
        """Half precision where it is safe, if ``mixed_precision`` says so."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager:
        """Within the block gradients are not exchanged between processes.

        Those of a sharded module are: whole gradients are what there is no room for.
        """
        if not self.wants_shards:
            return self.accelerator.no_sync(wrapped)
        return nullcontext() if is_sharded(wrapped) else wrapped.no_sync()  # type: ignore

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip gradients to a norm (0: no limit); returns the norm before, alike everywhere."""
        if self.wants_shards:
            norm = whole_tensor(
                nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            )
            nn.utils.clip_grads_with_norm_(parameters, limit or math.inf, norm)
            return norm
        norm = self.accelerator.clip_grad_norm_(parameters, limit or math.inf)
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def with_weights(self, wrapped: nn.Module, work: Callable[[], T]) -> T:
        """Do what calls methods of a module other than its forward, with its weights at hand.

        Every process must call it, and take as many passes through the module as the others.
        """
        return wrapped.doing(work) if is_sharded(wrapped) else work()  # type: ignore

    def whole_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with those put together that are divided: on the main process, on the CPU.

        Every process must call it; the others are given nothing.
        """
        found = {}
        for name, value in state.items():
            value = whole_tensor(value)
            if self.is_main:
                found[name] = value.cpu() if self.wants_shards else value  # of one at a time
        return found

    @cached_property
    def cpu_group(self) -> Any:
        """All processes, over the CPU and apart from training: what writes in the background."""
        return dist.new_group(backend="gloo")

    def reduce(self, value: Tensor, how: Literal["sum", "mean"] = "sum") -> Tensor:
        """Sum or mean of a tensor over all processes."""
        return self.accelerator.reduce(value, how)  # type: ignore[return-value]

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of numbers over all processes, which must have the same names in one order."""
        if self.world == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.reduce(numbers).tolist(), strict=True))

    def share(self, rows: list[T]) -> list[T]:
        """This process's part of some rows, as many on every process: the last one may repeat."""
        count = -(-len(rows) // self.world)
        return [rows[min(self.rank * count + i, len(rows) - 1)] for i in range(count)]

    def joined(self, images: Tensor, count: int) -> Tensor:
        """What the processes made of the rows of a `share`: of all ``count`` rows, on each."""
        return gather_rows(images.flatten(1)).unflatten(1, images.shape[1:])[:count]

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

    def tracker(
        self, name: str, folder: str, run: str, config: dict[str, Any], settings: dict[str, Any]
    ) -> Any:
        """An experiment tracker of accelerate's, started.

        Args:
            name: as accelerate knows it.
            folder: where it may write, if it does.
            run: name of the run, or of the project it belongs to.
            config: how the run is made.
            settings: of this kind of tracker.
        """
        from accelerate.tracking import filter_trackers

        self.accelerator.log_with = filter_trackers([name], folder)
        self.accelerator.project_configuration.logging_dir = folder
        self.accelerator.init_trackers(run, config, {name: settings})
        return self.accelerator.trackers[0]

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _check_fsdp(mixed_precision: Precision) -> None:
    """Refuse what accelerate's configuration asks of FSDP and the trainers do not do."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "accelerate's configuration asks for FSDP of version 1: set fsdp_version: 2 under "
            "fsdp_config"
        )
    if mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 does not go with FSDP: use bf16 or no")
    for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"):
        if _flag(f"FSDP_{name}"):
            raise ValueError(
                f"accelerate's configuration sets fsdp_{name.lower()}, which the trainers do not "
                "follow: leave it out"
            )


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` divided this module."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is divided put together, which all processes must do; others unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(tree: Any, like: Callable[[str], Tensor | None], at: str = "") -> Any:
    """A tree of tensors with those divided that are so elsewhere; each process has its part.

    Args:
        tree: nested dicts; tensors of which every process has all.
        like: gives by a place in the tree the tensor as which one there, or one right below it,
            is to be divided, if of its shape.
        at: the tree's own place.
    """
    if isinstance(tree, dict):
        return {key: placed_as(node, like, f"{at}/{key}".strip("/")) for key, node in tree.items()}
    if not isinstance(tree, Tensor) or isinstance(tree, DTensor):
        return tree
    own = model_for(at, like)
    if not isinstance(own, DTensor) or own.shape != tree.shape:
        return tree
    whole = tree.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def shard(module: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Shard weights, gradients and optimizer state over all processes, block by block (FSDP2).

    The trainers do so where accelerate's configuration says FSDP; for loops of one's own,
    torch.distributed must be initialised.

    Args:
        module: a `MaskGit`, a transformer, or what wraps one. Parameters that are frozen (the
            tokenizers') stay whole on every process.
        mesh: of the processes; by default all.
    """
    frozen = {p for p in module.parameters() if not p.requires_grad}
    # also the outermost: else it would keep its weights after a pass, and so miss their changes
    how: dict[str, Any] = dict(mesh=mesh, ignored_params=frozen, reshard_after_forward=True)
    for part in module.modules():
        if isinstance(part, Block) and any(p.requires_grad for p in part.parameters()):
            fully_shard(part, **how)
            if part.cross is not None:
                # called before the block's forward, and so with its weights still apart
                register_fsdp_forward_method(part, "keys_values")
    fully_shard(module, **how)
    for method in ("losses", "encode_context", "doing"):
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)
