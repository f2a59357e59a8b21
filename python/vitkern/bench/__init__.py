# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench`: the times of the kernels, the limits of the machine, and the effects of changes.

``plan`` chooses the rows, ``verify`` checks results, ``measure`` times calls, and ``ceilings`` measures the machine.
``run`` puts these into a file, which ``store`` reads and writes. ``compare`` and ``live`` judge differences by
``verdicts``; ``report`` draws. Nothing is imported here: the command line has to work without torch.
"""
