"""What ``--help`` prints of a command, from the options that its parser collected.

jsonargparse could print it too, but to import it takes longer than all of the rest.
"""

from __future__ import annotations

import inspect
import json
import types
from argparse import ArgumentParser
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

EMPTY = inspect.Parameter.empty
Option = tuple[str, tuple[Any, ...], dict[str, Any]]  # see `Parser`


def text(prog: str, description: str, options: Iterable[Option]) -> str:
    """The help of a command.

    Args:
        prog: words of the command.
        description: what it does.
        options: method, arguments and settings, as jsonargparse's parser takes them.
    """
    options = list(options)
    usage = [prog, "[options]"]
    for method, (name, *_), settings in options:
        if method == "add_argument" and not name.startswith("-"):
            forms = {"*": f"[{name} ...]", "+": f"{name} ..."}
            usage.append(forms.get(settings.get("nargs", ""), name))
    parser = ArgumentParser(prog, " ".join(usage), description, add_help=False)
    parser.add_argument("-h", "--help", action="help", help="show this")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys")
    parser.add_argument(
        "--print_config", action="store_true", help="show all options as YAML, and do no more"
    )
    for method, names, settings in options:
        if method == "add_argument":
            _add(parser, names[0], settings)
            continue
        cls, section = names
        docs = parameter_docs(cls)
        group = parser.add_argument_group(section, _first_sentence(cls))
        for name, parameter in inspect.signature(cls).parameters.items():
            if name not in settings["skip"]:
                about = {"type": parameter.annotation, "default": parameter.default}
                _add(group, f"--{section}.{name}", about | {"help": docs.get(name)})
    return parser.format_help()


@cache
def parameter_docs(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of the constructor's arguments."""
    from docstring_parser import DocstringStyle, parse

    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        for parameter in parse(vars(each).get("__doc__") or "", DocstringStyle.GOOGLE).params:
            found[parameter.arg_name] = parameter.description or ""
    return found


def _add(parser: Any, name: str, settings: dict[str, Any]) -> None:
    default = settings.get("default", EMPTY if settings.get("required") else None)
    about = [_kind(settings["type"])] if settings.get("type", EMPTY) is not EMPTY else []
    metavar = {}
    if name.startswith("-"):
        about.append("required" if default is EMPTY else f"default: {_shown(default)}")
        metavar = {"metavar": "..."}  # a name for the value would only repeat the option's
    said = " ".join([*str(settings.get("help") or "").split(), f"({', '.join(about)})"])
    parser.add_argument(name, help=said.replace("%", "%%"), **metavar)


def _first_sentence(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).replace("%", "%%")


def _shown(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(list(value) if isinstance(value, tuple | set) else value, default=str)


def _kind(hint: Any) -> str:
    """A type in words."""
    if hint is type(None) or hint is None:
        return "null"
    if isinstance(hint, str):
        return hint.replace("None", "null")
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_kind, inner)))
    if origin is not None:
        name = getattr(origin, "__name__", str(origin))
        kinds = ["..." if kind is ... else _kind(kind) for kind in inner if kind != []]
        return f"{name}[{', '.join(kinds)}]" if kinds else name
    if inspect.isfunction(hint):  # it reads the value
        return _kind(hint.__annotations__["return"])
    return getattr(hint, "__name__", str(hint))
