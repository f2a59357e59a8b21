# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of the ops: random calls of the public functions; each number of the results must lie within its bounds.

``draw`` makes a case from a number, ``call`` runs it, ``adapter``, ``tokens`` and ``attention`` compute the expected
results with error bounds, ``judge`` compares, and ``workers`` run cases for a given time. `tools/fuzz --help` lists the
options.
"""
