# SPDX-License-Identifier: Apache-2.0
"""The command of `make gpu`: evidence from a card, in runs that each continue the last one.

common.py has the time limit and names of files; correct.py runs tests and checks, by resume.py test by test; bench.py
measures, with the contenders of contenders.py; tune.py tries other block sizes; table.py fills docs/performance.md.
counts.py and model.py hold the counts of docs/counts.md against the card: its counters, and its rates (rates.py), which
make bounds of them (bounds.py).
"""
