"""Chat templates bounded in time and size: each is rendered once in a sandbox that counts, before transformers does.

What is unusual: a template comes with a checkpoint and is a program. jinja's sandbox keeps it from the machine, but not
from looping for ever or making a string of a terabyte. Here every step of a loop, every call and every filter is
counted, and what multiplies (`*`, `**`, `%`, `center`, `replace`, …) is estimated before it is done; filters, globals
and extensions are those of transformers' own environment. The bounds grow with the messages, so that no honest template
meets them. Errors other than bounds are left to transformers, which raises them again.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache, update_wrapper
from types import FunctionType, MethodType
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils


MAX_SOURCE = 2**20  # characters of a template
MOST_INPUT = 2**24  # characters of messages that are counted
MAX_INT = 2**16  # of an argument that says how long something is to be
MAX_BITS = 2**14  # of a whole number
# Filters that look at no more than the outermost list; all others may write out what is nested in it.
SHALLOW = set(
    "abs attr batch count d default dictsort first float int items last length list map random reject rejectattr "
    "reverse round select selectattr slice".split()
)
MULTIPLY = set("replace join indent wordwrap tojson expandtabs xmlattr urlize".split())
LENGTHEN = set(
    "batch center expandtabs indent int ljust rjust round slice to_bytes tojson truncate wordwrap zfill".split()
)
REFUSED = {"random", "translate"}  # whose size nobody knows beforehand
_WIDE = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|:[^{}]*\{")  # a width of 5 digits in a format, or one that is an argument
_NESTS = (list, tuple, set, dict)
_current = threading.local()


class ChatTemplateError(ValueError):
    """A chat template does or makes too much for the messages that it was given."""


class _Meter:
    """Counts what a rendering does, against bounds that grow with the size of its input."""

    def __init__(self, size: int):
        self.steps = self.copied = self.written = 0
        self.max_steps, self.max_size, self.max_copied = 2**18 + 256 * size, 2**22 + 64 * size, 2**27 + 2**12 * size
        self.broken: ChatTemplateError | None = None

    def fail(self, what: str, bound: int) -> None:
        """Raises, also later: jinja swallows what is raised while it folds constants."""
        self.broken = self.broken or ChatTemplateError(f"it {what}; the bound for these messages is {bound}")
        raise self.broken

    def check(self) -> None:
        if self.broken:
            raise self.broken

    def step(self, size: int = 0) -> None:
        self.steps += 1
        self.copied += size
        if self.steps > self.max_steps:
            self.fail("takes too many steps", self.max_steps)
        if size > self.max_size:
            self.fail(f"makes something of size {size}", self.max_size)
        if self.copied > self.max_copied:
            self.fail(f"copies {self.copied} characters", self.max_copied)

    def write(self, size: int) -> None:
        self.step(size)
        self.written += size
        if self.written > 4 * self.max_size:
            self.fail(f"writes {self.written} characters", 4 * self.max_size)

    def size(self, value: Any, deep: bool = False) -> int:
        """Characters or items; those of nested lists and objects too where `deep`."""
        if type(value) is str:  # as nearly all are
            return len(value)
        if isinstance(value, int):
            return value.bit_length() // 3
        if not deep or not isinstance(value, _NESTS):
            return len(value) if hasattr(value, "__len__") else 1
        total, left = 0, [value]
        while left and total <= self.max_size:
            part = left.pop()
            total += 1 + self.size(part)
            if isinstance(part, _NESTS):
                left += [*part.keys(), *part.values()] if isinstance(part, dict) else part
        return total

    def iterate(self, values: Iterator) -> Iterator:
        for value in values:
            self.step()
            yield value

    def take(self, name: str, deep: bool, args: tuple, options: Mapping) -> None:
        """Counts a call or a filter, and estimates what it will make of its arguments."""
        values = [*args, *options.values()]
        sizes = [self.size(value, deep) for value in values]
        self.step(sum(sizes))
        if name in REFUSED or (name == "sum" and not all(isinstance(v, (int, float, str)) for v in values[1:])):
            self.fail(f"uses {name}", 0)
        # the first is what is made longer, and may be any number
        numbers = [abs(v) for v in values[1:] if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if name in LENGTHEN and (most := max(numbers, default=0)) > MAX_INT:
            self.fail(f"uses {name} with {most}", MAX_INT)
        if name in MULTIPLY and len(values) > 1:
            largest, *others = sorted(
                (size for value, size in zip(values, sizes) if not isinstance(value, int)), reverse=True
            )
            made = largest * max([1, *others, *numbers])
            if made > 4 * self.max_size:
                self.fail(f"uses {name} for something of size {made}", self.max_size)
        if name in ("format", "format_map") and isinstance(values[0], str) and _WIDE.search(values[0]):
            self.fail("formats with a width", 9999)

    def made(self, value: Any) -> Any:
        if isinstance(value, Iterator):
            return self.iterate(value)
        self.step(self.size(value))
        return value

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Estimates the result of an operation before it is done."""
        a, b = self.size(left), self.size(right)
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = (
                left.bit_length() * max(abs(right), 1) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > MAX_BITS:
                self.fail("makes a whole number of too many bits", MAX_BITS)
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            self.step(abs(left) * b if isinstance(left, int) else a * abs(right))
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            self.fail("formats with a width", 9999)
        else:
            self.step(a + (self.size(right, deep=True) if operator == "%" else b))


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with a meter at every door."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        _current.meter.operate(operator, left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context, __obj, *args, **options):  # noqa: B902, N805
        meter, name = _current.meter, getattr(__obj, "__name__", "")
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # which `format` is wrapped around
        owned = (owner, *args) if isinstance(owner, (str, bytes, int)) else args
        if isinstance(owner, str) and name == "join" and args and isinstance(args[0], Iterator):
            args = (list(meter.iterate(args[0])),)
            owned = (owner, *args)
        meter.take(name, name in ("join", "format", "format_map"), owned, options)
        if name == "strftime_now" and "%f" in str(args):
            meter.fail("looks at a clock of microseconds", 0)
        return meter.made(super().call(__context, __obj, *args, **options))


def _counting_filter(name: str, function: Callable) -> Callable:
    """The filter, which counts what it is given and what it makes."""
    passes = int(getattr(function, "jinja_pass_arg", None) is not None)

    def counted(*args, **options):
        meter, given = _current.meter, args[passes:]
        if name not in SHALLOW:
            given = tuple(list(meter.iterate(part)) if isinstance(part, Iterator) else part for part in given)
        meter.take(name, name not in SHALLOW, given, options)
        return meter.made(function(*args[:passes], *given, **options))

    return update_wrapper(counted, function)


class _Counting(NodeTransformer):
    """Makes loops, macros and blocks count each time they run, and operations on constants be estimated at once."""

    def __init__(self, environment: Environment):
        self.environment = environment

    def _count(self, node: nodes.Node) -> nodes.ExprStmt:
        text = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        step = nodes.Filter(nodes.Const(text), "_step", [], [], None, None)
        return nodes.ExprStmt(step).set_lineno(node.lineno).set_environment(self.environment)

    def _body(self, node):
        self.generic_visit(node)
        node.body.insert(0, self._count(node))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self._body(node)
        if node.test is not None:
            node.test = self._sized(node.test)
        return node

    def visit_BinExpr(self, node: nodes.BinExpr) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.left, nodes.Const) and isinstance(node.right, nodes.Const):
            _current.meter.operate(node.operator, node.left.value, node.right.value)
            try:
                made = self.environment.binop_table[node.operator](node.left.value, node.right.value)
            except Exception:  # that jinja raises when it gets there
                return node
            return nodes.Const(made).set_lineno(node.lineno).set_environment(self.environment)
        return node

    visit_Mul = visit_Pow = visit_Mod = visit_Add = visit_BinExpr

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        self.generic_visit(node)
        node.nodes = [self._sized(part) for part in node.nodes]
        return self._sized(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        deep = not any(operand.op in ("in", "notin") for operand in node.ops)
        node.expr = self._sized(node.expr)
        for operand in node.ops:
            operand.expr = self._sized(operand.expr, deep)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._sized(node, deep=False) if isinstance(node.arg, nodes.Slice) else node

    def _sized(self, node: nodes.Expr, deep: bool = True) -> nodes.Expr:
        if isinstance(node, nodes.Const):
            return node
        sized = nodes.Filter(node, "_sized", [nodes.Const(deep)], [], None, None)
        return sized.set_lineno(node.lineno).set_environment(self.environment)


def _sized(value: Any, deep: bool) -> Any:
    _current.meter.step(_current.meter.size(value, deep))
    return value


def _written(value: Any) -> Any:
    _current.meter.write(_current.meter.size(value, deep=True))
    return value


@pass_context  # a filter that is given the context is never taken for a constant
def _step(context, text: int) -> None:
    _current.meter.write(text)


@cache
def _environment() -> _Environment:
    theirs = chat_template_utils._compile_jinja_template("").environment
    ours = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(one) for one in theirs.extensions.values()],
        finalize=_written,
    )
    ours.globals.update(theirs.globals, lipsum=lambda *args, **options: _current.meter.fail("uses lipsum", 0))
    ours.filters = {name: _counting_filter(name, function) for name, function in theirs.filters.items()}
    ours.filters |= {"_step": _step, "_sized": _sized}
    return ours


