"""Families of text encoders: our states are those of plain transformers code.

Each is made with tiny random weights and saved as on the hub.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from muse_maskgit_pytorch import TextEncoder, linears
from muse_maskgit_pytorch.text import embed_dim

TEXTS = ["a red car", "", "two cats in the rain, far away"]
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
VISION = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def letters(folder: Path, start: str | None = None, end: str | None = None, **settings: Any) -> int:
    """A tokenizer of bytes, with special tokens around a text where they are given.

    Returns:
        size of its vocabulary; the padding has number 0, the start 1 and the end 2.
    """
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "▁", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    reader = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    around = " ".join(filter(None, [start, "$A", end]))
    special = [(name, names.index(name)) for name in (start, end) if name]
    reader.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", **settings
    ).save_pretrained(folder)
    return len(names)


def save(model_class: Any, config: Any, folder: Path, **settings: Any) -> None:
    model = model_class(config)
    with torch.no_grad():  # large enough to tell inputs apart, and norms that are not all ones
        for value in model.parameters():
            std = 0.1 if value.ndim < 2 else value.shape[-1] ** -0.5
            value.add_(torch.randn_like(value), alpha=std)
    model.save_pretrained(folder, **settings)


def plain(model_class: Any, folder: Path, **settings: Any) -> list[torch.Tensor]:
    """The states of each text's tokens, as transformers' documentation computes them."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = model_class.from_pretrained(folder).float().eval()
    found = []
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt", **settings)
        with torch.no_grad():
            states = model(**tokens).last_hidden_state[0]
        found.append(states[: len(tokenizer(text)["input_ids"])])
    return found


def t5(folder: Path, kind: str = "T5", **changes: Any) -> list[torch.Tensor]:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=261)
    settings = {name: changes.pop(name) for name in ("max_shard_size",) if name in changes}
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    save(getattr(transformers, f"{kind}ForConditionalGeneration"), config, folder, **settings)
    letters(folder, end="<eos>")
    return plain(getattr(transformers, f"{kind}EncoderModel"), folder)


