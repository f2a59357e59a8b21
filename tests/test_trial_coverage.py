# SPDX-License-Identifier: Apache-2.0
"""Ways through the code that no trial took: functions, calls of them, and the lines that the calls leave unproved."""

import linecache
import sys
import textwrap
from contextlib import suppress
from itertools import count

import pytest

from vitkern.compat.trial.coverage import Coverage, Leaf, conditions
from vitkern.compat.trial.flow import RAISES, flow_of

# A module, calls, and `# gap` beside the lines that are gaps. Attributes, globals and locals that are str are settled.
ROWS = {
    "all of it runs": """
        def f(x):
            y = x + 1
            return y
        >>> f(1)
    """,
    "a body that is always jumped over": """
        def f(n, x):
            if n > 100:  # gap
                x = 2 * x
            return x
        >>> f(1, 2)
    """,
    "a body that is never jumped over": """
        def f(n, x):
            if n < 100:  # gap
                x = 2 * x
            return x
        >>> f(1, 2)
    """,
    "both ways in two calls": """
        def f(n, x):
            if n < 100:
                x = 2 * x
            return x
        >>> f(1, 2)
        >>> f(100, 2)
    """,
    "an expression of two": """
        def f(n, x):
            return x * (2 if n > 100 else 1)  # gap
        >>> f(1, 2)
    """,
    "both of an expression of two": """
        def f(n, x):
            return x * (2 if n > 100 else 1)
        >>> f(1, 2), f(101, 2)
    """,
    "the shapes of reference points, one left out": """
        def f(ref):
            if len(ref) == 2:  # gap
                y = 1
            elif len(ref) == 4:
                y = 2
            else:
                raise ValueError(f"Last dim of reference_points must be 2 or 4, but got {len(ref)} instead.")
            return y
        >>> f((1, 2))
    """,
    "the shapes of reference points": """
        def f(ref):
            if len(ref) == 2:
                y = 1
            elif len(ref) == 4:
                y = 2
            else:
                raise ValueError(f"Last dim of reference_points must be 2 or 4, but got {len(ref)} instead.")
            return y
        >>> f((1, 2)), f((1, 2, 3, 4))
    """,
    "assert": """
        def f(n):
            assert n > 0, "a size of {} is too small".format(n)
            assert (n * n).bit_length() == 1
            return n
        >>> f(1)
    """,
    "an exception that was not raised": """
        def f(n):
            try:
                y = int(n)
            except ValueError:  # gap
                y = 0
            return y
        >>> f("1")
    """,
    "an exception that was always raised": """
        def f(n):
            try:
                y = int(n)  # gap
            except ValueError:
                y = 0
            return y
        >>> f("a")
    """,
    "an exception that was raised and not": """
        def f(n):
            try:
                y = int(n)
            except ValueError as error:
                y = 0
            return y
        >>> f("a"), f("1")
    """,
    "any exception": """
        def f(n):
            try:
                y = int(n)
            except:  # gap
                y = 0
            return y
        >>> f("1")
    """,
    "an exception with another message": """
        def f(n):
            try:
                y = int(n)
            except ValueError as error:
                raise TypeError(f"no number: {n}") from error
            return y
        >>> f("1")
    """,
    "what raises and is caught": """
        def f(n):
            y = 1
            try:
                if n > 100:  # gap
                    raise ValueError
            except ValueError:  # gap
                y = 2
            return y
        >>> f(1)
    """,
    "finally": """
        def f(n):
            try:
                y = n + 1
            finally:
                n = 0
            return y
        >>> f(1)
    """,
    "finally that returns": """
        def f(n):
            try:
                n = n + 1
            finally:
                return n  # gap
        >>> f(1)
    """,
    "a global that decides, settled": """
        import os
        def f(value):
            if os.path.sep and value.real:
                return 1
            return 2
        >>> f(1), f(0)
    """,
    "a global that decides, and an argument": """
        import os
        def f(value):
            if os.path.sep and value.real:  # gap
                return 1
            return 2
        >>> f(1)
    """,
    "a mask that was never given": """
        def f(value, mask=None):
            if mask is not None:  # gap
                value = value * mask
            return value
        >>> f(1)
    """,
    "a mask that was given and not": """
        def f(value, mask=None):
            if mask is not None:
                value = value * mask
            return value
        >>> f(1), f(1, 2)
    """,
    "an early return": """
        def f(value):
            if type(value) is float:  # gap
                return value * 2
            return value
        >>> f(1)
    """,
    "an attribute that decides": """
        class Layer:
            method, size = "default", 3
            def f(self, x):
                if self.method == "discrete":
                    x = -x
                elif self.size > 4:
                    x = 2 * x
                return x * (2 if self.size > 4 else 1)
        >>> Layer().f(1)
    """,
    "a method that decides": """
        class Layer:
            def late(self):
                return False
            def f(self, x):
                if self.late():  # gap
                    x = 2 * x
                return x
        >>> Layer().f(1)
    """,
    "an attribute of self that is another object": """
        class Layer:
            def f(self, x):
                self = x
                if self.real > 3:  # gap
                    return 1
                return 2
        >>> Layer().f(1)
    """,
    "a str that decides": """
        def f(x, mode="bilinear"):
            if mode == "nearest":
                return x + 1
            return x
        >>> f(1)
    """,
    "a str that decides, and sometimes None": """
        def f(x, mode="bilinear"):
            if mode == "nearest":  # gap
                return x + 1
            return x
        >>> f(1), f(1, None)
    """,
    "while": """
        def f(n):
            while n > 0:
                n -= 2
            return n
        >>> f(5)
    """,
    "while on one line": """
        def f(n):
            while n > 0: n -= 2
            return n
        >>> f(5)
    """,
    "while that never ends by itself": """
        def f(n):
            while True:
                n -= 1
                if n < 0:
                    break
            return n
        >>> f(5)
    """,
    "while that runs never": """
        def f(n):
            while n > 100:  # gap
                n -= 2
            return n
        >>> f(5)
    """,
    "while with two conditions": """
        def f(n, m):
            while n > 0 and m > 0:
                n, m = n - 1, m - 1
            return n
        >>> f(2, 1), f(1, 2)
    """,
    "for": """
        def f(xs):
            y = 0
            for x in xs:
                y += x
            return y
        >>> f([1, 2])
    """,
    "for over nothing": """
        def f(xs):
            y = 0
            for x in xs:  # gap
                y += x
            return y
        >>> f([])
    """,
    "for over nothing that is settled": """
        class Layer:
            layers = ()
            def f(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x
        >>> Layer().f(1)
    """,
    "for over what is settled that always ends early": """
        class Layer:
            layers = (1, 2, 3)
            def f(self, x):
                for layer in self.layers:  # gap
                    if layer > x:
                        return layer
                return x
        >>> Layer().f(1)
    """,
    "for that always ends early": """
        def f(xs):
            for x in xs:  # gap
                return x
            return None
        >>> f([1, 2])
    """,
    "continue and else": """
        def f(xs):
            y = 0
            for x in xs:
                if x < 0:
                    continue
                y += x
            else:
                y += 1
            return y
        >>> f([1, -2, 3])
    """,
    "a comprehension that leaves nothing out": """
        def f(xs):
            return [x for x in xs if x > 0]  # gap
        >>> f([1, 2])
    """,
    "a comprehension that leaves something out": """
        def f(xs):
            return {x: [x for _ in xs] for x in xs if x > 0}, sum(x for x in xs if x)
        >>> f([0, 1, 2])
    """,
    "a chained comparison": """
        def f(n):
            return 0 < n < 10  # gap
        >>> f(3), f(11)
    """,
    "a chained comparison, both ways": """
        def f(n):
            if 0 < n < 10:
                return 1
            return 2
        >>> f(3), f(11), f(-1)
    """,
    "walrus": """
        def f(xs):
            if (n := len(xs)) > 3:  # gap
                return n
            return 0
        >>> f([])
    """,
    "walrus with what is settled": """
        class Layer:
            size = 3
            def f(self):
                if (n := self.size) > 3:
                    return n
                return 0
        >>> Layer().f()
    """,
    "match": """
        def f(n):
            match n:
                case 1:
                    return 1
                case 2:  # gap
                    return 2
            return 3
        >>> f(1), f(2)
    """,
    "match on what is settled": """
        class Layer:
            kind = "a"
            def f(self, x):
                match self.kind:
                    case "a":
                        return x
                    case "b":
                        return -x
                    case _:
                        raise ValueError(self.kind)
        >>> Layer().f(1)
    """,
    "match on a pattern": """
        def f(x):
            match x:
                case [a, b]:  # gap
                    return a
                case _:
                    return x
        >>> f([1, 2])
    """,
    "a decorated function": """
        import functools
        def twice(g):
            @functools.wraps(g)
            def wrapper(x):
                if x > 5:  # gap
                    return g(x)
                return g(g(x))
            return wrapper
        @twice
        def f(x):
            return x + 1
        >>> f(1)
    """,
    "with": """
        import threading
        def f(x):
            with threading.Lock() as lock, threading.Lock():
                y = x + 1
                if x > 100:
                    raise ValueError(x)
            return y
        >>> f(1)
    """,
    "return in with": """
        import threading
        def f(x):
            with threading.Lock():
                return x + 1
        >>> f(1)
    """,
    "with what swallows": """
        import contextlib
        def f(x):
            with contextlib.suppress(ValueError):  # gap
                x = int(x)
            return x
        >>> f("1")
    """,
    "a context manager of the project that swallows": """
        class Quiet:
            def __enter__(self):
                return self
            def __exit__(self, kind, error, trace):
                return kind is not None and issubclass(kind, ValueError)  # gap
        def f(x):
            with Quiet():
                x = int(x)
            return x
        >>> f("1")
    """,
    "what only warns": """
        import logging, warnings
        logger = logging.getLogger("trial")
        def f(x, n):
            if n > 100:
                warnings.warn("n is {} and not {}".format(n, 100), stacklevel=2)
                logger.warning("n is %d", n)
            if n < 100 and x:
                print(f"n is {n:3d}, {type(x).__name__!r}")
            return x
        >>> f(0, 1)
    """,
    "a function that only warns": """
        import warnings
        def check(n):
            if n > 100:
                warnings.warn("too many")
        def f(n):
            check(n)
            return n
        >>> f(1)
    """,
    "in a loop what only warns": """
        import warnings
        def f(xs):
            for x in xs:
                if x > 100:
                    warnings.warn("too many")
            return xs
        >>> f([1])
    """,
    "what always warns": """
        import warnings
        def f(x):
            if x:
                warnings.warn("slow")
            return x
        >>> f(1)
    """,
    "what warns and does something": """
        import warnings
        def f(n):
            if n > 100:  # gap
                warnings.warn("too many")
                n = 100
            return n
        >>> f(1)
    """,
    "what warns with something that is called": """
        import warnings
        def f(xs):
            if len(xs) > 100:  # gap
                warnings.warn(str(xs.pop()))
            return xs
        >>> f([1])
    """,
    "what warns instead of something": """
        import warnings
        def f(n):
            if n > 100:  # gap
                warnings.warn("too many")
            else:
                n += 1
            return n
        >>> f(1)
    """,
    "what warns and returns": """
        import warnings
        def f(xs):
            if len(xs) > 100:  # gap
                warnings.warn("too many"); return
            xs.append(1)
        >>> f([1])
    """,
    "and, or": """
        def f(a, b):
            c = a and b  # gap
            return c or 3
        >>> f(1, 2), f(1, 0)
    """,
    "constants that are equal and not the same": """
        def f(n, x):
            if n > 100:  # gap
                return 1
            return 1.0
        def g(n, x):
            return x * (True if n > 100 else 1)  # gap
        >>> f(1, 2), g(1, 2)
    """,
    "both ways do the same": """
        def f(n, x):
            if n > 100:
                return x + 1.0
            return x + 1.0
        >>> f(1, 2)
    """,
    "a choice in a condition": """
        def f(a, b, c):
            if a if c else b:  # gap
                return 1
            return 2
        >>> f(1, 0, 1), f(1, 0, 0)
    """,
    "an inner function that is never called": """
        def f(x):
            key = lambda y: -y  # gap
            return x
        >>> f(1)
    """,
    "an inner function that is called": """
        def f(xs):
            def key(y: int) -> int:
                return -y
            return sorted(xs, key=key)
        >>> f([1, 2])
    """,
    "an inner function in what only raises": """
        def f(xs):
            if len(xs) > 100:
                raise ValueError(", ".join(str(x) for x in xs))
            return xs
        >>> f([1, 2])
    """,
    "what cannot run": """
        def f(x):
            return x
            x = 3
        >>> f(1)
    """,
    "del, star, slices": """
        def g(*args, **kwargs):
            return args
        def f(xs):
            y = g(*xs, a=1, **{"b": xs[1:]})
            xs[:1], (a, *b) = [3, 4], y
            del xs
            return [*b, a]
        >>> f([1, 2, 3])
    """,
    "a generator that ran to its end, and one that did not": """
        def g(n):
            yield n
            yield from (2, 3)
        def h(n):
            yield n  # gap
            n += 1
        def f(n):
            return list(g(n)), next(h(n))
        >>> f(1)
    """,
    "a trial that failed": """
        def f(x):
            y = x + 1
            z = y.missing  # gap
            return z
        >>> f(1)
    """,
    "more than 256 constants": f"""
        def f(x):
            if x:
                x = [x, {", ".join(f"'a{i}'" for i in range(300))}]
                y = x[0] if x[1] == "b" else 'c'  # gap
            return x
        >>> f(1), f(0)
    """,
}
FILES = count()


