"""Mutants of a Python module: each differs from it in one small thing that a programmer might have got wrong."""

import ast
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

_OTHER_OPERATOR: Final[dict[type[ast.AST], type[ast.AST]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
_CAN_BE_LEFT_OUT: Final = (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Break, ast.Continue)
_OTHER_FUNCTION: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Only what functions do: limits, defaults and tables are choices, and the texts of messages are no behaviour."""
    tree = ast.parse(source)
    for index, node in enumerate(_nodes(tree)):
        for number, (change, _) in enumerate(_changes(node)):
            copy = ast.parse(source)
            twin = _nodes(copy)[index]
            _changes(twin)[number][1]()
            yield Mutant(getattr(node, "lineno", 0), change, ast.unparse(ast.fix_missing_locations(copy)))


def _nodes(tree: ast.Module) -> list[ast.AST]:
    """Functions, and what they do; in the same order for every copy of a tree."""
    found: dict[ast.AST, None] = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            found[function] = None
            for statement in function.body:
                found.update(dict.fromkeys(_walk(statement)))
    return list(found)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.JoinedStr):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


_Change = tuple[str, Callable[[], None]]


def _changes(node: ast.AST) -> list[_Change]:
    """What can be changed about this node: in words, and how."""
    changes = [*_operators(node), *_conditions(node), *_values(node)]
    for body in ("body", "orelse"):
        statements = getattr(node, body, None)
        if isinstance(statements, list):
            changes += _left_out(statements)
    return changes


def _operators(node: ast.AST) -> Iterator[_Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from _other(node, node.ops[0], lambda operator: node.ops.__setitem__(0, operator))
    elif isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign):
        yield from _other(node, node.op, lambda operator: setattr(node, "op", operator))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OTHER_FUNCTION:
        function, other = node.func, _OTHER_FUNCTION[node.func.id]
        yield f"{function.id} -> {other}", lambda: setattr(function, "id", other)


def _other(node: ast.AST, operator: ast.AST, put: Callable[[ast.AST], None]) -> Iterator[_Change]:
    if other := _OTHER_OPERATOR.get(type(operator)):
        yield f"{type(operator).__name__} -> {other.__name__}", lambda: put(other())


def _conditions(node: ast.AST) -> Iterator[_Change]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        operand = node.operand
        yield "not x -> x", lambda: setattr(node, "operand", ast.UnaryOp(ast.Not(), operand))
    elif isinstance(node, ast.BoolOp):
        for index, value in enumerate(node.values):
            yield f"without `{ast.unparse(value)}`", lambda i=index: node.values.pop(i)  # type: ignore[misc]
    elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare | ast.BoolOp):
        test = node.test
        yield f"not ({ast.unparse(test)})", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), test))


def _values(node: ast.AST) -> Iterator[_Change]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", lambda: setattr(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} -> {node.value + 1}", lambda: setattr(node, "value", node.value + 1)
    elif isinstance(node, ast.List) and isinstance(node.ctx, ast.Load):
        for index, element in enumerate(node.elts):
            yield f"[…] without `{ast.unparse(element)}`", lambda i=index: node.elts.pop(i)  # type: ignore[misc]


def _left_out(statements: list[ast.stmt]) -> Iterator[_Change]:
    for index, statement in enumerate(statements):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, _CAN_BE_LEFT_OUT):
            words = ast.unparse(statement).partition("\n")[0]
            yield f"without `{words}`", lambda i=index: statements.__setitem__(i, ast.Pass())  # type: ignore[misc]
