# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of the ops: random calls of the public functions, each number of the results held against a bound.

``draw`` makes a case of a number, ``call`` runs it, ``oracle`` and its kin say what is right and how far a result may be
off, ``judge`` compares, ``workers`` does so for as long as it is told. ``tools/fuzz --help`` has the flags.
"""
