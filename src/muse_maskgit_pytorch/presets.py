"""Sampling options by name, as a stage stores them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .arguments import shown
from .sampling import SampleOptions, known_fields, upgraded


def make_presets(
    default: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]], timesteps: int
) -> dict[str, SampleOptions]:
    """All presets of a stage, its ``default`` as "default".

    Args:
        default: fields of `SampleOptions`.
        presets: likewise, by name.
        timesteps: of those that do not state any.

    Raises:
        ValueError: a reserved name; an unknown field or a bad value, naming the preset.
    """
    made = {"default": _options("sample_options", default, timesteps)}
    for name, settings in presets.items():
        made[check_preset(name)] = _options(f"preset {name!r}", settings, timesteps)
    return made


def find_preset(presets: Mapping[str, SampleOptions], name: str) -> SampleOptions:
    """The options of that name.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(name, str) or name not in presets:
        known = ", ".join(presets)
        near = _near(str(name), presets)
        raise ValueError(f"unknown preset {shown(name)}{near}; the presets are {known}")
    return presets[name]


def check_preset(name: str) -> str:
    """Refuse names that have a meaning of their own.

    Raises:
        ValueError: "default" or "superres", or an empty name.
    """
    meaning = {
        "default": "is the model's sample_options",
        "superres": "is the default of a cascade's second stage",
        "": "is not a name",
    }
    if name in meaning:
        raise ValueError(f"preset {name!r} {meaning[name]}: choose another name, or set that")
    return name


def _options(name: str, settings: Mapping[str, Any], timesteps: int) -> SampleOptions:
    try:
        return SampleOptions(**known_fields(upgraded({"timesteps": timesteps, **settings})))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
