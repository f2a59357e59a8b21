# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.bench_host_cost: the cost of a call on the host, up to the launch, in units of torch.mm.

The tensors are so small that a kernel on one thread costs next to nothing; on a card (--device cuda) the host does not
wait for launches. The unit is one torch.mm of two 4x4 matrices, without gradients, in the same rounds. "floor" is the
least cost of an op written in Python: an autograd.Function that keeps the same tensors and only allocates the output
and the gradients.

To compare two builds, in turn, each round in new processes, by the ratio of the least of 20 rounds:

    python -m benchmarks.bench_host_cost --compare OLD_CHECKOUT

OLD_CHECKOUT is another checkout of this project, built in its .venv: git worktree add OLD_CHECKOUT COMMIT, then
make -C OLD_CHECKOUT setup. Both builds run this file, so it calls public names only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vitkern
from vitkern.bench.measure import backward_alone, forward_backward
from vitkern.cases import AdapterBottleneckCase, MsDeformAttnCase, TokenCase, make_inputs
from vitkern.commands.doctor import cpu_model

CASE = MsDeformAttnCase("tiny", "", 1, ((2, 2), (1, 1)), 1, 1, 4, 1)
CALLS = 5  # of a sample: short enough to fall between two turns of a neighbour
# Units that a function may take; or two more than its floor, where that is more.
TARGETS = {"forward": 5, "recorded": 8, "backward": 12}

Row = tuple[str, str, str]  # op, way, pass


def ops() -> dict[str, tuple[torch.Tensor, ...]]:
    """The tensors of each op."""
    value, *tables, locations, weights = make_inputs(CASE)
    adapter = list(AdapterBottleneckCase("tiny", "", (2,), 8, 4).make().values())[:5]
    tokens = TokenCase("tiny", "", 1, 2, 8, 2)
    return {
        "ms_deform_attn": (value, *tables, locations, weights),
        "ms_deform_attn_fused": (value, *tables, torch.rand(1, 1, 2, 2), locations, weights.flatten(3)),
        "adapter_bottleneck": tuple(adapter),
        "token_pool": tokens.make_pool(recurrent=False),
        "token_project": tokens.make_project(keys=4),
    }


def first_of(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def calls(device: str) -> dict[Row, Callable[[], object]]:
    """Calls by op, way and pass: forward without and with recorded gradients, backward alone, and both passes."""
    made: dict[Row, Callable[[], object]] = {}
    for op, made_tensors in ops().items():
        tensors = tuple(tensor.to(device) for tensor in made_tensors)
        recorded = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors)
        # The function itself sets `keep`: forward saves results for backward. For its op it is an argument.
        more = {"seed": None, "scale": None, "residual": None, "keep": device == "cpu"}
        told = more if op == "adapter_bottleneck" else {}
        for way, module, options in (("function", vitkern, {}), ("torch.ops", torch.ops.vitkern, told)):
            op_of_way = getattr(module, op)

            def run(*tensors, op_of_way=op_of_way, options=options):
                return first_of(op_of_way(*tensors, **options, backend=device))

            made[op, way, "forward"] = lambda run=run, tensors=tensors: run(*tensors)
            made[op, way, "recorded"] = lambda run=run, recorded=recorded: run(*recorded)
            made[op, way, "backward"] = backward_alone(run, recorded)
            made[op, way, "both"] = forward_backward(run, recorded)
    return made


def floors() -> dict[Row, Callable[[], object]]:
    """The calls of "floor": plain torch with the same tensors, with nothing to check, look up or launch."""
    made: dict[Row, Callable[[], object]] = {}
    for op, tensors in ops().items():
        recorded = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors)
        shape = first_of(getattr(vitkern, op)(*tensors)).shape
        apply = floor_function(shape, [t.is_floating_point() for t in tensors])

        def run(*tensors, apply=apply):
            return apply(*tensors)

        made[op, "floor", "forward"] = lambda tensors=tensors, shape=shape: tensors[0].new_empty(*shape)
        made[op, "floor", "recorded"] = lambda run=run, recorded=recorded: run(*recorded)
        made[op, "floor", "backward"] = backward_alone(run, recorded)
        made[op, "floor", "both"] = forward_backward(run, recorded)
    return made


