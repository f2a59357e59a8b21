# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench run`: the records, the refusals, and the state after an interruption."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vitkern.bench import ceilings, measure, run, schema, store
from vitkern.bench.plan import Request, plan
from vitkern.cases.ops import OPS
from vitkern.cli import main

TINY = {name: replace(next(iter(op.tiny.values())).case, name="tiny") for name, op in OPS.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Real measurements on tiny inputs, with two sizes of copies and one small product for the machine's limits."""
    for name, case in TINY.items():
        small = replace(OPS[name], cases={"tiny": case}, usual=("tiny",), brief=("tiny",))
        monkeypatch.setitem(OPS, name, small)
    monkeypatch.setitem(ceilings.COPIED, "cpu", [2**12, 2**14])
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 16)
    sizes = {what: {"cpu": 4} for what in ("gather", "product")}
    monkeypatch.setattr(ceilings, "ANCHOR_SIZE", sizes)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(run, "ROUNDS", 3)
    # A visit ends with its rounds, however busy the machine.
    monkeypatch.setattr(run, "SECONDS", dict.fromkeys(run.SECONDS, 60.0))


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def test_every_op_pass_and_dtype_has_verified_figures(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert bench("run", "--quick", "--device", "cpu", "--json", path) == 0
    record = store.read(path)
    assert record["status"] == "complete"
    seen = {(row["op"], row["dtype"], row["pass"], row["backend"]) for row in record["rows"]}
    passes, dtypes = ("forward", "backward"), ("float32", "bfloat16")
    backends = ("cpu", "torch")
    assert seen == {(o, d, p, b) for o in OPS for d in dtypes for p in passes for b in backends}
    for row in record["rows"]:
        assert row["verified"] is True
        assert row["reason"] is None
        assert row["errors"]
        assert [len(visit) for visit in row["samples_ms"]] == [3, 3, 3]
        assert row["anchor"] in record["anchors"]
        assert row["share"] > 0
        assert row["bound"] in ("memory", "arithmetic")
    assert all(rate > 0 for rate in record["ceilings"]["copy"].values())
    assert set(record["ceilings"]["product"]) == {"float32", "bfloat16"}
    assert record["environment"]["cpu"]["model"]
    assert "id" in (record["environment"]["commit"] or {"id": "not in a checkout"})
    assert "FAILED" not in capsys.readouterr().out.replace("0 FAILED", "")


def test_what_others_held_up_has_no_speed_up(tmp_path, capsys, monkeypatch):
    """In all visits, the anchor of the first measured pass takes ten times as long as the other's."""

    def slowed(variants: dict, **options):
        samples = measure.interleaved(variants, **options)
        anchor = 100.0 if len(groups) % 2 == 0 else 10.0
        groups.append(anchor)
        return samples | {"anchor": [anchor for _ in samples["anchor"]]}

    groups: list[float] = []
    monkeypatch.setattr(run, "interleaved", slowed)
    path = tmp_path / "out.json"
    bench("run", "--op", "token_pool", "--dtype", "fp32", "--json", path)
    said = capsys.readouterr().out
    table = {
        tuple(words[4:6]): line for line in said.splitlines() if (words := line.split())[:1] == ["token_pool"]
    }
    assert [" held up " in line for line in table.values()] == [True, True, False, False]
    assert "2 rows were held up by other work: run them again on a quieter machine" in said


def test_errors_are_those_of_what_the_pass_computes(tmp_path):
    path = tmp_path / "out.json"
    command = "run --op token_pool --dtype fp32 --pass forward --pass backward"
    bench(*command.split(), "--json", path)
    errors = {row["pass"]: set(row["errors"]) for row in store.read(path)["rows"]}
    assert errors == {"forward": {"output"}, "backward": {"gradient of x", "gradient of weight"}}


def spoil_token_pool(monkeypatch, **functions) -> None:
    """Replaces functions of token_pool's problem."""
    op = OPS["token_pool"]
    spoilt = replace(
        op, make=lambda *arguments, **options: replace(op.make(*arguments, **options), **functions)
    )
    monkeypatch.setitem(OPS, "token_pool", spoilt)


def wrong_gradient(x: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
    """token_pool with the right output and, except in the reference, a gradient of `weight` with the wrong sign."""
    right = torch.softmax(x @ weight.mT, 1).transpose(1, 2) @ x
    if backend == "reference":
        return right
    flipped = torch.softmax(x.detach() @ (2 * weight.detach() - weight).mT, 1).transpose(1, 2) @ x.detach()
    return right.detach() + (flipped - flipped.detach()) + 0 * right


def test_what_is_wrong_gets_no_figures(tmp_path, capsys, monkeypatch):
    spoil_token_pool(monkeypatch, call=wrong_gradient)
    path = tmp_path / "out.json"
    assert bench("run", "--op", "token_pool", "--dtype", "fp32", "--json", path) == 1
    rows = {(row["pass"], row["backend"]): row for row in store.read(path)["rows"]}
    failed = rows["backward", "cpu"]
    assert failed["verified"] is False
    assert "gradient of" in failed["reason"]
    assert not {"samples_ms", "ms", "share", "gflop_per_s"} & set(failed)
    assert rows["forward", "cpu"]["verified"]
    assert rows["backward", "torch"]["verified"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILED:" in line]
    assert line.endswith(failed["reason"])
    assert " ms" not in line


def test_what_raises_is_a_failure_of_its_own(tmp_path, monkeypatch):
    def raises(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    spoil_token_pool(monkeypatch, by_torch=raises)
    path = tmp_path / "out.json"
    assert bench("run", "--op", "token_pool", "--pass", "forward", "--dtype", "fp32", "--json", path) == 1
    by_backend = {row["backend"]: row for row in store.read(path)["rows"]}
    assert by_backend["torch"]["reason"] == "raised RuntimeError: no such"
    assert by_backend["cpu"]["verified"]


@pytest.mark.parametrize("groups, visits", [(2, [1, 1]), (6, [2, 2, 1, 1])])
def test_an_interrupted_run_keeps_what_was_measured(groups, visits, tmp_path, capsys, monkeypatch):
    """`visits`: those of each pass of float32, then of bfloat16, if Ctrl-C comes after `groups` measured groups."""
    measured = []

    def interrupted(*arguments: object, **options: object):
        if len(measured) == groups:
            raise KeyboardInterrupt
        measured.append(measure.interleaved(*arguments, **options))
        return measured[-1]

    monkeypatch.setattr(run, "interleaved", interrupted)
    path = tmp_path / "out.json"
    assert bench("run", "--op", "token_pool", "--backend", "cpu", "--json", path) == 130
    record = store.read(path)
    assert record["status"] == "interrupted"
    assert [len(row["samples_ms"]) for row in record["rows"]] == visits
    assert f"interrupted: {len(visits)} rows" in capsys.readouterr().out


def test_a_run_that_breaks_keeps_what_was_measured(tmp_path, monkeypatch):
    """If memory runs out during a run, the error is raised, and the file is marked as interrupted."""
    measured = []

    def breaks(*arguments: object, **options: object):
        if measured:
            raise MemoryError("no more")
        measured.append(measure.interleaved(*arguments, **options))
        return measured[-1]

    monkeypatch.setattr(run, "interleaved", breaks)
    path = tmp_path / "out.json"
    with pytest.raises(MemoryError):
        bench("run", "--op", "token_pool", "--backend", "cpu", "--json", path)
    record = store.read(path)
    assert (record["status"], len(record["rows"])) == ("interrupted", 1)


def test_the_file_is_whole_at_any_time(tmp_path, monkeypatch):
    """After each group the file can be read and is marked as that of a running run."""
    path, seen = tmp_path / "out.json", []
    write = store.write

    def watched(*arguments: object) -> None:
        write(*arguments)
        record = store.read(path)
        seen.append((record["status"], len(record["rows"])))

    monkeypatch.setattr(store, "write", watched)
    bench("run", "--op", "token_pool", "--dtype", "fp32", "--json", path)
    assert seen[:2] == [("running", 0), ("running", 2)] and seen[-1] == ("complete", 4)
    assert set(seen[2:-1]) == {("running", 4)}  # rows that neighbours held up are measured again
    assert not list(tmp_path.glob("*.part"))


def test_filters_leave_what_was_asked_for(tmp_path):
    path = tmp_path / "out.json"
    command = (
        "run --op token_project --op token_pool --case t* --dtype bf16 --pass both --backend cpu --batch 2"
    )
    assert bench(*command.split(), "--json", path) == 0
    keys = [store.key(row) for row in store.read(path)["rows"]]
    assert keys == [
        (op, "tiny", 2, "cpu", "bfloat16", "both", "cpu") for op in ("token_pool", "token_project")
    ]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--op", "msda"], "unknown op 'msda': choose from ms_deform_attn, "),
        (["--case", "huge"], "unknown case 'huge': choose from tiny"),
        (["--case", "tiny", "--case", "hug*"], "unknown case 'hug*': choose from tiny"),
        (["--dtype", "int8"], "unknown dtype 'int8': choose from fp32, bf16, fp16, fp64"),
        (["--pass", "up"], "unknown pass 'up': choose from forward, backward, both"),
        (["--backend", "mps"], "unknown backend 'mps': choose from cpu, cuda, triton, reference, torch"),
        (["--backend", "cuda"], "backend cuda cannot run float32 on cpu: "),
        (["--threads", "0"], "--threads must be more than 0, got 0"),
        (["--threads", "-1"], "--threads must be more than 0, got -1"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0"),
        (["--seconds", "nan"], "--seconds must be more than 0, got nan"),
        (["--seconds", "inf"], "--seconds must be more than 0, got inf"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_what_there_is_not_is_refused_in_one_sentence(arguments, sentence, capsys):
    assert bench("run", "--device", "cpu", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(f"vitkern bench: {sentence}")


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert bench("run", "--op", "token_pool", "--json", tmp_path / "file" / "out.json") == 2
    assert "cannot write" in capsys.readouterr().err


def test_figures_without_verification_break_the_schema(tmp_path):
    path = tmp_path / "out.json"
    bench("run", "--op", "token_pool", "--dtype", "fp32", "--json", path)
    record = json.loads(path.read_text())
    record["rows"][0]["verified"] = False
    assert "no figures" in (schema.complaint(record) or "")


def test_a_run_knows_the_operations_of_our_ops():
    """In a process of its own, for other tests register them too."""
    code = (
        "from vitkern.bench import ceilings; from torch.utils.flop_counter import flop_registry as counted; "
    )
    code += "import torch; assert torch.ops.vitkern.token_pool in counted"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_op_counts_what_it_moves_and_computes():
    """For token_pool [1, 7, 5] with 3 tokens: x, weight and tokens in float32; scores and sums."""
    (subject,) = plan(Request(["token_pool"], dtypes=["fp32"], device="cpu"))
    costs = ceilings.cost(subject.op, subject.case, torch.float32)
    x, weight, tokens = (4 * count for count in (7 * 5, 3 * 5, 3 * 5))
    assert costs["forward"] == (x + weight + tokens, 4 * 7 * 5 * 3)
    assert costs["backward"] == (2 * (x + weight) + tokens, 2 * 4 * 7 * 5 * 3)
    assert costs["both"] == tuple(map(sum, zip(costs["forward"], costs["backward"])))


def test_the_limit_is_the_longer_of_moving_and_computing():
    ceiling = {"copy": {"1000": 10.0, "100000": 1.0}, "product": {"float32": 2.0, "bfloat16": 0.5}}
    assert ceilings.limit(ceiling, "float32", 1000, 0) == (1000 / 10.0 / 1e6, "memory")
    assert ceilings.limit(ceiling, "float32", 10, 10**6) == (0.5, "arithmetic")
    # 16-bit numbers may be multiplied as float32, so the better of both rates holds.
    assert ceilings.product_rate(ceiling, "bfloat16") == 2.0
    assert ceilings.copy_rate(ceiling, 10_000) == pytest.approx(5.5)
    assert ceilings.copy_rate(ceiling, 10**9) == 1.0
