# SPDX-License-Identifier: Apache-2.0
"""`vitkern check`: outputs and gradients of every kernel, or of anybody's own, against the formula in float64."""
