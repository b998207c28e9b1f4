"""From constructor signatures to the keys of the command line and of YAML, by jsonargparse.

The signatures are the schema: no option, type or default is written down a second time here.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from argparse import ArgumentError
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, Any, Optional, get_type_hints

from ..strings import as_path
from .help import parameter_docs, text

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)": (?:'
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<kinds>.*?)\] Errors: .* "
    r"Given value: (?P<union_value>.*)|Expected a (?P<kind>.*)\. Got value: (?P<value>.*))"
)
KINDS = {
    r"<class 'NoneType'>": "null",
    r"<class '([\w.]+)'>": r"\1",
    r"typing\.": "",
    r"Literal\[([^\]]+)\]": r"one of \1",
    r", (?=[^,]+$)": " or ",
}


class Parser:
    """A parser with ``--config`` that names the nearest key where one is mistyped.

    It collects the options; jsonargparse, whose import alone takes longer than to find a mistyped
    one or to print the help, is made of them when they are to be read.

    Args:
        prog: words of the command.
        description: what it does.
    """

    def __init__(self, prog: str, description: str):
        self._about = dict(prog=prog, description=description)
        self._options: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._keys: set[str] = set()

    def add_argument(self, name: str, **settings: Any) -> None:
        """One option, or a word without dashes; the settings are jsonargparse's."""
        self._options.append(("add_argument", (name,), settings))
        self._keys.add(name.removeprefix("--"))

    def add_section(self, cls: type, name: str, skip: Collection[str] = ()) -> None:
        """All arguments of a constructor as ``--NAME.ARGUMENT``, with its defaults."""
        settings = dict(skip=set(skip), instantiate=False)
        self._options.append(("add_class_arguments", (cls, name), settings))
        self._keys |= {f"{name}.{key}" for key in inspect.signature(cls).parameters.keys() - skip}

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
        hints, docs = get_type_hints(cls.__init__), parameter_docs(cls)
        for key in inspect.signature(cls).parameters:
            if key not in skip and (only is None or key in only):
                # Optional and not `| None`: a hint may be a string or a special form
                hint = Optional[hints[key]]  # noqa: UP045
                self.add_argument(f"--{name}.{key}", type=hint, default=None, help=docs.get(key))

    def set_defaults(self, defaults: dict[str, Any]) -> None:
        """Other values for options that are left open."""
        self._parser.set_defaults(defaults)

    @cached_property
    def _parser(self) -> ArgumentParser:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(**self._about, exit_on_error=False)
        parser.add_argument("--config", action="config", help="YAML file with the same keys")
        for method, names, settings in self._options:
            getattr(parser, method)(*names, **settings)
        return parser

    def keys(self) -> set[str]:
        """Every key that may stand in YAML, with dots between the levels."""
        return set(self._keys)

    def read(self, argv: list[str]) -> Namespace:
        """Parse a command line and the YAML files it names.

        Raises:
            ValueError: an unknown key; the message names the nearest known one. A file that is no
                YAML, or says a key twice.
            ArgumentError: a value of another type, a required key without a value.
        """
        self.check(argv)
        try:
            return self._parser.parse_args(_with_files(argv, self.keys(), self.sections()))
        except ArgumentError as error:
            raise ArgumentError(None, _plain_words(str(error))) from error
        except RecursionError as error:
            raise ValueError("an option's value is nested too deep to be one") from error

    def check(self, argv: list[str]) -> None:
        """Print the help where it is asked for, and refuse options that there are not.

        Raises:
            ValueError: an unknown option; the message names the nearest known one.
            SystemExit: after the help.
        """
        flags = self.keys() | self.sections() | {"config", "print_config", "help"}
        for flag in _flags(argv):
            if flag.removesuffix("+") not in flags:
                refuse(f"unknown option --{flag}", "--", flag, flags)
        if {"-h", "--help"} & set(takewhile(lambda word: word != "--", argv)):
            print(text(**self._about, options=self._options), end="")
            raise SystemExit(0)

    def said(self, argv: list[str], key: str) -> str | None:
        """What a command line or its YAML files say for one key, before the rest is parsed."""
        found, words = None, _with_files(argv, self.keys(), self.sections())
        for word, after in zip_longest(words, words[1:]):
            flag, equals, value = word.partition("=")
            if word == "--":
                break
            if flag == f"--{key}":
                found = value if equals else after
            elif flag == "--config" and equals:
                tree = json.loads(value)
                found = tree.get(key, found) if isinstance(tree, dict) else found
        return found

    def sections(self) -> set[str]:
        """The names of the sections that keys stand in."""
        return {key.rpartition(".")[0] for key in self.keys()} - {""}


def stated(section: Namespace) -> dict[str, Any]:
    """What a section says, without what it leaves open."""
    return {key: value for key, value in section.as_dict().items() if value is not None}


def _flags(argv: list[str]) -> Iterator[str]:
    for word in argv:
        if word == "--":
            return
        if word.startswith("--"):
            yield word[2:].partition("=")[0]


def _with_files(argv: list[str], keys: set[str], sections: set[str]) -> list[str]:
    """The command line with the YAML files' contents in the place of their names.

    They are read here, so that a value in a file means what it means on the command line: by
    itself, jsonargparse takes ``no`` for False, and ``2024`` for no name of a folder.
    """
    from .recipe import Recipe

    words, out = iter(argv), []
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if word == "--":
            return [*out, word, *words]
        if not flag.startswith("--") or name not in {"config", *sections}:
            out.append(word)
            continue
        value = value if equals else next(words, None)
        section = "" if name == "config" else name
        if value is not None and (name == "config" or as_path(value).is_file()):
            path = as_path(value, flag)
            value = json.dumps(
                Recipe(path, keys, sections).tree(section), ensure_ascii=False, default=str
            )
        out += [flag] if value is None else [f"{flag}={value}"]
    return out


def _plain_words(message: str) -> str:
    """What jsonargparse says of a value of a wrong type, in a sentence."""
    found = WRONG_TYPE.search(" ".join(message.split()))
    if found is None:
        return message
    kinds = found["kinds"] or found["kind"]
    for pattern, plain in KINDS.items():
        kinds = re.sub(pattern, plain, kinds)
    value = found["union_value"] or found["value"]
    return f"{found['key']} must be {kinds}, not {'null' if value == 'None' else value}"


def refuse(what: str, prefix: str, key: str, known: Iterable[str]) -> None:
    """Raises:
    ValueError: naming the nearest key.
    """
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
