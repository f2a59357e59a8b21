# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md lists the functions that a call runs, in order; real calls are traced and compared with it.

The C++ functions are traced in the sanitized build (`make sanitize`), which has symbols: AddressSanitizer prints the
stack at the point where a kernel reads a tensor whose memory was poisoned.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import vitkern
from tests.runners import RUNNERS
from vitkern.ops import triton_common

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
BLOCKS = [block.split("\n") for block in re.findall(r"```text\n(Python.*?)\n```", PAGE, flags=re.S)]
# Forward and backward, by the runner that takes them.
WAYS = dict(
    zip(itertools.product(("cpu", "cuda-emulated", "triton-interpreted"), ("forward", "backward")), BLOCKS)
)
BY_NAME = {runner.name: runner for runner in RUNNERS}
each_pass = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def told(way: list[str], language: str) -> list[list[str]]:
    return [line.split()[1:] for line in way if line.split()[0] == language]


def planned_call(backend: str, backward: bool) -> Callable[[], object]:
    shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])
    value, locations = torch.randn(1, 20, 2, 8), torch.rand(1, 3, 2, 2, 4, 2)
    weights = torch.rand(1, 3, 2, 2, 4)
    inputs = [tensor.requires_grad_(backward) for tensor in (value, locations, weights)]

    def attend() -> torch.Tensor:
        return vitkern.ms_deform_attn(inputs[0], shapes, starts, *inputs[1:], backend=backend)

    attend()  # makes the plan
    run: Callable[[], object] = attend
    if backward:
        output = attend().sum()
        run = functools.partial(output.backward, retain_graph=True)
        run()
    return run


def name_of(frame: FrameType) -> str:
    """The function's name; empty for other packages and parts of a function: below 3.12 a comprehension is a frame."""
    module, code = frame.f_globals.get("__name__", ""), frame.f_code
    ours = module.startswith("vitkern.") and not code.co_name.startswith("<")
    return f"{module}.{code.co_qualname}" if ours else ""


def functions_of(run: Callable[[], object]) -> list[str]:
    """The functions of the package that a call runs, in the order in which they start."""
    seen: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and name_of(frame):
            seen.append(name_of(frame))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def stack_at_launch(run: Callable[[], object]) -> list[str]:
    """The functions of the package on the stack at the launch of a kernel, by a compiled call or by Triton."""
    stack: list[str] = []

    def profile(frame: FrameType | None, event: str, called: object) -> None:
        compiled = event == "c_call" and getattr(called, "__name__", "") == "call"
        assert frame is not None
        if compiled or (event == "call" and frame.f_code is triton_common.on.__code__):
            frame = frame if compiled else frame.f_back
            stack.clear()
            while frame is not None:
                if name := name_of(frame):
                    stack.insert(0, name)
                frame = frame.f_back

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return stack


qualified = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="code objects tell their qualified names from 3.11 on"
)


@qualified
@each_pass
def test_a_planned_call_goes_the_way_that_the_page_tells(backward):
    way = WAYS["cpu", "backward" if backward else "forward"]
    assert functions_of(planned_call("cpu", backward)) == [line[0] for line in told(way, "Python")]


@qualified
@each_pass
@pytest.mark.parametrize("name", ["cuda-emulated", "triton-interpreted"])
def test_the_way_to_a_gpu_is_that_of_the_page(name, backward):
    runner = BY_NAME[name]
    if runner.reason:
        pytest.skip(runner.reason)
    way = WAYS[name, "backward" if backward else "forward"]
    with runner.active():
        assert stack_at_launch(planned_call(runner.backend, backward)) == [
            line[0] for line in told(way, "Python")
        ]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_page_names_what_is_there(way):
    """All named functions exist, and at most six lie between the public one, or autograd's, and the kernel's entry."""
    for name, path, *_ in told(WAYS[way], "C++"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{part}\b", text) for part in re.findall(r"\w+", name)), (name, path)
    returned = [line for line in told(WAYS[way], "Python") if line[0].endswith("._recall")]
    assert len(WAYS[way]) - len(returned) - 2 <= 6


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
@each_pass
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
    steps = [line[0] for line in told(WAYS["cpu", "backward" if backward else "forward"], "C++")]
    names = names[: names.index(steps[-1]) + 1]
    # The compiler may have made one of two functions; what it has left is on the page, in this order.
    assert names == [step for step in steps if step in names] and len(names) > len(steps) - 2, done.stderr
