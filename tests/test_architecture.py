# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md tells the way of a call: the functions that a real call runs, in order.

The names in C++ are traced in the sanitized build (`make sanitize`), which has them: AddressSanitizer prints the stack
where a kernel reads a tensor whose memory was declared poisonous.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitkern

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WAYS = [block.split("\n") for block in re.findall(r"```text\n(Python.*?)\n```", PAGE, flags=re.S)]


def told(way: list[str], language: str) -> list[list[str]]:
    return [line.split()[1:] for line in way if line.split()[0] == language]


def python_functions_of(run) -> list[str]:
    """The functions of the package that a call runs, in order of their beginning; not the parts of a function."""
    seen: list[str] = []

    def profile(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        part = frame.f_code.co_name.startswith("<")  # a comprehension is a frame below 3.12
        if event == "call" and module.startswith("vitkern.") and not part:
            seen.append(f"{module}.{frame.f_code.co_qualname}")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects tell their qualified names from 3.11 on")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_planned_call_goes_the_way_that_the_page_tells(backward):
    shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])
    value, locations = torch.randn(1, 20, 2, 8), torch.rand(1, 3, 2, 2, 4, 2)
    weights = torch.rand(1, 3, 2, 2, 4)
    inputs = [tensor.requires_grad_(backward) for tensor in (value, locations, weights)]

    def attend() -> torch.Tensor:
        return vitkern.ms_deform_attn(inputs[0], shapes, starts, *inputs[1:], backend="cpu")

    attend()  # makes the plan
    run = attend
    if backward:
        output = attend().sum()
        run = functools.partial(output.backward, retain_graph=True)
        run()
    assert python_functions_of(run) == [line[0] for line in told(WAYS[backward], "Python")]


@pytest.mark.parametrize("way", WAYS, ids=["forward", "backward"])
def test_the_page_names_what_is_there(way):
    """And there are at most six functions between the public one, or autograd's, and the kernel's entry."""
    steps = told(way, "C++")
    for name, path, *_ in steps:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{part}\b", text) for part in re.findall(r"\w+", name)), (name, path)
    returned = [line for line in told(way, "Python") if line[0].endswith("._recall")]
    between = len(way) - len(returned) - 2
    assert between <= 6


POISONED = """
import ctypes, sys, torch, vitkern
torch.set_num_threads(1)  # the stack of one thread has it all
shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])
value, locations = torch.randn(1, 20, 2, 8), torch.rand(1, 3, 2, 2, 4, 2)
value.requires_grad_(), locations.requires_grad_()
weights = torch.rand(1, 3, 2, 2, 4)
backward = sys.argv[1] == "backward"

def attend():
    with torch.set_grad_enabled(backward):
        return vitkern.ms_deform_attn(value, shapes, starts, locations, weights, backend="cpu")

attend()
run = attend
if backward:
    output = attend().sum()
    run = lambda: output.backward()
size = ctypes.c_size_t(locations.nbytes)
ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(locations.data_ptr()), size)
run()
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "__asan_poison_memory_region"),
    reason="`make sanitize` builds what it needs",
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_names_in_cpp_are_those_of_a_real_call(backward):
    done = subprocess.run(
        [sys.executable, "-c", POISONED, "backward" if backward else "forward"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    stack = done.stderr.split("\n\n")[0]
    functions = re.findall(
        r"^ *#\d+ \S+ in vitkern::(?:isa_\w+::)?(.*?(?:operator\(\))?)\(", stack, flags=re.M
    )
    names = [re.sub(r"<.*>", "", name) for name in reversed(functions)]
    steps = [line[0] for line in told(WAYS[backward], "C++")]
    names = names[: names.index(steps[-1]) + 1]
    # The compiler may have made one of two functions; what it has left is on the page, in this order.
    assert names == [step for step in steps if step in names] and len(names) > len(steps) - 2, done.stderr
