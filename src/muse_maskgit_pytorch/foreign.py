"""Other people's tokenizers, and `load_tokenizer`, which reads any tokenizer by its name.

Three published formats hold one and the same network, the VQGAN of Esser et al. 2021 (arXiv
2012.09841), under other names and with small differences:

- diffusers: a `VQModel` folder (aMUSEd, Meissonic). The same network, other names.
- taming: a taming-transformers checkpoint, and what uses its layout (latent diffusion's VQ models).
- maskgit: the PyTorch port of MaskGIT's VQGAN (open-muse, TiTok). No attention, average pooling,
  convolutions without bias, nothing between encoder and codebook; where a block changes the
  width, its skip starts from the block's result, not from its input.

The names here are taming's, the others are renamed. The geometry is read off the weights and
checked against the configuration where there is one. Pixels are [-1, 1] to taming's networks and to
most of diffusers', [0, 1] to MaskGIT's and to those made for aMUSEd (``lookup_from_codebook``: its
pipeline and Meissonic's do not normalise); outside they are always [0, 1].

Nothing in a foreign file is executed: tensors are read by safetensors, or by torch with
``weights_only=True``, where other objects become empty dicts.

Verified with random weights, the published ones were not at hand: diffusers' layout against
diffusers' `VQModel`, taming's by its one-to-one correspondence with it, MaskGIT's against an
independent writing-down of the published architecture (tests).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import count, pairwise, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import FORMAT, CheckpointError, _build, _classes, find_file, load_tree
from .devices import exact
from .vqgan_vae import ImageTokenizer, Upsample

Family = Literal["diffusers", "taming", "maskgit"]
UNDERSTOOD = (
    "understood are this package's .safetensors, a diffusers VQModel folder, a taming-transformers "
    ".ckpt, and a MaskGIT-VQGAN in open-muse's layout"
)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, around a skip."""

    def __init__(self, width_in: int, width: int, groups: int, maskgit: bool):
        super().__init__()
        conv = partial(nn.Conv2d, bias=not maskgit)
        self.norm1, self.norm2 = _norm(width_in, groups), _norm(width, groups)
        self.conv1 = conv(width_in, width, 3, padding=1)
        self.conv2 = conv(width, width, 3, padding=1)
        self.nin_shortcut = None
        if width_in != width:
            self.nin_shortcut = conv(width if maskgit else width_in, width, 1)
        self.maskgit = maskgit

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(h if self.maskgit else x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all positions, one head, around a skip."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = _norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """3x3 convolution with stride 2 that pads at the right and at the bottom alone."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, attention after each where it has any, a change of size.

    ``widths``: channels before the first block and after each block.
    """

    def __init__(self, widths: Sequence[int], attention: bool, groups: int, maskgit: bool):
        super().__init__()
        self.block = nn.ModuleList(Block(a, b, groups, maskgit) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(Attention(width, groups) for width in widths[1:] if attention)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip_longest(self.block, self.attn, fillvalue=nn.Identity()):
            x = attend(block(x))
        return self.upsample(self.downsample(x))


class Half(nn.Module):
    """The encoder ("down") or the decoder ("up"); its levels count from the finest in both."""

    def __init__(
        self,
        conv_in: nn.Module,
        direction: Literal["down", "up"],
        levels: list[Level],
        mid: list[tuple[str, nn.Module]],
        norm_out: nn.Module,
        conv_out: nn.Module,
    ):
        super().__init__()
        self.conv_in, self.norm_out, self.conv_out = conv_in, norm_out, conv_out
        self.mid = nn.ModuleDict(OrderedDict(mid))
        self.direction = direction
        self.add_module(direction, nn.ModuleList(levels))

    def forward(self, x: Tensor) -> Tensor:
        levels, mid = list(self.get_submodule(self.direction).children()), self.mid.values()
        x = self.conv_in(x)
        for layer in [*levels, *mid] if self.direction == "down" else [*mid, *reversed(levels)]:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ForeignVQGAN(ImageTokenizer):
    """Another project's VQGAN, frozen. `load_tokenizer` makes it from a checkpoint.

    Args:
        family: whose it is: "diffusers", "taming" or "maskgit".
        channels: of each resolution, the finest first.
        blocks: residual blocks of a resolution in the encoder; the decoder has one more, but
            MaskGIT's as many.
        latent_channels: of the encoder's result and of the decoder's input.
        code_dim: width of a code.
        codebook_size: number of codes V.
        encoder_attention: whether a resolution has attention, for each.
        decoder_attention: likewise in the decoder, the finest first too.
        mid_attention: attention between the blocks of the middle.
        resample_conv: the resolution is changed by convolutions, not by pooling and repeating.
        stem: channels after the first convolution, those of the finest resolution by default.
        groups: of the group norms.
        signed: the network's pixels are in [-1, 1], not in [0, 1].

    Raises:
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        *,
        family: Family,
        channels: Sequence[int],
        blocks: int,
        latent_channels: int,
        code_dim: int,
        codebook_size: int,
        encoder_attention: Sequence[bool],
        decoder_attention: Sequence[bool],
        mid_attention: bool,
        resample_conv: bool = True,
        stem: int | None = None,
        groups: int = 32,
        signed: bool = True,
    ):
        super().__init__()
        maskgit = family == "maskgit"
        stem = channels[0] if stem is None else stem
        odd = [width for width in [stem, *channels] if width % groups]
        if odd:
            raise ValueError(f"channels {odd[0]} are not divisible by the norms' {groups} groups")
        if not len(channels) == len(encoder_attention) == len(decoder_attention):
            raise ValueError(
                f"channels {list(channels)}, encoder_attention and decoder_attention must have "
                "one entry for each resolution"
            )
        if maskgit and code_dim != latent_channels:
            raise ValueError(f"code_dim {code_dim} must equal latent_channels {latent_channels}")
        self.family, self.signed = family, signed
        self.codebook_size, self.factor = codebook_size, 2 ** (len(channels) - 1)
        top, last = channels[-1], len(channels) - 1

        def level(i: int, before: int, count: int, attention: Sequence[bool]) -> Level:
            return Level([before, *[channels[i]] * count], attention[i], groups, maskgit)

        def mid() -> list[tuple[str, nn.Module]]:
            made: list[tuple[str, nn.Module]] = [
                (f"block_{i}", Block(top, top, groups, maskgit))
                for i in range(1, (blocks if maskgit else 2) + 1)
            ]
            return made[:1] + [("attn_1", Attention(top, groups))] * mid_attention + made[1:]

        more = blocks if maskgit else blocks + 1
        before = [stem, *channels, top]
        down = [level(i, before[i], blocks, encoder_attention) for i in range(last + 1)]
        up = [level(i, before[i + 2], more, decoder_attention) for i in range(last + 1)]
        for i in range(last):
            pool = maskgit or not resample_conv
            down[i].downsample = nn.AvgPool2d(2) if pool else Downsample(channels[i])
            width = channels[i + 1]
            repeat = nn.Upsample(scale_factor=2.0)
            up[i + 1].upsample = Upsample(width, width) if resample_conv else repeat
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        conv_in = conv(3, stem, bias=not maskgit)
        conv_out = nn.Conv2d(top, latent_channels, 1) if maskgit else conv(top, latent_channels)
        self.encoder = Half(conv_in, "down", down, mid(), _norm(top, groups), conv_out)
        conv_in, conv_out = conv(latent_channels, top), conv(channels[0], 3)
        self.decoder = Half(conv_in, "up", up, mid(), _norm(channels[0], groups), conv_out)
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if not maskgit:
            self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
            self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codebook_size, code_dim)})
        self.requires_grad_(False)

    @torch.no_grad()
    def encode_to_ids(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Pixels in [0, 1] -> token ids in [0, V); in the weights' precision (`exact`).

        Raises:
            ValueError: not RGB, or a side not divisible by the factor.
        """
        self.check_images(images)
        with exact(images.device):
            z = self.quant_conv(self.encoder(images * 2 - 1 if self.signed else images)).float()
            rows = z.permute(0, 2, 3, 1).flatten(0, 2)
            codes = self._codes.float()
            # the nearest code, by each original's own arithmetic: rounding decides between equals
            if self.family == "diffusers":
                distance = torch.cdist(rows, codes)
            else:
                distance = (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * rows @ codes.T
            return distance.argmin(1).view(len(z), *z.shape[-2:])

    @torch.no_grad()
    def decode_from_ids(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Token ids -> pixels, clamped to [0, 1]."""
        codes = F.embedding(ids, self._codes).permute(0, 3, 1, 2).contiguous()
        pixels = self.decoder(self.post_quant_conv(codes))
        return (pixels / 2 + 0.5 if self.signed else pixels).clamp(0, 1)

    @property
    def _codes(self) -> Tensor:
        return self.get_parameter("quantize.embedding.weight")


# Any tokenizer by its name ----------------------------------------------------------------------

# What a folder or a hub repository may call its weights, the first that is there is read.
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.safetensors",
    "pytorch_model.bin",
    "last.ckpt",
    "checkpoints/last.ckpt",
)


