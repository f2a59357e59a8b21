# SPDX-License-Identifier: Apache-2.0
"""The one error of the commands, which vitkern.cli prints."""


class CommandError(Exception):
    """What the user asked for cannot be had; the message is the one sentence that says why and what to do."""
