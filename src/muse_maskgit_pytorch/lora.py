"""Low-rank adapters (LoRA, Hu et al. 2021) on a transformer, trained and stored by peft.

An adapter is a folder in peft's format (``adapter_config.json`` and ``adapter_model.safetensors``),
which peft reads too. It is trained beside the weights, which stay as they are, and drawn with by
adding it to them: a picture costs no more than without. One of the text encoder, trained together
with it, is the folder ``text_encoder`` in it.

The file of diffusers' training scripts, such as aMUSEd's, holds both: matrices named
``transformer.LAYER.lora_A.weight`` and ``text_encoder.LAYER.lora_A.weight``. It is read as well,
and written by `Lora.export`.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .arguments import as_path, real, shown, whole
from .files import digest_state, replacing
from .foreign.pipeline import LAYERS, POINTWISE
from .text import TextEncoder
from .transformer import MaskedTransformer
from .weights import CheckpointError, is_finite, reading, safetensors_file

PREFIX = "base_model.model."  # of the names in peft's files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # what older releases of peft wrote
TEXT = "text_encoder"  # the folder of its part
DIFFUSERS = "pytorch_lora_weights.safetensors"  # its file, with the parts "transformer" and TEXT
METADATA = "lora_adapter_metadata"  # what newer releases of it say there of alpha
ALIASES = {"unet": "transformer"}  # what Meissonic's training script calls it
COMPILED = "_orig_mod."  # before a layer's name: what torch.compile adds there
# Matrices as peft names them, and as older releases of diffusers did.
MATRIX = re.compile(r"(.+)\.lora(?:_linear_layer)?[._](A|B|down|up)\.weight")
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
        path: its folder, or its file.
        config: what its configuration says; ``lora_alpha`` None: the rank of each layer.
        state: matrices A and B, and perhaps alpha, by the names of the transformer's layers.
        stage: that it says it was trained for; "" if it does not say.
        text: the part that is the text encoder's, by the hub's names of its layers, if any.
    """

    path: Path
    config: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)
    stage: str = ""
    text: Lora | None = None

    @classmethod
    def read(cls, place: str | os.PathLike[str]) -> Lora:
        """Read a folder in peft's format, or the file of one of diffusers' training scripts.

        Raises:
            CheckpointError: missing, damaged, or an adapter of another kind.
        """
        path = as_path(place, "lora")
        path = path.parent if path.name == DIFFUSERS else path
        file = path / DIFFUSERS if path.is_dir() else path
        if file.is_file() and not (path / CONFIG).is_file():
            return cls._of_diffusers(path, file)
        read = cls._of_peft(path)
        text = cls._of_peft(path / TEXT) if (path / TEXT).is_dir() else None
        return replace(read, text=text)

    @classmethod
    def _of_peft(cls, path: Path) -> Lora:
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing == [WEIGHTS] and (path / PICKLE).is_file():
            raise _a_pickle(path / PICKLE, WEIGHTS)
        if missing == [CONFIG, WEIGHTS] and (path / DIFFUSERS).with_suffix(".bin").is_file():
            raise _a_pickle((path / DIFFUSERS).with_suffix(".bin"), DIFFUSERS)
        if missing:
            raise CheckpointError(
                f"{shown(str(path))} is no adapter: it has no {missing[0]} (a folder that muse "
                f"train wrote, or peft), and no {DIFFUSERS} (diffusers)"
            )
        with reading(path / CONFIG):
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict) or config.get("peft_type") != "LORA":
                raise ValueError("it must be an adapter of peft's type LORA")
            _check(config)
            real("lora_alpha", config.get("lora_alpha"))
        with reading(path / WEIGHTS), safetensors_file(path / WEIGHTS) as file:
            values = _values(file)
            stage = str((file.metadata() or {}).get("stage", ""))
        return cls(path, config, {n.removeprefix(PREFIX): v for n, v in values.items()}, stage)

    @classmethod
    def _of_diffusers(cls, path: Path, file: Path) -> Lora:
        parts: dict[str, dict[str, Tensor]] = {"transformer": {}, TEXT: {}}
        made = {}
        with reading(file):
            with safetensors_file(file) as opened:
                values = _values(opened)
                said = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
            for name, value in values.items():
                part, _, rest = name.partition(".")
                part = ALIASES.get(part, part)
                rest = rest.removeprefix(COMPILED)
                matrix = MATRIX.fullmatch(rest)
                if part not in parts or not (matrix or rest.endswith(".alpha")):
                    raise ValueError(
                        f"{shown(name, 120)} is not known here: read are weights such as "
                        f"transformer.LAYER.lora_A.weight and {TEXT}.LAYER.lora_A.weight"
                    )
                if matrix:
                    rest = f"{matrix[1]}.lora_{'A' if matrix[2] in ('A', 'down') else 'B'}.weight"
                elif value.numel() != 1:
                    raise ValueError(f"{shown(name, 120)} must be one number")
                parts[part][rest] = value
            for part, state in parts.items():
                told = {k.removeprefix(f"{part}."): v for k, v in dict(said).items()}
                _check(told)
                alpha = told.get("lora_alpha")
                alpha = None if alpha is None else real("lora_alpha", alpha)
                made[part] = cls(path, {**told, "lora_alpha": alpha}, state)
        return replace(made["transformer"], text=made[TEXT] if made[TEXT].state else None)

    def named_for(self, encoder: TextEncoder) -> Lora:
        """The part of a text encoder (`text`), by the names of the layers of this one.

        Raises:
            CheckpointError: it is of another text encoder.
        """
        own = {encoder.name_in_hub(name): name for name in _linear(encoder.model)}
        state = {}
        for name, value in self.state.items():
            layer, dot, rest = _split(name)
            state[f"{own.get(layer, layer)}{dot}{rest}"] = value
        found = replace(self, state=state)
        if (why := found.misfit(encoder.model)) is not None:
            raise CheckpointError(
                f"{shown(str(self.path))} is an adapter of another text encoder than "
                f"{encoder.name!r}: {why}"
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
        """A and B of each layer; those of a 1 x 1 convolution are matrices, too."""
        state = {n: v.flatten(1) if v.shape[2:] == (1, 1) else v for n, v in self.state.items()}
        return {
            name: (state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight"))
            for name in sorted({_split(name)[0] for name in state})
        }

    def _scale(self, layer: str, rank: int) -> float:
        """What a layer's product B A counts."""
        alpha = self.state.get(f"{layer}.alpha", self.config["lora_alpha"])
        return float(rank if alpha is None else alpha) / (
            rank**0.5 if self.config.get("use_rslora") else rank
        )

    @torch.no_grad()
    def merge(self, model: nn.Module, weight: float = 1.0) -> dict[str, Tensor]:
        """Add the adapter to the weights, in place: ``W + weight * alpha / rank * B A``.

        Args:
            model: that it fits (`misfit`).
            weight: of the adapter; 1 is as trained, 0 nothing.

        Returns:
            the weights that were changed, by name, as they were before.
        """
        before = {}
        for layer, (down, up) in self._layers.items():
            assert down is not None
            assert up is not None
            to = model.get_parameter(f"{layer}.weight")
            before[f"{layer}.weight"] = to.clone()
            to += (weight * self._scale(layer, len(down)) * (up.float() @ down.float())).to(to)
        return before

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Write it as diffusers reads it, with alpha in the matrices B, since not all files say it.

        Args:
            folder: where to put ``pytorch_lora_weights.safetensors``; made if need be.

        Returns:
            the file.

        Raises:
            ValueError: an adapter of another transformer than aMUSEd's, which diffusers has.
        """
        if others := [name for name in self._layers if name.partition(".")[0] not in LAYERS]:
            raise ValueError(
                f"{shown(others[0], 120)} is no layer of aMUSEd's transformer: diffusers has none "
                "that this adapter could be loaded into"
            )
        tensors = {}
        parts = {"transformer": self} | ({TEXT: self.text} if self.text else {})
        for part, adapter in parts.items():
            for layer, (down, up) in adapter._layers.items():
                if down is None or up is None:
                    raise CheckpointError(f"{shown(layer, 120)} lacks one of A and B")
                matrices = {"A": down, "B": up * adapter._scale(layer, len(down))}
                for letter, matrix in matrices.items():
                    if f"{layer}.weight" in POINTWISE:  # a convolution there
                        matrix = matrix[..., None, None]
                    tensors[f"{part}.{layer}.lora_{letter}.weight"] = matrix.contiguous()
        with replacing(as_path(folder) / DIFFUSERS) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        return as_path(folder) / DIFFUSERS

    @property
    def digest(self) -> str:
        """A short name of its values: 16 hexadecimal digits."""
        return digest_state(self.state, str(self.config["lora_alpha"]))[:16]


def _split(name: str) -> tuple[str, str, str]:
    """A weight's name as its layer, a mark and the rest."""
    layer, mark, rest = name.rpartition(".alpha" if name.endswith(".alpha") else ".lora_")
    return (layer, mark, rest) if mark else (name, "", "")


def _values(file: Any) -> dict[str, Tensor]:
    """All tensors of an opened file.

    Raises:
        ValueError: there are none, or they are not finite.
    """
    values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not values or not all(map(is_finite, values.values())):
        raise ValueError("it must hold finite numbers")
    return values


def _check(config: dict[str, Any]) -> None:
    if more := [name for name in UNREAD if config.get(name)]:
        raise ValueError(f"adapters with {more[0]} are not read")


def _a_pickle(pickle: Path, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(str(pickle.parent))} has its weights as a pickle, {pickle.name}, and not as "
        f"{wanted}: write that in the folder by python -c 'import torch, safetensors.torch as s; "
        f's.save_file(torch.load("{pickle.name}", weights_only=True), "{wanted}")\''
    )
