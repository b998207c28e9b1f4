"""Bearer tokens: who may ask, and for how much."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

import yaml

from ..arguments import as_path, as_text, real, shown, whole

MINUTE = 60.0


class TooMany(Exception):
    """A token's limit is reached.

    Attributes:
        retry_after: seconds after which it may ask again.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Token:
    """One client's limits.

    Args:
        name: of the client.
        per_minute: the most pictures within a minute; without limit by default.
        at_once: the most pictures at the same time.
        priority: of its requests, see `Engine.submit`.
    """

    name: str = "anybody"
    per_minute: int | None = None
    at_once: int | None = None
    priority: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _lately: deque[float] = field(default_factory=deque, repr=False)
    _now: int = 0

    def __post_init__(self):
        as_text(self.name, "a token's name")
        for limit in ("per_minute", "at_once"):
            if getattr(self, limit) is not None:
                whole(limit, getattr(self, limit), 1)
        real("priority", self.priority)

    def take(self, pictures: int) -> None:
        """Count so many pictures as being drawn, until they are `given_back`.

        Raises:
            TooMany: beyond a limit.
        """
        with self._lock:
            now = time.monotonic()
            while self._lately and now - self._lately[0] > MINUTE:
                self._lately.popleft()
            if self.at_once is not None and self._now + pictures > self.at_once:
                raise TooMany(
                    f"this token may draw {self.at_once} pictures at the same time: wait until "
                    "others are done",
                    1.0,
                )
            if self.per_minute is not None and len(self._lately) + pictures > self.per_minute:
                free = len(self._lately) + pictures - self.per_minute
                first = self._lately[min(free, len(self._lately)) - 1] if self._lately else now
                raise TooMany(
                    f"this token may draw {self.per_minute} pictures a minute: wait a little",
                    max(1.0, MINUTE - (now - first)),
                )
            self._now += pictures
            self._lately.extend([now] * pictures)

    def give_back(self, pictures: int) -> None:
        """They are done."""
        with self._lock:
            self._now -= pictures


class Tokens:
    """The known tokens; with none, everybody may ask.

    Only digests of them are kept: to look one up takes no longer for a better guess.

    Args:
        known: limits by token.
    """

    def __init__(self, known: Mapping[str, Token] | None = None):
        self.known = {_digest(token): limits for token, limits in (known or {}).items()}
        self.anybody = Token() if not self.known else None

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Tokens:
        """Of a YAML file: each token with its limits, ``sk-...: {name: A, per_minute: 10}``.

        Raises:
            ValueError: another form, or a limit out of range; no message has a token in it.
        """
        where = as_path(path, "tokens")
        document: Any = yaml.safe_load(where.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not document:
            raise ValueError(
                f"{where}: must list tokens, each with its limits: sk-...: {{name: A}}"
            )
        allowed, known = {f.name for f in fields(Token) if f.name[0] != "_"}, {}
        for place, (token, limits) in enumerate(document.items(), 1):
            limits = limits or {}
            if not isinstance(token, str) or len(token) < 16:
                raise ValueError(f"{where}: token {place} must be a text of 16 characters or more")
            if not isinstance(limits, dict) or set(limits) - allowed:
                raise ValueError(
                    f"{where}: the limits of token {place} must be among {sorted(allowed)}, not "
                    f"{shown(limits)}"
                )
            known[token] = Token(**limits)
        return cls(known)

    def find(self, header: str | None) -> Token | None:
        """The limits of whoever sent this Authorization header; None for a stranger."""
        if self.anybody is not None:
            return self.anybody
        scheme, _, token = (header or "").partition(" ")
        return self.known.get(_digest(token.strip())) if scheme.lower() == "bearer" else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
