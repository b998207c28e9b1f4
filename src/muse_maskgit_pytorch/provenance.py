"""Where a picture comes from: all that decides its pixels, written into its PNG and read back.

The record of a picture is the call that drew it, whole, and which of the call's pictures it is:
the same call on the same device gives the same bits, on a GPU too, whose arithmetic depends on the
size of the batch. A contact sheet carries the records of all its pictures.

In the file it is one JSON document in an uncompressed iTXt chunk named "muse", in UTF-8::

    {"format": "muse_maskgit_pytorch picture", "version": 1, "drawings": [
        {"model": fingerprint, "made_by": {"package": ..., "torch": ..., "device": ...},
         "prompts": [...], "negative_prompts": [...] or null,
         "options": {"base": {field of SampleOptions: value}, "superres": {...}}, "rows": [0],
         "image_size": [height, width], "edit": {"kind": ..., setting: value} or null}]}
"""

from __future__ import annotations

import hashlib
import json
import string
import unicodedata
from collections import abc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import Any, get_args, get_origin, get_type_hints

import torch
from PIL import Image

from . import __version__
from .checkpoint import Saveable
from .images import read_record, record_of, set_record
from .structures import SampleOptions

FORMAT, VERSION = "muse_maskgit_pytorch picture", 1
SAMPLE = 256  # values of each weight that are looked at to see whether it has changed
# Arguments of a model that decide no picture: every record has the options that were used.
NO_PART = {"sample_options", "presets"}


