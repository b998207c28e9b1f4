"""Where a picture comes from: all that decides its pixels, written into its PNG and read back.

The record of a picture is the whole call that drew it, which of the call's pictures it is, and the
fingerprint of the model: the same call on the same device gives the same bits, on a GPU too, where
the arithmetic depends on the size of the batch. A contact sheet carries the records of all its
pictures.

In the file it is one JSON document in an uncompressed iTXt chunk named "muse", in UTF-8::

    {"format": "muse_maskgit_pytorch picture", "version": 2, "drawings": [
        {"model": fingerprint, "made_by": {"package": ..., "torch": ..., "device": ...,
         "threads": ..., ...},
         "prompts": [...], "negative_prompts": [...] or null,
         "options": {"base": {field of SampleOptions: value}, "superres": {...}}, "rows": [0],
         "image_size": [height, width], "edit": {"kind": ..., setting: value} or null}]}

Version 1 had the same keys. Its stages shared one stream of random numbers, and so its
super-resolution drew other pictures.
"""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from typing import Any, Protocol

import torch
from PIL import Image

from . import __version__
from .arguments import Missing, as_path, printable, with_names, without_functions
from .checkpoint import Saveable, weights_key
from .files import digest_state
from .images import read_record, record_of, set_record
from .inference.precision import Precision, resolved
from .request import MAX_ROWS, Drawn, Request
from .sampling import SampleOptions, upgraded
from .text import TextPrecision

FORMAT, VERSION = "muse_maskgit_pytorch picture", 2
# Arguments of a model that decide no picture: a record has the options that were used. ff_dim says
# what the shapes of the weights say.
TRAINING = {
    "ff_dim",
    "cond_drop_prob",
    "noise_schedule",
    "label_smoothing",
    "no_mask_token_prob",
    "rectangle_prob",
    "unmasked_weight",
    "z_loss",
    "cond_noise_prob",
    "self_cond_prob",
    "critic_loss_weight",
    "critic_target",
    "sample_options",
    "presets",
}


