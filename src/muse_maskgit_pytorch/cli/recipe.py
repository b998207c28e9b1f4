"""YAML files of options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..strings import as_path, shown
from .parser import refuse

MAX_VALUES = 10_000  # in one file


class Recipe:
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
                refuse(f"{self.path}: unknown key {shown(name)}", "", name, known)
        return said

    def _options(self, loader: yaml.SafeLoader, node: yaml.Node, name: str) -> dict[str, Any]:
        """Those of a section: below it, or in a file of their own beside this one."""
        if isinstance(node, yaml.MappingNode):
            return self._section(loader, node, f"{name}.")
        file = self.path.parent / as_path(node.value) if node.value else None
        if isinstance(node, yaml.ScalarNode) and file is not None and file.is_file():
            return Recipe(file, self.keys, self.sections).tree(name)
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
