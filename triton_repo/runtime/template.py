"""Jinja as Transformers sets it up for chat templates, bounded in time and in size.

A template comes with a checkpoint. The sandbox keeps it away from Python, but nothing in Jinja keeps it from
looping for ever or from doubling a text until memory ends. Here loops, calls, filters, operators and
concatenations look at a clock, and what they make is measured: before it is made, where small operands make
something large.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS: Final = 2.0
# Of a text; of a list with everything in it, where each entry counts as 16. Messages have 1,000,000.
MAX_SIZE: Final = 4_000_000
_ENTRY: Final = 16
_MAX_BITS: Final = 4096
# What a filter or a method of a text takes as a width or a count.
_MAX_NUMBER: Final = 100_000
_MAX_INDENT: Final = 16
# Not of templates: random, without a bound of their own, or for the web.
_NO_FILTERS: Final = ("pprint", "random", "urlize", "wordwrap", "xmlattr", "filesizeformat", "forceescape")
_NO_METHODS: Final = ("encode", "expandtabs", "format_map", "maketrans", "to_bytes", "translate")
_WIDE_FORMAT: Final = re.compile(r"\*|\d{4}|\{[^{}]*\{")


class Environment(ImmutableSandboxedEnvironment):
    """Renders within `MAX_SECONDS` of `start` on the same thread; SecurityError for what would not."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            # What is constant would be computed when the template is read.
            optimized=False,
        )
        self._clock = threading.local()
        self.concat = self._concat  # type: ignore[method-assign]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _new_dict
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson
        for name in _NO_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.filters[name] = self._bounded_filter(name, function)
        self.filters |= {"~": self._tilde, "for": self._counted, "literal": self._weighed}

    def start(self) -> None:
        """The time of this thread's next rendering begins now."""
        self._clock.end = time.monotonic() + MAX_SECONDS

    def call(self, context: Any, obj: Any, /, *values: Any, **named: Any) -> Any:
        """A function, macro or method, its arguments checked and its result measured."""
        self._tick()
        if isinstance(getattr(obj, "__self__", None), str | int | float) or hasattr(obj, "__wrapped__"):
            values = self._method_arguments(obj, values, named)
        return self._weighed(super().call(context, obj, *values, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of `intercepted_binops`, where its result is of a size that may be."""
        self._tick()
        sized = [value for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "+" and len(sized) == 2:
            _fits(len(left) + len(right))
        elif operator == "*" and len(sized) == 1:
            count = right if sized[0] is left else left
            _fits(_weight(sized[0]) * abs(count))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in {"*", "**"} and isinstance(left, int) and isinstance(right, int):
            most = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if most > _MAX_BITS:
                raise SecurityError("a number in a template is too large")
        return self._weighed(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting(self).visit(super()._parse(source, name, filename))
        return tree

    def _tick(self) -> None:
        if time.monotonic() > getattr(self._clock, "end", 0.0):
            raise SecurityError(f"a template may compute for {MAX_SECONDS:g} s")

    def _concat(self, pieces: Iterable[str]) -> str:
        """Jinja's own `"".join`, of macros' and blocks' texts and of the whole."""
        found, size = [], 0
        for piece in pieces:
            size += len(piece)
            _fits(size)
            found.append(piece)
            self._tick()
        return "".join(found)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._tick()
            yield value

    def _weighed(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict | set):
            _fits(_weight(value))
        return value

    def _tilde(self, values: list[Any]) -> str:
        return self._concat(map(str, values))

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*values: Any, **named: Any) -> Any:
            self._tick()
            _check_numbers((*values[first + 1 :], *named.values()))
            subject = values[first]
            if name == "replace":
                _check_replace(*map(str, values[first : first + 3]))
            elif name == "format":
                _check_format(str(subject))
            elif name == "indent":
                width = named.get("width", values[first + 1] if len(values) > first + 1 else 4)
                size = len(width) if isinstance(width, str) else width
                _fits((str(subject).count("\n") + 1) * size)
            elif name in {"join", "sum"}:
                subject = list(self._counted(subject))
                self._check_fold(name, subject, (*values[first + 1 :], *named.values()))
            return self._weighed(function(*values[:first], subject, *values[first + 1 :], **named))

        return bounded

    def _check_fold(self, name: str, values: list[Any], others: Iterable[Any]) -> None:
        between = [other for other in others if isinstance(other, str)]
        if name == "join":
            _fits(_weight(values) + len(values) * sum(map(len, between)))
        elif not all(isinstance(value, int | float) for value in values) and not between:
            raise SecurityError("a template may sum numbers")

    def _method_arguments(self, method: Any, values: tuple[Any, ...], named: Any) -> tuple[Any, ...]:
        name, subject = method.__name__, getattr(method, "__self__", None)
        if name in _NO_METHODS:
            raise SecurityError(f"a template cannot call {name}")
        _check_numbers((*values, *named.values()))
        if not isinstance(subject, str):
            subject = getattr(getattr(method, "__wrapped__", None), "__self__", None)
        if isinstance(subject, str):
            if name == "replace" and len(values) > 1:
                _check_replace(subject, *map(str, values[:2]))
            elif name == "join" and values:
                values = (list(self._counted(values[0])), *values[1:])
                _fits(_weight(values[0]) + len(values[0]) * len(subject))
            elif name == "format":
                _check_format(subject)
        return values


class _Counting(NodeTransformer):
    """Puts filters that no template can name around what Jinja does without asking its environment."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        self.generic_visit(node)
        node.iter = self._filtered(cast(nodes.Expr, node.iter), "for")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes, lineno=node.lineno), "~")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(node, "literal")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(node, "literal") if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(node, "literal")

    def _filtered(self, node: nodes.Expr, name: str) -> nodes.Filter:
        made = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        made.set_environment(self._environment)
        return made


class _Generation(Extension):
    """{% generation %} marks what an assistant wrote, for training; here its content counts."""

    tags = frozenset(("generation",))  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own takes any attribute, also those that Python gives a meaning to."""

    def __init__(*values: Any, **named: Any) -> None:
        self, *rest = values
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template cannot set {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        """Not what it holds: that may be itself, or grow with every one that it holds."""
        return "<Namespace>"


def _new_dict(*values: Any, **named: Any) -> dict[Any, Any]:
    return dict(*values, **named)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
    """Without HTML escapes, as Transformers has it."""
    if not (indent is None or (isinstance(indent, int) and indent <= _MAX_INDENT)):
        raise SecurityError(f"a template may indent by {_MAX_INDENT}")
    if any(len(str(option)) > _MAX_INDENT for option in rest.values()):
        raise SecurityError("a template may separate values by a few characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


def _fits(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a template may make texts and lists of {MAX_SIZE:,} characters")


def _weight(value: Any) -> int:
    """Characters of a text; of a list those in it, however often it holds the same one. Stops beyond
    `MAX_SIZE`."""
    weight, left = 0, [value]
    while left and weight <= MAX_SIZE:
        found = left.pop()
        if isinstance(found, str):
            weight += len(found)
        elif isinstance(found, list | tuple | set | dict):
            weight += _ENTRY * len(found)
            left += found
            left += found.values() if isinstance(found, dict) else ()
    return weight


def _check_numbers(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_NUMBER for value in values):
        raise SecurityError(f"a number in a template is beyond {_MAX_NUMBER:,}")


def _check_replace(text: str, old: str = "", new: str = "") -> None:
    _fits(len(text) + text.count(old) * len(new))


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise SecurityError("a template may format to widths of three digits")