class Drawer(Protocol):
    """What a record asks of a `Muse`."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def stages(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Record:
    """How pictures were drawn.

    Attributes:
        request: the call, with its whole batch.
        rows: which pictures of the batch are shown, 0-based.
        model: `fingerprint` of the model.
        made_by: "package" and "torch", the versions, "device", its type, "precision" and
            "text_precision", those of the model and of its text encoder, on a CPU
            "threads", their number: it decides the order of sums, and so single pixels; "license",
            those of the weights; and "lora", the adapters, where there were any.
        version: of the format in which it was written.
    """

    request: Request
    rows: tuple[int, ...]
    model: str
    made_by: dict[str, str]
    version: int = VERSION

    @property
    def prompts(self) -> list[str]:
        """Of the pictures shown."""
        assert self.request.prompts is not None
        return [self.request.prompts[row] for row in self.rows]

    def check(self, model: Drawer, source: str | PathLike[str]) -> None:
        """Refuse what a model cannot draw again, or should not.

        Args:
            model: a `Muse`.
            source: of the record, for messages.

        Raises:
            ValueError: an edit, an older version, another model, or more than one batch may ask
                for (`Request.check_size`); says which.
        """
        source = printable(str(source))
        if (edit := self.request.edit) is not None:
            raise ValueError(
                f"{source} was edited ({printable(edit['kind'], 80)}) and does not hold everything "
                "that it was made from: repeat the edit, whose settings muse inspect shows"
            )
        if self.version < VERSION:
            raise ValueError(
                f"{source} was drawn by muse-maskgit-pytorch 0.1, in which both stages used the "
                "same random numbers; since then each has its own, so the same picture cannot be "
                "drawn again: muse inspect shows the prompts and seeds to draw a new one"
            )
        missing = [
            f"{name} {value}"
            for options in self.request.options.values()
            for name, value in vars(options).items()
            if isinstance(value, Missing)
        ]
        if missing:
            raise ValueError(
                f"{printable(str(source))} cannot be drawn again, since {missing[0]}: muse inspect "
                "shows the other settings"
            )
        if self.model != model.fingerprint:
            adapter = self.made_by.get("lora")
            drew = f" with the adapter {printable(adapter, 200)}" if adapter else ""
            raise ValueError(
                f"{source} was drawn by the model {self.model}{drew}, this one is "
                f"{model.fingerprint}: load the model that drew it"
                + (" and its adapters (muse ... --lora, Muse.load_lora)" if adapter else "")
            )
        if (there := {*self.request.options}) != (here := {*model.stages}):
            raise ValueError(
                f"{source} has options of {' and '.join(sorted(there))}, the model's stages are "
                f"{' and '.join(sorted(here))}: the record was changed"
            )
        self.request.check_size(source, model.image_size)
        if len(self.rows) > MAX_ROWS and not self.request.large:
            raise ValueError(
                f"{source} shows {len(self.rows)} pictures of one batch, the limit is {MAX_ROWS}: "
                "say large=True (muse ... --large true) if you trust it"
            )

    def allowing(self, large: bool) -> Record:
        """The same, which may go beyond the limits or not."""
        return replace(self, request=replace(self.request, large=large))


def fingerprint(model: Saveable) -> str:
    """A short name of what a model computes: 16 hexadecimal digits of a SHA-256.

    It covers the values and types of all weights and buffers in memory, and the constructor's
    arguments that decide pictures. So a file and its copy in another type agree only if no weight
    was rounded. The frozen text encoder, which is not part of the model, counts by its name alone.
    Computed once, and again only after a weight has changed.
    """
    key = weights_key(model)
    known = model.__dict__.get("_fingerprint")
    if known is not None and known[0] == key:
        return known[1]

    def kept(node: Any) -> Any:
        if isinstance(node, dict):
            items = {name: kept(v) for name, v in node.items() if name not in TRAINING}
            return {name: value for name, value in items.items() if value is not None}
        return node

    config = [type(model).__name__, kept(model.config)]
    text = json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__)
    name = digest_state(model.state_dict(), text)[:16]
    model.__dict__["_fingerprint"] = key, name
    return name


def attach(
    pictures: Sequence[Image.Image],
    drawn: Drawn,
    model: str,
    made_by: dict[str, str],
) -> None:
    """Give the pictures of a whole batch their records, for `save_png` to write."""
    for row, picture in enumerate(pictures):
        set_record(picture, to_json([Record(drawn.request, (row,), model, made_by)]))


def attach_to_sheet(sheet: Image.Image, pictures: Sequence[Image.Image]) -> None:
    """Give a contact sheet the records of its pictures, if all of them have one."""
    joined: list[Record] = []
    for picture in pictures:
        text = record_of(picture)
        if text is None:
            return
        for record in from_json(text, "a picture of the sheet"):
            if joined and replace(record, rows=joined[-1].rows) == joined[-1]:
                record = replace(record, rows=joined.pop().rows + record.rows)
            joined.append(record)
    set_record(sheet, to_json(joined))


def made_on(
    device: torch.device,
    precision: Precision = "float32",
    text_precision: TextPrecision = "float32",
    loras: Sequence[str] = (),
) -> dict[str, str]:
    """What else the bits of a picture depend on."""
    made = {"package": __version__, "torch": str(torch.__version__), "device": device.type}
    made["precision"], made["text_precision"] = resolved(precision, device), text_precision
    if loras:
        made["lora"] = "; ".join(loras)
    if device.type == "cpu":
        made["threads"] = str(torch.get_num_threads())
    return made


def licensed(licenses: Mapping[str, str]) -> dict[str, str]:
    """What a record says of the licenses of a model's weights (`Muse.licenses`)."""
    return {"license": "; ".join(f"{part}: {name}" for part, name in licenses.items())}


def warn_of_other_bits(
    records: Sequence[Record], here: Mapping[str, str], source: str | PathLike[str]
) -> None:
    """Warn where single pixels may differ, since other arithmetic drew them.

    Records of earlier versions say neither the number of threads nor the precisions.

    Args:
        records: of the pictures.
        here: what they would depend on now (`made_on`).
        source: of the records, for the message.
    """
    for name in ("device", "torch", "threads", "precision", "text_precision"):
        there = {record.made_by.get(name, here.get(name)) for record in records}
        if name in here and (others := there - {here[name]}):
            warnings.warn(
                f"{printable(str(source))} was drawn with {name} "
                f"{printable(', '.join(sorted(map(str, others))), 80)}, this is {here[name]}: "
                "single pixels may differ",
                stacklevel=3,
            )


