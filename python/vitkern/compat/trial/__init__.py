# SPDX-License-Identifier: Apache-2.0
"""The trial of a layer of another project: the original and the kernel side by side, before one replaces the other.

``settings`` has the conditions, ``inputs`` what is given to both, ``specimen`` the copy of the layer that runs,
``world`` what its code finds outside of itself, ``runs`` one run and the comparison of two. ``coverage`` tells which
ways through the code no run has taken, and ``settled`` which of them need none. ``reading`` refuses code by what it
says, with ``purity`` and ``vocabulary``. ``wrong`` has kernels that the inputs must tell from the right one, ``power``
asks whether the trial could have failed. ``judge`` puts them together, ``apart`` from all that the caller has set.
"""
