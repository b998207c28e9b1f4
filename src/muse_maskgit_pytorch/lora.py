"""Low-rank adapters (LoRA, Hu et al. 2021) on a transformer, trained and stored by peft.

An adapter is a folder in peft's format (``adapter_config.json`` and ``adapter_model.safetensors``),
which peft reads too. It is trained beside the weights, which stay as they are, and drawn with by
adding it to them: a picture costs no more than without. One of the text encoder, trained together
with it, is the folder ``text_encoder`` in it, as in diffusers.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .arguments import as_path, real, shown, whole
from .files import digest_state, replacing
from .text import TextEncoder
from .transformer import MaskedTransformer
from .weights import CheckpointError, is_finite, reading, safetensors_file

PREFIX = "base_model.model."  # of the names in peft's files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # what older releases of peft wrote
TEXT = "text_encoder"  # the folder of its part
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
    transformer: MaskedTransformer,
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
            default all linear layers of the blocks (`MaskedTransformer.block_types`), if any.

    Raises:
        ImportError: peft is not installed.
        ValueError: a name that no linear layer has; one that has an adapter already.
    """
    if has_lora(transformer):
        raise ValueError("the transformer has an adapter already: save it, and load the model anew")
    linear = _linear(transformer)
    inside = {
        f"{name}.{part}"
        for name, block in transformer.named_modules()
        if isinstance(block, transformer.block_types)
        for part, _ in block.named_modules()
    }
    chosen = linear & inside or linear
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
    _inject(transformer, chosen, rank, alpha)


def with_text_lora(encoder: TextEncoder, rank: int, alpha: float | None = None) -> TextEncoder:
    """A text encoder with adapters beside all of its linear layers; the given one stays as it is.

    Args:
        encoder: as all models share it.
        rank: as of `add_lora`; so is the next.
        alpha: their weight.

    Raises:
        ImportError: peft is not installed.
        ValueError: it has no linear layers.
    """
    made, used = copy.deepcopy(encoder), []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: used.append(name))
        for name, module in made.model.named_modules()
        if type(module) is nn.Linear
    ]
    made.encode("a")  # some have layers beside, of which their states do not depend
    for hook in hooks:
        hook.remove()
    if not used:
        raise ValueError(f"the text encoder {encoder.name!r} has no linear layers to adapt")
    _inject(made.model, used, rank, alpha)
    return made


def _inject(module: nn.Module, layers: Iterable[str], rank: int, alpha: float | None) -> None:
    rank = whole("lora_rank", rank, 1)
    alpha = float(rank) if alpha is None else real("lora_alpha", alpha, 0)
    config = peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted({*layers}))
    module.requires_grad_(False)
    peft().inject_adapter_in_model(config, module)


def _linear(module: nn.Module) -> set[str]:
    """Names of its linear layers."""
    return {name for name, part in module.named_modules() if type(part) is nn.Linear}


def has_lora(transformer: nn.Module) -> bool:
    """Whether adapters are in it."""
    return any(".lora_A." in name for name, _ in transformer.named_parameters())


def save_lora(
    transformer: MaskedTransformer,
    folder: str | os.PathLike[str],
    stage: str,
    encoder: TextEncoder | None = None,
) -> Path:
    """Write the adapters of a transformer, and of a text encoder, as peft does.

    Args:
        transformer: with adapters (`add_lora`).
        folder: where to; made, and what it holds of an adapter replaced.
        stage: "base" or "superres"; the file's header has it.
        encoder: with adapters (`with_text_lora`); they go into the folder ``text_encoder``.
    """
    folder = as_path(folder)
    if encoder is not None:
        _write(encoder.model, folder / TEXT, stage, encoder.name_in_hub)
    return _write(transformer, folder, stage, str)


def _write(module: nn.Module, folder: Path, stage: str, renamed: Callable[[str], str]) -> Path:
    tensors, layers = {}, set()
    for name, value in peft().get_peft_model_state_dict(module).items():
        layer, matrix, rest = name.partition(".lora_")
        layers.add(renamed(layer))
        tensors[f"{PREFIX}{renamed(layer)}{matrix}{rest}"] = value.detach().cpu().contiguous()
    config: Any = copy.copy(module.peft_config["default"])  # type: ignore[index]
    config.target_modules = layers
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
        if missing == [WEIGHTS] and (path / PICKLE).is_file():
            raise CheckpointError(
                f"{shown(str(path))} has its weights as a pickle, {PICKLE}, and not as {WEIGHTS}: "
                f"write that in the folder by python -c 'import torch, safetensors.torch as s; "
                f's.save_file(torch.load("{PICKLE}", weights_only=True), "{WEIGHTS}")\''
            )
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

    @classmethod
    def read_text(cls, folder: str | os.PathLike[str], encoder: TextEncoder) -> Lora | None:
        """The part of an adapter that is a text encoder's, by the names of its layers, if any.

        Raises:
            CheckpointError: damaged, or of another text encoder.
        """
        path = as_path(folder, "lora") / TEXT
        if not path.is_dir():
            return None
        read = cls.read(path)
        own = {encoder.name_in_hub(name): name for name in _linear(encoder.model)}
        state = {}
        for name, value in read.state.items():
            layer, matrix, rest = name.partition(".lora_")
            state[f"{own.get(layer, layer)}{matrix}{rest}"] = value
        found = replace(read, state=state)
        if (why := found.misfit(encoder.model)) is not None:
            raise CheckpointError(
                f"{shown(str(path))} is an adapter of another text encoder than {encoder.name!r}: "
                f"{why}"
            )
        return found

    def misfit(self, model: nn.Module) -> str | None:
        """Why the adapter cannot be one of this model; None if it can."""
        parts, layers = dict(model.named_modules()), self._layers
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
    def merge(self, model: nn.Module, weight: float = 1.0) -> dict[str, Tensor]:
        """Add the adapter to the weights, in place: ``W + weight * alpha / rank * B A``.

        Args:
            model: that it fits (`misfit`).
            weight: of the adapter; 1 is as trained, 0 nothing.

        Returns:
            the weights that were changed, by name, as they were before.
        """
        before, rooted = {}, self.config.get("use_rslora")
        for layer, (down, up) in self._layers.items():
            assert down is not None
            assert up is not None
            to = model.get_parameter(f"{layer}.weight")
            before[f"{layer}.weight"] = to.clone()
            scale = self.config["lora_alpha"] / (len(down) ** 0.5 if rooted else len(down))
            to += (weight * scale * (up.float() @ down.float())).to(to)
        return before

    @property
    def digest(self) -> str:
        """A short name of its values: 16 hexadecimal digits."""
        return digest_state(self.state, str(self.config["lora_alpha"]))[:16]
