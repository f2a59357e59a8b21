# SPDX-License-Identifier: Apache-2.0
"""The measuring part of `make gpu`, on the CPU with cases that take no time: contenders, resuming, files, tables."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests import bench_records
from vitkern.bench import plots
from vitkern.bench.cases import TokenCase
from vitkern.bench.plan import Subject
from vitkern.bench.run import check
from vitkern.bench.workloads import OPS

TINY = TokenCase("tiny", "", 1, 11, 8, 3)


def test_further_contenders_are_checked_like_backends():
    op = OPS["token_pool"]
    work = op.make(TINY, torch.float32, "cpu")
    work = replace(work, others={"same": work.torch, "twice": lambda *tensors: 2 * work.torch(*tensors)})
    subject = Subject(op, TINY, torch.float32, torch.device("cpu"), ("cpu", "same", "twice"), ("forward",), 1)
    checks = check(subject, work)
    assert checks["same"].errors == check(subject, work)["same"].errors
    assert max(checks["same"].errors.values()) < 1e-5 < 0.9 < checks["twice"].errors["output"]


def test_further_contenders_are_drawn():
    rows = [bench_records.row(backend=name) for name in ("torch", "cuda", "mmcv")]
    (bars,) = plots.speedup_bars(rows)
    assert "fill-c2" in bars.markup()
    assert f"fill-{plots.COLOUR_OF_OTHERS}" in bars.markup()
