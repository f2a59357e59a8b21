# SPDX-License-Identifier: Apache-2.0
"""The committed comparison of the race detector with libtsan is of today's kernels, and has no open difference."""

from __future__ import annotations

from tests import libtsan

KNOWN = libtsan.committed()


def test_every_barrier_has_a_row():
    """python -m tests.libtsan compares anew what has changed."""
    assert list(KNOWN["barriers"]) == ["", *libtsan.barriers()]
    assert KNOWN["barriers"][""]["cases"] == len(libtsan.cases())


def test_every_planted_fault_has_a_row():
    assert list(KNOWN["faults"]) == libtsan.planted()


def test_the_detectors_agree_or_the_reason_is_known():
    assert libtsan.problems(KNOWN) == []
    different = {name.split(":")[0] for name, row in libtsan.rows(KNOWN).items() if libtsan.differs(row)}
    assert different == set(libtsan.REASONS)


def test_the_page_shows_the_record():
    assert libtsan.drawn(KNOWN) == libtsan.PAGE.read_text()
