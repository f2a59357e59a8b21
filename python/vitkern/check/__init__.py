# SPDX-License-Identifier: Apache-2.0
"""`vitkern check`: outputs and gradients of every kernel, or of anybody's own, against the formula in float64.

``settings`` says what each op is checked on and ``problems`` how it is called, ``routes`` how kernels can run and
``plan`` what of all that was asked for; ``examine`` makes a check, with ``compare`` as its judge, and ``report`` tells.
``theirs`` does the same with an implementation of the user's, whose usual ``mistakes`` it knows. Nothing is imported
here: the command line has to work without torch.
"""
