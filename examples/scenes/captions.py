"""Captions of scenes: a small grammar with several words and sentence forms for each fact.

Most choices have forms that training uses and forms that it never sees (`Forms.held`), so that it
can be asked whether a model understands a sentence or knows it by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Draw(Protocol):
    """Where choices come from."""

    def one(self, among: Sequence[T]) -> T:
        """One of them, all alike."""
        ...


@dataclass(frozen=True)
class Forms:
    """Ways to say the same.

    Attributes:
        seen: those that training uses; one that stands twice comes twice as often.
        held: those that it never sees.
    """

    seen: tuple[str, ...]
    held: tuple[str, ...] = ()


NUMBERS = {2: ("two", "two", "2"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
SIZES = {
    "big": Forms(("big", "big", "large"), ("huge",)),
    "small": Forms(("small", "small", "little"), ("tiny",)),
}
TONES = ("with {tone} skin tone", "with {tone} skin tone", "with {tone} skin")
STYLES = {"3D": ("3D", "3D", "three-dimensional"), "flat": ("flat", "flat", "2D")}
# By kind, and whether the second is named first.
RELATIONS = {
    ("left of", False): Forms(("left of", "to the left of"), ("on the left side of",)),
    ("left of", True): Forms(("right of", "to the right of"), ("on the right side of",)),
    ("above", False): Forms(("above", "above", "over"), ("higher up than",)),
    ("above", True): Forms(("below", "below", "under", "beneath"), ("lower down than",)),
    ("in front of", False): Forms(("in front of",)),
    ("in front of", True): Forms(("behind",)),
}
LISTS = {
    1: Forms(("{0}",)),
    2: Forms(("{0} and {1}",), ("{0} together with {1}",)),
    3: Forms(("{0}, {1} and {2}", "{0}, {1}, {2}"), ("{0} together with {1} and {2}",)),
    4: Forms(
        ("{0}, {1}, {2} and {3}", "{0}, {1}, {2}, {3}"), ("{0} and {1} together with {2} and {3}",)
    ),
}
RELATED = Forms(
    ("{0} {relation} {1}", "{0} {relation} {1}", "{0} that {is} {relation} {1}"),
    ("{1} with {0} {relation} {it}",),
)
PLAIN = Forms(
    ("on a {0} background", "on {0}", "against a {0} background", "with a {0} background"),
    ("set against plain {0}",),
)
GRADIENT = Forms(("on a gradient from {0} to {1}", "on a background that goes from {0} to {1}"))
# By what is said beside the things: the background, the style.
SENTENCES = {
    (False, False): Forms(
        (
            "{things}",
            "{things}",
            "a picture of {things}",
            "an image of {things}",
            "{there} {things}",
        ),
        ("what you see is {things}",),
    ),
    (True, False): Forms(
        ("{things} {on}", "{things} {on}", "a picture of {things} {on}", "{there} {things} {on}"),
        ("{on} {there} {things}",),
    ),
    (False, True): Forms(
        ("{things}, {style}", "{things} in {style} style", "a {style} picture of {things}"),
        ("in {style} style, {things}", "{things}, and the style is {style}"),
    ),
    (True, True): Forms(
        (
            "{things} {on}, {style}",
            "{things} {on} in {style} style",
            "a {style} picture of {things} {on}",
        ),
        ("in {style} style, {things} {on}", "{things}, drawn in {style} style and {on}"),
    ),
}
WRITTEN = (False,) * 7 + (True,)  # with a capital and a full stop
WITHOUT_ARTICLE = ("Santa Claus", "Mrs. Claus")


@dataclass(frozen=True)
class Caption:
    """A sentence.

    Attributes:
        text: all of it.
        forms: how it was made, as they stand in the tables above.
    """

    text: str
    forms: tuple[str, ...]

    @property
    def is_heldout(self) -> bool:
        """Whether training never sees one of its forms."""
        return any(form in HELD for form in self.forms)


HELD = frozenset(
    form
    for forms in (
        *SIZES.values(), *RELATIONS.values(), *LISTS.values(), RELATED, PLAIN, *SENTENCES.values()
    )
    for form in forms.held
)  # fmt: skip


def article(words: str) -> str:
    """The indefinite article of what begins with these words."""
    sounds_open = words[0].lower() in "aeiou" or words.startswith(("hour", "X-ray", "8"))
    return "an" if sounds_open and not words.startswith(("uni", "euro", "one-")) else "a"


class Writer:
    """Writes the caption of one scene.

    Args:
        draw: where the choices come from.
        held: whether the caption has forms that training never sees.
    """

    def __init__(self, draw: Draw, held: bool):
        self.draw, self.held, self.forms = draw, held, []

    def write(self, plan: Any) -> Caption:
        """The caption of a `scenes.Plan`."""
        self.forms = []
        order = list(range(len(plan.groups)))
        if plan.relation:
            turned = self.draw.one((False, True))
            order = [1, 0] if turned else [0, 1]
            relation = self._form(RELATIONS[plan.relation, turned])
        else:
            order.sort(key=lambda _: self.draw.one(range(1000)))
            relation = ""
        groups = [plan.groups[index] for index in order]
        style = self.draw.one(STYLES[plan.style])
        # of one kind of thing the style may be said as its sizes are: "a small 3D fox"
        inside = plan.says_style and len(groups) == 1 and self.draw.one((True, False, False))
        named = [self._named(group, style if inside else "") for group in groups]
        words = {
            "is": "are" if groups[0].count > 1 else "is",
            "there": "there are" if groups[0].count > 1 else "there is",
            "it": "them" if groups[-1].count > 1 else "it",
            "relation": relation,
        }
        forms = RELATED if relation else LISTS[len(named)]
        colours = plan.background.split(" to ")
        on = self._form(GRADIENT if len(colours) == 2 else PLAIN).format(*colours)
        text = self._form(SENTENCES[plan.says_background, plan.says_style and not inside]).format(
            things=self._form(forms).format(*named, **words),
            on=on.replace("a orange", "an orange"),
            style=style,
            **words,
        )
        if self.draw.one(WRITTEN):
            text = f"{text[0].upper()}{text[1:]}."
        return Caption(text, tuple(self.forms))

    def _form(self, forms: Forms) -> str:
        held = self.held and forms.held and self.draw.one((True, True, False))
        form = self.draw.one(forms.held if held else forms.seen)
        self.forms.append(form)
        return form

    def _named(self, group: Any, style: str) -> str:
        """A group with its number or article: "three small foxes with light skin"."""
        words = group.subject.name if group.count == 1 else group.subject.plural
        if style:
            words = f"{style} {words}"
        if group.says_size:
            words = f"{self._form(SIZES[group.size])} {words}"
        if group.tone:
            words = f"{words} {self.draw.one(TONES).format(tone=group.tone)}"
        if group.count > 1:
            return f"{self.draw.one(NUMBERS[group.count])} {words}"
        return words if words.startswith(WITHOUT_ARTICLE) else f"{article(words)} {words}"
