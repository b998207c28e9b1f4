"""Tensors that are divided among processes, in the files of a sharded checkpoint.

torch.distributed.checkpoint writes them as safetensors, each process its own parts in a file of
its own, and reads them back for any other number of processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..arguments import shown
from ..weights import CheckpointError

# Where in a tree a tensor stands, joined to one name; parameters' names have no slashes.
SLASH = "/"


def model_for(place: str, like: Callable[[str], Tensor | None]) -> Tensor | None:
    """The tensor as which one is divided: of its own place, or of an optimizer's parameter."""
    found = like(place)
    return like(place.rpartition(SLASH)[0]) if found is None else found


def divided(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """A tree without the tensors that are divided, and those by their places in it.

    Every process must call it: what a process has a sum's part of, say, is put together.
    """
    shards: dict[str, DTensor] = {}

    def rest(node: Any, at: str) -> Any:
        if isinstance(node, dict):
            kept = {k: rest(v, f"{at}{SLASH}{k}".strip(SLASH)) for k, v in node.items()}
            return {key: value for key, value in kept.items() if value is not None}
        if isinstance(node, DTensor):
            if all(isinstance(place, Shard) for place in node.placements):
                shards[at] = node
                return None
            return node.full_tensor()
        return node

    return rest(tree, ""), shards


def write(folder: Path, shards: dict[str, DTensor], group: Any) -> Future:
    """Copy the parts of this process, and write them to a folder while training goes on.

    Every process must call it.

    Args:
        folder: made where it is missing; all processes must see the same.
        shards: by name.
        group: of all processes, over the CPU, which nothing else uses meanwhile.

    Returns:
        what ends once the files of all processes are written.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return dcp.async_save(dict(shards), storage_writer=writer, process_group=group)  # type: ignore


def read(
    folder: Path, wanted: dict[str, list[int]], like: Callable[[str], Tensor | None]
) -> dict[str, Tensor]:
    """Read tensors from a folder, each process its own parts, or a single one all of them.

    Args:
        folder: of `write`.
        wanted: their shapes, by name.
        like: gives by a place the tensor as which one there, or one right below it, is to be
            divided, if of its shape.

    Raises:
        CheckpointError: a file or a part of a tensor is missing.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata if folder.is_dir() else {}
    made: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        parts = known[name].chunks if name in known else []
        if sum(math.prod(part.sizes) for part in parts) != math.prod(shape):
            raise CheckpointError(
                f"{folder} is damaged: it has not all of {shown(name, 200)}, as if one of its "
                "files were missing"
            )
        own, dtype = model_for(name, like), known[name].properties.dtype
        if isinstance(own, DTensor) and list(own.shape) == shape:
            made[name] = torch.empty_like(own, dtype=dtype, requires_grad=False)
        else:
            made[name] = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no process but this
        dcp.load(made, storage_reader=reader)
    return made


def joined(tree: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tree that `divided` took apart."""
    for place, tensor in tensors.items():
        *way, last = place.split(SLASH)
        node = tree
        for key in way:
            node = node.setdefault(key, {})
        node[last] = tensor
    return tree
