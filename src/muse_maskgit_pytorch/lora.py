"""Low-rank adapters (LoRA, Hu et al. 2021) on a transformer, trained and stored by peft.

An adapter is a folder in peft's format (``adapter_config.json`` and ``adapter_model.safetensors``),
which peft reads too. It is trained beside the weights, which stay as they are, and drawn with by
adding it to them: a picture costs no more than without.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .arguments import as_path, real, shown, whole
from .files import digest_state, replacing
from .layers import Block
from .transformer import MaskGitTransformer
from .weights import CheckpointError, is_finite, reading, safetensors_file

PREFIX = "base_model.model."  # of the names in peft's files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What other adapters of the same type have, by their configuration.
UNREAD = ("use_dora", "lora_bias", "modules_to_save", "alpha_pattern", "layer_replication")
UNREAD += ("fan_in_fan_out", "trainable_token_indices")


def peft() -> Any:
    """The library.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'muse-maskgit-pytorch[lora]'") from error
    return peft


def add_lora(
    transformer: MaskGitTransformer,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
) -> None:
    """Put low-rank adapters beside linear layers, in place; nothing else is trained any more.

    A layer's output becomes ``W x + alpha / rank * B A x``. B starts at zero, so nothing changes
    until it is trained.

    Args:
        transformer: of a stage.
        rank: of the products B A, at least 1.
        alpha: their weight; ``rank`` by default, which makes it 1.
        targets: which layers: names, or their last parts, such as "to_qkv" or "ff.to_out". By
            default all linear layers of the blocks.

    Raises:
        ImportError: peft is not installed.
        ValueError: a name that no linear layer has; one that has an adapter already.
    """
    rank = whole("lora_rank", rank, 1)
    alpha = float(rank) if alpha is None else real("lora_alpha", alpha, 0)
    if has_lora(transformer):
        raise ValueError("the transformer has an adapter already: save it, and load the model anew")
    linear = {n for n, m in transformer.named_modules() if type(m) is nn.Linear}
    inside = {
        f"{name}.{part}"
        for name, block in transformer.named_modules()
        if isinstance(block, Block)
        for part, _ in block.named_modules()
    }
    chosen = linear & inside
    if targets is not None:
        chosen = set()
        for target in targets:
            fitting = {name for name in linear if f".{name}".endswith(f".{target}")}
            if not fitting:
                ends = sorted({name.rpartition(".")[2] for name in linear} | linear)
                near = difflib.get_close_matches(target, ends, n=1) or ends[:1]
                raise ValueError(
                    f"lora_targets {target!r} is no linear layer of this transformer, did you mean "
                    f"{near[0]!r}?"
                )
            chosen |= fitting
    config = peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(chosen))
    transformer.requires_grad_(False)
    peft().inject_adapter_in_model(config, transformer)


def has_lora(transformer: nn.Module) -> bool:
    """Whether adapters are in it."""
    return any(".lora_A." in name for name, _ in transformer.named_parameters())


def save_lora(transformer: MaskGitTransformer, folder: str | os.PathLike[str], stage: str) -> Path:
    """Write the adapters of a transformer as peft does.

    Args:
        transformer: with adapters (`add_lora`).
        folder: where to; made, and what it holds of an adapter replaced.
        stage: "base" or "superres"; the file's header has it.
    """
    folder = as_path(folder)
    state = peft().get_peft_model_state_dict(transformer)
    tensors = {f"{PREFIX}{name}": t.detach().cpu().contiguous() for name, t in state.items()}
    config: Any = transformer.peft_config["default"]  # type: ignore[index]
    with replacing(folder / CONFIG) as path, tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        path.write_bytes((Path(made) / CONFIG).read_bytes())
    with replacing(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt", "stage": stage})
    return folder


@dataclass(frozen=True)
class Lora:
    """An adapter from a file, which may be anybody's; peft is not needed to read it.

    Attributes:
        path: its folder.
        config: what its configuration says.
        state: matrices A and B, by the names of the transformer's layers.
        stage: that it says it was trained for; "" if it does not say.
    """

    path: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    stage: str

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Lora:
        """Read a folder in peft's format.

        Raises:
            CheckpointError: missing, damaged, or an adapter of another kind.
        """
        path = as_path(folder, "lora")
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{shown(str(path))} is no adapter: it has no {missing[0]} (a folder that muse "
                "train wrote, or peft)"
            )
        with reading(path / CONFIG):
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict) or config.get("peft_type") != "LORA":
                raise ValueError("it must be an adapter of peft's type LORA")
            if more := [name for name in UNREAD if config.get(name)]:
                raise ValueError(f"adapters with {more[0]} are not read")
            real("lora_alpha", config.get("lora_alpha"))
        with reading(path / WEIGHTS), safetensors_file(path / WEIGHTS) as file:
            names = list(file.keys())
            stage = str((file.metadata() or {}).get("stage", ""))
            state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
            if not state or not all(map(is_finite, state.values())):
                raise ValueError("it must hold finite numbers")
        return cls(path, config, state, stage)

    def misfit(self, transformer: MaskGitTransformer) -> str | None:
        """Why the adapter cannot be one of this transformer; None if it can."""
        parts, layers = dict(transformer.named_modules()), self._layers
        for layer, (down, up) in layers.items():
            linear = parts.get(layer)
            if not isinstance(linear, nn.Linear) or down is None or up is None or not len(down):
                return f"{shown(layer, 120)} is no linear layer of it, or lacks one of A and B"
            sides = linear.in_features, linear.out_features
            if (*up.shape[:1], *down.shape) != (sides[1], *up.shape[1:], sides[0]):
                return (
                    f"{shown(layer, 120)} has matrices {tuple(down.shape)} and {tuple(up.shape)} "
                    f"for a layer {sides[0]} -> {sides[1]}"
                )
        return None

    @property
    def _layers(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """A and B of each layer."""
        names = {name.rpartition(".lora_")[0] or name for name in self.state}
        return {
            name: (
                self.state.get(f"{name}.lora_A.weight"),
                self.state.get(f"{name}.lora_B.weight"),
            )
            for name in sorted(names)
        }

    @torch.no_grad()
    def merge(self, transformer: MaskGitTransformer, weight: float = 1.0) -> dict[str, Tensor]:
        """Add the adapter to the weights, in place: ``W + weight * alpha / rank * B A``.

        Args:
            transformer: that it fits (`misfit`).
            weight: of the adapter; 1 is as trained, 0 nothing.

        Returns:
            the weights that were changed, by name, as they were before.
        """
        before, rooted = {}, self.config.get("use_rslora")
        for layer, (down, up) in self._layers.items():
            assert down is not None
            assert up is not None
            to = transformer.get_parameter(f"{layer}.weight")
            before[f"{layer}.weight"] = to.clone()
            scale = self.config["lora_alpha"] / (len(down) ** 0.5 if rooted else len(down))
            to += (weight * scale * (up.float() @ down.float())).to(to)
        return before

    @property
    def digest(self) -> str:
        """A short name of its values: 16 hexadecimal digits."""
        return digest_state(self.state, str(self.config["lora_alpha"]))[:16]
