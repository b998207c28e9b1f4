"""Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626): words of a prompt scaled or replaced.

What a word does to a picture, it does through the cross-attention: position i takes up the value
v_j of each text token j with the share A_ij, and the map A says where each word acts. Both edits
change the maps, and nothing else of plain generation:

- *scaled*, a word's column of A is multiplied, the rest left as it is, not normalised again.
  Since ``sum_j (w_j A_ij) v_j = sum_j A_ij (w_j v_j)``, that is a factor on its values;
- *replaced*, the new prompt's picture is drawn beside the old one's with the same noise, and for
  the first steps it takes over the old one's maps: what is where stays, what it is changes. The
  maps of the self-attention stay each picture's own: taken over too, they did no good.

Both are done by hooks on the cross-attentions, which are gone when the pictures are drawn. A model
must not draw other pictures in another thread meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import SequenceMatcher
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .images import to_pil
from .layers import CrossAttention
from .maskgit import ImageSize, MaskGit
from .muse import Muse
from .provenance import row_wise
from .sampling import per_row
from .structures import SampleOptions, SampleStep
from .text import WORD, TextEncoder, get_text_encoder

Weights = Mapping[str, float]
Words = list[tuple[str, list[int]]]


def emphasise(
    muse: Muse,
    texts: Sequence[str] | str,
    weights: Weights | Sequence[Weights],
    *,
    negative_texts: Sequence[str] | str | None = None,
    seeds: int | Sequence[int] | None = None,
    base_options: SampleOptions | None = None,
    superres_options: SampleOptions | None = None,
    preset: str | None = None,
    image_size: ImageSize | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Draw pictures in which single words count for more, or for less.

    Args:
        muse: the model; both stages read the words so.
        texts: B prompts.
        weights: word or phrase -> factor of its attention: 1 is none, 0 takes the word away while
            its neighbours stay as they are, negative ones turn it round; the paper uses -2 to 2.
            One mapping for all texts, each of which must then have all of its words, or one each.
        negative_texts: as in calling the model, and so the following.
        seeds: one for each picture, or an integer s for s, s + 1, ...; None: random.
        base_options: sampling of the base.
        superres_options: sampling of the super-resolution.
        preset: named options of both.
        image_size: of the pictures.
        **arguments: further ones of `Muse.stages`: canvases, callback. Pictures drawn with these
            carry no record, as it would not say all.

    Returns:
        B pictures. Factors of 1 give those of calling the model.

    Raises:
        ValueError: a word that the text does not have, a factor that is no number.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    own = [dict(mapping) for mapping in per_row(weights, len(texts), "weights")]
    options = muse.seeded_options(len(texts), seeds, base_options, superres_options, preset)
    with _emphasised(muse, texts, own, image_size):
        images = muse.stages(
            texts,
            negative_texts=negative_texts,
            base_options=options["base"],
            superres_options=options.get("superres"),
            image_size=image_size,
            **arguments,
        )[-1]
    if arguments:
        return to_pil(images)
    edit = {"kind": "words", "weights": own}
    return muse.signed(images, texts, negative_texts, options, edit)


def replace_words(
    muse: Muse,
    source: Sequence[str] | str,
    target: Sequence[str] | str,
    *,
    cross_share: float = 0.5,
    weights: Weights | Sequence[Weights] | None = None,
    negative_texts: Sequence[str] | str | None = None,
    seeds: int | Sequence[int] | None = None,
    base_options: SampleOptions | None = None,
    superres_options: SampleOptions | None = None,
    preset: str | None = None,
    image_size: ImageSize | None = None,
) -> list[tuple[Image.Image, Image.Image]]:
    """Draw the pictures of some prompts, and of changed ones such that the rest stays.

    Words that both prompts have keep their maps, and a new word takes over the map of the one in
    whose place it stands. Words added beside the old ones have maps of their own, and those left
    out lose their share. This takes place in the base; a super-resolution draws each picture from
    what the base made of it.

    Args:
        muse: the model.
        source: B prompts.
        target: the changed prompts, in the same order.
        cross_share: share of the base's steps in which the maps are the source's, in [0, 1]. 0 has
            only the noise in common.
        weights: of words of the targets, as in `emphasise`.
        negative_texts: as in calling the model; they hold for source and target.
        seeds: one for each pair, or an integer s for s, s + 1, ...; None: random.
        base_options: sampling of the base.
        superres_options: sampling of the super-resolution.
        preset: named options of both, as in calling the model.
        image_size: of the pictures.

    Returns:
        B pairs (source, target). The source is what the model draws of it alone.

    Raises:
        ValueError: numbers of prompts that differ, a share outside of [0, 1], and what `emphasise`
            raises.
    """
    sources = [source] if isinstance(source, str) else list(source)
    targets = [target] if isinstance(target, str) else list(target)
    batch = len(sources)
    if batch != len(targets) or not batch:
        raise ValueError(f"{batch} source prompts and {len(targets)} targets: give pairs of them")
    if not 0 <= cross_share <= 1:
        raise ValueError(f"cross_share must be in [0, 1], not {cross_share}")
    negatives = [negative_texts] if isinstance(negative_texts, str) else negative_texts
    if negatives is not None and len(negatives) > 1:
        negatives = per_row(negatives, batch, "negative_texts") * 2
    scaled: list[Weights] = [{}] * batch
    scaled += [dict(mapping) for mapping in per_row(weights or {}, batch, "weights")]
    options = muse.seeded_options(batch, seeds, base_options, superres_options, preset)
    options = {stage: _twice(given, batch) for stage, given in options.items()}

    base_size = muse.superres.cond_pixels(image_size) if muse.superres else image_size
    tokens = math.prod(muse.base.grid(base_size))  # at least one is decided in each step
    timesteps = per_row(options["base"].timesteps, 2 * batch, "timesteps")[:batch]
    encoder = _encoder(muse, muse.base)
    maps = _SourceMaps(
        [
            _alignment(encoder.words(old, "windows"), encoder.words(new, "windows"))
            for old, new in zip(sources, targets, strict=True)
        ],
        [math.ceil(cross_share * min(steps, tokens)) for steps in timesteps],
    )
    with _emphasised(muse, sources + targets, scaled, image_size), maps.taken_over(muse.base):
        images = muse.stages(
            sources + targets,
            negative_texts=negatives,
            base_options=options["base"],
            superres_options=options.get("superres"),
            image_size=image_size,
            callback=maps.count,
        )[-1]
    edit = {"kind": "words", "cross_share": cross_share, "weights": scaled}
    pictures = muse.signed(images, sources + targets, negatives, options, edit)
    return list(zip(pictures[:batch], pictures[batch:], strict=True))


# Scaled words ---------------------------------------------------------------------------------


@contextmanager
def _emphasised(
    muse: Muse, texts: Sequence[str], weights: Sequence[Weights], image_size: ImageSize | None
) -> Iterator[None]:
    """In all stages, the words of rows 0 to B-1 count as much as the weights say."""
    models = [model for model in (muse.base, muse.superres) if model is not None and any(weights)]
    with ExitStack() as hooks:
        for model in models:
            encoder = _encoder(muse, model)
            factors = pad_sequence(
                [
                    _factors(encoder.words(text, "windows"), own, text)
                    for text, own in zip(texts, weights, strict=True)
                ],
                batch_first=True,
                padding_value=1.0,
            )
            # the null key and the low resolution stand before the text
            first = 1 + (0 if model.cond_vae is None else math.prod(model.cond_grid(image_size)))
            for cross in _cross_attentions(model):
                hook = cross.register_forward_pre_hook(partial(_scaled, factors, first))
                hooks.callback(hook.remove)
        yield


def _scaled(factors: Float[Tensor, "B L"], first: int, cross: Any, args: Any) -> Any:
    x, (keys, values), mask = args
    values, (batch, length) = values.clone(), factors.shape
    values[:batch, :, first : first + length] *= factors[:, None, :, None].to(values)
    return x, (keys, values), mask


def _factors(words: Words, weights: Weights, text: str) -> Float[Tensor, " L"]:
    """The factor of each token of a text."""
    factors = torch.ones(_length(words))
    written = [(word, places) for word, places in words if word and places]
    own = [word.casefold() for word, _ in written]
    for phrase, factor in weights.items():
        if not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise ValueError(f"the weight of {phrase!r} must be a finite number, not {factor}")
        wanted = [word.casefold() for word in WORD.findall(phrase)]
        starts = range(len(own) - len(wanted) + 1) if wanted else ()
        found = [i for i in starts if own[i : i + len(wanted)] == wanted]
        if not found:
            known = ", ".join(repr(word) for word, _ in written)
            raise ValueError(f"weights: {text!r} has no {phrase!r}; its words are {known}")
        for start in found:
            for _, places in written[start : start + len(wanted)]:
                factors[places] *= factor
    return factors


# Replaced words -------------------------------------------------------------------------------


class _SourceMaps:
    """The cross-attention maps of rows 0 to n-1, for rows n to 2n-1 of the same batch, at first.

    Args:
        alignments: of each pair (`_alignment`).
        until: for how many steps each pair's maps are taken over.
    """

    def __init__(self, alignments: Sequence[tuple[Tensor, Tensor]], until: Sequence[int]):
        rows, columns = (max(a.shape[side] for a, _ in alignments) for side in (0, 1))
        self.align = torch.zeros(len(until), rows, columns)
        self.added = torch.zeros(len(until), columns)
        for pair, (align, added) in enumerate(alignments):
            self.align[pair, : align.shape[0], : align.shape[1]] = align
            self.added[pair, : len(added)] = added
        self.until, self.done = until, 0

    def count(self, step: SampleStep) -> None:
        """The callback of sampling."""
        self.done = step.step

    @contextmanager
    def taken_over(self, model: nn.Module) -> Iterator[None]:
        """While drawing with a model without low resolution: its text begins at position 1."""
        with ExitStack() as hooks:
            for cross in _cross_attentions(model):
                hooks.callback(cross.register_forward_hook(self._hook).remove)
            yield

    def _hook(self, cross: CrossAttention, args: Any, output: Tensor) -> Tensor:
        x, (keys, values), mask = args
        pairs = [pair for pair, until in enumerate(self.until) if self.done < until]
        if not pairs:
            return output
        targets = [len(self.until) + pair for pair in pairs]
        sees = torch.arange(len(x))
        sees[targets] = torch.tensor(pairs)
        old, new = (slice(1, 1 + length) for length in self.align.shape[1:])
        moved, text = values.clone(), values[targets, :, new]
        moved[targets, :, old] = self.align[pairs, None].to(values) @ text
        output = cross.forward(x[sees], (keys[sees], moved), mask[sees])
        if (added := self.added[pairs]).any():
            own = torch.zeros_like(values)
            own[targets, :, new] = added[:, None, :, None].to(values) * text
            output = output + cross.forward(x, (keys, own), mask)
        return output


def _alignment(source: Words, target: Words) -> tuple[Float[Tensor, "Ls Lt"], Float[Tensor, " Lt"]]:
    """Where each token of the source passes its attention on to, and which of the target are added.

    A word that both have passes it on to itself, a replaced one to that in its place: token by
    token where they have as many, else to the mean of all. One that is left out loses it.
    """
    align, added = torch.zeros(_length(source), _length(target)), torch.zeros(_length(target))
    old, new = ([word.casefold() for word, _ in words] for words in (source, target))
    for _, *spans in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        i, j, k, l = spans
        left, right = [places for _, places in source[i:j]], [places for _, places in target[k:l]]
        if len(left) != len(right):  # not word by word
            left, right = [list(chain(*left))], [list(chain(*right))]
        for before, after in zip(left, right, strict=True):
            if not before:
                added[after] = 1
            elif len(before) == len(after):
                align[before, after] = 1
            elif after:
                align[torch.tensor(before)[:, None], torch.tensor(after)] = 1 / len(after)
    return align, added


# Both -----------------------------------------------------------------------------------------


def _cross_attentions(model: nn.Module) -> list[CrossAttention]:
    """Those of the transformer, and of its token critic, which reads the same text."""
    return [module for module in model.modules() if isinstance(module, CrossAttention)]


def _encoder(muse: Muse, model: MaskGit) -> TextEncoder:
    """The one whose states the model reads: a cascade asks the base's for both, if it can."""
    base, own = muse.base.transformer, model.transformer
    read = base if own.t5_name == base.t5_name else own
    return get_text_encoder(read.t5_name, read.max_text_len)


def _length(words: Words) -> int:
    return sum(len(places) for _, places in words)


def _twice(options: SampleOptions, batch: int) -> SampleOptions:
    """The same for the sources and the targets."""
    values = {name: getattr(options, name) for name in row_wise(SampleOptions)}
    many = {name: value for name, value in values.items() if isinstance(value, Sequence)}
    return options.replace(**{k: per_row(v, batch, k) * 2 for k, v in many.items()})