def floor_function(shape: torch.Size, wanted: list[bool]) -> Callable[..., torch.Tensor]:
    """An autograd.Function that saves its tensors and allocates the output and the needed gradients."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tensors[0].new_empty(*shape)

        @staticmethod
        def backward(ctx, grad_output):
            pairs = zip(ctx.saved_tensors, wanted)
            return tuple([t.new_empty(t.shape) if want else None for t, want in pairs])

    return super(torch.autograd.Function, Function).apply


def shortest(runs: dict[Row, Callable[[], object]], seconds: float) -> dict[Row, float]:
    """Microseconds of each call: the least of many short samples, taken in turn, so that a neighbour misses some."""
    best = dict.fromkeys(runs, float("inf"))
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for name, run in runs.items():
            run()
            started = time.perf_counter()
            for _ in range(CALLS):
                run()
            best[name] = min(best[name], (time.perf_counter() - started) / CALLS * 1e6)
    return best


def measure(device: str, seconds: float) -> dict[Row, float]:
    torch.set_num_threads(1)
    matrix = torch.ones(4, 4, device=device)
    recorded = matrix.clone().requires_grad_()
    units: dict[Row, Callable[[], object]] = {
        ("torch.mm", "function", "forward"): lambda: torch.mm(matrix, matrix),
        ("torch.mm", "function", "recorded"): lambda: torch.mm(recorded, matrix),
    }
    return shortest(units | floors() | calls(device), seconds)


def show(best: dict[Row, float], device: str) -> None:
    unit = best["torch.mm", "function", "forward"]
    where = cpu_model() if device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}")
    for (op, way, what), microseconds in best.items():
        target = ""
        if way == "function" and what in TARGETS and op != "torch.mm":
            most = max(TARGETS[what], best[op, "floor", what] / unit + 2)
            target = f" of {most:.1f}"
        units = f"{microseconds:>8.1f} us {microseconds / unit:>7.1f} units{target}"
        print(f"  {op:<22}{way:<11}{what:<10}{units}")


def measured_in(interpreter: Path, device: str, seconds: float) -> dict[str, float]:
    """The same measurement in a process of another build: microseconds by the words of the row."""
    command = [
        interpreter,
        "-I",
        Path(__file__).resolve(),
        "--json",
        "--device",
        device,
        "--seconds",
        seconds,
    ]
    run = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def compare(old: Path, device: str, seconds: float, rounds: int) -> None:
    best: list[dict[str, float]] = [{}, {}]
    for _ in range(rounds):
        for interpreter, least in zip((old / ".venv/bin/python", Path(sys.executable)), best):
            for row, microseconds in measured_in(interpreter, device, seconds).items():
                least[row] = min(microseconds, least.get(row, microseconds))
    print(f"least of {rounds} rounds, microseconds: {'before':>38}{'now':>9}{'ratio':>9}")
    for row, before in best[0].items():
        print(f"  {row:<60}{before:>9.2f}{best[1][row]:>9.2f}{best[1][row] / before:>9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time limit, of each round with --compare"
    )
    parser.add_argument("--json", action="store_true", help="print {row: microseconds}")
    parser.add_argument("--compare", type=Path, metavar="OLD_CHECKOUT", help="measure another build in turn")
    parser.add_argument("--rounds", type=int, default=20, help="of --compare")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(arguments.compare, arguments.device, arguments.seconds, arguments.rounds)
        return
    best = measure(arguments.device, arguments.seconds)
    if arguments.json:
        print(json.dumps({f"{op:<22}{way:<11}{what}": time for (op, way, what), time in best.items()}))
    else:
        show(best, arguments.device)


if __name__ == "__main__":
    main()
