# SPDX-License-Identifier: Apache-2.0
"""The measuring part of `make gpu`, run on the CPU with tiny cases: contenders, resuming, files, tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import bench, contenders, table
from benchmarks.gpu.common import DONE, FAILED, LEFT, RESULTS, Budget, environment
from benchmarks.peers import OURS
from tests import bench_records
from tests.test_bench_run import TINY, quick  # noqa: F401 - a fixture of all tests here
from vitkern.bench import plots, run, store
from vitkern.bench.ceilings import cost
from vitkern.bench.plan import Subject
from vitkern.bench.run import check
from vitkern.bench.verify import complaint
from vitkern.cases import MsDeformAttnCase
from vitkern.cases.ops import OPS
from vitkern.commands.errors import CommandError

SMALL = TINY | {
    name: MsDeformAttnCase("small", "", 1, ((6, 5), (3, 2)), 40, 2, 8, 3)
    for name in ("ms_deform_attn", "ms_deform_attn_fused")
}


def test_further_contenders_are_checked_like_backends():
    op = OPS["token_pool"]
    work = op.workload(TINY["token_pool"], torch.float32, "cpu")
    work = replace(
        work, others={"same": work.by_torch, "twice": lambda *tensors: 2 * work.by_torch(*tensors)}
    )
    names = ("cpu", "same", "twice")
    subject = Subject(op, TINY["token_pool"], torch.float32, torch.device("cpu"), names, ("forward",), 1)
    checks = check(subject, work)
    assert checks["same"].errors == check(subject, work)["same"].errors
    assert max(checks["same"].errors.values()) < 1e-5 < 0.9 < checks["twice"].errors["output"]


def test_further_contenders_are_drawn():
    rows = [bench_records.row(backend=name) for name in ("torch", "cuda", "mmcv")]
    (bars,) = plots.speedup_bars(rows)
    assert "fill-c2" in bars.markup()
    assert f"fill-{plots.COLOUR_OF_OTHERS}" in bars.markup()


@pytest.mark.parametrize("op", bench.ALL_OPS.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_costs_are_those_of_vitkern_bench(op, dtype):
    case = SMALL[op.name.removesuffix("_uniform")]
    subject = Subject(op, case, dtype, torch.device("cpu"), (), bench.PASSES, 1)
    assert bench.costs(subject) == cost(op, case, dtype)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Real measurements on the CPU: two cases of two ops in one dtype, a right contender and a wrong one."""
    case = replace(TINY["token_pool"], pixels=11, channels=8)
    cases = {"one": replace(case, name="one"), "two": replace(case, name="two", tokens=2)}
    for name in ("token_pool", "token_project"):
        monkeypatch.setitem(bench.ALL_OPS, name, replace(OPS[name], cases=cases, usual=("two",)))
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "STATE", tmp_path / "state")
    monkeypatch.setattr(contenders, "OTHER_PEERS", {})

    def functions(op, case, work, found):
        return {
            name: (lambda *t: 2 * work.by_torch(*t)) if "wrong" in name else work.by_torch for name in found
        }

    monkeypatch.setattr(contenders, "functions", functions)
    monkeypatch.setattr(
        contenders, "names", lambda *_: (dict.fromkeys(("right", "wrong")), {"mmcv": "absent"})
    )
    monkeypatch.setattr(bench, "gpu_clocks", lambda: ["a card, 1.2.3, 1980 MHz"])


def wanted(**filters) -> list[Subject]:
    return bench.subjects(["token_pool", "token_project"], dtypes=["fp32"], device="cpu", **filters)


def facts() -> dict:
    return environment("0123456789abcdef") | {"commit": {"id": "0123456789abcdef", "dirty": False}}


def measure(path, *, seconds=1e4, **filters) -> int:
    return bench.run(wanted(**filters), path, facts(), Budget(seconds))


def test_usual_shapes_come_first(small):
    assert [(s.op.name, s.case.tokens) for s in wanted()] == [
        ("token_pool", 2),
        ("token_project", 2),
        ("token_pool", 3),
        ("token_project", 3),
    ]


def test_rows_are_those_of_vitkern_bench_with_more_contenders(small, tmp_path, capsys):
    path = tmp_path / "card" / "2026-01-01-0123456789.json"
    assert measure(path) == DONE
    record = store.read(path)
    assert record["status"] == "complete"
    by_backend = {}
    for row in record["rows"]:
        by_backend.setdefault(row["backend"], []).append(row)
    assert {name: len(rows) for name, rows in by_backend.items()} == dict.fromkeys(
        ("cpu", "torch", "right", "wrong"), 2 * 2 * 2
    )
    for row in record["rows"]:
        assert row["verified"] == (row["backend"] != "wrong")
        assert ("ms" in row) == row["verified"]
        if row["verified"]:
            assert {"gb_per_s", "gflop_per_s", "share", "bound", "peak_bytes"} <= set(row)
            assert len(row["samples_ms"]) == 3
    assert {row["pass"] for row in record["rows"]} == {"forward", "both"}
    assert record["absent"] == {"mmcv": "absent"}
    (session,) = record["sessions"]
    assert session["clocks_before"] == session["clocks_after"] == ["a card, 1.2.3, 1980 MHz"]
    assert record["environment"]["commit"]["id"] == "0123456789abcdef"
    assert "FAILED" in path.with_suffix(".md").read_text()
    assert list(path.parent.glob("*speedup*.svg")) and list(path.parent.glob("*roofline.svg"))
    assert "0 subjects left, 0 of ours FAILED" in capsys.readouterr().out


