"""What a client asks for: the fields of the OpenAI images API, and our own, read and checked."""

from __future__ import annotations

import difflib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from ..arguments import shown, whole
from ..editing.pixels import Mask, transparent
from ..geometry import Size
from ..images import read_image, read_with_alpha
from ..sampling import SampleOptions

Kind = Literal["generations", "edits", "variations"]
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
UPLOADS = ("PNG", "JPEG", "WEBP")
MOST_PARTIAL = 50  # pictures of a stream before the last; OpenAI gives up to 3

OPTIONS = [field.name for field in fields(SampleOptions) if field.name != "seeds"]
# ours, by the names that they have in Python
OWN = ["preset", "negative_texts", *(p + o for p in ("", "base_", "superres_") for o in OPTIONS)]
# an edit is one of these, by the field "edit"; each is the function of that name in `editing`
EDITS: dict[str, list[str]] = {
    "inpaint": ["blend", "feather", "grow"],
    "outpaint": ["left", "top", "right", "bottom", "aspect", "feather", "grow"],
    "free": ["at", "share", "top_k", "cond_scale"],
}
OWN_OF: dict[str, list[str]] = {
    "generations": OWN,
    "edits": [*OWN, "edit", *dict.fromkeys(name for names in EDITS.values() for name in names)],
    "variations": [*OWN, "strength"],
}
# theirs; what a model of ours cannot vary is taken for the one thing that it is
ONLY = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
}
THEIRS = [
    *("prompt", "model", "n", "size", "seed", "response_format", "output_format"),
    *("output_compression", "stream", "partial_images", "user", *ONLY),
]
# of a form, where everything is text, these stay texts
TEXTS = {"prompt", "model", "size", "response_format", "output_format", "user", "preset", *ONLY}
TEXTS |= {"negative_texts", "edit"}


class Wrong(ValueError):
    """What a client should not have sent.

    Attributes:
        param: name of the field, if it is one's.
        status: of the answer.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body: bytes of it.
        pixels: of a picture that is sent.
        prompt: characters of a text.
        n: pictures.
        area: of an outpainted picture, in pictures of the model's own size.
        iterations: of a mask-free edit.
        upload: seconds until it must have arrived.
        timeout: seconds until it is drawn.
    """

    body: int = 16 * 2**20
    pixels: int = 2**24
    prompt: int = 4000
    n: int = 10
    area: int = 16
    iterations: int = 200
    upload: float = 30.0
    timeout: float = 120.0


@dataclass(frozen=True)
class Asked:
    """A request's fields.

    Attributes:
        edit: one of `EDITS`, where the kind is "edits".
        size: height and width; None for the model's own.
        compression: quality of JPEG and WebP, 0 to 100.
        partial: pictures of a stream before the last one.
        arguments: of `Muse.request` or of an edit.
    """

    kind: Kind
    edit: str
    prompt: str
    n: int
    size: Size | None
    url: bool
    format: str
    compression: int
    stream: bool
    partial: int
    arguments: dict[str, Any]

    @classmethod
    def read(cls, kind: Kind, given: Mapping[str, Any], model: str, limits: Limits) -> Asked:
        """Check them.

        Args:
            kind: of the request.
            given: its fields, without the pictures.
            model: name of the one that there is.
            limits: see there.

        Raises:
            Wrong: naming the field.
        """
        known = [*THEIRS, *OWN_OF[kind]]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise Wrong(f"there is no field {shown(name)}{hint}", str(name)[:100])
        # null stands for what is not given
        given = {name: value for name, value in given.items() if value is not None}

        def one_of(name: str, choices: Any, default: str) -> str:
            value = given.get(name, default)
            if not isinstance(value, str) or value not in choices:
                raise Wrong(f"{name} must be {_either(choices)}, not {shown(value)}", name)
            return value

        def number(name: str, low: int, high: int | None, default: int) -> int:
            try:
                return whole(name, given.get(name, default), low, high)
            except ValueError as error:
                raise Wrong(str(error), name) from None

        if given.get("model", model) != model:
            raise Wrong(
                f"there is no model {shown(given['model'])}, this server has {model!r}",
                *("model", 404, "model_not_found"),
            )
        for name, choices in ONLY.items():
            one_of(name, choices, "auto")
        stream = given.get("stream", False)
        if not isinstance(stream, bool):
            raise Wrong(f"stream must be true or false, not {shown(stream)}", "stream")
        n = number("n", 1, limits.n, 1)
        if stream and n > 1:
            raise Wrong("a stream shows one picture: leave n out, or set it to 1", "n")
        edit = one_of("edit", tuple(EDITS), "inpaint")
        arguments = {name: given[name] for name in OWN_OF[kind] if name in given and name != "edit"}
        if kind == "edits":
            for name in arguments:
                if name not in OWN and name not in EDITS[edit]:
                    raise Wrong(f"{name} is of another edit than {edit}", name)
        if edit == "free" and n > 1:
            raise Wrong("a mask-free edit gives a picture for each of at: leave n out", "n")
        if edit == "outpaint" and given.get("size", "auto") != "auto":
            raise Wrong(
                "an outpainted picture's size follows from left, top, right, bottom", "size"
            )
        if "seed" in given:
            arguments["seeds"] = number("seed", -(2**63), 2**63, 0)
        prompt = _text("prompt", given.get("prompt", ""), limits)
        if kind != "variations" and not prompt.strip():
            raise Wrong("prompt is missing: write what to draw", "prompt")
        if "negative_texts" in arguments:
            _text("negative_texts", arguments["negative_texts"], limits)
        return cls(
            kind=kind,
            edit=edit,
            prompt=prompt,
            n=n,
            size=_size(given.get("size", "auto")),
            url=one_of("response_format", ("b64_json", "url"), "b64_json") == "url",
            format=one_of("output_format", tuple(FORMATS), "png"),
            compression=number("output_compression", 0, 100, 100),
            stream=stream,
            partial=number("partial_images", 0, MOST_PARTIAL, 0),
            arguments=arguments,
        )

    def blame(self, message: str) -> str | None:
        """The field that a message is about, if it names one that was given."""
        names = sorted([*self.arguments, "size", "n"], key=len, reverse=True)
        aliases = {"image_size": "size", "seeds": "seed", "text": "prompt", "class": "prompt"}
        for name in [*names, *aliases]:
            if re.search(rf"\b{name}\b", message):
                return aliases.get(name, name)
        return None