def read_records(path: str | PathLike[str]) -> list[Record]:
    """Where a PNG's pictures come from, in the order of the sheet.

    Raises:
        ValueError: not an image, one without a record, or with one that is damaged or not ours.
    """
    path = as_path(path)
    text = read_record(path)
    if text is None:
        raise ValueError(
            f"{printable(str(path))} does not say how it was drawn: only PNG files written by this "
            "package do (other programs may have removed it)"
        )
    return from_json(text, path)


def to_json(records: Sequence[Record]) -> str:
    """One document for all of them."""
    drawings = [
        {
            "model": record.model,
            "made_by": record.made_by,
            "prompts": record.request.prompts,
            "negative_prompts": record.request.negatives,
            "options": {
                name: with_names(asdict(given)) for name, given in record.request.options.items()
            },
            "rows": record.rows,
            "image_size": record.request.image_size,
            "edit": record.request.edit,
        }
        for record in records
    ]
    document = {"format": FORMAT, "version": VERSION, "drawings": drawings}
    return json.dumps(document, ensure_ascii=False)


def from_json(text: str, source: str | PathLike[str]) -> list[Record]:
    """Read what `to_json` wrote, and trust none of it.

    Raises:
        ValueError: naming the source.
    """
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("it is not in this package's format")
        version = document.get("version")
        if version not in (1, VERSION) or isinstance(version, bool):
            raise ValueError(
                f"it has format version {version!r}, this package reads up to {VERSION}"
            )
        records = [_record(drawing, version) for drawing in document["drawings"]]
        if not records:
            raise ValueError("it lists no pictures")
        return records
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{printable(str(source))}: the record of how it was drawn cannot be used: "
            f"{printable(what, 300)}"
        ) from error


def _record(drawing: dict[str, Any], version: int) -> Record:
    prompts, negatives = drawing["prompts"], drawing["negative_prompts"]
    _demand("prompts", prompts, str)
    if negatives is not None:
        _demand("negative_prompts", negatives, str, len(prompts))
    _demand("rows", drawing["rows"], int)
    if not all(0 <= row < len(prompts) for row in drawing["rows"]):
        raise ValueError(f"rows {drawing['rows']} of {len(prompts)} prompts")
    made_by = drawing["made_by"]
    _demand("made_by", list(made_by.values()), str)
    _demand("model", [drawing["model"]], str)
    if not set(drawing["model"]) <= set(string.hexdigits):
        raise ValueError("model is not a fingerprint")
    options = {}
    for stage, values in drawing["options"].items():
        values = without_functions(upgraded(values))
        unknown = values.keys() - {field.name for field in fields(SampleOptions)}
        if stage not in ("base", "superres") or unknown:
            raise ValueError(f"unknown options {stage!r} {sorted(unknown)}, of a later version?")
        _demand("seeds", values["seeds"], int, len(prompts))
        options[stage] = SampleOptions(**values).with_rows(len(prompts))
    edit, size = drawing.get("edit"), drawing.get("image_size")
    if not options or ("base" not in options and edit is None):
        raise ValueError("options of the base are missing")
    if version > 1 or size is not None:  # at first, only of pictures of another size than trained
        _demand("image_size", size, int, 2)
    if edit is not None and not isinstance(edit["kind"], str):
        raise ValueError("edit has no kind")
    request = Request(
        prompts=prompts,
        negatives=negatives,
        options=options,
        image_size=(size[0], size[1]) if size else (0, 0),
        edit=edit,
    )
    return Record(request, tuple(drawing["rows"]), drawing["model"], made_by, version)


def _demand(name: str, values: Any, kind: type, count: int | None = None) -> None:
    """A list of values of one kind, not empty, and of a certain length if one is given."""
    good = isinstance(values, list) and values and all(type(value) is kind for value in values)
    if not good or count not in (None, len(values)):
        raise ValueError(f"{name} must be a list of {count or 'some'} {kind.__name__}")
