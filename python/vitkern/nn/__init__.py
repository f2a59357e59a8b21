# SPDX-License-Identifier: Apache-2.0
"""Modules round the ops, with the parameter names of the projects they come from."""

from vitkern.nn.ms_deform_attn import MSDeformAttn

__all__ = ["MSDeformAttn"]
