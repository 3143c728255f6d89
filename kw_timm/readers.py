"""Finds layers that other modules do not call, but read: ``F.linear(x, self.qkv.weight, bias)``.

A KW layer has no weight to read. Which attributes of its children a module reads is taken from the source of its
``forward`` and of what that calls with them, as far as it can be had.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

__all__ = ['find_reader']

Chain = tuple[str, ...]  # ('layers', '*', 'qkv', 'weight'): attributes of attributes of the module; '*' is any item
_DEPTH = 5
_ITEMS = ('values', 'children', 'modules')


def find_reader(modules: dict[str, nn.Module], layer: str, offered: set[str]) -> tuple[str, str] | None:
    """Return a module above a layer that reads what the layer's KW counterpart does not have.

    Args:
        modules: Modules of the network by name, ``''`` for the network.
        layer: Name of the layer.
        offered: Attributes that its counterpart has.

    Returns:
        Name of the module and of the attribute; None if no such module is known.
    """
    path = layer.split('.')
    for length in range(len(path) - 1, -1, -1):
        above = '.'.join(path[:length])
        for chain in _chains(type(modules[above])):  # type: ignore[arg-type]
            rest = path[length:]
            fits = len(chain) > len(rest) and all(a in ('*', b) for a, b in zip(chain, rest, strict=False))
            if fits and chain[len(rest)] != '*' and chain[len(rest)] not in offered:
                return above, chain[len(rest)]
    return None


@lru_cache(maxsize=512)
def _chains(module_class: type[nn.Module]) -> frozenset[Chain]:
    if getattr(module_class.forward, '__module__', '') == 'torch.nn.modules.container':
        return frozenset()
    found: set[Chain] = set()
    _Reads(module_class, found, set()).follow_method('forward', [], {}, 0)
    return frozenset(found)


class _Reads:
    """Attributes that functions read of a module, whatever names they have for it and for its children."""

    def __init__(self, module_class: type[nn.Module], found: set[Chain], seen: set[Any]) -> None:
        self.module_class, self.found, self.seen = module_class, found, seen

    def follow_method(self, name: str, args: list[Any], keywords: dict[str, Any], depth: int) -> None:
        """Look into a method of the module, and into what it overrides if it calls that."""
        for cls in self.module_class.__mro__:
            if cls is nn.Module:
                return
            method = inspect.unwrap(vars(cls)[name]) if name in vars(cls) and callable(vars(cls)[name]) else None
            if isinstance(method, FunctionType):
                tree = self.follow(method, [(), *args], keywords, depth)
                if tree is None or not any(isinstance(n, ast.Name) and n.id == 'super' for n in ast.walk(tree)):
                    return

    def follow(self, function: FunctionType, args: list[Any], keywords: dict[str, Any], depth: int) -> Any:
        """Look into a function whose arguments are chains, or None where they are something else."""
        tree = _tree(function)
        if tree is None or depth > _DEPTH:
            return tree
        names = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
        known = dict(zip(names, args, strict=False)) | keywords
        key = (function, tuple(sorted((k, v) for k, v in known.items() if v is not None)))
        if key not in self.seen:
            self.seen.add(key)
            _Body(self, function, {k: v for k, v in known.items() if v is not None}, depth).visit(tree)
        return tree


class _Body(ast.NodeVisitor):
    """One function's body, read from top to bottom."""

    def __init__(self, reads: _Reads, function: FunctionType, known: dict[str, Chain], depth: int) -> None:
        self.reads, self.function, self.known, self.depth = reads, function, known, depth

    def resolve(self, node: ast.AST) -> Chain | None:
        """Return which part of the module an expression is, None if it is none."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            value = self.resolve(node.value)
            return None if value is None else (*value, node.attr)
        if isinstance(node, ast.Subscript):
            value = self.resolve(node.value)
            return None if value is None else (*value, '*')
        if isinstance(node, ast.NamedExpr):
            return self.resolve(node.value)
        if isinstance(node, ast.Call):
            return self.resolve_call(node)
        return None

    def resolve_call(self, node: ast.Call) -> Chain | None:
        if isinstance(node.func, ast.Name) and node.func.id == 'getattr' and len(node.args) > 1:
            value, name = self.resolve(node.args[0]), node.args[1]
            is_word = isinstance(name, ast.Constant) and isinstance(name.value, str)
            return (*value, name.value) if value is not None and is_word else None  # type: ignore[attr-defined]
        if isinstance(node.func, ast.Attribute) and node.func.attr in _ITEMS and not node.args:
            return self.resolve(node.func.value)
        if isinstance(node.func, ast.Attribute) and node.func.attr == 'get_submodule' and node.args:
            value, name = self.resolve(node.func.value), node.args[0]
            if value is not None and isinstance(name, ast.Constant):
                return (*value, *str(name.value).split('.'))
        return None

    def items(self, node: ast.AST) -> Any:
        """Return what a loop over an expression gives: a chain, or a list of them."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == 'enumerate' and node.args:
                return [None, self.items(node.args[0])]
            if node.func.id == 'zip':
                return [self.items(arg) for arg in node.args]
            if node.func.id in ('reversed', 'list', 'tuple', 'iter') and node.args:
                return self.items(node.args[0])
        is_pairs = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_pairs and node.func.attr in ('items', 'named_children'):  # type: ignore[attr-defined]
            value = self.resolve(node.func.value)  # type: ignore[attr-defined]
            return [None, None if value is None else (*value, '*')]
        if isinstance(node, ast.Tuple | ast.List):
            return self.resolve(node.elts[0]) if node.elts else None
        value = self.resolve(node)
        return None if value is None else (*value, '*')

    def bind(self, target: ast.AST, value: Any) -> None:
        """Let names stand for parts of the module from here on."""
        if isinstance(target, ast.Name):
            if isinstance(value, tuple):
                self.known[target.id] = value
            else:
                self.known.pop(target.id, None)
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, list):
            for part, its_value in zip(target.elts, value, strict=False):
                self.bind(part, its_value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self.resolve(node)
        if chain is not None:
            self.reads.found.add(chain)
            if len(chain) == 1 and isinstance(getattr(self.reads.module_class, chain[0], None), property):
                self.follow_property(chain[0])
        self.generic_visit(node)

    def follow_property(self, name: str) -> None:
        getter = inspect.getattr_static(self.reads.module_class, name).fget
        if isinstance(getter, FunctionType):
            self.reads.follow(getter, [()], {}, self.depth + 1)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        both = isinstance(node.value, ast.Tuple)
        value = [self.resolve(v) for v in node.value.elts] if both else self.resolve(node.value)  # type: ignore[attr-defined]
        for target in node.targets:
            self.bind(target, value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.bind(node.target, self.resolve(node.value))

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.items(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, self.items(node.iter))
        self.generic_visit(node)

    def _visit_comprehension_of(self, node: Any) -> None:
        for generator in node.generators:  # They come behind what they bind names for.
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension_of

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        args = [self.resolve(arg) for arg in node.args]
        keywords = {k.arg: self.resolve(k.value) for k in node.keywords if k.arg is not None}
        callee = self.resolve(node.func)
        if callee is not None and len(callee) == 1:
            self.reads.follow_method(callee[0], args, keywords, self.depth + 1)
        elif isinstance(node.func, ast.Name) and any(a is not None for a in (*args, *keywords.values())):
            function = self.function.__globals__.get(node.func.id)
            if isinstance(function, FunctionType) and not function.__module__.startswith('torch.'):
                self.reads.follow(function, args, keywords, self.depth + 1)


@lru_cache(maxsize=2048)
def _tree(function: FunctionType) -> Any:
    try:
        found = next(_functions(ast.parse(textwrap.dedent(inspect.getsource(function)))), None)
    except (OSError, TypeError, SyntaxError, ValueError):  # No source to be had.
        return None
    return found


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
