# SPDX-License-Identifier: Apache-2.0
"""CUDA, Triton and native CPU kernels, with PyTorch autograd, for the ViT-Adapter family of vision models."""

from vitkern import nn
from vitkern._C import version as __version__
from vitkern.functional import ms_deform_attn

__all__ = ["__version__", "ms_deform_attn", "nn"]