def load_tokenizer(
    name: str | PathLike, device: torch.device | str | None = None
) -> ImageTokenizer:
    """Load an image tokenizer of this package or of another project, in eval mode.

    Args:
        name: one of

            - a ``.safetensors`` of this package: a tokenizer, or a MaskGit, whose tokenizer it is;
            - the same of a Muse, with its stage: ``path:base`` or ``path:superres``;
            - the name of a shipped model, with its stage: ``emoji:base``;
            - a folder: diffusers' ``VQModel``, taming's or MaskGIT-VQGAN's, perhaps with the
              part of it that is meant: ``path:vqvae``;
            - the file with the weights in such a folder, its configuration beside it;
            - a repository on the Hugging Face hub with any of these, perhaps with a subfolder or
              a file: ``amused/amused-256:vqvae``.
        device: where to put it, the CPU by default.

    Raises:
        CheckpointError: not found, damaged, or nothing that this package understands.
    """
    path, part = _find(str(name))
    tokenizer = _load_own(path, part) if _is_own(path) else _load_foreign(path, part)
    return tokenizer.to(device).eval()


def _find(name: str) -> tuple[Path, str | None]:
    """The file with the weights, and what of the name is left to choose a part of it."""
    whole = Path(name).exists() or ":" not in name
    stem, part = (name, "") if whole else name.rsplit(":", 1)
    folder = Path(stem, part)
    if Path(stem).is_dir():
        if folder.is_file():
            return folder, None
        found = [folder / weights for weights in WEIGHTS if (folder / weights).is_file()]
        found = found or sorted(folder.glob("*.ckpt"))[:2]
        if len(found) == 1 or (found and found[0].suffix != ".ckpt"):
            return found[0], None
        parts = sorted(f"{stem}:{p.parent.name}" for p in folder.glob("*/config.json"))
        raise CheckpointError(
            f"{folder} has no weights of a tokenizer, or several: name the file or the part"
            f"{f' ({parts})' if parts else ''}; {UNDERSTOOD}"
        )
    hub = not stem.startswith((".", "/", "~")) and stem.count("/") == 1
    if hub and not Path(stem).exists() and not stem.endswith((".safetensors", ".ckpt", ".bin")):
        return _download(stem, part)
    return find_file(stem), part or None


