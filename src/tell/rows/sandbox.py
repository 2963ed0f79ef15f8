"""Sandboxed Jinja for chat templates, which come with models: no access to Python, bounded time and memory.

jinja2's sandbox keeps a template from Python's objects, but not from running for days or filling the memory. Here each
iteration of a loop, call, filter, test and comparison costs one step, and each 256 characters that these or an operator
handle one more; a rendering has `MOST_STEPS`, and no text or list in it grows beyond `MOST_TEXT`.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, TypeVar, cast

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Filter = Callable[..., Any]
T = TypeVar("T")
N = TypeVar("N", bound=nodes.Node)

FIXED_DATE = datetime(2024, 7, 26)  # templates that print today's would make the mixture change overnight
MOST_STEPS = 300_000  # of one rendering; a conversation of 1,000 turns takes some ten thousand
MOST_TEXT = 16_000_000  # characters of a text, items of a list
MOST_BITS = 4096  # of a whole number
MOST_NUMBER = 1_000_000  # given to a function of texts: most are widths
_CHARACTERS = 256  # nodes that cost a step
# Tests of a value's type or number alone; all others pay for the size of their arguments.
_TYPE_TESTS = frozenset(
    {"defined", "undefined", "none", "boolean", "false", "true", "integer", "float", "number", "string", "mapping"}
    | {"iterable", "sequence", "callable", "sameas", "escaped", "odd", "even", "divisibleby"}
)
_WIDTH = re.compile(r"\*|\d{5,}")  # width of a field in a format


class Exceeded(Exception):
    """The template takes too long, or too much memory."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates terminate; ``start`` resets the step count for the next rendering.

    Attributes:
        lock: held by a rendering where several threads render: the count is one for all.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: object) -> None:
        super().__init__(**options, finalize=self._shown)
        self.left, self.lock = MOST_STEPS, threading.Lock()
        self.globals.pop("lipsum", None)
        for functions, free in ((self.filters, frozenset()), (self.tests, _TYPE_TESTS)):
            for name in functions.keys() - free:
                functions[name] = self.counted(name, cast("Filter", functions[name]))

    def start(self) -> None:
        """Count the steps of a rendering from here on."""
        self.left = MOST_STEPS

    @property
    def step(self) -> bool:
        """`tick` without a call, which the sandbox would check each time."""
        self.left -= 1
        if self.left < 0:
            raise Exceeded("it takes too many steps")
        return True

    def tick(self, characters: int = 0) -> bool:
        """Pay for a step that handles so many characters; returns True, for use in a condition."""
        self.left -= 1 + characters // _CHARACTERS
        if self.left < 0:
            raise Exceeded("it takes too many steps")
        return True

    def weighed(self, value: T) -> T:
        """Pay for a value that is compared or becomes a key, and return it."""
        if isinstance(value, str | list | tuple | dict | range):
            self.tick(self._size(value))
        else:
            self.left -= 1  # checked by the loop around it
        return value

    def searched(self, value: T) -> T:
        """A value that is searched with ``in``; a dictionary has its keys at hand."""
        return value if type(value) is dict else self.weighed(value)

    def joined(self, *parts: object) -> str:
        """``a ~ b``."""
        return self._join("", parts)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates compute
            self._copied(len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
            self.tick(len(left) + self._size(right))
        if isinstance(left, int) and isinstance(right, int):
            bits, more = left.bit_length(), right.bit_length()
            if (bits * abs(right) if operator == "**" else bits + more) > MOST_BITS:
                raise Exceeded("it computes with huge numbers")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    self._copied(len(text) * times)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self._copied(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: object, **kwargs: object) -> object:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        if owner is __self:  # our own `tick`, `joined` and the like, which no template can name
            return __obj(*args)
        __self.tick(__self._size(owner) + sum(map(__self._size, (*args, *kwargs.values()))))
        if isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            __self._check_text(name, owner, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> object:
        if isinstance(argument, slice):
            self.tick(self._size(obj))
        elif isinstance(argument, tuple):  # a key, whose hash is computed
            self.tick(self._size(argument))
        return super().getitem(obj, argument)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting(self).visit(source), *args, **kwargs)

    def counted(self, name: str, function: Filter) -> Filter:
        """A filter that pays for the size of its arguments and result."""
        passed = int(hasattr(function, "jinja_pass_arg"))  # the environment or context, before the value

        @functools.wraps(function)
        def counted(*args: object, **kwargs: object) -> object:
            given = (*args[passed:], *kwargs.values())
            self.tick(sum(map(self._size, given)))
            value: Any = given[0] if given else None
            if name == "join" and len(given) < 3 and "attribute" not in kwargs:
                return self._join(str(given[1]) if len(given) > 1 else "", value)
            self._check_text(name, value if isinstance(value, str) else "", given[1:])
            out = function(*args, **kwargs)
            self.tick(self._size(out))
            return out

        return counted

    def _check_text(self, name: str, text: str, given: tuple[Any, ...]) -> None:
        """Refuse calls on texts whose result alone would be too much."""
        if any(isinstance(value, int) and abs(value) > MOST_NUMBER for value in given):
            raise Exceeded("it gives a huge number to a function")
        if name in ("format", "format_map"):
            self._check_format(text)
        if name == "replace" and len(given) > 1:
            self._room(len(text) + text.count(str(given[0])) * len(str(given[1])))
        if name == "join" and given:
            self._join(text, given[0] if not isinstance(given[0], str) else list(given[0]))

    def _check_format(self, text: str) -> None:
        if _WIDTH.search(text):
            raise Exceeded("it writes fields of huge or variable width")

    def _join(self, separator: str, parts: Iterable[object]) -> str:
        texts: list[str] = []
        total = 0
        for part in parts:
            self._size(part)
            texts.append(str(part))
            total += len(texts[-1]) + len(separator)
            self._room(total)
        self.tick(total)
        return separator.join(texts)

    def _shown(self, value: T) -> T:
        if isinstance(value, str) and len(value) < _CHARACTERS:
            self.left -= 1
        else:
            self.tick(self._size(value))
        return value

    def _size(self, value: object) -> int:
        """Characters of a text, items below a list, counted as often as they occur."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, range):
            return len(value) * _CHARACTERS
        if not isinstance(value, list | tuple | dict):
            return 0
        total = 0
        parts: list[object] = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                parts += part.values()
                total += _CHARACTERS * len(part)
            elif isinstance(part, list | tuple):
                parts += part
                total += _CHARACTERS * len(part)
            else:
                total += len(part) if isinstance(part, str) else 1
            self._room(total)
        return total

    def _copied(self, size: int) -> None:
        """Pay for a text or list of so many characters or items, made of others."""
        self._room(size)
        if size >= _CHARACTERS:
            self.tick(size)

    def _room(self, size: int) -> None:
        if size > MOST_TEXT:
            raise Exceeded("it makes a text or list of huge size")


def chat_environment() -> BoundedEnvironment:
    """The Jinja environment of transformers' chat templates, with bounds."""
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = environment.counted("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _tojson(
    value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """``{% generation %}`` marks answers for transformers; its contents are rendered as they are."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Counting(NodeTransformer):
    """Puts a step into every loop and macro, joins texts where they are counted, and weighs what is compared."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self.environment = environment

    def placed(self, node: N, line: int) -> N:
        """A node with the environment and line that its new parts lack."""
        node.set_environment(self.environment)
        node.set_lineno(line)
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _step(node))
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("step"), node.test)
        return self.placed(node, node.lineno)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _step(node))
        return self.placed(node, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        if not searches and any(map(_is_constant, (node.expr, *(operand.expr for operand in node.ops)))):
            return node  # most comparisons: with a role, a number
        node.expr = _weighed("weighed", node.expr)
        for operand in node.ops:
            operand.expr = _weighed("searched" if operand.op in ("in", "notin") else "weighed", operand.expr)
        return self.placed(node, node.lineno)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _weighed("weighed", node.key)
        return self.placed(node, node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self.placed(_call("joined", *node.nodes), node.lineno)


def _is_constant(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)
    )


def _weighed(name: str, node: nodes.Expr) -> nodes.Expr:
    return node if _is_constant(node) else _call(name, node)


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _step(node: nodes.Node) -> nodes.ExprStmt:
    """The step of an iteration: more where the loop or macro holds much plain text."""
    characters = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
    if characters < _CHARACTERS:
        return nodes.ExprStmt(nodes.EnvironmentAttribute("step"))
    return nodes.ExprStmt(_call("tick", nodes.Const(characters)))
