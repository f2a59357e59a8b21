# SPDX-License-Identifier: Apache-2.0
"""`vitkern bench`: what the kernels take, what the machine would allow, and whether a change made a difference.

``cases`` says what is run, ``verify`` whether it is right, ``measure`` how long it takes, ``ceilings`` what the
machine can do; ``run`` writes them to a file that ``store`` reads and writes, ``compare`` and ``live`` judge
differences by ``verdicts``, ``report`` draws. Nothing is imported here: the command line has to work without torch.
"""