def _download(repository: str, part: str) -> tuple[Path, str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    candidates = [(f"{part}/{weights}".lstrip("/"), None) for weights in WEIGHTS]
    candidates = [(part, None)] if Path(part).suffix else candidates
    for file, rest in [*candidates, ("model.safetensors", part or None)]:
        try:
            path = Path(hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise CheckpointError(
                f"{repository} could not be had from the Hugging Face hub "
                f"({type(error).__name__}): check the name and the network"
            ) from error
        if not _is_own(path):
            config = str(Path(file).with_name("config.json"))
            with contextlib.suppress(EntryNotFoundError):  # what needs it says so
                hf_hub_download(repository, config)
        return path, rest
    raise CheckpointError(
        f"{repository}{part and ':'}{part} has no weights of a tokenizer on the Hugging Face hub, "
        f"or the hub is out of reach: name the subfolder or the file as owner/name:part; "
        f"{UNDERSTOOD}"
    )


def _is_own(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error})") from error


def _load_own(path: Path, part: str | None) -> ImageTokenizer:
    tree, kind = load_tree(path)
    known: dict[str, Any] = _classes(ImageTokenizer)
    if kind not in ("Muse", "MaskGit", *known):
        raise CheckpointError(f"{path} holds a {kind}, not a tokenizer or a model that has one")
    steps = ["vae"] if kind == "MaskGit" else []
    if kind == "Muse":
        stages = [stage for stage in ("base", "superres") if tree["config"].get(stage)]
        if part not in stages:
            raise CheckpointError(
                f"{path} holds a Muse, with a tokenizer in each stage: add :{' or :'.join(stages)}"
            )
        steps = [part, "vae"]
    elif part:
        raise CheckpointError(f"{path} holds a {kind} with one tokenizer: leave out ':{part}'")
    node: dict[str, Any] = {"kind": kind, "config": tree["config"]}
    for step in steps:
        node = node["config"][step]
    tokenizer = _build(known[node["kind"]], node["config"])
    prefix = "".join(f"{step}." for step in steps)
    state = {k.removeprefix(prefix): v for k, v in tree["state"].items() if k.startswith(prefix)}
    tokenizer._load_state(state, path)
    return tokenizer


# Foreign files ----------------------------------------------------------------------------------

# Other projects' names -> taming's.
RENAMED = [
    (r"\.upsample_conv\.", ".upsample.conv."),  # MaskGIT's; the rest is diffusers'
    (r"\.down_blocks\.", ".down."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),  # the second is its older name
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


class _Inert:
    """What stands for any class that a pickle names: called or built, an empty dict."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _read_state(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        unsafe = []
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":  # what torch writes since 1.6
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unsafe]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}): it is damaged, no "
            "checkpoint, or holds objects that would have to be executed, which is refused"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)  # Lightning's
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict (names and tensors); {UNDERSTOOD}")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _load_foreign(path: Path, part: str | None) -> ForeignVQGAN:
    if part:
        raise CheckpointError(f"{path} holds one tokenizer: leave out ':{part}'")
    state = {k: v for k, v in _read_state(path).items() if k.startswith(PARTS)}
    family = _family(state, path)
    state = _renamed(state)
    arguments = _geometry(state, path, family)
    if found := _read_config(path, family):
        file, config = found
        try:
            stated = _stated(config, family)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: {error} is missing or not supported in a {family} VQGAN"
            ) from error
        for name, value in stated.items():
            if value != arguments[name]:
                raise CheckpointError(
                    f"{file} says {name} {value}, the weights in {path.name} have "
                    f"{arguments[name]}: one of the two belongs to another model"
                )
        if family == "diffusers":
            arguments["groups"] = config.get("norm_num_groups", 32)
            arguments["signed"] = not config.get("lookup_from_codebook", False)
    try:
        tokenizer = ForeignVQGAN(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = tokenizer.state_dict()
    for name in sorted(own.keys() | state.keys()):
        there, here = (list(d[name].shape) if name in d else "missing" for d in (state, own))
        if there != here:
            raise CheckpointError(
                f"{path}: {name} is {there}, and would be {here} in a {family} VQGAN with the rest "
                "of these weights: the file is incomplete, or another kind of network"
            )
    tokenizer.load_state_dict(state)
    return tokenizer


def _family(state: dict[str, Tensor], path: Path) -> Family:
    if "quantize.embed.weight" in state:
        raise CheckpointError(
            f"{path} is a Gumbel VQGAN, which draws its ids instead of taking the nearest code; it "
            "is not supported: use one with a plain codebook"
        )
    if "quantize.embedding.weight" in state:
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
            return "diffusers"
        if "encoder.mid.0.conv1.weight" in state:
            return "maskgit"
        if "encoder.down.0.block.0.conv1.weight" in state:
            return "taming"
    known = "encoder.conv_in.weight" in state
    reason = "has no codebook (a continuous autoencoder?)" if known else "is of an unknown kind"
    raise CheckpointError(f"{path} {reason}; {UNDERSTOOD}")


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under taming's names."""
    top = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")}) - 1
    made = {}
    for name, value in state.items():
        # diffusers counts a decoder's levels from the coarsest, MaskGIT the middle's blocks from 0
        name = re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up.{top - int(m[1])}", name)
        name = re.sub(r"\.mid\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        attends = re.search(r"attn.*\.(q|k|v|proj_out)\.weight$", name)
        made[name] = value[..., None, None] if attends and value.ndim == 2 else value
    return made


def _geometry(state: dict[str, Tensor], path: Path, family: Family) -> dict[str, Any]:
    """The arguments of `ForeignVQGAN` that the weights determine."""

    def size(name: str, axis: int = 0) -> int:
        if name not in state:
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        return state[name].shape[axis]

    def number(pattern: str) -> int:
        return next(i for i in count() if pattern.format(i) not in state)

    levels = range(number("encoder.down.{}.block.0.conv1.weight"))
    return dict(
        family=family,
        channels=[size(f"encoder.down.{i}.block.0.conv1.weight") for i in levels],
        blocks=number("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=size("encoder.conv_out.weight"),
        code_dim=size("quantize.embedding.weight", 1),
        codebook_size=size("quantize.embedding.weight"),
        encoder_attention=[f"encoder.down.{i}.attn.0.norm.weight" in state for i in levels],
        decoder_attention=[f"decoder.up.{i}.attn.0.norm.weight" in state for i in levels],
        mid_attention="encoder.mid.attn_1.norm.weight" in state,
        resample_conv=len(levels) == 1 or "decoder.up.1.upsample.conv.weight" in state,
        stem=size("encoder.conv_in.weight"),
        signed=family != "maskgit",
    )


def _read_config(path: Path, family: Family) -> tuple[Path, dict[str, Any]] | None:
    """The configuration beside the weights; None where there is none and none is needed."""
    names = ["config.json"]
    if family == "taming":
        names = [f"{path.stem}.yaml", "model.yaml", "config.yaml", "configs/model.yaml"]
    files = [path.parent / name for name in names]
    if family == "taming" and path.parent.name == "checkpoints":  # as taming's training leaves it
        configs = path.parent.parent / "configs"
        files += [configs / "model.yaml", *sorted(configs.glob("*-project.yaml"), reverse=True)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if family != "diffusers":
            return None
        raise CheckpointError(
            f"{path.with_name('config.json')} is missing: the weights alone do not say how a "
            "diffusers VQModel normalises; put its config.json beside them"
        )
    try:
        if family != "taming":
            return file, dict(json.loads(file.read_text()))
        return file, dict(yaml.safe_load(file.read_text())["model"]["params"])
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not the configuration of a {family} VQGAN ({type(error).__name__}: {error})"
        ) from error


def _stated(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The arguments of `ForeignVQGAN` that a configuration states.

    Raises:
        KeyError: one is missing, or its value is not one that this network has.
    """
    c = config
    if family == "diffusers":
        for key, known in {"norm_type": ("group",), "act_fn": ("silu", "swish")}.items():
            if c.get(key, known[0]) not in known:
                raise KeyError(f"{key}: {c[key]}")
        down = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
        up = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
        return dict(
            channels=c["block_out_channels"],
            blocks=c["layers_per_block"],
            latent_channels=c["latent_channels"],
            code_dim=c.get("vq_embed_dim") or c["latent_channels"],
            codebook_size=c["num_vq_embeddings"],
            encoder_attention=[down[name] for name in c["down_block_types"]],
            decoder_attention=[up[name] for name in reversed(c["up_block_types"])],
            mid_attention=c.get("mid_block_add_attention", True),
        )
    if family == "maskgit":
        return dict(
            channels=[c["hidden_channels"] * mult for mult in c["channel_mult"]],
            blocks=c["num_res_blocks"],
            latent_channels=c["z_channels"],
            code_dim=c["quantized_embed_dim"],
            codebook_size=c["num_embeddings"],
        )
    d = c["ddconfig"]
    sizes = [d["resolution"] // 2**i for i in range(len(d["ch_mult"]))]
    return dict(
        channels=[d["ch"] * mult for mult in d["ch_mult"]],
        blocks=d["num_res_blocks"],
        latent_channels=d["z_channels"],
        code_dim=c["embed_dim"],
        codebook_size=c["n_embed"],
        encoder_attention=[size in d["attn_resolutions"] for size in sizes],
        decoder_attention=[size in d["attn_resolutions"] for size in sizes],
    )
