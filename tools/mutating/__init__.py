# SPDX-License-Identifier: Apache-2.0
"""Small faults in the code, drawn by a seed, and the tests that find them: the command ``tools/mutate``."""
