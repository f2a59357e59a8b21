# SPDX-License-Identifier: Apache-2.0
"""The ops in torch: schemas, fake implementations, autograd formulas and launches, one file per op."""
