# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of the ops: random calls of the public functions, each number of the results held against a bound.

``draw`` makes a case of a number, ``call`` runs it, ``adapter``, ``tokens`` and ``attention`` say what is right and how
far each number may be off, ``judge`` compares, ``workers`` do so for as long as they are told. `tools/fuzz --help` has
the flags.
"""
