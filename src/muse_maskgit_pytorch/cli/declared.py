"""What the package's source declares, read without running it.

A parser needs the arguments of constructors, their types, defaults and descriptions. To import the
models for them takes seconds, most of it torch's, and a mistyped option should not wait for that.
So the sources are parsed, and of them only what annotations and defaults name is evaluated.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

PACKAGE = Path(__file__).parents[1]
Parameters = dict[str, inspect.Parameter]


def declared(name: str) -> Any:
    """What a name of the package stands for.

    Args:
        name: module and name, as in "sampling.SampleOptions", without the package's.

    Returns:
        A constant's value; of a class or a function one without a body, with the same signature
        and docstring, whose annotations are objects.
    """
    module, _, last = name.rpartition(".")
    return _names(module)[last]


class _Names(dict[str, Any]):
    """The names of a module, each evaluated on first use."""

    def __init__(self, module: str):
        self.parts = module.split(".")
        path = PACKAGE.joinpath(*self.parts)
        if path.is_dir():
            self.parts.append("__init__")
        path = PACKAGE.joinpath(*self.parts).with_suffix(".py")
        self.nodes = dict(_definitions(ast.parse(path.read_text(encoding="utf-8")).body))

    def __missing__(self, name: str) -> Any:
        node = self.nodes.get(name)
        match node:
            case ast.ClassDef():
                value = self._class(node)
            case ast.FunctionDef():
                value = self._function(node)
            case ast.ImportFrom(module=module, level=level, names=aliases):
                [original] = [
                    alias.name for alias in aliases if (alias.asname or alias.name) == name
                ]
                if level:
                    value = _names(".".join([*self.parts[:-level], *filter(None, [module])]))[
                        original
                    ]
                else:
                    value = _outside(module or "", original)
            case ast.Import():
                value = _outside(name)
            case ast.expr():
                value = self.value(node)
            case _:
                value = getattr(builtins, name)
        self[name] = value
        return value

    def value(self, node: ast.expr) -> Any:
        """What an annotation or a default is."""
        return eval(compile(ast.Expression(node), "/".join(self.parts), "eval"), {}, self)

    def _function(self, node: ast.FunctionDef) -> Any:
        return _without_body(node.name, self._parameters(node), ast.get_docstring(node))

    def _class(self, node: ast.ClassDef) -> type:
        bases = [base for base in map(self.value, node.bases) if _Declared in base.__mro__]
        inherited: Parameters = bases[0].parameters if bases else {}
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if made:
            [init] = made
            own = self._parameters(init)
            own.pop("self")
            if init.args.kwarg is not None:
                del own[init.args.kwarg.arg]
                own |= {name: p for name, p in _passed_on(init, inherited) if name not in own}
        elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            own = dict(self._fields(node))
        else:
            own = inherited
        attributes = {
            "__doc__": ast.get_docstring(node),
            "__module__": PACKAGE.name,
            "__init__": _without_body("__init__", own, None, method=True),
            "parameters": own,
        }
        return type(node.name, (*bases, _Declared)[:1], attributes)

    def _fields(self, node: ast.ClassDef) -> Iterator[tuple[str, inspect.Parameter]]:
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield (
                    field.target.id,
                    self._parameter(field.target.id, field.annotation, field.value),
                )

    def _parameters(self, node: ast.FunctionDef) -> Parameters:
        given = node.args
        positional = [*given.posonlyargs, *given.args]
        absent: list[None] = [None] * (len(positional) - len(given.defaults))
        pairs = [
            *zip(positional, [*absent, *given.defaults], strict=True),
            *zip(given.kwonlyargs, given.kw_defaults, strict=True),
        ]
        found = {arg.arg: self._parameter(arg.arg, arg.annotation, value) for arg, value in pairs}
        if given.kwarg is not None:
            name = given.kwarg.arg
            found[name] = inspect.Parameter(name, inspect.Parameter.VAR_KEYWORD)
        return found

    def _parameter(
        self, name: str, annotation: ast.expr | None, default: ast.expr | None
    ) -> inspect.Parameter:
        empty = inspect.Parameter.empty
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=empty if annotation is None else self.value(annotation),
            default=empty if default is None else self.value(default),
        )


_names = cache(_Names)


class _Declared:
    """Base of the classes that stand for the package's."""

    parameters: ClassVar[Parameters] = {}


class _Outside(type):
    """Classes that stand for other packages', which annotations name and no option has."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Outside(name, (), {})

    def __getitem__(cls, key: Any) -> type:
        return cls


def _outside(module: str, name: str | None = None) -> Any:
    """A module of Python, or a name in it; of other packages a class that stands for it."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        found = import_module(module)
        return found if name is None else getattr(found, name)
    return _Outside(name or module, (), {})


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements bind, with what they are bound to."""
    for node in body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name, node
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                for alias in aliases:
                    yield alias.asname or alias.name, node
            case ast.Assign(targets=targets, value=value):
                yield from (
                    (target.id, value) for target in targets if isinstance(target, ast.Name)
                )
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=others):
                yield from _definitions(others)


def _passed_on(
    init: ast.FunctionDef, inherited: Parameters
) -> Iterator[tuple[str, inspect.Parameter]]:
    """What `super().__init__` can still be given, by ``**``."""
    [call] = [
        node
        for node in ast.walk(init)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"
    ]
    stated = {keyword.arg for keyword in call.keywords}
    for place, (name, parameter) in enumerate(inherited.items()):
        if place >= len(call.args) and name not in stated:
            yield name, parameter


def _without_body(name: str, parameters: Parameters, doc: str | None, method: bool = False) -> Any:
    """A function of these parameters that cannot be called."""

    def function() -> None:
        raise NotImplementedError(f"{name} is only declared here")

    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)] if method else []
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    function.__annotations__ = {
        name: p.annotation for name, p in parameters.items() if p.annotation is not p.empty
    }
    function.__signature__ = inspect.Signature([*own, *parameters.values()])  # type: ignore
    return function
