"""The pictures that an evaluation judges: drawn into a folder, batch by batch, and kept there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import printable, whole, with_names
from ..conditioning import one_each
from ..files import digest_pixels, replacing
from ..geometry import Geometry, ImageSize, Size
from ..images import read_image, record_of, save_png, to_pil, to_tensor
from ..maskgit import MaskGit
from ..muse import Muse
from ..provenance import attach, fingerprint, from_json, licensed, made_on
from ..request import Drawn, Request
from ..sampling import SampleOptions
from ..structures import SampleStep
from ..watching.run_file import leaves
from .truth import Prompt, Truth, batches, digest_prompts

Part = Literal["base", "superres", "model"]
SETUP = "setup.json"


class Drawer:
    """The part of a model that is evaluated.

    Args:
        part: "base", the first stage alone; "superres", the second one from true low-resolution
            images; "model", the whole cascade.
        model: a `Muse`, or for "superres" that stage.
        options: sampling of each of its stages; seeds are not looked at.
        negative: what to stay away from.
        image_size: of its pictures, if not as trained.
        large: as of `Muse.request`.

    Attributes:
        fingerprint: of the model, see `provenance`.
        size: height and width of its pictures, in pixels.
    """

    def __init__(
        self,
        part: Part,
        model: Muse | MaskGit,
        options: Mapping[str, SampleOptions],
        negative: str | None = None,
        image_size: ImageSize | None = None,
        large: bool = False,
    ):
        self.part, self.model, self.options = part, model, dict(options)
        self.negative, self.large = negative, large
        self._last = model if isinstance(model, MaskGit) else (model.superres or model.base)
        self.size: Size = self.geometry.pixels(image_size)
        self.fingerprint = model.fingerprint if isinstance(model, Muse) else fingerprint(model)

    @property
    def geometry(self) -> Geometry:
        """Of the stage that draws the pictures."""
        return self._last.geometry

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the model's classes; none of them where it takes no captions."""
        return self._last.transformer.classes

    @property
    def device(self) -> torch.device:
        return self._last.device

    @property
    def licenses(self) -> dict[str, str]:
        """Of the model's weights, by part."""
        return self.model.licenses

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides its pictures but prompts, seeds and true images."""
        return {
            "part": self.part,
            "model": self.fingerprint,
            "options": {
                stage: with_names({k: v for k, v in asdict(options).items() if k != "seeds"})
                for stage, options in self.options.items()
            },
            "negative": self.negative,
            "size": list(self.size),
        }

    def request(self, texts: Sequence[str], seeds: Sequence[int]) -> Request:
        """The call that draws a batch.

        Raises:
            ValueError: what the model cannot draw, more than one batch may ask for.
        """
        request = Request.of(
            list(texts),
            None,
            one_each(self.negative, len(texts)),
            list(seeds),
            self.options,
            self.size,
            large=self.large,
            classes=self.classes,
        )
        request.check_size("the command", self.geometry.image_size)
        return request

    @torch.no_grad()
    def draw(
        self,
        request: Request,
        low: Float[Tensor, "B 3 h w"] | None = None,
        callback: Callable[[SampleStep], None] | None = None,
    ) -> list[Image.Image]:
        """The pictures of a batch, with their records.

        Args:
            request: of `request`.
            low: true low-resolution images, for "superres".
            callback: as of `Muse.draw`.
        """
        if isinstance(self.model, Muse):
            return self.model.pictures(self.model.draw(request, callback))
        assert low is not None
        stage, prompts = self.model, request.prompts
        ids = stage.sample(
            stage.embed_texts(prompts),
            request.options["superres"],
            negatives=request.negatives,
            cond=stage.encode_cond(low, None, image_size=self.size),
            image_size=self.size,
            callback=callback,
        )
        images = stage.decode(ids, self.size)
        pictures = to_pil(images)
        drawn = Drawn(images, _from_true(request, low), low)
        made_by = made_on(self.device, stage.precision, stage.text_compute.precision)
        attach(pictures, drawn, self.fingerprint, made_by | licensed(stage.licenses))
        return pictures


def _from_true(request: Request, low: Tensor) -> Request:
    """What a record says of pictures drawn from true low-resolution ones."""
    return replace(request, edit={"kind": "superres", "low_resolution": digest_pixels(low)})


class Pictures:
    """The pictures of an evaluation, in a folder: S of each prompt, in a row.

    Args:
        folder: new, or of an evaluation with the same settings, which goes on.
        drawer: what draws.
        prompts: B of them.
        seeds: S, pictures of each prompt.
        seed: of the first picture; the next ones have the next.
        truth: of the prompts, whose low-resolution images "superres" takes; others need none.

    Raises:
        ValueError: no prompts, seeds below 1, "superres" without truth; a folder of something
            else, or of an evaluation with other settings, the first of which is named.
    """

    def __init__(
        self,
        folder: Path,
        drawer: Drawer,
        prompts: Sequence[Prompt],
        seeds: int = 1,
        seed: int = 0,
        truth: Truth | None = None,
    ):
        if not prompts:
            raise ValueError("there are no prompts to draw")
        if drawer.part == "superres" and truth is None:
            raise ValueError("super-resolution is drawn from true images: give their truth")
        self.folder, self.drawer, self.prompts = folder, drawer, list(prompts)
        self.seeds, self.seed = whole("seeds", seeds, 1), whole("seed", seed)
        self._truth = truth if drawer.part == "superres" else None
        self.setup = drawer.settings | {
            "prompts": len(self.prompts),
            "texts": digest_prompts(self.prompts),
            "seeds": seeds,
            "seed": seed,
            "true_images": self._truth.digest if self._truth else None,
        }
        self._check()
        self.files = [
            folder / "pictures" / f"{number:05d}-{turn}.png"
            for number in range(1, len(self.prompts) + 1)
            for turn in range(1, seeds + 1)
        ]

    def __len__(self) -> int:
        return len(self.files)

    def images(self, rows: Sequence[int]) -> Float[Tensor, "B 3 H W"]:
        """Pictures by their numbers: those of a prompt follow one another."""
        return torch.stack([to_tensor(self.files[row]) for row in rows])

    def picture(self, row: int) -> Image.Image:
        return read_image(self.files[row])

    def draw(self, batch_size: int = 16) -> int:
        """Draw what is not there yet, and keep it as it is drawn.

        Args:
            batch_size: pictures drawn together; a batch of which one is missing is drawn again.

        Returns:
            how many were there.
        """
        with replacing(self.folder / SETUP) as temporary:
            temporary.write_text(json.dumps(self.setup, indent=1) + "\n", encoding="utf-8")
        there = 0
        with tqdm(total=len(self), desc="drawing", unit="image", dynamic_ncols=True) as bar:
            for rows in batches(range(len(self)), whole("batch_size", batch_size, 1)):
                if all(self._is_there(row) for row in rows):
                    there += len(rows)
                else:
                    self._draw(rows)
                bar.update(len(rows))
        return there

    def _draw(self, rows: Sequence[int]) -> None:
        prompts = [row // self.seeds for row in rows]
        texts = [self.prompts[prompt].text for prompt in prompts]
        request = self.drawer.request(texts, [self.seed + row for row in rows])
        low = None if self._truth is None else self._truth.low(prompts).to(self.drawer.device)
        for row, picture in zip(rows, self.drawer.draw(request, low), strict=True):
            save_png(picture, self.files[row])

    def _is_there(self, row: int) -> bool:
        """Whether the file holds the wanted picture, as far as its record says."""
        with suppress(OSError, ValueError, SyntaxError):
            with Image.open(self.files[row], formats=["PNG"]) as image:
                image.load()
            [record] = from_json(record_of(image) or "", self.files[row])
            of = record.rows[0]
            wanted = self.prompts[row // self.seeds].text, self.seed + row, self.drawer.fingerprint
            return (record.prompts[0], record.request.seeds[of], record.model) == wanted
        return False

    def _check(self) -> None:
        """Refuse a folder that is not this evaluation's."""
        name, file = printable(str(self.folder)), self.folder / SETUP
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{name} holds other files and no evaluation ({SETUP}): give a new folder"
                )
            return
        try:
            there = leaves(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}): give another folder") from error
        here = leaves(json.loads(json.dumps(self.setup)))
        for key in [*here, *(there.keys() - here.keys())]:
            old, new = there.get(key), here.get(key)
            if old != new:
                raise ValueError(
                    f"{name} holds an evaluation with {key} {printable(str(old), 100)}, this one "
                    f"has {printable(str(new), 100)}: give another folder"
                )
