# SPDX-License-Identifier: Apache-2.0
"""`vitkern check`: outputs and gradients of every kernel, or of a user's own, against the formula in float64.

``vitkern.cases`` has the problems; ``routes`` lists how kernels can run, and ``plan`` the checks that were requested.
``examine`` makes a check, ``compare`` judges it, and ``report`` prints the results. ``user_module`` does the same with
a user's implementation, and ``mistakes`` finds the usual mistakes in it. Nothing is imported here: the command line has
to work without torch.
"""
