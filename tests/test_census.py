# SPDX-License-Identifier: Apache-2.0
"""The committed census of other projects' layers is what its page says, and covers what is promised."""

import json

import pytest

import vitkern
from tests import layers_of_others, layers_today
from tests.documents import ROOT
from tools.counting import table
from tools.counting.records import RECORDS

ROWS = json.loads((ROOT / "tools" / "counting" / "census.json").read_text(encoding="utf-8"))
REASONS = ("it is another operation", "may change", "no trial went on", "has an output", "has a gradient")


def test_the_page_is_written_from_the_data():
    assert (ROOT / "docs" / "migration" / "layers.md").read_text(encoding="utf-8") == table.page(ROWS)


def test_the_data_has_every_record():
    records = [(each.project, each.source, each.module, each.kind) for each in RECORDS]
    assert records == [(row["project"], row["source"], row["module"], row["kind"]) for row in ROWS]


def test_at_most_five_classes_stay_and_each_has_a_reason():
    stay = [row for row in ROWS if row["by"] == "left"]
    assert len(ROWS) >= 40 and len(stay) <= 5
    assert all(any(each in row["unless"] + row["reason"] for each in REASONS) for row in stay)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['project']}: {row['kind']}")
def test_a_replaced_class_computes_the_same(row):
    if "outputs" in row:
        assert row["outputs"] <= 1e-5 and row["gradients"] <= 1e-4
    else:
        assert row["unless"] or row["by"] == "left"


@pytest.mark.parametrize("name", sorted({row["stand_in"] for row in ROWS} - {""}))
def test_a_stand_in_has_the_verdict_of_the_census(name):
    kind = getattr(layers_today, name, None) or getattr(layers_of_others, name)
    found = {row["stand_in_by"] for row in ROWS if row["stand_in"] == name}
    is_now = vitkern.patch(kind())
    assert found == {"fused" if any(row.fused for row in is_now) else "core" if is_now else "left"}


def test_a_changed_class_is_told():
    before = {table.key(ROWS[0]): ROWS[0]}
    assert list(table.changes(before, ROWS[:1])) == []
    other = {**ROWS[0], "hash": "another", "by": "left", "reason": "because"}
    said = list(table.changes(before, [other]))
    assert len(said) == 2 and "the code of" in said[0] and "is left: because" in said[1]
    apart = {**ROWS[0], "stand_in_by": "left"}
    assert "stays" in next(table.changes(before, [apart]))
