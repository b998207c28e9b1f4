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
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace

from ..arguments import as_path, shown

MAX_VALUES = 10_000  # in one YAML file
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
            ValueError: an unknown key; the message names the nearest known one. A file that is no
                YAML, or says a key twice.
            ArgumentError: a value of another type, a required key without a value.
        """
        keys, sections = self.keys(), self.sections()
        flags = keys | sections | {"config", "print_config", "help"}
        for flag in _flags(argv):
            if flag.removesuffix("+") not in flags:
                _refuse(f"unknown option --{flag}", "--", flag, flags)
        try:
            return self.parse_args(_with_files(argv, keys, sections))
        except ArgumentError as error:
            raise ArgumentError(None, _plain_words(str(error))) from error
        except RecursionError as error:
            raise ValueError("an option's value is nested too deep to be one") from error

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
                _Recipe(path, keys, sections).tree(section), ensure_ascii=False, default=str
            )
        out += [flag] if value is None else [f"{flag}={value}"]
    return out


class _Recipe:
    """A YAML file, checked against the keys that there are.

    Raises:
        ValueError: from `tree`, naming the file.
    """

    def __init__(self, path: Path, keys: set[str], sections: set[str]):
        self.path, self.keys, self.sections = path, keys, sections
        self.left = MAX_VALUES

    def tree(self, section: str = "") -> dict[str, Any]:
        """What it says, its values as the words that would stand on the command line.

        Args:
            section: whose options the file holds; "" for all.
        """
        try:
            loader = yaml.SafeLoader(self.path.read_text(encoding="utf-8-sig"))
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ValueError(
                    f"{self.path} holds no keys, but must read like `vae: {{dim: 64}}`"
                )
            return self._section(loader, node, f"{section}." if section else "")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is not valid YAML: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{self.path} is nested too deep to be a recipe") from error

    def _section(
        self, loader: yaml.SafeLoader, node: yaml.MappingNode, above: str
    ) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for key, value in self._pairs(loader, node):
            name = f"{above}{key}"
            if name in self.sections:
                said[key] = self._options(loader, value, name)
            elif name in self.keys:
                said[key] = self._words(loader, value)
            else:
                known = self.keys | self.sections
                _refuse(f"{self.path}: unknown key {shown(name)}", "", name, known)
        return said

    def _options(self, loader: yaml.SafeLoader, node: yaml.Node, name: str) -> dict[str, Any]:
        """Those of a section: below it, or in a file of their own beside this one."""
        if isinstance(node, yaml.MappingNode):
            return self._section(loader, node, f"{name}.")
        file = self.path.parent / as_path(node.value) if node.value else None
        if isinstance(node, yaml.ScalarNode) and file is not None and file.is_file():
            return _Recipe(file, self.keys, self.sections).tree(name)
        said = shown(loader.construct_object(node, deep=True))
        raise ValueError(f"{self.path}: {name} must hold options, not {said}")

    def _pairs(
        self, loader: yaml.SafeLoader, node: yaml.MappingNode
    ) -> Iterator[tuple[str, yaml.Node]]:
        """Keys and values; a key that is said twice would drop the first silently."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{self.path}: {shown(key.tag)} in the place of a key")
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{self.path}: {shown(key.value)} stands in line {lines[key.value]} and again "
                    f"in line {line}: join the two"
                )
            lines[key.value] = line
        loader.flatten_mapping(node)  # what `<<` brings in
        yield from {key.value: value for key, value in node.value}.items()

    def _words(self, loader: yaml.SafeLoader, node: yaml.Node, typed: bool = False) -> Any:
        """A value as the words of which the parser, who knows its type, makes it.

        Args:
            loader: of the file.
            node: the value.
            typed: whether it is in a mapping that is a value itself: YAML decides on its types.
        """
        self.left -= 1
        if self.left < 0:  # a few lines of aliases may stand for more than a memory holds
            raise ValueError(f"{self.path} holds more than {MAX_VALUES} values")
        if isinstance(node, yaml.SequenceNode):
            return [self._words(loader, item, typed) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return {key: self._words(loader, item, True) for key, item in self._pairs(loader, node)}
        if typed:
            return loader.construct_object(node)
        return node.value if node.value or getattr(node, "style", None) else "null"


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
