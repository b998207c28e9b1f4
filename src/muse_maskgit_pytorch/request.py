"""`Request`: one call of a model, complete; `Drawn`: what came of it.

Everything that draws (calling the model, edits, the command line) builds a Request, and the record
of a picture is a Request plus the fingerprint of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from .arguments import plain, shown
from .conditioning import check_embeds, check_texts, one_each
from .geometry import Size
from .sampling import SampleOptions, per_row, stream_seed
from .structures import TextEmbeds

# What one batch may ask for unless it is `large` on purpose: the record of a stranger's picture
# asks for as much as a caller does, in one kilobyte.
MAX_ROWS = 1024
MAX_SIDE = 2048  # pixels
MAX_AREA = 16  # times that of the trained pictures: the work grows with its square
MAX_STEPS = 10_000
MAX_PIXELS = 2**25  # of all its pictures: 128 of 512 x 512
MAX_WORK = 2**32  # pixels x steps: the noise of every step is drawn beforehand


@dataclass(frozen=True)
class Request:
    """All that decides the pictures of one call, one row for each. `Muse.request` makes it.

    Attributes:
        prompts: what to draw; None if embeddings were given.
        negatives: what to stay away from, "" for nothing; None if nowhere given.
        options: of each stage ("base", "superres"); a list with one value per row in every field
            that may differ from row to row, seeds included.
        image_size: height and width of the pictures, in pixels.
        text_embeds: what the text encoder made of the prompts, in their place.
        canvases: token ids that are given, by stage, as in `MaskGit.generate`.
        edit: of an edited picture, "kind" (the function of `editing`, or "words"), its settings,
            and digests of the pixels it was made from.
        large: whether it may go beyond the limits of `check_size`. No record has it.
    """

    prompts: list[str] | None
    negatives: list[str] | None
    options: dict[str, SampleOptions]
    image_size: Size
    text_embeds: TextEmbeds | None = None
    canvases: dict[str, Int[Tensor, "B N"]] = field(default_factory=dict)
    edit: dict[str, Any] | None = None
    large: bool = False

    @classmethod
    def of(
        cls,
        texts: Sequence[str] | str | None,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None,
        negative_texts: Sequence[str] | str | None,
        seeds: int | Sequence[int] | None,
        options: Mapping[str, SampleOptions],
        image_size: Size,
        canvases: Mapping[str, Int[Tensor, "B N"]] | None = None,
        edit: dict[str, Any] | None = None,
        large: bool = False,
        classes: Sequence[str] | None = None,
    ) -> Request:
        """Complete a call: the one place where its arguments are checked and given rows.

        Args:
            texts: B prompts, a string being one, or
            text_embeds: their embeddings.
            negative_texts: one for all, or one each.
            seeds: one each, or s for s, s + 1, ...; if None, those of the options or, without
                any, random ones, the same for all stages.
            options: of each stage.
            image_size: height and width.
            canvases: of each stage; with them, a text may be empty.
            edit: see the attribute.
            large: see the attribute.
            classes: names of the model's classes, if it has any. With none of them, texts are
                empty, and may be left out: a picture for each of the seeds.

        Raises:
            ValueError: counts that differ, no texts, seeds that are not integers.
        """
        if classes is not None and not classes and texts is None and text_embeds is None:
            number = plain(seeds)
            texts = [""] * (len(number) if isinstance(number, list) else 1)
        if (texts is None) == (text_embeds is None):
            raise ValueError("give either texts or text_embeds")
        empty = canvases is not None or classes == ()
        prompts = None if texts is None else check_texts(texts, empty, classes)
        text_embeds = None if text_embeds is None else check_embeds(text_embeds, empty)
        if not isinstance(canvases or {}, Mapping) or {*(canvases or {})} - {*options}:
            names = " and ".join(map(repr, options))
            raise ValueError(f"canvases must be a mapping of {names}, not {shown(canvases)}")
        batch = len(prompts if prompts is not None else text_embeds.mask)  # type: ignore[union-attr]
        chosen = SampleOptions(seeds=seeds).with_rows(batch).seeds
        return cls(
            prompts=prompts,
            negatives=one_each(negative_texts, batch),
            options={
                stage: (
                    given.replace(seeds=chosen)
                    if seeds is not None or given.seeds is None
                    else given
                ).with_rows(batch)
                for stage, given in options.items()
            },
            image_size=image_size,
            text_embeds=text_embeds,
            canvases=dict(canvases or {}),
            edit=edit,
            large=large,
        )

    def check_size(self, source: str = "the call", trained: int | None = None) -> None:
        """Refuse more pictures, pixels or steps than one batch may ask for, unless it is `large`.

        Args:
            source: what asks for them, for the message.
            trained: side of the pictures that the model was trained on, if it is known.

        Raises:
            ValueError: naming the number, the limit and the switch.
        """
        if self.large:
            return
        height, width = self.image_size
        pixels = len(self) * height * width
        steps = max(max(per_row(o.timesteps, len(self), "")) for o in self.options.values())
        area = 0 if trained is None else -(-height * width // trained**2)
        for number, limit, what in (
            (len(self), MAX_ROWS, "pictures in one batch"),
            (max(height, width), MAX_SIDE, "pixels a side"),
            (steps, MAX_STEPS, "steps"),
            (pixels, MAX_PIXELS, "pixels in one batch"),
            (pixels * steps, MAX_WORK, "pixels in one batch times steps"),
            (area, MAX_AREA, "times the area of the trained pictures"),
        ):
            if number > limit:
                raise ValueError(
                    f"{source} asks for {shown(number)} {what}, the limit is {limit}: take fewer, "
                    "or say large=True (muse ... --large true) if you mean it"
                )

    def __len__(self) -> int:
        return len(next(iter(self.options.values())).seeds)  # type: ignore[arg-type]

    @property
    def seeds(self) -> list[int]:
        """Those of the first stage that draws."""
        seeds = next(iter(self.options.values())).seeds
        assert isinstance(seeds, list)
        return seeds

    def with_seeds(self, seeds: Sequence[int]) -> Request:
        """The same, drawn with other seeds in every stage."""
        options = {name: given.replace(seeds=list(seeds)) for name, given in self.options.items()}
        return replace(self, options=options)

    def in_stream(self, stream: str) -> Request:
        """The same, drawn with another of the seeds' streams of random numbers (`stream_seed`)."""
        options = {
            name: given.replace(seeds=[stream_seed(seed, stream) for seed in given.seeds])  # type: ignore[union-attr]
            for name, given in self.options.items()
        }
        return replace(self, options=options)

    def take(self, rows: Sequence[int]) -> Request:
        """Some of the rows as a call of their own; of prompts, not of embeddings or canvases."""
        assert self.prompts is not None
        assert not self.canvases
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            negatives=self.negatives and [self.negatives[row] for row in rows],
            options={stage: options.take(rows) for stage, options in self.options.items()},
        )


@dataclass(frozen=True)
class Drawn:
    """The pictures of a `Request`.

    Attributes:
        images: of the last stage, RGB in [0, 1].
        request: what was drawn.
        base_images: of the base; the same where that is the last stage.
        stopped: whether a callback ended it early.
    """

    images: Float[Tensor, "B 3 H W"]
    request: Request
    base_images: Float[Tensor, "B 3 h w"]
    stopped: bool = False

    @property
    def has_record(self) -> bool:
        """Whether the request says all that decided the pictures."""
        whole = self.request.edit is not None or not self.request.canvases
        return whole and self.request.prompts is not None and not self.stopped
