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
    read = _read(module) if module and steps else None
    if read is None:
        return None
    tree, package = read
    bound = [found for node in _statements(tree) for known, found in _bindings(node, package) if known in (last, "*")]
    if len(bound) != 1:  # not there, or it depends on what the module does
        return None
    return find(bound[0], steps - 1) if isinstance(bound[0], str) else Found(module, bound[0])


def _bindings(node: ast.stmt, package: str) -> Iterator[tuple[str, ast.AST | str]]:
    """What a statement gives a name to: a node, or the path of what it imports; ``*`` is any name."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        yield node.name, node
    elif isinstance(node, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and isinstance(node.target, ast.Name):
        yield node.target.id, node
    elif isinstance(node, ast.ImportFrom):
        with contextlib.suppress(ImportError):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((alias.asname or alias.name, f"{origin}.{alias.name}") for alias in node.names)


def exported(module: str) -> list[str]:
    """The names in ``__all__``."""
    found = find(f"{module}.__all__")
    return [] if found is None or not isinstance(found.node, ast.expr) else list(ast.literal_eval(found.node))


def options_of(found: Found | None) -> Options | None:
    """The arguments of a class, with those that it hands on to its only base by ``**``."""
    known, init = _constructor(found)
    if not known or found is None:
        return None
    if init is None:
        return options_of(_base(found))
    own: Options = {a.arg: Found(found.module, a.annotation) if a.annotation else None for a in _named(init)[1:]}
    if init.args.kwarg is None:
        return own
    taken, base = _set_by_itself(init, init.args.kwarg.arg), options_of(_base(found))
    if taken is None or base is None:
        return None
    return {name: annotation for name, annotation in base.items() if name not in taken} | own


def objection(found: Found | None, values: dict[str, Any], unknown: Set[str] = frozenset()) -> str | None:
    """What a constructor would say against plain values, as far as it checks them alone: ``if test: raise Error(...)``.

    Args:
        found: The class; what it inherits is seen to within its package.
        values: Of some of its arguments; the others have their defaults.
        unknown: Arguments of which nothing is known.
    """
    known, init = _constructor(found)
    if not known or found is None:
        return None
    base = _base(found)
    if base is not None and base.module.partition(".")[0] != found.module.partition(".")[0]:
        base = None
    if init is None:
        return objection(base, values, unknown)
    changed = {node.id for node in ast.walk(init) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = {name: value for name, value in (_defaults(init.args) | values).items() if name not in unknown | changed}
    for node in init.body:
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and isinstance(node.body[0].exc, ast.Call):
            # what needs more than the values, a function or a constant, fails by NameError, and is left to the import
            with contextlib.suppress(Exception):
                if _value(node.test, names):
                    return str(_value(node.body[0].exc.args[0], names))
    taken = None if init.args.kwarg is None else _set_by_itself(init, init.args.kwarg.arg)
    if taken is None:
        return None
    mine = {argument.arg for argument in _named(init)}
    return objection(base, {k: v for k, v in values.items() if k not in mine}, unknown - mine | taken)


def arguments_of(found: Found | None, method: str) -> list[str]:
    """The names of a method's arguments, ``self`` among them; none if there is no such method."""
    for node in found.node.body if found is not None and isinstance(found.node, ast.ClassDef) else ():
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return [argument.arg for argument in _named(node)]
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
        found = find(f"{module}.{node.id}")
        if found is None and node.id in ("int", "float", "bool"):
            return [bool if node.id == "bool" else float]
        return accepted(found)
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return None
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Literal":
        constants = [part.value for part in parts if isinstance(part, ast.Constant)]
        return constants if len(constants) == len(parts) else None
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
    except (ImportError, OSError, RecursionError, SyntaxError, ValueError):
        pass
    return None


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module, and those that it runs on a condition."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node)
        elif isinstance(node, ast.stmt):
            yield node


def _constructor(found: Found | None) -> tuple[bool, ast.FunctionDef | None]:
    """Whether it is known how a class is made, and its own ``__init__`` if it has one."""
    if found is None or not isinstance(found.node, ast.ClassDef) or found.node.decorator_list or found.node.keywords:
        return False, None
    makers = [n for n in found.node.body for name, _ in _bindings(n, "") if name in ("__init__", "__new__")]
    if not makers:
        return True, None
    init = makers[0]
    if len(makers) > 1 or not isinstance(init, ast.FunctionDef) or init.name == "__new__":
        return False, None
    # this one, of Lightning's, takes the same arguments
    decorated = {ast.unparse(each) for each in init.decorator_list} - {"_defaults_from_env_vars"}
    return not decorated, init


def _named(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _base(found: Found) -> Found | None:
    """The only base of a class."""
    assert isinstance(found.node, ast.ClassDef)
    if len(found.node.bases) != 1 or not isinstance(found.node.bases[0], ast.Name):
        return None
    base = find(f"{found.module}.{found.node.bases[0].id}")
    return None if base == found else base


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
            clear = len(uses) == 1 and handed == uses and not call.args
            return {k.arg for k in call.keywords if k.arg} if clear else None
    return None