def load(source: str) -> tuple[dict, list[str], str]:
    """Runs a module's source; returns its globals, the calls after `>>>`, and its file name."""
    lines = textwrap.dedent(source).strip().splitlines()
    calls = [line[4:] for line in lines if line.startswith(">>> ")]
    text = "\n".join(line for line in lines if not line.startswith(">>> ")) + "\n"
    name = f"<trial {next(FILES)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace = {"__name__": "project"}
    exec(compile(text, name, "exec"), namespace)
    return namespace, calls, name


def compared(code, leaf: Leaf) -> bool:
    return leaf.kind in ("attribute", "global") or (leaf.kind == "local" and leaf.types == {str})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("source", ROWS.values(), ids=ROWS)
def test_gaps(source, warm):
    namespace, calls, name = load(source)
    coverage = Coverage(lambda frame: frame.f_code.co_filename == name)
    for call in calls:
        for _ in range(20 * warm):  # CPython replaces instructions that run often
            attempt(call, namespace)
        with coverage:
            attempt(call, namespace)
    expected = [line.strip() for line in linecache.getlines(name) if "# gap" in line]
    gaps = coverage.gaps(compared)
    assert sorted(gap.text for gap in gaps) == sorted(expected), gaps
    assert all(linecache.getline(name, gap.line).strip() == gap.text for gap in gaps)


