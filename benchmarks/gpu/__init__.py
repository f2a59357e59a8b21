# SPDX-License-Identifier: Apache-2.0
"""Evidence from a card, in runs that go on where the last one stopped: what `make gpu` starts.

common.py has the time limit and names of files; correct.py runs tests and checks, by resume.py test by test; bench.py
measures, with the contenders of contenders.py; tune.py tries other block sizes; table.py fills docs/performance.md.
counts.py and model.py hold the counts of docs/counts.md against the card: its counters, and its rates (rates.py), which
make bounds of them (bounds.py).
"""
