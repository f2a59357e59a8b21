# SPDX-License-Identifier: Apache-2.0
"""Functions whose results may change from call to call, or that have side effects, and the reasons given."""

import textwrap

import pytest

from vitkern.compat.trial.purity import impurity, names_of

# A module with a function f or what makes one, and the reason, which stands at the line `# here`; None for the pure.
ROWS = [
    ("def f(x): return x + 1", None),
    ("import math\ndef f(x): return math.pi * len(x) / math.sqrt(2)", None),
    (
        "calls = 0\ndef f(x):\n    global calls\n    calls += 1  # here\n    return x",
        "writes the global 'calls'",
    ),
    ("a = 1\ndef f(x):\n    global a\n    del a  # here", "deletes the global 'a'"),
    ("a = [1]\ndef f(x):\n    return x + a[0]  # here", "reads the global 'a', a list that may change"),
    (
        "a = [1]\ndef f(x):\n    def g(): return a  # here\n    return g()",
        "reads the global 'a', a list that may change",
    ),
    ("a = [1]\ndef f(x): return [y + a for y in x]  # here", "reads the global 'a', a list that may change"),
    ("a = (1, 'b', (2.0, None))\ndef f(x): return a", None),
    ("a = (1, [])\ndef f(x): return a  # here", "reads the global 'a', a tuple that may change"),
    ("class C: pass\na = C()\ndef f(x): return a.b  # here", "reads the global 'a', a C that may change"),
    ("class C:\n    a = {}\ndef f(x): return C.a  # here", "reads the global 'C.a', a dict that may change"),
    (
        "class B:\n    a = {}\nclass C(B): pass\ndef f(x): return C.a  # here",
        "reads the global 'C.a', a dict that may change",
    ),
    ("class C:\n    a = 3\n    @staticmethod\n    def g(x): return x\ndef f(x): return C.g(C.a)", None),
    ("class C: pass\ndef f(x):\n    C.n = x  # here", "writes into the global 'C'"),
    (
        "def g(x): return x\ng.calls = []\ndef f(x): return g.calls  # here",
        "reads the global 'g.calls', a list that may change",
    ),
    ("def f(x, a=[]):  # here\n    return a", "has a default, a list that may change"),
    ("def f(x, *, a={}):  # here\n    return a", "has a default, a dict that may change"),
    ("def f(x, a=(1, 2), b=None, c='d'): return a", None),
    ("class f:\n    def f(self, x):\n        self.n = x  # here\nf = f.f", "writes its attribute 'n'"),
    ("class f:\n    def f(self, x):\n        self.n += 1  # here\nf = f.f", "writes its attribute 'n'"),
    (
        "class f:\n    def f(self, x):\n        self.a[0].b[x] = 1  # here\nf = f.f",
        "writes its attribute 'a'",
    ),
    ("class f:\n    def f(self, x):\n        self.a.b = 1  # here\nf = f.f", "writes its attribute 'a'"),
    ("class f:\n    def f(self, x):\n        del self.n  # here\nf = f.f", "writes its attribute 'n'"),
    ("class f:\n    def f(self, x):\n        self.a[1:x] = 1  # here\nf = f.f", "writes its attribute 'a'"),
    ("def f(ctx, x):\n    ctx.size = x\n    return x", None),
    ("def f(ctx, x):\n    ctx.size.a = x  # here", "writes the attribute 'a' of 'ctx.size'"),
    ("def f(x, ctx):\n    ctx.size = x  # here", "writes the attribute 'size' of 'ctx'"),
    ("def f(x):\n    x.data = x  # here", "writes the attribute 'data' of 'x'"),
    ("def f(x, out):\n    out[0] = x\n    out[1:2] += x\n    del out[0]\n    return out", None),
    ("def f(x):\n    x.a[0] = 1\n    y = list(x)\n    y[0] += 1\n    return y", None),
    (
        "def make():\n    n = 0\n    def f(x):\n        nonlocal n\n        n += 1  # here\n    return f\nf = make()",
        "writes the closure variable 'n'",
    ),
    (
        "def make():\n    n = []\n    def f(x):\n        return n  # here\n    return f\nf = make()",
        "reads the closure variable 'n', a list that may change",
    ),
    ("def make(g):\n    def f(x):\n        return g(x)\n    return f\nf = make(len)", None),
    ("def f(x):\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n    g()\n    return n", None),
    ("import time\ndef f(x): return x + time.time()  # here", "uses the module 'time'"),
    ("from time import time\ndef f(x): return x", None),
    ("from time import time\ndef f(x): return x + time()  # here", "uses the module 'time'"),
    ("from copy import deepcopy as c\ndef f(x): return c(x)  # here", "uses the module 'copy'"),
    ("from datetime import date\ndef f(x): return date.today()  # here", "uses the module 'datetime'"),
    ("from time import time\ndef f(x, now=time): return now()  # here", "uses the module 'time'"),
    (
        "from random import random\ndef f(x): return random()  # here",
        "reads the global 'random', a builtin_function_or_method that may change",
    ),
    (
        "from operator import mul\nfrom functools import reduce\nfrom math import sqrt\n"
        "from collections import OrderedDict\n"
        "def f(x): return OrderedDict(a=reduce(mul, x), b=sqrt(2))",
        None,
    ),
    ("import os\ndef f(x): return os.environ.get('A')  # here", "uses the module 'os'"),
    ("import random as r\ndef f(x): return r.random()  # here", "uses the module 'random'"),
    ("def f(x):\n    import random  # here\n    return random.random()", "uses the module 'random'"),
    ("def f(x):\n    from os import path  # here\n    return path", "uses the module 'os'"),
    (
        "def f(x):\n    import math, torch.nn.functional as F\n    from functools import partial\n    return math.pi",
        None,
    ),
    ("def f(x):\n    setattr(x, 'a', 1)  # here", "calls setattr"),
    ("put = setattr\ndef f(x):\n    put(x, 'a', 1)  # here", "calls setattr"),
    ("def f(x): return eval('x')  # here", "calls eval"),
    ("def f(x): return id(x)  # here", "calls id"),
    ("def f(x): return next(x)  # here", "calls next"),
    ("def f(x):\n    globals()['a'] = 1  # here", "calls globals"),
    ("def f(x): return __import__('os')  # here", "calls __import__"),
    ("def f(x):\n    object.__setattr__(x, 'a', 1)  # here", "uses __setattr__"),
    ("def f(x):\n    x.__dict__['a'] = 1  # here", "uses __dict__"),
    ("def f(x):\n    if x is None: raise ValueError(f'{x}')\n    return max(abs(x), sum((1, x)))", None),
    ("def f(x):\n    yield x", "is a generator"),
    ("async def f(x):\n    return x", "is a generator"),
    ("def f(x): return sum(y for y in x)", None),
    (
        "history = []\nput = history.append\ndef f(x):\n    put(x)  # here",
        "reads the global 'put', a builtin_function_or_method that may change",
    ),
    ("from functools import partial\ng = partial(max, 3, key=abs)\ndef f(x): return g(x)", None),
    (
        "from functools import partial\ng = partial(max, [3])\ndef f(x): return g(x)  # here",
        "reads the global 'g', a partial that may change",
    ),
    (
        "from functools import lru_cache\n@lru_cache\ndef g(x): return x\ndef f(x): return g(x)  # here",
        "reads the global 'g', a _lru_cache_wrapper that may change",
    ),
    (
        "import re, enum, logging, typing\np, log = re.compile('a'), logging.getLogger('a')\n"
        "A = enum.Enum('A', 'a b')\n"
        "T = typing.Optional[int]\nL = list[int]\nU = int | None\ndef f(x): return p, log, A, A.a, T, L, U",
        None,
    ),
    ("def f(x): return missing(x)", None),
    ("import torch\ndef f(x): return torch.softmax(x, -1, dtype=torch.float32)", None),
    ("import torch\nh, d, a = torch.float16, torch.device('cpu'), torch.add\ndef f(x): return h, d, a", None),
    (
        "import torch\nfrom torch.nn.functional import grid_sample, relu\ndef f(x): return relu(grid_sample(x, x))",
        None,
    ),
    (
        "import torch\nw = torch.ones(1)\ndef f(x): return w * x  # here",
        "reads the global 'w', a Tensor that may change",
    ),
    (
        "import torch\nclass A(torch.autograd.Function): pass\ng = A.apply\ndef f(x): return A.apply(x) + g(x)",
        None,
    ),
]