def attempt(call: str, namespace: dict) -> None:
    with suppress(AttributeError):
        eval(call, namespace)


LEAVES = [
    ("self.a.b == 3", {("attribute", "a")}),
    ("self.a[0].b and True", {("attribute", "a")}),
    ("not self.a", {("attribute", "a")}),
    ("self.a is None", {("attribute", "a")}),
    ("self.flag()", {("attribute", "flag"), ("other", "self.flag()")}),
    ("x.shape[-1] == 2", {("local", "x")}),
    ("x.is_cuda", {("local", "x")}),
    ("x is not None", {("local", "x")}),
    ("x.dtype in (a.half, b)", {("local", "x"), ("global", "a.half"), ("global", "b")}),
    ("torch.cuda.is_available()", {("global", "torch.cuda.is_available")}),
    ("isinstance(x, torch.Tensor)", {("global", "isinstance"), ("global", "torch.Tensor"), ("local", "x")}),
    ("call(x, key=self.k)", {("global", "call"), ("local", "x"), ("attribute", "k")}),
    ("call(*x, **y)", {("global", "call"), ("local", "x"), ("local", "y")}),
    ("(y := self.k) > 3", {("attribute", "k")}),
    ("x + y * 2 > -self.k", {("local", "x"), ("local", "y"), ("attribute", "k")}),
    ("x == f'{self.k}{y!r:>3}'", {("local", "x"), ("local", "y"), ("attribute", "k")}),
    ("x[1:y] == [self.k, {1: b}]", {("local", "x"), ("local", "y"), ("attribute", "k"), ("global", "b")}),
    ("(x if y else 1) == 2", {("local", "y"), ("other", "")}),
    ("getattr(self, 'a')", {("global", "getattr"), ("local", "self")}),
    ("free", {("other", "free")}),
]


