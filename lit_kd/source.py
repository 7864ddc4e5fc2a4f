"""What a class takes, read from its source: to import it may take seconds.

Where a source does not tell for certain, the answer is None: then whoever asks must not refuse anything.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Found(NamedTuple):
    """An expression or a statement, and the module whose names it uses."""

    module: str
    node: ast.AST


Options = dict[str, Found | None]
"""The annotation of each option."""


def find(name: str, steps: int = 9) -> Found | None:
    """What a name such as ``lightning.pytorch.Trainer`` stands for: a class or an assigned expression.

    Args:
        name: With dots.
        steps: How many imports are followed.
    """
    module, _, last = name.rpartition(".")
    found = _read(module) if module and steps else None
    if found is None:
        return None
    tree, package = found
    for node in _statements(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == last:
            return Found(module, node)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == last for t in node.targets):
            return Found(module, node.value)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == last:
                    origin = "." * node.level + (node.module or "")
                    return find(f"{importlib.util.resolve_name(origin, package)}.{alias.name}", steps - 1)
    return None


def exported(module: str) -> list[str]:
    """The names in ``__all__``."""
    found = find(f"{module}.__all__")
    return [] if found is None or not isinstance(found.node, ast.expr) else list(ast.literal_eval(found.node))


def options_of(found: Found | None) -> Options | None:
    """The arguments of a class, with those that it hands on to its only base by ``**``."""
    if found is None or not isinstance(found.node, ast.ClassDef):
        return None
    functions = {node.name: node for node in found.node.body if isinstance(node, ast.FunctionDef)}
    if "__new__" in functions or found.node.decorator_list or found.node.keywords:
        return None
    if "__init__" not in functions:
        return options_of(_base(found))
    arguments = functions["__init__"].args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs][1:]
    own: Options = {a.arg: Found(found.module, a.annotation) if a.annotation else None for a in named}
    if arguments.kwarg is None:
        return own
    taken, base = _set_by_itself(functions["__init__"], arguments.kwarg.arg), options_of(_base(found))
    if taken is None or base is None:
        return None
    return {name: annotation for name, annotation in base.items() if name not in taken} | own


def objection(found: Found | None, values: dict[str, Any], unknown: Set[str] = frozenset()) -> str | None:
    """What a constructor would say against plain values, as far as it checks them alone: ``if test: raise Error(...)``.

    Args:
        found: The class.
        values: Of some of its arguments; the others have their defaults.
        unknown: Arguments of which nothing is known.
    """
    if found is None or not isinstance(found.node, ast.ClassDef):
        return None
    init = next((n for n in found.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return objection(_base(found), values, unknown)
    known = {name: value for name, value in (_defaults(init.args) | values).items() if name not in unknown}
    for node in init.body:
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and isinstance(node.body[0].exc, ast.Call):
            # what needs more than the values, a function or a constant, fails by NameError, and is left to the import
            with contextlib.suppress(Exception):
                if _value(node.test, known):
                    return str(_value(node.body[0].exc.args[0], known))
    rest = init.args.kwarg
    taken = None if rest is None else _set_by_itself(init, rest.arg)
    if taken is None:
        return None
    mine = {a.arg for a in (*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs)}
    handed = {name: value for name, value in values.items() if name not in mine}
    return objection(_base(found), handed, unknown - mine | taken)


def arguments_of(found: Found | None, method: str) -> list[str]:
    """The names of a method's arguments, ``self`` among them; none if there is no such method."""
    for node in found.node.body if found is not None and isinstance(found.node, ast.ClassDef) else ():
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return []


def accepted(annotation: Found | None) -> list[Any] | None:
    """Which values an annotation allows: constants, and ``float`` for any number, ``bool`` for any truth value."""
    if annotation is None:
        return None
    module, node = annotation
    if isinstance(node, ast.Constant):
        return [None] if node.value is None else None
    if isinstance(node, ast.BinOp):
        return _together(module, [node.left, node.right])
    if isinstance(node, ast.Name):
        if node.id in ("int", "float", "bool"):
            return [bool if node.id == "bool" else float]
        return accepted(find(f"{module}.{node.id}"))
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return None
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Literal":
        return [part.value for part in parts if isinstance(part, ast.Constant)]
    return _together(module, parts) if node.value.id in ("Optional", "Union") else None


def _together(module: str, parts: list[ast.expr]) -> list[Any] | None:
    allowed = [accepted(Found(module, part)) for part in parts]
    return None if None in allowed else [each for some in allowed for each in some or ()]


@cache
def _read(module: str) -> tuple[ast.Module, str] | None:
    """A module's source, and the package it lies in. Only the topmost package is looked for: this imports nothing."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        if spec is None:
            return None
        for folder in spec.submodule_search_locations or ():
            inside = Path(folder, *rest)
            if (inside / "__init__.py").is_file():
                return ast.parse((inside / "__init__.py").read_bytes()), module
            if rest and Path(f"{inside}.py").is_file():
                return ast.parse(Path(f"{inside}.py").read_bytes()), module.rpartition(".")[0]
        if spec.submodule_search_locations is None and not rest and spec.has_location and spec.origin is not None:
            return ast.parse(Path(spec.origin).read_bytes()), ""
    except (ImportError, OSError, SyntaxError, ValueError):
        pass
    return None


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module, and those that it runs on a condition."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node)
        elif isinstance(node, ast.stmt):
            yield node


def _base(found: Found) -> Found | None:
    """The only base of a class."""
    assert isinstance(found.node, ast.ClassDef)
    if len(found.node.bases) != 1 or not isinstance(found.node.bases[0], ast.Name):
        return None
    return find(f"{found.module}.{found.node.bases[0].id}")


def _defaults(arguments: ast.arguments) -> dict[str, Any]:
    """Those that are plain values."""
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(named[::-1], arguments.defaults[::-1], strict=False)]
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    return {a.arg: default.value for a, default in pairs if isinstance(default, ast.Constant)}


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "", "eval"), {"__builtins__": {}}, names)


def _set_by_itself(init: ast.FunctionDef, rest: str) -> set[str] | None:
    """What ``super().__init__(name=..., **rest)`` sets, if that is all that is done with the rest."""
    uses = [node for node in ast.walk(init) if isinstance(node, ast.Name) and node.id == rest]
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            handed = [keyword.value for keyword in call.keywords if keyword.arg is None]
            return {k.arg for k in call.keywords if k.arg} if len(uses) == 1 and handed == uses else None
    return None
