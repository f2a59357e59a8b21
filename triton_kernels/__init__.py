# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, installed as ``vitkern.triton_kernels``: ``@triton.jit`` functions and their launch tables only."""
