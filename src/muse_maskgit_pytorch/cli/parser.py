"""From constructor signatures to the keys of the command line and of YAML, by jsonargparse.

The signatures are the schema: no option, type or default is written down a second time here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace


class Parser(ArgumentParser):
    """A parser with ``--config`` that names the nearest key where one is mistyped."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, exit_on_error=False)
        self.add_argument("--config", action="config", help="YAML file with the same keys")

    def add_section(self, cls: type, name: str, skip: Collection[str] = ()) -> None:
        """All arguments of a constructor as ``--NAME.ARGUMENT``, with its defaults."""
        self.add_class_arguments(cls, name, skip=set(skip), instantiate=False)

    def add_optional(
        self,
        cls: type,
        name: str,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> None:
        """Arguments of a constructor as ``--NAME.ARGUMENT`` that count only where stated.

        Their default is None, which `stated` drops.
        """
        hints = get_type_hints(cls.__init__)
        docs = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
        for key in inspect.signature(cls).parameters:
            if key not in skip and (only is None or key in only):
                # Optional and not `| None`: a hint may be a string or a special form
                hint = Optional[hints[key]]  # noqa: UP045
                self.add_argument(f"--{name}.{key}", type=hint, default=None, help=docs.get(key))

    def keys(self) -> set[str]:
        """Every key that may stand in YAML, with dots between the levels."""
        return set(self.get_defaults(skip_validation=True).keys()) - {"config"}

    def read(self, argv: list[str]) -> Namespace:
        """Parse a command line and the YAML files it names.

        Raises:
            ValueError: an unknown key; the message names the nearest known one.
            ArgumentError: a value of another type, a required key without a value.
        """
        keys = self.keys()
        sections = {key.rpartition(".")[0] for key in keys} - {""}
        flags = keys | sections | {"config", "print_config", "help"}
        for flag in _flags(argv):
            if flag.removesuffix("+") not in flags:
                _refuse(f"unknown option --{flag}", "--", flag, flags)
        for path in _configs(argv):
            for key, value in _leaves(path, sections):
                if key in sections and not isinstance(value, str):
                    raise ValueError(f"{path}: {key} must hold options, not {value!r}")
                if key not in keys | sections:
                    _refuse(f"{path}: unknown key {key!r}", "", key, keys | sections)
        return self.parse_args(argv)


def stated(section: Namespace) -> dict[str, Any]:
    """What a section says, without what it leaves open."""
    return {key: value for key, value in section.as_dict().items() if value is not None}


def _flags(argv: list[str]) -> Iterator[str]:
    for word in argv:
        if word == "--":
            return
        if word.startswith("--"):
            yield word[2:].partition("=")[0]


def _configs(argv: list[str]) -> Iterator[Path]:
    """The YAML files named on the command line that exist (jsonargparse reports the others)."""
    for word, after in zip_longest(argv, argv[1:], fillvalue=""):
        name, _, value = word.partition("=")
        if name == "--config" and Path(value or after).is_file():
            yield Path(value or after)


def _leaves(path: Path, sections: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Keys of a YAML file, with dots between the levels of sections, and their values."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds no keys, but must read like `vae: {{dim: 64}}`")

    def walk(node: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            name = f"{above}{key}"
            if name in sections and isinstance(value, Mapping):
                yield from walk(value, f"{name}.")
            else:
                yield name, value

    return walk(tree, "")


def _refuse(what: str, prefix: str, key: str, known: Iterable[str]) -> None:
    near = nearest(key, known)
    raise ValueError(f"{what}: " + (f"did you mean {prefix}{near}?" if near else "see --help"))


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that was most likely meant: in another section, misspelt, or none."""
    known = sorted(known)
    section, _, leaf = key.rpartition(".")
    moved = [other for other in known if other.rpartition(".")[2] == leaf]
    siblings = {o.rpartition(".")[2]: o for o in known if o.rpartition(".")[0] == section}
    if moved:
        found = difflib.get_close_matches(key, moved, n=1, cutoff=0)
    elif siblings:
        found = [siblings[o] for o in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.4)]
    else:
        found = difflib.get_close_matches(key, known, n=1)
    return found[0] if found else None