def schema(kind: Kind, limits: Limits) -> dict[str, Any]:
    """The fields of a request, as the OpenAPI description has them."""

    def integer(low: int, high: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": low, "maximum": high}

    text = {"type": "string", "maxLength": limits.prompt}
    typed: dict[str, Any] = {
        "prompt": text,
        "negative_texts": text,
        "model": {"type": "string"},
        "user": {"type": "string"},
        "preset": {"type": "string"},
        "n": integer(1, limits.n),
        "size": {"type": "string", "pattern": r"^(auto|\d{1,5}x\d{1,5})$"},
        "seed": integer(-(2**63), 2**63),
        "response_format": {"enum": ["b64_json", "url"]},
        "output_format": {"enum": list(FORMATS)},
        "output_compression": integer(0, 100),
        "stream": {"type": "boolean"},
        "partial_images": integer(0, MOST_PARTIAL),
        "edit": {"enum": list(EDITS)},
        **{name: {"enum": list(choices)} for name, choices in ONLY.items()},
    }
    own = {name: typed.get(name, {}) for name in [*THEIRS, *OWN_OF[kind]]}
    pictures = {"generations": (), "edits": ("image", "mask"), "variations": ("image",)}[kind]
    own |= {name: {"type": "string", "format": "binary"} for name in pictures}
    needed = {"generations": ["prompt"], "edits": ["image", "prompt"], "variations": ["image"]}
    return {
        "type": "object",
        "properties": own,
        "required": needed[kind],
        "additionalProperties": False,
    }


def read_form(fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a form with their types: numbers, true and false, and lists as in JSON."""
    return {name: text if name in TEXTS else _typed(text) for name, text in fields.items()}


def _typed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_picture(name: str, data: bytes, limits: Limits) -> Image.Image:
    """A picture that was sent, with its transparency; nothing is decoded that is too large.

    Raises:
        Wrong: no PNG, JPEG or WebP, damaged, or with more pixels than allowed.
    """
    try:
        with Image.open(io.BytesIO(data), formats=UPLOADS) as image:
            pixels = math.prod(image.size)
            if pixels > limits.pixels:
                raise Wrong(
                    f"{name} has {image.width} x {image.height} pixels, this server reads up to "
                    f"{limits.pixels} of a picture: scale it down",
                    name,
                )
            return read_with_alpha(image)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise Wrong(f"{name} must be a PNG, JPEG or WebP picture", name) from None
    except Wrong:
        raise
    except (ValueError, OSError, SyntaxError, EOFError):
        raise Wrong(f"{name} is damaged: send the picture again", name) from None


def read_mask(image: Image.Image, mask: Image.Image | None) -> Mask:
    """Where to repaint: where the mask, or without one the picture itself, is transparent.

    Raises:
        Wrong: nothing is transparent, or the mask is of another size.
    """
    if mask is not None and mask.size != image.size:
        raise Wrong(
            f"mask has {mask.width} x {mask.height} pixels, the image {image.width} x "
            f"{image.height}: they must be equal",
            "mask",
        )
    given = image if mask is None else mask
    if not given.has_transparency_data or not bool((found := transparent(given)).any()):
        raise Wrong(
            "nothing says what to repaint: send a mask that is transparent there, or an image that "
            "is",
            "mask",
        )
    return found


def flat(image: Image.Image) -> Image.Image:
    """A picture without transparency."""
    return read_image(image)


def _text(name: str, value: Any, limits: Limits) -> str:
    if not isinstance(value, str):
        raise Wrong(f"{name} must be a text, not {shown(value)}", name)
    if len(value) > limits.prompt:
        raise Wrong(
            f"{name} has {len(value)} characters, this server reads up to {limits.prompt}: "
            "shorten it",
            name,
        )
    return value


def _size(value: Any) -> Size | None:
    if value == "auto":
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise Wrong(f"size must be auto, or width x height as 256x256, not {shown(value)}", "size")
    return int(found[2]), int(found[1])


def _either(choices: Any) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last