@dataclass(frozen=True)
class Drawing:
    """One call of a model, and which of its pictures are shown.

    Attributes:
        prompts: of the whole batch.
        negatives: one each, "" for none; or None where none were given.
        options: of each stage ("base", "superres"), with the seed of every row.
        rows: which pictures of the batch are shown, 0-based.
        model: `fingerprint` of the model; "" in a drawing that is yet to be made.
        made_by: "package" and "torch", the versions, and "device", its type.
        image_size: height and width in pixels; None: the model's own.
        edit: of an edited picture, "kind" (the function of `editing`, or "words"), its settings,
            and short names of the pixels of the pictures and masks it was made from; else None.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None
    options: dict[str, SampleOptions]
    rows: tuple[int, ...]
    model: str = ""
    made_by: dict[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    edit: dict[str, Any] | None = None

    def take(self, rows: Sequence[int]) -> Drawing:
        """Some rows of the batch as a batch of their own, all of them shown.

        Raises:
            ValueError: an option whose number of values is not that of the prompts.
        """
        batch = len(self.prompts)

        def taken(options: SampleOptions) -> SampleOptions:
            changes = {}
            for name in row_wise(SampleOptions):
                value = getattr(options, name)
                if isinstance(value, (list, tuple)):
                    if len(value) != batch:
                        raise ValueError(f"{name} has {len(value)} values for {batch} images")
                    changes[name] = [value[row] for row in rows]
            return options.replace(**changes)

        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows),
            negatives=self.negatives and tuple(self.negatives[row] for row in rows),
            options={stage: taken(options) for stage, options in self.options.items()},
            rows=tuple(range(len(rows))),
        )

    def check_model(self, fingerprint: str, source: str | PathLike[str]) -> None:
        """Refuse another model than the one that drew the picture ``source``, and edits.

        Raises:
            ValueError: naming both fingerprints, or the kind of edit.
        """
        if self.edit is not None:
            raise ValueError(
                plain(
                    f"{source} was edited ({self.edit['kind']}) and does not hold all that it was "
                    "made of: repeat the edit, whose settings muse inspect shows"
                )
            )
        if self.model != fingerprint:
            raise ValueError(
                f"{source} was drawn by the model {self.model}, this one is {fingerprint}: load "
                "the model that drew it"
            )


def row_wise(cls: type) -> set[str]:
    """Fields that take one value for each row: those of a type like ``T | Sequence[T]``.

    A table for all rows, as in ``Schedule | Sequence[float]``, is none of them.
    """

    def many(hint: Any) -> bool:
        kinds = get_args(hint)
        return any(get_origin(k) is abc.Sequence and get_args(k)[0] in kinds for k in kinds)

    return {name for name, hint in get_type_hints(cls).items() if many(hint)}


def fingerprint(model: Saveable) -> str:
    """A short name of what a model computes: 16 hexadecimal digits of a SHA-256.

    It covers the values and types of all weights and buffers in memory, and the constructor's
    arguments but for the default sampling options. So a file and its copy in another type agree
    only where no weight was rounded; the frozen text encoder, which is no part of the model, counts
    by its name alone.

    Kept until a weight changes. Torch counts changes in place, but not those through
    ``tensor.data``, and ``half().float()`` may end at the same address: a sample of the values
    betrays those, though it may miss a single number.
    """
    state = model.state_dict()
    some = [t.detach().flatten()[:: max(1, t.numel() // SAMPLE)] for t in state.values()]
    sums = torch.stack([values.float().sum() for values in some]).tolist()
    key = sums, [(name, t.data_ptr(), t._version, t.dtype) for name, t in state.items()]
    known = model.__dict__.get("_fingerprint")
    if known is not None and known[0] == key:
        return known[1]

    def kept(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: kept(value) for name, value in node.items() if name not in NO_PART}
        return node

    digest = hashlib.sha256()
    config = [type(model).__name__, kept(model.config)]
    digest.update(json.dumps(config, sort_keys=True, default=lambda x: type(x).__name__).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # flat first: a scalar cannot be seen as bytes
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    name = digest.hexdigest()[:16]
    model.__dict__["_fingerprint"] = key, name
    return name


def stamp(images: Sequence[Image.Image], drawing: Drawing) -> None:
    """Give the pictures of a whole batch their records, for `save_png` to write."""
    for row, image in enumerate(images):
        set_record(image, to_json([replace(drawing, rows=(row,))]))


def stamp_sheet(sheet: Image.Image, images: Sequence[Image.Image]) -> None:
    """Give a contact sheet the records of its pictures, if all of them have one."""
    joined: list[Drawing] = []
    for image in images:
        record = record_of(image)
        if record is None:
            return
        for drawing in from_json(record, "a picture of the sheet"):
            if joined and replace(drawing, rows=joined[-1].rows) == joined[-1]:
                drawing = replace(drawing, rows=joined.pop().rows + drawing.rows)
            joined.append(drawing)
    set_record(sheet, to_json(joined))


def made_by(device: torch.device) -> dict[str, str]:
    """What else the bits of a picture depend on."""
    return {"package": __version__, "torch": torch.__version__, "device": device.type}


def read_drawings(path: str | PathLike[str]) -> list[Drawing]:
    """Where a PNG's pictures come from, in the order of the sheet.

    Raises:
        ValueError: no image, one without a record, or with one that is not ours or is damaged.
    """
    text = read_record(path)
    if text is None:
        raise ValueError(
            f"{path} does not say how it was drawn: only PNG files as this package writes them do "
            "(other programs may have removed it)"
        )
    return from_json(text, path)


def to_json(drawings: Sequence[Drawing]) -> str:
    """One document for all, each number as it is."""
    records = [
        {
            "model": drawing.model,
            "made_by": drawing.made_by,
            "prompts": drawing.prompts,
            "negative_prompts": drawing.negatives,
            "options": {stage: asdict(options) for stage, options in drawing.options.items()},
            "rows": drawing.rows,
            "image_size": drawing.image_size,
            "edit": drawing.edit,
        }
        for drawing in drawings
    ]
    return json.dumps(
        {"format": FORMAT, "version": VERSION, "drawings": records},
        ensure_ascii=False,
        default=lambda value: value.tolist(),  # a tensor's or an array's numbers
    )


def from_json(text: str, source: str | PathLike[str]) -> list[Drawing]:
    """Read what `to_json` wrote, and trust none of it.

    Raises:
        ValueError: naming the source.
    """
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("it is not in this package's format")
        if document.get("version") != VERSION:
            raise ValueError(
                f"it has format version {document.get('version')!r}, this package reads {VERSION}"
            )
        drawings = [_drawing(record) for record in document["drawings"]]
        if not drawings:
            raise ValueError("it lists no pictures")
        return drawings
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            plain(f"{source}: the record of how it was drawn cannot be used: {what}")
        ) from error


def plain(text: str) -> str:
    """Without control characters, which in a foreign file might be meant for the terminal."""
    return "".join("?" if unicodedata.category(letter) == "Cc" else letter for letter in text)


def _drawing(record: dict[str, Any]) -> Drawing:
    prompts, negatives = record["prompts"], record["negative_prompts"]
    _demand("prompts", prompts, str)
    if negatives is not None:
        _demand("negative_prompts", negatives, str, len(prompts))
    _demand("rows", record["rows"], int)
    if not all(0 <= row < len(prompts) for row in record["rows"]):
        raise ValueError(f"rows {record['rows']} of {len(prompts)} prompts")
    made_by = record["made_by"]
    _demand("made_by", list(made_by.values()), str)
    _demand("model", [record["model"]], str)
    if not set(record["model"]) <= set(string.hexdigits):
        raise ValueError("model is no fingerprint")
    options = {}
    for stage, values in record["options"].items():
        unknown = values.keys() - {field.name for field in fields(SampleOptions)}
        if stage not in ("base", "superres") or unknown:
            raise ValueError(f"unknown options {stage!r} {sorted(unknown)}, of a later version?")
        options[stage] = SampleOptions(**values)
        _demand("seeds", options[stage].seeds, int, len(prompts))
    if "base" not in options:
        raise ValueError("options of the base are missing")
    size, edit = record.get("image_size"), record.get("edit")
    if size is not None:
        _demand("image_size", size, int, 2)
    if edit is not None and not isinstance(edit["kind"], str):
        raise ValueError("edit has no kind")
    return Drawing(
        prompts=tuple(prompts),
        negatives=None if negatives is None else tuple(negatives),
        options=options,
        rows=tuple(record["rows"]),
        model=record["model"],
        made_by=made_by,
        image_size=size and (size[0], size[1]),
        edit=edit,
    )


def _demand(name: str, values: Any, kind: type, count: int | None = None) -> None:
    """A list of values of one kind, not empty, and of a certain length if one is given."""
    good = isinstance(values, list) and values and all(type(value) is kind for value in values)
    if not good or count not in (None, len(values)):
        raise ValueError(f"{name} must be a list of {count or 'some'} {kind.__name__}")