@pytest.mark.parametrize("condition, expected", LEAVES)
def test_what_a_condition_reads(condition, expected):
    source = f"""
        def outer(free):
            def f(self, x, y):
                if {condition}:
                    return 1
            return f
    """
    namespace, *_ = load(source)
    assert set().union(*conditions(namespace["outer"](1).__code__).values()) == expected


def test_types_of_locals_are_those_at_the_jump():
    namespace, *_ = load("def f(x):\n    x = len(x)\n    return 1 if x else 2\n")
    with (coverage := Coverage(lambda frame: frame.f_code is namespace["f"].__code__)):
        namespace["f"]("a")
    leaves = []
    assert not coverage.gaps(lambda code, leaf: leaves.append(leaf) or True)
    assert leaves == [Leaf("local", "x", frozenset({int}))]


@pytest.mark.parametrize("calls", [1, 2])
def test_nothing_is_proved_of_a_generator_that_ran_before(calls):
    namespace, *_ = load("def f(n):\n    yield n\n    yield n + 1\n")
    running = namespace["f"](1)
    next(running)
    with (coverage := Coverage(lambda frame: frame.f_code is namespace["f"].__code__)):
        for _ in range(calls):
            next(running, None)
    assert coverage.gaps(compared)


def test_the_tracer_before_it_comes_back():
    def earlier(frame, event, arg):
        return None

    before = sys.gettrace()
    try:
        sys.settrace(earlier)
        with Coverage(lambda frame: False):
            assert sys.gettrace() is not earlier
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is earlier


def test_equal_code_of_two_modules_is_proved_twice():
    source = "def f(x):\n    return 1 if x else 2\n"
    ones, others = load(source)[0]["f"], load(source)[0]["f"]
    with (coverage := Coverage(lambda frame: frame.f_code in (ones.__code__, others.__code__))):
        ones(0), others(1)
    assert len(coverage.gaps(compared)) == 2


def test_an_exception_that_passes_a_context_manager_is_raised_again():
    def function(x):
        with x:
            return 1

    flow = flow_of(function.__code__)
    (at,) = (at for at, step in enumerate(flow.steps) if step.op == "WITH_EXCEPT_START")
    (after,) = flow.blocks[flow.block_of[at]].ways
    assert flow.steps[flow.blocks[after].last].op in RAISES


def test_codes_come_with_their_globals():
    namespace, _, name = load("def f(x):\n    return [g(y) for y in x]\ndef g(x):\n    return x\n")
    with (coverage := Coverage(lambda frame: frame.f_code.co_filename == name)):
        namespace["f"]([1])
    assert {"f", "g"} <= {code.co_name for code in coverage.codes}
    assert all(found is namespace for found in coverage.codes.values())
