# SPDX-License-Identifier: Apache-2.0
"""Where torch meets the kernels: schemas, fake implementations, autograd formulas and launches, one file per op."""
