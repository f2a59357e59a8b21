# SPDX-License-Identifier: Apache-2.0
"""A layer of another project is replaced after a trial only: it and its replacement run side by side."""
