"""Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626): words of a prompt scaled or replaced.

What a word does to a picture, it does through the cross-attention: position i takes up the value
v_j of each text token j with the share A_ij, and the map A says where each word acts. Both edits
change the maps, and nothing else of plain generation:

- *scaled*, a word's column of A is multiplied, the rest left as it is, not normalised again.
  Since ``sum_j (w_j A_ij) v_j = sum_j A_ij (w_j v_j)``, that is a factor on its values;
- *replaced*, the new prompt's picture is drawn along with the old one's, with the same noise, and
  for the first steps it takes over the old one's maps: what is where stays, what it is changes. The
  maps of the self-attention are not taken over: it did no good.

Both are done by a step of the sampler that changes the context before each pass (`sampling.Step`);
models are left alone, so other pictures may be drawn with them at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .arguments import real, shown
from .checkpoint import unwrapped
from .conditioning import check_texts
from .maskgit import MaskGit
from .muse import Muse
from .sampling import Denoiser, SamplePlan, SampleState, Step, per_row, step
from .text import WORD, ClassLabels, TextEncoder

Weights = Mapping[str, float]
Words = list[tuple[str, list[int]]]


def emphasise(
    muse: Muse,
    texts: Sequence[str] | str,
    weights: Weights | Sequence[Weights],
    *,
    callback: Any = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Draw pictures in which single words count for more, or for less.

    Args:
        muse: the model; both stages read the words this way.
        texts: B prompts.
        weights: word or phrase -> factor of its attention: 1 is none, 0 takes the word away while
            its neighbours stay as they are, negative ones invert it; the paper uses -2 to 2. One
            mapping for all texts, each of which must then have all of its words, or one each.
        callback: as in calling the model.
        **arguments: as in `Muse.request`. Pictures drawn with canvases carry no record, as it
            would not be complete.

    Returns:
        B pictures. Factors of 1 give those of calling the model.

    Raises:
        ValueError: a word that the text does not have, a factor that is not a number.
    """
    request = muse.request(texts, **arguments)
    if request.prompts is None:
        raise ValueError("emphasise works on texts, not on text_embeds")
    prompts = request.prompts
    by_row = _by_row(weights, len(prompts))
    steps = {
        name: Emphasis(_factors_of(muse, stage, prompts, by_row))
        for name, stage in muse.stages.items()
        if any(by_row)
    }
    drawn = muse.draw(request, callback, steps=steps)
    edit = None if request.canvases else {"kind": "words", "weights": by_row}
    return muse.pictures(replace(drawn, request=replace(request, edit=edit)))


def replace_words(
    muse: Muse,
    source: Sequence[str] | str,
    target: Sequence[str] | str,
    *,
    cross_share: float = 0.5,
    weights: Weights | Sequence[Weights] | None = None,
    callback: Any = None,
    **arguments: Any,
) -> list[tuple[Image.Image, Image.Image]]:
    """Draw the pictures of some prompts, and of changed ones such that the rest stays.

    Words that both prompts have keep their maps, and a new word takes over the map of the one that
    it replaces. Words added next to the old ones have maps of their own, and those left out lose
    their share. This takes place in the base; a super-resolution draws each picture from what the
    base made of it.

    Args:
        muse: the model.
        source: B prompts.
        target: the changed prompts, in the same order.
        cross_share: share of the base's steps in which the maps are the source's, in [0, 1]. At 0,
            both only have the noise in common.
        weights: of words of the targets, as in `emphasise`.
        callback: as in calling the model.
        **arguments: as in `Muse.request`, without canvases; negative texts and seeds hold for
            source and target.

    Returns:
        B pairs (source, target). The source is what the model draws of it alone.

    Raises:
        ValueError: numbers of prompts that differ, a share outside [0, 1], and what `emphasise`
            raises.
    """
    classes = muse.base.transformer.classes
    sources, targets = (check_texts(texts, classes=classes) for texts in (source, target))
    batch = len(sources)
    if batch != len(targets) or not batch:
        raise ValueError(f"{batch} source prompts and {len(targets)} targets: give pairs of them")
    cross_share = real("cross_share", cross_share, 0, 1)
    alone = muse.request(sources, **arguments)
    if alone.prompts is None or alone.canvases:
        raise ValueError("replace_words works on prompts alone, without text_embeds and canvases")
    request = replace(alone.take([*range(batch)] * 2), prompts=[*sources, *targets])
    prompts = request.prompts or []
    by_row: list[Weights] = [{}] * batch
    by_row += _by_row(weights or {}, batch)

    tokens = math.prod(muse.base.geometry.grid(muse.sizes(request.image_size)["base"]))
    timesteps = alone.options["base"].timesteps
    assert isinstance(timesteps, list)
    encoder = _encoder(muse, muse.base)
    factors = {
        name: _factors_of(muse, stage, prompts, by_row) for name, stage in muse.stages.items()
    }
    steps: dict[str, Step] = {name: Emphasis(given) for name, given in factors.items()}
    steps["base"] = SourceMaps(
        factors["base"],
        [
            _alignment(encoder.words(old, "windows"), encoder.words(new, "windows"))
            for old, new in zip(sources, targets, strict=True)
        ],
        # at least one token is decided in each step
        [math.ceil(cross_share * min(number, tokens)) for number in timesteps],
    )
    drawn = muse.draw(request, callback, steps=steps)
    edit = {"kind": "words", "cross_share": cross_share, "weights": by_row}
    pictures = muse.pictures(replace(drawn, request=replace(request, edit=edit)))
    return list(zip(pictures[:batch], pictures[batch:], strict=True))


