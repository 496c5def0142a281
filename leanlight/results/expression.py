"""Arithmetic over a table's rows and metrics, as claims write it: ``convnet['test/loss'] - linear['test/loss']``."""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from leanlight.contracts.errors import UserError, nearest

Reference = tuple[str, str]  # row, metric
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "mean": lambda *values: math.fsum(values) / len(values),
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "abs": abs,
    "log": math.log,
}
_ONE_ARGUMENT = ("abs", "log")
_DEVIATION = "deviation"
_LONGEST = 1000  # characters; more would only serve to exhaust the parser
_DEEPEST = 100  # levels; evaluation takes two calls a level


@dataclass(frozen=True)
class Expression:
    """A checked expression. text: as written. references: the (row, metric) pairs it reads, in order."""

    text: str
    references: tuple[Reference, ...]
    _tree: ast.expr

    def evaluate(self, values: Mapping[Reference, float], medians: Mapping[Reference, float] | None = None) -> float:
        """Return its value for one seed; ArithmeticError or ValueError where it has none (division by zero, log of 0).

        medians: over the seeds, from which `deviation` measures.
        """
        result = _evaluate(self._tree, values, medians or {})
        if not math.isfinite(result):
            raise ArithmeticError(f"the result is {result}")
        return result


def parse_expression(text: str, rows: Collection[str], metrics: Collection[str], where: str) -> Expression:
    """Check `text` against the names of rows and metrics; nothing of it is ever run as Python.

    Allowed: numbers, parentheses, ``+ - * /``, ``row['metric']`` and mean, min, max, abs, log (natural), and
    ``deviation(row['metric'])``: how far the value lies from its median over the seeds. With it a claim compares
    spreads over seeds, in the manner of Brown and Forsythe (1974).
    """
    try:
        if len(text) > _LONGEST:
            raise SyntaxError
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{where}: expr {text[:80]!r} is not an arithmetic expression") from None
    if _depth(tree) > _DEEPEST:
        raise UserError(f"{where}: expr {text[:80]!r} is nested more than {_DEEPEST} levels deep")
    references: list[Reference] = []
    _check(tree, rows, metrics, f"{where}: expr", references)
    if not references:
        raise UserError(f"{where}: expr {text!r} reads no row; write row['metric']")
    return Expression(text, tuple(dict.fromkeys(references)), tree)


def metric_of(text: str) -> str | None:
    """The metric in whose unit a checked expression's value is; None for products, ratios, logs and mixed metrics."""
    return _metric_of(ast.parse(text, mode="eval").body) or None


def _metric_of(node: ast.expr) -> str | None:
    """As `metric_of`; empty for a plain number, which fits to any unit."""
    match node:
        case ast.Constant():
            return ""
        case ast.Subscript(slice=ast.Constant(value=str() as metric)):
            return metric
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right):
            parts = [_metric_of(left), _metric_of(right)]
            if parts[1] == "":
                return parts[0]
            return parts[1] if isinstance(op, ast.Mult) and parts[0] == "" else None
        case ast.BinOp(left=left, right=right):
            children = [left, right]
        case ast.UnaryOp(operand=operand):
            children = [operand]
        case ast.Call(func=ast.Name(id=name), args=arguments) if name != "log":
            children = arguments
        case _:
            return None
    units = {_metric_of(child) for child in children} - {""}
    return units.pop() if len(units) == 1 else (None if units else "")


def _depth(tree: ast.AST) -> int:
    level, depth = [tree], 0
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    return depth


def _check(node: ast.expr, rows: Collection[str], metrics: Collection[str], where: str, found: list[Reference]) -> None:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if abs(value) > sys.float_info.max:
                raise UserError(f"{where}: expected numbers up to {sys.float_info.max:.0e}, got {str(value)[:20]}")
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            children = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            children = [operand]
        case ast.Call(func=ast.Name(id=name), args=[ast.Subscript() as value], keywords=[]) if name == _DEVIATION:
            children = [value]
        case ast.Call(func=ast.Name(id=name), args=[_, *more] as arguments, keywords=[]) if name in _FUNCTIONS:
            if more and name in _ONE_ARGUMENT:
                raise UserError(f"{where}: {name}() takes one value")
            children = arguments
        case ast.Subscript(value=ast.Name(id=row), slice=ast.Constant(value=str() as metric)):
            if row not in rows:
                raise UserError(f"{where}: no row {row!r}{nearest(row, rows)}")
            if metric not in metrics:
                raise UserError(f"{where}: no metric {metric!r}{nearest(metric, metrics)}")
            found.append((row, metric))
            return
        case _:
            names = ", ".join(_FUNCTIONS)
            allowed = f"row['metric'], numbers, + - * /, {names} and {_DEVIATION}(row['metric'])"
            raise UserError(f"{where}: {ast.unparse(node)!r} is not allowed; expected {allowed}")
    for child in children:
        _check(child, rows, metrics, where, found)


def _evaluate(node: Any, values: Mapping[Reference, float], medians: Mapping[Reference, float]) -> float:
    def of(child: Any) -> float:
        return _evaluate(child, values, medians)

    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](of(left), of(right))
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](of(operand))
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name == _DEVIATION:
            return abs(of(argument) - _evaluate(argument, medians, medians))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return float(_FUNCTIONS[name](*(of(argument) for argument in arguments)))
        case ast.Subscript(value=ast.Name(id=row), slice=ast.Constant(value=str() as metric)):
            return values[row, metric]
    raise AssertionError(f"unchecked expression node {node!r}")
