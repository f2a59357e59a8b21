# SPDX-License-Identifier: Apache-2.0
"""The one error of the commands, which vitkern.cli prints."""

INTERRUPTED = 130  # what a process exits with after Ctrl-C, as shells have it


class CommandError(Exception):
    """What the user asked for cannot be had; the message is the one sentence that says why and what to do."""


def in_one_line(error: BaseException) -> str:
    """Its message as part of a sentence of ours."""
    return " ".join(str(error).split())[:300]