@lru_cache(maxsize=128)
def _compiled(source: str):
    """The template, which counts. Raises ChatTemplateError where already its constants are too large."""
    _current.meter = _Meter(len(source))
    environment = _environment()
    template = environment.from_string(_Counting(environment).visit(environment.parse(source)))
    _current.meter.check()
    return template


def check_rendering(template: str, conversations: list, variables: Mapping[str, Any]) -> None:
    """Renders each of the conversations once, and counts.

    Args:
        template: the source. conversations: lists of messages. variables: others that the template sees.

    Raises:
        ChatTemplateError: a ValueError that says which bound the template breaks.
    """
    try:
        if len(template) > MAX_SOURCE:
            raise ChatTemplateError(f"it has {len(template)} characters; the bound is {MAX_SOURCE}")
        compiled = _compiled(template)
        for conversation in conversations:
            values = plain({**variables, "messages": conversation})
            _current.meter = meter = _Meter(_Meter(MOST_INPUT).size(values, deep=True))
            for _ in compiled.generate(**values):
                pass
            meter.check()
    except (ChatTemplateError, RecursionError, MemoryError) as error:
        begins = " ".join(template[:60].split())
        reason = str(error) if isinstance(error, ChatTemplateError) else "it nests too deep"
        raise ChatTemplateError(f"The chat template {begins!r} … is refused: {reason}.") from error
    except Exception:  # transformers raises it again
        return


def plain(value: Any) -> Any:
    """What a template sees of a value, as transformers has it: texts, numbers, and lists and objects of them."""
    if type(value) is str or value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (FunctionType, MethodType)):
        return plain(chat_template_utils.get_json_schema(value))
    return f"<{type(value).__name__}>"
