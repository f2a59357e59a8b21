# SPDX-License-Identifier: Apache-2.0
"""The small commands of vitkern, and what all of them share; `bench` and `check` have packages of their own.

Nothing is imported here, nor torch by ``arguments`` and ``errors``: the command line has to work where torch does not.
"""
