"""The text encoder that a Python package carries, all-MiniLM-L6-v2, without transformers.

It is a BERT (Devlin et al. 2018, arXiv 1810.04805) of six layers (Wang et al. 2020, arXiv
2002.10957). Importing transformers takes longer than drawing a picture; this gives the same hidden
states, bit for bit on a CPU (tests).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn

from .weights import unfilled

# What the parts of a layer are called in the file.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attended": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


class Layer(nn.Module):
    """Attention, then an MLP; the norm follows each residual sum."""

    def __init__(self, dim: int, heads: int, inner: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.attended, self.norm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)

    def forward(
        self, x: Float[Tensor, "B L E"], mask: Bool[Tensor, "B 1 L L"] | None
    ) -> Float[Tensor, "B L E"]:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attended(self.out(attended.transpose(1, 2).flatten(2)) + x)
        return self.norm(self.down(F.gelu(self.up(x))) + x)


class MiniLM(nn.Module):
    """Token ids -> hidden states; called as transformers' `BertModel` is.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
    """

    def __init__(self, folder: Path):
        super().__init__()
        sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dim, eps = sizes["hidden_size"], sizes["layer_norm_eps"]
        with torch.device("meta"), unfilled():
            self.word = nn.Embedding(sizes["vocab_size"], dim)
            self.position = nn.Embedding(sizes["max_position_embeddings"], dim)
            self.kind = nn.Embedding(sizes["type_vocab_size"], dim)
            self.norm = nn.LayerNorm(dim, eps)
            self.layers = nn.ModuleList(
                Layer(dim, sizes["num_attention_heads"], sizes["intermediate_size"], eps)
                for _ in range(sizes["num_hidden_layers"])
            )
        # the file stays mapped into memory: of the vocabulary only the rows in use are read
        given = load_file(folder / "model.safetensors")
        self.load_state_dict(
            {name: given[_in_file(name)] for name in self.state_dict()}, assign=True
        )

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
    ) -> SimpleNamespace:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        kinds = torch.zeros_like(input_ids)  # a single text is of the first kind
        x = self.norm(self.word(input_ids) + self.kind(kinds) + self.position(places))
        mask = None
        if not attention_mask.all():
            length = input_ids.shape[1]
            mask = attention_mask.bool()[:, None, None].expand(-1, 1, length, -1)
        for layer in self.layers:
            x = layer(x, mask)
        return SimpleNamespace(last_hidden_state=x)


def name_in_hub(layer: str) -> str:
    """What transformers' `BertModel` calls a layer."""
    return _in_file(f"{layer}.weight").removesuffix(".weight")


def _in_file(name: str) -> str:
    first, _, rest = name.partition(".")
    if first == "layers":
        number, part, kind = rest.split(".")
        return f"encoder.layer.{number}.{PARTS[part]}.{kind}"
    if first == "norm":
        return f"embeddings.LayerNorm.{rest}"
    table = {"word": "word", "position": "position", "kind": "token_type"}[first]
    return f"embeddings.{table}_embeddings.{rest}"


class Tokens(dict[str, Any]):
    """What `Reader` gives."""

    encodings: list[Encoding]

    def tokens(self) -> list[str]:
        return self.encodings[0].tokens

    def sequence_ids(self) -> list[int | None]:
        return self.encodings[0].sequence_ids


class Reader:
    """Texts -> token ids; called as transformers' fast tokenizers are, as far as is needed here.

    Args:
        folder: with ``tokenizer.json``.
    """

    is_fast = True
    pad_token, eos_token_id = "[PAD]", None

    def __init__(self, folder: Path):
        self.backend: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pad_token_id = self.backend.token_to_id(self.pad_token)
        self.unk_token_id = self.backend.token_to_id("[UNK]")

    def __call__(
        self,
        texts: str | list[str],
        *,
        max_length: int | None = None,
        **more: Any,
    ) -> Tokens:
        """A text's tokens, or those of several.

        Args:
            texts: one or several.
            max_length: what is beyond is cut; None: nothing.
            **more: what transformers' tokenizers must be asked for, and this always does.
        """
        self.backend.no_padding()
        self.backend.no_truncation()
        if max_length is not None:
            self.backend.enable_truncation(max_length)
        single = isinstance(texts, str)
        found = self.backend.encode_batch([texts] if single else texts)
        lists = {
            "input_ids": [each.ids for each in found],
            "offset_mapping": [each.offsets for each in found],
        }
        tokens = Tokens({name: of[0] if single else of for name, of in lists.items()})
        tokens.encodings = found
        return tokens