def t5_1_1(folder: Path) -> list[torch.Tensor]:
    """Flan's is the same."""
    return t5(folder, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def ul2(folder: Path) -> list[torch.Tensor]:
    return t5(folder, feed_forward_proj="gated-silu", tie_word_embeddings=False)


def xxl_in_shards(folder: Path) -> list[torch.Tensor]:
    """As large ones are saved: an index, and several files."""
    found = t5(folder, feed_forward_proj="gated-gelu", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return found


def umt5(folder: Path) -> list[torch.Tensor]:
    return t5(folder, "UMT5", feed_forward_proj="gated-gelu")


def byt5(folder: Path) -> list[torch.Tensor]:
    """It reads bytes, by a tokenizer without a ``tokenizer.json``."""
    t5(folder, feed_forward_proj="gated-gelu", vocab_size=384)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return plain(transformers.T5EncoderModel, folder)


def clip(folder: Path) -> list[torch.Tensor]:
    size = letters(folder, "<bos>", "<eos>")
    text = dict(SIZE, vocab_size=size, max_position_embeddings=40, bos_token_id=1, eos_token_id=2)
    vision = dict(VISION, image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    save(transformers.CLIPModel, config, folder)
    return plain(transformers.CLIPTextModel, folder)


def clip_with_projection(folder: Path) -> list[torch.Tensor]:
    """The text encoder alone, as in diffusers' folders."""
    size = letters(folder, "<bos>", "<eos>")
    text = dict(SIZE, vocab_size=size, max_position_embeddings=40, bos_token_id=1, eos_token_id=2)
    config_class: Any = transformers.CLIPTextConfig
    config = config_class(**text, projection_dim=8)
    save(transformers.CLIPTextModelWithProjection, config, folder)
    return plain(transformers.CLIPTextModelWithProjection, folder)


def siglip(folder: Path, kind: str = "Siglip", **vision: Any) -> list[torch.Tensor]:
    """It learnt from texts padded to its full length, and attends to the padding.

    SigLIP 2 of a fixed resolution is of this type, too.
    """
    size = letters(folder, end="<eos>", model_input_names=["input_ids"])
    text = dict(SIZE, vocab_size=size, max_position_embeddings=40, projection_size=32)
    text |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, f"{kind}Config")
    made = config(text_config=text, vision_config=VISION | vision)
    save(getattr(transformers, f"{kind}Model"), made, folder)
    whole = dict(padding="max_length", max_length=40, truncation=True)
    return plain(getattr(transformers, f"{kind}TextModel"), folder, **whole)


def siglip_fixed(folder: Path) -> list[torch.Tensor]:
    return siglip(folder, image_size=8, patch_size=4)


def siglip_2(folder: Path) -> list[torch.Tensor]:
    return siglip(folder, "Siglip2", num_patches=4, patch_size=4)


def decoder(folder: Path, kind: str, start: str | None, **changes: Any) -> list[torch.Tensor]:
    """Weights are in bfloat16, texts padded on the left."""
    size = letters(folder, start, padding_side="left")
    sizes = SIZE | dict(num_key_value_heads=2, head_dim=8, vocab_size=size, pad_token_id=0)
    sizes |= dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=512)
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        save(getattr(transformers, f"{kind}ForCausalLM"), config, folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return plain(transformers.AutoModel, folder) if start else []


def gemma_2(folder: Path) -> list[torch.Tensor]:
    return decoder(folder, "Gemma2", "<bos>", sliding_window=6)


def gemma_3(folder: Path) -> list[torch.Tensor]:
    """A decoder that sees pictures, too."""
    size = letters(folder, "<bos>", padding_side="left")
    text = SIZE | dict(num_key_value_heads=2, head_dim=8, vocab_size=size, pad_token_id=0)
    text |= dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=512)
    vision = dict(VISION, image_size=8, patch_size=4)
    tokens = dict(boi_token_index=5, eoi_token_index=6, image_token_index=7)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    save(transformers.Gemma3ForConditionalGeneration, config, folder)
    return plain(transformers.AutoModel, folder)


def qwen_3(folder: Path) -> list[torch.Tensor]:
    return decoder(folder, "Qwen3", "<bos>")


FAMILIES: dict[str, Callable[[Path], list[torch.Tensor]]] = {
    each.__name__: each
    for each in (
        t5, t5_1_1, ul2, xxl_in_shards, umt5, byt5, clip, clip_with_projection, siglip_fixed,
        siglip_2, gemma_2, gemma_3, qwen_3,
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[TextEncoder, list[torch.Tensor]]:
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = FAMILIES[request.param](folder)
    return TextEncoder(str(folder)), expected


def test_states_are_transformers(family):
    encoder, expected = family
    found = encoder.encode(TEXTS)
    assert found.embeds.shape[-1] == embed_dim(encoder.name) == 32
    for states, mask, theirs in zip(found.embeds, found.mask, expected, strict=True):
        assert mask.sum() == len(theirs)
        torch.testing.assert_close(states[mask], theirs, atol=2e-5, rtol=1e-4)
    assert found.embeds.isfinite().all()


def test_a_family_in_bfloat16(family, monkeypatch):
    monkeypatch.setattr(linears, "available", lambda _: ["float32", "bfloat16"])
    encoder, _ = family
    plain, low = encoder.encode(TEXTS), encoder.at("bfloat16").encode(TEXTS)
    ours, theirs = low.embeds[low.mask], plain.embeds[plain.mask]
    assert low.embeds.dtype == torch.float32
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_layers_have_their_names_in_the_hub(family):
    """An adapter's file says them."""
    encoder, _ = family
    whole = transformers.AutoModel.from_pretrained(encoder.name)
    whole = getattr(whole, "text_model", whole)  # which transformers loads alone
    layers = {n: part for n, part in encoder.model.named_modules() if type(part) is torch.nn.Linear}
    assert layers
    for name, layer in layers.items():
        theirs = whole.get_submodule(encoder.name_in_hub(name))
        assert torch.equal(layer.weight, theirs.weight.float())


def test_a_text_without_any_token(tmp_path: Path):
    """Qwen's tokenizer puts nothing around a text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder(tmp_path, "Qwen2", None)
    encoder = TextEncoder(str(tmp_path))
    for texts in ([""], ["", "a cat"]):
        found = encoder.encode(texts)
        assert not found.mask[0].any()
        assert found.embeds.isfinite().all()
    assert found.mask[1].sum() == 5
