"""Paths and texts from outside, and values in messages, with nothing but Python.

What the command line needs before it is known to be right: importing torch takes far longer.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from pathlib import Path
from typing import Any


def as_path(value: Any, name: str = "path") -> Path:
    """A path, with ``~`` for the home folder.

    Raises:
        ValueError: no path.
    """
    if not isinstance(value, (str, os.PathLike)) or not (text := os.fspath(value)):
        raise ValueError(f"{name} must be a path, not {shown(value)}")
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"{name} {shown(text)} is no path")
    return Path(text).expanduser()


def as_text(value: Any, name: str) -> str:
    """A text that is whole: bytes that are no UTF-8 and halves of an emoji become U+FFFD.

    Both come as lone surrogates: from a command line or a file name, or out of JSON. A warning
    says so. A NUL stands for no letter, and becomes U+FFFD too.

    Raises:
        ValueError: no text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {shown(value)}")
    good = "".join(
        "\ufffd" if letter == "\0" or "\ud800" <= letter <= "\udfff" else letter for letter in value
    )
    if good != value:
        warnings.warn(
            f"{name} has characters that are cut in half or no text, now U+FFFD: {shown(good)}",
            stacklevel=3,
        )
    return good


def shown(value: Any, limit: int = 80) -> str:
    """A value as a message shows it: on one line, short, without control characters."""
    try:
        text = repr(value)
    except Exception:  # of a foreign class, or an int with more digits than Python prints
        text = type(value).__name__
    return printable(text, limit)


def printable(text: str, limit: int | None = None) -> str:
    """Text for a terminal: control and format characters escaped, cut at ``limit`` characters.

    In a foreign file they may be meant for the terminal, or turn the direction of a line.
    """
    # a joiner and a variation selector are parts of an emoji
    letters = (
        letter
        if letter in "\u200d\ufe0f" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
    line = "".join(letters)
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."
