# SPDX-License-Identifier: Apache-2.0
"""python -m vitkern: the same as the command `vitkern`."""

import sys

from vitkern.cli import main

sys.exit(main())
