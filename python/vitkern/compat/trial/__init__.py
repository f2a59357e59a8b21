# SPDX-License-Identifier: Apache-2.0
"""The trial of a layer of another project: the original and the kernel side by side, before one replaces the other.

``settings`` has the conditions, ``inputs`` the inputs of both, ``specimen`` the copy of the layer that runs, ``world``
the surroundings of its code, ``runs`` one run and the comparison of two. ``coverage`` finds the ways through the code
that no run has taken, and ``settled`` those that need none. ``reading`` refuses code by its text, with ``purity`` and
``vocabulary``. ``wrong`` has kernels that the inputs must tell from the right one, and ``power`` checks whether the
trial could have failed. ``judge`` is the trial itself; ``apart`` runs it without the caller's settings.
"""