def test_what_the_time_does_not_suffice_for_is_left_for_the_next_call(small, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    rows_of = bench.Bench.rows_of
    seen = []

    def noted(self, subject):
        seen.append((subject.op.name, subject.case.tokens))
        self.budget.end -= 60  # as if it took a minute
        return rows_of(self, subject)

    monkeypatch.setattr(bench.Bench, "rows_of", noted)
    assert measure(path, seconds=100) == LEFT
    assert store.read(path)["status"] == "interrupted"
    before = store.read(path)["rows"]
    assert len(seen) == 2
    assert measure(path) == DONE
    assert len(seen) == len(set(seen)) == 4
    record = store.read(path)
    assert len(record["sessions"]) == 2
    assert [store.key(row) for row in record["rows"][: len(before)]] == [store.key(row) for row in before]
    assert record["rows"][0]["samples_ms"] == before[0]["samples_ms"]


def test_a_kill_loses_no_more_than_what_was_under_way(small, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    rows_of = bench.Bench.rows_of

    def killed(self, subject):
        if self.record["rows"]:
            assert store.read(self.path)["rows"]  # a kill leaves these rows
            raise KeyboardInterrupt
        return rows_of(self, subject)

    monkeypatch.setattr(bench.Bench, "rows_of", killed)
    assert measure(path) == LEFT
    assert len(store.read(path)["rows"]) == 8


def test_what_ended_the_process_comes_last_the_next_time(small, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    rows_of = bench.Bench.rows_of
    seen = []

    def ends(self, subject):
        seen.append((subject.op.name, subject.case.name))
        if len(seen) == 1:
            raise SystemExit  # as near as a test can come to a crash
        return rows_of(self, subject)

    monkeypatch.setattr(bench.Bench, "rows_of", ends)
    with pytest.raises(SystemExit):
        measure(path)
    assert measure(path) == DONE
    assert len(seen) == 5 and seen[0] == seen[-1] == ("token_pool", "two")
    assert next((tmp_path / "state").iterdir()).read_text() == ""


def test_a_contender_that_comes_later_is_measured_alone(small, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    assert measure(path) == DONE
    monkeypatch.setattr(contenders, "names", lambda *_: (dict.fromkeys(("right", "wrong", "new")), {}))
    assert measure(path) == DONE
    rows = store.read(path)["rows"]
    assert sum(row["backend"] == "new" for row in rows) == 8
    assert len(rows) == 40


def test_after_an_error_of_the_card_the_guilty_one_is_left_out(small, tmp_path, monkeypatch):
    def functions(op, case, work, found):
        def breaks(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return {name: breaks if name == "wrong" else work.by_torch for name in found}

    monkeypatch.setattr(contenders, "functions", functions)
    path = tmp_path / "file.json"
    with pytest.raises(CommandError, match="wrong left the card in an undefined state at token_pool"):
        measure(path, cases=["two"])
    assert [row["backend"] for row in store.read(path)["rows"]] == ["wrong", "wrong"]
    with pytest.raises(CommandError, match="at token_project"):
        measure(path, cases=["two"])
    assert measure(path, cases=["two"]) == DONE
    assert len(store.read(path)["rows"]) == 16


def test_what_raises_while_it_is_timed_has_no_figures(small, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "interleaved", out_of_memory)
    path = tmp_path / "file.json"
    assert measure(path) == FAILED
    reasons = {row["reason"] for row in store.read(path)["rows"] if row["backend"] == "cpu"}
    assert reasons == {"one of those timed in turn raised OutOfMemoryError: CUDA out of memory"}


def test_a_file_of_other_software_is_refused(tmp_path):
    software = environment() | {what: {"version": "1"} for what in ("torch", "triton", "vitkern")}
    path = tmp_path / "file.json"
    store.write(path, bench.opened(path, software))
    assert bench.opened(path, software)["rows"] == []
    with pytest.raises(CommandError, match="was begun with torch 1, this is 2: FRESH=1"):
        bench.opened(path, software | {"torch": {"version": "2"}})


def test_what_stands_in_the_readme_is_made_of_the_committed_files():
    assert table.committed() == table.made_of(RESULTS)


def test_without_a_file_it_says_that_no_card_has_been_measured(tmp_path):
    assert table.made_of(tmp_path) == table.NOTHING
    assert not any(character.isdigit() for character in table.NOTHING)


def on_a_card(*rows: store.Row, status: str = "complete") -> store.Record:
    record = bench_records.record(*({**row, "device": "cuda"} for row in rows), status=status)
    card = {"index": 0, "name": "NVIDIA H100 80GB HBM3", "memory_gib": 79}
    record["environment"]["cuda"]["devices"] = [card]
    record["environment"]["gpu_clocks"] = ["NVIDIA H100 80GB HBM3, 580.1, 1980 MHz"]
    record["ceilings"] = {
        "copy": {str(2**30): 3000.0},
        "product": {"float32": 50e3, "bfloat16": 700e3, "float16": 710e3},
    }
    return record


def encoder(backend: str, ms: float, case: str = "detr-encoder", **more) -> store.Row:
    return bench_records.row(case, op="ms_deform_attn", backend=backend, dtype="bfloat16", slower=ms, **more)


def test_the_table_shows_ours_the_best_peer_and_the_limit(tmp_path):
    rows = [
        encoder("cuda", 0.5),
        encoder("triton", 0.7),
        encoder("torch", 6.0),
        encoder("torch compiled", 2.0),
    ]
    rows += [encoder("mmcv", 1.5), encoder("deformops", 0.8), encoder("hub kernel", 1.0, reason="raised")]
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    store.write(folder / "2026-01-01-0123456789.json", on_a_card(encoder("cuda", 9.0)))
    store.write(folder / "2026-01-02-0123456789.json", on_a_card(*rows))
    made = table.made_of(tmp_path)
    assert "**NVIDIA H100 80GB HBM3**, driver 580.1, torch " in made
    assert "copy runs at 3000 GB/s, a product at 50 TFLOP/s in fp32, 700 TFLOP/s in bf16" in made
    assert "benchmarks/results/nvidia-h100-80gb-hbm3/2026-01-02-0123456789.md" in made
    (line,) = [line for line in made.splitlines() if line.startswith("| Deformable-DETR encoder")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:7] == ["bf16", "forward", "0.5 (cuda)", "12.00x", "4.00x", "1.60x (deformops)"]
    assert cells[7] == "20% (memory)"
    assert "9" not in cells[3]
    assert "- ms_deform_attn, forward: the best of all others takes 1.60x as long" in made


def test_means_are_over_all_shapes(tmp_path):
    rows = [encoder("cuda", 1.0), encoder("torch", 4.0)]
    rows += [encoder(name, ms, case="bev-tiny") for name, ms in (("triton", 2.0), ("mmcv", 2.0))]
    store.write(tmp_path / "card" / "2026-01-01-0.json", on_a_card(*rows, status="interrupted"))
    made = table.made_of(tmp_path)
    assert "takes 2.00x as long in the geometric mean of 2 rows, 1.00x at the least" in made
    assert "(not all shapes measured yet)" in made


def test_the_generator_writes_between_its_marks(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    monkeypatch.setattr(table, "PAGE", page)
    assert table.main(tmp_path, check=True) == FAILED
    assert "README.md is not made of" in capsys.readouterr().err
    assert table.main(tmp_path) == DONE
    assert page.read_text() == f"before\n\n{table.BEGIN}\n{table.NOTHING}\n{table.END}\n\nafter\n"
    assert table.main(tmp_path, check=True) == DONE


def test_contenders_compute_the_same(monkeypatch):
    """Our op stands in for the peers; torch.compile is replaced by the identity."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(contenders, "OTHER_PEERS", {"like ours": replace(OURS, name="like ours")})
    for op in bench.ALL_OPS.values():
        case = SMALL[op.name.removesuffix("_uniform")]
        work = op.workload(case, torch.float32, "cpu")
        found, _ = contenders.names(op, "cpu")
        names = {"torch compiled", "vitkern compiled"}
        names |= {"like ours"} if "attn" in op.name else set()
        names |= {"torch attention"} if "token" in op.name else set()
        assert set(found) == names
        work = replace(work, others=contenders.functions(op, case, work, found))
        subject = Subject(op, case, torch.float32, torch.device("cpu"), tuple(found), ("forward",), 1)
        for name, result in check(subject, work).items():
            assert complaint(result.errors, torch.float32) is None, (op.name, name)


def test_who_is_absent_or_left_out_is_said_with_the_reason():
    found, absent = contenders.names(OPS["ms_deform_attn"], "cpu", ["torch compiled"])
    assert "torch compiled" not in found
    assert absent["torch compiled"] == "left out by --without"
    assert absent["mmcv"].startswith(("absent: ", "unsupported: "))