# Scaled words ---------------------------------------------------------------------------------


class Emphasis:
    """A step in which the words of each row count as much as its factors say.

    Args:
        factors: of the text's tokens, from the first; the values of the conditional branch are
            multiplied by them.
    """

    def __init__(self, factors: Float[Tensor, "B L"]):
        self.factors = factors

    def __call__(
        self, state: SampleState, plan: SamplePlan, denoiser: Denoiser, **how: Any
    ) -> SampleState:
        context = self.changed(denoiser.context, state)
        critic = denoiser.critic and self.changed(denoiser.critic_context, state)
        # all rows at once: some may look where others do
        denoiser = replace(denoiser, context=context, critic_context=critic, at_once=None)
        return step(state, plan, denoiser, **how)

    def changed(self, context: Any, state: SampleState) -> Any:
        """What the next pass attends to."""
        values = [value.clone() for value in context.text_values]
        for value in values:
            value[0, :, :, : self.factors.shape[1]] *= self.factors[:, None, :, None].to(value)
        return context.with_text_values(values)


def _by_row(weights: Weights | Sequence[Weights], batch: int) -> list[Weights]:
    given = per_row(weights, batch, "weights")
    for mapping in given:
        if not isinstance(mapping, Mapping):
            raise ValueError(f"weights must be a mapping of words to factors, not {shown(mapping)}")
    return [{str(word): real(f"the weight of {word!r}", n) for word, n in g.items()} for g in given]


def _factors_of(
    muse: Muse, stage: MaskGit, texts: Sequence[str], weights: Sequence[Weights]
) -> Float[Tensor, "B L"]:
    """The factors of the texts' tokens, as the stage reads them."""
    encoder = _encoder(muse, stage)
    rows = [
        _factors(encoder.words(text, "windows"), by_word, text)
        for text, by_word in zip(texts, weights, strict=True)
    ]
    return pad_sequence(rows, batch_first=True, padding_value=1.0)


def _factors(words: Words, weights: Weights, text: str) -> Float[Tensor, " L"]:
    """The factor of each token of a text."""
    factors = torch.ones(_length(words))
    written = [(word, places) for word, places in words if word and places]
    names = [word.casefold() for word, _ in written]
    for phrase, factor in weights.items():
        wanted = [word.casefold() for word in WORD.findall(phrase)]
        starts = range(len(names) - len(wanted) + 1) if wanted else ()
        found = [i for i in starts if names[i : i + len(wanted)] == wanted]
        if not found:
            known = ", ".join(repr(word) for word, _ in written)
            raise ValueError(f"weights: {text!r} has no {phrase!r}; its words are {known}")
        for start in found:
            for _, places in written[start : start + len(wanted)]:
                factors[places] *= factor
    return factors


# Replaced words -------------------------------------------------------------------------------


class SourceMaps(Emphasis):
    """A step in which rows n to 2n-1 attend with the maps of rows 0 to n-1, at first.

    Args:
        factors: as in `Emphasis`.
        alignments: of each pair (`_alignment`).
        until: for how many steps each pair's maps are taken over.
    """

    def __init__(
        self,
        factors: Float[Tensor, "B L"],
        alignments: Sequence[tuple[Tensor, Tensor]],
        until: Sequence[int],
    ):
        super().__init__(factors)
        rows, columns = (max(a.shape[side] for a, _ in alignments) for side in (0, 1))
        self.align = torch.zeros(len(until), rows, columns)
        self.added = torch.zeros(len(until), columns)
        for pair, (align, added) in enumerate(alignments):
            self.align[pair, : align.shape[0], : align.shape[1]] = align
            self.added[pair, : len(added)] = added
        self.until = torch.tensor(until)

    def changed(self, context: Any, state: SampleState) -> Any:
        context = super().changed(context, state)
        [pairs] = (state.step[: len(self.until)].cpu() < self.until).nonzero(as_tuple=True)
        if len(pairs) == 0:
            return context
        targets = len(self.until) + pairs
        old, new = (slice(length) for length in self.align.shape[1:])
        borrowed, added = [], []
        for values in context.text_values:
            text = values[0, targets][:, :, new]
            moved, extra = values.clone(), torch.zeros_like(values)
            moved[0, targets, :, old] = self.align[pairs, None].to(values) @ text
            extra[0, targets, :, new] = self.added[pairs, None, :, None].to(values) * text
            borrowed.append(moved)
            added.append(extra)
        sees = torch.arange(borrowed[0][..., 0, 0, 0].numel(), device=borrowed[0].device)
        sees[targets] = pairs.to(sees)
        return context.with_text_values(borrowed, sees, added if self.added[pairs].any() else ())


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


def _encoder(muse: Muse, model: MaskGit) -> TextEncoder | ClassLabels:
    """The one whose states the model reads: a cascade uses the base's for both if it can."""
    base, read = muse.base.transformer, model.transformer
    if not unwrapped(read).weighs_words:
        raise ValueError(
            "words are edited in transformers that say how they attend to them (weighs_words): a "
            f"{type(unwrapped(read)).__name__} does not"
        )
    read = base if read.text_encoder == base.text_encoder else read
    return read.text_reader()


def _length(words: Words) -> int:
    return sum(len(places) for _, places in words)
