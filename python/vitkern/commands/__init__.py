# SPDX-License-Identifier: Apache-2.0
"""The small commands of vitkern, and the code that all commands share; `bench` and `check` have their own packages.

Nothing is imported here, nor torch by ``arguments`` and ``errors``: the command line has to work where torch does not.
"""