@pytest.mark.parametrize("source, reason", ROWS)
def test_impurity(source, reason):
    if "import torch\n" in source:
        pytest.importorskip("torch")
    namespace = {"__name__": "project"}
    exec(source, namespace)
    f = namespace["f"]
    closure = dict(zip(f.__code__.co_freevars, (cell.cell_contents for cell in f.__closure__ or ())))
    defaults = (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values())
    line = [f": line {n}" for n, text in enumerate(source.splitlines(), 1) if "# here" in text]
    expected = reason and reason + "".join(line)
    assert impurity(f.__code__, namespace, closure, defaults) == expected


def test_modules_of_its_own_project_are_looked_into():
    from types import ModuleType

    module = ModuleType("project.tables")
    module.CACHE, module.size = {}, 3
    namespace = {"__name__": "project.layers", "tables": module}
    exec("def f(x): return tables.size\ndef g(x): return tables.CACHE", namespace)
    assert impurity(namespace["f"].__code__, namespace) is None
    assert impurity(namespace["g"].__code__, namespace) == (
        "reads the global 'tables.CACHE', a dict that may change: line 2"
    )
    assert impurity(namespace["f"].__code__, namespace | {"__name__": "other"}) == (
        "uses the module 'project.tables': line 1"
    )


def test_names():
    namespace: dict = {}
    source = """
        def f(x):
            def g(y):
                return a(y) + b.c
            return [d for _ in g(x)] + a
    """
    exec(textwrap.dedent(source), namespace)
    assert sorted(names_of(namespace["f"].__code__)) == ["a", "b", "d"]
